//! The operator that runs this program's own kernels where a graph has ONNX Runtime's `MatMulNBits`.
//!
//! A graph keeps ONNX Runtime's operator in its file and is changed when it is loaded, so that a package is the same
//! everywhere, and what was changed can be left unchanged.

use std::sync::{Arc, Mutex, PoisonError};

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{TensorElementType, ValueType};

use crate::kernels::{Bits, Kernels, Matrix, Parallel, Rounded};
use crate::package::protobuf::{Field, Fields, Value, put_bytes, put_number};

/// The operator that is replaced, and its domain.
const REPLACED: (&[u8], &[u8]) = (b"MatMulNBits", b"com.microsoft");
/// The domain of what replaces it, under the same name.
const DOMAIN: &str = "llava_phi";
/// Where a graph that was changed in memory finds its weights.
pub(super) const WEIGHTS_FOLDER: &str = "session.model_external_initializers_file_folder_path";
/// The accuracy level that lets activations be rounded to 8 bits, as these kernels do.
const ROUNDED: u64 = 4;

/// Puts this program's operator into `model`, a serialized `ModelProto`, wherever it computes the same as ONNX Runtime's.
/// Gives the changed model and how many nodes were changed; `None` when there are none, or it is not a model.
pub(super) fn replace(model: &[u8]) -> Option<(Vec<u8>, usize)> {
    let (mut changed, mut count) = (Vec::with_capacity(model.len() + 4096), 0);
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
    (count > 0).then_some((changed, count))
}

fn replace_in_graph(graph: &[u8], count: &mut usize) -> Option<Vec<u8>> {
    let mut changed = Vec::with_capacity(graph.len() + 4096);
    for field in Fields(graph) {
        match field? {
            Field { number: 1, value: Value::Bytes(node), .. } if is_ours(node)? => {
                *count += 1;
                let mut ours = Vec::with_capacity(node.len());
                for field in Fields(node) {
                    match field? {
                        Field { number: 7, .. } => put_bytes(&mut ours, 7, DOMAIN.as_bytes()),
                        Field { raw, .. } => ours.extend_from_slice(raw),
                    }
                }
                put_bytes(&mut changed, 1, &ours);
            }
            Field { raw, .. } => changed.extend_from_slice(raw),
        }
    }
    Some(changed)
}

/// Whether a `NodeProto` is a product that the kernels compute.
fn is_ours(node: &[u8]) -> Option<bool> {
    let (mut operator, mut domain, mut inputs) = (&[][..], &[][..], Vec::new());
    let (mut bits, mut block, mut level) = (4, 0, 0);
    for field in Fields(node) {
        match field? {
            Field { number: 1, value: Value::Bytes(name), .. } => inputs.push(name),
            Field { number: 4, value: Value::Bytes(name), .. } => operator = name,
            Field { number: 7, value: Value::Bytes(name), .. } => domain = name,
            Field { number: 5, value: Value::Bytes(attribute), .. } => match integer(attribute)? {
                (b"bits", value) => bits = value,
                (b"block_size", value) => block = value,
                (b"accuracy_level", value) => level = value,
                (b"K" | b"N", _) | (_, 0) => {}
                // Whatever it is, it changes what is computed.
                _ => return Some(false),
            },
            _ => {}
        }
    }
    Some(
        (operator, domain) == REPLACED
            && matches!(bits, 4 | 8)
            && matches!(block, 32 | 64 | 128 | 256)
            && level == ROUNDED
            // Groups of columns in another order.
            && inputs.get(4).is_none_or(|name| name.is_empty()),
    )
}

/// Name and whole number of an `AttributeProto`.
fn integer(attribute: &[u8]) -> Option<(&[u8], u64)> {
    let (mut name, mut number) = (&[][..], 0);
    for field in Fields(attribute) {
        match field? {
            Field { number: 1, value: Value::Bytes(text), .. } => name = text,
            Field { number: 3, value: Value::Number(value), .. } => number = value,
            _ => {}
        }
    }
    Some((name, number))
}

/// The operator's domain for one session.
pub(super) fn domain(kernels: Kernels) -> ort::Result<Arc<OperatorDomain>> {
    let room = Arc::default();
    OperatorDomain::new(DOMAIN)?.add(FewBits { kernels, room }).map(Arc::new)
}

struct FewBits {
    kernels: Kernels,
    /// A session runs one node at a time, and each rounds anew.
    room: Arc<Mutex<Rounded>>,
}

