//! What a graph takes and gives, against its manifest.

use std::collections::BTreeMap;
use std::fmt;

use ort::value::{Outlet, ValueType};

use crate::package::manifest::{Dim, TensorSpec};
use crate::runtime::tensor::{Tensor, element_type};

/// An input or output as the graph itself declares it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Declared {
    name: String,
    dtype: String,
    /// `None` where the size varies.
    dims: Vec<(Option<usize>, String)>,
}

impl fmt::Display for Declared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dims = self.dims.iter().map(|(size, symbol)| match size {
            Some(size) => size.to_string(),
            None if symbol.is_empty() => "?".to_owned(),
            None => symbol.clone(),
        });
        write!(f, "{}[{}]", self.dtype, dims.collect::<Vec<_>>().join(", "))
    }
}

/// What a session declares.
pub(super) fn declared(outlets: &[Outlet]) -> Vec<Declared> {
    let one = |outlet: &Outlet| {
        let name = outlet.name().to_owned();
        let ValueType::Tensor { ty, shape, dimension_symbols } = outlet.dtype() else {
            return Declared { name, dtype: outlet.dtype().to_string(), dims: Vec::new() };
        };
        let dims = shape.iter().enumerate().map(|(place, &size)| {
            (usize::try_from(size).ok(), dimension_symbols.get(place).cloned().unwrap_or_default())
        });
        Declared { name, dtype: ty.to_string(), dims: dims.collect() }
    };
    outlets.iter().map(one).collect()
}

/// The first difference between a graph and its manifest, as a sentence.
pub(super) fn compare(
    kind: &str,
    graph: &[Declared],
    manifest: &BTreeMap<String, TensorSpec>,
) -> std::result::Result<(), String> {
    for one in graph {
        let Some(spec) = manifest.get(&one.name) else {
            return Err(format!("{kind} {} ({one}) is not in the manifest; export again", one.name));
        };
        let same_dims = one.dims.len() == spec.shape.len()
            && one.dims.iter().zip(&spec.shape).all(|((size, _), dim)| match dim {
                Dim::Fixed(wanted) => *size == Some(*wanted),
                Dim::Named(_) => size.is_none(),
            });
        if one.dtype != element_type(spec.dtype).to_string() || !same_dims {
            return Err(format!("{kind} {} is {one}, the manifest says {}; export again", one.name, spec));
        }
    }
    match manifest.keys().find(|&name| graph.iter().all(|one| one.name != **name)) {
        Some(name) => Err(format!("{kind} {name} is in the manifest but not in the graph; export again")),
        None => Ok(()),
    }
}

/// Whether a tensor is what the manifest says.
pub(super) fn fits(
    kind: &str,
    name: &str,
    tensor: &Tensor,
    spec: &TensorSpec,
) -> std::result::Result<(), String> {
    let dims = tensor.shape().len() == spec.shape.len()
        && tensor.shape().iter().zip(&spec.shape).all(|(&size, dim)| match dim {
            Dim::Fixed(wanted) => size == *wanted,
            Dim::Named(_) => true,
        });
    if tensor.dtype() == spec.dtype && dims {
        return Ok(());
    }
    Err(format!("{kind} {name} is given as {}, it takes {}", tensor.describe(), spec))
}
