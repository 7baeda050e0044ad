// pooling.rs on a GPU.
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

template <class T>
__device__ inline void first(T* y, const T* x, const u32* offsets, u64 n, u32 hidden, u32 vectors) {
    each<T>(n, vectors, [=](u64 at, auto width) {
        constexpr int N = decltype(width)::value;
        float v[N];
        load<N>(v, x + (u64)offsets[at / hidden] * hidden + at % hidden);
        store<N>(y + at, v);
    });
}

// All rows are written: those that are not first, with zeros.
template <class T>
__device__ inline void first_backward(T* dx, const T* dy, const u32* sequences, const u32* offsets, u64 n, u32 hidden,
                                      u32 vectors) {
    each<T>(n, vectors, [=](u64 at, auto width) {
        constexpr int N = decltype(width)::value;
        u32 row = at / hidden, sequence = sequences[row];
        float v[N] = {};
        if (offsets[sequence] == row) load<N>(v, dy + (u64)sequence * hidden + at % hidden);
        store<N>(dx + at, v);
    });
}

#define KERNELS(T, first_name, backward_name)                                                                          \
    extern "C" __global__ void first_name(T* y, const T* x, const u32* offsets, u64 n, u32 hidden, u32 vectors) {       \
        first(y, x, offsets, n, hidden, vectors);                                                                      \
    }                                                                                                                  \
    KERNEL(first_name)                                                                                                 \
    extern "C" __global__ void backward_name(T* dx, const T* dy, const u32* sequences, const u32* offsets, u64 n,      \
                                             u32 hidden, u32 vectors) {                                                \
        first_backward(dx, dy, sequences, offsets, n, hidden, vectors);                                                \
    }                                                                                                                  \
    KERNEL(backward_name)
KERNELS(float, first_f32, first_backward_f32)
KERNELS(bf16, first_bf16, first_backward_bf16)
