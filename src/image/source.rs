//! Files and streams to bytes, within a limit.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use super::Limits;
use crate::error::{Error, Result};

/// Reads the file at `path`.
///
/// # Errors
/// [`Error::Image`] when there is no such file, it is a directory, it is empty, or it has more bytes than `limits` allow.
pub fn read_file(path: &Path, limits: &Limits) -> Result<Vec<u8>> {
    let name = path.display().to_string();
    if path.is_dir() {
        return Err(Error::image(name, "this is a directory; give an image file"));
    }
    let file = File::open(path).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::image(&name, "there is no such file; check the path"),
        _ => Error::image(&name, "the file cannot be opened").because(e),
    })?;
    read_stream(&name, file, limits)
}

/// Reads `stream` to its end. `name` is what errors call it.
///
/// # Errors
/// [`Error::Image`] when the stream fails, is empty, or has more bytes than `limits` allow.
pub fn read_stream(name: &str, stream: impl Read, limits: &Limits) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // One byte past the limit tells a stream that ends at the limit from one that goes on.
    stream
        .take(limits.max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|e| Error::image(name, "the bytes cannot be read").because(e))?;
    if bytes.is_empty() {
        return Err(Error::image(name, "there are no bytes; give an image"));
    }
    if bytes.len() as u64 > limits.max_bytes {
        return Err(Error::image(
            name,
            format!(
                "the image has more than {} bytes; give a smaller one or raise --max-image-bytes",
                limits.max_bytes
            ),
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_at_the_limit_is_read_and_one_byte_more_is_refused() {
        let limits = Limits { max_bytes: 4, ..Limits::default() };
        assert_eq!(read_stream("x", &[1, 2, 3, 4][..], &limits).unwrap(), [1, 2, 3, 4]);
        let error = read_stream("x", &[1, 2, 3, 4, 5][..], &limits).unwrap_err();
        assert!(error.to_string().contains("more than 4 bytes"), "{error}");
    }

    #[test]
    fn nothing_to_read_is_refused() {
        let error = read_stream("stdin", io::empty(), &Limits::default()).unwrap_err();
        assert_eq!(error.to_string(), "image stdin: there are no bytes; give an image");
    }
}
