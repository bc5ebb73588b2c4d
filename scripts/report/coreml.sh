#!/usr/bin/env bash
# Makes a report of llava-phi on a Mac by the CoreML provider, to be signed and sent back.
#
#   scripts/report/coreml.sh [OPTION...]
#
# Needs a Mac with Apple silicon, Rust, and Python with pip: ONNX Runtime's wheel for macOS has CoreML in it. For an
# iPhone see "iOS" in docs/platforms.md.

set -euo pipefail
# shellcheck source=scripts/report/common.sh
source "$(dirname "$0")/common.sh"

versions() {
    uname -a
    sw_vers
    sysctl machdep.cpu.brand_string hw.model hw.memsize hw.ncpu
}

before_answers() {
    # The second time takes the compiled models from the cache.
    step compile "$program" compile --model "$device_model"
    step compile-again "$program" compile --model "$device_model"
}

make_report coreml coreml "$@"
