//! What was measured to be fastest for a package on this machine, kept for later runs.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest as _, Sha256};

use super::ModelOptions;
use super::measure::Figures;
use super::selection::{Candidate, Preference};
use crate::error::{Error, Result};
use crate::machine::Machine;
use crate::package::{Component, ModelPackage};
use crate::runtime::Target;

/// The number of this form; decisions of another one are not used.
const FORMAT: u32 = 1;
/// The directory in the program's cache.
const DIRECTORY: &str = "tuned";
/// Decisions are a few kilobytes; what is larger is none.
const LARGEST: u64 = 1 << 20;
/// The most files of other decisions that are read to say why there is none for this key.
const MOST_OTHERS: usize = 64;

/// Everything that a measurement holds for. Where one part differs, another may be fastest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecisionKey {
    /// [`Machine::fingerprint`]: processor, accelerators, drivers.
    pub machine: String,
    /// The version of ONNX Runtime.
    pub runtime: String,
    /// [`ModelPackage::digest`].
    pub package: String,
    /// The version of this crate.
    pub engine: String,
}

/// The fastest candidate of each component.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    format: u32,
    /// What it holds for.
    pub key: DecisionKey,
    /// The day of the measurement, such as `2026-05-31`, in universal time.
    pub date: String,
    /// What is to be tried first, by the component's name.
    pub components: BTreeMap<String, Decided>,
}

/// The fastest candidate of one component.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decided {
    /// The variant.
    pub variant: String,
    /// The provider.
    #[serde(deserialize_with = "target")]
    pub provider: Target,
    /// Threads that it was measured with; the runtime's own choice otherwise.
    pub threads: Option<usize>,
    /// What was measured; `None` for the head, which is measured with its decoder.
    pub figures: Option<Figures>,
}

/// What is kept for a key.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    /// A decision for exactly this key.
    Decision(Decision),
    /// Nothing was ever decided for this package.
    Absent,
    /// There is one that must not be used, and why.
    Ignored(String),
}

impl DecisionKey {
    /// The key of `package` on `machine`, with ONNX Runtime of version `runtime`.
    pub fn new(machine: &Machine, runtime: &str, package: &ModelPackage) -> Self {
        Self {
            machine: machine.fingerprint(),
            runtime: runtime.to_owned(),
            package: package.digest().to_owned(),
            engine: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// SHA-256 over all parts, hexadecimal.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for part in [&self.machine, &self.runtime, &self.package, &self.engine] {
            hash.update(part.as_bytes());
            // So that no two lists of parts are one text.
            hash.update([0]);
        }
        hash.finalize().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    }

    /// Where the decision for this key is kept below the program's cache directory.
    pub fn path(&self, cache: &Path) -> PathBuf {
        directory(cache).join(self.digest()).with_extension("json")
    }

    /// What differs in `other`, for a sentence.
    fn differs(&self, other: &Self) -> String {
        let mut parts = Vec::new();
        if self.machine != other.machine {
            parts.push("on another machine, or with other drivers".to_owned());
        }
        if self.runtime != other.runtime {
            parts.push(format!("with ONNX Runtime {}", other.runtime));
        }
        if self.engine != other.engine {
            parts.push(format!("with llava-phi {}", other.engine));
        }
        if self.package != other.package {
            parts.push("for another package".to_owned());
        }
        parts.join(" and ")
    }
}

/// Where decisions are kept below the program's cache directory.
pub fn directory(cache: &Path) -> PathBuf {
    cache.join(DIRECTORY)
}

impl Decision {
    /// A decision of the day `date`.
    pub fn new(key: DecisionKey, date: String, components: BTreeMap<String, Decided>) -> Self {
        Self { format: FORMAT, key, date, components }
    }

    /// What was decided for `component`.
    pub fn decided(&self, component: Component) -> Option<&Decided> {
        self.components.get(component.name())
    }

    /// Looks below `cache` for what was decided for `key`. Nothing fails: what cannot be used is ignored, with the
    /// reason, and so is what was decided for this package under another key.
    pub fn find(cache: &Path, key: &DecisionKey, package: &ModelPackage) -> Found {
        let path = key.path(cache);
        let found = match fs::metadata(&path) {
            Ok(_) => match read(&path, key, package) {
                Ok(decision) => Found::Decision(decision),
                Err(why) => Found::Ignored(format!("{} is not used: {why}", path.display())),
            },
            Err(_) => stale(&directory(cache), key),
        };
        if let Found::Ignored(reason) = &found {
            tracing::warn!("{reason}");
        }
        found
    }

