// layer_norm.rs on a GPU: a warp takes a row, of which a lane has the same columns all along. What it
// keeps of them lies in shared memory, where no other lane looks.
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

template <class T, int N>
__device__ inline void normalize(T* y, T* sum, const T* x, const T* residual, const float* gamma, const float* beta,
                                 float* mean_out, float* rstd_out, u32 hidden, float eps, const RowMask& mask,
                                 float* cache) {
    u32 lane = threadIdx.x % 32;
    float total = 0.0f;
    for (u32 c = lane * N; c < hidden; c += 32 * N) {
        float s[N], r[N] = {};
        load<N>(s, x + c);
        if (residual) load<N>(r, residual + c);
        if (mask.drops()) {
            for (int i = 0; i < N; i++) s[i] = fmaf(s[i], mask.factor(c + i), r[i]);
        } else {
            for (int i = 0; i < N; i++) s[i] += r[i];
        }
        for (int i = 0; i < N; i++) {
            s[i] = to_float(from_float<T>(s[i])); // as backward will read it
            total += s[i];
        }
        if (sum) store<N>(sum + c, s);
        store<N>(cache + c, s);
    }
    // Two passes over a row at hand: the one-pass formula cancels where the mean is large.
    float mean = warp_sum(total) / hidden;
    float squares = 0.0f;
    for (u32 c = lane * N; c < hidden; c += 32 * N) {
        float s[N];
        load<N>(s, cache + c);
        for (int i = 0; i < N; i++) squares += (s[i] - mean) * (s[i] - mean);
    }
    float rstd = 1.0f / sqrtf(warp_sum(squares) / hidden + eps);
    for (u32 c = lane * N; c < hidden; c += 32 * N) {
        float s[N], g[N], b[N];
        load<N>(s, cache + c);
        load<N>(g, gamma + c);
        load<N>(b, beta + c);
        for (int i = 0; i < N; i++) s[i] = fmaf((s[i] - mean) * rstd, g[i], b[i]);
        store<N>(y + c, s);
    }
    if (lane == 0) *mean_out = mean, *rstd_out = rstd;
}

template <class T>
__device__ inline void forward(T* y, T* sum, const T* x, const T* residual, const float* gamma, const float* beta,
                               float* mean, float* rstd, u32 rows, u32 hidden, float eps, u32 vectors,
                               const u64* example_ids, const u32* sequences, const u32* offsets, u64 key, u32 site,
                               u32 threshold, float scale) {
    u32 warp = threadIdx.x / 32, r = blockIdx.x * (blockDim.x / 32) + warp;
    if (r >= rows) return;
    float* cache = (float*)dynamic_shared() + warp * hidden;
    RowMask mask(r, hidden, example_ids, sequences, offsets, key, site, threshold, scale);
    u64 at = (u64)r * hidden;
    T* sum_row = sum ? sum + at : nullptr;
    const T* residual_row = residual ? residual + at : nullptr;
    if (vectors)
        normalize<T, VECTOR<T>>(y + at, sum_row, x + at, residual_row, gamma, beta, mean + r, rstd + r, hidden, eps, mask, cache);
    else
        normalize<T, 1>(y + at, sum_row, x + at, residual_row, gamma, beta, mean + r, rstd + r, hidden, eps, mask, cache);
}

