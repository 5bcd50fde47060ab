//! Noticing that a file has changed: one look a second at what its path leads to, which costs a system call, works on
//! every file system, and sees the symbolic links of a mounted ConfigMap turn.

use std::{path::PathBuf, time::Duration};

use tokio::time::sleep;

use crate::net::file::{Stamp, stamp};

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Files, and what they were when they were last looked at.
#[derive(Debug)]
pub(super) struct Watch {
    files: Vec<PathBuf>,
    seen: Vec<Option<Stamp>>,
}

impl Watch {
    /// From their state now on.
    pub(super) async fn new(files: Vec<PathBuf>) -> Self {
        let seen = stamps(&files, &[]).await;
        Self { files, seen }
    }

    /// Returns when a file is another and has stood still for one look, so that it is not read half-written; a file
    /// that is missing is waited for. Cancel safe.
    pub(super) async fn changed(&mut self) {
        let mut last = self.seen.clone();
        loop {
            sleep(LOOK_EVERY).await;
            let now = stamps(&self.files, &last).await;
            if now != self.seen && now == last {
                self.seen = now;
                return;
            }
            last = now;
        }
    }
}

/// One stamp a file; for one that is missing what it was before.
async fn stamps(files: &[PathBuf], before: &[Option<Stamp>]) -> Vec<Option<Stamp>> {
    let mut stamps = Vec::with_capacity(files.len());
    for (index, file) in files.iter().enumerate() {
        let before = before.get(index).copied().flatten();
        stamps.push(stamp(file).await.or(before));
    }
    stamps
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn links_that_turn_are_seen_and_gaps_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        // As the kubelet lays a ConfigMap out.
        for version in ["1", "2"] {
            fs::create_dir(at(version)).unwrap();
            fs::write(at(version).join("p.toml"), format!("port = {version}")).unwrap();
        }
        symlink("1", at("..data")).unwrap();
        symlink("..data/p.toml", at("p.toml")).unwrap();
        let mut watch = Watch::new(vec![at("p.toml")]).await;
        let a_while = LOOK_EVERY * 10;
        assert!(timeout(a_while, watch.changed()).await.is_err());

        fs::remove_file(at("p.toml")).unwrap();
        assert!(timeout(a_while, watch.changed()).await.is_err(), "a gap");
        symlink("..data/p.toml", at("p.toml")).unwrap();
        assert!(timeout(a_while, watch.changed()).await.is_err());

        symlink("2", at("..tmp")).unwrap();
        fs::rename(at("..tmp"), at("..data")).unwrap();
        assert!(timeout(a_while, watch.changed()).await.is_ok());
        assert!(timeout(a_while, watch.changed()).await.is_err(), "once");

        fs::write(at("p.toml"), "port = 3000").unwrap();
        assert!(timeout(a_while, watch.changed()).await.is_ok());
    }
}
