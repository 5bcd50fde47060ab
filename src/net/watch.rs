//! Watches files by polling. A look per second and file costs one system call, works on every file system, and follows the
//! symbolic links of mounted ConfigMaps and Secrets.

use std::{
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

use super::file::{Stamp, stamp};

const INTERVAL: Duration = Duration::from_secs(1);

/// Files to watch for changes.
#[derive(Debug)]
pub(crate) struct FileWatch {
    files: Vec<PathBuf>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The files as they were when they were read.
    known: Vec<Option<Stamp>>,
    /// The files at the last look.
    last: Vec<Option<Stamp>>,
    next: Instant,
}

impl FileWatch {
    /// Watches these files; before the first [`mark`](Self::mark), any existing file counts as changed.
    pub(crate) fn new(files: Vec<PathBuf>) -> Self {
        let none = vec![None; files.len()];
        let state = State {
            known: none.clone(),
            last: none,
            next: Instant::now(),
        };
        Self {
            files,
            state: Mutex::new(state),
        }
    }

    /// Takes the present state for the known one. Call it before reading the files, so that a change meanwhile is noticed.
    pub(crate) async fn mark(&self) {
        let now = self.look(&[]).await;
        let mut state = self.state();
        state.known.clone_from(&now);
        state.last = now;
    }

    /// Completes when a file differs from its known state and has been stable for one interval, so that it is not read
    /// half-written. Missing files count as unchanged. Cancel safe.
    pub(crate) async fn changed(&self) {
        loop {
            let next = self.state().next;
            sleep_until(next).await;
            let known = self.state().known.clone();
            let now = self.look(&known).await;
            let mut state = self.state();
            state.next = Instant::now() + INTERVAL;
            let is_stable = now == state.last;
            let is_changed = now != state.known;
            state.last = now;
            if is_stable && is_changed {
                return;
            }
        }
    }

    /// One stamp per file; that in `before` for a missing one.
    async fn look(&self, before: &[Option<Stamp>]) -> Vec<Option<Stamp>> {
        let mut stamps = Vec::with_capacity(self.files.len());
        for (index, file) in self.files.iter().enumerate() {
            let before = before.get(index).copied().flatten();
            stamps.push(stamp(file).await.or(before));
        }
        stamps
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
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
