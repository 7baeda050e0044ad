//! From a `.cu` to machine code by NVRTC, once a machine: what was compiled is kept in a folder.
use super::Module;
use candle_core::{Result, bail};
use cudarc::nvrtc::{result, sys};
use std::{
    ffi::CString,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

/// Compiles `module` or takes it from the cache, and loads it. What the cache has and cannot be loaded is
/// compiled anew. A folder that cannot be written costs the time of compiling, nothing else.
pub(super) fn module<T>(
    module: &Module,
    (major, minor): (i32, i32),
    cache: &Path,
    load: impl Fn(Vec<u8>) -> std::result::Result<T, String>,
) -> Result<T> {
    // Without the last, generic lambdas are taken for the host's.
    let options = ["--std=c++17".to_owned(), "--device-as-default-execution-space".to_owned()];
    let options = [&options[..], &[format!("--gpu-architecture=sm_{major}{minor}")]].concat();
    let text = module.text();
    let file = cache.join(format!("{}-{:016x}.cubin", module.name, hash(&(&text, &options, version()?))));
    if let Some(cubin) = read(&file)
        && let Ok(loaded) = load(cubin)
    {
        return Ok(loaded);
    }
    let cubin = compile(module.name, &text, &options)?;
    write(&file, &cubin);
    load(cubin).map_err(|e| candle_core::Error::Msg(format!("loading {}.cu for sm_{major}{minor}: {e}", module.name)))
}

/// NVRTC's version.
fn version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: it writes two numbers.
    nvrtc(unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result(), "its version")?;
    Ok((major, minor))
}

fn compile(name: &str, text: &str, options: &[String]) -> Result<Vec<u8>> {
    let c_string = |text: &str| CString::new(text).map_err(candle_core::Error::wrap);
    let (source, file) = (c_string(text)?, c_string(&format!("{name}.cu"))?);
    let program = Program(nvrtc(result::create_program(&source, Some(&file)), name)?);
    // SAFETY: the program lives until the end of this function.
    unsafe {
        if let Err(error) = result::compile_program(program.0, options) {
            let log = result::get_program_log(program.0).unwrap_or_default();
            let log: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
            bail!("NVRTC does not compile {name}.cu ({error:?}):\n{}", String::from_utf8_lossy(&log));
        }
        let mut size = 0;
        nvrtc(sys::nvrtcGetCUBINSize(program.0, &mut size).result(), name)?;
        let mut cubin = vec![0u8; size];
        nvrtc(sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()).result(), name)?;
        Ok(cubin)
    }
}

struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed once. There is nobody to tell of an error.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

fn nvrtc<T>(result: std::result::Result<T, result::NvrtcError>, what: &str) -> Result<T> {
    result.map_err(|e| candle_core::Error::Msg(format!("NVRTC, {what}: {e:?}")))
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// What [`write`] wrote, whole.
fn read(file: &Path) -> Option<Vec<u8>> {
    let mut data = fs::read(file).ok()?;
    let content = data.len().checked_sub(size_of::<u64>())?;
    let sum = data.split_off(content);
    (sum == hash(&data).to_le_bytes()).then_some(data)
}

/// The data and its hash, under a temporary name first: other processes see all of it or nothing.
fn write(file: &Path, data: &[u8]) {
    static FILES: AtomicU32 = AtomicU32::new(0);
    let number = FILES.fetch_add(1, Ordering::Relaxed);
    let temporary = file.with_extension(format!("{}-{number}.tmp", std::process::id()));
    let folder = file.parent().map_or(Ok(()), fs::create_dir_all);
    let all = [data, &hash(&data).to_le_bytes()].concat();
    if folder.and_then(|()| fs::write(&temporary, all)).and_then(|()| fs::rename(&temporary, file)).is_err() {
        let _ = fs::remove_file(&temporary); // perhaps it was never there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_file_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kernels").join("x.cubin");
        assert_eq!(read(&file), None);
        write(&file, b"machine code");
        assert_eq!(read(&file).unwrap(), b"machine code");
        let whole = fs::read(&file).unwrap();
        for broken in [&whole[..whole.len() - 1], &whole[..3], b"", &[0; 20]] {
            fs::write(&file, broken).unwrap();
            assert_eq!(read(&file), None);
        }
        write(&file, b"again");
        assert_eq!(read(&file).unwrap(), b"again");
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1);
        write(Path::new("/dev/null/no-folder/x.cubin"), b"nowhere"); // says nothing
    }
}
