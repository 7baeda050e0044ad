// add.rs on a GPU.
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

template <class T> __device__ inline void add(T* destination, const T* source, u64 n, u32 vectors) {
    each<T>(n, vectors, [=](u64 at, auto width) {
        constexpr int N = decltype(width)::value;
        float d[N], s[N];
        load<N>(d, destination + at);
        load<N>(s, source + at);
        for (int i = 0; i < N; i++) d[i] += s[i];
        store<N>(destination + at, d);
    });
}

extern "C" __global__ void add_f32(float* d, const float* s, u64 n, u32 vectors) { add(d, s, n, vectors); }
KERNEL(add_f32)
extern "C" __global__ void add_bf16(bf16* d, const bf16* s, u64 n, u32 vectors) { add(d, s, n, vectors); }
KERNEL(add_bf16)
