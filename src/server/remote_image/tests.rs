//! Hosts that lie, stall, redirect and never end.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;

const MOST: u64 = 1000;
const PICTURE: &[u8] = b"not really a picture";

/// What a host does once it has read a request.
enum Answer {
    Bytes(Vec<u8>),
    Redirect(String),
    /// A body of this many bytes whose length is said to be 5.
    Lies(usize),
    Endless,
    /// The head, then a byte now and then.
    Slow,
    Silent,
}

/// Where the tests serve from stands for the internet, and nothing else does.
fn only_here(address: IpAddr) -> bool {
    address == IpAddr::from([127, 0, 0, 1])
}

/// Serves every connection what `answer` gives for the path of its request and the port; gives the port.
async fn host(answer: fn(&str, u16) -> Answer) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move { serve(stream, answer, port).await });
        }
    });
    port
}

/// Ends when the client leaves, or when it has what it came for.
async fn serve(mut stream: TcpStream, answer: fn(&str, u16) -> Answer, port: u16) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head).unwrap();
    assert!(
        !head.to_lowercase().contains("authorization") && !head.to_lowercase().contains("cookie"),
        "{head}"
    );
    let endless = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    match answer(head.split(' ').nth(1).unwrap(), port) {
        Answer::Bytes(bytes) => stream.write_all(&ok(bytes.len(), &bytes)).await,
        Answer::Lies(count) => stream.write_all(&ok(5, &vec![7; count])).await,
        Answer::Redirect(to) => {
            let head = format!(
                "HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\nset-cookie: a=b\r\n\r\n"
            );
            stream.write_all(head.as_bytes()).await
        }
        Answer::Endless => {
            stream.write_all(endless.as_bytes()).await?;
            loop {
                stream.write_all(b"8\r\nendless!\r\n").await?;
            }
        }
        Answer::Slow => {
            stream.write_all(endless.as_bytes()).await?;
            loop {
                tokio::time::sleep(Duration::from_millis(50)).await;
                stream.write_all(b"1\r\nx\r\n").await?;
            }
        }
        Answer::Silent => stream.read_u8().await.map(drop),
    }
}

fn ok(length: usize, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {length}\r\n\r\n");
    [head.as_bytes(), body].concat()
}

fn picture(_: &str, _: u16) -> Answer {
    Answer::Bytes(PICTURE.to_vec())
}

/// Fetches `url` where `allowed` may be fetched from and the tests' own address counts as public.
async fn fetch(allowed: &[&str], url: &str) -> Result<Vec<u8>> {
    let total = Duration::from_secs(30);
    images(allowed, total, only_here).fetch("image 1", url).await
}

fn images(allowed: &[&str], total: Duration, reachable: Reachable) -> RemoteImages {
    let allowed = allowed.iter().map(|one| ImageHost::parse(one).unwrap()).collect();
    RemoteImages::reaching(allowed, MOST, total, reachable).unwrap()
}

async fn refusal(allowed: &[&str], url: &str) -> String {
    fetch(allowed, url).await.unwrap_err().to_string()
}

#[tokio::test]
async fn without_a_list_every_url_is_refused_and_the_way_out_is_told() {
    let images = RemoteImages::new(Vec::new(), MOST).unwrap();
    let error = images.fetch("image 1", "https://example.org/a.png").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "image image 1: remote image URLs are refused; send a data URI, or let the server's operator allow the \
         host with --allow-image-host"
    );
    assert_eq!(error.kind(), crate::error::ErrorKind::Request);
}

#[tokio::test]
async fn a_host_on_the_list_is_fetched_from_in_every_spelling_of_its_name() {
    let port = host(picture).await;
    let name = format!("http://localhost:{port}");
    for url in [format!("http://localhost:{port}/a?b=c#d"), format!("HTTP://LOCALHOST:{port}/../a")] {
        // A resolver may give ::1 as well, which the tests do not serve.
        let all = images(&[&name], Duration::from_secs(30), |address| address.is_loopback());
        assert_eq!(all.fetch("image 1", &url).await.unwrap(), PICTURE, "{url}");
    }
    let literal = format!("http://127.0.0.1:{port}");
    for dress in ["127.0.0.1", "2130706433", "0x7f000001", "0177.0.0.1", "127.1"] {
        let url = format!("http://{dress}:{port}/");
        assert_eq!(fetch(&[&literal], &url).await.unwrap(), PICTURE, "{url}");
    }
}

