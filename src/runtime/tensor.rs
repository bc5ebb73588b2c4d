//! A tensor that ONNX Runtime owns: what graphs read and write.

use std::{any::Any, borrow::Cow, fmt, sync::Arc};

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use ort::memory::Allocator;
use ort::value::{DynTensor, DynValue, PrimitiveTensorElementType, TensorElementType};

use crate::error::{Error, Result};
use crate::package::manifest::DType;

use super::Runtime;

/// A dense tensor in memory that ONNX Runtime allocated.
///
/// It is the same kind of tensor that a graph gives back, so it can be an input, an output, or both at once. It
/// needs a started [`Runtime`].
pub struct Tensor {
    value: DynTensor,
    dtype: DType,
    shape: Vec<usize>,
    /// What the elements lie in, where that is not the value's own.
    _within: Option<Arc<dyn Any + Send + Sync>>,
}

impl Tensor {
    /// A tensor of zeros. An empty `shape` makes a scalar; a dimension of 0 makes a tensor without elements.
    ///
    /// # Errors
    /// [`Error::Library`] before [`Runtime::start`]; [`Error::Request`] when the memory cannot be had.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Result<Self> {
        Runtime::started()?;
        let bytes = elements(shape).and_then(|count| count.checked_mul(dtype.bytes()));
        let dims: Option<Vec<i64>> = shape.iter().map(|&dim| i64::try_from(dim).ok()).collect();
        let (Some(dims), Some(_)) = (dims, bytes.filter(|&bytes| isize::try_from(bytes).is_ok())) else {
            return Err(Error::Request(format!(
                "a tensor {} does not fit into memory",
                describe(dtype, shape)
            )));
        };
        let value = DynTensor::new(&Allocator::default(), element_type(dtype), dims).map_err(|e| {
            Error::Request(format!(
                "no memory for a tensor {} ({}); ask less at once, or close other programs",
                describe(dtype, shape),
                e.message()
            ))
        })?;
        Ok(Self { value, dtype, shape: shape.to_vec(), _within: None })
    }

    /// A tensor of `f32`; `data` is row by row and as long as `shape` says.
    ///
    /// # Errors
    /// [`Error::Request`] when the length does not fit the shape; else as [`Tensor::zeros`].
    pub fn from_f32(shape: &[usize], data: impl AsRef<[f32]>) -> Result<Self> {
        Self::from_slice(DType::F32, shape, data.as_ref())
    }

    /// A tensor of `f16`; otherwise as [`Tensor::from_f32`].
    ///
    /// # Errors
    /// As [`Tensor::from_f32`].
    pub fn from_f16(shape: &[usize], data: impl AsRef<[f16]>) -> Result<Self> {
        Self::from_slice(DType::F16, shape, data.as_ref())
    }

    /// A tensor of `i8`; otherwise as [`Tensor::from_f32`].
    ///
    /// # Errors
    /// As [`Tensor::from_f32`].
    pub fn from_i8(shape: &[usize], data: impl AsRef<[i8]>) -> Result<Self> {
        Self::from_slice(DType::I8, shape, data.as_ref())
    }

    /// A tensor of `i32`; otherwise as [`Tensor::from_f32`].
    ///
    /// # Errors
    /// As [`Tensor::from_f32`].
    pub fn from_i32(shape: &[usize], data: impl AsRef<[i32]>) -> Result<Self> {
        Self::from_slice(DType::I32, shape, data.as_ref())
    }

    /// A tensor of `i64`; otherwise as [`Tensor::from_f32`].
    ///
    /// # Errors
    /// As [`Tensor::from_f32`].
    pub fn from_i64(shape: &[usize], data: impl AsRef<[i64]>) -> Result<Self> {
        Self::from_slice(DType::I64, shape, data.as_ref())
    }

    /// A tensor of `f32` or, rounded, of `f16`, as a graph asks for it; otherwise as [`Tensor::from_f32`].
    ///
    /// # Errors
    /// As [`Tensor::from_f32`], and for a type that is neither.
    pub fn from_reals(dtype: DType, shape: &[usize], data: &[f32]) -> Result<Self> {
        match dtype {
            DType::F16 => {
                let mut half = vec![f16::ZERO; data.len()];
                half.convert_from_f32_slice(data);
                Self::from_slice(dtype, shape, &half)
            }
            _ => Self::from_slice(dtype, shape, data),
        }
    }

    /// A copy of an array or a view, of any layout and any number of dimensions, as `f32` or `f16`.
    ///
    /// # Errors
    /// As [`Tensor::from_reals`].
    pub fn from_array<S, D>(dtype: DType, array: &ndarray::ArrayBase<S, D>) -> Result<Self>
    where
        S: ndarray::Data<Elem = f32>,
        D: ndarray::Dimension,
    {
        if let Some(slice) = array.as_slice() {
            return Self::from_reals(dtype, array.shape(), slice);
        }
        let values: Vec<f32> = array.iter().copied().collect();
        Self::from_reals(dtype, array.shape(), &values)
    }

    /// Type of the elements.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Size of each dimension; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements, row by row.
    ///
    /// # Errors
    /// [`Error::Request`] when they are not `f32`.
    pub fn f32s(&self) -> Result<&[f32]> {
        self.slice(DType::F32)
    }

    /// The elements, row by row, to be written.
    ///
    /// # Errors
    /// [`Error::Request`] when they are not `f32`.
    pub fn f32s_mut(&mut self) -> Result<&mut [f32]> {
        self.slice_mut(DType::F32)
    }

    /// The elements, row by row.
    ///
    /// # Errors
    /// [`Error::Request`] when they are not `f16`.
    pub fn f16s(&self) -> Result<&[f16]> {
        self.slice(DType::F16)
    }

    /// The elements, row by row, to be written.
    ///
    /// # Errors
    /// [`Error::Request`] when they are not `f16`.
    pub fn f16s_mut(&mut self) -> Result<&mut [f16]> {
        self.slice_mut(DType::F16)
    }

    /// The elements, row by row.
    ///
    /// # Errors
    /// [`Error::Request`] when they are not `i8`.
    pub fn i8s(&self) -> Result<&[i8]> {
        self.slice(DType::I8)
    }

    /// The elements, row by row, to be written.
    ///
    /// # Errors
    /// [`Error::Request`] when they are not `i8`.
    pub fn i8s_mut(&mut self) -> Result<&mut [i8]> {
        self.slice_mut(DType::I8)
    }

    /// The elements, row by row.
    ///
    /// # Errors
    /// [`Error::Request`] when they are not `i32`.
    pub fn i32s(&self) -> Result<&[i32]> {
        self.slice(DType::I32)
    }

    /// The elements, row by row, to be written.
    ///
    /// # Errors
    /// [`Error::Request`] when they are not `i32`.
    pub fn i32s_mut(&mut self) -> Result<&mut [i32]> {
        self.slice_mut(DType::I32)
    }

    /// The elements, row by row.
    ///
    /// # Errors
    /// [`Error::Request`] when they are not `i64`.
    pub fn i64s(&self) -> Result<&[i64]> {
        self.slice(DType::I64)
    }

    /// The elements, row by row, to be written.
    ///
    /// # Errors
    /// [`Error::Request`] when they are not `i64`.
    pub fn i64s_mut(&mut self) -> Result<&mut [i64]> {
        self.slice_mut(DType::I64)
    }

    /// The elements, row by row, `f16` widened.
    ///
    /// # Errors
    /// [`Error::Request`] when they are neither `f32` nor `f16`.
    pub fn reals(&self) -> Result<Cow<'_, [f32]>> {
        match self.dtype {
            DType::F16 => self.f16s().map(|half| Cow::Owned(half.to_f32_vec())),
            _ => self.f32s().map(Cow::Borrowed),
        }
    }

    /// A copy as an array of the numbers' own shape, `f16` widened.
    ///
    /// # Errors
    /// [`Error::Request`] when the numbers are neither f32 nor f16, or the tensor has another number of dimensions
    /// than `D`.
    pub fn to_array<D: ndarray::Dimension>(&self) -> Result<ndarray::Array<f32, D>> {
        let reals = self.reals()?;
        let dynamic = ndarray::ArrayView::from_shape(self.shape.as_slice(), &reals);
        let array = dynamic.and_then(ndarray::ArrayView::into_dimensionality);
        array.map(|view| view.to_owned()).map_err(|e| {
            let wanted = D::NDIM.map_or_else(String::new, |n| format!(" of {n} dimensions"));
            Error::Request(format!("a tensor {} is not an array{wanted}: {e}", self.describe()))
        })
    }

    /// Copies the first `rows` of the last but one dimension from `source` to the rows from `start` on, for every index
    /// of the dimensions before.
    ///
    /// # Errors
    /// [`Error::Request`] when the two differ in more than the number of rows, or either has too few rows.
    pub fn copy_rows(&mut self, source: &Self, rows: usize, start: usize) -> Result<()> {
        match (self.dtype, source.dtype) {
            (DType::F32, DType::F32) => self.copy_rows_of::<f32>(source, rows, start),
            (DType::F16, DType::F16) => self.copy_rows_of::<f16>(source, rows, start),
            (DType::I8, DType::I8) => self.copy_rows_of::<i8>(source, rows, start),
            _ => Err(Error::Request(format!(
                "rows of a tensor {} cannot be copied to one {}",
                source.describe(),
                self.describe()
            ))),
        }
    }

    fn copy_rows_of<T: PrimitiveTensorElementType + Copy>(
        &mut self,
        source: &Self,
        rows: usize,
        start: usize,
    ) -> Result<()> {
        let shapes = (self.shape.split_last_chunk(), source.shape.split_last_chunk());
        let (Some((outer, &[height, width])), Some((from, &[from_height, from_width]))) = shapes else {
            return Err(Error::Request(format!("a tensor {} has no rows", source.describe())));
        };
        if outer != from || width != from_width || rows > height.saturating_sub(start) || rows > from_height {
            return Err(Error::Request(format!(
                "{rows} rows of a tensor {} do not fit one {} from row {start} on",
                source.describe(),
                self.describe()
            )));
        }
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let dtype = self.dtype;
        let target = self.slice_mut::<T>(dtype)?.chunks_exact_mut(height * width);
        for (target, source) in target.zip(source.slice::<T>(dtype)?.chunks_exact(from_height * width)) {
            target[start * width..][..rows * width].copy_from_slice(&source[..rows * width]);
        }
        Ok(())
    }

    /// Takes over what a graph gave; `None` when it is not a tensor of a [`DType`].
    pub(super) fn from_output(value: DynValue) -> Option<Self> {
        let value: DynTensor = value.downcast().ok()?;
        let dtype = dtype_of(*value.data_type())?;
        let shape = value.shape().iter().map(|&dim| usize::try_from(dim).ok()).collect::<Option<_>>()?;
        Some(Self { value, dtype, shape, _within: None })
    }

    /// A tensor over memory that `within` holds.
    pub(super) fn over(value: DynValue, within: Arc<dyn Any + Send + Sync>) -> Option<Self> {
        Self::from_output(value).map(|tensor| Self { _within: Some(within), ..tensor })
    }

    /// A tensor in a provider's own memory: the host cannot read or write it.
    pub(super) fn on_device(value: DynTensor, dtype: DType, shape: &[usize]) -> Self {
        Self { value, dtype, shape: shape.to_vec(), _within: None }
    }

    pub(super) fn value(&self) -> &DynTensor {
        &self.value
    }

    pub(super) fn value_mut(&mut self) -> &mut DynTensor {
        &mut self.value
    }

    /// `f32[1, 32, 80]`, as errors name a tensor.
    pub(super) fn describe(&self) -> String {
        describe(self.dtype, &self.shape)
    }

    fn from_slice<T: PrimitiveTensorElementType + Copy>(
        dtype: DType,
        shape: &[usize],
        data: &[T],
    ) -> Result<Self> {
        if elements(shape) != Some(data.len()) {
            return Err(Error::Request(format!(
                "{} values do not fill a tensor {}",
                data.len(),
                describe(dtype, shape)
            )));
        }
        let mut tensor = Self::zeros(dtype, shape)?;
        tensor.slice_mut(dtype)?.copy_from_slice(data);
        Ok(tensor)
    }

    pub(super) fn slice<T: PrimitiveTensorElementType>(&self, wanted: DType) -> Result<&[T]> {
        match self.value.try_extract_tensor() {
            Ok((_, data)) => Ok(data),
            Err(e) => Err(wrong_type(wanted, &self.describe(), &e)),
        }
    }

    pub(super) fn slice_mut<T: PrimitiveTensorElementType>(&mut self, wanted: DType) -> Result<&mut [T]> {
        let what = self.describe();
        match self.value.try_extract_tensor_mut() {
            Ok((_, data)) => Ok(data),
            Err(e) => Err(wrong_type(wanted, &what, &e)),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor {}", self.describe())
    }
}

