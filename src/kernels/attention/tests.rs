//! Attention against its plain definition.

use super::super::tests::{Serial, noise, unit};
use super::*;

/// What is read of several sequences, and the cache into which it is written.
struct Case<T> {
    sizes: AttentionSizes,
    half: usize,
    rows: Vec<f32>,
    angles: [Vec<f32>; 2],
    steps: Option<[Vec<f32>; 2]>,
    cache: [Vec<T>; 2],
}

const HEADS: usize = 4;
const CAPACITY: usize = 200;

impl<T: Held> Case<T> {
    /// `positions` of `batch` sequences, which are random, with nothing in the cache.
    fn new(batch: usize, positions: usize, kv_heads: usize, head_dim: usize, half: usize) -> Self {
        let mut next = noise((positions * head_dim + kv_heads) as u64);
        let mut some = |count: usize| (0..count).map(|_| unit(next())).collect::<Vec<_>>();
        let rows = some(batch * positions * (HEADS + 2 * kv_heads) * head_dim);
        let angles = some(CAPACITY * half);
        let angles = [angles.iter().map(|x| x.cos()).collect(), angles.iter().map(|x| x.sin()).collect()];
        let mut steps = || some(kv_heads * head_dim).into_iter().map(|x| 0.01 + x.abs() / 100.0).collect();
        let steps = T::STEPS.then(|| [steps(), steps()]);
        let cache = vec![T::hold(0.0, 1.0); batch * kv_heads * CAPACITY * head_dim];
        let sizes =
            AttentionSizes { batch, new: positions, heads: HEADS, kv_heads, head_dim, capacity: CAPACITY };
        Self { sizes, half, rows, angles, steps, cache: [cache.clone(), cache] }
    }

    fn width(&self) -> usize {
        (HEADS + 2 * self.sizes.kv_heads) * self.sizes.head_dim
    }

    /// Reads the positions from `first` on, `new` of each sequence, of which there are `positions`.
    fn read(&mut self, first: usize, new: usize, positions: usize) -> Option<Vec<f32>> {
        let (width, sizes) = (self.width(), AttentionSizes { new, ..self.sizes });
        let rows: Vec<f32> = self
            .rows
            .chunks_exact(positions * width)
            .flat_map(|sequence| &sequence[first * width..(first + new) * width])
            .copied()
            .collect();
        let heads = |first: usize| Heads { values: &rows, width, first: first * sizes.head_dim };
        let [cos, sin] = &self.angles;
        let [keys, values] = &mut self.cache;
        let attention = Attention {
            sizes,
            scale: 0.3,
            queries: heads(0),
            keys: heads(HEADS),
            values: heads(HEADS + sizes.kv_heads),
            rotation: (self.half > 0).then_some(Rotation { cos, sin, half: self.half }),
            steps: self.steps.as_ref().map(|[keys, values]| [&keys[..], &values[..]]),
            lengths: &vec![first + new; sizes.batch],
            cache: [keys, values],
        };
        let mut y = vec![f32::NAN; sizes.batch * new * HEADS * sizes.head_dim];
        Kernels::here()?.attend(&Serial, attention, &mut y).expect("the sizes belong together");
        Some(y)
    }

