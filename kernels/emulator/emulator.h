// Runs a CUDA kernel on the CPU, for tests. The blocks of a launch run one after another; the threads
// of a block are fibers, and one runs until it waits for others: at a barrier or a warp's
// collective. What a GPU would leave undefined is looked for and reported:
// - barriers and collectives that not all reach, or that lanes reach with different masks
// - arguments whose number or types are not the kernel's
// - writes past the dynamic shared memory, which starts out as NaN
// - cp.async's data read before its wait: copies happen at the wait, as late as they may
// - missing barriers, often: odd blocks run their threads in the opposite order
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdint>
#include <cstring>
#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static // blocks run one after another
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 { unsigned x, y, z; };
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

static dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {
constexpr size_t STACK = 256 << 10, GUARD = 4096, SHARED_LIMIT = 99 << 10; // what sm_86 and sm_89 have
constexpr unsigned char POISON = 0xff;                                     // NaN in every float type
enum class State { Ready, Waits, Done };

// One cp.async.
struct Copy { void* to; const void* from; int bytes; bool valid; int group; };

struct Fiber {
    ucontext_t start;
    jmp_buf here;
    bool started;
    State state;
    dim3 thread;
    // the collective that it waits in
    const char* name;
    unsigned mask;
    void* operand;
    std::vector<Copy> copies;
    int groups;
};

static std::vector<std::unique_ptr<Fiber>> fibers; // kept from block to block
static std::vector<std::unique_ptr<char[]>> stacks;
static unsigned threads, current;
static jmp_buf scheduler;
static std::mutex one_at_a_time; // launches
static std::vector<unsigned char> shared;
static char* shared_start;
static char error[512];
static void (*body)(void*);
static void* body_operand;

__attribute__((noinline)) inline void suspend() {
    if (_setjmp(fibers[current]->here) == 0) _longjmp(scheduler, 1);
}

// Ends the launch; does not return.
inline void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    int n = snprintf(error, sizeof error, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y, blockIdx.z,
                     threadIdx.x, threadIdx.y, threadIdx.z);
    vsnprintf(error + n, sizeof error - n, format, list);
    va_end(list);
    _longjmp(scheduler, 1);
}

inline void entry() {
    body(body_operand);
    fibers[current]->state = State::Done;
    _longjmp(scheduler, 1);
}

// Waits for all lanes of `mask`; the last to come runs `f` on the operands of all (null: not in it).
template <class T, class F> inline void collective(const char* name, unsigned mask, T& operand, F f) {
    if (threads % warpSize) fail("%s: %u threads are not whole warps", name, threads);
    unsigned first = current / warpSize * warpSize, lane = current % warpSize;
    if (!(mask >> lane & 1)) fail("%s: lane %u is not in its own mask %08x", name, lane, mask);
    Fiber& me = *fibers[current];
    me.name = name, me.mask = mask, me.operand = &operand, me.state = State::Waits;
    T* lanes[warpSize] = {};
    for (unsigned i = 0; i < warpSize; i++) {
        if (!(mask >> i & 1)) continue;
        Fiber& other = *fibers[first + i];
        if (other.state == State::Done) fail("%s: waits for lane %u, which has ended", name, i);
        if (other.state != State::Waits) return suspend();
        if (strcmp(other.name, name) || other.mask != mask)
            fail("%s with mask %08x: lane %u is in %s with mask %08x", name, mask, i, other.name, other.mask);
        lanes[i] = (T*)other.operand;
    }
    f(lanes);
    for (unsigned i = 0; i < warpSize; i++)
        if (lanes[i]) fibers[first + i]->state = State::Ready;
}

// Waits for all threads of the block; the last to come runs `f` on each one's operand. Where one never
// comes the scheduler says so.
template <class F> inline void block_collective(const char* name, int& operand, F f) {
    Fiber& me = *fibers[current];
    me.name = name, me.mask = 0, me.operand = &operand, me.state = State::Waits;
    std::vector<int*> all;
    for (unsigned i = 0; i < threads; i++) {
        Fiber& other = *fibers[i];
        if (other.state == State::Done) fail("%s: waits for thread %u of the block, which has ended", name, i);
        if (other.state == State::Ready || strcmp(other.name, name)) return suspend();
        all.push_back((int*)other.operand);
    }
    f(all);
    for (unsigned i = 0; i < threads; i++) fibers[i]->state = State::Ready;
}

inline void start(Fiber& fiber, char* stack) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stack;
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, entry, 0);
    fiber.started = false, fiber.state = State::Ready;
    fiber.copies.clear();
    fiber.groups = 0;
}

// Runs one thread until it waits or ends.
__attribute__((noinline)) inline void resume(unsigned i) {
    current = i;
    threadIdx = fibers[i]->thread;
    if (_setjmp(scheduler) != 0) return;
    if (fibers[i]->started) _longjmp(fibers[i]->here, 1);
    fibers[i]->started = true;
    setcontext(&fibers[i]->start);
}

