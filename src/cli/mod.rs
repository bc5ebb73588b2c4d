//! The `llava-phi` program: what its commands share.

mod ask;
mod batch;
mod bench;
mod cache;
mod chat;
mod compile;
mod config;
mod context;
mod doctor;
mod figures;
mod form;
mod generation;
mod inspect;
mod interrupt;
mod live;
mod model;
mod npy;
mod runtime;
mod say;
#[cfg(feature = "server")]
mod serve;
mod session;
mod trace;
mod tune;

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _, Write as _},
    panic,
    process::ExitCode,
    str::FromStr as _,
};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Directive;

use crate::error::{Error, ErrorKind};
use config::Layers;
use context::Context;
use say::LogFormat;

/// Runs the LLaVA-Phi vision-language model anywhere ONNX Runtime runs.
///
/// Without --model, the miniature model inside this program answers.
#[derive(Debug, Parser)]
#[command(name = "llava-phi", version, propagate_version = true, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    context: Context,
}

const EXIT_CODES: &str = "\
LLAVA_PHI_LOG=debug tells on standard error what happens inside.

Exit codes:
  0    the answer is complete
  1    something failed that should not have
  2    the arguments, an image or a question cannot be used
  3    the package, ONNX Runtime or a provider cannot be used
  130  stopped by Ctrl-C";

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask one question, about images or none
    Ask(ask::Arguments),
    /// Answer clients of OpenAI's API over HTTP
    #[cfg(feature = "server")]
    Serve(serve::Arguments),
    /// Hold a conversation in the terminal
    Chat(chat::Arguments),
    /// Answer many questions: JSON lines in, JSON lines out
    Batch(batch::Arguments),
    /// Show what a package holds and what it will take
    Inspect(inspect::Arguments),
    /// Show what this machine has, what each provider says, and what would serve
    Doctor(doctor::Arguments),
    /// Walk one image through every stage: shapes, ranges, times
    Trace(trace::Arguments),
    /// Compile ahead of time for the providers that do, and show or empty what they compiled
    Compile(compile::Arguments),
    /// Show, prune or clear the snapshots of prompts in --cache-dir
    Cache(cache::Arguments),
    /// Measure what could serve here, and use the fastest from now on
    Tune(tune::Arguments),
    /// Measure how long each stage takes here, and how much memory
    Bench(bench::Arguments),
    /// Show or install ONNX Runtime
    Runtime(runtime::RuntimeArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

impl Command {
    /// What is logged unless `LLAVA_PHI_LOG` says otherwise: nothing, but a server says what it is asked.
    fn log(&self) -> &'static str {
        match self {
            #[cfg(feature = "server")]
            Self::Serve(_) => "llava_phi=warn,llava_phi::server=info",
            _ => "off",
        }
    }

    /// What a line of the log looks like.
    fn log_format(&self) -> LogFormat {
        match self {
            #[cfg(feature = "server")]
            Self::Serve(arguments) => arguments.log_format(),
            _ => LogFormat::Text,
        }
    }

    /// Whether only the settings are to be shown.
    fn prints_settings(&self) -> bool {
        match self {
            #[cfg(feature = "server")]
            Self::Serve(arguments) => arguments.prints_settings(),
            _ => false,
        }
    }
}

/// Parses the arguments, runs the command and gives the exit code.
#[must_use]
pub fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let layers = match Layers::new(command(), &words, &config::environment) {
        Ok(layers) => layers,
        Err(error) => return failed(&error.into(), LogFormat::Text),
    };
    let parsed = layers.program.clone().try_get_matches_from(words);
    let parsed = parsed.and_then(|matches| Ok((Arguments::from_arg_matches(&matches)?, matches)));
    let (mut arguments, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return misuse(&error),
    };
    if arguments.command.prints_settings() {
        let printed = layers.print(&matches).map_err(anyhow::Error::from);
        return match printed.and_then(|text| Ok(io::stdout().write_all(text.as_bytes())?)) {
            Err(error) if !is_broken_pipe(&error) => failed(&error, LogFormat::Text),
            _ => ExitCode::SUCCESS,
        };
    }
    let format = arguments.command.log_format();
    arguments.context.speak(format);
    log(&arguments.command);
    match run(arguments) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => failed(&error, format),
    }
}

/// Says on standard error what went wrong, and gives its exit code.
fn failed(error: &anyhow::Error, format: LogFormat) -> ExitCode {
    format.fail(&sentence(error));
    ExitCode::from(exit_code(error))
}

