//! Finding ONNX Runtime, a shared library that kiln opens when it first needs it.
//!
//! Looked for, in this order: where `ORT_DYLIB_PATH` says, beside the executable, in kiln's cache,
//! and where the system's loader looks. Else the pinned build is installed into the cache by the
//! machine's own pip and checked against its SHA-256.

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock};

use anyhow::{Context, Result, anyhow, bail, ensure};
use ort::environment::Environment;
use sha2::{Digest, Sha256};

/// The release that kiln is tested with and installs; any from [`OLDEST`] on works.
const RELEASE: &str = "1.30.0";

/// The oldest release with the C API that kiln is built for.
const OLDEST: &str = "1.24";

/// The library's file in the cache and in the wheel.
const LIBRARY: &str = "libonnxruntime.so.1.30.0";

/// Builds that may be installed: architecture and SHA-256 of [`LIBRARY`] in the wheel for CPython
/// 3.11 on manylinux_2_28. (Python is not needed to run it; a wheel has to name one.)
const PINNED: [(&str, &str); 2] = [
    ("x86_64", "c902c70b3003c0e99fada202f37478c515ae9bba7944c2b2abd0017bae0c82ed"),
    ("aarch64", "8a218e1e446880131115c368ec7005969a5022af9a15a26173de648fef0b7789"),
];

/// ONNX Runtime, open for the rest of the process.
#[derive(Debug)]
pub struct Runtime {
    library: PathBuf,
    environment: Environment,
}

impl Runtime {
    /// The library it was opened from; a bare name where the system's loader found it.
    pub fn library(&self) -> &Path {
        &self.library
    }

    pub(super) fn environment(&self) -> &Environment {
        &self.environment
    }
}

/// Opens ONNX Runtime, once in a process; later calls return the same.
///
/// Installs it where it is nowhere to be found, which is said on stderr, and never when `offline`.
///
/// # Errors
/// Where `ORT_DYLIB_PATH` names something that cannot be used, or where there is no library and
/// none can be installed: the error says where was looked, and the ways to get one.
pub fn ensure(offline: bool) -> Result<&'static Runtime> {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    static OPENING: Mutex<()> = Mutex::new(());

    let _opening = OPENING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    match RUNTIME.get() {
        Some(runtime) => Ok(runtime),
        None => {
            let runtime = Places::from_env().open(offline)?;
            Ok(RUNTIME.get_or_init(|| runtime))
        }
    }
}

/// Where to look.
struct Places {
    /// `ORT_DYLIB_PATH`.
    explicit: Option<PathBuf>,
    /// The executable's folder.
    beside: Option<PathBuf>,
    /// The folder of the pinned build in kiln's cache.
    cache: Option<PathBuf>,
    /// Names for the system's loader.
    system: &'static [&'static str],
}

/// The folder that kiln keeps what it fetched or compiled in: KILN_CACHE, or one by the system's habit.
pub fn cache() -> Option<PathBuf> {
    var("KILN_CACHE")
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("kiln")))
        .or_else(|| Some(var("HOME")?.join(".cache/kiln")))
}

