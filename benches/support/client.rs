//! A Postgres client of the barest kind: blocking, without a password, one buffer.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// More than any answer takes, also under valgrind.
const TIMEOUT: Duration = Duration::from_mins(1);
const SELECT_1: &[u8] = b"Q\0\0\0\x0dSELECT 1\0";

/// A session.
pub(crate) struct Client {
    stream: TcpStream,
}

impl Client {
    /// Opens a session, up to its first ReadyForQuery.
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        let mut client = Self { stream };
        let body = b"\0\x03\0\0user\0measure\0application_name\0measure\0\0";
        let length = u32::try_from(body.len() + 4).unwrap_or_default();
        client
            .stream
            .write_all(&[&length.to_be_bytes()[..], body].concat())?;
        client.until_ready()?;
        Ok(client)
    }

    /// One round trip.
    pub(crate) fn select_1(&mut self) -> io::Result<()> {
        self.stream.write_all(SELECT_1)?;
        self.until_ready()
    }

    /// Sends Terminate and waits until the other side has closed, too.
    pub(crate) fn terminate(mut self) -> io::Result<()> {
        self.stream.write_all(b"X\0\0\0\x04")?;
        let mut rest = [0; 512];
        while self.stream.read(&mut rest)? > 0 {}
        Ok(())
    }

    /// Every answer of the scripted server ends with a ReadyForQuery, alone or with what comes before it.
    fn until_ready(&mut self) -> io::Result<()> {
        let mut received = [0; 4096];
        let mut have = 0;
        loop {
            let room = received.get_mut(have..).filter(|room| !room.is_empty());
            let room = room.ok_or_else(|| io::Error::other("the answer is too long"))?;
            match self.stream.read(room)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => have += read,
            }
            match received.get(..have) {
                Some(reply) if reply.first() == Some(&b'E') => {
                    return Err(io::Error::other(
                        String::from_utf8_lossy(reply).into_owned(),
                    ));
                }
                Some([.., b'Z', 0, 0, 0, 5, _]) => return Ok(()),
                _ => {}
            }
        }
    }
}
