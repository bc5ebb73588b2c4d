//! Everything the exporter knows about a model, as data (format 3).

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// The manifest format that this version reads.
pub const FORMAT: u32 = 3;

/// `manifest.json`: what a package holds and how its graphs are driven.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always [`FORMAT`]; any other number is refused.
    pub format: u32,
    /// What the model is called.
    pub name: String,
    /// Where the package comes from.
    pub source: SourceInfo,
    /// How an image becomes pixel values.
    pub image: ImageSpec,
    /// How text becomes token ids and a conversation becomes text.
    pub text: TextSpec,
    /// Sizes of the vision encoder.
    pub vision: VisionSpec,
    /// The token embedding table.
    pub embedding: EmbeddingSpec,
    /// Sizes of the decoder.
    pub decoder: DecoderSpec,
    /// What each variant holds, by the variant's name.
    pub variants: BTreeMap<String, Variant>,
    /// For each component, which variant serves which provider, best first.
    pub serve: Serve,
    /// Results that a session must reproduce before it serves.
    pub goldens: GoldenSpec,
    /// What decoders hold after the head of every prompt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotSpec>,
    /// Size and hash of every file of the package but the manifest, by relative path.
    pub files: BTreeMap<String, FileInfo>,
}

impl Manifest {
    /// The variant whose vision encoder does not say which patches matter, if there is one: images are then read whole.
    pub fn reads_whole(&self) -> Option<&str> {
        let gives =
            |variant: &Variant| variant.vision_encoder.as_ref().is_none_or(GraphSpec::gives_attention);
        self.variants.iter().find(|(_, variant)| !gives(variant)).map(|(name, _)| name.as_str())
    }

    /// How few positions images may be read in, as a sentence without its subject.
    pub fn image_positions(&self) -> String {
        let all = self.vision.tokens_per_image;
        match self.reads_whole() {
            None => format!("take {all} positions, or fewer when asked"),
            Some(variant) => {
                format!(
                    "take {all} positions: the vision encoder {variant} gives no {CLS_ATTENTION} to choose by"
                )
            }
        }
    }
}

/// Where a package comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceInfo {
    /// The checkpoint's form: `llava_phi` or `llava`.
    pub checkpoint: String,
    /// SHA-256 over the checkpoint's configuration and weights, hexadecimal.
    pub sha256: String,
    /// The exporter's version.
    pub exporter: String,
}

/// How an image becomes pixel values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageSpec {
    /// Height and width that the encoder takes, in pixels.
    pub size: u32,
    /// How a picture that is not square is made so.
    pub fit: Fit,
    /// The resampling filter of the resize.
    pub filter: Filter,
    /// RGB colour that [`Fit::Pad`] adds.
    pub pad_color: [u8; 3],
    /// Factor from a byte to the unit interval.
    pub rescale: f64,
    /// Mean of each channel after rescaling.
    pub mean: [f64; 3],
    /// Standard deviation of each channel after rescaling.
    pub std: [f64; 3],
}

/// How a picture that is not square is made so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// The shorter edge is scaled to the size and the middle is kept.
    CenterCrop,
    /// The picture is laid in the middle of a square of the pad colour, then scaled.
    Pad,
}

/// The resampling filter of the resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Pillow's bicubic: a = -0.5, antialiased when it shrinks.
    Bicubic,
}

/// How text becomes token ids and a conversation becomes text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TextSpec {
    /// Relative path of the tokenizer in the Hugging Face `tokenizers` form.
    pub tokenizer: String,
    /// Entries of the tokenizer, added tokens included.
    pub vocabulary: usize,
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// How a conversation is laid out.
    pub template: Template,
}

/// How a conversation is laid out as text: the strings between its parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// The system text that the model was trained with.
    pub system: String,
    /// After the system text.
    pub after_system: String,
    /// Before what the user says.
    pub before_user: String,
    /// After what the user says.
    pub after_user: String,
    /// Where the model begins to answer; nothing follows in a prompt.
    pub before_answer: String,
    /// Between `before_answer` and an answer that was given earlier.
    pub answer_separator: String,
    /// The token after an answer that was given earlier.
    pub after_answer: u32,
    /// After each image.
    pub after_image: String,
}

