//! Decides which part of a picture becomes which part of the square that the encoder takes.
//!
//! ```text
//! centre crop   1024 x 768 -> 448 x 336, of which columns 56..392 are kept
//! pad           1024 x 768 -> 1024 x 1024 with 128 rows of colour above -> 336 x 336
//! ```
//!
//! Follows `get_resize_output_image_size` and `center_crop` of transformers' `CLIPImageProcessorPil`, and
//! `expand2square` in haotian-liu/LLaVA `llava/mm_utils.py`.

use crate::package::manifest::Fit;

/// What happens along one axis. All numbers are pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Axis {
    /// The picture.
    pub picture: u32,
    /// Padding before the picture.
    pub before: u32,
    /// The picture with its padding on both sides.
    pub canvas: u32,
    /// What the canvas is scaled to.
    pub scaled: u64,
    /// The first scaled pixel that is kept.
    pub first: u64,
    /// Scaled pixels that are kept.
    pub kept: u32,
}

/// What happens to a picture: each axis on its own, since the filter is separable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Along the rows.
    pub x: Axis,
    /// Along the columns.
    pub y: Axis,
    /// Which axis is resampled first; the result is rounded to bytes between the two.
    pub order: Order,
}

/// Which axis is resampled first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Each row on its own, then down the columns.
    RowsFirst,
    /// Down the columns, then each row on its own.
    ColumnsFirst,
}

/// Plans how a picture of `width` x `height` pixels becomes a square of `size` x `size`.
///
/// A width, height or size of zero is taken as one.
pub fn plan(width: u32, height: u32, size: u32, fit: Fit) -> Plan {
    let (width, height, size) = (width.max(1), height.max(1), size.max(1));
    let (x, y) = match fit {
        Fit::CenterCrop => {
            let short = width.min(height);
            (cropped(width, short, size), cropped(height, short, size))
        }
        Fit::Pad => {
            let canvas = width.max(height);
            (padded(width, canvas, size), padded(height, canvas, size))
        }
    };
    Plan { x, y, order: order(&x, &y) }
}

/// Pillow's choice, as measured on 13.0: columns first where more than two rows go for each column that goes.
fn order(x: &Axis, y: &Axis) -> Order {
    let lost = |axis: &Axis| i128::from(axis.canvas) - i128::from(axis.scaled);
    if lost(y) > 0 && lost(y) > 2 * lost(x) { Order::ColumnsFirst } else { Order::RowsFirst }
}

fn cropped(picture: u32, short: u32, size: u32) -> Axis {
    // The reference computes int(size * long / short) in floating point.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "int() truncates, too")]
    let scaled = (f64::from(size) * f64::from(picture) / f64::from(short)) as u64;
    let scaled = scaled.max(u64::from(size));
    Axis { picture, before: 0, canvas: picture, scaled, first: (scaled - u64::from(size)) / 2, kept: size }
}

fn padded(picture: u32, canvas: u32, size: u32) -> Axis {
    Axis { picture, before: (canvas - picture) / 2, canvas, scaled: size.into(), first: 0, kept: size }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_photograph_keeps_its_middle() {
        let Plan { x, y, .. } = plan(1024, 768, 336, Fit::CenterCrop);
        assert_eq!((x.scaled, x.first, x.kept), (448, 56, 336));
        assert_eq!((y.scaled, y.first, y.kept), (336, 0, 336));
    }

    #[test]
    fn an_odd_remainder_leaves_the_extra_pixel_on_the_right() {
        assert_eq!(plan(337, 901, 336, Fit::CenterCrop).y.scaled, 898);
        assert_eq!(plan(337, 901, 336, Fit::CenterCrop).y.first, 281);
        assert_eq!(plan(1001, 1000, 64, Fit::CenterCrop).x.first, 0);
        assert_eq!(plan(67, 64, 64, Fit::CenterCrop).x.first, 1);
    }

    #[test]
    fn padding_lies_on_both_sides_of_the_shorter_axis() {
        let Plan { x, y, .. } = plan(5000, 3, 336, Fit::Pad);
        assert_eq!((x.before, x.canvas, x.scaled), (0, 5000, 336));
        assert_eq!((y.before, y.canvas, y.scaled), (2498, 5000, 336));
    }

    #[test]
    fn columns_come_first_in_a_picture_more_than_twice_as_tall_as_wide() {
        assert_eq!(plan(337, 901, 336, Fit::CenterCrop).order, Order::ColumnsFirst);
        assert_eq!(plan(1080, 1920, 336, Fit::CenterCrop).order, Order::RowsFirst);
        assert_eq!(plan(901, 337, 336, Fit::CenterCrop).order, Order::RowsFirst);
        assert_eq!(plan(337, 901, 336, Fit::Pad).order, Order::RowsFirst);
    }

    #[test]
    fn an_empty_picture_is_planned_as_one_pixel() {
        assert_eq!(plan(0, 0, 0, Fit::Pad), plan(1, 1, 1, Fit::Pad));
    }

    proptest! {
        #[test]
        fn what_is_kept_lies_inside_for_any_size(width in 0..=u32::MAX, height in 0..=u32::MAX, size in 0..=u32::MAX) {
            for fit in [Fit::CenterCrop, Fit::Pad] {
                let Plan { x, y, .. } = plan(width, height, size, fit);
                for axis in [x, y] {
                    prop_assert_eq!(axis.kept, size.max(1));
                    prop_assert!(axis.first + u64::from(axis.kept) <= axis.scaled);
                    prop_assert!(u64::from(axis.before) + u64::from(axis.picture) <= u64::from(axis.canvas));
                }
                prop_assert_eq!(x.canvas == y.canvas, fit == Fit::Pad || x.picture == y.picture);
            }
        }

        #[test]
        fn turning_the_picture_turns_the_plan(width in 1..9000_u32, height in 1..9000_u32, size in 1..500_u32) {
            for fit in [Fit::CenterCrop, Fit::Pad] {
                let (plan, turned) = (plan(width, height, size, fit), plan(height, width, size, fit));
                prop_assert_eq!((plan.x, plan.y), (turned.y, turned.x));
            }
        }

        #[test]
        fn the_kept_part_is_in_the_middle(width in 1..9000_u32, height in 1..9000_u32, size in 1..500_u32) {
            let Plan { x, y, .. } = plan(width, height, size, Fit::CenterCrop);
            for axis in [x, y] {
                let after = axis.scaled - axis.first - u64::from(axis.kept);
                prop_assert!(after == axis.first || after == axis.first + 1);
            }
            prop_assert_eq!(x.scaled.min(y.scaled), u64::from(size));
        }
    }
}
