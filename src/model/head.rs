//! Hidden states to logits, for decoders that end before them.

use std::borrow::Cow;

use super::chain::Serving;
use crate::error::Result;
use crate::package::manifest::HIDDEN_STATES;
use crate::runtime::{Graph, Tensor};

/// The last matrix of the model.
#[derive(Debug)]
pub(super) struct Head {
    graph: Graph,
}

impl Head {
    pub(super) fn new(graph: Graph) -> Self {
        Self { graph }
    }

    /// The logits, `[logits_width]`, of one position's hidden states, `[hidden]`.
    pub(super) fn logits(&mut self, hidden: &[f32]) -> Result<Vec<f32>> {
        let dtype = self.graph.input_dtype(HIDDEN_STATES);
        let input = Tensor::from_reals(dtype, &[1, hidden.len()], hidden)?;
        let logits = self.graph.run(&[(HIDDEN_STATES, &input)])?.take("logits")?;
        logits.reals().map(Cow::into_owned)
    }
}

impl Serving for Head {
    fn graph(&mut self) -> &mut Graph {
        &mut self.graph
    }
}
