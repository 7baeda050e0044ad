// What every kernel starts from: bf16, warp sums, the dropout mask, and the instructions that CUDA
// C++ has no name for. NVRTC needs no other header. Where the host compiles this, for tests, the
// emulator gives CUDA's own names and the twins of the instructions.

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// A brain float: the upper half of an f32.
struct bf16 {
    u16 bits;
};

#ifdef __CUDACC__
#define KERNEL(name) // the emulator's entry point; a GPU needs none

extern __shared__ uint4 dynamic_shared_memory[];

// The launch's shared memory, aligned to 16 bytes.
__device__ inline void* dynamic_shared() { return dynamic_shared_memory; }

__device__ inline u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Rounds to nearest, ties to even; the first lies lower in memory.
__device__ inline u32 pack_bf16(float first, float second) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    return packed;
}

// 2^x by the special function unit, some 2 ulp.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Starts to copy 16, 8 or 4 bytes to shared memory, or zeros where they are not valid.
template <int BYTES> __device__ inline void cp_async(void* shared, const void* global, bool valid) {
    if constexpr (BYTES == 16) // past the first-level cache
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                     "r"(valid ? 16 : 0)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                     "n"(BYTES), "r"(valid ? BYTES : 0)
                     : "memory");
}

// The copies started since the last call are one group.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all groups of this thread but the last `PENDING` are in shared memory.
template <int PENDING> __device__ inline void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8×8 tiles of bf16: lane i points to row i % 8 of tile i / 8; it gets elements 2·(i % 4) and
// the next of row i / 4 of each tile.
__device__ inline void ldmatrix(u32 (&tiles)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, of the tiles' transposes.
__device__ inline void ldmatrix_transposed(u32 (&tiles)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a·b on the tensor cores: a is 16×16, b 16×8, both bf16; c 16×8 in f32.
__device__ inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#else
#include "emulator.h"
#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) { return {(u16)pack_bf16(x, 0.0f)}; }

// The sum of all 32 lanes, in all of them, with the same bits.
__device__ inline float warp_sum(float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
    return x;
}

__device__ inline float warp_max(float x) {
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
    return x;
}

// random.rs: mix, key (continued by one more part) and bits.
__device__ inline u64 random_mix(u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

__device__ inline u64 random_key(u64 key, u64 part) { return random_mix(key ^ random_mix(part)); }

__device__ inline u32 random_bits(u64 key, u32 counter) {
    u32 x = counter * 0x9e3779b1u + (u32)key;
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    x ^= x >> 15;
    x ^= (u32)(key >> 32);
    x *= 0xd35a2d97u;
    return x ^ (x >> 15);
}

// dropout.rs's Mask, of one example. Kernels take (u64 key of seed and step, u32 site, u32 threshold,
// float scale), as `Dropout::args` gives them; threshold 0 drops nothing.
struct Mask {
    u64 key;
    u32 threshold;
    float scale;

    __device__ inline Mask(u64 seed_and_step, u64 example_id, u32 site, u32 threshold, float scale)
        : key(random_key(random_key(seed_and_step, example_id), site)), threshold(threshold), scale(scale) {}

    __device__ inline bool drops() const { return threshold > 0; }

    // Whether the example's element is not dropped.
    __device__ inline bool keeps(u32 element) const { return random_bits(key, element) >= threshold; }

    // What the example's element is multiplied by.
    __device__ inline float factor(u32 element) const { return keeps(element) ? scale : 0.0f; }
};
