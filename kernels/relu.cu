// relu.rs on a GPU.
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

template <class T> __device__ inline void forward(T* y, const T* x, u64 n, u32 vectors) {
    each<T>(n, vectors, [=](u64 at, auto width) {
        constexpr int N = decltype(width)::value;
        float v[N];
        load<N>(v, x + at);
        for (int i = 0; i < N; i++) v[i] = v[i] <= 0.0f ? 0.0f : v[i];
        store<N>(y + at, v);
    });
}

template <class T> __device__ inline void backward(T* dy, const T* y, u64 n, u32 vectors) {
    each<T>(n, vectors, [=](u64 at, auto width) {
        constexpr int N = decltype(width)::value;
        float v[N], d[N];
        load<N>(v, y + at);
        load<N>(d, dy + at);
        for (int i = 0; i < N; i++) d[i] = v[i] <= 0.0f ? 0.0f : d[i];
        store<N>(dy + at, d);
    });
}

extern "C" __global__ void forward_f32(float* y, const float* x, u64 n, u32 vectors) { forward(y, x, n, vectors); }
KERNEL(forward_f32)
extern "C" __global__ void forward_bf16(bf16* y, const bf16* x, u64 n, u32 vectors) { forward(y, x, n, vectors); }
KERNEL(forward_bf16)
extern "C" __global__ void backward_f32(float* dy, const float* y, u64 n, u32 vectors) { backward(dy, y, n, vectors); }
KERNEL(backward_f32)
extern "C" __global__ void backward_bf16(bf16* dy, const bf16* y, u64 n, u32 vectors) { backward(dy, y, n, vectors); }
KERNEL(backward_bf16)
