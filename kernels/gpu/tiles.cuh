// Tiles of bf16 rows in shared memory, as the tensor cores' operands and results.

constexpr int CHUNKS = D / 8; // of 16 bytes in a row

// Tiles lie in shared memory row by row, each row's chunks in an order that lets 8 rows' same chunk
// fall on all banks.
template <int COLUMNS = D> __device__ inline bf16* at(bf16* tile, int row, int chunk) {
    return tile + row * COLUMNS + 8 * (chunk ^ (COLUMNS >= 64 ? row & 7 : row >> 1 & 3));
}

// Starts to copy `count` rows of a head, all but the first `rows` of them zeros.
__device__ inline void load(bf16* tile, const bf16* from, int count, int rows, u32 hidden, int head_dim) {
    for (int i = threadIdx.x; i < count * CHUNKS; i += blockDim.x) {
        int row = i / CHUNKS, chunk = i % CHUNKS;
        bool valid = row < rows && 8 * chunk < head_dim;
        cp_async<16>(at(tile, row, chunk), valid ? from + (u64)row * hidden + 8 * chunk : from, valid);
    }
}

// The same for one number a row.
__device__ inline void load(float* column, const float* from, int count, int rows) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) cp_async<4>(column + i, i < rows ? from + i : from, i < rows);
}

// Operands of mma from a tile of 16 rows × 16 columns at (row, 8 * chunk), for this lane. `a` and `b`
// have the tile's rows as the product's rows (a) or columns (b); transposed, its columns.
template <int COLUMNS = D>
__device__ inline void load_a(u32 (&a)[4], bf16* tile, int row, int chunk, int lane) {
    ldmatrix(a, at<COLUMNS>(tile, row + lane % 16, chunk + lane / 16));
}
template <int COLUMNS = D>
__device__ inline void load_a_transposed(u32 (&a)[4], bf16* tile, int row, int chunk, int lane) {
    ldmatrix_transposed(a, at<COLUMNS>(tile, row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
}
__device__ inline void load_b(u32 (&b)[4], bf16* tile, int row, int chunk, int lane) {
    ldmatrix(b, at(tile, row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
}
__device__ inline void load_b_transposed(u32 (&b)[4], bf16* tile, int row, int chunk, int lane) {
    ldmatrix_transposed(b, at(tile, row + lane % 16, chunk + lane / 16));
}

// c [16, 16] += a·b.
__device__ inline void multiply(float (&left)[4], float (&right)[4], const u32 (&a)[4], const u32 (&b)[4]) {
    mma(left, a, b[0], b[1]);
    mma(right, a, b[2], b[3]);
}

// Two neighbouring results [16, 8] as the operand a [16, 16] of another product.
__device__ inline void as_a(u32 (&a)[4], const float (&left)[4], const float (&right)[4]) {
    a[0] = pack_bf16(left[0], left[1]), a[1] = pack_bf16(left[2], left[3]);
    a[2] = pack_bf16(right[0], right[1]), a[3] = pack_bf16(right[2], right[3]);
}

// A warp's 16 rows, times a factor for its upper and one for its lower 8, to `to`, by way of 16 rows of
// shared memory that no other warp uses.
__device__ inline void store(bf16* to, const float (&c)[D / 8][4], float upper, float lower, bf16* tile, int first,
                             int rows, u32 hidden, int head_dim, int lane) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < D / 8; j++) {
        *(u32*)(at(tile, first + lane / 4, j) + 2 * (lane % 4)) = pack_bf16(c[j][0] * upper, c[j][1] * upper);
        *(u32*)(at(tile, first + lane / 4 + 8, j) + 2 * (lane % 4)) = pack_bf16(c[j][2] * lower, c[j][3] * lower);
    }
    __syncwarp();
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
        int row = first + i / CHUNKS, chunk = i % CHUNKS;
        if (row < rows && 8 * chunk < head_dim)
            *(uint4*)(to + (u64)row * hidden + 8 * chunk) = *(const uint4*)at(tile, row, chunk);
    }
}
