//! `llava-phi tune`: measures what could serve each component here, and keeps what is fastest.

mod child;
mod pick;
mod table;

use std::{
    collections::BTreeSet,
    env,
    io::{self, Write as _},
    num::{NonZeroU64, NonZeroUsize},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

use super::context::Context;
use super::interrupt;
use super::model::{open_package, parse_threads};
use super::session::SessionArguments;
use crate::engine::cancel::CancelToken;
use crate::error::{Error, Result};
use crate::machine::{Machine, Memory, Processor, Roots};
use crate::model::ModelOptions;
use crate::model::decision::{Decision, DecisionKey, Found, day};
use crate::model::measure::{Outcome, Workload, measure};
use crate::model::memory_host;
use crate::model::selection::{Candidate, Candidates, ProviderSelection, VariantSelection};
use crate::package::plan::{Host, MemoryPlan, Part};
use crate::package::{Component, ModelPackage};
use crate::runtime::{Provider, Target};
use pick::Row;
use table::COMPONENTS;

/// Between two drawings of the bar.
const TICK: Duration = Duration::from_millis(200);

const RULE: &str = "\
Every candidate is measured in a process of its own: one that crashes, hangs or does not agree with the package's \
goldens is refused, with the reason. Of those that passed, the fastest serves from now on wherever no --provider and \
no --variant is given: for the vision encoder and the projector by one image, for the decoder by a prompt of 640 \
positions (or what the smallest cache holds) and 64 decode steps. What takes up to 5 % longer counts as equal; of \
equals the package's first choice is taken. Together they must fit into memory.

The choice holds for this machine with its drivers, this ONNX Runtime, this package and this version; when one of them \
changes, it is ignored and said so. --no-tuned ignores it at any time.";

/// What `tune` takes.
#[derive(Debug, clap::Args)]
#[command(after_long_help = RULE)]
pub(super) struct Arguments {
    /// The package's directory; the miniature model inside this program otherwise
    #[arg(long, value_name = "DIR", env = "LLAVA_PHI_MODEL")]
    model: Option<PathBuf>,

    /// Measure these providers and no others, for all components or for each: cuda,cpu or vision=coreml,decoder=cpu
    #[arg(long, value_name = "LIST")]
    provider: Option<ProviderSelection>,

    /// Measure this variant and no other, for all components or for each: vision=cpu-int8,decoder=cpu-int4
    #[arg(long, value_name = "LIST")]
    variant: Option<VariantSelection>,

    #[command(flatten)]
    session: SessionArguments,

    /// Threads to measure providers with that run on the processor; one, half and all of its cores otherwise
    #[arg(long, value_name = "N", num_args = 1.., value_delimiter = ',', value_parser = parse_threads)]
    threads: Vec<NonZeroUsize>,

    /// Tokens to decode behind the prompt
    #[arg(long, value_name = "N", default_value = "32")]
    decoder_steps: NonZeroUsize,

    /// End a candidate that takes longer
    #[arg(long, value_name = "SECONDS", default_value = "600")]
    timeout: NonZeroU64,

    /// Measure again what was decided before
    #[arg(long)]
    force: bool,

    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,

    /// Measure this one and print the outcome: how this program calls itself
    #[arg(long, value_name = "JSON", hide = true, value_parser = parse_one)]
    candidate: Option<One>,
}

/// One candidate, as this program names it to itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct One {
    component: String,
    variant: String,
    provider: String,
    threads: Option<usize>,
}

/// What is printed for a program.
#[derive(Debug, Serialize)]
struct Report<'a> {
    /// The decision, made now or before.
    decision: Option<&'a Decision>,
    /// Where it is kept; `None` when that failed.
    stored: Option<&'a Path>,
    /// What was measured now.
    candidates: &'a [Row],
}

