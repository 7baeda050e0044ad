// Softmax attention over packed sequences without tensor cores, which have no f32: f32 in and between,
// and bf16 for heads that attention.cu has no registers for. The tiles are attention.cu's, smaller;
// dq always has a pass of its own.
//
// A thread has 4 rows of a product, and every sixteenth column: each product reads 4 + columns numbers of
// shared memory for 4 · columns multiplications.
#include "gpu/device.cuh"
#include "gpu/attention.cuh"

using T = ELEMENT;
constexpr int TILE = D <= 128 ? 32 : 16; // queries and keys
constexpr int THREADS = 4 * TILE;
constexpr int PITCH = D + 4;     // of rows in shared memory: 8 rows' same 16 bytes fall on all banks
constexpr int SCORES = TILE + 1; // of rows of scores
constexpr int SCORE_COLUMNS = TILE / 16, COLUMNS = D / 16;

// Copies a tile of a head, in f32, with zeros past its rows and columns.
__device__ inline void load(float* tile, const T* from, int rows, u32 hidden, int head_dim) {
    struct alignas(4 * sizeof(T)) Four {
        T x[4];
    };
    for (int i = threadIdx.x; i < TILE * (D / 4); i += THREADS) {
        int row = i / (D / 4), column = i % (D / 4) * 4;
        float4 to = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (row < rows && column < head_dim) {
            const Four x = *(const Four*)(from + (u64)row * hidden + column);
            to = make_float4(to_float(x.x[0]), to_float(x.x[1]), to_float(x.x[2]), to_float(x.x[3]));
        }
        *(float4*)(tile + row * PITCH + column) = to;
    }
}

// c += a·bᵀ for tiles of rows; `a` begins at the thread's first row, `b` at its first column's row.
__device__ inline void multiply_rows(float (&c)[4][SCORE_COLUMNS], const float* a, const float* b) {
#pragma unroll 4
    for (int d = 0; d < D; d += 4) {
        float4 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = *(const float4*)(a + i * PITCH + d);
#pragma unroll
        for (int j = 0; j < SCORE_COLUMNS; j++) {
            const float4 y = *(const float4*)(b + 16 * j * PITCH + d);
#pragma unroll
            for (int i = 0; i < 4; i++)
                c[i][j] = fmaf(x[i].w, y.w, fmaf(x[i].z, y.z, fmaf(x[i].y, y.y, fmaf(x[i].x, y.x, c[i][j]))));
        }
    }
}

// c += a·b for scores a, whose rows and columns are so far apart, and a tile of rows b.
__device__ inline void multiply(float (&c)[4][COLUMNS], const float* a, int a_row, int a_column, const float* b) {
#pragma unroll 4
    for (int k = 0; k < TILE; k++) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = a[i * a_row + k * a_column];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            const float y = b[k * PITCH + 16 * j];
#pragma unroll
            for (int i = 0; i < 4; i++) c[i][j] = fmaf(x[i], y, c[i][j]);
        }
    }
}

// A thread's part of 4 rows, of which the tile has `rows`.
__device__ inline void store(T* to, const float (&c)[4][COLUMNS], int row, int column, int rows, u32 hidden,
                             int head_dim) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
            if (row + i < rows && column + 16 * j < head_dim)
                to[(u64)(row + i) * hidden + column + 16 * j] = from_float<T>(c[i][j]);
}

// Shared memory: q and k or v [TILE, PITCH], probabilities [TILE, SCORES].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward(T* out, float* lse, const T* q, const T* k, const T* v, TASK_PARAMETERS) {
    const Task task(offsets, tiles, firsts, rows, head_dim);
    const Mask mask(dropout_key, example_ids[task.sequence], site, threshold, dropout_scale);
    const u32 hidden = task.hidden;
    const int keys = task.keys, first = task.tile * TILE, queries = task.queries - first;
    const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16;
    float *q_tile = (float*)dynamic_shared(), *kv_tile = q_tile + TILE * PITCH, *p_tile = kv_tile + TILE * PITCH;
    load(q_tile, q + task.query(first), queries, hidden, head_dim);

    float o[4][COLUMNS] = {}, greatest[4], sum[4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) greatest[i] = minus_infinity();
    for (int start = 0; start < keys; start += TILE) {
        load(kv_tile, k + task.key(start), keys - start, hidden, head_dim);
        __syncthreads();
        float s[4][SCORE_COLUMNS] = {};
        multiply_rows(s, q_tile + row * PITCH, kv_tile + column * PITCH);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float top = greatest[i];
#pragma unroll
            for (int j = 0; j < SCORE_COLUMNS; j++) {
                s[i][j] = start + column + 16 * j < keys ? s[i][j] * scale : minus_infinity();
                top = fmaxf(top, s[i][j]);
            }
            for (int step = 8; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, step));
            float keep = expf(greatest[i] - top);
            greatest[i] = top;
            sum[i] *= keep;
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) o[i][j] *= keep;
#pragma unroll
            for (int j = 0; j < SCORE_COLUMNS; j++) {
                int key = column + 16 * j;
                float p = expf(s[i][j] - top);
                sum[i] += p;
                if (mask.drops()) p *= mask.factor(task.element(first + row + i) + start + key);
                p_tile[(row + i) * SCORES + key] = p;
            }
        }
        __syncthreads();
        load(kv_tile, v + task.key(start), keys - start, hidden, head_dim);
        __syncthreads();
        multiply(o, p_tile + row * SCORES, SCORES, 1, kv_tile + column);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        for (int step = 8; step > 0; step /= 2) sum[i] += __shfl_xor_sync(0xffffffff, sum[i], step);
        if (column == 0 && row + i < queries) lse[task.lse() + first + row + i] = greatest[i] + logf(sum[i]);
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) o[i][j] /= sum[i];
    }
    store(out + task.query(first), o, row, column, queries, hidden, head_dim);
}
KERNEL(forward)

