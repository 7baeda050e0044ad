// Sums over the rows of a matrix, for the gradients of biases and norms: in two stages, each in a
// fixed order, so that the bits are always the same. Blocks are (32, 8).
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

constexpr u32 WARPS = 8;

// partial[y, columns] = the sum of `share` rows; block (x, y) takes 32·N columns.
template <class T, int N>
__device__ inline void partial_sums(float* partial, const T* x, u32 rows, u32 columns, u32 share, float (*sums)[32 * VECTOR<bf16>]) {
    u32 first = blockIdx.x * 32 * N, column = first + threadIdx.x * N;
    u64 end = min((u64)rows, (u64)(blockIdx.y + 1) * share);
    float sum[N] = {};
    if (column < columns) {
        for (u64 r = (u64)blockIdx.y * share + threadIdx.y; r < end; r += WARPS) {
            float v[N];
            load<N>(v, x + r * columns + column);
            for (int i = 0; i < N; i++) sum[i] += v[i];
        }
    }
    for (int i = 0; i < N; i++) sums[threadIdx.y][threadIdx.x * N + i] = sum[i];
    __syncthreads();
    for (u32 i = threadIdx.y * 32 + threadIdx.x; i < 32 * N && first + i < columns; i += 32 * WARPS) {
        float total = 0.0f;
        for (u32 w = 0; w < WARPS; w++) total += sums[w][i];
        partial[(u64)blockIdx.y * columns + first + i] = total;
    }
}

template <class T>
__device__ inline void partial_sums(float* partial, const T* x, u32 rows, u32 columns, u32 share, u32 vectors) {
    __shared__ float sums[WARPS][32 * VECTOR<bf16>];
    if (vectors) partial_sums<T, VECTOR<T>>(partial, x, rows, columns, share, sums);
    else partial_sums<T, 1>(partial, x, rows, columns, share, sums);
}

extern "C" __global__ void partial_f32(float* partial, const float* x, u32 rows, u32 columns, u32 share, u32 vectors) {
    partial_sums(partial, x, rows, columns, share, vectors);
}
KERNEL(partial_f32)
extern "C" __global__ void partial_bf16(float* partial, const bf16* x, u32 rows, u32 columns, u32 share, u32 vectors) {
    partial_sums(partial, x, rows, columns, share, vectors);
}
KERNEL(partial_bf16)

// Adds the sums of the columns below `split` to `first`, the others to `second`; null is not wanted.
extern "C" __global__ void total(float* first, float* second, const float* partial, u32 rows, u32 columns, u32 split) {
    __shared__ float sums[WARPS][32];
    u32 column = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (column < columns)
        for (u32 r = threadIdx.y; r < rows; r += WARPS) sum += partial[(u64)r * columns + column];
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    float* to = column < split ? first : second;
    if (threadIdx.y > 0 || column >= columns || !to) return;
    for (u32 w = 1; w < WARPS; w++) sum += sums[w][threadIdx.x];
    to[column < split ? column : column - split] += sum;
}
KERNEL(total)

// y[rows, columns] += bias, for the products that cuBLASLt has no epilogue for.
template <class T> __device__ inline void add_bias(T* y, const T* bias, u64 n, u32 columns) {
    each<T>(n, 0, [=](u64 at, auto) { y[at] = from_float<T>(to_float(y[at]) + to_float(bias[at % columns])); });
}

extern "C" __global__ void add_bias_f32(float* y, const float* bias, u64 n, u32 columns) { add_bias(y, bias, n, columns); }
KERNEL(add_bias_f32)
extern "C" __global__ void add_bias_bf16(bf16* y, const bf16* bias, u64 n, u32 columns) { add_bias(y, bias, n, columns); }
KERNEL(add_bias_bf16)
