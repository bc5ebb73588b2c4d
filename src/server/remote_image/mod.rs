//! Images that a prompt names by URL: refused, or fetched from hosts that the operator named, never from this network.
//!
//! A URL is checked, its host's name is resolved, every address must be public, and the connection goes to these very
//! addresses. A redirect is one more URL that is checked the same way.

mod address;
#[cfg(test)]
mod tests;

use std::error::Error as StdError;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use axum::http::header::LOCATION;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode, Url};

use super::tls;
use crate::error::{Error, Result};

/// Redirects that are followed for one image.
const REDIRECTS: usize = 3;

/// Until a host has taken the connection.
const CONNECT: Duration = Duration::from_secs(5);

/// From the URL to the last byte, redirects included.
const TOTAL: Duration = Duration::from_secs(20);

/// Characters of a URL; links that are signed are long.
const LENGTH: usize = 8192;

/// Scheme, host and port from which images may be fetched. Nothing else on the host is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageHost {
    scheme: String,
    host: String,
    port: u16,
}

impl ImageHost {
    /// Reads `host`, `host:port`, or either after `https://` or `http://`; without a scheme it is https.
    ///
    /// # Errors
    /// [`Error::Request`] for anything that is not one host.
    pub fn parse(text: &str) -> Result<Self> {
        let fail = |why: &str| {
            Error::Request(format!(
                "--allow-image-host {text}: {why}; give a host such as images.example.org, \
                 host:port, or http://host where nothing else is served"
            ))
        };
        let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
        let url = Url::parse(&whole).map_err(|e| fail(&e.to_string()))?;
        let bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
        if !bare || text.ends_with('/') || text.contains(['@', '*', '\\']) {
            return Err(fail("this is more, or other, than a host"));
        }
        Self::of(&url).ok_or_else(|| fail("this is neither https nor http"))
    }

    /// Where `url` leads, if it is a URL of the web.
    fn of(url: &Url) -> Option<Self> {
        let port = url.port_or_known_default()?;
        let host = url.host_str().filter(|host| !host.is_empty())?.to_owned();
        matches!(url.scheme(), "https" | "http").then(|| Self { scheme: url.scheme().to_owned(), host, port })
    }
}

/// Which addresses may be connected to.
type Reachable = fn(IpAddr) -> bool;

/// Fetches what the operator allows.
#[derive(Clone, Debug)]
pub(super) struct RemoteImages {
    allowed: Vec<ImageHost>,
    client: Option<Client>,
    reachable: Reachable,
    most: u64,
    total: Duration,
}

impl RemoteImages {
    /// Fetches from `allowed` alone, images of at most `most` bytes.
    ///
    /// # Errors
    /// [`Error::Request`] when no client can be made.
    pub(super) fn new(allowed: Vec<ImageHost>, most: u64) -> Result<Self> {
        Self::reaching(allowed, most, TOTAL, address::is_public)
    }

    /// As [`RemoteImages::new`], connecting to other addresses than those of the internet.
    fn reaching(allowed: Vec<ImageHost>, most: u64, total: Duration, reachable: Reachable) -> Result<Self> {
        let client = if allowed.is_empty() { None } else { Some(client(reachable)?) };
        Ok(Self { allowed, client, reachable, most, total })
    }

    /// The bytes behind `url`; whether they are an image is the decoder's to say. `name` is what errors call it.
    ///
    /// # Errors
    /// [`Error::Image`] for a URL that is not allowed, leads to one that is not, or does not give its bytes in time.
    pub(super) async fn fetch(&self, name: &str, url: &str) -> Result<Vec<u8>> {
        let Some(client) = &self.client else {
            return Err(Error::image(
                name,
                "remote image URLs are refused; send a data URI, or let the server's operator allow the host with \
                 --allow-image-host",
            ));
        };
        let work = self.follow(client, name, url);
        tokio::time::timeout(self.total, work).await.unwrap_or_else(|_| {
            let seconds = self.total.as_secs_f32();
            Err(Error::image(name, format!("its host took more than {seconds} s; send a data URI")))
        })
    }

