//! Unix sockets with the name that libpq expects: `.s.PGSQL.<port>` in a directory.

use std::{
    collections::BTreeSet,
    fs::{self, Metadata},
    io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::time::sleep;

use super::ListenError;
use crate::{
    config::{UnixSocket, socket_path},
    net::{tcp::BACKLOG, unix::effective_uid},
    telemetry::chain,
};

/// Between two checks of a socket's file, each of one system call.
const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// Read, write and execute of owner, group and others.
const PERMISSIONS: u32 = 0o777;

/// A Unix socket that accepts clients.
#[derive(Debug)]
pub(super) struct ListeningUnix {
    pub(super) socket: UnixListener,
    /// The file to remove at the end; none for an inherited socket.
    pub(super) file: Option<SocketFile>,
}

/// Unix sockets whose files are missing for now; cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct AbsentSockets(Arc<Mutex<BTreeSet<PathBuf>>>);

impl AbsentSockets {
    /// Fails with a sentence that names one of them, where there is one.
    pub(crate) fn check(&self) -> Result<(), String> {
        let gone = |path: &PathBuf| format!("the Unix socket `{}` is gone", path.display());
        self.paths().first().map_or(Ok(()), |path| Err(gone(path)))
    }

    fn mark(&self, path: &Path) -> Absent<'_> {
        self.paths().insert(path.to_owned());
        Absent {
            sockets: self,
            path: path.to_owned(),
        }
    }

    fn paths(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A socket is absent for as long as this lives.
struct Absent<'a> {
    sockets: &'a AbsentSockets,
    path: PathBuf,
}

impl Drop for Absent<'_> {
    fn drop(&mut self) {
        self.sockets.paths().remove(&self.path);
    }
}

/// The file of a socket that we made; removed when dropped, unless another has taken its place.
#[derive(Debug)]
pub(super) struct SocketFile {
    place: UnixSocket,
    port: u16,
    path: PathBuf,
    device: u64,
    inode: u64,
    /// Its permissions when it was last seen: a reload may have changed them.
    mode: AtomicU32,
}

impl SocketFile {
    /// A socket in the place of this one, once its file is gone: removed by a cleaner of temporary files, or with its
    /// directory. Cancel safe.
    pub(super) async fn replacement(&self, absent: &AbsentSockets) -> ListeningUnix {
        let mut mark = None;
        loop {
            sleep(CHECK_INTERVAL).await;
            // A link in the place of the socket is not followed: it may lead to another server.
            if let Ok(found) = tokio::fs::symlink_metadata(&self.path).await
                && self.is(&found)
            {
                self.mode.store(permissions(&found), Ordering::Relaxed);
                // Moved away and back.
                mark = None;
                continue;
            }
            let place = UnixSocket {
                mode: self.mode.load(Ordering::Relaxed),
                ..self.place.clone()
            };
            let is_new = mark.is_none();
            mark.get_or_insert_with(|| absent.mark(&self.path));
            match bind(&place, self.port) {
                Ok(listening) => {
                    tracing::warn!(
                        socket = %self.path.display(),
                        "the Unix socket was removed, and has been made again; hint: keep cleaners of temporary files away from it"
                    );
                    return listening;
                }
                Err(error) if is_new => {
                    tracing::error!(
                        socket = %self.path.display(),
                        error = %chain(&error),
                        hint = error.hint(),
                        "the Unix socket is gone, and cannot be made again for now"
                    );
                }
                // Logged once; readiness reports the socket until it is bound.
                Err(_) => {}
            }
        }
    }

    fn is(&self, found: &Metadata) -> bool {
        (found.dev(), found.ino()) == (self.device, self.inode)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| self.is(&found)) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn permissions(found: &Metadata) -> u32 {
    found.permissions().mode() & PERMISSIONS
}

/// Whether every user may connect: Linux requires write permission on the socket (unix(7)).
pub(super) fn is_open_to_all(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| permissions(&found) & 0o002 != 0)
}

/// Fails for all but a socket of our user.
fn check_ours(found: &Metadata) -> io::Result<()> {
    if !found.file_type().is_socket() || found.uid() != effective_uid() {
        return Err(io::Error::other("it is no socket of this user any more"));
    }
    Ok(())
}

pub(super) use self::mode::set as set_mode;

#[cfg(target_os = "linux")]
mod mode {
    use std::{
        fs::{self, File, Permissions},
        io,
        os::{fd::AsRawFd, unix::fs::PermissionsExt},
        path::Path,
    };

