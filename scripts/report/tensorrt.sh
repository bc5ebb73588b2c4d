#!/usr/bin/env bash
# Makes a report of llava-phi on an NVIDIA GPU by the TensorRT provider, to be signed and sent back.
#
#   scripts/report/tensorrt.sh [OPTION...]
#
# Needs what cuda.sh needs, and the TensorRT that this ONNX Runtime was built with:
# `pip install 'tensorrt-cu13==10.16.*'`, its libraries on LD_LIBRARY_PATH. Engines are compiled twice, to see that the
# second time takes them from the cache; the first can take many minutes.

set -euo pipefail
# shellcheck source=scripts/report/common.sh
source "$(dirname "$0")/common.sh"

versions() {
    uname -a
    nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,memory.used --format=csv
    nvidia-smi
    python3 -m pip list 2>/dev/null | grep -i -E 'onnxruntime|nvidia|tensorrt' || true
}

before_answers() {
    step compile "$program" compile --model "$device_model"
    step compile-again "$program" compile --model "$device_model"
    step compile-list "$program" compile --list
}

make_report tensorrt tensorrt "$@"
