// Softmax attention over packed sequences on the tensor cores: bf16 in and out, f32 between.
//
// The tiles are FlashAttention-2's (Dao 2023): a block has some queries of one head of one sequence and
// goes over the keys with an online softmax; backward makes the probabilities again from lse. Its block
// has some keys and goes over the queries, which gives dk and dv. Where a sequence's keys fit one
// block, so do all of dq's terms, and it is made there; a longer one gets it in a second pass, over
// tiles of queries. That makes 7 products of 5, where FlashAttention-2 adds to dq in f32 by atomics: here
// the bits are the same every time, and no f32 copy of dq is written and read.
//
// What limits it on an H100, by its data sheet and the instructions (nothing here is measured): 3.35 TB/s, which is 14
// bytes a clock and SM; 128 bytes of shared memory, 64 integer operations and some 2500 FLOP of mma.sync a clock
// and SM. At head_dim 64, for a head of a sequence:
// - length 128: forward moves 64 KiB, 4500 clocks, for 4.2 MFLOP, 1700; backward 144 KiB with the dots,
//   10200 clocks, for 10.5 MFLOP, 4200. Memory binds: each byte is read once, by one block, and 16 warps of an
//   SM (128 registers a thread, two blocks of 56 KiB) overlap one block's loads with another's products.
// - length 512: 67 MFLOP for 256 KiB; products bind. A warp of 16 queries reads a byte of k or v in shared memory for
//   16 FLOP: 2048 FLOP a clock, a little below the tensor cores. 32 queries a warp would halve that, with
//   231 registers a thread and 8 warps on an SM, which length 128 cannot spare.
// - dropout's hash, the CPU's to the bit, is some 8 integer operations a score besides its
//   multiplications: 2000 clocks at length 128, hidden; 33000 at length 512, as long as the products.
#include "gpu/device.cuh"
#include "gpu/attention.cuh"
#include "gpu/tiles.cuh"

constexpr int KEYS = 64;                  // forward's keys in shared memory at a time, twice
constexpr int QUERIES = 32;               // backward's queries in shared memory at a time, twice
constexpr int QUERY_KEYS = 32;            // the second pass's keys in shared memory at a time, twice
constexpr int THREADS = D <= 64 ? 256 : 128; // most of a block
constexpr int MIN_BLOCKS = D <= 64 ? 2 : 1;  // 128 registers a thread, for 16 warps on an SM
constexpr u32 ALL = 0xffffffff;
constexpr float LOG2E = 1.4426950408889634f;

__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

__device__ inline int round_up(int x, int to) { return (x + to - 1) / to * to; }

// Shared memory: q [tile, D], k and v [key_rows, D]: as many as the longest sequence has, rounded up to 16, and
// at most 2 · KEYS. Here and below, tile = threads / 2: a warp has 16 rows.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    forward(bf16* out, float* lse, const bf16* q, const bf16* k, const bf16* v, u32 key_rows, TASK_PARAMETERS) {
    const Task task(offsets, tiles, firsts, rows, head_dim);
    const Mask mask(dropout_key, example_ids[task.sequence], site, threshold, dropout_scale);
    const u32 hidden = task.hidden;
    const int keys = task.keys, tile = blockDim.x / 2, first = task.tile * tile;
    const int queries = min(task.queries - first, tile);
    const int warp_first = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
    const float to_exponent = scale * LOG2E;
    bf16 *q_tile = (bf16*)dynamic_shared(), *k_tiles = q_tile + tile * D, *v_tiles = k_tiles + key_rows * D;

    auto load_keys = [&](int start, int stage) {
        int left = keys - start, count = min(KEYS, round_up(left, 16));
        load(k_tiles + stage * KEYS * D, k + task.key(start), count, left, hidden, head_dim);
        load(v_tiles + stage * KEYS * D, v + task.key(start), count, left, hidden, head_dim);
        cp_async_commit();
    };
    load(q_tile, q + task.query(first), round_up(queries, 16), queries, hidden, head_dim);
    load_keys(0, 0);

    u32 q_operand[D / 16][4];
    float o[D / 8][4] = {}, greatest[2] = {minus_infinity(), minus_infinity()}, sum[2] = {};
    for (int start = 0, stage = 0; start < keys; start += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (start + KEYS < keys) load_keys(start + KEYS, stage ^ 1);
        if (warp_first >= queries) continue;
        if (start == 0) {
#pragma unroll
            for (int c = 0; c < D / 16; c++) load_a(q_operand[c], q_tile, warp_first, 2 * c, lane);
        }
        bf16 *k_tile = k_tiles + stage * KEYS * D, *v_tile = v_tiles + stage * KEYS * D;

        float s[KEYS / 8][4] = {}; // scores, then probabilities times the row's sum
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            if (start + 16 * n >= keys) continue;
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                u32 b[4];
                load_b(b, k_tile, 16 * n, 2 * c, lane);
                multiply(s[2 * n], s[2 * n + 1], q_operand[c], b);
            }
        }
        if (start + KEYS > keys) {
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (start + 8 * j + 2 * (lane % 4) + i % 2 >= keys) s[j][i] = minus_infinity();
        }