extern "C" __global__ void dots(float* dots, const T* out, const T* dout, u32 rows, int head_dim) {
    attention_dots(dots, out, dout, rows, head_dim);
}
KERNEL(dots)

// What backward's passes share: tiles of queries and keys → the masked probabilities and ds, the gradient of
// q·kᵀ, in shared memory [TILE, SCORES].
struct Backward {
    const Task task;
    const Mask mask;
    const float *lse, *dots;
    const float scale;
    const int row, column; // of scores, the thread's first
    float *q, *dout, *k, *v, *p, *ds;

    __device__ Backward(const Task& task, const Mask& mask, const float* lse, const float* dots, float scale)
        : task(task), mask(mask), lse(lse + task.lse()), dots(dots + task.lse()), scale(scale),
          row(threadIdx.x / 16 * 4), column(threadIdx.x % 16), q((float*)dynamic_shared()), dout(q + TILE * PITCH), k(dout + TILE * PITCH),
          v(k + TILE * PITCH), p(v + TILE * PITCH), ds(p + TILE * SCORES) {}

    // Queries past the end have zeros for q, dout, lse and dots: they give p = 1 and ds = 0, and add nothing.
    __device__ void probabilities(int first_query, int first_key) {
        float s[4][SCORE_COLUMNS] = {}, dp[4][SCORE_COLUMNS] = {};
        multiply_rows(s, q + row * PITCH, k + column * PITCH);
        multiply_rows(dp, dout + row * PITCH, v + column * PITCH);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int query = first_query + row + i;
            float row_lse = query < task.queries ? lse[query] : 0.0f, dot = query < task.queries ? dots[query] : 0.0f;
#pragma unroll
            for (int j = 0; j < SCORE_COLUMNS; j++) {
                int key = first_key + column + 16 * j, at = (row + i) * SCORES + column + 16 * j;
                float e = key < task.keys ? expf(fmaf(s[i][j], scale, -row_lse)) : 0.0f;
                float factor = mask.drops() ? mask.factor(task.element(query) + key) : 1.0f;
                p[at] = e * factor;
                ds[at] = scale * e * fmaf(dp[i][j], factor, -dot);
            }
        }
    }
};

// dk and dv of a tile of keys.
//
// Shared memory, here and in the next: q, dout, k, v [TILE, PITCH], p, ds [TILE, SCORES].
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_keys(T* dk, T* dv, const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* dots, TASK_PARAMETERS) {
    const Task task(offsets, tiles, firsts, rows, head_dim);
    const Mask mask(dropout_key, example_ids[task.sequence], site, threshold, dropout_scale);
    Backward b(task, mask, lse, dots, scale);
    const u32 hidden = task.hidden;
    const int first = task.tile * TILE, keys = task.keys - first;
    const u64 key = task.key(first);
    load(b.k, k + key, keys, hidden, head_dim);
    load(b.v, v + key, keys, hidden, head_dim);
    float dk_sum[4][COLUMNS] = {}, dv_sum[4][COLUMNS] = {};
    for (int start = 0; start < task.queries; start += TILE) {
        load(b.q, q + task.query(start), task.queries - start, hidden, head_dim);
        load(b.dout, dout + task.query(start), task.queries - start, hidden, head_dim);
        __syncthreads();
        b.probabilities(start, first);
        __syncthreads();
        multiply(dv_sum, b.p + b.row, 1, SCORES, b.dout + b.column);
        multiply(dk_sum, b.ds + b.row, 1, SCORES, b.q + b.column);
        __syncthreads();
    }
    store(dk + key, dk_sum, b.row, b.column, keys, hidden, head_dim);
    store(dv + key, dv_sum, b.row, b.column, keys, hidden, head_dim);
}
KERNEL(backward_keys)

// dq of a tile of queries.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_queries(T* dq, const T* q, const T* k, const T* v, const T* dout, const float* lse, const float* dots, TASK_PARAMETERS) {
    const Task task(offsets, tiles, firsts, rows, head_dim);
    const Mask mask(dropout_key, example_ids[task.sequence], site, threshold, dropout_scale);
    Backward b(task, mask, lse, dots, scale);
    const u32 hidden = task.hidden;
    const int first = task.tile * TILE, queries = task.queries - first;
    const u64 query = task.query(first);
    load(b.q, q + query, queries, hidden, head_dim);
    load(b.dout, dout + query, queries, hidden, head_dim);
    float dq_sum[4][COLUMNS] = {};
    for (int start = 0; start < task.keys; start += TILE) {
        load(b.k, k + task.key(start), task.keys - start, hidden, head_dim);
        load(b.v, v + task.key(start), task.keys - start, hidden, head_dim);
        __syncthreads();
        b.probabilities(first, start);
        __syncthreads();
        multiply(dq_sum, b.ds + b.row * SCORES, SCORES, 1, b.k + b.column);
        __syncthreads();
    }
    store(dq + query, dq_sum, b.row, b.column, queries, hidden, head_dim);
}
KERNEL(backward_queries)
