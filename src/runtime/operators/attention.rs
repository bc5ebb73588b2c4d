//! `GroupQueryAttention`, ONNX Runtime's attention over one buffer for past and present.

use std::fmt::Debug;
use std::marker::PhantomData;

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput, ShapeInferenceContext,
};
use ort::value::{PrimitiveTensorElementType, TensorElementType, ValueRef, ValueRefMut, ValueType};

use crate::kernels::{Attention, AttentionSizes, Heads, Held, Kernels, Rotation};

use super::node::Node;
use super::threads::Threads;

/// Whether `node` is an attention that the kernels compute: every position sees all up to itself, and nothing else.
pub(super) fn is_ours(node: &Node<'_>) -> bool {
    let there = |inputs: &[usize]| inputs.iter().all(|&input| node.has_input(input));
    let absent = |inputs: &[usize]| !inputs.iter().any(|&input| node.has_input(input));
    let quantized = there(&[input::KEY_STEPS, input::VALUE_STEPS]);
    node.is(b"GroupQueryAttention", b"com.microsoft")
        && node.numbers.iter().all(|&(name, value)| match name {
            b"num_heads" | b"kv_num_heads" | b"scale" => true,
            b"do_rotary" => value <= 1,
            b"rotary_interleaved" => value == 0,
            b"kv_cache_bit_width" => value == 8,
            _ => false,
        })
        && node.texts.iter().all(|&(name, value)| match name {
            b"k_quant_type" | b"v_quant_type" => quantized && value == b"PER_CHANNEL",
            _ => false,
        })
        && node.texts.len() == if quantized { 2 } else { 0 }
        && there(&[input::PAST_KEYS, input::PAST_VALUES, input::LENGTHS])
        && (there(&[input::KEYS, input::VALUES]) || absent(&[input::KEYS, input::VALUES]))
        && (node.number(b"do_rotary") != Some(1) || there(&[input::COS, input::SIN]))
        // Positions, a bias, and a sink.
        && absent(&[9, 10, 11])
        && (quantized || absent(&[input::KEY_STEPS, input::VALUE_STEPS]))
}

/// The operator's inputs.
mod input {
    /// Queries, or queries, keys and values side by side, `[batch, new, _]`.
    pub(super) const QUERIES: usize = 0;
    pub(super) const KEYS: usize = 1;
    pub(super) const VALUES: usize = 2;
    /// `[batch, kv_heads, capacity, head_dim]`.
    pub(super) const PAST_KEYS: usize = 3;
    pub(super) const PAST_VALUES: usize = 4;
    /// Positions of each sequence, the new ones included, less one: `[batch]`.
    pub(super) const LENGTHS: usize = 5;
    /// `[positions, half]`.
    pub(super) const COS: usize = 7;
    pub(super) const SIN: usize = 8;
    /// `[1, kv_heads, 1, head_dim]`.
    pub(super) const KEY_STEPS: usize = 12;
    pub(super) const VALUE_STEPS: usize = 13;
}

/// What a cache holds.
pub(super) trait Cached: Held + PrimitiveTensorElementType + Debug {
    /// Its type.
    const TYPE: TensorElementType;
}

impl Cached for f32 {
    const TYPE: TensorElementType = TensorElementType::Float32;
}

impl Cached for i8 {
    const TYPE: TensorElementType = TensorElementType::Int8;
}

/// The operator over caches of `T`.
pub(super) struct GroupQueryAttention<T> {
    kernels: Kernels,
    held: PhantomData<fn() -> T>,
}

impl<T> GroupQueryAttention<T> {
    pub(super) fn new(kernels: Kernels) -> Self {
        Self { kernels, held: PhantomData }
    }
}

/// One node.
pub(super) struct Attend<T> {
    kernels: Kernels,
    heads: usize,
    kv_heads: usize,
    /// 1 by the root of `head_dim` where there is none.
    scale: Option<f32>,
    rotate: bool,
    held: PhantomData<fn() -> T>,
}

