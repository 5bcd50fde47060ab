//! Watches files by polling. A look per second and file costs one system call, works on every file system, and follows the
//! symbolic links of mounted ConfigMaps and Secrets.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use super::file::{Stamp, blocking, stamp};

pub(crate) const INTERVAL: Duration = Duration::from_secs(1);

/// Files to watch for changes.
#[derive(Debug)]
pub(crate) struct FileWatch {
    files: Arc<[PathBuf]>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The files as they were when they were read.
    known: Stamps,
    /// The files at the last look.
    last: Stamps,
    next: Instant,
}

/// One per file; `None` for a missing one.
type Stamps = Vec<Option<Stamp>>;

impl FileWatch {
    /// Watches these files; before the first [`mark`](Self::mark), any existing file counts as changed.
    pub(crate) fn new(files: Vec<PathBuf>) -> Self {
        let none = vec![None; files.len()];
        Self::of(files, none)
    }

    /// Watches these files and takes their present state for the known one. Blocks.
    pub(crate) fn marked(files: Vec<PathBuf>) -> Self {
        let known = look(&files);
        Self::of(files, known)
    }

    fn of(files: Vec<PathBuf>, known: Stamps) -> Self {
        let state = State {
            last: known.clone(),
            known,
            next: Instant::now(),
        };
        Self {
            files: files.into(),
            state: Mutex::new(state),
        }
    }

    /// Takes the present state for the known one. Call it before reading the files, so that a change meanwhile is noticed.
    pub(crate) async fn mark(&self) {
        let now = self.look().await;
        let mut state = self.state();
        state.known.clone_from(&now);
        state.last = now;
    }

    /// Whether a file differs from its known state, missing files included. Looks once per interval at most, and returns
    /// `false` in between. Cancel safe.
    pub(crate) async fn is_changed(&self) -> bool {
        {
            let mut state = self.state();
            if Instant::now() < state.next {
                return false;
            }
            // Set before the look: handshakes at the same time cause one, and no lock is held across it.
            state.next = Instant::now() + INTERVAL;
        }
        let now = self.look().await;
        now != self.state().known
    }

    /// Completes when a file differs from its known state and has been stable for one interval, so that it is not read
    /// half-written. Missing files count as unchanged. Cancel safe.
    pub(crate) async fn changed(&self) {
        loop {
            let next = self.state().next;
            sleep_until(next).await;
            let mut now = self.look().await;
            let mut state = self.state();
            for (now, known) in now.iter_mut().zip(&state.known) {
                // A file is missing for a moment while it is replaced.
                *now = now.or(*known);
            }
            state.next = Instant::now() + INTERVAL;
            let is_stable = now == state.last;
            let is_changed = now != state.known;
            state.last = now;
            if is_stable && is_changed {
                return;
            }
        }
    }

    async fn look(&self) -> Stamps {
        let files = Arc::clone(&self.files);
        blocking(move || look(&files)).await
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn look(files: &[PathBuf]) -> Stamps {
    files.iter().map(|file| stamp(file)).collect()
}

// Windows lets only administrators make symbolic links.
#[cfg(all(test, unix))]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_replaced_symbolic_link_is_a_change_and_a_missing_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        // The layout of a mounted ConfigMap.
        for version in ["1", "2"] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("p.toml"), format!("port = {version}")).unwrap();
        }
        symlink("1", at("..data")).unwrap();
        symlink("..data/p.toml", at("p.toml")).unwrap();
        let watch = FileWatch::new(vec![at("p.toml")]);
        watch.mark().await;
        let a_while = INTERVAL * 10;
        assert!(timeout(a_while, watch.changed()).await.is_err());

        fs::remove_file(at("p.toml")).unwrap();
        assert!(timeout(a_while, watch.changed()).await.is_err(), "missing");
        symlink("..data/p.toml", at("p.toml")).unwrap();
        assert!(timeout(a_while, watch.changed()).await.is_err());

        symlink("2", at("..tmp")).unwrap();
        fs::rename(at("..tmp"), at("..data")).unwrap();
        assert!(timeout(a_while, watch.changed()).await.is_ok());
        watch.mark().await;
        assert!(timeout(a_while, watch.changed()).await.is_err(), "once");

        fs::write(at("p.toml"), "port = 3000").unwrap();
        assert!(timeout(a_while, watch.changed()).await.is_ok());
    }
}
