//! What whoever runs the server sees of it, and what browsers and other machines may do.

use std::path::PathBuf;

use llava_phi::server::{AllowedOrigin, ImageHost, TlsFiles};
use serde_json::{Value, json};

use super::client::send;
use super::{MODEL, Server, asking, engine, shared};

/// What stands behind a metric of the shared server, all its labels added up.
fn metric(text: &str, name: &str, label: &str) -> f64 {
    let lines = text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')));
    let values = lines.filter(|line| line.contains(label)).map(|line| line.rsplit_once(' ').unwrap().1);
    values.map(|value| value.parse::<f64>().unwrap()).sum()
}

#[test]
fn what_was_answered_is_counted_and_none_of_it_told() {
    let server = Server::start(&engine(2), |_| {});
    assert_eq!(server.chat(&asking(json!({}))).status, 200);
    assert_eq!(server.chat(&asking(json!({"stream": true}))).status, 200);
    assert_eq!(server.chat(&asking(json!({"tools": []}))).status, 400);
    assert_eq!(server.get("/secret/path").status, 404);
    let response = server.get("/metrics");
    assert_eq!(
        response.header("content-type"),
        Some("application/openmetrics-text; version=1.0.0; charset=utf-8")
    );
    let text = &response.body;
    let count = |name: &str, label: &str| metric(text, &format!("llava_phi_{name}"), label);
    assert!(
        (count("requests_total", "endpoint=\"/v1/chat/completions\",status=\"200\"") - 2.0).abs() < 0.1,
        "{text}"
    );
    assert!((count("requests_total", "status=\"400\"") - 1.0).abs() < 0.1, "{text}");
    assert!((count("requests_total", "status=\"404\"") - 1.0).abs() < 0.1, "{text}");
    assert!((count("answers_total", "finish_reason=\"stop\"") - 2.0).abs() < 0.1, "{text}");
    assert!((count("image_positions_total", "") - 128.0).abs() < 0.1, "{text}");
    assert!((count("images_encoded_total", "") - 1.0).abs() < 0.1, "the picture is encoded once: {text}");
    assert!(count("cached_positions_total", "") > 0.0, "{text}");
    assert!(count("between_tokens_seconds_count", "provider=\"cpu\"") > 1.0, "{text}");
    assert!((count("first_token_seconds_count", "") - 2.0).abs() < 0.1, "{text}");
    assert!(count("steps_total", "") > 0.0 && count("positions_limit", "") > 0.0, "{text}");
    assert!((count("component", "component=\"decoder\"") - 1.0).abs() < 0.1, "{text}");
    for word in ["secret", "triangle", "image?"] {
        assert!(!text.contains(word), "{word}: {text}");
    }
}

#[test]
fn the_status_names_what_serves_and_no_place_on_this_machine() {
    assert_eq!(shared().chat(&asking(json!({}))).status, 200);
    let response = shared().get("/v1/status");
    let status = response.json();
    assert_eq!(
        (status["version"].as_str(), status["status"].as_str()),
        (Some(env!("CARGO_PKG_VERSION")), Some("ready"))
    );
    let model = &status["models"][0];
    assert_eq!(model["id"], MODEL);
    let components: Vec<&str> = model["components"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["component"].as_str().unwrap())
        .collect();
    assert!(components.contains(&"decoder") && components.contains(&"vision_encoder"), "{status}");
    assert_eq!(model["components"][0]["provider"], "cpu");
    assert!(model["load"]["completed"].as_u64().unwrap() > 0, "{status}");
    assert!(model["prefixes"]["memory_used"].is_u64(), "{status}");
    assert!(status["limits"]["body_bytes"].as_u64().unwrap() > 0);
    assert!(!response.body.contains(env!("CARGO_MANIFEST_DIR")), "{status}");
}

#[test]
fn the_document_is_served_and_every_path_in_it_answers() {
    let document = shared().get("/openapi.json").json();
    assert_eq!(document["openapi"], "3.1.0");
    for (path, methods) in document["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            let path = path.replace("{name}", MODEL);
            let json = ["Content-Type: application/json"];
            let response = send(shared().address, &method.to_uppercase(), &path, &json, "{}");
            assert!(
                ![404, 405].contains(&response.status) || method == "post",
                "{method} {path}: {response:?}"
            );
            assert_ne!(response.status, 405, "{method} {path}");
            let told = &methods[method]["responses"];
            assert!(
                told.get(response.status.to_string()).is_some(),
                "{method} {path} told of no {}",
                response.status
            );
        }
    }
}

#[test]
fn every_response_forbids_browsers_to_guess_and_other_pages_to_read() {
    for path in ["/", "/health", "/v1/models", "/nowhere", "/v1/status"] {
        let response = send(shared().address, "GET", path, &["Origin: https://evil.example"], "");
        assert_eq!(response.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(response.header("referrer-policy"), Some("no-referrer"), "{path}");
        let policy = response.header("content-security-policy").unwrap();
        assert!(
            policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"),
            "{policy}"
        );
        assert!(
            !policy.contains("unsafe") && response.header("access-control-allow-origin").is_none(),
            "{path}"
        );
    }
    let server = Server::start(&engine(1), |options| {
        options.origins = vec![AllowedOrigin::parse("https://a.example").unwrap()];
    });
    let ask = |origin: &str| {
        let headers =
            [origin, "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization"];
        let response = send(server.address, "OPTIONS", "/v1/chat/completions", &headers, "");
        response.header("access-control-allow-origin").map(str::to_owned)
    };
    assert_eq!(ask("Origin: https://a.example").as_deref(), Some("https://a.example"));
    assert_eq!(ask("Origin: https://b.example"), None);
}

#[test]
fn an_image_of_another_machine_is_refused_and_one_of_this_network_even_if_its_host_is_named() {
    let url = |url: &str| json!({"model": MODEL, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]});
    let refused = |server: &Server, address: &str| -> String {
        server.chat(&url(address)).refused(400, "invalid_image", Some("messages"))
    };
    assert!(refused(shared(), "https://example.org/a.png").contains("--allow-image-host"));
    let host = |text: &str| ImageHost::parse(text).unwrap();
    let server = Server::start(&engine(1), |options| {
        options.image_hosts =
            vec![host("http://localhost:1"), host("http://169.254.169.254"), host("https://[::1]")];
    });
    for address in ["http://localhost:1/a", "http://169.254.169.254/latest/meta-data", "https://[::1]/"] {
        let told = refused(&server, address);
        assert!(told.contains("not of the public internet"), "{address}: {told}");
    }
    assert!(refused(&server, "https://example.org/a.png").contains("are not allowed"));
}

#[test]
fn a_server_with_a_certificate_speaks_tls_and_nothing_else() {
    let file = |name: &str| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls")).join(name);
    let (cert, key) = (file("one-cert.pem"), file("one-key-known-to-everybody.pem"));
    let server =
        Server::start(&engine(1), |options| options.tls = Some(TlsFiles { cert: cert.clone(), key }));
    let url = format!("https://localhost:{}/v1/models", server.address.port());
    let trusted = reqwest::Certificate::from_pem(&std::fs::read(cert).unwrap()).unwrap();
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([trusted]).build().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let body = runtime.block_on(async { client.get(&url).send().await.unwrap().text().await.unwrap() });
    let models: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(models["data"][0]["id"], MODEL);
    let plain = url.replace("https", "http");
    assert!(runtime.block_on(client.get(plain).send()).is_err());
}
