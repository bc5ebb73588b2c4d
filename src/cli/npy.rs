//! Writes an array as a `.npy` file, as `NumPy`'s format 1.0 says.

use std::io::{self, Write};

use ndarray::ArrayViewD;

/// A number that a `.npy` file can hold.
pub(super) trait Element: Copy {
    /// Its type as `NumPy` writes it, little endian.
    const DESCR: &'static str;

    /// Its bytes, little endian.
    fn to_bytes(self) -> impl AsRef<[u8]>;
}

macro_rules! element {
    ($($ty:ty: $descr:literal),*) => {$(
        impl Element for $ty {
            const DESCR: &'static str = $descr;

            fn to_bytes(self) -> impl AsRef<[u8]> {
                self.to_le_bytes()
            }
        }
    )*};
}

element!(u8: "|u1", u32: "<u4", f32: "<f4");

/// Writes `values` in row-major order.
///
/// # Errors
/// What `out` refuses.
pub(super) fn write<T: Element>(values: &ArrayViewD<'_, T>, out: &mut impl Write) -> io::Result<()> {
    // One dimension is `(3,)`, as Python writes a tuple of one.
    let shape = values.shape().iter().fold(String::new(), |shape, length| shape + &length.to_string() + ", ");
    let shape = if values.ndim() == 1 { shape.trim_end() } else { shape.trim_end_matches(", ") };
    let mut header = format!("{{'descr': '{}', 'fortran_order': False, 'shape': ({shape}), }}", T::DESCR);
    // Magic, version and length take 10 bytes; the values begin at a multiple of 64.
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let length = u16::try_from(header.len()).map_err(io::Error::other)?;
    out.write_all(b"\x93NUMPY\x01\x00")?;
    out.write_all(&length.to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    values.iter().try_for_each(|value| out.write_all(value.to_bytes().as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Element>(shape: &[usize], values: Vec<T>, header: &str, data: &[u8]) {
        let mut bytes = Vec::new();
        write(&ndarray::ArrayD::from_shape_vec(shape, values).unwrap().view(), &mut bytes).unwrap();
        assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
        let begin = bytes.len() - data.len();
        assert_eq!((begin % 64, usize::from(u16::from_le_bytes([bytes[8], bytes[9]]))), (0, begin - 10));
        assert_eq!(std::str::from_utf8(&bytes[10..begin]).unwrap().trim_end(), header);
        assert_eq!(&bytes[begin..], data);
    }

    #[test]
    fn a_file_has_the_bytes_that_numpy_writes() {
        let header = "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }";
        check(&[2, 3], vec![1_u8, 2, 3, 4, 5, 6], header, &[1, 2, 3, 4, 5, 6]);
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }";
        check(&[1], vec![1.0_f32], header, &[0, 0, 0x80, 0x3f]);
        check(&[], vec![7_u32], "{'descr': '<u4', 'fortran_order': False, 'shape': (), }", &[7, 0, 0, 0]);
    }
}
