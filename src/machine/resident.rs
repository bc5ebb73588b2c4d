//! How much memory this process holds at its peak, as the kernel counts it.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::memory::kilobytes;
use super::{Roots, text};

/// Peaks of the memory that a process holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resident {
    /// All of it; the kernel keeps this peak itself.
    pub peak: u64,
    /// What only this process has and swap alone could hold: the highest that was seen.
    pub anonymous: u64,
    /// Pages of mapped files, which the kernel can read again: the highest that was seen.
    pub file_backed: u64,
}

/// Looks at the memory of this process from time to time, on a thread of its own.
#[derive(Debug)]
pub struct ResidentWatch {
    stop: mpsc::Sender<()>,
    watcher: JoinHandle<Resident>,
}

/// Between two looks. A look takes some ten microseconds.
const INTERVAL: Duration = Duration::from_millis(10);

impl Resident {
    /// What the kernel says now, with the peak of the whole so far; `None` where there is no `/proc/self/status` that tells the kinds apart.
    pub fn now(roots: &Roots) -> Option<Self> {
        let status = text(&roots.proc.join("self/status"))?;
        Some(Self {
            peak: kilobytes(&status, "VmHWM")?,
            anonymous: kilobytes(&status, "RssAnon")?,
            file_backed: kilobytes(&status, "RssFile")?,
        })
    }

    /// The higher of each kind.
    #[must_use]
    pub fn or_higher(self, other: Self) -> Self {
        Self {
            peak: self.peak.max(other.peak),
            anonymous: self.anonymous.max(other.anonymous),
            file_backed: self.file_backed.max(other.file_backed),
        }
    }
}

impl ResidentWatch {
    /// Starts to watch; `None` where the kernel does not say, or no thread can be had.
    pub fn start(roots: &Roots) -> Option<Self> {
        let mut highest = Resident::now(roots)?;
        let roots = roots.clone();
        let (stop, stopped) = mpsc::channel::<()>();
        let watch = move || {
            loop {
                let end = stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout);
                highest = Resident::now(&roots).map_or(highest, |now| highest.or_higher(now));
                if end {
                    return highest;
                }
            }
        };
        let watcher = thread::Builder::new().name("memory-watch".to_owned()).spawn(watch).ok()?;
        Some(Self { stop, watcher })
    }

    /// Stops, and gives the highest that was seen.
    pub fn stop(self) -> Option<Resident> {
        drop(self.stop);
        self.watcher.join().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_that_of_every_kind_by_itself() {
        let one = Resident { peak: 9, anonymous: 5, file_backed: 4 };
        let other = Resident { peak: 10, anonymous: 3, file_backed: 7 };
        assert_eq!(one.or_higher(other), Resident { peak: 10, anonymous: 5, file_backed: 7 });
    }

    #[test]
    fn a_system_without_the_file_has_no_figures() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ResidentWatch::start(&Roots::below(dir.path())).is_none());
        std::fs::create_dir_all(dir.path().join("proc/self")).unwrap();
        std::fs::write(
            dir.path().join("proc/self/status"),
            "VmHWM:\t  30 kB\nRssAnon:\t 20 kB\nRssFile: 10 kB\n",
        )
        .unwrap();
        let seen = ResidentWatch::start(&Roots::below(dir.path())).unwrap().stop();
        assert_eq!(seen, Some(Resident { peak: 30 << 10, anonymous: 20 << 10, file_backed: 10 << 10 }));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_that_was_freed_again_is_in_the_peak() {
        let watch = ResidentWatch::start(&Roots::default()).unwrap();
        let taken = vec![1_u8; 64 << 20];
        thread::sleep(INTERVAL * 5);
        drop(std::hint::black_box(taken));
        let seen = watch.stop().unwrap();
        assert!(seen.anonymous > 64 << 20 && seen.peak >= seen.anonymous, "{seen:?}");
    }
}