#[tokio::test]
async fn what_is_not_on_the_list_is_refused_before_anything_is_sent() {
    let port = host(|path, _| panic!("{path} was asked for")).await;
    let allowed = format!("http://localhost:{port}");
    for url in [
        format!("http://127.0.0.1:{port}/"),
        format!("http://localhost.:{port}/"),
        format!("http://localhost:{}/", port ^ 1),
        format!("https://localhost:{port}/"),
        format!("http://localhost.evil.example:{port}/"),
        format!("http://evil.example/?http://localhost:{port}/"),
        format!("http://evil.example#@localhost:{port}/"),
        format!("http://[::1]:{port}/"),
        "http://localhost/".to_owned(),
    ] {
        let refusal = refusal(&[&allowed], &url).await;
        assert!(refusal.contains("are not allowed; send a data URI, or let"), "{url}: {refusal}");
    }
    for (url, wanted) in [
        (format!("http://localhost:{port}@evil.example/"), "holds a user's name"),
        (format!("http://user@localhost:{port}/"), "holds a user's name"),
        (format!("http://:secret@localhost:{port}/"), "holds a user's name"),
        (format!("ftp://localhost:{port}/"), "scheme ftp is not fetched"),
        ("file:///etc/passwd".to_owned(), "scheme file is not fetched"),
        ("gopher://localhost/".to_owned(), "scheme gopher is not fetched"),
        ("javascript:alert(1)".to_owned(), "scheme javascript is not fetched"),
        ("a.png".to_owned(), "this is no URL"),
        ("http://".to_owned(), "this is no URL"),
        (String::new(), "this is no URL"),
        ("https://a.example/".to_owned() + &"a".repeat(LENGTH), "characters and may have 8192"),
    ] {
        let refusal = refusal(&[&allowed], &url).await;
        assert!(refusal.contains(wanted), "{url}: {refusal}");
        assert!(!refusal.contains("secret"), "{refusal}");
    }
}

#[tokio::test]
async fn a_name_and_a_literal_of_this_machine_are_refused_although_the_list_names_them() {
    let port = host(|path, _| panic!("{path} was asked for")).await;
    for dress in ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0"]
    {
        let url = format!("http://{dress}:{port}");
        let images = RemoteImages::new(vec![ImageHost::parse(&url).unwrap()], MOST).unwrap();
        let refusal = images.fetch("image 1", &url).await.unwrap_err().to_string();
        assert!(refusal.contains("not of the public internet"), "{url}: {refusal}");
        assert!(!refusal.contains("127."), "{refusal}");
    }
}

#[tokio::test]
async fn redirects_are_followed_three_times_and_checked_each_time() {
    fn answer(path: &str, port: u16) -> Answer {
        let here = format!("http://127.0.0.1:{port}");
        match path {
            "/end" => Answer::Bytes(PICTURE.to_vec()),
            "/round" => Answer::Redirect("/round".to_owned()),
            "/three" => Answer::Redirect("two".to_owned()),
            "/two" => Answer::Redirect(format!("{here}/one")),
            "/one" => Answer::Redirect("//127.0.0.1:".to_owned() + &port.to_string() + "/end"),
            "/private" => Answer::Redirect("http://10.0.0.1/".to_owned()),
            "/metadata" => Answer::Redirect("http://169.254.169.254/latest/meta-data/".to_owned()),
            "/unlisted" => Answer::Redirect("https://example.org/".to_owned()),
            "/port" => Answer::Redirect("http://127.0.0.1:22/".to_owned()),
            "/file" => Answer::Redirect("file:///etc/passwd".to_owned()),
            "/user" => Answer::Redirect(format!("http://a:b@127.0.0.1:{port}/end")),
            "/broken" => Answer::Redirect("http://[".to_owned()),
            other => panic!("{other}"),
        }
    }
    let port = host(answer).await;
    let here = format!("http://127.0.0.1:{port}");
    let allowed = [&*here, "http://10.0.0.1", "http://169.254.169.254"];
    assert_eq!(fetch(&allowed, &format!("{here}/three")).await.unwrap(), PICTURE);
    for (path, wanted) in [
        ("round", "redirects more than 3 times"),
        ("private", "not of the public internet"),
        ("metadata", "not of the public internet"),
        ("unlisted", "https://example.org:443 are not allowed"),
        ("port", "http://127.0.0.1:22 are not allowed"),
        ("file", "scheme file is not fetched"),
        ("user", "holds a user's name"),
        ("broken", "redirects to no URL"),
    ] {
        let refusal = refusal(&allowed, &format!("{here}/{path}")).await;
        assert!(refusal.contains(wanted), "{path}: {refusal}");
    }
}

