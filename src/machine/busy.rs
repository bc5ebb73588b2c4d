//! How much of the processors others took while something was measured, as the kernel counts it.

use serde::Serialize;

use super::{Roots, text};

/// Who had the processors during a measurement, in shares of all the time that they have: 1 is all of them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Busy {
    /// What this process took.
    pub own: f64,
    /// What other processes and the system took.
    pub others: f64,
    /// What the host of a virtual machine kept to itself.
    pub stolen: f64,
}

/// The kernel's counts at one moment, in its ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusyWatch {
    own: u64,
    busy: u64,
    stolen: u64,
    all: u64,
}

impl BusyWatch {
    /// Starts to watch; `None` where there is no `/proc/stat` and `/proc/self/stat`.
    pub fn start(roots: &Roots) -> Option<Self> {
        let system = text(&roots.proc.join("stat"))?;
        let line = system.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let ticks: Vec<u64> = line.split_whitespace().map_while(|count| count.parse().ok()).collect();
        // user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user and nice already.
        let [user, nice, kernel, idle, waiting, interrupt, soft, stolen, ..] = ticks[..] else { return None };
        let busy = user + nice + kernel + interrupt + soft;
        Some(Self { own: own(roots)?, busy, stolen, all: busy + idle + waiting + stolen })
    }

    /// What happened since the start; `None` where the kernel no longer says, or nothing was counted yet.
    pub fn stop(self, roots: &Roots) -> Option<Busy> {
        let end = Self::start(roots)?;
        let all = end.all.checked_sub(self.all).filter(|all| *all > 0)?;
        let own = end.own.saturating_sub(self.own);
        let share = |ticks: u64| ticks_as_number(ticks) / ticks_as_number(all);
        Some(Busy {
            own: share(own),
            others: share(end.busy.saturating_sub(self.busy).saturating_sub(own)),
            stolen: share(end.stolen.saturating_sub(self.stolen)),
        })
    }
}

/// Ticks that this process took, in user mode and in the kernel.
fn own(roots: &Roots) -> Option<u64> {
    let stat = text(&roots.proc.join("self/stat"))?;
    // The program's name stands in brackets and may hold spaces and brackets itself.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

/// Exact up to 2^53 ticks, which are millions of years.
#[expect(clippy::cast_precision_loss, reason = "ticks of a measurement fit into an f64")]
fn ticks_as_number(ticks: u64) -> f64 {
    ticks as f64
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn write(roots: &Roots, system: &str, own: &str) {
        fs::create_dir_all(roots.proc.join("self")).unwrap();
        fs::write(roots.proc.join("stat"), format!("{system}\ncpu0 1 2 3 4\n")).unwrap();
        let stat = format!("77 (a (name) of) R 1 2 3 4 5 6 7 8 9 10 {own} 13 14\n");
        fs::write(roots.proc.join("self/stat"), stat).unwrap();
    }

    #[test]
    fn what_others_took_is_the_rest_of_what_was_busy() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::below(dir.path());
        assert_eq!(BusyWatch::start(&roots), None);
        write(&roots, "cpu  100 10 20 1000 5 1 2 3 0 0", "40 2");
        let watch = BusyWatch::start(&roots).unwrap();
        assert_eq!(watch.stop(&roots), None);
        write(&roots, "cpu  150 10 30 1030 10 1 2 8 0 0", "80 12");
        // 100 ticks in all: 60 busy, 50 of them own, 5 stolen.
        assert_eq!(watch.stop(&roots), Some(Busy { own: 0.5, others: 0.1, stolen: 0.05 }));
    }

    #[test]
    fn a_kernel_that_says_less_has_no_figures() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots::below(dir.path());
        write(&roots, "cpu  1 2 3", "40 2");
        assert_eq!(BusyWatch::start(&roots), None);
        write(&roots, "cpu  1 2 3 4 5 6 7 8", "x y");
        assert_eq!(BusyWatch::start(&roots), None);
    }
}
