//! For x86-64 with AVX-512 VNNI, whose one instruction multiplies 64 bytes and sums them by fours.

mod dots;
mod panels;
mod quads;

use std::ops::Range;

use super::matrix::{Bits, Matrix};
use super::rounded::GROUP;
use super::{Plan, Product, Way};

/// Dwords of a register.
const LANES: usize = 16;
/// Rows of weights that one unit of work takes where they are not unpacked.
const WORK: usize = 64;
/// Rows of activations up to which weights are not unpacked: unpacking would cost more than it saves.
const FEW: usize = 12;
/// The same where rows of weights share registers.
const FEW_IN_QUADS: usize = 40;

/// Whether this processor has all the instructions.
pub(super) fn is_here() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("fma")
}

/// How `rows` rows of activations are multiplied.
pub(super) fn plan(rows: usize, weights: &Matrix<'_>) -> Plan {
    let fit = quads::fit(weights);
    if rows > if fit { FEW_IN_QUADS } else { FEW } {
        Plan { way: Way::Panels, tile: panels::TILE, unit: panels::UNIT, width: panels::PANEL }
    } else if fit {
        Plan { way: Way::Quads, tile: rows.clamp(1, quads::TILE), unit: quads::UNIT, width: WORK }
    } else {
        Plan { way: Way::Rows, tile: 1, unit: 1, width: WORK }
    }
}

/// `columns` of the product, a unit of its plan.
pub(super) fn compute(product: &Product<'_>, way: Way, columns: Range<usize>) {
    match way {
        Way::Panels => panels::multiply(product, columns),
        Way::Quads => quads::multiply(product, columns),
        Way::Rows => dots::multiply(product, columns),
    }
}

/// Columns that a register of weights holds.
const fn width(bits: Bits) -> usize {
    match bits {
        Bits::Four => GROUP,
        Bits::Eight => GROUP / 2,
    }
}
