//! Products of few rows and few-bit weights, one thread: what a step of one or several sequences is made of.

use divan::{Bencher, counter::ItemsCount};
use llava_phi::kernels::{Bits, Kernels, Matrix, Parallel, Rounded};

/// Weights of one product; what is read meanwhile does not fit into a cache.
const SHAPES: [[usize; 2]; 2] = [[8192, 2048], [2048, 8192]];
const COPIES: usize = 12;
const BLOCK: usize = 128;

fn main() {
    divan::main();
}

struct Serial;

impl Parallel for Serial {
    fn for_each(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(work);
    }
}

#[divan::bench(args = [1, 2, 4, 8, 16, 40, 128, 640], consts = [4, 8], sample_count = 20)]
fn rows<const BITS: usize>(bencher: Bencher<'_, '_>, rows: usize) {
    let Some(kernels) = Kernels::here() else { return };
    let bits = if BITS == 4 { Bits::Four } else { Bits::Eight };
    let make = |[n, k]: [usize; 2]| {
        let packed: Vec<u8> = (0_u8..=255).cycle().take(n * k * BITS / 8).collect();
        (packed, vec![0.01_f32; n * k / BLOCK], [n, k])
    };
    let all: Vec<_> = SHAPES.into_iter().cycle().take(COPIES).map(make).collect();
    let weights: usize = all.iter().map(|(_, _, [n, k])| n * k).sum();
    let most = SHAPES.iter().flatten().max().expect("there are shapes");
    let x: Vec<f32> = (0_u16..997).cycle().map(|x| f32::from(x) * 1e-3).take(rows * most).collect();
    let mut y = vec![0.0; rows * most];
    let mut rounded = Rounded::default();
    bencher.counter(ItemsCount::new(rows * weights)).bench_local(move || {
        for (packed, scales, shape) in &all {
            let [n, k] = *shape;
            let matrix = Matrix::new(packed, scales, None, bits, *shape, BLOCK).expect("the sizes fit");
            let (x, y) = (&x[..rows * k], &mut y[..rows * n]);
            kernels.multiply(&Serial, x, &matrix, None, &mut rounded, y);
            divan::black_box(&mut *y);
        }
    });
}
