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

struct dim3 { unsigned x, y, z; };
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

// Says where this happened, and what.
inline void vreport(const char* format, va_list list) {
    int n = snprintf(error, sizeof error, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x, blockIdx.y,
                     blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    vsnprintf(error + n, sizeof error - n, format, list);
}

inline void report(const char* format, ...) {
    va_list list;
    va_start(list, format);
    vreport(format, list);
    va_end(list);
}

// Ends the launch; does not return.
inline void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    vreport(format, list);
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
        report("waits forever in %s: others have ended or wait elsewhere", fibers[i]->name);
        return;
    }
    auto broken = [](unsigned char c) { return c != POISON; };
    auto end = shared.end() - GUARD, begin = shared.begin() + (shared_start - (char*)shared.data());
    if (std::any_of(end, shared.end(), broken) || std::any_of(shared.begin(), begin, broken))
        report("somebody of this block wrote outside its dynamic shared memory");
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

#include "builtins.h"
