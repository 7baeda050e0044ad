//! Kernels on the CPU, by `emulator/emulator.h`: for tests on a machine without a GPU.
use super::{Arg, Gpu, Launch, Module};
use crate::Result;
use candle_core::bail;
use half::bf16;
use libloading::{Library, Symbol};
use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_void},
    process::Command,
    sync::{Mutex, OnceLock},
};

/// A GPU whose device memory is the host's.
pub(crate) struct Emulator(());

type Entry = unsafe extern "C" fn(*const u32, *const c_char, *const *const c_void) -> *const c_char;

impl Emulator {
    /// Nothing where there is no C++ compiler, which it says.
    pub fn new() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        let found =
            *FOUND.get_or_init(|| Command::new("c++").arg("--version").output().is_ok_and(|o| o.status.success()));
        if !found {
            eprintln!("skipped: no C++ compiler, so kernels cannot be emulated");
        }
        found.then_some(Self(()))
    }
}

/// What `device.cuh` includes where a GPU does not compile it.
const HEADERS: [(&str, &str); 2] =
    [("emulator.h", include_str!("../emulator/emulator.h")), ("builtins.h", include_str!("../emulator/builtins.h"))];

/// A module's library, compiled at its first use in this process.
fn library(module: &Module) -> Result<&'static Library> {
    static LIBRARIES: Mutex<Option<HashMap<&'static str, &'static Library>>> = Mutex::new(None);
    let mut libraries = LIBRARIES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let libraries = libraries.get_or_insert_default();
    if let Some(library) = libraries.get(module.name) {
        return Ok(library);
    }
    let folder = tempfile::tempdir()?;
    let (source, output) = (folder.path().join("kernel.cpp"), folder.path().join("kernel.so"));
    std::fs::write(&source, module.text().as_bytes())?;
    for (name, header) in HEADERS {
        std::fs::write(folder.path().join(name), header)?;
    }
    // _longjmp between stacks is what fortified sources take for an error
    let compiled = Command::new("c++")
        .args(["-std=c++17", "-O1", "-march=native", "-shared", "-fPIC", "-U_FORTIFY_SOURCE"])
        .args(["-ffp-contract=off", "-fno-strict-aliasing", "-Werror=return-type", "-Werror=uninitialized"])
        .arg("-o")
        .args([&output, &source])
        .output()?;
    if !compiled.status.success() {
        bail!("{}.cu does not compile for the CPU:\n{}", module.name, String::from_utf8_lossy(&compiled.stderr));
    }
    // SAFETY: the library's initialisers make plain globals only.
    let library = unsafe { Library::new(&output) }.map_err(candle_core::Error::wrap)?;
    let library = Box::leak(Box::new(library)); // until the process ends, as its kernels may be called until then
    libraries.insert(module.name, library);
    Ok(library)
}

impl Arg {
    /// Where the value lies, as a launch takes it.
    fn as_ptr(&self) -> *const c_void {
        match self {
            Arg::Pointer(x) | Arg::U64(x) => std::ptr::from_ref(x).cast(),
            Arg::I32(x) => std::ptr::from_ref(x).cast(),
            Arg::U32(x) => std::ptr::from_ref(x).cast(),
            Arg::F32(x) => std::ptr::from_ref(x).cast(),
        }
    }
}

impl Gpu for Emulator {
    fn launch(&self, module: &Module, kernel: &str, launch: Launch, args: &[Arg]) -> Result<()> {
        // SAFETY: KERNEL defines functions of this type under these names.
        let entry: Symbol<Entry> = unsafe { library(module)?.get(format!("emulate_{kernel}").as_bytes()) }
            .map_err(candle_core::Error::wrap)?;
        let [x, y, z] = launch.grid;
        let [threads_x, threads_y, threads_z] = launch.block;
        let launch = [x, y, z, threads_x, threads_y, threads_z, launch.shared_bytes];
        let kind = |arg: &Arg| match arg {
            Arg::Pointer(_) => b'p',
            Arg::I32(_) => b'i',
            Arg::U32(_) => b'u',
            Arg::U64(_) => b'l',
            Arg::F32(_) => b'f',
        };
        let kinds: Vec<u8> = args.iter().map(kind).chain([0]).collect();
        let args: Vec<*const c_void> = args.iter().map(Arg::as_ptr).collect();
        // SAFETY: it reads 7 numbers, the kinds up to their zero, and as many arguments as there are kinds, where they
        // are the kernel's; whoever launches promises that pointers are to memory of the kernel's sizes.
        let error = unsafe { entry(launch.as_ptr(), kinds.as_ptr().cast(), args.as_ptr()) };
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: a C string; it leaks, once a failure.
        bail!("{}::{kernel}: {}", module.name, unsafe { CStr::from_ptr(error) }.to_string_lossy())
    }
}

/// Elements of device memory.
pub(crate) trait Element: Copy + PartialEq + std::fmt::Debug {
    /// All bits set: NaN in a float.
    const POISON: Self;
}

impl Element for f32 {
    const POISON: f32 = f32::from_bits(u32::MAX);
}
impl Element for bf16 {
    const POISON: bf16 = bf16::from_bits(u16::MAX);
}

/// Device memory between guards: what a kernel reads outside is NaN, and that it wrote there is found
/// when the memory is read.
pub(crate) struct Memory<T> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Element> Memory<T> {
    const GUARD: usize = 4096;

    pub fn new(values: &[T]) -> Self {
        let mut data = vec![T::POISON; values.len() + 2 * Self::GUARD];
        let start = Self::GUARD - (data.as_ptr() as usize % 256) / size_of::<T>(); // aligned as a GPU's memory is
        data[start..start + values.len()].copy_from_slice(values);
        Self { data, start, len: values.len() }
    }