#pragma unroll
        for (int half = 0; half < 2; half++) { // a lane has row lane / 4 of 16, and the one 8 below
            float top = greatest[half];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) top = fmaxf(top, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
            top = quad_max(top);
            float keep = exp2_fast((greatest[half] - top) * to_exponent), shift = top * to_exponent;
            greatest[half] = top;
            sum[half] *= keep;
#pragma unroll
            for (int j = 0; j < D / 8; j++) o[j][2 * half] *= keep, o[j][2 * half + 1] *= keep;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) {
                    s[j][i] = exp2_fast(fmaf(s[j][i], to_exponent, -shift));
                    sum[half] += s[j][i];
                }
        }
        if (mask.drops()) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 element = task.element(first + warp_first + lane / 4 + 8 * half) + start + 2 * (lane % 4);
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
                    for (int i = 0; i < 2; i++) s[j][2 * half + i] *= mask.factor(element + 8 * j + i);
            }
        }
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            if (start + 16 * n >= keys) continue;
            u32 p[4];
            as_a(p, s[2 * n], s[2 * n + 1]);
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                u32 b[4];
                load_b_transposed(b, v_tile, 16 * n, 2 * c, lane);
                multiply(o[2 * c], o[2 * c + 1], p, b);
            }
        }
    }
    if (warp_first >= queries) return;
    float upper = quad_sum(sum[0]), lower = quad_sum(sum[1]);
    if (lane % 4 == 0) {
        int row = warp_first + lane / 4;
        lse += task.lse() + first + row;
        if (row < queries) lse[0] = greatest[0] * scale + logf(upper);
        if (row + 8 < queries) lse[8] = greatest[1] * scale + logf(lower);
    }
    store(out + task.query(first), o, 1.0f / upper, 1.0f / lower, q_tile, warp_first, queries, hidden, head_dim, lane);
}
KERNEL(forward)

extern "C" __global__ void dots(float* dots, const bf16* out, const bf16* dout, u32 rows, int head_dim) {
    attention_dots(dots, out, dout, rows, head_dim);
}
KERNEL(dots)

