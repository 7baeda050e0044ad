//! huggingface_hub's cache: `models--ORG--NAME/{blobs,refs,snapshots}`, a blob by its hash, a snapshot's files as
//! links to blobs, and a lock for each blob.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use sha1::{Digest as _, Sha1};

use super::client::{Client, Remote};
use crate::config::hex;
use crate::store::{self, sha256_file};

/// One repository's place in the cache.
pub(super) struct Repository {
    name: String,
    folder: PathBuf,
    locks: PathBuf,
}

/// Whether a revision is a commit's hash, in full.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Repository {
    pub fn new(cache: &Path, name: &str) -> Self {
        let folder = format!("models--{}", name.replace('/', "--"));
        Self { name: name.into(), locks: cache.join(".locks").join(&folder), folder: cache.join(folder) }
    }

    /// The commit that a revision was when it was last fetched.
    pub fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.into());
        }
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// Notes which commit a revision is.
    pub fn name(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        make_parent(&path)?;
        store::write_bytes(&path, commit.as_bytes())
    }

    /// The folder of a commit's files.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// Fetches a file of a commit, unless it is there.
    pub fn fetch(&self, client: &Client, commit: &str, file: &str) -> Result<PathBuf> {
        let pointer = self.snapshot(commit).join(file);
        if pointer.is_file() {
            return Ok(pointer);
        }
        let remote = client.look(&self.name, commit, file)?;
        let blob = self.folder.join("blobs").join(&remote.etag);
        let lock = self.locks.join(format!("{}.lock", remote.etag));
        for path in [&pointer, &blob, &lock] {
            make_parent(path)?;
        }
        // Others that fetch the same file wait here, and find it.
        let held = File::create(&lock).with_context(|| format!("cannot write {}", lock.display()))?;
        held.lock().with_context(|| format!("cannot lock {}", lock.display()))?;
        if !blob.is_file() {
            download(client, &remote, &blob).with_context(|| format!("fetching {file} of {}", self.name))?;
        }
        if !pointer.is_file() {
            let _ = fs::remove_file(&pointer); // a link to a blob that somebody deleted
            let linked = std::os::unix::fs::symlink(Path::new("../../blobs").join(&remote.etag), &pointer);
            // Some file systems have no links.
            linked.or_else(|_| fs::copy(&blob, &pointer).map(drop)).with_context(|| pointer.display().to_string())?;
        }
        Ok(pointer)
    }
}

fn make_parent(path: &Path) -> Result<()> {
    path.parent()
        .map_or(Ok(()), fs::create_dir_all)
        .with_context(|| format!("cannot make the folder of {}", path.display()))
}

/// Fetches a blob by the name under which huggingface_hub, too, leaves what is not whole.
fn download(client: &Client, remote: &Remote, blob: &Path) -> Result<()> {
    let mut name = blob.as_os_str().to_owned();
    name.push(".incomplete");
    let path = PathBuf::from(name);
    let open = || OpenOptions::new().create(true).append(true).read(true).open(&path);
    let mut file = open().with_context(|| format!("cannot write {}", path.display()))?;
    let mut resumed = file.metadata()?.len() > 0;
    loop {
        client.download(remote, &mut file).with_context(|| path.display().to_string())?;
        match verify(&path, remote) {
            Ok(()) => break,
            // What an earlier process left may be of something else.
            Err(_) if resumed => file.set_len(0)?,
            Err(error) => {
                drop(file);
                fs::remove_file(&path).with_context(|| path.display().to_string())?;
                return Err(error.context("what came is not what the Hub names, and is deleted; try again"));
            }
        }
        resumed = false;
    }
    file.sync_all().with_context(|| path.display().to_string())?;
    fs::rename(&path, blob).with_context(|| format!("cannot make {}", blob.display()))
}

/// Checks a file against what its ETag says: SHA-256 of a large file, git's hash of another.
fn verify(path: &Path, remote: &Remote) -> Result<()> {
    let size = fs::metadata(path)?.len();
    ensure!(size == remote.size, "it has {size} bytes, and should have {}", remote.size);
    let got = match remote.etag.len() {
        64 => sha256_file(path)?,
        40 => git_hash(path, size)?,
        _ => bail!("the Hub names it by {:?}, which is no hash", remote.etag),
    };
    ensure!(got == remote.etag, "its hash is {got}, and should be {}", remote.etag);
    Ok(())
}

/// The hash of `blob SIZE\0` and the content.
fn git_hash(path: &Path, size: u64) -> io::Result<String> {
    let mut hash = Sha1::new_with_prefix(format!("blob {size}\0"));
    let (mut file, mut piece) = (File::open(path)?, vec![0; 1 << 20]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hex(&hash.finalize())),
            read => hash.update(&piece[..read]),
        }
    }
}
