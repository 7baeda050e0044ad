#!/usr/bin/env bash
# usage: ci/build-cuda.sh [FOLDER]
#
# Builds kiln and the test binaries of its kernels, its models and itself for a machine with a GPU (sm_90, CUDA
# 13.0), on one without: the compiler comes as pinned Python wheels, what is linked against are stubs. Leaves kiln,
# kiln-tests, kernels-tests, models-tests and integration-tests, stripped, in FOLDER (default target/cuda), and prints their
# sizes. On the GPU's machine LD_LIBRARY_PATH has to name the folder of the real libraries; benches/gpu/run.sh
# does all of that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cache=${KILN_CACHE:-$HOME/.cache/kiln}
python=${KILN_PYTHON:-${KILN_BASE_PYTHON:-python3}}
out=${1:-target/cuda}
features=nccl
site=$cache/nvcc
# nvcc takes any crt and nvvm, but later ones make PTX that 13.0's assembler and driver refuse.
packages="nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
    nvidia-cuda-cccl==13.0.85"
limit=64000000 # bytes of the binary, packed

if [ "$(cat "$site/kiln-stamp" 2> /dev/null)" != "$packages" ]; then
    rm -rf "$site"
    # shellcheck disable=SC2086 # words are packages
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$site" $packages
    ln -sfn lib "$site/nvidia/cu13/lib64"
    for library in "$site"/nvidia/cu13/lib/*.so.*; do # linkers ask for names without versions
        ln -sf "${library##*/}" "${library%%.so.*}.so"
    done
    echo "$packages" > "$site/kiln-stamp"
fi

export CUDA_HOME=$site/nvidia/cu13 CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90} CUDARC_CUDA_VERSION=13000
export NVCC=$PWD/ci/cuda/nvcc-training KILN_NVCC=$CUDA_HOME/bin/nvcc
export CARGO_TARGET_DIR=$cache/cuda-target

# Before the first build: cudarc's build script looks for them once.
cudarc=$(cargo metadata --locked --format-version 1 --features "$features" |
    "$python" -c 'import json, os, sys
for package in json.load(sys.stdin)["packages"]:
    if package["name"] == "cudarc":
        print(os.path.dirname(package["manifest_path"]))')
"$python" ci/cuda/stubs.py "$cudarc" "$CUDA_HOME/lib/stubs" cuda cublas cublasLt curand nvrtc nccl

cargo build --locked --release --features "$features"
mkdir -p "$out"
strip -o "$out/kiln" "$CARGO_TARGET_DIR/release/kiln"
cargo test --locked --release --workspace --lib --test integration --features "$features" --no-run --message-format=json |
    "$python" -c 'import json, sys
for message in map(json.loads, sys.stdin):
    if message.get("profile", {}).get("test") and message.get("executable"):
        print(message["target"]["name"].removeprefix("kiln_"), message["executable"])' |
    while read -r package test; do
        strip -o "$out/$package-tests" "$test"
    done

for binary in kiln kiln-tests kernels-tests models-tests integration-tests; do
    packed=$(gzip -c "$out/$binary" | wc -c)
    echo "build-cuda: $out/$binary: $(stat -c %s "$out/$binary") bytes, $packed packed"
    if [ "$binary" = kiln ] && [ "$packed" -ge $limit ]; then
        echo "build-cuda: kiln has $packed bytes packed; $limit is the limit" >&2
        exit 1
    fi
done
echo "build-cuda: built for sm_$CUDA_COMPUTE_CAP with the features $features in $SECONDS s; linked against stubs, not run on a GPU"
