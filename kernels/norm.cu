// norm.rs on a GPU: a sum for each block, then the sum of those, in f64 and in a fixed order. Blocks are
// of 256 threads.
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

// The sum over the block, in its first thread.
__device__ inline double block_sum(double sum) {
    __shared__ double sums[256];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (u32 half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}

extern "C" __global__ void squares(double* partial, const float* gradients, const u32* first_blocks, const u64* bounds,
                                   u32 segments) {
    double sum = 0.0;
    each_of_segment(first_blocks, bounds, segments, [&](u64 at, auto width, u32) {
        constexpr int N = decltype(width)::value;
        float g[N];
        load<N>(g, gradients + at);
        for (int i = 0; i < N; i++) sum += (double)g[i] * g[i];
    });
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}
KERNEL(squares)

extern "C" __global__ void total(double* out, const double* partial, u32 n) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < n; i += 256) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *out = sum;
}
KERNEL(total)
