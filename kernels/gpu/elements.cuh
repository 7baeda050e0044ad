// How kernels go through memory: 16 bytes at a time where the operands let them, rows with their part
// of a dropout mask, and segments of a flat buffer.

// Elements of a whole vector.
template <class T> constexpr int VECTOR = 16 / sizeof(T);

// N elements as f32. More than one are aligned to all their bytes, up to 16.
template <int N> __device__ inline void load(float (&x)[N], const float* p) {
    if constexpr (N % 4 == 0) {
        for (int i = 0; i < N; i += 4) {
            float4 v = *(const float4*)(p + i);
            x[i] = v.x, x[i + 1] = v.y, x[i + 2] = v.z, x[i + 3] = v.w;
        }
    } else {
        for (int i = 0; i < N; i++) x[i] = p[i];
    }
}

__device__ inline void unpack(float* x, u32 pair) {
    x[0] = __uint_as_float(pair << 16);
    x[1] = __uint_as_float(pair & 0xffff0000u);
}

template <int N> __device__ inline void load(float (&x)[N], const bf16* p) {
    if constexpr (N == 8) {
        uint4 v = *(const uint4*)p;
        unpack(x, v.x), unpack(x + 2, v.y), unpack(x + 4, v.z), unpack(x + 6, v.w);
    } else {
        for (int i = 0; i < N; i++) x[i] = to_float(p[i]);
    }
}

// Compilers cut an assignment into its parts, and do not always put them together again.
#ifdef __CUDACC__
__device__ inline void store_vector(void* p, u32 x, u32 y, u32 z, u32 w) {
    asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
__device__ inline void store_vector(void* p, u32 x, u32 y) {
    asm volatile("st.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(x), "r"(y) : "memory");
}
#else
inline void store_vector(void* p, u32 x, u32 y, u32 z, u32 w) { *(uint4*)p = make_uint4(x, y, z, w); }
inline void store_vector(void* p, u32 x, u32 y) { *(uint2*)p = make_uint2(x, y); }
#endif

template <int N> __device__ inline void store(float* p, const float (&x)[N]) {
    if constexpr (N % 4 == 0) {
        for (int i = 0; i < N; i += 4)
            store_vector(p + i, __float_as_uint(x[i]), __float_as_uint(x[i + 1]), __float_as_uint(x[i + 2]),
                         __float_as_uint(x[i + 3]));
    } else {
        for (int i = 0; i < N; i++) p[i] = x[i];
    }
}

template <int N> __device__ inline void store(bf16* p, const float (&x)[N]) {
    if constexpr (N == 8) {
        store_vector(p, pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
    } else if constexpr (N == 4) {
        store_vector(p, pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
    } else {
        for (int i = 0; i < N; i++) p[i] = from_float<bf16>(x[i]);
    }
}

template <int N> struct Width {
    static constexpr int value = N;
};

// Calls f(first element, Width) until all of n are done, by all threads of the grid. `vectors` says
// that the operands are aligned to 16 bytes.
template <class T, class F> __device__ inline void each(u64 n, u32 vectors, F f) {
    u64 thread = blockIdx.x * (u64)blockDim.x + threadIdx.x, threads = gridDim.x * (u64)blockDim.x;
    u64 whole = vectors ? n / VECTOR<T> : 0;
    for (u64 i = thread; i < whole; i += threads) f(i * VECTOR<T>, Width<VECTOR<T>>());
    for (u64 i = whole * VECTOR<T> + thread; i < n; i += threads) f(i, Width<1>());
}

// A row's part of a dropout mask.
struct RowMask {
    Mask mask;
    u32 first; // the row's first element, in its example

    __device__ inline RowMask(u32 row, u32 columns, const u64* example_ids, const u32* sequences, const u32* offsets,
                              u64 key, u32 site, u32 threshold, float scale)
        : mask(key, threshold ? example_ids[sequences[row]] : 0, site, threshold, scale),
          first(threshold ? (row - offsets[sequences[row]]) * columns : 0) {}

    __device__ inline bool drops() const { return mask.drops(); }
    __device__ inline float factor(u32 column) const { return mask.factor(first + column); }
};

// Elements of a flat buffer that a block goes through.
[[maybe_unused]] constexpr u32 CHUNK = 8192;

// Calls f(first element, Width, segment) until this block's chunk of its segment is done. Segment i
// is bounds[2 i] to bounds[2 i + 1] and begins at block first_blocks[i]; chunks begin at multiples of
// 4, so that all but its ends go by fours.
template <class F>
__device__ inline void each_of_segment(const u32* first_blocks, const u64* bounds, u32 segments, F f) {
    u32 low = 0, high = segments; // first_blocks[low] <= blockIdx.x < first_blocks[high]
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (first_blocks[middle] <= blockIdx.x) low = middle;
        else high = middle;
    }
    u64 start = bounds[2 * low], end = bounds[2 * low + 1];
    u64 first = start / 4 * 4 + (u64)(blockIdx.x - first_blocks[low]) * CHUNK;
    for (u64 i = first + 4 * threadIdx.x; i < first + CHUNK && i < end; i += 4 * blockDim.x) {
        if (i >= start && i + 4 <= end) {
            f(i, Width<4>(), low);
        } else {
            for (u64 e = i < start ? start : i; e < i + 4 && e < end; e++) f(e, Width<1>(), low);
        }
    }
}
