//! TLS in front of the server, from two PEM files that can be replaced while it runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::error::{Error, Result};

/// Takes ring for whatever speaks TLS in this process, unless the program that embeds this one chose before.
pub(super) fn install_provider() {
    if CryptoProvider::get_default().is_none() {
        // Lost only to another thread that does the same.
        let _ = ring::default_provider().install_default();
    }
}

/// Where the certificate and its key lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The server's certificate, and those between it and its authority.
    pub cert: PathBuf,
    /// The private key of the first certificate.
    pub key: PathBuf,
}

impl TlsFiles {
    /// Both files, or none.
    ///
    /// # Errors
    /// [`Error::Request`] when one is given without the other.
    pub fn from_options(cert: Option<PathBuf>, key: Option<PathBuf>) -> Result<Option<Self>> {
        match (cert, key) {
            (Some(cert), Some(key)) => Ok(Some(Self { cert, key })),
            (None, None) => Ok(None),
            (Some(_), None) => refuse("--tls-cert has no --tls-key; give the file of its private key too"),
            (None, Some(_)) => refuse("--tls-key has no --tls-cert; give the file of its certificate too"),
        }
    }

    /// What both files say now.
    fn read(&self) -> Result<ServerConfig> {
        let chain = self.chain()?;
        let key = read(&self.key, "--tls-key")?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|e| {
            let what = if String::from_utf8_lossy(&key).contains("ENCRYPTED PRIVATE KEY") {
                "holds an encrypted key; give it decrypted, readable by this user alone".to_owned()
            } else {
                format!("holds no private key in PEM ({e}); give a PKCS #8, PKCS #1 or SEC 1 one")
            };
            Error::Request(format!("--tls-key {} {what}", self.key.display()))
        })?;
        let provider = Arc::new(ring::default_provider());
        let built = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key));
        let mut config = built.map_err(|e| {
            let (cert, key) = (self.cert.display(), self.key.display());
            Error::Request(format!(
                "--tls-cert {cert} and --tls-key {key} do not serve together ({e}); give a certificate, \
                 its own first, and the key that it was made for"
            ))
        })?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }

    fn chain(&self) -> Result<Vec<CertificateDer<'static>>> {
        let cert = self.cert.display();
        let bytes = read(&self.cert, "--tls-cert")?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&bytes)
            .collect::<std::result::Result<_, _>>()
            .map_err(|e| Error::Request(format!("--tls-cert {cert} is not PEM ({e}); export it again")))?;
        if chain.is_empty() {
            return refuse(format!(
                "--tls-cert {cert} holds no certificate in PEM; give the server's own first"
            ));
        }
        Ok(chain)
    }
}

/// What connections are accepted with. Clones share what [`Tls::reload`] replaces.
#[derive(Clone)]
pub(super) struct Tls {
    files: TlsFiles,
    config: RustlsConfig,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// [`Error::Request`] that names the file which is missing, unreadable, no PEM, or does not fit the other.
    pub(super) fn open(files: TlsFiles) -> Result<Self> {
        install_provider();
        let config = RustlsConfig::from_config(Arc::new(files.read()?));
        Ok(Self { files, config })
    }

    /// Accepts what `inner` does, encrypted; a client has `handshake` to agree on how.
    pub(super) fn acceptor<A>(&self, inner: A, handshake: Duration) -> RustlsAcceptor<A> {
        RustlsAcceptor::new(self.config.clone()).handshake_timeout(handshake).acceptor(inner)
    }

    /// Reads the files again; connections from now on see what they hold.
    ///
    /// # Errors
    /// As [`Tls::open`]; what was read before then stays.
    pub(super) fn reload(&self) -> Result<()> {
        self.config.reload_from_config(Arc::new(self.files.read()?));
        Ok(())
    }

    /// Reads the files again whenever this process is told to hang up, until the runtime ends.
    #[cfg(unix)]
    pub(super) fn reload_on_hangup(&self) -> std::io::Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut hangups = signal(SignalKind::hangup())?;
        let tls = self.clone();
        tokio::spawn(async move {
            while hangups.recv().await.is_some() {
                match tls.reload() {
                    Ok(()) => {
                        tracing::info!(cert = %tls.files.cert.display(), "the certificate was read again");
                    }
                    Err(error) => tracing::error!(%error, "the certificate stays as it was"),
                }
            }
        });
        Ok(())
    }
}