#[tokio::test]
async fn a_body_is_read_to_the_limit_and_not_further_whatever_its_length_is_said_to_be() {
    fn answer(path: &str, _: u16) -> Answer {
        match path {
            "/most" => Answer::Bytes(vec![1; 1000]),
            "/more" => Answer::Bytes(vec![1; 1001]),
            "/lies" => Answer::Lies(5000),
            _ => Answer::Endless,
        }
    }
    let here = format!("http://127.0.0.1:{}", host(answer).await);
    assert_eq!(fetch(&[&here], &format!("{here}/most")).await.unwrap().len(), 1000);
    assert_eq!(fetch(&[&here], &format!("{here}/lies")).await.unwrap().len(), 5);
    for path in ["more", "endless"] {
        let refusal = refusal(&[&here], &format!("{here}/{path}")).await;
        assert_eq!(refusal, "image image 1: it has more than 1000 bytes; send a smaller one");
    }
}

#[tokio::test]
async fn a_host_that_stalls_is_given_up_on() {
    for answer in [|_: &str, _| Answer::Slow, |_: &str, _| Answer::Silent] {
        let here = format!("http://127.0.0.1:{}", host(answer).await);
        let images = images(&[&here], Duration::from_millis(200), only_here);
        let refusal = images.fetch("image 1", &here).await.unwrap_err().to_string();
        assert!(refusal.contains("its host took more than 0.2 s"), "{refusal}");
    }
}

#[tokio::test]
async fn a_host_that_is_not_there_or_speaks_no_http_is_told_without_its_url() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let other = host(picture).await;
    for (url, wanted) in [
        (format!("http://127.0.0.1:{nobody}"), "cannot be connected to"),
        (format!("https://127.0.0.1:{other}"), "cannot be connected to"),
    ] {
        let refusal = refusal(&[&url], &format!("{url}/?signature=secret")).await;
        assert!(refusal.contains(wanted), "{refusal}");
        assert!(!refusal.contains("secret"), "{refusal}");
    }
}

#[test]
fn a_list_holds_hosts_and_nothing_more() {
    for (text, scheme, name, port) in [
        ("images.example.org", "https", "images.example.org", 443),
        ("Images.Example.ORG:8443", "https", "images.example.org", 8443),
        ("http://images.example.org", "http", "images.example.org", 80),
        ("[2606:4700::1]:444", "https", "[2606:4700::1]", 444),
        ("bücher.example", "https", "xn--bcher-kva.example", 443),
    ] {
        let wanted = ImageHost { scheme: scheme.to_owned(), host: name.to_owned(), port };
        assert_eq!(ImageHost::parse(text).unwrap(), wanted);
    }
    for text in [
        "",
        " ",
        "*",
        "*.example.org",
        "a.example/",
        "a.example/b",
        "a@b.example",
        "ftp://a.example",
        "https://a.example?b",
        "a.example#b",
        "a.example:99999",
        "a b.example",
        "http://",
        "file:///etc",
    ] {
        let refusal = ImageHost::parse(text).unwrap_err().to_string();
        assert!(refusal.starts_with(&format!("--allow-image-host {text}: ")), "{refusal}");
    }
}