impl<T: Cached> Operator for GroupQueryAttention<T> {
    type Kernel<'attr> = Attend<T>;

    fn name(&self) -> &'static str {
        "GroupQueryAttention"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let (floats, integers) = (TensorElementType::Float32, TensorElementType::Int32);
        [
            OperatorInput::required(floats),
            OperatorInput::optional(floats),
            OperatorInput::optional(floats),
            OperatorInput::required(T::TYPE),
            OperatorInput::required(T::TYPE),
            OperatorInput::required(integers),
            OperatorInput::required(integers),
            OperatorInput::optional(floats),
            OperatorInput::optional(floats),
            OperatorInput::optional(TensorElementType::Int64),
            OperatorInput::optional(floats),
            OperatorInput::optional(floats),
            OperatorInput::optional(floats),
            OperatorInput::optional(floats),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [
            OperatorOutput::required(TensorElementType::Float32),
            OperatorOutput::required(T::TYPE),
            OperatorOutput::required(T::TYPE),
        ]
    }

    fn create_kernel(&self, node: &KernelContext<'_>) -> ort::Result<Attend<T>> {
        let number = |name: &str| node.get::<i64>(name).and_then(|value| usize::try_from(value).ok());
        let (Some(heads), Some(kv_heads)) = (number("num_heads"), number("kv_num_heads")) else {
            return Err(ort::Error::new("num_heads and kv_num_heads are needed"));
        };
        // The operator's own default, and what it takes 0 for.
        let scale = node.get::<f32>("scale").filter(|scale| *scale != 0.0);
        let rotate = number("do_rotary") == Some(1);
        Ok(Attend { kernels: self.kernels, heads, kv_heads, scale, rotate, held: PhantomData })
    }

    fn infer_shape(&self, node: &mut ShapeInferenceContext) -> ort::Result<()> {
        let inputs = node.inputs();
        let past = |at: usize| inputs.get(at).cloned();
        let heads = node.attr::<i64>("num_heads")?;
        if let (
            Some(ValueType::Tensor { ty, mut shape, dimension_symbols }),
            Some(ValueType::Tensor { shape: held, .. }),
        ) = (past(input::QUERIES), past(input::PAST_KEYS))
            && let (Some(last), Some(&head_dim)) = (shape.last_mut(), held.last())
        {
            *last = heads * head_dim;
            node.set_output(0, &ValueType::Tensor { ty, shape, dimension_symbols })?;
        }
        for (output, input) in [(1, input::PAST_KEYS), (2, input::PAST_VALUES)] {
            if let Some(held) = past(input) {
                node.set_output(output, &held)?;
            }
        }
        Ok(())
    }
}

