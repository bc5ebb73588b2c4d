#!/usr/bin/env bash
# Makes a report of llava-phi on an NVIDIA GPU by the CUDA provider, to be signed and sent back.
#
#   scripts/report/cuda.sh [OPTION...]
#
# Needs the NVIDIA driver, and an ONNX Runtime with CUDA together with the CUDA libraries that it names:
# `llava-phi runtime install --variant cuda`, or `pip install 'onnxruntime-gpu[cuda,cudnn]'` in the Python environment
# that is active. What is missing stands in the report, in the words of `llava-phi doctor`.

set -euo pipefail
# shellcheck source=scripts/report/common.sh
source "$(dirname "$0")/common.sh"

versions() {
    uname -a
    nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,memory.used --format=csv
    nvidia-smi
    python3 -m pip list 2>/dev/null | grep -i -E 'onnxruntime|nvidia|tensorrt' || true
}

make_report cuda cuda "$@"
