//! Files and folders that appear whole or not at all: temporary name, fsync, rename.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

/// What temporary names begin with; a crash may leave some behind, and opening a run removes them.
pub(super) const TEMPORARY: &str = ".tmp-";

/// Writes a file through `fill`, and makes its folder where there is none.
///
/// # Errors
/// What the file system says, naming the file; the one that stood there is untouched then.
pub fn write(path: &Path, fill: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>) -> Result<()> {
    let attempt = || -> io::Result<()> {
        let parent = parent(path);
        fs::create_dir_all(parent)?;
        let staged = tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(parent)?;
        let mut buffered = BufWriter::new(staged.reopen()?);
        fill(&mut buffered)?;
        let file = buffered.into_inner().map_err(io::IntoInnerError::into_error)?;
        readable(&file)?;
        file.sync_all()?;
        staged.persist(path)?;
        File::open(parent)?.sync_all()
    };
    attempt().with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a file of these bytes.
///
/// # Errors
/// As [`write()`]'s.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, |file| file.write_all(bytes))
}

/// Writes a file of pretty JSON.
///
/// # Errors
/// As [`write()`]'s.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut json = serde_json::to_vec_pretty(value).with_context(|| path.display().to_string())?;
    json.push(b'\n');
    write_bytes(path, &json)
}

/// Reads a file of JSON.
///
/// # Errors
/// A file that is not there or holds something else, naming it.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let json = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&json).with_context(|| format!("{} does not hold what it should", path.display()))
}

/// The size of an ONNX file and of its tensors, where they lie beside it.
///
/// # Errors
/// It cannot be read.
pub fn onnx_len(model: &Path) -> Result<u64> {
    let size = |path: &Path| fs::metadata(path).map(|metadata| metadata.len());
    let data = model.with_added_extension("data");
    let beside = if data.exists() { size(&data) } else { Ok(0) };
    size(model).and_then(|len| Ok(len + beside?)).with_context(|| format!("cannot read {}", model.display()))
}

/// A temporary folder beside `target`, to be filled and then [`publish`]ed. Dropped, it is gone.
///
/// # Errors
/// What the file system says.
pub fn stage(target: &Path) -> Result<TempDir> {
    let attempt = || -> io::Result<TempDir> {
        fs::create_dir_all(parent(target))?;
        let staged = tempfile::Builder::new().prefix(TEMPORARY).tempdir_in(parent(target))?;
        #[cfg(unix)]
        fs::set_permissions(staged.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        Ok(staged)
    };
    attempt().with_context(|| format!("cannot create a folder for {}", target.display()))
}

/// Makes a staged folder appear whole at `target`, in the place of what stood there.
///
/// # Errors
/// What the file system says.
pub fn publish(staged: TempDir, target: &Path) -> Result<()> {
    let attempt = || -> io::Result<()> {
        sync(staged.path())?;
        if target.exists() {
            // rename replaces an empty folder only.
            remove_dir(target).map_err(io::Error::other)?;
        }
        fs::rename(staged.path(), target)?;
        File::open(parent(target))?.sync_all()
    };
    attempt().with_context(|| format!("cannot write {}", target.display()))
}

/// Removes a folder. Its name goes first, so that no reader takes what is left for the whole.
///
/// # Errors
/// What the file system says.
pub fn remove_dir(path: &Path) -> Result<()> {
    let attempt = || -> io::Result<()> {
        let doomed = tempfile::Builder::new().prefix(TEMPORARY).tempdir_in(parent(path))?;
        fs::rename(path, doomed.path())?;
        doomed.close()
    };
    attempt().with_context(|| format!("cannot remove {}", path.display()))
}

/// Brings a folder's files to the disk.
fn sync(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { sync(&path)? } else { File::open(&path)?.sync_all()? }
    }
    File::open(folder)?.sync_all()
}

/// Temporary files are private; what stays has the mode of any other file.
fn readable(file: &File) -> io::Result<()> {
    #[cfg(unix)]
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    Ok(())
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b.txt");
        write_bytes(&path, b"old").unwrap();
        let error = write(&path, |file| {
            file.write_all(b"half of the new")?;
            Err(io::Error::other("the disk is full"))
        });
        assert_eq!(format!("{:#}", error.unwrap_err()), format!("cannot write {}: the disk is full", path.display()));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(path.parent().unwrap()), ["b.txt"]);
    }

    #[test]
    fn a_folder_appears_whole_and_replaces_the_old_one() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        for content in ["one", "two"] {
            let staged = stage(&target).unwrap();
            fs::write(staged.path().join(content), content).unwrap();
            publish(staged, &target).unwrap();
            assert_eq!(names(&target), [content]);
        }
        drop(stage(&target).unwrap());
        assert_eq!(names(folder.path()), ["model"]);
    }
}