fn parse_one(text: &str) -> Result<One, String> {
    serde_json::from_str(text).map_err(|e| e.to_string())
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> anyhow::Result<ExitCode> {
    if let Some(one) = &arguments.candidate {
        child::end_with_parent();
        let package = open_package(arguments.model.as_deref())?;
        context.start_runtime()?;
        child::tell(&arguments.measure(context, &package, one)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let package = open_package(arguments.model.as_deref())?;
    let work = Workload::new(&package, arguments.decoder_steps.get())?;
    let limit = arguments.session.options(context)?.memory_limit;
    let cache = context.cache_dir().ok_or_else(|| {
        Error::cache("", "this system names no place for one; name a directory with --cache-dir")
    })?;
    let version = context.start_runtime()?.version();
    let machine = Machine::probe(&Roots::default());
    let key = DecisionKey::new(&machine, version, &package);
    if !arguments.force
        && let Found::Decision(decision) = Decision::find(&cache, &key, &package)
    {
        return before(arguments, &decision, &key.path(&cache));
    }

    let token = CancelToken::new();
    let rows = interrupt::cancels(&token, || arguments.rows(&package, &machine.processor, &token))?;
    tracing::info!(?work, candidates = rows.len(), "measured");
    let picked = pick::pick(&rows, &COMPONENTS, |picks| shortfall(limit, &package, picks));
    let picks = picked.as_deref().unwrap_or_default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let decided = pick::decided(picks)?;
    let decision = Decision::new(key, day(now.as_secs()), decided);
    let stored = match &picked {
        Ok(_) => Some(decision.write(&cache)),
        Err(_) => None,
    };
    let path = stored.as_ref().and_then(|stored| stored.as_deref().ok());
    let mut out = io::stdout().lock();
    if arguments.json {
        let decision = picked.is_ok().then_some(&decision);
        let report = Report { decision, stored: path, candidates: &rows };
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        table::measured(&mut out, &rows, picks)?;
        if let Some(path) = path {
            writeln!(out, "kept in {}", path.display())?;
        }
    }
    out.flush()?;
    // What was measured has been seen, whatever became of it.
    picked?;
    if let Some(Err(error)) = stored {
        return Err(error.into());
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows what was decided before.
fn before(arguments: &Arguments, decision: &Decision, path: &Path) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout().lock();
    if arguments.json {
        let report = Report { decision: Some(decision), stored: Some(path), candidates: &[] };
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        table::decided(&mut out, decision)?;
        writeln!(out, "decided on {} and kept in {}; --force measures again", decision.date, path.display())?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Arguments {
    /// How a candidate on `provider` is loaded. Plugins of others are left alone: one that is broken is not its fault.
    fn options(&self, context: &Context, provider: Provider, threads: Option<usize>) -> Result<ModelOptions> {
        let mut options = self.session.options(context)?;
        options.plugins.retain(|(other, _)| *other == provider);
        Ok(ModelOptions { threads, ..options })
    }

    fn measure(&self, context: &Context, package: &ModelPackage, one: &One) -> Result<Outcome> {
        let component = COMPONENTS
            .into_iter()
            .find(|component| component.name() == one.component)
            .ok_or_else(|| Error::Request(format!("{:?} is not measured", one.component)))?;
        let target: Target = one.provider.parse()?;
        let candidate = Candidate { variant: one.variant.clone(), target };
        let work = Workload::new(package, self.decoder_steps.get())?;
        measure(package, &self.options(context, target.provider, one.threads)?, component, candidate, work)
    }

    /// What there is to measure of `component`.
    fn candidates(&self, package: &ModelPackage, component: Component) -> Result<Candidates> {
        let mut preference =
            self.provider.as_ref().map(|list| list.preference(component)).unwrap_or_default();
        // To measure what was not named would be a waste, whatever may serve in the end.
        preference.only = !preference.targets.is_empty();
        let variants = self.variant.clone().unwrap_or_default();
        Candidates::new(package, component, &variants, &preference)
    }

    /// Measures every candidate with every number of threads. Once a candidate is refused it is not tried again.
    fn rows(
        &self,
        package: &ModelPackage,
        processor: &Processor,
        token: &CancelToken,
    ) -> anyhow::Result<Vec<Row>> {
        let program = env::current_exe().context("this program cannot find itself")?;
        let mut plan = Vec::new();
        let mut rows = Vec::new();
        for component in COMPONENTS {
            let Candidates { waiting, refused } = self.candidates(package, component)?;
            rows.extend(refused.into_iter().map(|refusal| Row {
                component,
                variant: refusal.variant,
                provider: refusal.provider,
                threads: None,
                outcome: Outcome::Refused { step: refusal.step.to_string(), reason: refusal.reason },
            }));
            plan.extend(waiting.into_iter().map(|candidate| {
                let threads = self.threads_for(candidate.target, processor);
                (component, candidate, threads)
            }));
        }
        let bar = ProgressBar::new(plan.iter().map(|(_, _, threads)| threads.len() as u64).sum()).with_style(
            ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {elapsed}")
                .context("the bar's template is wrong")?,
        );
        // One candidate may take minutes; a bar that stands still looks like a fault.
        bar.enable_steady_tick(TICK);
        for (component, Candidate { variant, target }, threads) in plan {
            let mut left = threads.len() as u64;
            for threads in threads {
                let count = threads.map_or_else(String::new, |count| format!(", threads {count}"));
                bar.set_message(format!("{} {variant} on {target}{count}", component.name()));
                let one = One {
                    component: component.name().to_owned(),
                    variant: variant.clone(),
                    provider: target.to_string(),
                    threads,
                };
                let mut command = Command::new(&program);
                command.args(again(&serde_json::to_string(&one)?));
                let outcome = child::outcome(&mut command, Duration::from_secs(self.timeout.get()), token);
                let outcome = outcome.inspect_err(|_| bar.finish_and_clear())?;
                left -= 1;
                bar.inc(1);
                let refused = matches!(outcome, Outcome::Refused { .. });
                rows.push(Row { component, variant: variant.clone(), provider: target, threads, outcome });
                if refused {
                    bar.inc(left);
                    break;
                }
            }
        }
        bar.finish_and_clear();
        Ok(rows)
    }

    /// The numbers of threads to measure with, most first: where those do not serve, fewer hardly will.
    fn threads_for(&self, target: Target, processor: &Processor) -> Vec<Option<usize>> {
        if memory_host(target.provider, false) != Host::Processor {
            return vec![None];
        }
        let given: BTreeSet<usize> = match self.threads[..] {
            [] => {
                let cores = processor.physical_cores.unwrap_or(processor.logical_cores);
                let all = cores.min(processor.usable).max(1);
                [1, all.div_ceil(2), all].into()
            }
            _ => self.threads.iter().map(|threads| threads.get()).collect(),
        };
        given.into_iter().rev().map(Some).collect()
    }
}

/// Why `picks` do not fit into memory together, if they do not.
fn shortfall(limit: Option<u64>, package: &ModelPackage, picks: &[&Row]) -> Result<Option<String>> {
    let decided = pick::decided(picks)?;
    let head = decided.get(Component::Head.name()).map(|head| Part {
        component: Component::Head,
        variant: &head.variant,
        host: memory_host(head.provider.provider, false),
    });
    let parts = picks.iter().map(|row| Part {
        component: row.component,
        variant: &row.variant,
        host: memory_host(row.provider.provider, false),
    });
    let plan = MemoryPlan::of(package, &parts.chain(head).collect::<Vec<_>>())?;
    let memory = Memory::probe(&Roots::default());
    let (budget, source) = match limit {
        Some(limit) if limit < memory.budget() => (limit, "the limit that was given".to_owned()),
        _ => (memory.budget(), memory.explain()),
    };
    Ok(plan.fits(budget, &source).err().map(|shortfall| shortfall.to_string()))
}

/// The arguments of this process, for one that measures `one`.
fn again(one: &str) -> Vec<std::ffi::OsString> {
    let mut words: Vec<std::ffi::OsString> = env::args_os().skip(1).collect();
    // Behind `--` it would no longer be an option.
    let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
    words.splice(end..end, ["--candidate".into(), one.into()]);
    words
}
