//! Which variants and providers may serve each component, and in which order.

use std::{collections::BTreeMap, str::FromStr};

use crate::error::{Error, Result};
use crate::package::{Component, MANIFEST, ModelPackage};
use crate::runtime::{Provider, Refusal, Step, Target};

/// The order of providers that a user asked for, for each component.
///
/// Its text is a list such as `cuda`, `tensorrt,cuda:1`, `vision=coreml,decoder=cpu` or `only:cuda`. Without `only:`
/// what the package itself prefers follows the list; with it nothing does. `auto` stands for that order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProviderSelection {
    preferences: BTreeMap<Component, Preference>,
}

/// The order of providers for one component.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preference {
    /// Those that were asked for, best first.
    pub targets: Vec<Target>,
    /// Whether no other may serve.
    pub only: bool,
}

/// The variants that a user asked for: one for every component that it has, or one for each component.
///
/// Its text is a name such as `portable-f32`, or a list such as `vision=cpu-int8,decoder=cpu-int4`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VariantSelection {
    general: Option<String>,
    each: BTreeMap<Component, String>,
}

/// One variant on one provider, as something to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The variant.
    pub variant: String,
    /// The provider.
    pub target: Target,
}

/// What may serve a component, and what was asked for and cannot be tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidates {
    /// What may serve, best first.
    pub waiting: Vec<Candidate>,
    /// What was asked for and the package has nothing for.
    pub refused: Vec<Refusal>,
}

/// The word that stands for the package's own order.
const AUTO: &str = "auto";

/// Before a provider that no other may replace.
const ONLY: &str = "only:";

impl ProviderSelection {
    /// The order for `component`. What is asked for all components is not asked for the head: few providers could run
    /// it well, and where there is one it is made for the processor.
    pub fn preference(&self, component: Component) -> Preference {
        self.preferences.get(&component).cloned().unwrap_or_default()
    }
}

impl FromStr for ProviderSelection {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut general = Preference::default();
        let mut preferences: BTreeMap<Component, Preference> = BTreeMap::new();
        for item in items(text)? {
            let (target, only) = match item.value.strip_prefix(ONLY) {
                Some(target) => (target, true),
                None => (item.value, false),
            };
            if target == AUTO && only {
                return Err(Error::Request(format!(
                    "{ONLY}{AUTO} names no provider; write {ONLY}cpu or the like"
                )));
            }
            let target = (target != AUTO).then(|| target.parse::<Target>()).transpose()?;
            let add = |list: &mut Preference| {
                list.targets.extend(target);
                list.only |= only;
            };
            match item.components {
                None => add(&mut general),
                Some(components) => {
                    for component in components {
                        add(preferences.entry(*component).or_default());
                    }
                }
            }
        }
        for component in Component::ALL {
            if component != Component::Head {
                preferences.entry(component).or_insert_with(|| general.clone());
            }
        }
        Ok(Self { preferences })
    }
}

impl VariantSelection {
    /// Every component from `variant`, as far as it has them.
    pub fn of(variant: &str) -> Self {
        Self { general: Some(variant.to_owned()), each: BTreeMap::new() }
    }

    /// The variant that is asked for `component`.
    ///
    /// # Errors
    /// [`Error::Request`] when the package has no such variant, or one that was asked for this component lacks it.
    pub fn wanted(&self, component: Component, package: &ModelPackage) -> Result<Option<&str>> {
        let variants = &package.manifest().variants;
        let known = |name: &str| {
            variants.get(name).ok_or_else(|| {
                let names: Vec<&str> = variants.keys().map(String::as_str).collect();
                Error::Request(format!(
                    "package {} has no variant {name:?}; it has {}",
                    package.manifest().name,
                    names.join(", ")
                ))
            })
        };
        if let Some(name) = self.each.get(&component) {
            known(name)?;
            if package.graph(component, name).is_none() {
                return Err(Error::Request(format!("variant {name} has no {}", component.name())));
            }
            return Ok(Some(name));
        }
        let Some(name) = &self.general else { return Ok(None) };
        known(name)?;
        Ok(package.graph(component, name).is_some().then_some(name.as_str()))
    }
}

