//! The weights that a graph file names, by what ONNX Runtime makes of them.
//!
//! Reads the few fields of `onnx.proto` that say it: a model's graph (7), a graph's nodes (1) and initializers (5), a
//! node's inputs (1) and operator (4), a tensor's dimensions (1), type (2) and name (8). A graph is planned before
//! ONNX Runtime is loaded, so that its own reader cannot be asked.

use std::collections::BTreeSet;

use crate::package::protobuf::{Fields, Value, varint};

/// Bytes of the initializers of one graph.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Weights {
    /// Half precision, which the CPU provider turns into single precision.
    pub(super) half: u64,
    /// Scales of matrices quantized in blocks.
    pub(super) scales: u64,
    /// All others: single precision and integers.
    pub(super) plain: u64,
}

impl Weights {
    /// The weights of a serialized `ModelProto`; `None` when it is not one.
    pub(super) fn read(model: &[u8]) -> Option<Self> {
        let mut weights = Self::default();
        for field in Fields(model) {
            let field = field?;
            if let (7, Value::Bytes(graph)) = (field.number, field.value) {
                weights.add_graph(graph)?;
            }
        }
        Some(weights)
    }

    /// Bytes of all of them.
    pub(super) fn bytes(self) -> u64 {
        self.half.saturating_add(self.scales).saturating_add(self.plain)
    }

    fn add_graph(&mut self, graph: &[u8]) -> Option<()> {
        let mut scales = BTreeSet::new();
        for field in Fields(graph) {
            let field = field?;
            if let (1, Value::Bytes(node)) = (field.number, field.value) {
                scales.insert(block_scales(node)?);
            }
        }
        for field in Fields(graph) {
            let field = field?;
            let (5, Value::Bytes(tensor)) = (field.number, field.value) else { continue };
            let (name, half, bytes) = initializer(tensor)?;
            let kind = match (!name.is_empty() && scales.contains(name), half) {
                (_, true) => &mut self.half,
                (true, false) => &mut self.scales,
                (false, false) => &mut self.plain,
            };
            *kind = kind.saturating_add(bytes);
        }
        Some(())
    }
}

/// The name of the scales, when the node multiplies by a matrix that is quantized in blocks; an empty one otherwise.
fn block_scales(node: &[u8]) -> Option<&[u8]> {
    let (mut inputs, mut operator) = (Vec::new(), &[][..]);
    for field in Fields(node) {
        let field = field?;
        match (field.number, field.value) {
            (1, Value::Bytes(name)) => inputs.push(name),
            (4, Value::Bytes(name)) => operator = name,
            _ => {}
        }
    }
    Some(inputs.get(2).filter(|_| operator == b"MatMulNBits").copied().unwrap_or_default())
}

/// Name of a `TensorProto`, whether it is in half precision, and its bytes.
fn initializer(tensor: &[u8]) -> Option<(&[u8], bool, u64)> {
    let (mut name, mut elements, mut data_type) = (&[][..], 1u64, 0);
    for field in Fields(tensor) {
        let field = field?;
        match (field.number, field.value) {
            (1, Value::Number(size)) => elements = elements.saturating_mul(size),
            (1, Value::Bytes(packed)) => {
                let mut rest = packed;
                while !rest.is_empty() {
                    elements = elements.saturating_mul(varint(&mut rest)?);
                }
            }
            (2, Value::Number(number)) => data_type = number,
            (8, Value::Bytes(text)) => name = text,
            _ => {}
        }
    }
    let bits: u64 = match data_type {
        7 | 11 | 13 | 14 => 64,
        1 | 6 | 12 => 32,
        4 | 5 | 10 | 16 => 16,
        2 | 3 | 9 | 17..=20 => 8,
        21 | 22 => 4,
        _ => 0,
    };
    Some((name, matches!(data_type, 10 | 16), elements.saturating_mul(bits).div_ceil(8)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::package::protobuf::put_bytes;

    fn field(number: u64, content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_bytes(&mut bytes, number, content);
        bytes
    }

    fn tensor(name: &str, data_type: u8, dims: &[u8]) -> Vec<u8> {
        let dims: Vec<u8> = dims.iter().flat_map(|dim| [1 << 3, *dim]).collect();
        field(5, &[dims, vec![2 << 3, data_type], field(8, name.as_bytes())].concat())
    }

    #[test]
    fn weights_are_told_apart_by_type_and_use() {
        let node =
            [field(1, b"x"), field(1, b"codes"), field(1, b"scales"), field(4, b"MatMulNBits")].concat();
        let graph = [
            tensor("codes", 2, &[10, 3]),
            field(1, &node),
            tensor("scales", 1, &[10]),
            tensor("bias", 1, &[7]),
            tensor("half", 10, &[7, 2]),
            tensor("nibbles", 22, &[3]),
            field(5, &[field(1, &[2, 100]), vec![2 << 3, 3], field(9, &[0; 200])].concat()),
        ]
        .concat();
        let model = [vec![1 << 3, 10], field(7, &graph)].concat();
        let weights = Weights::read(&model).unwrap();
        assert_eq!(weights, Weights { half: 28, scales: 40, plain: 30 + 28 + 2 + 200 });
        for cut in 1..model.len() {
            // Nothing but a whole field can be left out.
            assert!(cut == 2 || Weights::read(&model[..cut]).is_none(), "{cut}");
        }
    }

    #[test]
    fn noise_is_no_model() {
        assert_eq!(Weights::read(b""), Some(Weights::default()));
        assert_eq!(Weights::read(&[0xff; 64]), None);
        assert_eq!(Weights::read(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), None);
        let endless = tensor("x", 1, &[0x7f; 40]);
        assert_eq!(Weights::read(&field(7, &endless)).unwrap().plain, u64::MAX / 8 + 1);
    }
}
