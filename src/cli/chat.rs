//! `llava-phi chat`: a conversation in the terminal.

use std::{
    ffi::OsString,
    io::{self, IsTerminal as _, Write as _},
    ops::ControlFlow,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::context::Context;
use super::figures::{self, Outside};
use super::form::constrained;
use super::generation::GenerationArguments;
use super::interrupt;
use super::live::Live;
use super::model::ModelArguments;
use crate::chat::Chat;
use crate::chat::attachment::Attachment;
use crate::chat::conversation::Part;
use crate::chat::saved;
use crate::engine::cancel::CancelToken;
use crate::engine::event::{Completion, Event};
use crate::error::{Error, Result, size};
use crate::generate::params::GenerateParams;
use crate::generate::sequence::FinishReason;
use crate::model::prefix::PrefixReport;

const HELP: &str = "\
/image FILE    add an image to the next question
/system TEXT   replace the system text; without a text, use the model's own
/reset         forget the conversation
/forget        forget the oldest question and its answer, to make room
/save FILE     write the conversation to a file
/load FILE     take up a conversation from a file
/stats         what the last answer took, and how full the context is
/help          this list
/quit          end; so does Ctrl-D
Ctrl-C stops an answer and keeps the conversation.";

/// What `chat` takes.
#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Images for the first question
    images: Vec<OsString>,

    #[command(flatten)]
    model: ModelArguments,

    #[command(flatten)]
    generation: GenerationArguments,
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<ExitCode> {
    let params = arguments.generation.params(None)?;
    let form = arguments.generation.form.spec()?;
    let engine = arguments.model.open_engine(context)?;
    let params = constrained(params, form.as_ref(), &engine)?;
    let mut chat = Chat::new(engine);
    chat.set_system(arguments.generation.system.clone());
    let mut terminal = Terminal { arguments, chat, params, pending: Vec::new(), last: None };
    for image in &arguments.images {
        terminal.add_image(image)?;
    }

    let mut editor = DefaultEditor::new()?;
    let interactive = io::stdin().is_terminal();
    let history = interactive.then(history_file).flatten();
    if let Some(file) = &history {
        // The first conversation has no history yet.
        let _ = editor.load_history(file);
    }
    if interactive {
        writeln!(
            io::stderr(),
            "{} answers; /help lists what else you can type",
            terminal.chat.engine().facts().name
        )?;
    }
    loop {
        match editor.readline(if interactive { "> " } else { "" }) {
            Ok(line) => {
                // History is a convenience: a line that it refuses is answered all the same.
                let _ = editor.add_history_entry(&line);
                match terminal.line(line.trim()) {
                    Ok(ControlFlow::Continue(())) => {}
                    Ok(ControlFlow::Break(())) => break,
                    Err(error) if interactive => {
                        writeln!(io::stderr(), "error: {}", super::sentence(&error))?;
                    }
                    Err(error) => return Err(error),
                }
            }
            Err(ReadlineError::Interrupted) => {}
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error.into()),
        }
    }
    if let Some(file) = history {
        let _ = editor.save_history(&file);
    }
    Ok(ExitCode::SUCCESS)
}

/// Where lines that were typed are kept for the next conversation.
fn history_file() -> Option<PathBuf> {
    let directory = directories::ProjectDirs::from("", "", "llava-phi")?.data_local_dir().to_owned();
    std::fs::create_dir_all(&directory).ok()?;
    Some(directory.join("chat_history"))
}

struct Terminal<'a> {
    arguments: &'a Arguments,
    chat: Chat,
    params: GenerateParams,
    pending: Vec<Attachment>,
    last: Option<(Completion, Outside)>,
}