impl FromStr for VariantSelection {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut selection = Self::default();
        for item in items(text)? {
            let twice = match item.components {
                None => selection.general.replace(item.value.to_owned()).is_some(),
                Some(components) => {
                    let before = selection.each.len();
                    let named = components.iter().map(|component| (*component, item.value.to_owned()));
                    selection.each.extend(named);
                    selection.each.len() < before + components.len()
                }
            };
            if twice {
                return Err(Error::Request(format!(
                    "{text:?} names two variants for one component; name one"
                )));
            }
        }
        Ok(selection)
    }
}

/// One item of a list: what it says, and for which components when it names some.
struct Item<'a> {
    components: Option<&'static [Component]>,
    value: &'a str,
}

fn items(text: &str) -> Result<Vec<Item<'_>>> {
    text.split(',')
        .map(|item| {
            let item = item.trim();
            let (components, value) = match item.split_once('=') {
                Some((name, value)) => (Some(components_called(name.trim())?), value.trim()),
                None => (None, item),
            };
            if value.is_empty() {
                return Err(Error::Request(format!(
                    "{text:?} has an empty item; remove it or name something"
                )));
            }
            Ok(Item { components, value })
        })
        .collect()
}

/// `vision` is the encoder with its projector: they are seldom served apart.
fn components_called(name: &str) -> Result<&'static [Component]> {
    Ok(match name {
        "vision" => &[Component::VisionEncoder, Component::Projector],
        "vision_encoder" => &[Component::VisionEncoder],
        "projector" => &[Component::Projector],
        "decoder" => &[Component::Decoder],
        "head" => &[Component::Head],
        _ => {
            return Err(Error::Request(format!(
                "there is no component {name:?}; there are vision, vision_encoder, projector, decoder and head"
            )));
        }
    })
}

impl Candidates {
    /// What may serve `component` of `package`.
    ///
    /// # Errors
    /// As [`VariantSelection::wanted`], and [`Error::Package`] for a provider that this version does not know.
    pub fn new(
        package: &ModelPackage,
        component: Component,
        variants: &VariantSelection,
        preference: &Preference,
    ) -> Result<Self> {
        let variant = variants.wanted(component, package)?;
        let mut found = Self::default();
        let mut served = Vec::new();
        for choice in package.choices(component) {
            // A graph that several variants share is listed for one of them.
            let same =
                |wanted: &str| package.graph(component, wanted) == package.graph(component, &choice.variant);
            if variant.is_some_and(|wanted| !same(wanted)) {
                continue;
            }
            let provider = choice.provider.parse::<Provider>().map_err(|error| {
                let path = package.display_path(MANIFEST);
                Error::package(path, format!("serve.{}: {error}", component.name()))
            })?;
            served.push((variant.unwrap_or(&choice.variant), provider));
        }
        for target in &preference.targets {
            let before = found.waiting.len();
            for (name, _) in served.iter().filter(|(_, provider)| *provider == target.provider) {
                found.add(name, *target);
            }
            // Whoever names both has a reason, even where the package has another plan.
            if let Some(name) = variant {
                found.add(name, *target);
            }
            if found.waiting.len() == before && !found.waiting.iter().any(|one| one.target == *target) {
                found.refused.push(nothing_for(package, component, *target));
            }
        }
        if !preference.only {
            for (name, provider) in served {
                if !preference.targets.iter().any(|target| target.provider == provider) {
                    found.add(name, provider.into());
                }
            }
        }
        Ok(found)
    }

    fn add(&mut self, variant: &str, target: Target) {
        let candidate = Candidate { variant: variant.to_owned(), target };
        if !self.waiting.contains(&candidate) {
            self.waiting.push(candidate);
        }
    }
}

