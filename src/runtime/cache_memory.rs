//! Where a graph's caches live: in the provider's own memory, or on the host.

use std::sync::{Arc, Mutex, PoisonError};

use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::value::DynTensor;

use crate::error::Result;
use crate::package::manifest::DType;

use super::graph::SessionOptions;
use super::keys;
use super::tensor::{Tensor, element_type};

/// Makes tensors that a graph reads and writes in place at every step. On the host such a tensor would travel to a
/// discrete GPU and back at each of them.
#[derive(Clone, Debug, Default)]
pub struct CacheMemory {
    device: Option<Arc<Mutex<Allocator>>>,
}

impl CacheMemory {
    /// The memory for what runs in `session`: CUDA's, for the providers that compute there, unless the option
    /// `cache_on_host` says otherwise.
    pub(super) fn new(session: &Session, options: &SessionOptions) -> ort::Result<Self> {
        let on_device = keys::keeps_caches(options.target.provider)
            && options.provider_options.get(keys::CACHE_ON_HOST).is_none_or(|value| value != "1");
        if !on_device {
            return Ok(Self::default());
        }
        let device = options.target.device.and_then(|device| i32::try_from(device).ok()).unwrap_or(0);
        let memory =
            MemoryInfo::new(AllocationDevice::CUDA, device, AllocatorType::Device, MemoryType::Default)?;
        Ok(Self { device: Some(Arc::new(Mutex::new(Allocator::new(session, memory)?))) })
    }

    /// Whether the host can read and write the tensors.
    pub fn is_host(&self) -> bool {
        self.device.is_none()
    }

    /// A tensor of zeros: what is masked is still multiplied, and memory as it comes may hold what is no number.
    ///
    /// # Errors
    /// As [`Tensor::zeros`]; [`crate::Error::Graph`] when the device has no memory left.
    pub fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        let host = Tensor::zeros(dtype, shape)?;
        let Some(device) = &self.device else { return Ok(host) };
        let allocator = device.lock().unwrap_or_else(PoisonError::into_inner);
        let dims: Vec<i64> = host.value().shape().to_vec();
        let made = DynTensor::new(&allocator, element_type(dtype), dims).and_then(|mut tensor| {
            host.value().copy_into(&mut tensor)?;
            Ok(tensor)
        });
        let tensor = made.map_err(|e| {
            crate::Error::graph("decoder", format!("the provider has no memory for {}", host.describe()))
                .because(e)
        })?;
        Ok(Tensor::on_device(tensor, dtype, shape))
    }
}