#[cfg(not(unix))]
impl Tls {
    /// No other system tells a process to hang up; a new certificate is read when the server starts.
    pub(super) fn reload_on_hangup(&self) -> std::io::Result<()> {
        Ok(())
    }
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

fn read(path: &Path, flag: &str) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| {
        Error::Request(format!(
            "{flag} {} cannot be read ({e}); check the path and who may read it",
            path.display()
        ))
    })
}

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::Request(why.into()))
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::routing::get;
    use axum_server::Handle;
    use axum_server::accept::DefaultAcceptor;

    use super::*;

    const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tls");

    fn fixture(name: &str) -> PathBuf {
        Path::new(FIXTURES).join(name)
    }

    fn files(cert: &str, key: &str) -> TlsFiles {
        TlsFiles { cert: fixture(cert), key: fixture(key) }
    }

    /// A client that trusts the certificate `name` alone.
    fn trusting(name: &str) -> reqwest::Client {
        install_provider();
        let pem = std::fs::read(fixture(name)).unwrap();
        let certificate = reqwest::Certificate::from_pem(&pem).unwrap();
        reqwest::Client::builder().no_proxy().tls_certs_only([certificate]).build().unwrap()
    }

    #[test]
    fn one_file_without_the_other_is_refused_by_name() {
        let path = || Some(PathBuf::from("x.pem"));
        assert_eq!(TlsFiles::from_options(None, None).unwrap(), None);
        assert!(TlsFiles::from_options(path(), path()).unwrap().is_some());
        let refusal = |cert, key| TlsFiles::from_options(cert, key).unwrap_err().to_string();
        assert!(refusal(path(), None).starts_with("--tls-cert has no --tls-key;"));
        assert!(refusal(None, path()).starts_with("--tls-key has no --tls-cert;"));
    }

    #[test]
    fn files_that_do_not_serve_are_refused_by_name_and_with_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let (cert, key) = (fixture("one-cert.pem"), fixture("one-key-known-to-everybody.pem"));
        let text = write("text.pem", "a certificate");
        let cut = write("cut.pem", "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n");
        let der = write("der.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
        let locked = write(
            "locked.pem",
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
        );
        for (cert, key, wanted) in [
            (dir.path().join("none"), key.clone(), "--tls-cert"),
            (cert.clone(), dir.path().join("none"), "cannot be read (No such file"),
            (cert.clone(), dir.path().to_owned(), "cannot be read"),
            (text.clone(), key.clone(), "holds no certificate in PEM"),
            (key.clone(), key.clone(), "holds no certificate in PEM"),
            (cut, key.clone(), "is not PEM"),
            (der, key.clone(), "do not serve together"),
            (cert.clone(), text, "holds no private key in PEM"),
            (cert.clone(), cert.clone(), "holds no private key in PEM"),
            (cert.clone(), locked, "holds an encrypted key"),
            (cert, fixture("other-key-known-to-everybody.pem"), "do not serve together"),
        ] {
            let refusal = Tls::open(TlsFiles { cert, key }).unwrap_err().to_string();
            assert!(refusal.contains(wanted) && refusal.contains("; "), "{wanted}: {refusal}");
        }
    }

    #[tokio::test]
    async fn a_certificate_that_is_replaced_serves_the_next_connection_and_a_broken_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let here = TlsFiles { cert: dir.path().join("cert"), key: dir.path().join("key") };
        let take = |name: &str| {
            std::fs::copy(fixture(&format!("{name}-cert.pem")), &here.cert).unwrap();
            std::fs::copy(fixture(&format!("{name}-key-known-to-everybody.pem")), &here.key).unwrap();
        };
        take("one");
        let tls = Tls::open(here.clone()).unwrap();
        let handle: Handle<std::net::SocketAddr> = Handle::new();
        let served = axum_server::bind(([127, 0, 0, 1], 0).into())
            .acceptor(tls.acceptor(DefaultAcceptor::new(), Duration::from_secs(5)))
            .handle(handle.clone())
            .serve(Router::new().route("/", get(|| async { "hello" })).into_make_service());
        let server = tokio::spawn(served);
        let url = format!("https://localhost:{}/", handle.listening().await.unwrap().port());
        let ask = async |trusted: &str| trusting(trusted).get(&url).send().await;
        assert_eq!(ask("one-cert.pem").await.unwrap().text().await.unwrap(), "hello");
        assert!(ask("other-cert.pem").await.unwrap_err().is_connect());

        take("other");
        tls.reload().unwrap();
        assert_eq!(ask("other-cert.pem").await.unwrap().text().await.unwrap(), "hello");
        assert!(ask("one-cert.pem").await.unwrap_err().is_connect());

        std::fs::write(&here.key, "gone").unwrap();
        assert!(tls.reload().is_err());
        assert_eq!(ask("other-cert.pem").await.unwrap().text().await.unwrap(), "hello");
        handle.shutdown();
        server.await.unwrap().unwrap();
    }

    #[test]
    fn a_shown_configuration_names_its_files_and_no_key() {
        let tls = Tls::open(files("one-cert.pem", "one-key-known-to-everybody.pem")).unwrap();
        let shown = format!("{tls:?}");
        assert!(shown.contains("one-cert.pem") && !shown.contains("BEGIN"), "{shown}");
    }
}
