//! Unix sockets, named as libpq looks for them: `.s.PGSQL.<port>` in a directory.

use std::{
    fs, io,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{UnixListener, UnixStream};

use super::{Acceptor, BACKLOG};
use crate::{session::Peer, upstream::Keepalive};

/// How libpq's socket names begin; the port follows.
const NAME: &str = ".s.PGSQL.";

/// Where a Unix socket is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixPlace {
    /// Its directory, which must exist.
    pub directory: PathBuf,
    /// The file's permissions.
    pub mode: u32,
}

/// Why there is no Unix socket.
#[derive(Debug, thiserror::Error)]
pub enum UnixError {
    /// The kernel takes no name that long.
    #[error(
        "the socket path `{}` is {} bytes long, which is more than a socket's address holds (--unix-socket)",
        path.display(), path.as_os_str().len()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// Somebody answers there.
    #[error("another server listens on `{}` (--unix-socket)", path.display())]
    Taken {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("`{}` exists and is not a socket (--unix-socket)", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// It cannot be made.
    #[error("cannot listen on `{}` (--unix-socket)", path.display())]
    Bind {
        /// The path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl UnixError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::TooLong { .. } => Some("choose a shorter directory, such as /run/lakebase-proxy"),
            Self::Taken { .. } => Some("stop it, or choose another directory or --port"),
            Self::NotASocket { .. } => Some("remove it, or choose another directory"),
            Self::Bind { source, .. } => match source.kind() {
                io::ErrorKind::NotFound => Some("make the directory first"),
                io::ErrorKind::NotADirectory => {
                    Some("--unix-socket names the directory that the socket is made in")
                }
                io::ErrorKind::PermissionDenied => {
                    Some("the directory must be writable for the user that the proxy runs as")
                }
                _ => None,
            },
        }
    }
}

/// A socket that clients of this machine connect to.
#[derive(Debug)]
pub(super) struct UnixDoor {
    pub(super) socket: UnixListener,
    /// What to remove at the end; not for a socket that somebody else made.
    pub(super) _file: Option<SocketFile>,
}

impl Acceptor for UnixDoor {
    type Client = UnixStream;

    async fn accept(&self) -> io::Result<(UnixStream, Peer)> {
        let (client, _) = self.socket.accept().await?;
        let credentials = client.peer_cred()?;
        let peer = Peer::Unix {
            uid: credentials.uid(),
            pid: credentials.pid(),
        };
        Ok((client, peer))
    }

    fn tune(_client: &UnixStream, _keepalive: &Keepalive) {}
}

/// The file of a socket that we made; removed when dropped, unless another has taken its place.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| (file.dev(), file.ino()) == (self.device, self.inode));
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The path that libpq looks for.
pub(super) fn path(directory: &Path, port: u16) -> PathBuf {
    directory.join(format!("{NAME}{port}"))
}

/// Changes the permissions of a socket.
pub(super) fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Directory and port of a path that libpq finds.
pub(super) fn parse(path: &Path) -> Option<(PathBuf, u16)> {
    let port = path
        .file_name()?
        .to_str()?
        .strip_prefix(NAME)?
        .parse()
        .ok()?;
    Some((path.parent()?.to_owned(), port))
}

/// Makes the socket, in the place of one that nobody listens on any more.
pub(super) fn bind(place: &UnixPlace, port: u16) -> Result<UnixDoor, UnixError> {
    let path = path(&place.directory, port);
    let Ok(address) = SockAddr::unix(&path) else {
        return Err(UnixError::TooLong { path });
    };
    let failed = |source| UnixError::Bind {
        path: path.clone(),
        source,
    };
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    if let Err(error) = socket.bind(&address) {
        if error.kind() != io::ErrorKind::AddrInUse {
            return Err(failed(error));
        }
        remove_stale(&path, &address)?;
        socket.bind(&address).map_err(failed)?;
    }
    let found = fs::symlink_metadata(&path).map_err(failed)?;
    let file = SocketFile {
        path: path.clone(),
        device: found.dev(),
        inode: found.ino(),
    };
    // Before anybody can connect: until `listen` nobody is let in.
    fs::set_permissions(&path, fs::Permissions::from_mode(place.mode)).map_err(failed)?;
    socket.listen(BACKLOG).map_err(failed)?;
    socket.set_nonblocking(true).map_err(failed)?;
    let socket = UnixListener::from_std(socket.into()).map_err(failed)?;
    Ok(UnixDoor {
        socket,
        _file: Some(file),
    })
}

/// Removes what a server has left behind that was killed; a refused connection is the sign of it.
fn remove_stale(path: &Path, address: &SockAddr) -> Result<(), UnixError> {
    let failed = |source| UnixError::Bind {
        path: path.to_owned(),
        source,
    };
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        // Gone meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !found.file_type().is_socket() {
        return Err(UnixError::NotASocket {
            path: path.to_owned(),
        });
    }
    let probe = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed)?;
    // A queue that is full must not hold us up.
    probe.set_nonblocking(true).map_err(failed)?;
    match probe.connect(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(()) | Err(_) => Err(UnixError::Taken {
            path: path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn place(directory: &TempDir) -> UnixPlace {
        UnixPlace {
            directory: directory.path().to_owned(),
            mode: 0o600,
        }
    }

    #[tokio::test]
    async fn a_socket_is_its_owners_and_goes_with_the_proxy() {
        let directory = TempDir::new().unwrap();
        let door = bind(&place(&directory), 7000).unwrap();
        let path = directory.path().join(".s.PGSQL.7000");
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(parse(&path), Some((directory.path().to_owned(), 7000)));
        let client = UnixStream::connect(&path).await.unwrap();
        let (_, peer) = door.accept().await.unwrap();
        let us = rustix::process::geteuid().as_raw();
        assert!(
            matches!(peer, Peer::Unix { uid, pid: Some(_) } if uid == us),
            "{peer:?}"
        );
        drop((client, door));
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_a_killed_server_left_behind_is_replaced() {
        let directory = TempDir::new().unwrap();
        let path = path(directory.path(), 1);
        // Dropping a listener of std leaves the file, as a kill does.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let _door = bind(&place(&directory), 1).unwrap();
        assert!(UnixStream::connect(&path).await.is_ok());
    }

    #[tokio::test]
    async fn a_living_server_is_left_alone_and_so_is_what_is_no_socket() {
        let directory = TempDir::new().unwrap();
        let place = place(&directory);
        let _first = bind(&place, 1).unwrap();
        assert!(matches!(bind(&place, 1), Err(UnixError::Taken { .. })));
        assert!(path(directory.path(), 1).exists());
        fs::write(path(directory.path(), 2), "precious").unwrap();
        assert!(matches!(bind(&place, 2), Err(UnixError::NotASocket { .. })));
        assert!(path(directory.path(), 2).exists());
    }

    #[tokio::test]
    async fn the_file_of_a_successor_is_not_removed() {
        let directory = TempDir::new().unwrap();
        let first = bind(&place(&directory), 1).unwrap();
        let path = path(directory.path(), 1);
        fs::remove_file(&path).unwrap();
        let _second = bind(&place(&directory), 1).unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_and_a_missing_directory_are_told() {
        let directory = TempDir::new().unwrap();
        let mut long = place(&directory);
        long.directory.push("x".repeat(100));
        assert!(matches!(bind(&long, 1), Err(UnixError::TooLong { .. })));
        let mut missing = place(&directory);
        missing.directory.push("nowhere");
        let error = bind(&missing, 1).unwrap_err();
        assert_eq!(error.hint(), Some("make the directory first"));
    }
}
