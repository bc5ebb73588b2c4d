//! What a package will take of memory, before anything is loaded.

use serde::Serialize;

use super::manifest::{DType, DecoderSpec, KvForm, KvSpec};
use super::{Component, ModelPackage};
use crate::error::Result;

/// Bytes that a package takes, by what they are for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryPlan {
    /// Weights of each component, as stored; prepacking by the runtime may copy them.
    pub weights: Vec<ComponentWeights>,
    /// The embedding table, mapped from its file page by page.
    pub embedding: u64,
    /// Key and value cache of one position.
    pub kv_per_position: u64,
    /// Key and value cache of a full context.
    pub kv_full: u64,
    /// What the engine itself allocates to read a full context: embeddings, mask, logits. The runtime's own
    /// scratch memory comes on top and is known only by measuring.
    pub scratch: u64,
}

/// Bytes of one component's graph and external data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ComponentWeights {
    /// The component's name.
    pub component: &'static str,
    /// The variant that serves it.
    pub variant: String,
    /// Bytes of the files.
    pub bytes: u64,
}

impl MemoryPlan {
    /// The plan for the best choice of each component, or for `variant`.
    ///
    /// # Errors
    /// As [`ModelPackage::choices`].
    pub fn new(package: &ModelPackage, variant: Option<&str>) -> Result<Self> {
        let manifest = package.manifest();
        let bytes = |name: &String| manifest.files.get(name).map_or(0, |info| info.bytes);
        let mut weights = Vec::new();
        let mut kv = KvSpec { form: KvForm::Shared, dtype: DType::F32 };
        for component in Component::ALL {
            let Some(choice) = package.choices(component, variant)?.into_iter().next() else { continue };
            let Some((graph, cache)) = package.graph(component, &choice.variant) else { continue };
            kv = cache.unwrap_or(kv);
            weights.push(ComponentWeights {
                component: component.name(),
                variant: choice.variant.clone(),
                bytes: bytes(&graph.path) + graph.data.iter().map(bytes).sum::<u64>(),
            });
        }
        let decoder = &manifest.decoder;
        let per_position = kv_bytes_per_position(decoder, kv.dtype);
        let context = decoder.context as u64;
        let mask = if kv.form == KvForm::Concat { context.saturating_mul(context) } else { 0 };
        let embeds = context.saturating_mul(decoder.hidden as u64);
        let floats = embeds.saturating_add(mask).saturating_add(decoder.logits_width as u64);
        Ok(Self {
            weights,
            embedding: bytes(&manifest.embedding.file),
            kv_per_position: per_position,
            kv_full: per_position.saturating_mul(context),
            scratch: floats.saturating_mul(DType::F32.bytes() as u64),
        })
    }
}

/// Bytes of the key and value cache of one position.
fn kv_bytes_per_position(decoder: &DecoderSpec, dtype: DType) -> u64 {
    [decoder.layers, decoder.kv_heads, decoder.head_dim, 2 * dtype.bytes()]
        .into_iter()
        .fold(1, |bytes, factor| bytes.saturating_mul(factor as u64))
}
