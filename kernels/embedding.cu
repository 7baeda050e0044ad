// embedding.rs on a GPU.
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

template <int N>
__device__ inline void add_row(float (&sum)[N], const float* table, const u32* ids, u32 token, u32 hidden, u32 column) {
    float v[N];
    load<N>(v, table + (u64)ids[token] * hidden + column);
    for (int i = 0; i < N; i++) sum[i] += v[i];
}

// A warp takes a token. Tables are summed in f32 and in order, from the first; null is none.
template <class T, int N>
__device__ inline void forward_row(T* y, const float* table0, const u32* ids0, const float* table1, const u32* ids1,
                                   const float* table2, const u32* ids2, const float* table3, const u32* ids3, u32 token,
                                   u32 hidden) {
    for (u32 c = threadIdx.x % 32 * N; c < hidden; c += 32 * N) {
        float sum[N];
        load<N>(sum, table0 + (u64)ids0[token] * hidden + c);
        if (table1) add_row<N>(sum, table1, ids1, token, hidden, c);
        if (table2) add_row<N>(sum, table2, ids2, token, hidden, c);
        if (table3) add_row<N>(sum, table3, ids3, token, hidden, c);
        store<N>(y + (u64)token * hidden + c, sum);
    }
}

#define FORWARD(T, name)                                                                                               \
    extern "C" __global__ void name(T* y, const float* table0, const u32* ids0, const float* table1, const u32* ids1,   \
                                    const float* table2, const u32* ids2, const float* table3, const u32* ids3,        \
                                    u32 tokens, u32 hidden, u32 vectors) {                                             \
        u32 token = (blockIdx.x * blockDim.x + threadIdx.x) / 32;                                                      \
        if (token >= tokens) return;                                                                                   \
        if (vectors)                                                                                                   \
            forward_row<T, VECTOR<T>>(y, table0, ids0, table1, ids1, table2, ids2, table3, ids3, token, hidden);       \
        else                                                                                                           \
            forward_row<T, 1>(y, table0, ids0, table1, ids1, table2, ids2, table3, ids3, token, hidden);               \
    }                                                                                                                  \
    KERNEL(name)
FORWARD(float, forward_f32)
FORWARD(bf16, forward_bf16)

// Block (i, _) sums chunk i: the rows of dy of tokens[starts[i]..starts[i + 1]], which have one id. A
// chunk that is all of its id's goes to its row of the table, others to a row of `partial`.
template <class T, int N>
__device__ inline void sum_chunk(float* dtable, float* partial, const T* dy, const u32* tokens, const u32* starts,
                                 const u32* rows, const u32* slots, u32 hidden) {
    u32 chunk = blockIdx.x, c = (blockIdx.y * blockDim.x + threadIdx.x) * N;
    if (c >= hidden) return;
    float sum[N] = {};
    for (u32 i = starts[chunk]; i < starts[chunk + 1]; i++) {
        float v[N];
        load<N>(v, dy + (u64)tokens[i] * hidden + c);
        for (int j = 0; j < N; j++) sum[j] += v[j];
    }
    u32 slot = slots[chunk];
    if (slot != 0xffffffffu) {
        store<N>(partial + (u64)slot * hidden + c, sum);
        return;
    }
    float* to = dtable + (u64)rows[chunk] * hidden + c;
    float v[N];
    load<N>(v, to);
    for (int j = 0; j < N; j++) v[j] += sum[j];
    store<N>(to, v);
}

#define BACKWARD(T, name)                                                                                              \
    extern "C" __global__ void name(float* dtable, float* partial, const T* dy, const u32* tokens, const u32* starts,  \
                                    const u32* rows, const u32* slots, u32 hidden, u32 vectors) {                      \
        if (vectors) sum_chunk<T, VECTOR<T>>(dtable, partial, dy, tokens, starts, rows, slots, hidden);                \
        else sum_chunk<T, 1>(dtable, partial, dy, tokens, starts, rows, slots, hidden);                                \
    }                                                                                                                  \
    KERNEL(name)
BACKWARD(float, backward_f32)
BACKWARD(bf16, backward_bf16)

// dtable[rows[i]] += the partial sums firsts[i]..firsts[i + 1], for block (i, _).
extern "C" __global__ void combine(float* dtable, const float* partial, const u32* rows, const u32* firsts, u32 hidden) {
    u32 i = blockIdx.x, c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= hidden) return;
    float sum = 0.0f;
#pragma unroll 8
    for (u32 slot = firsts[i]; slot < firsts[i + 1]; slot++) sum += partial[(u64)slot * hidden + c];
    dtable[(u64)rows[i] * hidden + c] += sum;
}
KERNEL(combine)
