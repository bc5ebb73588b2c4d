//! `llava-phi serve`: models behind OpenAI's API.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    process::ExitCode,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::builder::NonEmptyStringValueParser;

use super::context::Context;
use super::model::ModelArguments;
use super::say::LogFormat;
use crate::error::Error;
use crate::package::ModelPackage;
use crate::server::{
    self, AllowedOrigin, ImageHost, Keys, Model, Models, ModelsDirectory, Notice, Open, OtlpEndpoint,
    ServerLimits, ServerOptions, Shutdown, TlsFiles,
};

/// What `serve` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,

    /// What requests call the model; the package's own name otherwise
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    model_name: Option<String>,

    /// A directory of packages, instead of --model: each is a model by its directory's name, opened when it is asked for
    #[arg(long, value_name = "DIR")]
    models_dir: Option<PathBuf>,

    /// The most models of --models-dir that are open at once, where memory does not allow fewer; for one more, that which
    /// was used longest ago is closed
    #[arg(long, value_name = "N", default_value = "4", requires = "models_dir")]
    max_models: NonZeroUsize,

    /// Open this model of --models-dir before requests are taken; can be given several times
    #[arg(long, value_name = "NAME")]
    preload: Vec<String>,

    /// The most requests that a model works on at once; memory may allow fewer
    #[arg(long, value_name = "N", default_value = "8")]
    parallel: NonZeroUsize,

    /// The most requests that wait beyond those; more are told to come again
    #[arg(long, value_name = "N", default_value_t = 128)]
    queue: usize,

    /// The address to listen on; 0.0.0.0 or :: lets other machines in
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1", value_parser = parse_host)]
    host: IpAddr,

    /// The port to listen on; 0 takes any that is free and tells which
    #[arg(long, default_value_t = 8080)]
    port: u16,

    /// A file of API keys, one a line; without it everybody who reaches the address may ask
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,

    /// Listen where other machines reach it, without asking for a key
    #[arg(long)]
    insecure_no_key: bool,

    /// Encrypt connections with this certificate: PEM, the server's own first. SIGHUP reads it again
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,

    /// The private key of the certificate: PEM, not encrypted
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,

    /// Fetch images that prompts name by URL from this host; can be given several times, nothing is fetched otherwise
    #[arg(long = "allow-image-host", value_name = "HOST[:PORT]", value_parser = parse_image_host)]
    image_hosts: Vec<ImageHost>,

    /// Let pages of this origin ask, such as `https://example.org`; can be given several times, none may otherwise
    #[arg(long = "allow-origin", value_name = "ORIGIN", value_parser = parse_origin)]
    origins: Vec<AllowedOrigin>,

    /// Send spans of requests to this OpenTelemetry collector, such as `http://localhost:4318`
    #[arg(long, value_name = "URL", value_parser = parse_endpoint)]
    otlp_endpoint: Option<OtlpEndpoint>,

    /// Seconds that requests may go on after SIGTERM or Ctrl-C; a second signal gives up on them at once
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    shutdown_grace: u64,

    /// What a line of the log on standard error looks like
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,

    /// Show every setting and what it came from as a file for --config, and end
    #[arg(long)]
    print_config: bool,

    #[command(flatten)]
    limits: LimitArguments,
}

impl Arguments {
    /// What a line of the log looks like.
    pub(super) fn log_format(&self) -> LogFormat {
        self.log_format
    }

    /// Whether only the settings are to be shown.
    pub(super) fn prints_settings(&self) -> bool {
        self.print_config
    }
}

/// What requests may take.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits")]
struct LimitArguments {
    /// The most bytes of a request
    #[arg(long, value_name = "N", default_value_t = ServerLimits::default().body_bytes, value_parser = positive::<usize>)]
    max_body_bytes: usize,

    /// The most bytes of bodies that are being read and of images that wait, of all clients together
    #[arg(long, value_name = "N", default_value_t = ServerLimits::default().buffered_bytes, value_parser = positive::<usize>)]
    max_buffered_bytes: usize,

    /// The most images of a request
    #[arg(long, value_name = "N", default_value_t = ServerLimits::default().images)]
    max_images: usize,

    /// The most characters of a request's text
    #[arg(long, value_name = "N", default_value_t = ServerLimits::default().prompt_chars, value_parser = positive::<usize>)]
    max_prompt_chars: usize,

    /// The most answers to one request
    #[arg(long, value_name = "N", default_value_t = ServerLimits::default().answers, value_parser = positive::<usize>)]
    max_answers: usize,

    /// The most requests at once, from the end of their bodies to that of their answers; more are told to come again
    #[arg(long, value_name = "N", default_value_t = ServerLimits::default().requests, value_parser = positive::<usize>)]
    max_requests: usize,

    /// The most connections at once
    #[arg(long, value_name = "N", default_value_t = ServerLimits::default().connections, value_parser = positive::<usize>)]
    max_connections: usize,

