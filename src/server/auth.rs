//! Who may ask: API keys, compared in constant time.

use std::{fmt, fs, path::Path};

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Uri, header};
use axum::middleware::Next;
use axum::response::Response;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::error::{Answer, ApiError};
use super::state::AppState;
use crate::error::{Error, Result};

/// Paths that need no key: probes, which tell nothing but that the server is there, and the page, which asks for one.
const OPEN: &[&str] = &["/", "/health", "/ready"];

/// The keys that are let in. Only their hashes are kept, and nothing shows them.
#[derive(Clone, Default)]
pub struct Keys(Vec<[u8; 32]>);

impl Keys {
    /// Reads keys, one a line. Empty lines and those that begin with `#` are skipped.
    ///
    /// # Errors
    /// [`Error::Request`] when the file cannot be read, holds no key, or has one that no header can carry.
    pub fn open(path: &Path) -> Result<Self> {
        let refused = |why: String| Error::Request(format!("key file {}: {why}", path.display()));
        let text = fs::read_to_string(path)
            .map_err(|e| refused(format!("it cannot be read ({e}); check the path")))?;
        Self::parse(&text).map_err(refused)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let lines = (1..).zip(text.lines().map(str::trim));
        let keys = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        let keys = keys.map(|(number, key)| {
            if key.bytes().all(|byte| byte.is_ascii_graphic()) {
                Ok(hash(key.as_bytes()))
            } else {
                Err(format!("line {number} is no key; use printable ASCII without spaces"))
            }
        });
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        if keys.is_empty() {
            return Err("it holds no key; write one a line".to_owned());
        }
        Ok(Self(keys))
    }

    /// Whether nobody needs a key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `headers` carry one of the keys. The time that this takes says nothing of how much of a key was right.
    fn admit(&self, headers: &HeaderMap) -> bool {
        let Some(key) = headers.get(header::AUTHORIZATION).and_then(|value| bearer(value.as_bytes())) else {
            return false;
        };
        let given = hash(key);
        let mut found = subtle::Choice::from(0);
        for key in &self.0 {
            found |= key.ct_eq(&given);
        }
        found.into()
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

/// Hashes have one length, so that comparing them does not tell that of a key.
fn hash(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

/// The key of `Bearer KEY`; the scheme is written in any case.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| key.trim_ascii())
}

/// Lets a request in that has a key, or needs none.
pub(super) async fn check(State(state): State<AppState>, request: Request, next: Next) -> Answer<Response> {
    let keys = &state.options().keys;
    if !keys.is_empty() && !OPEN.contains(&request.uri().path()) && !keys.admit(request.headers()) {
        return Err(ApiError::unauthorized());
    }
    if state.options().is_private() && !is_local(request.uri(), request.headers()) {
        return Err(ApiError::misdirected());
    }
    Ok(next.run(request).await)
}

/// Whether all that a request says of its host, in the Host header and (HTTP/2) in its target, names this machine: a
/// page from elsewhere whose name was made to mean this address still sends its own.
fn is_local(target: &Uri, headers: &HeaderMap) -> bool {
    let means_here = |authority: &Authority| {
        let name = authority.host().trim_start_matches('[').trim_end_matches(']');
        name.eq_ignore_ascii_case("localhost") || name.parse::<std::net::IpAddr>().is_ok()
    };
    let mut hosts = headers.get_all(header::HOST).iter();
    target.authority().is_none_or(means_here)
        && hosts.all(|host| Authority::try_from(host.as_bytes()).is_ok_and(|host| means_here(&host)))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn with(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn a_key_file_has_a_key_a_line_and_comments() {
        let keys = Keys::parse("# mine\nsk-one\n\n  sk-two  \r\n").unwrap();
        for (header, admitted) in [
            ("Bearer sk-one", true),
            ("bearer  sk-two", true),
            ("Bearer sk-tw", false),
            ("Bearer sk-twoo", false),
            ("Bearer ", false),
            ("Bearer", false),
            ("sk-one", false),
            ("Basic sk-one", false),
            ("Bearer # mine", false),
        ] {
            assert_eq!(keys.admit(&with(header::AUTHORIZATION, header)), admitted, "{header}");
        }
        assert!(!keys.admit(&HeaderMap::new()));
    }

    #[test]
    fn a_key_file_without_a_key_is_refused() {
        for text in ["", "\n# only a comment\n"] {
            assert_eq!(Keys::parse(text).unwrap_err(), "it holds no key; write one a line");
        }
        let refusal = Keys::parse("fine\nnot fine\n").unwrap_err();
        assert_eq!(refusal, "line 2 is no key; use printable ASCII without spaces");
    }

    #[test]
    fn keys_do_not_show() {
        assert_eq!(format!("{:?}", Keys::parse("sk-one").unwrap()), "Keys(1)");
    }

    #[test]
    fn a_name_that_was_made_to_mean_this_address_is_not_local() {
        for (host, local) in [
            ("localhost:8080", true),
            ("LOCALHOST", true),
            ("127.0.0.1:8080", true),
            ("[::1]:8080", true),
            ("evil.example:8080", false),
            ("localhost.evil.example", false),
            ("", false),
        ] {
            assert_eq!(is_local(&Uri::from_static("/health"), &with(header::HOST, host)), local, "{host:?}");
        }
        let (here, elsewhere) =
            (Uri::from_static("http://127.0.0.1:80/"), Uri::from_static("http://evil.example/"));
        assert!(is_local(&here, &HeaderMap::new()) && !is_local(&elsewhere, &HeaderMap::new()));
        assert!(!is_local(&elsewhere, &with(header::HOST, "localhost")));
        let mut two = with(header::HOST, "localhost");
        two.append(header::HOST, HeaderValue::from_static("evil.example"));
        assert!(!is_local(&here, &two));
    }
}