    /// Numbers of a head as they are seen: turned, if they are not values, and as they are held.
    fn head(&self, row: usize, position: usize, head: usize) -> Vec<f64> {
        let AttentionSizes { kv_heads, head_dim, .. } = self.sizes;
        let x = &self.rows[row * self.width() + head * head_dim..][..head_dim];
        let mut seen: Vec<f64> = x.iter().copied().map(f64::from).collect();
        if head < HEADS + kv_heads {
            for i in 0..self.half {
                let [cos, sin] = [0, 1].map(|part| f64::from(self.angles[part][position * self.half + i]));
                let (a, b) = (f64::from(x[i]), f64::from(x[self.half + i]));
                (seen[i], seen[self.half + i]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
        if let (Some(steps), Some(kv)) = (&self.steps, head.checked_sub(HEADS)) {
            for (d, x) in seen.iter_mut().enumerate() {
                let step = f64::from(steps[kv / kv_heads][kv % kv_heads * head_dim + d]);
                *x = (*x / step).round_ties_even().clamp(-128.0, 127.0) * step;
            }
        }
        seen
    }

    fn expected(&self, sequence: usize, position: usize, head: usize, positions: usize) -> Vec<f64> {
        let AttentionSizes { kv_heads, head_dim, .. } = self.sizes;
        let kv = head / (HEADS / kv_heads);
        let row = |position: usize| sequence * positions + position;
        let query = self.head(row(position), position, head);
        let weights: Vec<f64> = (0..=position)
            .map(|seen| {
                let key = self.head(row(seen), seen, HEADS + kv);
                (query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() * 0.3).exp()
            })
            .collect();
        let total: f64 = weights.iter().sum();
        let mut sums = vec![0.0; head_dim];
        for (seen, weight) in weights.iter().enumerate() {
            let value = self.head(row(seen), seen, HEADS + kv_heads + kv);
            for (sum, value) in sums.iter_mut().zip(value) {
                *sum += value * weight / total;
            }
        }
        sums
    }
}

fn check<T: Held>(batch: usize, positions: usize, kv_heads: usize, head_dim: usize, half: usize) {
    let mut case = Case::<T>::new(batch, positions, kv_heads, head_dim, half);
    let Some(y) = case.read(0, positions, positions) else {
        eprintln!("no kernels for this processor");
        return;
    };
    for (row, y) in y.chunks_exact(HEADS * head_dim).enumerate() {
        let (sequence, position) = (row / positions, row % positions);
        for (head, y) in y.chunks_exact(head_dim).enumerate() {
            let expected = case.expected(sequence, position, head, positions);
            for (d, (y, expected)) in y.iter().zip(expected).enumerate() {
                // One key in thousands lies between two steps, where f32 and f64 round apart.
                let allowed = if T::STEPS { 4e-3 } else { 1e-5 };
                assert!(
                    (f64::from(*y) - expected).abs() < allowed,
                    "{batch} of {positions}, {kv_heads} heads of {head_dim}, {half}: {y}, not {expected}, \
                     at {sequence}, {position}, {head}, {d}"
                );
            }
        }
    }
}

#[test]
fn each_position_sees_those_before_it_as_they_are_held() {
    for (batch, positions, kv_heads, head_dim, half) in
        [(1, 1, 4, 80, 16), (1, 70, 4, 80, 16), (2, 130, 2, 32, 0), (3, 5, 1, 16, 8), (1, 64, 4, 100, 10)]
    {
        check::<f32>(batch, positions, kv_heads, head_dim, half);
        check::<i8>(batch, positions, kv_heads, head_dim, half);
    }
    check::<f32>(1, 9, 4, 6, 3);
}

#[test]
fn a_position_is_given_the_same_in_whatever_pieces_and_company_it_is_read() {
    fn of<T: Held>() {
        const POSITIONS: usize = 150;
        let mut whole = Case::<T>::new(3, POSITIONS, 2, 80, 16);
        let Some(expected) = whole.read(0, POSITIONS, POSITIONS) else { return };
        let row = HEADS * 80;
        let mut pieces = Case::<T>::new(3, POSITIONS, 2, 80, 16);
        let mut first = 0;
        for new in [1, 63, 1, 7, 60, 2, 16] {
            let y = pieces.read(first, new, POSITIONS).unwrap();
            for (sequence, y) in y.chunks_exact(new * row).enumerate() {
                let at = (sequence * POSITIONS + first) * row;
                assert!(y == &expected[at..at + new * row], "{new} from {first} of {sequence}");
            }
            first += new;
        }
        assert_eq!(first, POSITIONS);
    }
    of::<f32>();
    of::<i8>();
}

#[test]
fn what_is_no_number_shows_where_it_is_seen() {
    let mut case = Case::<f32>::new(1, 80, 4, 16, 0);
    let at = 40 * case.width();
    case.rows[at + HEADS * 16] = f32::NAN;
    let Some(y) = case.read(0, 80, 80) else { return };
    let numbers = |position: usize| y[position * HEADS * 16..][..16].iter().all(|y| y.is_finite());
    assert!(numbers(0) && numbers(39));
    assert!(!numbers(40) && !numbers(41) && !numbers(79));
}

#[test]
fn sizes_that_do_not_belong_together_are_refused() {
    let Some(kernels) = Kernels::here() else { return };
    let sizes = AttentionSizes { batch: 1, new: 2, heads: 2, kv_heads: 1, head_dim: 8, capacity: 4 };
    let rows = [0.0; 2 * 4 * 8];
    let attend = |sizes: AttentionSizes, length: usize, half: usize, outputs: usize| {
        let heads = |first: usize| Heads { values: &rows, width: 4 * 8, first: first * 8 };
        let (mut keys, mut values) = ([0.0; 32], [0.0; 32]);
        let attention = Attention {
            sizes,
            scale: 1.0,
            queries: heads(0),
            keys: heads(2),
            values: heads(3),
            rotation: Some(Rotation { cos: &[1.0; 12], sin: &[0.0; 12], half }),
            steps: None,
            lengths: &[length],
            cache: [&mut keys, &mut values],
        };
        kernels.attend(&Serial, attention, &mut vec![0.0; outputs])
    };
    assert!(attend(sizes, 3, 4, 32).is_some());
    assert!(attend(sizes, 1, 4, 32).is_none(), "fewer than there are new ones");
    assert!(attend(sizes, 5, 4, 32).is_none(), "beyond the cache");
    assert!(attend(sizes, 4, 4, 32).is_none(), "no angles for the last");
    assert!(attend(sizes, 3, 5, 32).is_none(), "more is turned than there is");
    assert!(attend(sizes, 3, 4, 31).is_none());
    assert!(attend(AttentionSizes { kv_heads: 0, ..sizes }, 3, 4, 32).is_none());
    assert!(attend(AttentionSizes { heads: 5, ..sizes }, 3, 4, 80).is_none());
    assert!(attend(AttentionSizes { new: 0, ..sizes }, 3, 4, 0).is_none());
}