impl Terminal<'_> {
    fn line(&mut self, line: &str) -> anyhow::Result<ControlFlow<()>> {
        let Some(command) = line.strip_prefix('/') else {
            if !line.is_empty() {
                self.ask(line)?;
            }
            return Ok(ControlFlow::Continue(()));
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        match name {
            "image" => self.add_image(&OsString::from(argument(name, rest)?))?,
            "system" => self.chat.set_system((!rest.is_empty()).then(|| rest.to_owned())),
            "reset" => {
                self.chat.reset();
                self.pending.clear();
                self.last = None;
            }
            "forget" if self.chat.drop_oldest() => self.last = None,
            "forget" => {
                return Err(Error::Request("nothing was said yet that could be forgotten".to_owned()).into());
            }
            "save" => saved::save(&self.chat, Path::new(argument(name, rest)?))?,
            "load" => {
                saved::load(&mut self.chat, Path::new(argument(name, rest)?))?;
                self.last = None;
            }
            "stats" => self.stats()?,
            "help" => writeln!(io::stdout(), "{HELP}")?,
            "quit" | "exit" => return Ok(ControlFlow::Break(())),
            _ => return Err(Error::Request(format!("/{name} is not a command; /help lists them")).into()),
        }
        Ok(ControlFlow::Continue(()))
    }

    fn add_image(&mut self, path: &OsString) -> Result<()> {
        let model = &self.arguments.model;
        let (name, bytes) = model.read_image(path)?;
        self.pending.push(Attachment::new(self.chat.engine(), name, bytes, model.fit())?);
        Ok(())
    }

    fn ask(&mut self, question: &str) -> anyhow::Result<()> {
        let begin = Instant::now();
        let parts =
            (0..self.pending.len()).map(Part::Image).chain([Part::Text(question.to_owned())]).collect();
        let images = self.pending.clone();
        let outside = Outside { load: Duration::ZERO, preprocess: begin.elapsed() };
        let cancel = CancelToken::new();
        let mut live = Live::new();
        let mut print = |event: &Event| live.show(event);
        let params = self.params.clone();
        let result =
            interrupt::cancels(&cancel, || self.chat.ask(parts, images, params, &cancel, &mut print));
        let completion = result.map_err(with_way_out)?;
        // Images stay for another try until a question with them was answered.
        self.pending.clear();
        writeln!(io::stdout())?;
        if completion.finish_reason == FinishReason::Cancelled {
            writeln!(io::stderr(), "stopped")?;
        }
        self.last = Some((completion, outside));
        Ok(())
    }

    fn stats(&self) -> anyhow::Result<()> {
        let facts = self.chat.engine().facts();
        let mut stdout = io::stdout();
        match &self.last {
            Some((completion, outside)) => {
                let usage = &completion.usage;
                writeln!(
                    stdout,
                    "context: {} of {} positions; {} of the last prompt's {} were not read again",
                    usage.prompt_tokens + usage.completion_tokens,
                    facts.context,
                    usage.cached_tokens,
                    usage.prompt_tokens
                )?;
                let PrefixReport { memory_limit, memory_used, decided_by, directory, refused } =
                    &completion.prefixes;
                write!(
                    stdout,
                    "kept of other prompts: {} of at most {} ({decided_by})",
                    size(*memory_used),
                    size(*memory_limit)
                )?;
                if let Some(directory) = directory {
                    write!(stdout, "; snapshots in {}", directory.display())?;
                }
                if let Some(refused) = refused {
                    write!(stdout, "; {refused}")?;
                }
                writeln!(stdout)?;
                figures::print(&mut stdout, completion, *outside, &self.chat.engine().reports())?;
            }
            None => writeln!(
                stdout,
                "context: {} positions; how many are taken is known after the next answer",
                facts.context
            )?,
        }
        Ok(())
    }
}

fn argument<'a>(name: &str, rest: &'a str) -> Result<&'a str> {
    if rest.is_empty() {
        return Err(Error::Request(format!("/{name} needs a value; /help shows which")));
    }
    Ok(rest)
}

/// In a conversation, a context that is full can be emptied.
fn with_way_out(error: Error) -> Error {
    match error {
        Error::TooLong { needed, capacity } => Error::Request(format!(
            "the conversation takes {needed} positions and the context holds {capacity}; \
             /forget drops the oldest question, /reset all of them"
        )),
        error => error,
    }
}
