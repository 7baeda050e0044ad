#!/usr/bin/env bash
# usage: torch_without_cuda.sh VENV
#
# Lets the CUDA build of torch import and run on a CPU without the nvidia-* packages (2 GB);
# only nvidia-cuda-runtime (2.5 MB) is real. The other libraries that torch links are made here:
# one holds every symbol that nothing else defines, the rest carry a name and refer to it.
# A made function aborts when called; on a machine without a GPU nothing calls one.
set -euo pipefail
export LC_ALL=C # comm needs the order that sort gives

site=$(echo "$1"/lib/python3*/site-packages)
torch=$site/torch/lib
out=$(echo "$site"/nvidia/cu*/lib)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for tool in gcc nm readelf; do
    command -v $tool > /dev/null || { echo "torch_without_cuda: $tool is missing (Debian: apt-get install gcc binutils)" >&2; exit 1; }
done

symbols() { nm -D "$@" 2> /dev/null | awk 'NF { print $NF }' | sed 's/@.*//' | sort -u; }

symbols --undefined-only "$torch"/*.so > "$work/undefined"
symbols --defined-only "$torch"/*.so* "$out"/libcudart.so.* > "$work/defined"
comm -23 "$work/undefined" "$work/defined" |
    grep -E '^(cu[A-Za-z]|nccl|pnccl|nvrtc|nvshmem|nvJit)' |
    sed 's/.*/void &(void) { __builtin_trap(); }/' > "$work/stub.c"
gcc -shared -fPIC -fno-builtin -w -Wl,-soname,libcudastub.so -o "$out/libcudastub.so" "$work/stub.c"

# Every CUDA library that torch names as needed, less the real one.
for library in "$torch"/*.so; do readelf -d "$library"; done |
    sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' | sort -u |
    grep -E '^lib(cu|nccl|nvrtc|nvshmem)' | grep -v '^libcudart' > "$work/sonames"
echo 'int kiln_stub_unused;' > "$work/empty.c"
while read -r soname; do
    gcc -shared -fPIC -Wl,--no-as-needed -Wl,-soname,"$soname" -Wl,-rpath,'$ORIGIN' \
        -o "$out/$soname" "$work/empty.c" -L"$out" -lcudastub
done < "$work/sonames"
echo "torch_without_cuda: $(wc -l < "$work/stub.c") functions in $(wc -l < "$work/sonames") libraries stubbed" >&2
