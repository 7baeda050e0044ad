#!/usr/bin/env bash
# Checks the CUDA side on a machine that has neither a GPU nor CUDA: lints the feature, and compiles
# every kernel by NVRTC for each architecture that kiln is for. Installs what that takes, pinned, into
# ${KILN_CACHE:-~/.cache/kiln}. It says at its end what it did; nothing here runs on a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cache=${KILN_CACHE:-$HOME/.cache/kiln}
python=${KILN_PYTHON:-${KILN_BASE_PYTHON:-python3}}
nvrtc=$cache/nvrtc
packages=nvidia-cuda-nvrtc==13.0.88

# Empty outputs of the fake compiler must not be taken for real ones: a target folder of its own.
export NVCC=$PWD/ci/cuda/fake-nvcc CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13000
export CARGO_TARGET_DIR=$cache/cuda-check-target
cargo clippy --locked --release --workspace --all-targets --features nccl -- -D warnings
linted=$SECONDS

if [ "$(cat "$nvrtc/kiln-stamp" 2> /dev/null)" != "$packages" ]; then
    rm -rf "$nvrtc"
    # shellcheck disable=SC2086 # words are packages
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$nvrtc" $packages
    echo "$packages" > "$nvrtc/kiln-stamp"
fi
"$python" ci/cuda/compile.py "$nvrtc" kernels/*.cu
echo "cuda-check: linted --features nccl against a fake nvcc in $linted s; compiled $(ls kernels/*.cu | wc -l) kernel files" \
    "by NVRTC 13.0.88 for sm_80, sm_90 and sm_100 in $((SECONDS - linted)) s; nothing was run on a GPU"
