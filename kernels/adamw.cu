// adamw.rs on a GPU: all groups in one launch, with the parameters' copy in bf16 where there is one.
#include "gpu/device.cuh"
#include "gpu/elements.cuh"

// factors: of each group, the decay and the step's size.
extern "C" __global__ void adamw(float* parameters, float* gradients, float* m, float* v, bf16* copy,
                                const u32* first_blocks, const u64* bounds, const float* factors, u32 groups, float beta1,
                                float one_minus_beta1, float beta2, float one_minus_beta2, float rsqrt_bias2,
                                float epsilon, float gradient_scale) {
    each_of_segment(first_blocks, bounds, groups, [=](u64 at, auto width, u32 group) {
        constexpr int N = decltype(width)::value;
        float decay = factors[2 * group], step_size = factors[2 * group + 1];
        float ps[N], gs[N], ms[N], vs[N], zeros[N] = {};
        load<N>(ps, parameters + at);
        load<N>(gs, gradients + at);
        load<N>(ms, m + at);
        load<N>(vs, v + at);
        for (int i = 0; i < N; i++) {
            float gradient = gs[i] * gradient_scale;
            ms[i] = fmaf(ms[i], beta1, gradient * one_minus_beta1);
            vs[i] = fmaf(vs[i], beta2, gradient * gradient * one_minus_beta2);
            float root = fmaf(sqrtf(vs[i]), rsqrt_bias2, epsilon);
            ps[i] = fmaf(ps[i], decay, -step_size * ms[i] / root);
        }
        store<N>(parameters + at, ps);
        store<N>(gradients + at, zeros);
        store<N>(m + at, ms);
        store<N>(v + at, vs);
        if (copy) store<N>(copy + at, ps);
    });
}
KERNEL(adamw)
