// dropout.rs on a GPU: a warp takes a row.
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

template <class T, int N>
__device__ inline void row(T* y, const T* x, u32 hidden, const RowMask& mask) {
    for (u32 c = threadIdx.x % 32 * N; c < hidden; c += 32 * N) {
        float v[N];
        load<N>(v, x + c);
        for (int i = 0; i < N; i++) v[i] *= mask.factor(c + i);
        store<N>(y + c, v);
    }
}

template <class T>
__device__ inline void forward(T* y, const T* x, u32 rows, u32 hidden, u32 vectors, const u64* example_ids,
                               const u32* sequences, const u32* offsets, u64 key, u32 site, u32 threshold, float scale) {
    u32 r = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (r >= rows) return;
    RowMask mask(r, hidden, example_ids, sequences, offsets, key, site, threshold, scale);
    y += (u64)r * hidden;
    x += (u64)r * hidden;
    if (vectors) row<T, VECTOR<T>>(y, x, hidden, mask);
    else row<T, 1>(y, x, hidden, mask);
}

extern "C" __global__ void forward_f32(float* y, const float* x, u32 rows, u32 hidden, u32 vectors, const u64* example_ids,
                                       const u32* sequences, const u32* offsets, u64 key, u32 site, u32 threshold,
                                       float scale) {
    forward(y, x, rows, hidden, vectors, example_ids, sequences, offsets, key, site, threshold, scale);
}
KERNEL(forward_f32)
extern "C" __global__ void forward_bf16(bf16* y, const bf16* x, u32 rows, u32 hidden, u32 vectors, const u64* example_ids,
                                        const u32* sequences, const u32* offsets, u64 key, u32 site, u32 threshold,
                                        float scale) {
    forward(y, x, rows, hidden, vectors, example_ids, sequences, offsets, key, site, threshold, scale);
}
KERNEL(forward_bf16)