    /// Keeps this decision below `cache`, in place of an earlier one for its key, and gives the file.
    ///
    /// # Errors
    /// [`Error::Cache`] when the directory or the file cannot be written; an earlier decision is then untouched.
    pub fn write(&self, cache: &Path) -> Result<PathBuf> {
        let path = self.key.path(cache);
        let dir = directory(cache);
        let failed = |e: std::io::Error| {
            Error::cache(&dir, "the decision cannot be kept there; choose another place with --cache-dir")
                .because(e)
        };
        let text = serde_json::to_string_pretty(self).map_err(|e| failed(e.into()))?;
        fs::create_dir_all(&dir).map_err(failed)?;
        // Renamed when it is whole: a reader sees the old one or the new one.
        let mut file = tempfile::NamedTempFile::with_prefix_in(".new-", &dir).map_err(failed)?;
        writeln!(file, "{text}").map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|e| failed(e.error))?;
        Ok(path)
    }
}

/// Reads the decision at `path`, or says why it is of no use.
fn read(path: &Path, key: &DecisionKey, package: &ModelPackage) -> Result<Decision, String> {
    let decision = parse(path)?;
    if decision.key != *key {
        return Err(format!("it was decided {}", key.differs(&decision.key)));
    }
    for (name, decided) in &decision.components {
        let component = Component::ALL.into_iter().find(|component| component.name() == name);
        let known = component.is_some_and(|component| package.graph(component, &decided.variant).is_some());
        if !known {
            return Err(format!("the package has no {name} in {}", decided.variant));
        }
        if decided.threads == Some(0) {
            return Err(format!("it gives the {name} no thread"));
        }
    }
    Ok(decision)
}

fn parse(path: &Path) -> Result<Decision, String> {
    let unread = |e: std::io::Error| format!("it cannot be read ({e})");
    let meta = fs::metadata(path).map_err(unread)?;
    if !meta.is_file() || meta.len() > LARGEST {
        return Err("it is no decision".to_owned());
    }
    let bytes = fs::read(path).map_err(unread)?;
    let decision: Decision =
        serde_json::from_slice(&bytes).map_err(|e| format!("it is no decision ({e})"))?;
    if decision.format != FORMAT {
        return Err(format!("it has format {}, this version reads {FORMAT}", decision.format));
    }
    Ok(decision)
}

/// Why there is no decision for `key`, where there is one for the same package.
fn stale(dir: &Path, key: &DecisionKey) -> Found {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    let others = entries.filter(|path| path.extension().is_some_and(|end| end == "json")).take(MOST_OTHERS);
    let same = others.filter_map(|path| parse(&path).ok()).filter(|other| other.key.package == key.package);
    match same.max_by(|a, b| a.date.cmp(&b.date)) {
        None => Found::Absent,
        Some(other) => Found::Ignored(format!(
            "what was tuned on {} is not used: it was decided {}",
            other.date,
            key.differs(&other.key)
        )),
    }
}

fn target<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Target, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

/// What is to be tried first for `component`: nothing when a provider or a variant was asked for.
///
/// # Errors
/// As [`super::selection::VariantSelection::wanted`].
pub(super) fn of<'a>(
    options: &'a ModelOptions,
    component: Component,
    package: &ModelPackage,
) -> Result<Option<&'a Decided>> {
    let Some(decision) = &options.decision else { return Ok(None) };
    let asked = options.providers.preference(component) != Preference::default()
        || options.variants.wanted(component, package)?.is_some();
    Ok(decision.decided(component).filter(|_| !asked))
}

/// What was decided, where `candidate` is that.
pub(super) fn behind<'a>(
    options: &'a ModelOptions,
    component: Component,
    package: &ModelPackage,
    candidate: &Candidate,
) -> Option<&'a Decided> {
    let decided = of(options, component, package).ok()??;
    (decided.variant == candidate.variant && decided.provider == candidate.target).then_some(decided)
}

