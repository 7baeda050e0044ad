// gelu.rs on a GPU.
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

// The normal distribution function.
__device__ inline float cdf(float x) { return fmaf(erff(x * 0.70710678f), 0.5f, 0.5f); }

template <class T> __device__ inline void forward(T* y, const T* x, u64 n, u32 vectors) {
    each<T>(n, vectors, [=](u64 at, auto width) {
        constexpr int N = decltype(width)::value;
        float v[N];
        load<N>(v, x + at);
        for (int i = 0; i < N; i++) v[i] *= cdf(v[i]);
        store<N>(y + at, v);
    });
}

template <class T> __device__ inline void backward(T* dy, const T* x, u64 n, u32 vectors) {
    each<T>(n, vectors, [=](u64 at, auto width) {
        constexpr int N = decltype(width)::value;
        float v[N], d[N];
        load<N>(v, x + at);
        load<N>(d, dy + at);
        for (int i = 0; i < N; i++) d[i] *= fmaf(v[i], 0.3989423f * expf(-0.5f * v[i] * v[i]), cdf(v[i]));
        store<N>(dy + at, d);
    });
}

extern "C" __global__ void forward_f32(float* y, const float* x, u64 n, u32 vectors) { forward(y, x, n, vectors); }
KERNEL(forward_f32)
extern "C" __global__ void forward_bf16(bf16* y, const bf16* x, u64 n, u32 vectors) { forward(y, x, n, vectors); }
KERNEL(forward_bf16)
extern "C" __global__ void backward_f32(float* dy, const float* x, u64 n, u32 vectors) { backward(dy, x, n, vectors); }
KERNEL(backward_f32)
extern "C" __global__ void backward_bf16(bf16* dy, const bf16* x, u64 n, u32 vectors) { backward(dy, x, n, vectors); }
KERNEL(backward_bf16)
