//! `llava-phi runtime`: which ONNX Runtime is in use, and how to get one.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::say::LogFormat;
use crate::runtime::fetch::{self, Fetchable};
use crate::runtime::library::{self, Candidate};
use crate::runtime::options::{self, OptionKey};
use crate::runtime::{Library, LibraryOptions, LibraryVariant, Origin, Progress, Provider, Runtime};

/// Arguments of `llava-phi runtime`.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct RuntimeArgs {
    #[command(subcommand)]
    command: RuntimeCommand,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum RuntimeCommand {
    /// Show which ONNX Runtime is used, and which others were found
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Fetch ONNX Runtime into the cache with pip, or install it from a file
    Install {
        /// Which build: cpu, or cuda for NVIDIA GPUs
        #[arg(long, default_value = "cpu", value_name = "BUILD")]
        variant: LibraryVariant,
        /// Install this wheel or library instead of fetching one
        #[arg(long, value_name = "FILE", conflicts_with = "variant")]
        from: Option<PathBuf>,
    },
    /// List what --provider-option takes
    Options {
        /// The provider; all of them otherwise
        provider: Option<Provider>,
    },
}

/// Runs `llava-phi runtime`: data on stdout, notices and progress on stderr.
///
/// # Errors
/// What [`fetch::install`] and [`Runtime::start`] refuse; that nothing is installed is an answer of `status`, not a
/// failure.
pub(super) fn run(args: &RuntimeArgs, options: &LibraryOptions) -> Result<()> {
    match &args.command {
        RuntimeCommand::Status { json } => status(*json, options),
        RuntimeCommand::Install { variant, from } => install(*variant, from.as_deref(), options),
        RuntimeCommand::Options { provider } => {
            let one = provider.map(|provider| [provider]);
            list_options(one.as_ref().map_or(Provider::ALL, |one| &one[..]))
        }
    }
}

fn list_options(providers: &[Provider]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for provider in providers {
        for OptionKey { key, about } in options::keys(*provider) {
            writeln!(out, "{:<58} {about}", format!("{provider}.{key}"))?;
        }
    }
    Ok(())
}

fn install(variant: LibraryVariant, from: Option<&std::path::Path>, options: &LibraryOptions) -> Result<()> {
    let mut progress = progress(LogFormat::Text);
    let path = match from {
        Some(file) => fetch::install_from(file, options, &mut progress)?,
        None => fetch::install(variant, options, &mut progress)?,
    };
    drop(progress);
    let installed = LibraryOptions { explicit: Some(path.clone()), ..options.clone() };
    let version = Runtime::start(&installed, &mut |_| {})?.version();
    writeln!(std::io::stdout(), "ONNX Runtime {version} is installed: {}", path.display())?;
    if let Some(other) = library::candidates(options).into_iter().find(|one| one.fault.is_none())
        && other.path != path
    {
        LogFormat::Text.say(format!(
            "hint: {} comes first and is used instead ({})",
            other.path.display(),
            other.origin
        ));
    }
    Ok(())
}

/// What `status --json` prints.
#[derive(Debug, Serialize)]
struct Status {
    /// What is used; `null` when there is none yet.
    library: Option<Library>,
    /// Why there is none, if one was found but does not serve.
    error: Option<String>,
    candidates: Vec<Candidate>,
    fetchable: Vec<Fetchable>,
    cache: Option<PathBuf>,
    offline: bool,
}

fn status(json: bool, options: &LibraryOptions) -> Result<()> {
    let candidates = library::candidates(options);
    let offline = LibraryOptions { offline: true, ..options.clone() };
    let nothing = cfg!(feature = "load-dynamic") && candidates.is_empty();
    let started = (!nothing).then(|| Runtime::start(&offline, &mut |_| {}));
    let (library, error) = match started {
        None => (None, None),
        Some(Ok(runtime)) => (Some(runtime.library().clone()), None),
        Some(Err(e)) => (None, Some(format!("{:#}", anyhow::Error::from(e)))),
    };
    let status = Status {
        library,
        error,
        candidates,
        fetchable: fetch::fetchable(),
        cache: options.cache.as_ref().map(|cache| cache.join("onnxruntime")),
        offline: options.offline,
    };
    let text = if json { serde_json::to_string_pretty(&status)? } else { for_people(&status) };
    writeln!(std::io::stdout(), "{}", text.trim_end())?;
    Ok(())
}

