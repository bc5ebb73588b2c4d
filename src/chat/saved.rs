//! A conversation on disk: one JSON file with everything that was said and shown.

use std::{fs, io::Write as _, path::Path};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};

use super::Chat;
use super::attachment::Attachment;
use super::conversation::Message;
use crate::error::{Error, Result};
use crate::package::manifest::Fit;

/// The format that this version writes and reads.
const FORMAT: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    format: u32,
    model: String,
    system: Option<String>,
    messages: Vec<Message>,
    images: Vec<SavedImage>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedImage {
    name: String,
    fit: Option<Fit>,
    base64: String,
}

/// Writes the conversation to `path`: the whole file or nothing.
///
/// # Errors
/// [`Error::Request`] when the file cannot be written.
pub fn save(chat: &Chat, path: &Path) -> Result<()> {
    let images = chat.images().iter().map(|image| SavedImage {
        name: image.name().to_owned(),
        fit: image.fit(),
        base64: STANDARD.encode(image.bytes()),
    });
    let saved = Saved {
        format: FORMAT,
        model: chat.engine().facts().name.clone(),
        system: chat.system().map(str::to_owned),
        messages: chat.messages().to_vec(),
        images: images.collect(),
    };
    let failed = |e: &dyn std::fmt::Display| {
        Error::Request(format!("the conversation cannot be saved to {}: {e}", path.display()))
    };
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory).map_err(|e| failed(&e))?;
    serde_json::to_writer(&mut file, &saved).map_err(|e| failed(&e))?;
    file.flush().map_err(|e| failed(&e))?;
    file.persist(path).map_err(|e| failed(&e.error))?;
    Ok(())
}

/// Takes up the conversation in the file at `path`. After an error `chat` is as it was.
///
/// # Errors
/// [`Error::Request`] when the file cannot be read, is no saved conversation, or belongs to another model;
/// [`Error::Image`] when an image in it cannot be decoded.
pub fn load(chat: &mut Chat, path: &Path) -> Result<()> {
    let refused = |reason: String| Error::Request(format!("conversation {}: {reason}", path.display()));
    let bytes = fs::read(path).map_err(|e| refused(format!("the file cannot be read: {e}")))?;
    let saved: Saved = serde_json::from_slice(&bytes).map_err(|e| {
        refused(format!("this is not a saved conversation ({e}); give a file that /save wrote"))
    })?;
    if saved.format != FORMAT {
        return Err(refused(format!(
            "format {} is not known to this version, which reads {FORMAT}",
            saved.format
        )));
    }
    let model = &chat.engine().facts().name;
    if &saved.model != model {
        return Err(refused(format!(
            "it was held with {}, and {model} answers now; start with --model of that package",
            saved.model
        )));
    }
    let images = saved.images.into_iter().map(|image| {
        let bytes = STANDARD
            .decode(&image.base64)
            .map_err(|e| refused(format!("image {} is not base64 ({e})", image.name)))?;
        Attachment::new(chat.engine(), image.name, bytes, image.fit)
    });
    let images = images.collect::<Result<Vec<_>>>()?;
    chat.restore(saved.messages, images)?;
    chat.set_system(saved.system);
    Ok(())
}