    /// Seconds that a request may take, from its arrival to the end of its answer
    #[arg(long, value_name = "SECONDS", default_value_t = ServerLimits::default().request_time.as_secs(), value_parser = positive::<u64>)]
    request_timeout: u64,

    /// Seconds for the headers of a request, and that a connection may be idle
    #[arg(long, value_name = "SECONDS", default_value_t = ServerLimits::default().header_time.as_secs(), value_parser = positive::<u64>)]
    header_timeout: u64,

    /// Seconds that a client may pause while it sends a body or reads an answer
    #[arg(long, value_name = "SECONDS", default_value_t = ServerLimits::default().stall_time.as_secs(), value_parser = positive::<u64>)]
    stall_timeout: u64,
}

impl LimitArguments {
    fn limits(&self) -> ServerLimits {
        ServerLimits {
            body_bytes: self.max_body_bytes,
            buffered_bytes: self.max_buffered_bytes,
            images: self.max_images,
            prompt_chars: self.max_prompt_chars,
            answers: self.max_answers,
            connections: self.max_connections,
            requests: self.max_requests,
            request_time: Duration::from_secs(self.request_timeout),
            header_time: Duration::from_secs(self.header_timeout),
            stall_time: Duration::from_secs(self.stall_timeout),
            ..ServerLimits::default()
        }
    }
}

/// Reads a whole number from 1 on: with 0 nobody would be answered.
fn positive<T: FromStr + PartialEq + From<u8>>(text: &str) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| *number != T::from(0));
    number.ok_or_else(|| "give a whole number from 1 on".to_owned())
}

fn parse_image_host(text: &str) -> Result<ImageHost, String> {
    ImageHost::parse(text).map_err(|error| error.to_string())
}

fn parse_endpoint(text: &str) -> Result<OtlpEndpoint, String> {
    OtlpEndpoint::parse(text).map_err(|error| error.to_string())
}

fn parse_origin(text: &str) -> Result<AllowedOrigin, String> {
    AllowedOrigin::parse(text).map_err(|error| error.to_string())
}

/// Reads an address, or the name of this machine.
fn parse_host(text: &str) -> Result<IpAddr, String> {
    if text.eq_ignore_ascii_case("localhost") {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    text.parse().map_err(|_| "give an address such as 127.0.0.1, ::1 or 0.0.0.0".to_owned())
}

pub(super) fn run(arguments: Arguments, context: Context) -> anyhow::Result<ExitCode> {
    let keys = arguments.api_key_file.as_deref().map(Keys::open).transpose()?;
    let options = ServerOptions {
        keys: keys.unwrap_or_default(),
        open_to_everybody: arguments.insecure_no_key,
        limits: arguments.limits.limits(),
        tls: TlsFiles::from_options(arguments.tls_cert, arguments.tls_key)?,
        image_hosts: arguments.image_hosts,
        origins: arguments.origins,
        otlp: arguments.otlp_endpoint,
        shutdown_grace: Duration::from_secs(arguments.shutdown_grace),
        signals: true,
        ..ServerOptions::at(SocketAddr::new(arguments.host, arguments.port))
    };
    let Arguments { model, model_name, models_dir, max_models, preload, parallel, queue, .. } = arguments;
    let format = context.format();
    let open: Open = match models_dir {
        Some(path) => {
            let both = [("--model", model.directory().is_some()), ("--model-name", model_name.is_some())];
            if let Some((name, _)) = both.into_iter().find(|(_, given)| *given) {
                return refuse(format!("{name} names one model and --models-dir several; give one of them"));
            }
            let (fit, memory) = (model.fit(), model.memory_limit());
            let engine = move |package: &ModelPackage| {
                context.check_cache();
                model.open_engine_of(package, &context, parallel.get(), Some(queue))
            };
            let most = max_models.get();
            if preload.len() > most {
                let many = preload.len();
                return refuse(format!(
                    "{many} models are to be preloaded and --max-models is {most}; allow more, or preload fewer"
                ));
            }
            let engine = Arc::new(engine);
            let models = ModelsDirectory { fit, most, memory, preload, ..ModelsDirectory::at(path, engine) };
            Box::new(move || Models::in_directory(models))
        }
        None if !preload.is_empty() => {
            return refuse("--preload needs --models-dir; one model is always loaded".to_owned());
        }
        None => Box::new(move || {
            context.check_cache();
            let engine = model.open_engine_for(&context, parallel.get(), Some(queue))?;
            let name = model_name.unwrap_or_else(|| engine.facts().name.clone());
            let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
            Ok(Models::one(Model { name, engine, fit: model.fit(), created }))
        }),
    };
    server::run(options, open, &Shutdown::new(), &mut |notice: Notice| format.say(notice))?;
    Ok(ExitCode::SUCCESS)
}

fn refuse(why: String) -> anyhow::Result<ExitCode> {
    Err(Error::Request(why).into())
}