    use rustix::fs::{Mode, OFlags, fchmod, open};
    use socket2::Socket;

    use super::{check_ours, permissions};

    /// Sets the permissions, less the umask, of the file that `bind` makes, so that it never has wider ones.
    pub(super) fn prepare(socket: &Socket, mode: u32) -> io::Result<()> {
        Ok(fchmod(socket, Mode::from_raw_mode(mode))?)
    }

    /// Changes the permissions of our socket at this path, and of nothing that another user has put in its place: a symbolic
    /// link would lead to any file of ours.
    pub(in crate::listener) fn set(path: &Path, mode: u32) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(open(path, flags, Mode::empty())?);
        let found = file.metadata()?;
        check_ours(&found)?;
        if permissions(&found) == mode {
            return Ok(());
        }
        // The descriptor's own link leads to that very file; `fchmod` does not take such a descriptor.
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        fs::set_permissions(link, Permissions::from_mode(mode))
    }
}

#[cfg(not(target_os = "linux"))]
mod mode {
    use std::{fs, io, path::Path};

    use rustix::fs::{AtFlags, CWD, Mode, chmodat};
    use socket2::Socket;

    use super::{check_ours, permissions};

    /// BSD's `fchmod` takes no sockets; until `listen` no client can connect.
    #[expect(clippy::unnecessary_wraps, reason = "fails on Linux")]
    pub(super) fn prepare(_: &Socket, _: u32) -> io::Result<()> {
        Ok(())
    }

