// What the emulator's own tests run.
#include "gpu/device.cuh"

// Each block sums a row: lanes, then warps through static shared memory.
template <class T> __device__ void row_sum(float* sums, const T* x, u32 columns) {
    __shared__ float warps[32];
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < columns; i += blockDim.x) sum += to_float(x[blockIdx.x * columns + i]);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = warp_sum(threadIdx.x < blockDim.x / 32 ? warps[threadIdx.x] : 0.0f);
        if (threadIdx.x == 0) sums[blockIdx.x] = sum;
    }
}

extern "C" __global__ void row_sum_f32(float* sums, const float* x, u32 columns) { row_sum(sums, x, columns); }
KERNEL(row_sum_f32)

extern "C" __global__ void narrow(bf16* y, const float* x) { y[threadIdx.x] = from_float<bf16>(x[threadIdx.x]); }
KERNEL(narrow)

extern "C" __global__ void mask(float* y, u64 example, u64 key, u32 site, u32 threshold, float scale) {
    y[threadIdx.x] = Mask(key, example, site, threshold, scale).factor(threadIdx.x);
}
KERNEL(mask)

// c[0] = a·b, c[1] = a·bᵀ, all 16×16.
extern "C" __global__ void product(float* c, const bf16* a, const bf16* b) {
    bf16* tiles = (bf16*)dynamic_shared();
    u32 lane = threadIdx.x;
    cp_async<16>(tiles + 8 * lane, a + 8 * lane, true);
    cp_async<16>(tiles + 256 + 8 * lane, b + 8 * lane, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const bf16* row = tiles + lane % 16 * 16 + lane / 16 * 8; // tiles: top left, bottom left, top right, bottom right
    u32 left[4], right[4];
    ldmatrix(left, row);
    for (int transposed = 0; transposed < 2; transposed++) {
        if (transposed) {
            ldmatrix(right, row + 256);
            u32 swap = right[1];
            right[1] = right[2], right[2] = swap;
        } else {
            ldmatrix_transposed(right, row + 256);
        }
        for (int half = 0; half < 2; half++) {
            float sum[4] = {};
            mma(sum, left, right[2 * half], right[2 * half + 1]);
            for (int i = 0; i < 4; i++)
                c[256 * transposed + (lane / 4 + i / 2 * 8) * 16 + 8 * half + 2 * (lane % 4) + i % 2] = sum[i];
        }
    }
}
KERNEL(product)

extern "C" __global__ void diverges() {
    if (threadIdx.x >= 32) __syncthreads();
}
KERNEL(diverges)

extern "C" __global__ void waits_forever() {
    if (threadIdx.x < 32) __syncthreads();
}
KERNEL(waits_forever)

extern "C" __global__ void shuffles_apart() {
    if (threadIdx.x % 2) __shfl_xor_sync(0xffffffff, 1, 1);
    else __shfl_down_sync(0xffffffff, 1, 1);
}
KERNEL(shuffles_apart)

extern "C" __global__ void writes_past_shared() { ((float*)dynamic_shared())[threadIdx.x + 1] = 1.0f; }
KERNEL(writes_past_shared)

extern "C" __global__ void does_not_wait(float* y, const float* x) {
    float* tile = (float*)dynamic_shared();
    if (threadIdx.x < 8) cp_async<16>(tile + 4 * threadIdx.x, x + 4 * threadIdx.x, false);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}
KERNEL(does_not_wait)