    async fn follow(&self, client: &Client, name: &str, url: &str) -> Result<Vec<u8>> {
        let fail = |why: String| Error::image(name, why);
        if url.len() > LENGTH {
            return Err(fail(format!("its URL has {} characters and may have {LENGTH}", url.len())));
        }
        let mut url = Url::parse(url).map_err(|e| fail(format!("this is no URL ({e}); send a data URI")))?;
        for _ in 0..=REDIRECTS {
            self.check(&url).map_err(fail)?;
            let request = client.get(url.clone()).send();
            let response = request.await.map_err(|e| fail(reason(&e)))?;
            // The resolver has checked every address before; this holds for connectors that ask none.
            if response.remote_addr().is_some_and(|peer| !(self.reachable)(peer.ip())) {
                return Err(fail(Closed.to_string()));
            }
            if !response.status().is_redirection() {
                return self.body(name, response).await;
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            url = location
                .and_then(|location| url.join(location).ok())
                .ok_or_else(|| fail("its host redirects to no URL; send a data URI".to_owned()))?;
        }
        Err(fail(format!("its host redirects more than {REDIRECTS} times; send the URL where it ends")))
    }

    /// Refuses a URL before anything is sent.
    fn check(&self, url: &Url) -> Result<(), String> {
        let origin = ImageHost::of(url).ok_or_else(|| {
            format!("a URL of the scheme {} is not fetched; send a data URI or https", url.scheme())
        })?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("its URL holds a user's name or password; leave them out".to_owned());
        }
        if !self.allowed.contains(&origin) {
            let ImageHost { scheme, host, port } = origin;
            return Err(format!(
                "images from {scheme}://{host}:{port} are not allowed; send a data URI, or let the server's \
                 operator allow the host with --allow-image-host"
            ));
        }
        let literal = origin.host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        match literal {
            Ok(address) if !(self.reachable)(address) => Err(Closed.to_string()),
            _ => Ok(()),
        }
    }

    /// Reads to the end, or one piece past the limit. What the host says of the length is not believed.
    async fn body(&self, name: &str, mut response: Response) -> Result<Vec<u8>> {
        let status = response.status();
        if status != StatusCode::OK {
            return Err(Error::image(name, format!("its host answers {}; send a data URI", status.as_u16())));
        }
        let mut bytes = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|e| Error::image(name, reason(&e)))? {
            if bytes.len() as u64 + piece.len() as u64 > self.most {
                let most = self.most;
                return Err(Error::image(name, format!("it has more than {most} bytes; send a smaller one")));
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes)
    }
}

/// A client that asks nobody but the host: no proxy, no kept connection, no redirect of its own.
fn client(reachable: Reachable) -> Result<Client> {
    tls::install_provider();
    Client::builder()
        .no_proxy()
        .redirect(Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .pool_max_idle_per_host(0)
        .connect_timeout(CONNECT)
        .dns_resolver(Resolver(reachable))
        .user_agent(concat!("llava-phi/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|e| Error::Request(format!("images cannot be fetched: {e}; leave out --allow-image-host")))
}

/// Resolves through the system and gives addresses only when all of them may be connected to.
#[derive(Clone, Copy)]
struct Resolver(Reachable);

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let reachable = self.0;
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            if found.iter().any(|address| !reachable(address.ip())) {
                return Err(Closed.into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// A host leads to where nothing is fetched from. The address is not named: it would tell of the server's network.
#[derive(Debug)]
struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("its host has an address that is not of the public internet; send a data URI")
    }
}

impl StdError for Closed {}

/// Why `error` came about, without the URL, which may hold a signature.
fn reason(error: &reqwest::Error) -> String {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(one) = cause {
        if let Some(closed) = one.downcast_ref::<Closed>() {
            return closed.to_string();
        }
        cause = one.source();
    }
    let what = if error.is_connect() { "cannot be connected to" } else { "broke off its answer" };
    format!("its host {what}; check the URL or send a data URI")
}