    /// As on Linux, by the path, whose last link is not followed.
    pub(in crate::listener) fn set(path: &Path, mode: u32) -> io::Result<()> {
        let found = fs::symlink_metadata(path)?;
        check_ours(&found)?;
        if permissions(&found) == mode {
            return Ok(());
        }
        let raw = mode.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
        let mode = Mode::from_raw_mode(raw);
        Ok(chmodat(CWD, path, mode, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

/// Creates the socket, in place of one that no process listens on any more.
pub(super) fn bind(place: &UnixSocket, port: u16) -> Result<ListeningUnix, ListenError> {
    let path = socket_path(&place.directory, port);
    // Fails only for the length: `sun_path` holds 108 bytes on Linux, 104 on macOS.
    let Ok(address) = SockAddr::unix(&path) else {
        let (path, length) = (path.display(), path.as_os_str().len());
        return Err(ListenError::new(
            format!(
                "the socket path `{path}` is {length} bytes long, which is more than a socket's address holds (--unix-socket)"
            ),
            "choose a shorter directory, such as /run/lakebase-proxy",
        ));
    };
    let failed = |source| ListenError::unix(&path, source);
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    mode::prepare(&socket, place.mode).map_err(failed)?;
    if let Err(error) = socket.bind(&address) {
        if error.kind() != io::ErrorKind::AddrInUse {
            return Err(failed(error));
        }
        remove_stale(&path, &address)?;
        socket.bind(&address).map_err(failed)?;
    }
    let found = fs::symlink_metadata(&path).map_err(failed)?;
    // From here on an error removes the file again.
    let file = SocketFile {
        place: place.clone(),
        port,
        path: path.clone(),
        device: found.dev(),
        inode: found.ino(),
        mode: AtomicU32::new(place.mode),
    };
    // Restores what the umask removed. No client can connect before `listen`.
    set_mode(&path, place.mode).map_err(failed)?;
    socket.listen(BACKLOG).map_err(failed)?;
    socket.set_nonblocking(true).map_err(failed)?;
    Ok(ListeningUnix {
        socket: socket.into(),
        file: Some(file),
    })
}

/// Removes what a server has left behind that was killed; a refused connection is the sign of it.
fn remove_stale(path: &Path, address: &SockAddr) -> Result<(), ListenError> {
    let failed = |source| ListenError::unix(path, source);
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        // Gone meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    // A file of another kind was not left behind by a server; removing it could lose data.
    if !found.file_type().is_socket() {
        return Err(ListenError::new(
            format!(
                "`{}` exists and is not a socket (--unix-socket)",
                path.display()
            ),
            "remove it, or choose another directory",
        ));
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    // A queue that is full must not hold us up.
    probe.set_nonblocking(true).map_err(failed)?;
    match probe.connect(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Any other error, such as a full queue or a lack of permission, may be that of a live server.
        Ok(()) | Err(_) => Err(ListenError::taken_unix(path)),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;
    use tokio::net::UnixStream;

    use super::*;
    use crate::{
        listener::{BoundSocket, Taken, accept::ListeningSocket},
        status::Peer,
    };

    fn place(directory: &TempDir) -> UnixSocket {
        UnixSocket {
            directory: directory.path().to_owned(),
            mode: 0o600,
        }
    }

    #[tokio::test]
    async fn a_socket_belongs_to_its_owner_and_is_removed_with_the_proxy() {
        let directory = TempDir::new().unwrap();
        let listening = bind(&place(&directory), 7000).unwrap();
        let path = directory.path().join(".s.PGSQL.7000");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(
            crate::listener::parse(&path),
            Some((directory.path().to_owned(), 7000))
        );
        let client = UnixStream::connect(&path).await.unwrap();
        let socket = ListeningSocket::register(&BoundSocket::Unix(listening.socket)).unwrap();
        let (_, peer) = socket.accept().await.unwrap();
        let us = effective_uid();
        assert!(
            matches!(peer, Peer::Unix { uid, pid: Some(_) } if uid == us),
            "{peer:?}"
        );
        drop((client, socket, listening.file));
        assert!(!path.exists());
    }

    /// Another user of the directory may put a link where the socket is: its target's permissions were changed.
    #[tokio::test]
    async fn permissions_are_those_of_the_socket_and_never_of_what_a_link_leads_to() {
        let directory = TempDir::new().unwrap();
        let path = socket_path(directory.path(), 1);
        let mode = |path: &Path| permissions(&fs::metadata(path).unwrap());
        let mut place = place(&directory);
        for wanted in [0o600, 0o660, 0o666, 0o777] {
            place.mode = wanted;
            let _listening = bind(&place, 1).unwrap();
            assert_eq!(mode(&path), wanted, "whatever the umask");
            set_mode(&path, 0o640).unwrap();
            assert_eq!(mode(&path), 0o640);
        }
        let secret = directory.path().join("secret");
        fs::write(&secret, "s").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink(&secret, &path).unwrap();
        assert!(set_mode(&path, 0o666).is_err());
        fs::remove_file(&path).unwrap();
        fs::hard_link(&secret, &path).unwrap();
        assert!(set_mode(&path, 0o666).is_err());
        assert_eq!(mode(&secret), 0o600);
    }

    #[tokio::test]
    async fn the_socket_of_a_killed_server_is_replaced() {
        let directory = TempDir::new().unwrap();
        let path = socket_path(directory.path(), 1);
        // Dropping a listener of std leaves the file, as a kill does.
        drop(UnixListener::bind(&path).unwrap());
        let _listening = bind(&place(&directory), 1).unwrap();
        assert!(UnixStream::connect(&path).await.is_ok());
    }

    #[tokio::test]
    async fn the_socket_of_a_running_server_and_other_files_are_kept() {
        let directory = TempDir::new().unwrap();
        let place = place(&directory);
        let _first = bind(&place, 1).unwrap();
        let path = socket_path(directory.path(), 1);
        assert_eq!(
            bind(&place, 1).unwrap_err().taken,
            Some(Taken::Unix(path.clone()))
        );
        assert!(path.exists());
        fs::write(socket_path(directory.path(), 2), "precious").unwrap();
        let refused = bind(&place, 2).unwrap_err().to_string();
        assert!(refused.contains("is not a socket"), "{refused}");
        assert!(socket_path(directory.path(), 2).exists());
    }

    #[tokio::test]
    async fn the_file_of_a_successor_is_not_removed() {
        let directory = TempDir::new().unwrap();
        let first = bind(&place(&directory), 1).unwrap();
        let path = socket_path(directory.path(), 1);
        fs::remove_file(&path).unwrap();
        let _second = bind(&place(&directory), 1).unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_and_a_missing_directory_are_reported() {
        let directory = TempDir::new().unwrap();
        let mut long = place(&directory);
        long.directory.push("x".repeat(100));
        let too_long = bind(&long, 1).unwrap_err();
        assert!(too_long.hint().unwrap().contains("shorter"), "{too_long}");
        let mut missing = place(&directory);
        missing.directory.push("nowhere");
        let error = bind(&missing, 1).unwrap_err();
        assert_eq!(error.hint(), Some("make the directory first"));
    }
}
