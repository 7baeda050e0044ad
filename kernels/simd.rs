//! Loops compiled for AVX-512, for AVX2 and for the target's baseline, chosen at run time; and the
//! functions in them, written so that they vectorise.

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Level {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Baseline,
}

/// What this CPU can do. The standard library remembers the answer.
pub(crate) fn level() -> Level {
    #[cfg(test)]
    if let Some(level) = *tests::LEVEL {
        return level;
    }
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") {
            if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                return Level::Avx512;
            }
            return Level::Avx2;
        }
    }
    Level::Baseline
}

/// Defines a function whose loops are compiled once for each [`Level`].
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match $crate::simd::level() {
                    // SAFETY: this CPU has these features.
                    $crate::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: this CPU has these features.
                    $crate::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::simd::Level::Baseline => {}
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorized;

/// Partial sums that run side by side: a sum in one variable cannot be vectorised, as its order
/// would change.
pub(crate) const LANES: usize = 16;

/// The sum of `f(a, b)` over two slices of one length, in [`LANES`] partial sums whatever the CPU.
#[inline(always)]
pub(crate) fn sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            lanes[lane] += f(a[lane], b[lane]);
        }
    }
    for (lane, (&a, &b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[lane] += f(a, b);
    }
    lanes.iter().sum()
}

/// eˣ to 1.1e-7 relative; below -87.3 the smallest normal number, above 88.3 a large one.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 × 2²³: adding it rounds to an integer, in the low bits
    let x = x.clamp(-87.3, 88.3);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    // ln 2 in two parts, so that r = x - n ln 2 is exact enough
    let r = n.mul_add(-1.428_606_8e-6, n.mul_add(-0.693_145_75, x));
    // Cephes expf: minimax on |r| <= ln 2 / 2
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23)) // p × 2ⁿ
}

/// The error function to about 1.2e-7 relative (N. Juffa's two polynomials).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let t = x.abs();
    let s = x * x;
    let mut far = t.mul_add(-1.728_534_7e-5, 3.831_97e-4);
    let u = t.mul_add(-3.883_964_4e-3, 2.425_462_2e-2);
    far = far.mul_add(s, u);
    far = far.mul_add(t, -1.067_778_8e-1);
    far = far.mul_add(t, -6.348_467e-1);
    far = far.mul_add(t, -1.287_175_1e-1);
    far = far.mul_add(t, -t);
    let far = (1.0 - exp(far)).copysign(x);
    let mut near = -5.967_617e-4f32;
    near = near.mul_add(s, 4.991_194e-3);
    near = near.mul_add(s, -2.676_813_5e-2);
    near = near.mul_add(s, 1.128_199_25e-1);
    near = near.mul_add(s, -3.761_253_4e-1);
    near = near.mul_add(s, 1.283_791_7e-1);
    let near = near.mul_add(x, x);
    if t > 0.927_734_4 { far } else { near }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{process::Command, sync::LazyLock};

    const VARIABLE: &str = "KILN_TEST_SIMD";

    /// The level that tests run on, where it is not the best one.
    pub static LEVEL: LazyLock<Option<Level>> = LazyLock::new(|| match std::env::var(VARIABLE).as_deref() {
        #[cfg(target_arch = "x86_64")]
        Ok("avx2") => Some(Level::Avx2),
        Ok("baseline") => Some(Level::Baseline),
        _ => None,
    });

    /// Runs all tests of this package again, without the best instructions of this machine.
    #[test]
    fn older_cpus_pass_too() {
        if std::env::var_os(VARIABLE).is_some() {
            return;
        }
        let mut levels = vec!["baseline"];
        if level() != Level::Baseline {
            levels.push("avx2");
        }
        for level in levels {
            let mut tests = Command::new(std::env::current_exe().unwrap());
            // the kernels of GPUs know no levels
            let output = tests.args(["--quiet", "--skip", "gpu::"]).env(VARIABLE, level).output().unwrap();
            assert!(output.status.success(), "{level}: {}", String::from_utf8_lossy(&output.stdout));
        }
    }

    fn worst(range: std::ops::Range<f32>, f: fn(f32) -> f32, exact: fn(f64) -> f64) -> f64 {
        let steps = 400_000;
        (0..=steps)
            .map(|i| {
                let x = range.start + (range.end - range.start) * (i as f32 / steps as f32);
                let y = exact(x as f64);
                (f(x) as f64 - y).abs() / y.abs().max(1e-30)
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn exp_and_erf_are_exact_to_a_few_ulp() {
        let exp_error = worst(-87.0..88.0, exp, f64::exp);
        let erf_error = worst(-6.0..6.0, erf, candle_core::cpu::erf::erf_f64);
        println!("exp {exp_error:.2e} erf {erf_error:.2e}");
        assert!(exp_error < 1.5e-7, "exp: {exp_error:e}");
        assert!(erf_error < 1.5e-7, "erf: {erf_error:e}");
        assert!(exp(-200.0) < 2e-38 && exp(-200.0) >= 0.0);
    }

    #[test]
    fn sum_takes_every_term_once() {
        for n in 0..70 {
            let a: Vec<f32> = (1..=n).map(|i| i as f32).collect();
            assert_eq!(sum(&a, &a, |a, b| a + b), (n * (n + 1)) as f32);
        }
    }
}