struct Multiply {
    kernels: Kernels,
    room: Arc<Mutex<Rounded>>,
    bits: Bits,
    block: usize,
    rows: usize,
    columns: usize,
}

impl Operator for FewBits {
    type Kernel<'attr> = Multiply;

    fn name(&self) -> &'static str {
        "MatMulNBits"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Uint8),
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::optional(TensorElementType::Uint8),
            OperatorInput::optional(TensorElementType::Int32),
            OperatorInput::optional(TensorElementType::Float32),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, node: &KernelContext<'_>) -> ort::Result<Multiply> {
        let attribute = |name: &str| node.get::<i64>(name).and_then(|value| usize::try_from(value).ok());
        let bits = if attribute("bits").unwrap_or(4) == 8 { Bits::Eight } else { Bits::Four };
        match (attribute("N"), attribute("K"), attribute("block_size")) {
            (Some(rows), Some(columns), Some(block)) => Ok(Multiply {
                kernels: self.kernels,
                room: Arc::clone(&self.room),
                bits,
                block,
                rows,
                columns,
            }),
            _ => Err(ort::Error::new("N, K and block_size are needed")),
        }
    }

    fn infer_shape(&self, node: &mut ShapeInferenceContext) -> ort::Result<()> {
        let rows = node.attr::<i64>("N")?;
        if let Some(ValueType::Tensor { ty, mut shape, dimension_symbols }) = node.inputs().into_iter().next()
            && let Some(last) = shape.last_mut()
        {
            *last = rows;
            node.set_output(0, &ValueType::Tensor { ty, shape, dimension_symbols })?;
        }
        Ok(())
    }
}

impl Kernel for Multiply {
    fn compute(&mut self, run: &ComputeContext) -> ort::Result<()> {
        let there = run.num_inputs()?;
        let input = |index: usize| if index < there { run.input(index) } else { Ok(None) };
        let missing = |what: &str| ort::Error::new(format!("{what} is missing"));
        let (x, packed, scales) = (input(0)?, input(1)?, input(2)?);
        let (zeros, bias) = (input(3)?, input(5)?);
        let x = x.as_ref().ok_or_else(|| missing("A"))?;
        let (shape, x) = x.try_extract_tensor::<f32>()?;
        let packed = packed.as_ref().ok_or_else(|| missing("B"))?.try_extract_tensor::<u8>()?.1;
        let scales = scales.as_ref().ok_or_else(|| missing("scales"))?.try_extract_tensor::<f32>()?.1;
        let zeros = zeros.as_ref().map(|zeros| zeros.try_extract_tensor::<u8>()).transpose()?;
        let bias = bias.as_ref().map(|bias| bias.try_extract_tensor::<f32>()).transpose()?;
        let (zeros, bias) = (zeros.map(|(_, zeros)| zeros), bias.map(|(_, bias)| bias));
        let size = [self.rows, self.columns];
        let weights = Matrix::new(packed, scales, zeros, self.bits, size, self.block)
            .filter(|_| x.len().is_multiple_of(self.columns))
            .filter(|_| bias.is_none_or(|bias| bias.len() == self.rows))
            .ok_or_else(|| ort::Error::new("the sizes of its inputs do not belong together"))?;
        let mut shape: Vec<i64> = shape.to_vec();
        if let Some(last) = shape.last_mut() {
            *last = i64::try_from(self.rows).unwrap_or(i64::MAX);
        }
        let mut y = run.output(0, shape)?.ok_or_else(|| missing("Y"))?;
        let (_, y) = y.try_extract_tensor_mut::<f32>()?;
        if !x.is_empty() {
            let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
            self.kernels.multiply(&Threads(run), x, &weights, bias, &mut room, y);
        }
        Ok(())
    }
}

/// The threads of the session.
struct Threads<'a>(&'a ComputeContext);

impl Parallel for Threads<'_> {
    fn for_each(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        if count == 1 || self.0.par_for(count, 0, work).is_err() {
            (0..count).for_each(work);
        }
    }
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
    fn only_what_the_kernels_compute_is_replaced() {
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
            assert_eq!(replace(&model(&[changed])).unwrap().1, 1);
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
        assert_eq!((changed, count), (expected, 2));
    }

    #[test]
    fn what_is_no_model_is_left_alone() {
        let whole = model(&[node("MatMulNBits", "com.microsoft", INPUTS, RIGHT)]);
        assert!(replace(&whole[..whole.len() - 1]).is_none());
        assert!(replace(b"").is_none() && replace(&[0xff; 40]).is_none());
    }
}