/// Sizes of the vision encoder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionSpec {
    /// Positions that one image takes in the decoder.
    pub tokens_per_image: usize,
    /// Columns of the patch features.
    pub hidden: usize,
    /// What was measured when the decoder reads fewer positions of each image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub measured: Vec<MeasuredTokens>,
}

/// How many questions were answered right with fewer visual tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredTokens {
    /// Positions that an image took.
    pub tokens: usize,
    /// What was asked.
    pub benchmark: String,
    /// The variant that answered.
    pub variant: String,
    /// Questions that were asked.
    pub questions: usize,
    /// Questions that were answered right.
    pub right: usize,
    /// Questions that the same variant answers right when it reads all positions.
    pub right_with_all: usize,
}

/// The token embedding table: `rows` x `columns` numbers, row by row, little endian.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EmbeddingSpec {
    /// Relative path of the table.
    pub file: String,
    /// Token ids that have a row.
    pub rows: usize,
    /// Numbers in a row: the decoder's hidden size.
    pub columns: usize,
    /// Type of a number: [`DType::F16`] or [`DType::F32`].
    pub dtype: DType,
}

/// Sizes of the decoder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderSpec {
    /// Transformer layers, each with one key and one value cache.
    pub layers: usize,
    /// Heads of the key and value caches.
    pub kv_heads: usize,
    /// Numbers in a head.
    pub head_dim: usize,
    /// Columns of the input embeddings.
    pub hidden: usize,
    /// Positions that the model was trained to read.
    pub context: usize,
    /// Columns of the logits; more than the tokenizer has entries.
    pub logits_width: usize,
    /// The rotary embedding's angles, for graphs that take them as inputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotary: Option<RotarySpec>,
}

/// Cosines, then sines: two tables of `context` x `dim / 2` f32, row by row, little endian.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RotarySpec {
    /// Relative path of the tables.
    pub file: String,
    /// Numbers of a head that are rotated.
    pub dim: usize,
}

/// The graphs of one variant; a component that it lacks is served by another variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Pixels to patch features.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vision_encoder: Option<GraphSpec>,
    /// Patch features to image embeddings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub projector: Option<GraphSpec>,
    /// Embeddings and cache to logits, or to hidden states where a head follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decoder: Option<DecoderGraphSpec>,
    /// Hidden states to logits, for decoders that end before them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<GraphSpec>,
    /// How far from the goldens the variant's results may be.
    pub tolerance: Tolerance,
}

/// The largest distance that a result may have from its golden: the L2 norm of the difference, by the L2 norm of the
/// golden.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tolerance {
    /// For the patch features of one image.
    pub patch_features: f64,
    /// For the image embeddings of one image.
    pub image_embeds: f64,
    /// For the logits of one position.
    pub logits: f64,
    /// For the class token's attention to one image, where the encoder gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cls_attention: Option<f64>,
}

/// Results of the f32 model in standard operators, in a `safetensors` file.
///
/// Its tensors: `pixel_values` f32 [1, 3, size, size] and what they give, `patch_features` f32 [1, `tokens_per_image`,
/// vision.hidden] and `image_embeds` f32 [1, `tokens_per_image`, hidden]; a prompt, `tokens_before` and `tokens_after`
/// i64 around the first `image_rows` rows of `image_embeds`; `next_tokens` i64, which are read one by one after the
/// prompt; and `logits` f32 [1 + `next_tokens`, `logits_width`], after the prompt and after each of them. Where a vision
/// encoder gives it, `cls_attention` f32 [1, `tokens_per_image`] too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenSpec {
    /// Relative path of the file.
    pub file: String,
    /// Rows of the image that the prompt holds.
    pub image_rows: usize,
}

/// What one decoder holds after the first positions of every prompt, as `llava-phi cache ship` wrote it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotSpec {
    /// Relative path of the snapshot.
    pub file: String,
    /// The decoder's variant.
    pub variant: String,
    /// How many positions it holds.
    pub positions: usize,
}