fn for_people(status: &Status) -> String {
    let mut lines = Vec::new();
    match (&status.library, &status.error) {
        (Some(library), _) => lines.push(format!("ONNX Runtime {library}")),
        (None, Some(error)) => lines.push(format!("none is usable: {error}")),
        (None, None) if status.offline => lines.push("ONNX Runtime was not found".to_owned()),
        (None, None) => lines.push("ONNX Runtime was not found; it is fetched when it is needed".to_owned()),
    }
    let used = status.library.as_ref().and_then(|library| library.path.as_deref());
    // Why a library that the user chose does not serve is said above.
    let others = status.candidates.iter().filter(|one| Some(one.path.as_path()) != used && !one.is_chosen());
    for one in others {
        let place = format!("{} ({})", one.path.display(), one.origin);
        match &one.fault {
            Some(fault) => lines.push(format!("not used  {place}: {fault}")),
            None => lines.push(format!("not used  {place}")),
        }
    }
    if status.library.as_ref().is_none_or(|library| library.origin != Origin::Linked) {
        if let Some(cache) = &status.cache {
            lines.push(format!("cache     {}", cache.display()));
        }
        for one in &status.fetchable {
            let (variant, tenths) = (one.variant, one.bytes.div_ceil(100_000));
            lines.push(format!(
                "to fetch  {} {}, {}.{} MB: llava-phi runtime install --variant {variant}",
                one.project,
                one.version,
                tenths / 10,
                tenths % 10,
            ));
        }
    }
    lines.join("\n")
}

/// Shows what happens while ONNX Runtime is looked for or installed: notices on stderr, and a bar if it is a
/// terminal.
pub(super) fn progress(format: LogFormat) -> impl FnMut(Progress<'_>) {
    let terminal = std::io::stderr().is_terminal() && format == LogFormat::Text;
    let mut bar = Bar(None);
    move |progress| match progress {
        Progress::Notice(text) => match &bar.0 {
            Some(bar) => bar.suspend(|| format.say(text)),
            None => format.say(text),
        },
        Progress::Download { done, total } if terminal => {
            let bar = bar.0.get_or_insert_with(|| new_bar(total));
            bar.set_length(total);
            bar.set_position(done);
        }
        _ => {}
    }
}

/// A bar that is wiped when it is no longer needed, also after an error.
struct Bar(Option<ProgressBar>);

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(total: u64) -> ProgressBar {
    let bar = ProgressBar::new(total);
    match ProgressStyle::with_template("{bar:30} {decimal_bytes} of {decimal_total_bytes}, {eta} left") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            library: None,
            error: None,
            candidates: Vec::new(),
            fetchable: Vec::new(),
            cache: Some(PathBuf::from("/cache/onnxruntime")),
            offline: false,
        }
    }

    #[test]
    fn status_says_what_is_used_and_what_is_not_and_why() {
        let library = Library {
            path: Some(PathBuf::from("/cache/onnxruntime/1.32.0-cpu/lib")),
            origin: Origin::Cache,
            version: "1.32.0".to_owned(),
        };
        let candidate = |path: &str, origin, fault: Option<&str>| Candidate {
            path: PathBuf::from(path),
            origin,
            fault: fault.map(str::to_owned),
        };
        let status = Status {
            library: Some(library),
            candidates: vec![
                candidate("/opt/lib", Origin::Executable, Some("/opt/lib is empty")),
                candidate("/cache/onnxruntime/1.32.0-cpu/lib", Origin::Cache, None),
                candidate("/venv/lib", Origin::Python, None),
            ],
            ..status()
        };
        assert_eq!(
            for_people(&status),
            "ONNX Runtime 1.32.0 /cache/onnxruntime/1.32.0-cpu/lib (cache)\n\
             not used  /opt/lib (next to the program): /opt/lib is empty\n\
             not used  /venv/lib (active Python environment)\n\
             cache     /cache/onnxruntime"
        );
    }

    #[test]
    fn status_without_a_library_says_whether_one_will_be_fetched() {
        assert!(
            for_people(&status())
                .starts_with("ONNX Runtime was not found; it is fetched when it is needed\n")
        );
        let offline = Status { offline: true, ..status() };
        assert!(for_people(&offline).starts_with("ONNX Runtime was not found\n"));
        let broken = Status { error: Some("why".to_owned()), ..status() };
        assert!(for_people(&broken).starts_with("none is usable: why\n"));
        let json = serde_json::to_value(status()).unwrap();
        assert_eq!(json["library"], serde_json::Value::Null);
    }
}