// dk and dv of a tile of keys, and dq where the tile is the whole sequence. Products are made with keys as their
// rows, so that the probabilities come out as the operands that dk and dv take.
//
// Shared memory: k, v [tile, D], q, dout [2][QUERIES, D], ds [tile, QUERIES], lse, dots [2][QUERIES].
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    backward_keys(bf16* dq, bf16* dk, bf16* dv, const bf16* q, const bf16* k, const bf16* v, const bf16* dout,
                       const float* lse, const float* dots, TASK_PARAMETERS) {
    const Task task(offsets, tiles, firsts, rows, head_dim);
    const Mask mask(dropout_key, example_ids[task.sequence], site, threshold, dropout_scale);
    const u32 hidden = task.hidden;
    const int tile = blockDim.x / 2, first = task.tile * tile, keys = min(task.keys - first, tile);
    const int queries = task.queries;
    const int warp = threadIdx.x / 32, warp_first = 16 * warp, lane = threadIdx.x % 32;
    const float to_exponent = scale * LOG2E;
    bf16 *k_tile = (bf16*)dynamic_shared(), *v_tile = k_tile + tile * D, *q_tiles = v_tile + tile * D,
         *dout_tiles = q_tiles + 2 * QUERIES * D, *ds_tile = dout_tiles + 2 * QUERIES * D;
    float *lse_tiles = (float*)(ds_tile + tile * QUERIES), *dots_tiles = lse_tiles + 2 * QUERIES;

    auto load_queries = [&](int start, int stage) {
        int left = queries - start;
        load(q_tiles + stage * QUERIES * D, q + task.query(start), QUERIES, left, hidden, head_dim);
        load(dout_tiles + stage * QUERIES * D, dout + task.query(start), QUERIES, left, hidden, head_dim);
        load(lse_tiles + stage * QUERIES, lse + task.lse() + start, QUERIES, left);
        load(dots_tiles + stage * QUERIES, dots + task.lse() + start, QUERIES, left);
        cp_async_commit();
    };
    load(k_tile, k + task.key(first), round_up(keys, 16), keys, hidden, head_dim);
    load(v_tile, v + task.key(first), round_up(keys, 16), keys, hidden, head_dim);
    load_queries(0, 0);

    const bool works = warp_first < keys;
    float dk_sum[D / 8][4] = {}, dv_sum[D / 8][4] = {};
    for (int start = 0, stage = 0; start < queries; start += QUERIES, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (start + QUERIES < queries) load_queries(start + QUERIES, stage ^ 1);
        bf16 *q_tile = q_tiles + stage * QUERIES * D, *dout_tile = dout_tiles + stage * QUERIES * D;
        if (works) {
            float p[QUERIES / 8][4] = {}, ds[QUERIES / 8][4] = {}; // first q·kᵀ and dout·vᵀ, both transposed
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                u32 a[4], b[4];
                load_a(a, k_tile, warp_first, 2 * c, lane);
#pragma unroll
                for (int n = 0; n < QUERIES / 16; n++) {
                    load_b(b, q_tile, 16 * n, 2 * c, lane);
                    multiply(p[2 * n], p[2 * n + 1], a, b);
                }
                load_a(a, v_tile, warp_first, 2 * c, lane);
#pragma unroll
                for (int n = 0; n < QUERIES / 16; n++) {
                    load_b(b, dout_tile, 16 * n, 2 * c, lane);
                    multiply(ds[2 * n], ds[2 * n + 1], a, b);
                }
            }
            const int key = warp_first + lane / 4, query = 2 * (lane % 4);
            u32 kept = ALL; // a bit for each of the lane's probabilities
            if (mask.drops()) {
                kept = 0;
#pragma unroll
                for (int j = 0; j < QUERIES / 8; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        u32 element = task.element(start + query + 8 * j + i % 2) + first + key + i / 2 * 8;
                        kept |= (u32)mask.keeps(element) << (4 * j + i);
                    }
            }
            // Queries past the end have zeros for q, dout, lse and dots: they give p = 1 and ds = 0, and add nothing.
#pragma unroll
            for (int j = 0; j < QUERIES / 8; j++) {
                const float2 lse = *(const float2*)(lse_tiles + stage * QUERIES + 8 * j + query);
                const float2 dot = *(const float2*)(dots_tiles + stage * QUERIES + 8 * j + query);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float exponent = fmaf(p[j][i], to_exponent, -LOG2E * (i % 2 ? lse.y : lse.x));
                    float e = key + i / 2 * 8 < keys ? exp2_fast(exponent) : 0.0f;
                    float factor = kept >> (4 * j + i) & 1 ? mask.scale : 0.0f;
                    ds[j][i] = e * (__fmul_rn(ds[j][i], factor) - (i % 2 ? dot.y : dot.x));
                    p[j][i] = e * factor;
                }
            }
#pragma unroll
            for (int n = 0; n < QUERIES / 16; n++) {
                u32 p_operand[4], ds_operand[4], b[4];
                as_a(p_operand, p[2 * n], p[2 * n + 1]);
                as_a(ds_operand, ds[2 * n], ds[2 * n + 1]);
#pragma unroll
                for (int c = 0; c < D / 16; c++) {
                    load_b_transposed(b, dout_tile, 16 * n, 2 * c, lane);
                    multiply(dv_sum[2 * c], dv_sum[2 * c + 1], p_operand, b);
                    load_b_transposed(b, q_tile, 16 * n, 2 * c, lane);
                    multiply(dk_sum[2 * c], dk_sum[2 * c + 1], ds_operand, b);
                }
                if (task.keys <= tile) { // a result's four parts lie in the operand's order
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        bf16* pair = at<QUERIES>(ds_tile, warp_first + lane / 4 + i % 2 * 8, 2 * n + i / 2) + 2 * (lane % 4);
                        *(u32*)pair = ds_operand[i];
                    }
                }
            }
        }
        if (task.keys > tile) continue;
        __syncthreads();
        // dq of these queries: 16 × 16 of it at a time for a warp.
        for (int unit = warp; unit < QUERIES / 16 * (D / 16); unit += blockDim.x / 32) {
            int row = unit % (QUERIES / 16) * 16, chunk = unit / (QUERIES / 16) * 2;
            if (start + row >= queries) continue;
            float sum[2][4] = {};
#pragma unroll 2
            for (int key = 0; key < keys; key += 16) {
                u32 a[4], b[4];
                load_a_transposed<QUERIES>(a, ds_tile, key, row / 8, lane);
                load_b_transposed(b, k_tile, key, chunk, lane);
                multiply(sum[0], sum[1], a, b);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int query = start + row + lane / 4 + i % 2 * 8, column = 8 * (chunk + i / 2);
                if (query < queries && column < head_dim)
                    *(u32*)(dq + task.query(query) + column + 2 * (lane % 4)) =
                        pack_bf16(sum[i / 2][i % 2 * 2] * scale, sum[i / 2][i % 2 * 2 + 1] * scale);
            }
        }
    }
    __syncthreads(); // the tiles are used for the results
    if (!works) return;
    store(dk + task.key(first), dk_sum, scale, scale, k_tile, warp_first, keys, hidden, head_dim, lane);
    store(dv + task.key(first), dv_sum, 1.0f, 1.0f, v_tile, warp_first, keys, hidden, head_dim, lane);
}
KERNEL(backward_keys)

