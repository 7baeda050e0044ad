use crate::device::on_gpu;
use crate::{cpu, threads};
use candle_core::{Result, Tensor};
use rayon::prelude::*;

/// `destination + source`, in `destination`'s place: where two gradients meet.
///
/// # Errors
/// Where shapes differ.
pub fn add(destination: Tensor, source: &Tensor) -> Result<Tensor> {
    const KERNEL: &str = "add";
    cpu::check_dims(KERNEL, "destination", &destination, source.dims(), "source")?;
    on_gpu!(source.device(), |gpu| crate::gpu::elementwise::add(&*gpu, destination, source));
    cpu::update(KERNEL, "destination", destination, &[source], |destination| {
        let source = cpu::read(KERNEL, "source", source)?;
        let source = &*source;
        threads::install(|| {
            let share = threads::share(source.len(), 16384);
            destination.par_chunks_mut(share).zip(source.par_chunks(share)).for_each(|(d, s)| {
                for (d, &s) in d.iter_mut().zip(s) {
                    *d += s;
                }
            });
        });
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;

    #[test]
    fn adds_in_place_and_copies_what_is_shared() -> Result<()> {
        let (a, b) = (tensor(1, &[40, 1000]), tensor(2, &[40, 1000]));
        let want = values(&(&a + &b)?);
        let twice = values(&(&a + &a)?);
        assert_eq!(values(&add(a.clone(), &a)?), twice); // a itself is unharmed:
        assert_eq!(values(&add(a.clone(), &b)?), want);
        assert_eq!(values(&a), want); // in place
        assert!(add(a, &tensor(1, &[40, 999])).is_err());
        Ok(())
    }
}