fn wrong_type(wanted: DType, what: &str, cause: &ort::Error) -> Error {
    Error::Request(format!("a tensor {what} cannot be read as {}: {}", wanted, cause.message()))
}

fn elements(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |count, &dim| count.checked_mul(dim))
}

fn describe(dtype: DType, shape: &[usize]) -> String {
    format!("{dtype}{shape:?}")
}

pub(super) fn element_type(dtype: DType) -> TensorElementType {
    match dtype {
        DType::F32 => TensorElementType::Float32,
        DType::F16 => TensorElementType::Float16,
        DType::I8 => TensorElementType::Int8,
        DType::I32 => TensorElementType::Int32,
        DType::I64 => TensorElementType::Int64,
    }
}

fn dtype_of(ty: TensorElementType) -> Option<DType> {
    [DType::F32, DType::F16, DType::I8, DType::I32, DType::I64]
        .into_iter()
        .find(|&dtype| element_type(dtype) == ty)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::testing;

    #[test]
    fn every_type_is_written_and_read() {
        testing::start();
        let mut tensor = Tensor::zeros(DType::F32, &[2, 2]).unwrap();
        tensor.f32s_mut().unwrap()[3] = 1.5;
        assert_eq!(tensor.f32s().unwrap(), [0.0, 0.0, 0.0, 1.5]);
        let mut tensor = Tensor::from_i64(&[2], [1, 2]).unwrap();
        tensor.i64s_mut().unwrap()[0] = i64::MIN;
        assert_eq!(tensor.i64s().unwrap(), [i64::MIN, 2]);
        let mut tensor = Tensor::from_i32(&[1], [7]).unwrap();
        tensor.i32s_mut().unwrap()[0] += 1;
        assert_eq!((tensor.i32s().unwrap(), tensor.dtype()), (&[8][..], DType::I32));
        let mut tensor = Tensor::from_f16(&[1], [f16::ONE]).unwrap();
        tensor.f16s_mut().unwrap()[0] = f16::NEG_ONE;
        assert_eq!(tensor.f16s().unwrap(), [f16::NEG_ONE]);
        let mut tensor = Tensor::from_i8(&[2], [-128, 127]).unwrap();
        tensor.i8s_mut().unwrap()[1] = -1;
        assert_eq!((tensor.i8s().unwrap(), tensor.dtype()), (&[-128, -1][..], DType::I8));
    }

    #[test]
    fn rows_of_bytes_are_copied_below_those_that_stand() {
        testing::start();
        let source = Tensor::from_i8(&[2, 2, 1], [1, 2, 3, 4]).unwrap();
        let mut target = Tensor::zeros(DType::I8, &[2, 3, 1]).unwrap();
        target.copy_rows(&source, 2, 1).unwrap();
        assert_eq!(target.i8s().unwrap(), [0, 1, 2, 0, 3, 4]);
        let other = Tensor::zeros(DType::F16, &[2, 2, 1]).unwrap();
        let error = target.copy_rows(&other, 2, 0).unwrap_err().to_string();
        assert_eq!(error, "rows of a tensor f16[2, 2, 1] cannot be copied to one i8[2, 3, 1]");
    }

    #[test]
    fn a_scalar_has_one_element_and_a_dimension_of_zero_has_none() {
        testing::start();
        assert_eq!(Tensor::from_i32(&[], [5]).unwrap().i32s().unwrap(), [5]);
        let empty = Tensor::zeros(DType::F32, &[1, 32, 0, 80]).unwrap();
        assert_eq!((empty.f32s().unwrap().len(), empty.shape()), (0, &[1, 32, 0, 80][..]));
    }

    #[test]
    fn an_array_of_any_layout_is_copied_row_by_row() {
        testing::start();
        let array = ndarray::arr2(&[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]);
        let tensor = Tensor::from_array(DType::F32, &array.t()).unwrap();
        assert_eq!(tensor.shape(), [3, 2]);
        assert_eq!(tensor.f32s().unwrap(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_shape() {
        testing::start();
        let check = |result: Result<Tensor>, expected: &str| {
            assert_eq!(result.unwrap_err().to_string(), expected);
        };
        check(Tensor::from_f32(&[2, 2], [1.0]), "1 values do not fill a tensor f32[2, 2]");
        check(Tensor::from_f32(&[0], [1.0]), "1 values do not fill a tensor f32[0]");
        check(
            Tensor::zeros(DType::I64, &[usize::MAX, 2]),
            &format!("a tensor i64[{}, 2] does not fit into memory", usize::MAX),
        );
        check(
            Tensor::zeros(DType::I64, &[1 << 61]),
            &format!("a tensor i64[{}] does not fit into memory", 1_u64 << 61),
        );
        let error = Tensor::zeros(DType::F32, &[2]).unwrap().i64s().unwrap_err().to_string();
        assert!(error.starts_with("a tensor f32[2] cannot be read as i64: "), "{error}");
    }
}