fn var(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

impl Places {
    fn from_env() -> Places {
        Places {
            explicit: var("ORT_DYLIB_PATH"),
            beside: env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_path_buf())),
            cache: cache().map(|cache| cache.join(format!("onnxruntime-{RELEASE}-{}", env::consts::ARCH))),
            system: &["libonnxruntime.so.1", "libonnxruntime.so"],
        }
    }

    fn open(&self, offline: bool) -> Result<Runtime> {
        if let Some(path) = &self.explicit {
            return open(path).context("ORT_DYLIB_PATH does not name a library that can be used");
        }

        // What was there but could not be used, for the error.
        let mut unusable = Vec::new();
        for name in ["libonnxruntime.so", "libonnxruntime.so.1", LIBRARY] {
            let Some(path) = self.beside.as_ref().map(|folder| folder.join(name)).filter(|path| path.exists()) else {
                continue;
            };
            match open(&path) {
                Ok(runtime) => return Ok(runtime),
                Err(error) => unusable.push(format!("{error:#}")),
            }
        }
        let cached = self.cache.as_ref().map(|folder| folder.join(LIBRARY));
        if let Some(path) = cached.as_ref().filter(|path| path.exists()) {
            match verify(path).and_then(|()| open(path)) {
                Ok(runtime) => return Ok(runtime),
                Err(error) => unusable.push(format!("{error:#}")),
            }
        }
        for name in self.system {
            match open_library(Path::new(name)) {
                Ok(runtime) => return Ok(runtime),
                Err(error) if error.to_string().starts_with(&format!("{name}: cannot open")) => {} // there is none
                Err(error) => unusable.push(format!("{error:#}")),
            }
        }
        let installed = match (&cached, offline) {
            (_, true) => Err(anyhow!("--offline forbids to install it")),
            (None, _) => Err(anyhow!("none of KILN_CACHE, XDG_CACHE_HOME and HOME names a cache to install it into")),
            (Some(path), false) => install(path).and_then(|()| open(path)),
        };
        installed.map_err(|error| {
            unusable.push(format!("{error:#}"));
            anyhow!(
                "ONNX Runtime {OLDEST} or newer is needed and was found neither beside the executable, nor in kiln's \
                 cache, nor by the system's loader:\n  {}\nany of these gives it:\n  \
                 set ORT_DYLIB_PATH to a libonnxruntime.so\n  \
                 put {LIBRARY} beside the kiln executable\n  \
                 let kiln install it: run once without --offline, with python3 and its pip at hand",
                unusable.join("\n  "),
            )
        })
    }
}

/// Opens the library in the file `path`.
fn open(path: &Path) -> Result<Runtime> {
    // Absolute, because ort takes a relative path from the executable's folder first.
    let path = path.canonicalize().with_context(|| format!("cannot open {}", path.display()))?;
    check_whole(&path)?;
    open_library(&path)
}

/// Opens the library by a path, or by a name that the system's loader resolves.
fn open_library(path: &Path) -> Result<Runtime> {
    let builder = ort::init_from(path).map_err(|error| match error {
        ort::LoadDynamicError::BadVersion { version_str, path } => {
            anyhow!("{} is ONNX Runtime {version_str}: kiln needs {OLDEST} or newer", path.display())
        }
        // What dlopen itself said is the error's source.
        ort::LoadDynamicError::Dlopen { error, .. } => match std::error::Error::source(&error) {
            Some(reason) => anyhow!("{reason}"),
            None => anyhow!("{}: {error}", path.display()),
        },
        error => anyhow!("{error}"),
    })?;
    let environment = builder.with_name("kiln").with_telemetry(false).build()?;
    Ok(Runtime { library: path.to_path_buf(), environment })
}

/// Refuses a file that is no shared library or was cut short: the loader maps what the header
/// promises, and touching pages past the end of the file would kill the process.
fn check_whole(path: &Path) -> Result<()> {
    let bytes = |range: std::ops::Range<u64>| -> io::Result<u64> {
        use std::os::unix::fs::FileExt;
        let mut bytes = [0; 8];
        let len = (range.end - range.start) as usize;
        File::open(path)?.read_exact_at(&mut bytes[..len], range.start)?;
        Ok(u64::from_le_bytes(bytes))
    };
    let header = || -> io::Result<(u64, u64)> {
        // ELF64, little-endian: magic, class and byte order; then the section headers, which stand
        // at the end of a library: e_shoff + e_shentsize * e_shnum.
        Ok((bytes(0..6)?, bytes(0x28..0x30)?.saturating_add(bytes(0x3A..0x3C)? * bytes(0x3C..0x3E)?)))
    };
    let len = fs::metadata(path).with_context(|| path.display().to_string())?.len();
    match header() {
        Ok((0x0102_464c_457f, end)) if end <= len => Ok(()),
        Ok((0x0102_464c_457f, end)) => {
            bail!("{} is cut short: it has {len} bytes and needs {end}; copy it again", path.display())
        }
        _ => bail!("{} is not a shared library", path.display()),
    }
}