/// Starts the log on standard error.
fn log(command: &Command) {
    let asked = config::environment("LLAVA_PHI_LOG").filter(|filter| !filter.is_empty());
    let asked = asked.map(|filter| EnvFilter::try_new(filter.to_string_lossy()));
    let (asked, unreadable) = asked.transpose().map_or_else(|e| (None, Some(e)), |asked| (asked, None));
    let filter = asked.unwrap_or_else(|| EnvFilter::new(command.log()));
    // It traces each character of each prompt.
    let filter = filter.add_directive(Directive::from_str("tokenizers=off").unwrap_or_default());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let log = log.with_ansi(io::stderr().is_terminal());
    match command.log_format() {
        LogFormat::Text => log.init(),
        LogFormat::Json => {
            log.json().flatten_event(true).init();
            panic::set_hook(Box::new(|what| LogFormat::Json.fail(&one_line(&what.to_string()))));
        }
    }
    if let Some(error) = unreadable {
        let text = format_args!(
            "notice: LLAVA_PHI_LOG is not heeded ({error}); give a filter such as llava_phi=debug"
        );
        command.log_format().say(text);
    }
}

/// The arguments, with the version of ONNX Runtime in the version's text.
fn command() -> clap::Command {
    let asked = std::env::args_os().any(|word| word == "--version" || word == "-V");
    let runtime = if asked { Context::default().runtime_version() } else { String::new() };
    Arguments::command().version(format!("{}\n{runtime}", env!("CARGO_PKG_VERSION")))
}

fn run(Arguments { command, context }: Arguments) -> anyhow::Result<ExitCode> {
    match command {
        Command::Ask(arguments) => ask::run(&arguments, &context),
        #[cfg(feature = "server")]
        Command::Serve(arguments) => serve::run(arguments, context),
        Command::Chat(arguments) => chat::run(&arguments, &context),
        Command::Batch(arguments) => batch::run(&arguments, &context),
        Command::Inspect(arguments) => inspect::run(&arguments, &context),
        Command::Doctor(arguments) => doctor::run(&arguments, &context),
        Command::Trace(arguments) => trace::run(&arguments, &context),
        Command::Compile(arguments) => compile::run(&arguments, &context),
        Command::Cache(arguments) => cache::run(&arguments, &context),
        Command::Tune(arguments) => tune::run(&arguments, &context),
        Command::Bench(arguments) => bench::run(&arguments, &context),
        Command::Runtime(arguments) => {
            runtime::run(&arguments, &context.library())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Completions { shell } => {
            // Written at once: the generator panics when its reader goes away.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "llava-phi", &mut script);
            io::stdout().write_all(&script)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Prints help or a version where it was asked for, and what is wrong with the arguments in one line.
fn misuse(error: &clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    if !error.use_stderr() || error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        // Whoever asked for help and closed the pipe has seen enough.
        let _ = error.print();
        return ExitCode::from(code);
    }
    let _ = writeln!(io::stderr(), "error: {}; --help lists what can be given", fault(error));
    ExitCode::from(code)
}

/// What is wrong with an argument, in one line.
fn fault(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let fault = text.split("\n\nUsage:").next().unwrap_or(&text);
    let fault = fault.split("\n\nFor more information").next().unwrap_or(fault);
    one_line(fault.strip_prefix("error: ").unwrap_or(fault))
}

/// An error as one line: what failed, and what lies below it in brackets.
fn sentence(error: &anyhow::Error) -> String {
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // Some libraries repeat the cause in their own text.
        if causes.last().is_none_or(|above| !above.contains(&cause)) {
            causes.push(cause);
        }
    }
    let below = if causes.is_empty() { String::new() } else { format!(" ({})", causes.join(": ")) };
    one_line(&format!("{error}{below}"))
}

fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ").replace(" tip: ", "; ")
}

/// Exit code of a command that Ctrl-C stopped.
const INTERRUPTED: u8 = 130;

fn exit_code(error: &anyhow::Error) -> u8 {
    match error.chain().find_map(|cause| cause.downcast_ref::<Error>()).map(Error::kind) {
        Some(ErrorKind::Request) => 2,
        Some(ErrorKind::Package | ErrorKind::Provider) => 3,
        Some(ErrorKind::Cancelled) => INTERRUPTED,
        Some(ErrorKind::Runtime | ErrorKind::Busy | ErrorKind::Deadline) | None => 1,
    }
}

/// A reader that went away, as in `llava-phi ... | head`, is not a failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}