    /// Memory that nobody has written yet.
    pub fn uninit(len: usize) -> Self {
        Self::new(&vec![T::POISON; len])
    }

    pub fn pointer(&self) -> Arg {
        Arg::Pointer(self.data[self.start..].as_ptr() as u64)
    }

    #[track_caller]
    pub fn read(&self) -> &[T] {
        let (before, rest) = self.data.split_at(self.start);
        let (values, after) = rest.split_at(self.len);
        let poison = |x: &T| {
            // SAFETY: plain numbers of this size; NaN is compared by its bits.
            unsafe { std::slice::from_raw_parts(std::ptr::from_ref(x).cast::<u8>(), size_of::<T>()) }
                .iter()
                .all(|&b| b == 0xff)
        };
        assert!(before.iter().all(poison), "a kernel wrote before the memory's start");
        assert!(after.iter().all(poison), "a kernel wrote past the memory's end");
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dropout, testing::*};

    const MODULE: Module = Module { name: "emulator_test", source: include_str!("../emulator/test.cu") };

    fn launch(kernel: &str, grid: u32, block: u32, args: &[Arg]) -> Option<Result<()>> {
        let launch = Launch { grid: [grid, 1, 1], block: [block, 1, 1], shared_bytes: 4 * block };
        Some(Emulator::new()?.launch(&MODULE, kernel, launch, args))
    }

    #[test]
    fn blocks_sum_rows() -> Result<()> {
        for (rows, columns) in [(1, 1), (3, 100), (2, 1000)] {
            let x = values(&tensor(1, &[rows, columns]));
            let (input, output) = (Memory::new(&x), Memory::uninit(rows));
            let args = [output.pointer(), input.pointer(), Arg::U32(columns as u32)];
            let Some(done) = launch("row_sum_f32", rows as u32, 128, &args) else { return Ok(()) };
            done?;
            let want: Vec<f32> = x.chunks(columns).map(|row| row.iter().sum()).collect();
            assert_close("sums", output.read(), &want, TWIN);
        }
        Ok(())
    }

    #[test]
    fn bf16_rounds_as_half_does() -> Result<()> {
        let mut x = values(&tensor(1, &[100]));
        x.extend([0.0, -0.0, f32::INFINITY, 1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8), 3.4e38, 1e-40]);
        x.resize(128, 7.0);
        let (input, output) = (Memory::new(&x), Memory::<bf16>::uninit(x.len()));
        let Some(done) = launch("narrow", 1, 128, &[output.pointer(), input.pointer()]) else { return Ok(()) };
        done?;
        assert_eq!(output.read(), x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
        Ok(())
    }

    #[test]
    fn masks_are_the_cpu_kernels() -> Result<()> {
        let dropout = Dropout { probability: 0.3, seed: 42, step: 5, site: 2 };
        for dropout in [Some(dropout), None] {
            let output = Memory::<f32>::uninit(128);
            let args = [&[output.pointer(), Arg::U64(77)][..], &super::super::dropout_args(dropout.as_ref())].concat();
            let Some(done) = launch("mask", 1, 128, &args) else { return Ok(()) };
            done?;
            let want = |e| dropout.map_or(1.0, |d| d.mask(77).factor(e));
            assert_eq!(output.read(), (0..128).map(want).collect::<Vec<f32>>());
        }
        Ok(())
    }

    /// A product of bf16 tiles through cp.async, ldmatrix and mma.
    #[test]
    fn tensor_cores_multiply() -> Result<()> {
        let round = |x: Vec<f32>| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
        let (a, b) = (round(values(&tensor(1, &[16, 16]))), round(values(&tensor(2, &[16, 16]))));
        let c = Memory::uninit(2 * 256);
        let (a_memory, b_memory) = (Memory::new(&a), Memory::new(&b));
        let args = [c.pointer(), a_memory.pointer(), b_memory.pointer()];
        let launch = Launch { grid: [1; 3], block: [32, 1, 1], shared_bytes: 1024 };
        let Some(gpu) = Emulator::new() else { return Ok(()) };
        gpu.launch(&MODULE, "product", launch, &args)?;
        let product = |b: &dyn Fn(usize, usize) -> bf16| -> Vec<f32> {
            let sum = |i: usize, j: usize| (0..16).map(|k| a[16 * i + k].to_f32() * b(k, j).to_f32()).sum();
            (0..256).map(|e| sum(e / 16, e % 16)).collect()
        };
        let want = [product(&|k, j| b[16 * k + j]), product(&|k, j| b[16 * j + k])].concat();
        assert_close("a·b, a·bᵀ", c.read(), &want, 1e-6);
        Ok(())
    }

    #[test]
    fn finds_what_a_gpu_leaves_undefined() {
        let out = Memory::<f32>::uninit(128);
        for (kernel, args, says) in [
            ("diverges", vec![], "waits for thread 0 of the block, which has ended"),
            ("waits_forever", vec![], "waits forever in __syncthreads"),
            ("shuffles_apart", vec![], "lane 0 is in __shfl_down_sync"),
            ("writes_past_shared", vec![], "wrote outside its dynamic shared memory"),
            ("mask", vec![out.pointer()], "called with (p), its parameters are (plluuf)"),
        ] {
            let Some(done) = launch(kernel, 1, 64, &args) else { return };
            let error = done.unwrap_err().to_string();
            assert!(error.contains(says), "{kernel}: {error}");
        }
        // what is not waited for is not there
        let Some(done) = launch("does_not_wait", 1, 32, &[out.pointer(), out.pointer()]) else { return };
        done.unwrap();
        assert!(out.read()[0].is_nan());
    }
}
