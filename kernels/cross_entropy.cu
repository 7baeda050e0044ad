// cross_entropy.rs on a GPU, in f32: a warp takes an example.
#include "gpu/device.cuh"

template <class T>
__device__ inline void forward(float* losses, T* gradient, const T* logits, const u32* labels, const float* weights,
                               u32 examples, u32 classes, float smoothing, float total_weight, float normalizer) {
    u32 example = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (example >= examples) return;
    logits += (u64)example * classes;
    gradient += (u64)example * classes;
    u32 label = labels[example];
    float highest = __int_as_float(0xff800000); // -∞
    for (u32 c = lane; c < classes; c += 32) highest = fmaxf(highest, to_float(logits[c]));
    highest = warp_max(highest);
    float sum = 0.0f;
    for (u32 c = lane; c < classes; c += 32) sum += expf(to_float(logits[c]) - highest);
    sum = warp_sum(sum);
    float log_sum = logf(sum), uniform = smoothing / classes;
    float on_label = (1.0f - smoothing) * (weights ? weights[label] : 1.0f);
    float loss = 0.0f;
    for (u32 c = lane; c < classes; c += 32) {
        float log_probability = to_float(logits[c]) - highest - log_sum;
        float target = uniform * (weights ? weights[c] : 1.0f) + (c == label ? on_label : 0.0f);
        // A class that counts for nothing may have an infinite loss: 0 · ∞ must be 0.
        if (target != 0.0f) loss -= target * log_probability;
        float d = (on_label + uniform * total_weight) * expf(log_probability) - target;
        gradient[c] = from_float<T>(d / normalizer);
    }
    loss = warp_sum(loss);
    if (lane == 0) losses[example] = loss;
}

#define FORWARD(T, name)                                                                                               \
    extern "C" __global__ void name(float* losses, T* gradient, const T* logits, const u32* labels,                    \
                                    const float* weights, u32 examples, u32 classes, float smoothing,                  \
                                    float total_weight, float normalizer) {                                            \
        forward(losses, gradient, logits, labels, weights, examples, classes, smoothing, total_weight, normalizer);    \
    }                                                                                                                  \
    KERNEL(name)
FORWARD(float, forward_f32)
FORWARD(bf16, forward_bf16)