// dq of a tile of queries, for sequences of more keys than a tile: by the sums of the pass over keys in their order,
// so that the bits are the same for any tile.
//
// Shared memory: q, dout [tile, D], k, v [2][QUERY_KEYS, D].
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    backward_queries(bf16* dq, const bf16* q, const bf16* k, const bf16* v, const bf16* dout, const float* lse,
                          const float* dots, TASK_PARAMETERS) {
    const Task task(offsets, tiles, firsts, rows, head_dim);
    const Mask mask(dropout_key, example_ids[task.sequence], site, threshold, dropout_scale);
    const u32 hidden = task.hidden;
    const int keys = task.keys, tile = blockDim.x / 2, first = task.tile * tile;
    const int queries = min(task.queries - first, tile), warp_first = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
    const float to_exponent = scale * LOG2E;
    if (keys <= tile) return; // the pass over keys made it
    bf16 *q_tile = (bf16*)dynamic_shared(), *dout_tile = q_tile + tile * D, *k_tiles = dout_tile + tile * D,
         *v_tiles = k_tiles + 2 * QUERY_KEYS * D;

    auto load_keys = [&](int start, int stage) {
        load(k_tiles + stage * QUERY_KEYS * D, k + task.key(start), QUERY_KEYS, keys - start, hidden, head_dim);
        load(v_tiles + stage * QUERY_KEYS * D, v + task.key(start), QUERY_KEYS, keys - start, hidden, head_dim);
        cp_async_commit();
    };
    load(q_tile, q + task.query(first), round_up(queries, 16), queries, hidden, head_dim);
    load(dout_tile, dout + task.query(first), round_up(queries, 16), queries, hidden, head_dim);
    load_keys(0, 0);

    float row_lse[2] = {}, row_dot[2] = {}, dq_sum[D / 8][4] = {};
    u32 element[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = warp_first + lane / 4 + 8 * half;
        u32 at = task.lse() + first + row;
        if (row < queries) row_lse[half] = lse[at], row_dot[half] = dots[at];
        element[half] = task.element(first + row);
    }
    for (int start = 0, stage = 0; start < keys; start += QUERY_KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (start + QUERY_KEYS < keys) load_keys(start + QUERY_KEYS, stage ^ 1);
        if (warp_first >= queries) continue;
        bf16 *k_tile = k_tiles + stage * QUERY_KEYS * D, *v_tile = v_tiles + stage * QUERY_KEYS * D;
        float s[QUERY_KEYS / 8][4] = {}, ds[QUERY_KEYS / 8][4] = {};
#pragma unroll
        for (int c = 0; c < D / 16; c++) {
            u32 a[4], b[4];
            load_a(a, q_tile, warp_first, 2 * c, lane);
#pragma unroll
            for (int n = 0; n < QUERY_KEYS / 16; n++) {
                load_b(b, k_tile, 16 * n, 2 * c, lane);
                multiply(s[2 * n], s[2 * n + 1], a, b);
            }
            load_a(a, dout_tile, warp_first, 2 * c, lane);
#pragma unroll
            for (int n = 0; n < QUERY_KEYS / 16; n++) {
                load_b(b, v_tile, 16 * n, 2 * c, lane);
                multiply(ds[2 * n], ds[2 * n + 1], a, b);
            }
        }
        const int key = start + 2 * (lane % 4);
        if (mask.drops()) {
#pragma unroll
            for (int j = 0; j < QUERY_KEYS / 8; j++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    ds[j][i] = __fmul_rn(ds[j][i], mask.factor(element[i / 2] + key + 8 * j + i % 2));
        }
#pragma unroll
        for (int j = 0; j < QUERY_KEYS / 8; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float exponent = fmaf(s[j][i], to_exponent, -LOG2E * row_lse[i / 2]);
                float p = key + 8 * j + i % 2 < keys ? exp2_fast(exponent) : 0.0f;
                ds[j][i] = p * (ds[j][i] - row_dot[i / 2]);
            }
#pragma unroll
        for (int n = 0; n < QUERY_KEYS / 16; n++) {
            u32 a[4], b[4];
            as_a(a, ds[2 * n], ds[2 * n + 1]);
#pragma unroll
            for (int c = 0; c < D / 16; c++) {
                load_b_transposed(b, k_tile, 16 * n, 2 * c, lane);
                multiply(dq_sum[2 * c], dq_sum[2 * c + 1], a, b);
            }
        }
    }
    if (warp_first >= queries) return;
    store(dq + task.query(first), dq_sum, scale, scale, q_tile, warp_first, queries, hidden, head_dim, lane);
}
KERNEL(backward_queries)
