//! The operators that run this program's own kernels where a graph has ONNX Runtime's.
//!
//! A graph keeps ONNX Runtime's operators in its file and is changed when it is loaded, so that a package is the same
//! everywhere, and what was changed can be left unchanged.

mod attention;
mod few_bits;
mod node;
mod threads;

use std::sync::Arc;

use ort::operator::OperatorDomain;

use crate::kernels::Kernels;
use crate::package::protobuf::{Field, Fields, Value, put_bytes, put_number};

use attention::GroupQueryAttention;
use few_bits::FewBits;
use node::Node;

/// The domain of what replaces ONNX Runtime's operators, under the same names.
const DOMAIN: &str = "llava_phi";
/// Where a graph that was changed in memory finds its weights.
pub(super) const WEIGHTS_FOLDER: &str = "session.model_external_initializers_file_folder_path";

/// How many nodes this program's own kernels compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnNodes {
    /// Products of few-bit weights.
    pub products: usize,
    /// Attentions over a cache.
    pub attentions: usize,
}

/// Puts this program's operators into `model`, a serialized `ModelProto`, wherever they compute the same as ONNX Runtime's.
/// Gives the changed model and what was changed; `None` when it has no product for the kernels, or is not a model. A graph
/// without such products keeps its attentions too: its time goes elsewhere.
pub(super) fn replace(model: &[u8]) -> Option<(Vec<u8>, OwnNodes)> {
    let (mut changed, mut count) = (Vec::with_capacity(model.len() + 4096), OwnNodes::default());
    for field in Fields(model) {
        match field? {
            Field { number: 7, value: Value::Bytes(graph), .. } => {
                put_bytes(&mut changed, 7, &replace_in_graph(graph, &mut count)?);
            }
            Field { raw, .. } => changed.extend_from_slice(raw),
        }
    }
    let mut import = Vec::new();
    put_bytes(&mut import, 1, DOMAIN.as_bytes());
    put_number(&mut import, 2, 1);
    put_bytes(&mut changed, 8, &import);
    (count.products > 0).then_some((changed, count))
}

fn replace_in_graph(graph: &[u8], count: &mut OwnNodes) -> Option<Vec<u8>> {
    let mut changed = Vec::with_capacity(graph.len() + 4096);
    for field in Fields(graph) {
        match field? {
            Field { number: 1, value: Value::Bytes(node), raw } => {
                let read = Node::new(node)?;
                let (product, attention) = (few_bits::is_ours(&read), attention::is_ours(&read));
                count.products += usize::from(product);
                count.attentions += usize::from(attention);
                if product || attention {
                    put_bytes(&mut changed, 1, &in_our_domain(node)?);
                } else {
                    changed.extend_from_slice(raw);
                }
            }
            Field { raw, .. } => changed.extend_from_slice(raw),
        }
    }
    Some(changed)
}

fn in_our_domain(node: &[u8]) -> Option<Vec<u8>> {
    let mut ours = Vec::with_capacity(node.len());
    for field in Fields(node) {
        match field? {
            Field { number: 7, .. } => put_bytes(&mut ours, 7, DOMAIN.as_bytes()),
            Field { raw, .. } => ours.extend_from_slice(raw),
        }
    }
    Some(ours)
}