// dy becomes the gradient of the sum, and dx that masked; where dx is null, dy becomes that. What gamma
// and beta get is added to dgamma and dbeta, in shared memory.
template <class T, int N>
__device__ inline void denormalize(T* dy, T* dx, const T* sum, float mean, float rstd, const float* gamma, u32 hidden,
                                   const RowMask& mask, float* dgamma, float* dbeta) {
    u32 lane = threadIdx.x % 32;
    float mean_d = 0.0f, mean_dn = 0.0f;
    for (u32 c = lane * N; c < hidden; c += 32 * N) {
        float s[N], d[N], g[N], dg[N], db[N];
        load<N>(s, sum + c);
        load<N>(d, dy + c);
        load<N>(g, gamma + c);
        load<N>(dg, dgamma + c);
        load<N>(db, dbeta + c);
        for (int i = 0; i < N; i++) {
            float n = (s[i] - mean) * rstd;
            dg[i] += d[i] * n;
            db[i] += d[i];
            mean_d += d[i] * g[i];
            mean_dn += d[i] * g[i] * n;
        }
        store<N>(dgamma + c, dg);
        store<N>(dbeta + c, db);
    }
    mean_d = warp_sum(mean_d) / hidden;
    mean_dn = warp_sum(mean_dn) / hidden;
    for (u32 c = lane * N; c < hidden; c += 32 * N) {
        float s[N], d[N], g[N], masked[N];
        load<N>(s, sum + c);
        load<N>(d, dy + c);
        load<N>(g, gamma + c);
        for (int i = 0; i < N; i++) {
            d[i] = rstd * (d[i] * g[i] - mean_d - (s[i] - mean) * rstd * mean_dn);
            masked[i] = mask.drops() ? d[i] * mask.factor(c + i) : d[i];
        }
        if (dx) {
            store<N>(dy + c, d);
            store<N>(dx + c, masked);
        } else {
            store<N>(dy + c, masked);
        }
    }
}

// partial [blocks, 2·hidden]: this block's gradients of gamma, then of beta.
template <class T>
__device__ inline void backward(T* dy, T* dx, const T* sum, const float* mean, const float* rstd, const float* gamma,
                                float* partial, u32 rows, u32 hidden, u32 vectors, const u64* example_ids,
                                const u32* sequences, const u32* offsets, u64 key, u32 site, u32 threshold, float scale) {
    float* sums = (float*)dynamic_shared();
    u32 warps = blockDim.x / 32, warp = threadIdx.x / 32;
    float *dgamma = sums + warp * 2 * hidden, *dbeta = dgamma + hidden;
    for (u32 c = threadIdx.x; c < warps * 2 * hidden; c += blockDim.x) sums[c] = 0.0f;
    __syncthreads();
    for (u32 r = blockIdx.x * warps + warp; r < rows; r += gridDim.x * warps) {
        RowMask mask(r, hidden, example_ids, sequences, offsets, key, site, threshold, scale);
        u64 at = (u64)r * hidden;
        T* dx_row = dx ? dx + at : nullptr;
        if (vectors)
            denormalize<T, VECTOR<T>>(dy + at, dx_row, sum + at, mean[r], rstd[r], gamma, hidden, mask, dgamma, dbeta);
        else
            denormalize<T, 1>(dy + at, dx_row, sum + at, mean[r], rstd[r], gamma, hidden, mask, dgamma, dbeta);
    }
    __syncthreads();
    for (u32 c = threadIdx.x; c < 2 * hidden; c += blockDim.x) {
        float total = 0.0f;
        for (u32 w = 0; w < warps; w++) total += sums[w * 2 * hidden + c];
        partial[(u64)blockIdx.x * 2 * hidden + c] = total;
    }
}

#define FORWARD(T, name)                                                                                               \
    extern "C" __global__ void name(T* y, T* sum, const T* x, const T* residual, const float* gamma, const float* beta, \
                                    float* mean, float* rstd, u32 rows, u32 hidden, float eps, u32 vectors,            \
                                    const u64* example_ids, const u32* sequences, const u32* offsets, u64 key,         \
                                    u32 site, u32 threshold, float scale) {                                            \
        forward(y, sum, x, residual, gamma, beta, mean, rstd, rows, hidden, eps, vectors, example_ids, sequences,      \
                offsets, key, site, threshold, scale);                                                                 \
    }                                                                                                                  \
    KERNEL(name)
FORWARD(float, forward_f32)
FORWARD(bf16, forward_bf16)

#define BACKWARD(T, name)                                                                                              \
    extern "C" __global__ void name(T* dy, T* dx, const T* sum, const float* mean, const float* rstd,                  \
                                    const float* gamma, float* partial, u32 rows, u32 hidden, u32 vectors,             \
                                    const u64* example_ids, const u32* sequences, const u32* offsets, u64 key,         \
                                    u32 site, u32 threshold, float scale) {                                            \
        backward(dy, dx, sum, mean, rstd, gamma, partial, rows, hidden, vectors, example_ids, sequences, offsets, key, \
                 site, threshold, scale);                                                                              \
    }                                                                                                                  \
    KERNEL(name)
BACKWARD(float, backward_f32)
BACKWARD(bf16, backward_bf16)
