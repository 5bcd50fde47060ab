//! On a system without Unix sockets: a configuration with one is refused before it gets here.

use std::{io, path::Path};

use super::ListenError;
use crate::{
    config::{UnixSocket, socket_path},
    net::unix::BoundUnix,
};

#[derive(Debug)]
pub(super) struct ListeningUnix {
    pub(super) socket: BoundUnix,
    pub(super) file: Option<SocketFile>,
}

#[derive(Debug)]
pub(super) enum SocketFile {}

impl SocketFile {
    #[expect(clippy::unused_async, reason = "the real one is")]
    pub(super) async fn replacement(&self, _: &AbsentSockets) -> ListeningUnix {
        match *self {}
    }
}

#[derive(Clone, Debug, Default)]
pub(crate) struct AbsentSockets(());

impl AbsentSockets {
    #[expect(
        clippy::unused_self,
        clippy::unnecessary_wraps,
        reason = "fails on Unix"
    )]
    pub(crate) fn check(&self) -> Result<(), String> {
        Ok(())
    }
}

pub(super) fn is_open_to_all(_: &Path) -> bool {
    false
}

pub(super) fn set_mode(_: &Path, _: u32) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(super) fn bind(place: &UnixSocket, port: u16) -> Result<ListeningUnix, ListenError> {
    let path = socket_path(&place.directory, port);
    Err(ListenError::unix(&path, io::ErrorKind::Unsupported.into()))
}
