//! Reads the files that settings name: regular files of bounded length, so that a device or a pipe is an error instead of a
//! wait.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
};

use tokio::task::spawn_blocking;
use zeroize::Zeroizing;

/// What changes with a file. Symbolic links are followed, as Kubernetes replaces
/// mounted Secrets by changing one.
pub(crate) type Stamp = [i64; 6];

/// Reads a regular file into memory that is zeroed after use. Blocks.
///
/// # Errors
/// For anything but a regular file, and for files longer than `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    let file = system::open(path)?;
    let metadata = file.metadata()?;
    // Of the open descriptor: the path may lead to another file by now.
    if !metadata.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    // One allocation with space to detect the end: growing would leave copies of a secret behind.
    let capacity = usize::try_from(metadata.len().min(limit)).unwrap_or_default();
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity.saturating_add(32)));
    // One byte more than allowed reveals a longer file, also one that has grown since.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length <= limit) {
        return Ok(bytes);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        format!("longer than {limit} bytes"),
    ))
}

/// The same on a blocking thread. Cancel safe.
pub(crate) async fn read_off_runtime(path: PathBuf, limit: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    blocking(move || read(&path, limit)).await
}

/// Runs work that reads files or derives keys on a blocking thread, as it would hold up the sessions of a runtime.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down, and drops this task too.
            Err(_) => std::future::pending().await,
        },
    }
}

/// The bytes as UTF-8 text.
pub(crate) fn text(bytes: &[u8]) -> io::Result<&str> {
    std::str::from_utf8(bytes)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not UTF-8 text"))
}

/// The state of the file; `None` if it is missing. Blocks.
pub(crate) fn stamp(path: &Path) -> Option<Stamp> {
    Some(system::stamp(&path.metadata().ok()?))
}

#[cfg(unix)]
mod system {
    use std::{
        fs::{File, Metadata, OpenOptions},
        io,
        os::unix::fs::{MetadataExt, OpenOptionsExt},
        path::Path,
    };

    use rustix::fs::OFlags;

    /// Device, inode, length, times of the last change.
    pub(super) fn stamp(metadata: &Metadata) -> super::Stamp {
        [
            metadata.dev().cast_signed(),
            metadata.ino().cast_signed(),
            metadata.len().cast_signed(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            // `cp -p` and `rsync -t` restore the time of modification, but not this one.
            metadata.ctime_nsec(),
        ]
    }

    /// Without these flags, opening a pipe would wait for its writer, and opening a terminal make it the controlling one.
    pub(super) fn open(path: &Path) -> io::Result<File> {
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        OpenOptions::new()
            .read(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
    }
}

#[cfg(windows)]
mod system {
    use std::{
        fs::{File, Metadata},
        io,
        os::windows::fs::MetadataExt,
        path::Path,
    };

    /// Length and times; a stable std has no number of a file there.
    pub(super) fn stamp(metadata: &Metadata) -> super::Stamp {
        [
            metadata.file_size().cast_signed(),
            metadata.creation_time().cast_signed(),
            metadata.last_write_time().cast_signed(),
            0,
            0,
            0,
        ]
    }

    pub(super) fn open(path: &Path) -> io::Result<File> {
        File::open(path)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_device_a_pipe_and_a_directory_are_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        assert!(
            std::process::Command::new("mkfifo")
                .arg(&pipe)
                .status()
                .unwrap()
                .success()
        );
        for path in [Path::new("/dev/zero"), &pipe, directory.path()] {
            let error = read(path, 100).unwrap_err();
            assert!(error.to_string().contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn a_file_is_read_up_to_its_limit() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, [b'x'; 100]).unwrap();
        assert_eq!(read(file.path(), 100).unwrap().len(), 100);
        assert!(read(file.path(), 99).is_err());
        // A file that reports no length.
        #[cfg(target_os = "linux")]
        assert!(
            !read(Path::new("/proc/self/status"), 100_000)
                .unwrap()
                .is_empty()
        );
    }
}