/// One graph on disk and what it takes and gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphSpec {
    /// Relative path of the `.onnx` file.
    pub path: String,
    /// Relative paths of the external data that the graph names, in its own directory.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<String>,
    /// Inputs by name.
    pub inputs: BTreeMap<String, TensorSpec>,
    /// Outputs by name.
    pub outputs: BTreeMap<String, TensorSpec>,
}

/// The decoder's graph and how its cache is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DecoderGraphSpec {
    /// The graph, with `past_key_values.{layer}.key` and the like spelled out for each layer.
    pub graph: GraphSpec,
    /// How the cache is kept.
    pub kv: KvSpec,
}

impl GraphSpec {
    /// The graph's file, and those of its external data.
    pub fn files(&self) -> impl Iterator<Item = &String> {
        std::iter::once(&self.path).chain(&self.data)
    }
}

/// The vision encoder's output by which visual tokens are chosen: how much the class token attends to each row of the
/// patch features in the layer that makes them, the mean over the heads, [batch, `tokens_per_image`].
pub const CLS_ATTENTION: &str = "cls_attention";

impl GraphSpec {
    /// Whether a vision encoder gives what visual tokens are chosen by.
    pub fn gives_attention(&self) -> bool {
        self.outputs.contains_key(CLS_ATTENTION)
    }
}

/// The decoder output that a head turns into logits.
pub const HIDDEN_STATES: &str = "hidden_states";

impl DecoderGraphSpec {
    /// Whether the graph ends at hidden states, so that a head makes logits of them.
    pub fn needs_head(&self) -> bool {
        self.graph.outputs.contains_key(HIDDEN_STATES)
    }
}

/// How a decoder graph keeps its cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvSpec {
    /// How past and present are handed over.
    pub form: KvForm,
    /// Type of the numbers in the cache; [`DType::I8`] in the form [`KvForm::Shared`] alone.
    pub dtype: DType,
    /// Positions that the cache holds, for the forms whose cache has a fixed size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<usize>,
    /// Positions of one run: exactly so many for [`KvForm::Delta`], at most so many for the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk: Option<usize>,
}

/// How past and present caches are handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvForm {
    /// Past and present are one buffer of full length that the graph writes in place.
    Shared,
    /// Past and present are one buffer of fixed size; the graph scatters the new rows into it.
    Scatter,
    /// The past has a fixed size and is read only; the graph gives the new rows, which the engine copies in.
    Delta,
    /// The present is the past with the new rows appended, in a new buffer.
    Concat,
}

/// Type and shape of one graph input or output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorSpec {
    /// Type of the numbers.
    pub dtype: DType,
    /// Each dimension: a number, or the name of one that varies.
    pub shape: Vec<Dim>,
}

/// One dimension of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Dim {
    /// A fixed size.
    Fixed(usize),
    /// The name of a size that varies: `batch`, `new`, `past`, `total`, `capacity`.
    Named(String),
}

/// Type of the numbers of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// Signed 8-bit integer: a cache whose scales the graph holds.
    I8,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
}

/// For each component, which variant serves which provider, best first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serve {
    /// For the vision encoder.
    pub vision_encoder: Vec<Choice>,
    /// For the projector.
    pub projector: Vec<Choice>,
    /// For the decoder.
    pub decoder: Vec<Choice>,
    /// For the head; empty when every decoder gives logits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub head: Vec<Choice>,
}

/// One variant on one provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// The variant's name.
    pub variant: String,
    /// The provider's name, such as `cpu`.
    pub provider: String,
}

/// Size and hash of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileInfo {
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256, hexadecimal, lower case.
    pub sha256: String,
}

impl DType {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::I8 => 1,
            Self::F16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }
}

impl fmt::Display for MeasuredTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { benchmark, variant, questions, right, right_with_all, .. } = self;
        write!(f, "{right} of {questions} right in {benchmark} with {variant}, {right_with_all} with all")
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::I8 => "i8",
            Self::I32 => "i32",
            Self::I64 => "i64",
        })
    }
}

impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (n, dim) in self.shape.iter().enumerate() {
            let comma = if n == 0 { "" } else { ", " };
            match dim {
                Dim::Fixed(size) => write!(f, "{comma}{size}")?,
                Dim::Named(name) => write!(f, "{comma}{name}")?,
            }
        }
        f.write_str("]")
    }
}
