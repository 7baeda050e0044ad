// CUDA's own names on the CPU, and the twins of device.cuh's instructions.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static // blocks run one after another
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

inline void* dynamic_shared() { return emulator::shared_start; }

inline void __syncthreads() {
    int none = 0;
    emulator::block_collective("__syncthreads", none, [](auto&) {});
}
inline int __syncthreads_count(int predicate) {
    emulator::block_collective("__syncthreads_count", predicate, [](auto& all) {
        int count = 0;
        for (int* p : all) count += *p != 0;
        for (int* p : all) *p = count;
    });
    return predicate;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline void __syncwarp(unsigned mask = 0xffffffff) {
    int none = 0;
    emulator::collective("__syncwarp", mask, none, [](auto&) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulator {
// Each lane's value is replaced by that of lane source(i), or its own where there is none.
template <class T, class F> inline T shuffle(const char* name, unsigned mask, T value, int argument, F source) {
    struct Operand { T value; int argument; } operand{value, argument};
    collective(name, mask, operand, [&](Operand* (&lanes)[warpSize]) {
        T values[warpSize];
        for (int i = 0; i < warpSize; i++) if (lanes[i]) values[i] = lanes[i]->value;
        for (int i = 0; i < warpSize; i++) {
            if (!lanes[i]) continue;
            int from = source(i, lanes[i]->argument);
            if (from < 0 || from >= warpSize) continue;
            if (!lanes[from]) fail("%s: lane %d reads lane %d, which is not in the mask", name, i, from);
            lanes[i]->value = values[from];
        }
    });
    return operand.value;
}
} // namespace emulator

// Width is a power of two up to 32: the warp is as many independent parts.
template <class T> inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32) {
    return emulator::shuffle("__shfl_sync", mask, x, lane, [=](int i, int lane) {
        return i / width * width + lane % width;
    });
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
    return emulator::shuffle("__shfl_xor_sync", mask, x, bits, [=](int i, int bits) {
        return (i ^ bits) < i / width * width + width ? i ^ bits : i;
    });
}
template <class T> inline T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) {
    return emulator::shuffle("__shfl_down_sync", mask, x, by, [=](int i, int by) {
        return i % width + by < width ? i + by : i;
    });
}
template <class T> inline T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
    return emulator::shuffle("__shfl_up_sync", mask, x, by, [=](int i, int by) {
        return i % width - by >= 0 ? i - by : i;
    });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    unsigned operand = predicate != 0;
    emulator::collective("__ballot_sync", mask, operand, [](auto& lanes) {
        unsigned ballot = 0;
        for (int i = 0; i < warpSize; i++) if (lanes[i] && *lanes[i]) ballot |= 1u << i;
        for (auto* lane : lanes) if (lane) *lane = ballot;
    });
    return operand;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

template <class T> inline T atomicAdd(T* p, T x) { T old = *p; *p += x; return old; }
template <class T> inline T atomicMax(T* p, T x) { T old = *p; *p = std::max(old, x); return old; }
template <class T> inline T atomicMin(T* p, T x) { T old = *p; *p = std::min(old, x); return old; }
template <class T> inline T atomicExch(T* p, T x) { T old = *p; *p = x; return old; }
template <class T> inline T atomicCAS(T* p, T compare, T x) { T old = *p; if (old == compare) *p = x; return old; }
template <class T> inline T atomicOr(T* p, T x) { T old = *p; *p |= x; return old; }

using std::max;
using std::min;
template <class T> inline T __ldg(const T* p) { return *p; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { return __uint_as_float((unsigned)x); }
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned)((uint64_t)x * y >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

// The twins of device.cuh's instructions.
inline u32 round_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if (x != x) return 0x7fff; // the NaN that the GPU gives
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float first, float second) { return round_bf16(first) | round_bf16(second) << 16; }
inline float exp2_fast(float x) { return exp2f(x); }

template <int BYTES> inline void cp_async(void* shared, const void* global, bool valid) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    if ((uintptr_t)shared % BYTES || (uintptr_t)global % BYTES)
        emulator::fail("cp_async: not aligned to %d bytes", BYTES);
    auto& fiber = *emulator::fibers[emulator::current];
    fiber.copies.push_back({shared, global, BYTES, valid, fiber.groups});
}
inline void cp_async_commit() { emulator::fibers[emulator::current]->groups++; }
template <int PENDING> inline void cp_async_wait() {
    auto& fiber = *emulator::fibers[emulator::current];
    std::vector<emulator::Copy> later;
    for (auto& copy : fiber.copies) {
        if (copy.group >= fiber.groups - PENDING) later.push_back(copy);
        else if (copy.valid) memcpy(copy.to, copy.from, copy.bytes);
        else memset(copy.to, 0, copy.bytes);
    }
    fiber.copies = later;
}

namespace emulator {
inline void ldmatrix(const char* name, u32 (&tiles)[4], const void* row, bool transposed) {
    struct Operand { u32* tiles; const u16* row; } operand{tiles, (const u16*)row};
    if ((uintptr_t)row % 16) fail("%s: not aligned to 16 bytes", name);
    collective(name, 0xffffffff, operand, [&](Operand* (&lanes)[warpSize]) {
        for (int lane = 0; lane < warpSize; lane++)
            for (int tile = 0; tile < 4; tile++) {
                u32 halves[2];
                for (int half = 0; half < 2; half++) {
                    int row = lane / 4, column = 2 * (lane % 4) + half;
                    if (transposed) std::swap(row, column);
                    halves[half] = lanes[8 * tile + row]->row[column];
                }
                lanes[lane]->tiles[tile] = halves[0] | halves[1] << 16;
            }
    });
}
} // namespace emulator
inline void ldmatrix(u32 (&tiles)[4], const void* row) { emulator::ldmatrix("ldmatrix", tiles, row, false); }
inline void ldmatrix_transposed(u32 (&tiles)[4], const void* row) {
    emulator::ldmatrix("ldmatrix_transposed", tiles, row, true);
}

// Where the PTX manual's figures for mma.m16n8k16 put each element.
inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Operand { float* c; const u32* a; u32 b[2]; } operand{c, a, {b0, b1}};
    emulator::collective("mma", 0xffffffff, operand, [](Operand* (&lanes)[warpSize]) {
        float a[16][16], b[8][16]; // b by columns
        auto half = [](u32 pair, int i) { return __uint_as_float(i ? pair & 0xffff0000 : pair << 16); };
        for (int lane = 0; lane < warpSize; lane++) {
            int group = lane / 4, column = 2 * (lane % 4);
            for (int i = 0; i < 2; i++) {
                a[group][column + i] = half(lanes[lane]->a[0], i);
                a[group + 8][column + i] = half(lanes[lane]->a[1], i);
                a[group][column + 8 + i] = half(lanes[lane]->a[2], i);
                a[group + 8][column + 8 + i] = half(lanes[lane]->a[3], i);
                b[group][column + i] = half(lanes[lane]->b[0], i);
                b[group][column + 8 + i] = half(lanes[lane]->b[1], i);
            }
        }
        for (int lane = 0; lane < warpSize; lane++)
            for (int i = 0; i < 4; i++) {
                int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
                float sum = 0;
                for (int k = 0; k < 16; k++) sum += a[row][k] * b[column][k];
                lanes[lane]->c[i] += sum;
            }
    });
}
