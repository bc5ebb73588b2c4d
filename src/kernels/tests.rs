//! The kernels against the plain definition of the product.

use super::*;

struct Serial;

impl Parallel for Serial {
    fn for_each(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        // Backwards: the order is nobody's business.
        (0..count).rev().for_each(work);
    }
}

/// Numbers that look random, from a seed.
fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

fn byte(bits: u64) -> u8 {
    bits.to_le_bytes()[3]
}

fn unit(bits: u64) -> f32 {
    u16::try_from(bits >> 48).map_or(0.0, |bits| f32::from(bits) / 32768.0 - 1.0)
}

struct Case {
    bits: Bits,
    block: usize,
    rows: usize,
    weights: [usize; 2],
    zeros: bool,
    bias: bool,
}

fn check(kernels: Kernels, case: &Case) {
    let Case { bits, block, rows, weights: [n, k], zeros, bias } = *case;
    let mut next = noise((block + 1000 * rows + n * 7 + k * 13) as u64);
    let blocks = k.div_ceil(block);
    let per_byte = if bits == Bits::Four { 2 } else { 1 };
    let packed: Vec<u8> = (0..n * blocks * block / per_byte).map(|_| byte(next())).collect();
    let scales: Vec<f32> = (0..n * blocks).map(|_| unit(next()) * 0.1 + 0.2).collect();
    let points: Vec<u8> = (0..n * blocks.div_ceil(per_byte)).map(|_| byte(next())).collect();
    let bias: Option<Vec<f32>> = bias.then(|| (0..n).map(|_| unit(next())).collect());
    let mut x: Vec<f32> = (0..rows * k).map(|_| unit(next())).collect();
    // A block of zeros has no scale.
    x[..block.min(k)].fill(0.0);
    let matrix = Matrix::new(&packed, &scales, zeros.then_some(&points[..]), bits, [n, k], block).unwrap();
    let mut y = vec![f32::NAN; rows * n];
    // What was there before must not show.
    let mut rounded = Rounded { values: vec![77; 3], ..Rounded::default() };
    kernels.multiply(&Serial, &x, &matrix, bias.as_deref(), &mut rounded, &mut y);
    for row in 0..rows {
        for column in 0..n {
            let mut want = bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]));
            for b in 0..blocks {
                let x = &x[row * k + b * block..][..block.min(k - b * block)];
                let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                let mut sum = 0f64;
                for (i, x) in x.iter().enumerate() {
                    let at = b * block + i;
                    let held = matrix.row(column)[at / per_byte];
                    let weight = match (bits, at % 2) {
                        (Bits::Four, 0) => held & 15,
                        (Bits::Four, _) => held >> 4,
                        (Bits::Eight, _) => held,
                    };
                    let value = if largest > 0.0 {
                        f64::from((x * (127.0 / largest)).round_ties_even())
                    } else {
                        0.0
                    };
                    sum += f64::from(i32::from(weight) - matrix.zero_point(column, b)) * value;
                }
                want += sum * f64::from(scales[column * blocks + b]) * f64::from(largest / 127.0);
            }
            let got = f64::from(y[row * n + column]);
            assert!(
                (got - want).abs() < 2e-4 * (10.0 + want.abs()),
                "{bits:?} block {block} [{rows}, {k}] x [{n}, {k}] zeros {zeros} at {row}, {column}: {got}, not {want}"
            );
        }
    }
}

#[test]
fn products_are_what_the_operator_is_defined_to_give() {
    let Some(kernels) = Kernels::here() else {
        eprintln!("no kernels for this processor");
        return;
    };
    for bits in [Bits::Four, Bits::Eight] {
        for block in [32, 64, 128, 256] {
            for (rows, weights) in
                [(1, [5, 64]), (2, [70, 256]), (3, [1, 96]), (4, [33, 160]), (7, [66, 300]), (12, [4, 31])]
            {
                for zeros in [false, true] {
                    check(kernels, &Case { bits, block, rows, weights, zeros, bias: rows % 2 == 0 });
                }
            }
            for (rows, weights) in
                [(1, [8, 256]), (5, [68, 300]), (8, [4, 512]), (13, [72, 384]), (40, [12, 256])]
            {
                check(kernels, &Case { bits, block, rows, weights, zeros: false, bias: rows % 2 == 1 });
            }
            for (rows, weights) in [(13, [31, 96]), (44, [64, 256]), (37, [65, 300]), (30, [3, 512])] {
                for zeros in [false, true] {
                    check(kernels, &Case { bits, block, rows, weights, zeros, bias: rows % 2 == 1 });
                }
            }
        }
    }
}

#[test]
fn rows_do_not_depend_on_how_many_there_are() {
    let Some(kernels) = Kernels::here() else { return };
    let mut next = noise(3);
    let (n, k, block) = (40, 384, 128);
    let packed: Vec<u8> = (0..n * k / 2).map(|_| byte(next())).collect();
    let scales: Vec<f32> = (0..n * k / block).map(|_| unit(next())).collect();
    let matrix = Matrix::new(&packed, &scales, None, Bits::Four, [n, k], block).unwrap();
    let x: Vec<f32> = (0..70 * k).map(|_| unit(next())).collect();
    let of = |rows: usize| {
        let mut y = vec![0.0; rows * n];
        kernels.multiply(&Serial, &x[..rows * k], &matrix, None, &mut Rounded::default(), &mut y);
        y
    };
    let (most, more) = (of(70), of(41));
    assert_eq!(most[..41 * n], more);
    let most = of(40);
    for few in 1..40 {
        assert_eq!(most[..few * n], of(few), "{few} rows");
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let Some(kernels) = Kernels::here() else { return };
    let (n, k, block) = (40, 256, 128);
    let packed = vec![0x5a; n * k / 2];
    let scales = vec![0.5; n * k / block];
    let matrix = Matrix::new(&packed, &scales, None, Bits::Four, [n, k], block).unwrap();
    for rows in [3, 20] {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; rows * k];
            x[k + 7] = bad;
            let mut y = vec![0.0; rows * n];
            kernels.multiply(&Serial, &x, &matrix, None, &mut Rounded::default(), &mut y);
            assert!(y[n..2 * n].iter().all(|y| !y.is_finite()), "{bad} in {rows} rows");
            assert!(y[..n].iter().chain(&y[2 * n..]).all(|y| y.is_finite()));
        }
    }
}

#[test]
fn sizes_that_do_not_belong_together_are_no_matrix() {
    let (packed, scales) = (vec![0; 2 * 64], vec![0.0; 2 * 4]);
    let matrix = |rows, columns, block, zeros| {
        Matrix::new(&packed, &scales, zeros, Bits::Four, [rows, columns], block)
    };
    assert!(matrix(2, 128, 32, None).is_some());
    assert!(matrix(2, 100, 32, None).is_some(), "the last block is padded");
    for (rows, columns, block) in
        [(3, 128, 32), (2, 96, 32), (2, 128, 16), (2, 128, 0), (0, 128, 32), (2, 128, 64)]
    {
        assert!(matrix(rows, columns, block, None).is_none(), "{rows} {columns} {block}");
    }
    assert!(matrix(2, 128, 32, Some(&[0; 4])).is_some());
    assert!(matrix(2, 128, 32, Some(&[0; 8])).is_none());
}
