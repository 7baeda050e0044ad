// What both attention sources share: which head of which sequence a block works on, and the dots.

// Each dtype and head dimension is a module of its own, so that only those in use are compiled. A
// module's head dimension is what registers and shared memory are made for; a lesser one is filled with
// zeros.
constexpr int D = HEAD_DIM;

__device__ inline float minus_infinity() { return __uint_as_float(0xff800000); }

// What kernels take last, all but the dots.
#define TASK_PARAMETERS                                                                                                \
    const u32 *offsets, const u64 *example_ids, const uint4 *tiles, u32 firsts, u32 rows, int head_dim, float scale,   \
        u64 dropout_key, u32 site, u32 threshold, float dropout_scale

// blockIdx.y is the head; blockIdx.x the entry (sequence, tile, first row, end) in `tiles`, or where there is no
// table the sequence, whose first tile it is: then only first tokens ask.
struct Task {
    u32 sequence, tile, head, hidden, column; // this head's columns begin there
    int queries, keys;                        // of the whole sequence
    u32 first_query, first_key;               // its first row in q, and in k and v
    u32 rows;                                 // of q

    // `firsts`: q has one row a sequence.
    __device__ Task(const u32* offsets, const uint4* tiles, bool firsts, u32 rows, int head_dim)
        : head(blockIdx.y), hidden(gridDim.y * head_dim), column(head * head_dim), rows(rows) {
        const u32 x = blockIdx.x;
        const uint4 entry = tiles ? tiles[x] : make_uint4(x, 0, offsets[x], offsets[x + 1]);
        sequence = entry.x, tile = entry.y, first_key = entry.z;
        keys = entry.w - entry.z;
        queries = firsts ? 1 : keys;
        first_query = firsts ? sequence : first_key;
    }

    // Where its first query is in lse and dots.
    __device__ u32 lse() const { return head * rows + first_query; }

    // Where this head of a query is in q, and of a key in k and v.
    __device__ u64 query(int i) const { return (u64)(first_query + i) * hidden + column; }
    __device__ u64 key(int i) const { return (u64)(first_key + i) * hidden + column; }

    // The number, in its example, of the probability of this query and key 0; past 2³² it wraps.
    __device__ u32 element(int query) const { return (head * keys + query) * keys; }
};

// dots[head, row] = out·dout, which is Σ p·dp of each softmax. D / 8 lanes take a row; blockIdx.y is the head.
template <class T>
__device__ inline void attention_dots(float* dots, const T* out, const T* dout, u32 rows, int head_dim) {
    struct alignas(16) Eight {
        T x[8];
    };
    constexpr int LANES = D / 8;
    const u32 head = blockIdx.y, row = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    const int column = threadIdx.x % LANES * 8;
    float sum = 0.0f;
    if (row < rows && column < head_dim) {
        u64 at = ((u64)row * gridDim.y + head) * head_dim + column;
        const Eight a = *(const Eight*)(out + at), b = *(const Eight*)(dout + at);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += to_float(a.x[i]) * to_float(b.x[i]);
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (row < rows && column == 0) dots[(u64)head * rows + row] = sum;
}