impl<T: Cached> Kernel for Attend<T> {
    fn compute(&mut self, run: &ComputeContext) -> ort::Result<()> {
        let there = run.num_inputs()?;
        let input = |index: usize| if index < there { run.input(index) } else { Ok(None) };
        let (queries, keys, values) = (input(input::QUERIES)?, input(input::KEYS)?, input(input::VALUES)?);
        let (cos, sin) = (input(input::COS)?, input(input::SIN)?);
        let (key_steps, value_steps) = (input(input::KEY_STEPS)?, input(input::VALUE_STEPS)?);
        let (past_keys, past_values) = (input(input::PAST_KEYS)?, input(input::PAST_VALUES)?);
        let lengths = input(input::LENGTHS)?;

        let (shape, queries) = floats(queries.as_ref())?.ok_or_else(wrong)?;
        let held = past_keys.as_ref().ok_or_else(wrong)?.shape().to_vec();
        let (&[_, new, _], &[batch, _, capacity, head_dim]) = (&shape[..], &held[..]) else {
            return Err(wrong());
        };
        let [batch, new, capacity, head_dim] = [size(batch)?, size(new)?, size(capacity)?, size(head_dim)?];
        let (heads, kv_heads, rows) = (self.heads, self.kv_heads, (batch * new).max(1));
        let sizes = AttentionSizes { batch, new, heads, kv_heads, head_dim, capacity };
        let part =
            |values, first: usize| Heads { values, width: values.len() / rows, first: first * head_dim };
        let (keys, values) = (floats(keys.as_ref())?, floats(values.as_ref())?);
        let [queries, keys, values] = match (keys, values) {
            (Some((_, keys)), Some((_, values))) => [part(queries, 0), part(keys, 0), part(values, 0)],
            _ => [0, heads, heads + kv_heads].map(|first| part(queries, first)),
        };
        let rotation = match (floats(cos.as_ref())?, floats(sin.as_ref())?) {
            (Some((table, cos)), Some((_, sin))) if self.rotate => {
                Some(Rotation { cos, sin, half: size(table.last().copied().unwrap_or(0))? })
            }
            _ if self.rotate => return Err(wrong()),
            _ => None,
        };
        let steps = match (floats(key_steps.as_ref())?, floats(value_steps.as_ref())?) {
            (Some((_, keys)), Some((_, values))) => Some([keys, values]),
            _ => None,
        };
        let lengths = lengths.as_ref().ok_or_else(wrong)?.try_extract_tensor::<i32>()?.1;
        let lengths =
            lengths.iter().map(|last| size(i64::from(*last) + 1)).collect::<ort::Result<Vec<usize>>>()?;

        let mut y_shape = shape.clone();
        y_shape[2] = i64::try_from(heads * head_dim).map_err(|_| wrong())?;
        let mut y = run.output(0, y_shape)?.ok_or_else(wrong)?;
        let (mut keys_out, mut values_out) =
            (run.output(1, held.clone())?.ok_or_else(wrong)?, run.output(2, held)?.ok_or_else(wrong)?);
        let key_cache = in_place::<T>(past_keys.as_ref(), &mut keys_out)?;
        let value_cache = in_place::<T>(past_values.as_ref(), &mut values_out)?;
        let scale = self.scale.unwrap_or_else(|| default_scale(head_dim));
        let attention = Attention {
            sizes,
            scale,
            queries,
            keys,
            values,
            rotation,
            steps,
            lengths: &lengths,
            cache: [key_cache, value_cache],
        };
        let y = y.try_extract_tensor_mut::<f32>()?.1;
        self.kernels.attend(&Threads(run), attention, y).ok_or_else(wrong)
    }
}

/// What is written of a cache that holds `past`: the same memory, or a copy of it.
fn in_place<'a, T: Cached>(
    past: Option<&ValueRef<'_>>,
    present: &'a mut ValueRefMut<'_>,
) -> ort::Result<&'a mut [T]> {
    let past = past.ok_or_else(wrong)?.try_extract_tensor::<T>()?.1;
    let (from, len) = (past.as_ptr(), past.len());
    let present = present.try_extract_tensor_mut::<T>()?.1;
    if present.len() != len {
        return Err(wrong());
    }
    if present.as_ptr() != from {
        present.copy_from_slice(past);
    }
    Ok(present)
}

#[allow(clippy::cast_precision_loss, reason = "the numbers of a head are few")]
fn default_scale(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

/// Shape and numbers of an input that is there.
fn floats<'a>(value: Option<&'a ValueRef<'_>>) -> ort::Result<Option<(Vec<i64>, &'a [f32])>> {
    let Some(value) = value else { return Ok(None) };
    let (shape, numbers) = value.try_extract_tensor::<f32>()?;
    Ok(Some((shape.to_vec(), numbers)))
}

fn size(size: i64) -> ort::Result<usize> {
    usize::try_from(size).map_err(|_| wrong())
}

fn wrong() -> ort::Error {
    ort::Error::new("the sizes of the attention's inputs do not belong together")
}
