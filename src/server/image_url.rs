//! The bytes of an image that a message names.

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::error::{Answer, ApiError};

/// The bytes of the data URI `url`; `number` counts the images of the request from 1.
///
/// # Errors
/// When it is no data URI in base64, or names another machine.
pub(super) fn data(number: usize, url: &str) -> Answer<Vec<u8>> {
    let Some(rest) = strip_scheme(url) else {
        return Err(refused(format!(
            "image {number} is no data URI; send it as `data:image/png;base64,...`, other machines are not asked for it"
        )));
    };
    let Some((kind, data)) = rest.split_once(',') else {
        return Err(refused(format!(
            "image {number} is a data URI without data; send `data:image/png;base64,...`"
        )));
    };
    if !kind.rsplit(';').next().is_some_and(|last| last.trim().eq_ignore_ascii_case("base64")) {
        return Err(refused(format!(
            "image {number} is a data URI but not in base64; send `data:image/png;base64,...`"
        )));
    }
    let bytes = STANDARD.decode(data.trim_ascii());
    bytes.map_err(|e| refused(format!("image {number} is not base64 ({e}); encode its bytes again")))
}

/// What follows `data:`, written in any case.
fn strip_scheme(url: &str) -> Option<&str> {
    let (scheme, rest) = url.split_at_checked(5)?;
    scheme.eq_ignore_ascii_case("data:").then_some(rest)
}

fn refused(why: String) -> ApiError {
    ApiError::value("messages", why).coded("invalid_image_url")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_uri_gives_its_bytes() {
        for url in
            ["data:image/png;base64,AAEC", "DATA:;base64,AAEC", "data:image/png;charset=x;BASE64,AAEC\n"]
        {
            assert_eq!(data(1, url).unwrap(), [0, 1, 2]);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for (url, reason) in [
            ("https://example.com/a.png", "image 2 is no data URI;"),
            ("file:///etc/passwd", "image 2 is no data URI;"),
            ("", "image 2 is no data URI;"),
            ("dätä:", "image 2 is no data URI;"),
            ("data:image/png;base64", "image 2 is a data URI without data;"),
            ("data:image/png,AAEC", "image 2 is a data URI but not in base64;"),
            ("data:image/png;base64,A*", "image 2 is not base64"),
        ] {
            let body = data(2, url).unwrap_err().body();
            assert!(body["error"]["message"].as_str().unwrap().starts_with(reason), "{body}");
        }
    }
}