/// The operators' domain for one session.
pub(super) fn domain(kernels: Kernels) -> ort::Result<Arc<OperatorDomain>> {
    OperatorDomain::new(DOMAIN)?
        .add(FewBits::new(kernels))?
        .add(GroupQueryAttention::<f32>::new(kernels))?
        .add(GroupQueryAttention::<i8>::new(kernels))
        .map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(name: &str, value: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_bytes(&mut bytes, 1, name.as_bytes());
        put_number(&mut bytes, 3, value);
        bytes
    }

    fn node(operator: &str, domain: &str, inputs: &[&str], attributes: &[(&str, u64)]) -> Vec<u8> {
        let mut node = Vec::new();
        for input in inputs {
            put_bytes(&mut node, 1, input.as_bytes());
        }
        put_bytes(&mut node, 4, operator.as_bytes());
        for (name, value) in attributes {
            put_bytes(&mut node, 5, &attribute(name, *value));
        }
        put_bytes(&mut node, 7, domain.as_bytes());
        node
    }

    fn model(nodes: &[Vec<u8>]) -> Vec<u8> {
        let (mut graph, mut model) = (Vec::new(), Vec::new());
        for node in nodes {
            put_bytes(&mut graph, 1, node);
        }
        put_bytes(&mut graph, 2, b"main");
        put_number(&mut model, 1, 10);
        put_bytes(&mut model, 7, &graph);
        model
    }

    const INPUTS: &[&str] = &["x", "w", "s"];
    const RIGHT: &[(&str, u64)] =
        &[("K", 64), ("N", 8), ("bits", 4), ("block_size", 32), ("accuracy_level", 4)];

    #[test]
    fn only_products_that_the_kernels_compute_are_replaced() {
        let with = |name: &str, value| {
            let mut attributes = RIGHT.to_vec();
            attributes.retain(|(other, _)| *other != name);
            attributes.push((name, value));
            node("MatMulNBits", "com.microsoft", INPUTS, &attributes)
        };
        for kept in [
            node("MatMul", "", INPUTS, &[]),
            node("MatMulNBits", "other", INPUTS, RIGHT),
            node("MatMulNBits", "com.microsoft", &["x", "w", "s", "", "order"], RIGHT),
            with("accuracy_level", 0),
            with("accuracy_level", 1),
            with("bits", 2),
            with("block_size", 16),
            with("weight_prepacked", 1),
        ] {
            assert!(replace(&model(&[kept])).is_none());
        }
        for changed in [with("bits", 8), with("block_size", 128), with("weight_prepacked", 0)] {
            assert_eq!(replace(&model(&[changed])).unwrap().1, OwnNodes { products: 1, attentions: 0 });
        }
    }

    #[test]
    fn only_attentions_that_the_kernels_compute_are_replaced() {
        const PLAIN: &[&str] = &["qkv", "", "", "keys", "values", "lengths", "total", "cos", "sin"];
        const HEADS: &[(&str, u64)] = &[("num_heads", 4), ("kv_num_heads", 2), ("scale", 0)];
        let with = |inputs: &[&str], more: &[(&str, u64)], texts: &[(&str, &str)]| {
            let mut node = node("GroupQueryAttention", "com.microsoft", inputs, &[HEADS, more].concat());
            for (name, text) in texts {
                let mut attribute = Vec::new();
                put_bytes(&mut attribute, 1, name.as_bytes());
                put_bytes(&mut attribute, 4, text.as_bytes());
                put_bytes(&mut node, 5, &attribute);
            }
            let product = self::node("MatMulNBits", "com.microsoft", INPUTS, RIGHT);
            replace(&model(&[product, node])).unwrap().1.attentions
        };
        let inputs = |more: &[&'static str]| [PLAIN, more].concat();
        let steps = inputs(&["", "", "", "key_steps", "value_steps"]);
        let channels = [("k_quant_type", "PER_CHANNEL"), ("v_quant_type", "PER_CHANNEL")];
        let tensors = [("k_quant_type", "PER_TENSOR"), ("v_quant_type", "PER_CHANNEL")];
        assert_eq!(with(PLAIN, &[("do_rotary", 1), ("rotary_interleaved", 0)], &[]), 1);
        assert_eq!(with(&["q", "k", "v", "keys", "values", "lengths", "total"], &[], &[]), 1);
        assert_eq!(with(&steps, &[("do_rotary", 1), ("kv_cache_bit_width", 8)], &channels), 1);
        assert_eq!(with(&steps, &[("kv_cache_bit_width", 4)], &channels), 0);
        assert_eq!(with(&steps, &[("kv_cache_bit_width", 8)], &tensors), 0);
        assert_eq!(with(&steps, &[], &[]), 0, "how they are rounded is not said");
        assert_eq!(with(PLAIN, &[], &channels), 0, "there are no steps");
        assert_eq!(with(PLAIN, &[("rotary_interleaved", 1)], &[]), 0);
        assert_eq!(with(PLAIN, &[("local_window_size", 64)], &[]), 0);
        assert_eq!(with(PLAIN, &[("softcap", 0)], &[]), 0, "it may be any number");
        assert_eq!(with(&PLAIN[..7], &[("do_rotary", 1)], &[]), 0, "no angles");
        assert_eq!(with(&["q", "k", "", "keys", "values", "lengths", "total"], &[], &[]), 0);
        assert_eq!(with(&["qkv", "", "", "", "", "lengths", "total"], &[], &[]), 0, "no cache");
        for more in [&["positions"][..], &["", "bias"], &["", "", "sink"]] {
            assert_eq!(with(&inputs(more), &[], &[]), 0, "{more:?}");
        }
    }

    #[test]
    fn everything_else_stays_as_it_was() {
        let others = [node("Add", "", &["a", "b"], &[]), node("Gelu", "com.microsoft", &["c"], &[])];
        let product = |domain| node("MatMulNBits", domain, &["x", "w", "s", "", "", "b"], RIGHT);
        let whole = |domain| model(&[others[0].clone(), product(domain), others[1].clone(), product(domain)]);
        let (changed, count) = replace(&whole("com.microsoft")).unwrap();
        let mut import = Vec::new();
        put_bytes(&mut import, 1, b"llava_phi");
        put_number(&mut import, 2, 1);
        let mut expected = whole("llava_phi");
        put_bytes(&mut expected, 8, &import);
        assert_eq!((changed, count.products), (expected, 2));
    }

    #[test]
    fn what_is_no_model_is_left_alone() {
        let whole = model(&[node("MatMulNBits", "com.microsoft", INPUTS, RIGHT)]);
        assert!(replace(&whole[..whole.len() - 1]).is_none());
        assert!(replace(b"").is_none() && replace(&[0xff; 40]).is_none());
    }
}
