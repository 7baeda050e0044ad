// What buffer.rs does to its memory on a GPU. `copy` is the parameters' copy in bf16, or null.
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

extern "C" __global__ void fill(float* values, bf16* copy, float value, u64 n) {
    each<float>(n, 0, [=](u64 at, auto) {
        values[at] = value;
        if (copy) copy[at] = from_float<bf16>(value);
    });
}
KERNEL(fill)

extern "C" __global__ void to_bf16(bf16* copy, const float* values, u64 n) {
    each<float>(n, 0, [=](u64 at, auto) { copy[at] = from_float<bf16>(values[at]); });
}
KERNEL(to_bf16)
