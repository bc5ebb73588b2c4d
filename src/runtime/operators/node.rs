//! A node of a serialized graph, as far as it is looked at before its graph is loaded.

use crate::package::protobuf::{Fields, Value};

/// A `NodeProto`.
#[derive(Debug, Default)]
pub(super) struct Node<'a> {
    inputs: Vec<&'a [u8]>,
    operator: &'a [u8],
    domain: &'a [u8],
    /// Attributes that are whole numbers; those of another kind as if they were 0.
    pub(super) numbers: Vec<(&'a [u8], u64)>,
    /// Attributes that are text.
    pub(super) texts: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> Node<'a> {
    /// `None` when it is malformed.
    pub(super) fn new(node: &'a [u8]) -> Option<Self> {
        let mut read = Self::default();
        for field in Fields(node) {
            let field = field?;
            match (field.number, field.value) {
                (1, Value::Bytes(name)) => read.inputs.push(name),
                (4, Value::Bytes(name)) => read.operator = name,
                (7, Value::Bytes(name)) => read.domain = name,
                (5, Value::Bytes(attribute)) => read.add(attribute)?,
                _ => {}
            }
        }
        Some(read)
    }

    fn add(&mut self, attribute: &'a [u8]) -> Option<()> {
        let (mut name, mut number, mut text) = (&[][..], 0, None);
        for field in Fields(attribute) {
            let field = field?;
            match (field.number, field.value) {
                (1, Value::Bytes(bytes)) => name = bytes,
                (3, Value::Number(value)) => number = value,
                (4, Value::Bytes(bytes)) => text = Some(bytes),
                _ => {}
            }
        }
        match text {
            Some(text) => self.texts.push((name, text)),
            None => self.numbers.push((name, number)),
        }
        Some(())
    }

    /// Whether it is this operator of this domain.
    pub(super) fn is(&self, operator: &[u8], domain: &[u8]) -> bool {
        (self.operator, self.domain) == (operator, domain)
    }

    /// The name of input `index`; nothing where it has none.
    pub(super) fn input(&self, index: usize) -> &'a [u8] {
        self.inputs.get(index).copied().unwrap_or_default()
    }

    /// Whether input `index` is there.
    pub(super) fn has_input(&self, index: usize) -> bool {
        !self.input(index).is_empty()
    }

    /// The attribute of this name.
    pub(super) fn number(&self, name: &[u8]) -> Option<u64> {
        self.numbers.iter().find(|(other, _)| *other == name).map(|(_, value)| *value)
    }
}