/// Checks the file against the pinned build for this machine.
fn verify(path: &Path) -> Result<()> {
    let (_, expected) = pinned()?;
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    let got: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(got == expected, "{} has SHA-256 {got}, and kiln's pinned build {expected}: delete it", path.display());
    Ok(())
}

fn pinned() -> Result<(&'static str, &'static str)> {
    let gnu = cfg!(all(target_os = "linux", target_env = "gnu"));
    PINNED.into_iter().find(|(arch, _)| gnu && *arch == env::consts::ARCH).with_context(|| {
        format!("kiln has no pinned build of ONNX Runtime for {} on {}", env::consts::ARCH, env::consts::OS)
    })
}

/// Installs the pinned build as `path`.
fn install(path: &Path) -> Result<()> {
    let (arch, _) = pinned()?;
    let folder = path.parent().context("the cache has no folder")?;
    crate::error::warn(format_args!("installing onnxruntime {RELEASE} into {} with pip", folder.display()));
    fs::create_dir_all(folder).with_context(|| format!("could not make {}", folder.display()))?;
    // In the same folder, so that the rename at the end stays on one file system.
    let work = tempfile::Builder::new().prefix(".install-").tempdir_in(folder)?;

    let mut failures = String::new();
    let done = [&["python3", "-m", "pip"][..], &["pip3"], &["pip"]].iter().any(|pip| {
        let output = Command::new(pip[0])
            .args(&pip[1..])
            .args(["install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-compile", "--no-deps"])
            .args(["--only-binary", ":all:", "--implementation", "cp", "--python-version", "311", "--abi", "cp311"])
            .args(["--platform", &format!("manylinux_2_28_{arch}"), "--target"])
            .arg(work.path())
            .arg(format!("onnxruntime=={RELEASE}"))
            .stdin(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => return true,
            Ok(output) => {
                let message = String::from_utf8_lossy(&output.stderr);
                failures += &format!("\n{}: {}", pip.join(" "), message.trim());
            }
            Err(error) => failures += &format!("\n{}: {error}", pip.join(" ")),
        }
        false
    });
    ensure!(done, "pip could not install onnxruntime=={RELEASE}:{failures}");

    let library = work.path().join("onnxruntime/capi").join(LIBRARY);
    verify(&library)?;
    File::open(&library)?.sync_all()?;
    fs::rename(&library, path).with_context(|| format!("could not write {}", path.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever stands in for the library, opening it is an error: no panic and no crash.
    #[test]
    fn unusable_libraries_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libonnxruntime.so");
        let message = || {
            let places = Places { explicit: Some(path.clone()), beside: None, cache: None, system: &[] };
            format!("{:#}", places.open(true).unwrap_err())
        };
        assert!(message().contains("No such file"), "{}", message());
        fs::write(&path, "not a library").unwrap();
        assert!(message().contains("is not a shared library"), "{}", message());
        // The test's own executable is an ELF file as good as any.
        let whole = fs::read(env::current_exe().unwrap()).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(message().contains("is cut short"), "{}", message());
    }

    #[test]
    fn offline_names_the_three_ways() {
        let folder = tempfile::tempdir().unwrap();
        let cache = folder.path().join("cache");
        fs::create_dir(&cache).unwrap();
        fs::write(cache.join(LIBRARY), "an install that went wrong").unwrap();
        let places = Places { explicit: None, beside: Some(folder.path().into()), cache: Some(cache), system: &[] };
        let message = format!("{:#}", places.open(true).unwrap_err());
        for part in ["has SHA-256", "ORT_DYLIB_PATH", "beside the kiln executable", "--offline"] {
            assert!(message.contains(part), "{part} is not in: {message}");
        }
    }
}
