//! A process of its own for one candidate, which may crash, hang or leak without harm.

use std::io::{self, Read, Write as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::engine::cancel::CancelToken;
use crate::error::{Error, Result};
use crate::model::measure::Outcome;

/// Between two looks at a process.
const MOMENT: Duration = Duration::from_millis(10);
/// How long a signal to all of a group may take to arrive here too.
const SIGNAL: Duration = Duration::from_millis(100);
/// The most bytes of standard error that are kept.
const KEPT: usize = 4096;
/// The step at which a process that ended is refused.
const PROCESS: &str = "process";

/// Runs `command`, whose last line on standard output is an [`Outcome`]. One that ends without it, or takes longer than
/// `limit`, is refused.
///
/// # Errors
/// [`Error::Cancelled`] when `token` was cancelled meanwhile; the process is then gone.
pub(super) fn outcome(command: &mut Command, limit: Duration, token: &CancelToken) -> Result<Outcome> {
    // Its standard input ends when this process does, however that ends.
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return Ok(refused(format!("no process could be started for it ({e})"))),
    };
    let mut running = Running(child);
    let out = collect(running.0.stdout.take());
    let err = collect(running.0.stderr.take());
    let begin = Instant::now();
    let status = loop {
        match running.0.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if token.is_cancelled() => return Err(Error::Cancelled),
            Ok(None) if begin.elapsed() >= limit => {
                return Ok(refused(format!(
                    "it took longer than {} s and was ended; --timeout allows it more",
                    limit.as_secs()
                )));
            }
            Ok(None) => thread::sleep(MOMENT),
            Err(e) => return Ok(refused(format!("its process cannot be watched ({e})"))),
        }
    };
    if !status.success() {
        // Ctrl-C reaches both processes, in any order.
        thread::sleep(SIGNAL);
        if token.is_cancelled() {
            return Err(Error::Cancelled);
        }
    }
    let (out, err) = (text(out), text(err));
    tracing::debug!(%status, "what the measuring process said: {err}");
    let told = out.lines().next_back().and_then(|line| serde_json::from_str(line).ok());
    Ok(match told {
        Some(outcome) if status.success() => outcome,
        _ => refused(ended(status, &err)),
    })
}

/// Ends this process when the one that started it no longer holds its standard input.
pub(super) fn end_with_parent() {
    thread::spawn(|| {
        // What is sent is of no interest, only that it ends.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        #[allow(clippy::exit)] // The thread that measures cannot be stopped from here in another way.
        std::process::exit(i32::from(super::super::INTERRUPTED));
    });
}

/// Writes the outcome as the last line.
pub(super) fn tell(outcome: &Outcome) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    // What a provider's library wrote may not have ended its line.
    write!(out, "\n{}\n", serde_json::to_string(outcome)?)?;
    Ok(out.flush()?)
}

/// A process that does not outlive this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended already needs no killing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn refused(reason: String) -> Outcome {
    Outcome::Refused { step: PROCESS.to_owned(), reason }
}

/// Reads a pipe so that its writer never waits; keeps the end.
fn collect(pipe: Option<impl Read + Send + 'static>) -> Option<JoinHandle<Vec<u8>>> {
    let mut pipe = pipe?;
    Some(thread::spawn(move || {
        let (mut kept, mut piece) = (Vec::new(), [0; KEPT]);
        while let Ok(count @ 1..) = pipe.read(&mut piece) {
            kept.extend_from_slice(&piece[..count]);
            // An outcome is shorter than this.
            kept.drain(..kept.len().saturating_sub(16 * KEPT));
        }
        kept
    }))
}

fn text(pipe: Option<JoinHandle<Vec<u8>>>) -> String {
    let bytes = pipe.and_then(|pipe| pipe.join().ok()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// How a process ended, and the last that it said.
fn ended(status: ExitStatus, err: &str) -> String {
    let last = err.lines().map(str::trim).rfind(|line| !line.is_empty());
    let said = last.map_or_else(String::new, |line| {
        let line = line.strip_prefix("error: ").unwrap_or(line);
        format!(" ({})", line.chars().take(400).collect::<String>())
    });
    let how = match (signal(status), status.code()) {
        (Some(9), _) => "signal 9, which the system sends when memory runs out".to_owned(),
        (Some(signal), _) => format!("signal {signal}"),
        (None, Some(0)) => "no result".to_owned(),
        (None, Some(code)) => format!("exit code {code}"),
        (None, None) => "no exit code".to_owned(),
    };
    format!("the process ended with {how}{said}")
}

#[cfg(unix)]
fn signal(status: ExitStatus) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt as _;
    status.signal()
}

#[cfg(not(unix))]
fn signal(_status: ExitStatus) -> Option<i32> {
    None
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn script(text: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        command
    }

    fn reason(text: &str, limit: Duration) -> String {
        match outcome(&mut script(text), limit, &CancelToken::new()) {
            Ok(Outcome::Refused { step, reason }) => {
                assert_eq!(step, "process");
                reason
            }
            other => panic!("{other:?}"),
        }
    }

    const LONG: Duration = Duration::from_mins(1);

    #[test]
    fn a_process_that_crashes_is_refused_with_how_it_ended() {
        let crash = "echo first >&2; echo 'terminate called' >&2; kill -11 $$";
        assert_eq!(reason(crash, LONG), "the process ended with signal 11 (terminate called)");
        assert!(reason("kill -9 $$", LONG).contains("signal 9, which the system sends"));
        let fails = "echo 'error: package x: no file' >&2; exit 3";
        assert_eq!(reason(fails, LONG), "the process ended with exit code 3 (package x: no file)");
        assert_eq!(reason("echo nonsense", LONG), "the process ended with no result");
    }

    #[test]
    fn the_last_line_is_the_outcome_and_what_a_library_prints_before_is_not() {
        let line = r#"{"status":"refused","step":"commit","reason":"no device"}"#;
        let text = format!("echo noise; yes | head -c 100000 >&2; echo '{line}'");
        let told = outcome(&mut script(&text), LONG, &CancelToken::new()).unwrap();
        let expected = Outcome::Refused { step: "commit".to_owned(), reason: "no device".to_owned() };
        assert_eq!(told, expected);
        // Whoever crashes after it was done cannot be trusted to serve.
        assert!(reason(&format!("echo '{line}'; kill -6 $$"), LONG).ends_with("signal 6"));
    }

    #[test]
    fn a_process_that_hangs_is_ended_and_refused() {
        let begin = Instant::now();
        let reason = reason("exec sleep 60", Duration::from_millis(50));
        assert!(reason.contains("it took longer than 0 s and was ended"), "{reason}");
        assert!(begin.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn a_cancelled_measurement_ends_its_process() {
        let token = CancelToken::new();
        let canceller = token.clone();
        let waiting = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            canceller.cancel();
        });
        let begin = Instant::now();
        let result = outcome(&mut script("exec sleep 60"), LONG, &token);
        assert!(matches!(result, Err(Error::Cancelled)));
        assert!(begin.elapsed() < Duration::from_secs(30));
        waiting.join().unwrap();
    }

    #[test]
    fn what_cannot_be_started_is_refused() {
        let told = outcome(&mut Command::new("/nowhere/at/all"), LONG, &CancelToken::new()).unwrap();
        assert!(
            matches!(told, Outcome::Refused { reason, .. } if reason.starts_with("no process could be started"))
        );
    }
}