inline void run_block(bool backwards) {
    for (unsigned i = 0; i < threads; i++) {
        start(*fibers[i], stacks[i].get());
        fibers[i]->thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    }
    std::fill(shared.begin(), shared.end(), POISON);
    for (bool progress = true; progress && !*error;) {
        progress = false;
        for (unsigned n = 0; n < threads && !*error; n++) {
            unsigned i = backwards ? threads - 1 - n : n;
            if (fibers[i]->state != State::Ready) continue;
            resume(i);
            progress = true;
        }
    }
    if (*error) return;
    for (unsigned i = 0; i < threads; i++) {
        if (fibers[i]->state == State::Done) continue;
        threadIdx = fibers[i]->thread;
        snprintf(error, sizeof error, "block (%u, %u, %u), thread (%u, %u, %u) waits forever in %s: others have ended or wait "
                 "elsewhere", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, fibers[i]->name);
        return;
    }
    auto broken = [](unsigned char c) { return c != POISON; };
    auto end = shared.end() - GUARD, begin = shared.begin() + (shared_start - (char*)shared.data());
    if (std::any_of(end, shared.end(), broken) || std::any_of(shared.begin(), begin, broken))
        snprintf(error, sizeof error, "block (%u, %u, %u) wrote outside its dynamic shared memory", blockIdx.x, blockIdx.y, blockIdx.z);
}

// What Rust's Arg and a kernel's parameter have in common.
template <class T> constexpr char kind_of() {
    if constexpr (std::is_pointer_v<T>) return 'p';
    else if constexpr (std::is_same_v<T, float>) return 'f';
    else if constexpr (std::is_same_v<T, int>) return 'i';
    else if constexpr (std::is_same_v<T, unsigned>) return 'u';
    else if constexpr (std::is_same_v<T, unsigned long long>) return 'l';
    else static_assert(sizeof(T) == 0, "a kernel parameter of a type that gpu::Arg does not have");
}

template <class... A> struct Call {
    void (*kernel)(A...);
    void* const* args;
    template <size_t... I> void run(std::index_sequence<I...>) { kernel(*(A*)args[I]...); }
    static void go(void* call) { ((Call*)call)->run(std::index_sequence_for<A...>{}); }
};

// launch: grid, block, bytes of dynamic shared memory. Gives null, or what went wrong.
template <class... A>
inline const char* launch(void (*kernel)(A...), const unsigned* launch, const char* kinds, void* const* args) {
    std::lock_guard<std::mutex> lock(one_at_a_time);
    *error = 0;
    const char wants[] = {kind_of<A>()..., 0};
    gridDim = {launch[0], launch[1], launch[2]};
    blockDim = {launch[3], launch[4], launch[5]};
    threads = blockDim.x * blockDim.y * blockDim.z;
    size_t bytes = launch[6];
    if (strcmp(wants, kinds)) snprintf(error, sizeof error, "called with (%s), its parameters are (%s)", kinds, wants);
    else if (threads == 0 || threads > 1024) snprintf(error, sizeof error, "a block of %u threads", threads);
    else if (!gridDim.x || !gridDim.y || !gridDim.z || gridDim.y > 65535 || gridDim.z > 65535)
        snprintf(error, sizeof error, "a grid of (%u, %u, %u)", gridDim.x, gridDim.y, gridDim.z);
    else if (bytes > SHARED_LIMIT) snprintf(error, sizeof error, "%zu bytes of shared memory", bytes);
    if (*error) return strdup(error);
    while (fibers.size() < threads) {
        fibers.push_back(std::make_unique<Fiber>());
        stacks.emplace_back(new char[STACK]);
    }
    bytes = (bytes + 15) / 16 * 16;
    shared.assign(GUARD + bytes + GUARD, POISON);
    shared_start = (char*)shared.data() + GUARD; // malloc aligns to 16 bytes
    Call<A...> call{kernel, args};
    body = call.go, body_operand = &call;
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
                run_block((blockIdx.x + blockIdx.y + blockIdx.z) % 2);
                if (*error) return strdup(error);
            }
    return nullptr;
}
} // namespace emulator

#define KERNEL(name)                                                                                                   \
    extern "C" const char* emulate_##name(const unsigned* launch, const char* kinds, void* const* args) {              \
        return emulator::launch(name, launch, kinds, args);                                                            \
    }

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
    return emulator::shuffle("__shfl_sync", mask, x, lane, [=](int i, int lane) { return i / width * width + lane % width; });
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32) {
    return emulator::shuffle("__shfl_xor_sync", mask, x, bits, [=](int i, int bits) {
        return (i ^ bits) < i / width * width + width ? i ^ bits : i;
    });
}
template <class T> inline T __shfl_down_sync(unsigned mask, T x, int by, int width = 32) {
    return emulator::shuffle("__shfl_down_sync", mask, x, by, [=](int i, int by) { return i % width + by < width ? i + by : i; });
}
template <class T> inline T __shfl_up_sync(unsigned mask, T x, int by, int width = 32) {
    return emulator::shuffle("__shfl_up_sync", mask, x, by, [=](int i, int by) { return i % width - by >= 0 ? i - by : i; });
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
    if ((uintptr_t)shared % BYTES || (uintptr_t)global % BYTES) emulator::fail("cp_async: not aligned to %d bytes", BYTES);
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
