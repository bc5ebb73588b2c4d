//! What every response tells browsers: who may read it, and what a page may load.

use axum::Router;
use axum::http::header::{
    AUTHORIZATION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, REFERRER_POLICY, RETRY_AFTER,
    X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use axum::http::{HeaderValue, Method};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Url;
use sha2::{Digest as _, Sha256};
use tower_http::cors::{AllowOrigin, CorsLayer};
use tower_http::set_header::SetResponseHeaderLayer;

use crate::error::{Error, Result};

/// What a response that is no page may load, and who may show it: nothing and nobody.
const NOTHING: &str = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// An origin whose pages may ask this server, such as `https://example.org`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllowedOrigin(HeaderValue);

impl AllowedOrigin {
    /// Reads an origin as browsers send it: scheme, host, and the port where it is not the scheme's own.
    ///
    /// # Errors
    /// [`Error::Request`] for `*`, `null`, and whatever no browser sends.
    pub fn parse(text: &str) -> Result<Self> {
        let fail = |why: String| Error::Request(format!("--allow-origin {text}: {why}"));
        let example = "give one origin, such as https://example.org or http://localhost:3000";
        if text == "*" || text == "null" {
            return Err(fail(format!(
                "every page of the web could ask in the name of its visitors; {example}"
            )));
        }
        let url = Url::parse(text).map_err(|e| fail(format!("{e}; {example}")))?;
        let origin = url.origin().ascii_serialization();
        if text.contains('*') {
            return Err(fail(format!("one origin is allowed at a time; {example}")));
        }
        if origin == "null" || url.host_str().is_none_or(str::is_empty) {
            return Err(fail(format!("this is the origin of no page; {example}")));
        }
        if origin != text {
            return Err(fail(format!(
                "this is more than, or not how browsers write, an origin; did you mean {origin}?"
            )));
        }
        HeaderValue::from_str(text).map(Self).map_err(|e| fail(format!("{e}; {example}")))
    }
}

/// `router` with the headers that every response has, and open to the pages of `origins` alone.
///
/// A response that sets its own policy, as the page does with [`page_policy`], keeps it.
pub(super) fn guard<S>(router: Router<S>, origins: &[AllowedOrigin]) -> Router<S>
where
    S: Clone + Send + Sync + 'static,
{
    let fixed = [
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (X_FRAME_OPTIONS, "DENY"),
        (CONTENT_SECURITY_POLICY, NOTHING),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ];
    let router = fixed.into_iter().fold(router, |router, (name, value)| {
        router.layer(SetResponseHeaderLayer::if_not_present(name, HeaderValue::from_static(value)))
    });
    match cors(origins) {
        Some(cors) => router.layer(cors),
        None => router,
    }
}

/// What pages of other origins may do; `None` where there are none, and browsers then keep answers from every page.
fn cors(origins: &[AllowedOrigin]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let origins = origins.iter().map(|origin| origin.0.clone());
    let layer = CorsLayer::new()
        .allow_origin(AllowOrigin::list(origins))
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([AUTHORIZATION, CONTENT_TYPE])
        .expose_headers([RETRY_AFTER]);
    Some(layer)
}

/// What the page `html` may load: the scripts and styles that stand in it, by their hashes, images that were given to it,
/// and answers of this server. A script or style that gets into it some other way is not run.
pub(super) fn page_policy(html: &str) -> HeaderValue {
    let policy = format!(
        "default-src 'none'; script-src {}; style-src {}; img-src 'self' data: blob:; connect-src 'self'; \
         frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        hashes(html, "script"),
        hashes(html, "style"),
    );
    // Hashes in base64 and what stands above are ASCII.
    HeaderValue::from_str(&policy).unwrap_or_else(|_| HeaderValue::from_static(NOTHING))
}

/// The hashes of what stands within each element `name` of `html`, as a policy lists them.
fn hashes(html: &str, name: &str) -> String {
    let (open, close) = (format!("<{name}"), format!("</{name}>"));
    let mut found = Vec::new();
    let mut rest = html;
    while let Some((_, after)) = rest.split_once(&open) {
        let Some((attributes, after)) = after.split_once('>') else { break };
        // `<scripted>` is another element.
        if attributes.starts_with(|c: char| !c.is_ascii_whitespace()) {
            rest = after;
            continue;
        }
        let Some((inside, after)) = after.split_once(&close) else { break };
        found.push(format!("'sha256-{}'", STANDARD.encode(Sha256::digest(inside))));
        rest = after;
    }
    if found.is_empty() { "'none'".to_owned() } else { found.join(" ") }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::{Request, Response, StatusCode, header};
    use axum::routing::{get, post};
    use tower::ServiceExt as _;

    use super::*;

    fn router(origins: &[&str]) -> Router {
        let origins: Vec<_> = origins.iter().map(|origin| AllowedOrigin::parse(origin).unwrap()).collect();
        let page = || async { [(CONTENT_SECURITY_POLICY, page_policy("<script>a()</script>"))] };
        let routes = Router::new()
            .route("/", get(page))
            .route("/v1/models", get(|| async { "models" }))
            .route("/v1/answers", post(|| async { (StatusCode::UNAUTHORIZED, "no") }));
        guard(routes, &origins)
    }

    async fn ask(origins: &[&str], method: &str, path: &str, headers: &[(&str, &str)]) -> Response<Body> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        router(origins).oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
    }

    fn of(response: &Response<Body>, name: impl header::AsHeaderName) -> Option<&str> {
        response.headers().get(name).map(|value| value.to_str().unwrap())
    }

    #[tokio::test]
    async fn every_response_forbids_what_a_browser_would_otherwise_guess() {
        for path in ["/", "/v1/models", "/v1/answers", "/nowhere"] {
            let response = ask(&[], "GET", path, &[]).await;
            assert_eq!(of(&response, X_CONTENT_TYPE_OPTIONS), Some("nosniff"), "{path}");
            assert_eq!(of(&response, REFERRER_POLICY), Some("no-referrer"), "{path}");
            let policy = of(&response, CONTENT_SECURITY_POLICY).unwrap();
            assert!(
                policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"),
                "{policy}"
            );
            assert_eq!(policy.contains("script-src"), path == "/", "{policy}");
        }
    }

    #[tokio::test]
    async fn without_a_list_no_page_from_elsewhere_may_read_an_answer() {
        let preflight = [("origin", "https://a.example"), ("access-control-request-method", "POST")];
        for (method, headers) in [("GET", &preflight[..1]), ("OPTIONS", &preflight[..])] {
            let response = ask(&[], method, "/v1/models", headers).await;
            assert!(of(&response, header::ACCESS_CONTROL_ALLOW_ORIGIN).is_none(), "{response:?}");
        }
    }

    #[tokio::test]
    async fn an_origin_on_the_list_may_ask_and_its_neighbours_may_not() {
        let allowed = ["https://a.example", "http://localhost:3000"];
        for (origin, may) in [
            ("https://a.example", true),
            ("http://localhost:3000", true),
            ("http://a.example", false),
            ("https://a.example:8443", false),
            ("https://a.example.evil.example", false),
            ("https://evil-a.example", false),
            ("https://A.example", false),
            ("http://localhost:3001", false),
            ("null", false),
            ("", false),
        ] {
            for (method, path) in [("GET", "/v1/models"), ("POST", "/v1/answers"), ("OPTIONS", "/v1/answers")]
            {
                let headers = [
                    ("origin", origin),
                    ("access-control-request-method", "POST"),
                    ("access-control-request-headers", "authorization,content-type"),
                ];
                let response = ask(&allowed, method, path, &headers).await;
                let told = of(&response, header::ACCESS_CONTROL_ALLOW_ORIGIN);
                assert_eq!(told, may.then_some(origin), "{method} {path} from {origin}");
                assert!(of(&response, header::ACCESS_CONTROL_ALLOW_CREDENTIALS).is_none());
                let vary = of(&response, header::VARY).unwrap_or_default();
                assert!(vary.contains("origin"), "a cache would give it to another origin: {response:?}");
            }
        }
    }

    #[test]
    fn what_is_no_origin_is_refused_with_the_way_out() {
        for origin in ["https://a.example", "http://localhost:3000", "http://[::1]:8080", "https://1.2.3.4"] {
            assert!(AllowedOrigin::parse(origin).is_ok(), "{origin}");
        }
        for (origin, wanted) in [
            ("*", "every page of the web"),
            ("null", "every page of the web"),
            ("", "give one origin"),
            ("a.example", "give one origin"),
            ("file:///etc", "the origin of no page"),
            ("data:text/html,a", "the origin of no page"),
            ("https://a.example/", "did you mean https://a.example?"),
            ("https://A.example", "did you mean https://a.example?"),
            ("https://a.example:443", "did you mean https://a.example?"),
            ("https://a.example/b", "did you mean https://a.example?"),
            ("https://user@a.example", "did you mean https://a.example?"),
            ("https://a.example https://b.example", "give one origin"),
            ("https://*.example", "give one origin"),
        ] {
            let refusal = AllowedOrigin::parse(origin).map(|_| ()).unwrap_err().to_string();
            assert!(refusal.starts_with(&format!("--allow-origin {origin}: ")), "{refusal}");
            assert!(refusal.contains(wanted), "{refusal}");
        }
    }

    #[test]
    fn a_page_runs_what_stands_in_it_and_nothing_else() {
        let page = "<style>\nb{}</style><scripted>no</scripted><script type=\"module\">a()</script>\
                    <script>\nb(\"é\")\n</script><script>open";
        let policy = page_policy(page);
        let policy = policy.to_str().unwrap();
        // As `printf TEXT | openssl dgst -sha256 -binary | base64` says.
        let (style, first, second) = (
            "'sha256-jH0lUn02eClrG3HpikS4zPlH/X0z+JSDdqykyXqEUmI='",
            "'sha256-qVpDBgj7bpq5hMAcGp3AOc79J3Y1Z4HvySTwKrWDoy4='",
            "'sha256-CW0w1yoxoJqggXVcNRxeK1N31Tl7v0W6kn3jGHdsPzE='",
        );
        assert!(policy.contains(&format!("script-src {first} {second};")), "{policy}");
        assert!(policy.contains(&format!("style-src {style};")), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
        let empty = page_policy("<p>words</p>");
        assert!(empty.to_str().unwrap().contains("script-src 'none'; style-src 'none';"), "{empty:?}");
    }
}