/// The day, in universal time, of so many seconds after the beginning of 1970: `2026-05-31`.
pub fn day(seconds: u64) -> String {
    // Years begin in March here, so that a leap day is the last one.
    let days = seconds / 86_400 + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Provider;

    fn package() -> ModelPackage {
        ModelPackage::embedded().unwrap()
    }

    fn key() -> DecisionKey {
        let part = |text: &str| text.to_owned();
        let package = package().digest().to_owned();
        DecisionKey { machine: part("a1"), runtime: part("1.32.0"), package, engine: part("0.1.0") }
    }

    fn decision(key: DecisionKey, variant: &str) -> Decision {
        let variant = variant.to_owned();
        let provider = Target { provider: Provider::Cpu, device: Some(0) };
        let decided = Decided { variant, provider, threads: Some(2), figures: None };
        Decision::new(key, "2026-05-31".to_owned(), BTreeMap::from([("decoder".to_owned(), decided)]))
    }

    fn ignored(found: Found) -> String {
        match found {
            Found::Ignored(reason) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_part_of_a_key_makes_another_file() {
        let mut names = vec![key().digest()];
        for change in [0, 1, 2, 3] {
            let mut key = key();
            let parts = [&mut key.machine, &mut key.runtime, &mut key.package, &mut key.engine];
            parts[change].push('0');
            names.push(key.digest());
        }
        let shifted = DecisionKey { machine: "a".to_owned(), runtime: "11.32.0".to_owned(), ..key() };
        names.push(shifted.digest());
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 6);
        assert!(names.iter().all(|name| name.len() == 64));
    }

    #[test]
    fn what_was_written_is_found_and_nothing_else_is_left() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Decision::find(dir.path(), &key(), &package()), Found::Absent);
        let first = decision(key(), "cpu-int4");
        first.write(dir.path()).unwrap();
        assert_eq!(Decision::find(dir.path(), &key(), &package()), Found::Decision(first));
        let second = decision(key(), "portable-f32");
        let path = second.write(dir.path()).unwrap();
        assert_eq!(path, key().path(dir.path()));
        assert_eq!(Decision::find(dir.path(), &key(), &package()), Found::Decision(second));
        assert_eq!(fs::read_dir(directory(dir.path())).unwrap().count(), 1);
    }

    #[test]
    fn what_was_decided_for_another_key_is_ignored_with_what_differs() {
        let dir = tempfile::tempdir().unwrap();
        let old = DecisionKey { machine: "b2".to_owned(), runtime: "1.31.0".to_owned(), ..key() };
        decision(old.clone(), "cpu-int4").write(dir.path()).unwrap();
        assert_eq!(
            ignored(Decision::find(dir.path(), &key(), &package())),
            "what was tuned on 2026-05-31 is not used: it was decided on another machine, or with other drivers \
             and with ONNX Runtime 1.31.0"
        );
        fs::rename(old.path(dir.path()), key().path(dir.path())).unwrap();
        let reason = ignored(Decision::find(dir.path(), &key(), &package()));
        assert!(reason.contains("is not used: it was decided on another machine"), "{reason}");
        let other = DecisionKey { package: "c".to_owned(), ..key() };
        assert_eq!(Decision::find(dir.path(), &other, &package()), Found::Absent);
    }

    #[test]
    fn what_is_damaged_is_ignored_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = decision(key(), "cpu-int4").write(dir.path()).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let cases = [
            (text[..text.len() / 2].to_owned(), "it is no decision (EOF"),
            (String::new(), "it is no decision"),
            (text.replace("\"format\": 1", "\"format\": 2"), "it has format 2, this version reads 1"),
            (text.replace("cpu:0", "gpu"), "there is no provider \"gpu\""),
            (text.replace("cpu-int4", "gone"), "the package has no decoder in gone"),
            (text.replace("\"decoder\"", "\"eye\""), "the package has no eye in cpu-int4"),
            (text.replace("\"threads\": 2", "\"threads\": 0"), "it gives the decoder no thread"),
            (text.replace("\"date\"", "\"day\""), "unknown field"),
        ];
        for (content, expected) in cases {
            fs::write(&path, content).unwrap();
            let reason = ignored(Decision::find(dir.path(), &key(), &package()));
            assert!(reason.contains(expected), "{expected:?} is not in {reason:?}");
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(ignored(Decision::find(dir.path(), &key(), &package())).contains("it is no decision"));
    }

    #[test]
    fn a_place_that_cannot_be_written_is_an_error_with_the_next_step() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = decision(key(), "cpu-int4").write(file.path()).unwrap_err();
        assert!(matches!(error, Error::Cache { .. }));
        assert!(error.to_string().ends_with("choose another place with --cache-dir"), "{error}");
    }

    #[test]
    fn a_decision_is_for_components_for_which_nothing_is_asked() {
        let with = |providers: &str, variants: Option<&str>| {
            let options = ModelOptions {
                providers: providers.parse().unwrap(),
                variants: variants.map(|text| text.parse().unwrap()).unwrap_or_default(),
                decision: Some(decision(key(), "portable-f32").into()),
                ..ModelOptions::default()
            };
            let found = of(&options, Component::Decoder, &package()).unwrap().cloned();
            found.map(|decided| decided.variant)
        };
        let tuned = Some("portable-f32".to_owned());
        assert_eq!(with("auto", None), tuned);
        assert_eq!(with("vision=cpu", None), tuned);
        assert_eq!(with("auto", Some("vision=cpu-int4")), tuned);
        assert_eq!(with("cpu", None), None);
        assert_eq!(with("decoder=cuda", None), None);
        assert_eq!(with("auto", Some("cpu-int4")), None);
    }

    #[test]
    fn a_day_has_its_date() {
        let dates = [(0, "1970-01-01"), (951_782_400, "2000-02-29"), (951_868_800, "2000-03-01")];
        for (seconds, date) in dates {
            assert_eq!(day(seconds), date);
        }
        assert_eq!(day(1_798_761_599), "2026-12-31");
        assert_eq!(day(1_798_761_600), "2027-01-01");
    }
}
