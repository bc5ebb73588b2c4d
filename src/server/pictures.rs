//! The images that a chat names, brought here before the model's turn.

use std::{borrow::Cow, sync::Arc};

use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout_at;

use super::error::{Answer, ApiError};
use super::image_url;
use super::log::Entry;
use super::state::{AppState, BUFFER_UNIT};

/// An image as it was sent or fetched.
#[derive(Debug)]
pub(super) enum Picture {
    /// A data URI, or what is none.
    Sent {
        url: String,
        /// Its place among all that are held.
        _room: OwnedSemaphorePermit,
    },
    /// The bytes of an image that was elsewhere.
    Fetched {
        bytes: Vec<u8>,
        /// Their place among all that are held.
        _room: OwnedSemaphorePermit,
    },
}

impl Picture {
    /// The image file; `number` counts the images of the request from 1.
    ///
    /// # Errors
    /// When it was sent as anything but a data URI in base64.
    pub(super) fn bytes(&self, number: usize) -> Answer<Cow<'_, [u8]>> {
        match self {
            Self::Sent { url, .. } => image_url::data(number, url).map(Cow::Owned),
            Self::Fetched { bytes, .. } => Ok(Cow::Borrowed(bytes)),
        }
    }
}

/// Fetches those of `urls` that name another machine, one after another, in the time of the request that `entry` is of.
///
/// # Errors
/// As [`super::remote_image::RemoteImages::fetch`], when there is no room for one more image, and when the request takes
/// longer than it may.
pub(super) async fn gather(state: &AppState, entry: &Entry, urls: Vec<String>) -> Answer<Vec<Picture>> {
    let deadline = entry.arrived() + state.options().limits.request_time;
    let gathered = async {
        let mut pictures = Vec::with_capacity(urls.len());
        for (number, url) in (1..).zip(urls) {
            pictures.push(if is_remote(&url) {
                fetch(state, number, &url).await?
            } else {
                let room = room(state, url.len())?;
                Picture::Sent { url, _room: room }
            });
        }
        Ok(pictures)
    };
    timeout_at(deadline.into(), gathered).await.map_err(|_| ApiError::deadline())?
}

async fn fetch(state: &AppState, number: usize, url: &str) -> Answer<Picture> {
    let mut room = room(state, state.options().limits.body_bytes)?;
    let bytes = state.remote().fetch(&number.to_string(), url).await;
    let bytes = bytes.map_err(|error| ApiError::from(error).about("messages"))?;
    // What the image turned out not to need is others' again.
    drop(room.split(room.num_permits().saturating_sub(bytes.len().div_ceil(BUFFER_UNIT))));
    Ok(Picture::Fetched { bytes, _room: room })
}

/// So many bytes of what all requests together may hold.
fn room(state: &AppState, bytes: usize) -> Answer<OwnedSemaphorePermit> {
    let units = u32::try_from(bytes.div_ceil(BUFFER_UNIT)).unwrap_or(u32::MAX);
    let room = Arc::clone(state.buffered()).try_acquire_many_owned(units);
    room.map_err(|_| ApiError::busy("the images of other requests take all room; ask again in a while"))
}

/// Whether `url` names another machine: `http:` or `https:`, in any case.
fn is_remote(url: &str) -> bool {
    let scheme = url.split(':').next().unwrap_or_default();
    scheme.len() < url.len() && (scheme.eq_ignore_ascii_case("http") || scheme.eq_ignore_ascii_case("https"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_urls_of_the_web_name_another_machine() {
        for url in ["http://a", "HTTPS://a", "https:a", "http:"] {
            assert!(is_remote(url), "{url}");
        }
        for url in
            ["", "http", "data:image/png;base64,http:", " https://a", "ftp://a", "file:///http:", "//a"]
        {
            assert!(!is_remote(url), "{url}");
        }
    }
}
