//! The page at `/`, which asks about images from a browser.

use std::sync::LazyLock;

use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

use super::headers::page_policy;

const PAGE: &str = include_str!("index.html");

/// The page, which may load nothing but what stands in it and talk to nobody but this server.
pub(super) async fn page() -> Response {
    static POLICY: LazyLock<HeaderValue> = LazyLock::new(|| page_policy(PAGE));
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        // A newer program has a newer page.
        (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (CONTENT_SECURITY_POLICY, POLICY.clone()),
    ];
    (headers, PAGE).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_one_script_and_one_style_and_names_no_other_place() {
        for (part, times) in [("<script", 1), ("</script", 1), ("<style", 1), ("</style", 1)] {
            assert_eq!(PAGE.matches(part).count(), times, "{part}");
        }
        for part in [" style=", " onclick=", " src=", "innerHTML", "eval(", "https://", "@import", "url("] {
            assert!(!PAGE.contains(part), "{part}");
        }
        let addresses = PAGE.matches("http://").count();
        assert_eq!(
            addresses,
            PAGE.matches("http://www.w3.org/2000/svg").count(),
            "only names of a namespace"
        );
    }

    #[tokio::test]
    async fn the_page_comes_with_its_own_policy() {
        let response = page().await;
        let policy = response.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert_eq!(policy.matches("'sha256-").count(), 2, "{policy}");
        assert_eq!(response.headers()[CONTENT_TYPE], "text/html; charset=utf-8");
    }
}
