//! The fields of a protobuf message, as they lie in memory.
//!
//! Graphs are looked at, and some changed, before ONNX Runtime is loaded or asked, so that its own reader cannot do it.

/// What a protobuf field holds.
pub(crate) enum Value<'a> {
    /// A whole number.
    Number(u64),
    /// A string, bytes, or a message.
    Bytes(&'a [u8]),
    /// A fixed-size number, which nothing here needs.
    Other,
}

/// A field of a message.
pub(crate) struct Field<'a> {
    /// Its number.
    pub(crate) number: u64,
    /// What it holds.
    pub(crate) value: Value<'a>,
    /// All of it, its number and length included.
    pub(crate) raw: &'a [u8],
}

/// The fields of a protobuf message, in its order; a `None` among them means that it is malformed.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Fields<'a> {
    type Item = Option<Field<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<Field<'a>> {
        let all = self.0;
        let tag = varint(&mut self.0)?;
        let value = match tag & 7 {
            0 => Value::Number(varint(&mut self.0)?),
            1 => self.skip(8)?,
            2 => {
                let length = usize::try_from(varint(&mut self.0)?).ok()?;
                let (bytes, rest) = self.0.split_at_checked(length)?;
                self.0 = rest;
                Value::Bytes(bytes)
            }
            5 => self.skip(4)?,
            _ => return None,
        };
        Some(Field { number: tag >> 3, value, raw: &all[..all.len() - self.0.len()] })
    }

    fn skip(&mut self, bytes: usize) -> Option<Value<'a>> {
        self.0 = self.0.get(bytes..)?;
        Some(Value::Other)
    }
}

/// Takes a number of up to ten bytes from the front.
pub(crate) fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(number);
        }
    }
    None
}

/// Appends a field of bytes, or of a message.
pub(crate) fn put_bytes(to: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    put_varint(to, number << 3 | 2);
    put_varint(to, bytes.len() as u64);
    to.extend_from_slice(bytes);
}

/// Appends a field that is a whole number.
pub(crate) fn put_number(to: &mut Vec<u8>, number: u64, value: u64) {
    put_varint(to, number << 3);
    put_varint(to, value);
}

fn put_varint(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    to.push(number.to_le_bytes()[0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_read_again() {
        let mut message = Vec::new();
        put_number(&mut message, 1, 300);
        put_bytes(&mut message, 7, &[9; 200]);
        put_number(&mut message, 20, u64::MAX);
        let fields: Vec<_> = Fields(&message).map(Option::unwrap).collect();
        assert_eq!(fields.iter().map(|field| field.number).collect::<Vec<_>>(), [1, 7, 20]);
        assert!(matches!(fields[0].value, Value::Number(300)));
        assert!(matches!(fields[1].value, Value::Bytes(bytes) if bytes == [9; 200]));
        assert!(matches!(fields[2].value, Value::Number(u64::MAX)));
        assert_eq!(fields.iter().flat_map(|field| field.raw).copied().collect::<Vec<_>>(), message);
    }
}