fn nothing_for(package: &ModelPackage, component: Component, target: Target) -> Refusal {
    let having: Vec<&str> = package
        .manifest()
        .variants
        .keys()
        .filter(|name| package.graph(component, name).is_some())
        .map(String::as_str)
        .collect();
    let variant = having.first().copied().unwrap_or_default();
    let reason = format!(
        "the package has no {} for {}; export a variant for it, or try one of {} there, as with --variant {variant}",
        component.name(),
        target.provider,
        having.join(", ")
    );
    Refusal { provider: target, variant: String::new(), step: Step::Package, reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preference(text: &str, component: Component) -> (Vec<String>, bool) {
        let Preference { targets, only } = text.parse::<ProviderSelection>().unwrap().preference(component);
        (targets.iter().map(ToString::to_string).collect(), only)
    }

    #[test]
    fn a_list_is_for_every_component_but_the_head() {
        for component in [Component::VisionEncoder, Component::Projector, Component::Decoder] {
            let (targets, only) = preference("tensorrt, cuda:1", component);
            assert_eq!((targets, only), (vec!["tensorrt".to_owned(), "cuda:1".to_owned()], false));
        }
        assert_eq!(preference("cuda", Component::Head), (Vec::new(), false));
        assert_eq!(preference("auto", Component::Decoder), (Vec::new(), false));
    }

    #[test]
    fn what_is_said_of_a_component_replaces_what_is_said_of_all() {
        let text = "cuda,vision=coreml,vision=cpu,head=only:cpu";
        assert_eq!(preference(text, Component::Decoder).0, ["cuda"]);
        assert_eq!(preference(text, Component::Projector).0, ["coreml", "cpu"]);
        assert_eq!(preference(text, Component::Head), (vec!["cpu".to_owned()], true));
    }

    #[test]
    fn only_holds_for_the_whole_list() {
        assert!(preference("only:cuda", Component::Decoder).1);
        assert!(preference("cuda,only:cpu", Component::Decoder).1);
        assert!(!preference("decoder=only:cuda", Component::VisionEncoder).1);
    }

    #[test]
    fn what_cannot_be_read_is_refused_in_a_sentence() {
        let refusal = |text: &str| text.parse::<ProviderSelection>().unwrap_err().to_string();
        assert!(refusal("cdua").contains("did you mean cuda?"));
        assert_eq!(refusal("cuda,"), "\"cuda,\" has an empty item; remove it or name something");
        assert!(refusal("eyes=cuda").starts_with("there is no component \"eyes\""));
        assert!(refusal("only:auto").contains("names no provider"));
        assert!("a,b".parse::<VariantSelection>().unwrap_err().to_string().contains("two variants"));
    }

    #[test]
    fn every_list_of_the_package_is_tried_behind_what_was_asked_for() {
        let package = ModelPackage::embedded().unwrap();
        let candidates = |providers: &str, variants: &str| {
            let preference = providers.parse::<ProviderSelection>().unwrap().preference(Component::Decoder);
            let variants = match variants {
                "" => VariantSelection::default(),
                text => text.parse().unwrap(),
            };
            Candidates::new(&package, Component::Decoder, &variants, &preference).unwrap()
        };
        let names = |found: &Candidates| -> Vec<String> {
            found.waiting.iter().map(|one| format!("{}@{}", one.variant, one.target)).collect()
        };
        let auto = candidates("auto", "");
        assert_eq!(names(&auto)[0], "cpu-int4@cpu");
        assert!(auto.refused.is_empty());

        let cuda = candidates("cuda", "");
        assert_eq!(cuda.refused.len(), 1, "the package has nothing for it");
        assert_eq!(cuda.refused[0].step, Step::Package);
        assert_eq!(names(&cuda)[0], "cpu-int4@cpu");

        let only = candidates("only:cuda", "");
        assert!(only.waiting.is_empty());

        let forced = candidates("only:cuda", "portable-f32");
        assert_eq!(names(&forced), ["portable-f32@cuda"]);
        assert!(
            names(&candidates("auto", "portable-f32")).iter().all(|name| name.starts_with("portable-f32@"))
        );
    }

    #[test]
    fn a_variant_is_asked_for_the_components_that_it_has() {
        let package = ModelPackage::embedded().unwrap();
        let selection: VariantSelection = "vision=portable-f32".parse().unwrap();
        assert_eq!(selection.wanted(Component::Projector, &package).unwrap(), Some("portable-f32"));
        assert_eq!(selection.wanted(Component::Decoder, &package).unwrap(), None);
        let error = VariantSelection::of("gpu").wanted(Component::Decoder, &package).unwrap_err().to_string();
        assert!(error.contains("has no variant \"gpu\"; it has "), "{error}");
    }
}
