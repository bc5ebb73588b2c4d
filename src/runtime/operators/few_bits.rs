//! `MatMulNBits`, ONNX Runtime's product of activations and few-bit weights.

use std::sync::{Arc, Mutex, PoisonError};

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::{TensorElementType, ValueType};

use crate::kernels::{Bits, Kernels, Matrix, Rounded};

use super::node::Node;
use super::threads::Threads;

/// The accuracy level that lets activations be rounded to 8 bits, as the kernels do.
const ROUNDED: u64 = 4;

/// Whether `node` is a product that the kernels compute.
pub(super) fn is_ours(node: &Node<'_>) -> bool {
    node.is(b"MatMulNBits", b"com.microsoft")
        // Whatever else it is, it changes what is computed.
        && node.numbers.iter().all(|&(name, value)| match name {
            b"bits" => matches!(value, 4 | 8),
            b"block_size" => matches!(value, 32 | 64 | 128 | 256),
            b"accuracy_level" => value == ROUNDED,
            b"K" | b"N" => true,
            _ => value == 0,
        })
        && node.number(b"block_size").is_some()
        && node.number(b"accuracy_level").is_some()
        // Groups of columns in another order.
        && !node.has_input(4)
}

/// The operator of one session.
pub(super) struct FewBits {
    kernels: Kernels,
    /// A session runs one node at a time, and each rounds anew.
    room: Arc<Mutex<Rounded>>,
}

impl FewBits {
    pub(super) fn new(kernels: Kernels) -> Self {
        Self { kernels, room: Arc::default() }
    }
}

/// One node.
pub(super) struct Multiply {
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
