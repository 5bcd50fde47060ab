//! The program as a separate process: its output, addresses and end.

use std::{
    ffi::OsStr,
    net::SocketAddr,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::Pid;
pub(crate) use rustix::process::Signal;
use tokio::{
    io::{AsyncRead, AsyncReadExt},
    process::{Child, Command},
    sync::watch,
    time::timeout,
};
use tokio_util::task::TaskTracker;

/// The machine may be busy with other tests.
const TIMEOUT: Duration = Duration::from_mins(1);

/// A running `lakebase-proxy`; killed when dropped.
pub(crate) struct Process {
    child: Child,
    id: u32,
    reply: watch::Receiver<Vec<u8>>,
    readers: TaskTracker,
}

impl Process {
    /// Starts `program` with these variables and no others.
    pub(crate) fn spawn(
        program: impl AsRef<OsStr>,
        variables: impl IntoIterator<Item = (impl Into<String>, impl Into<String>)>,
        arguments: &[&str],
    ) -> Self {
        let variables = variables
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()));
        let mut child = Command::new(program)
            .args(arguments)
            .env_clear()
            .envs(variables)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (output, reply) = watch::channel(Vec::new());
        let readers = TaskTracker::new();
        readers.spawn(listen(child.stdout.take().unwrap(), output.clone()));
        readers.spawn(listen(child.stderr.take().unwrap(), output));
        readers.close();
        Self {
            id: child.id().unwrap(),
            child,
            reply,
            readers,
        }
    }

    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Everything it has written so far.
    pub(crate) fn reply(&self) -> String {
        String::from_utf8_lossy(&self.reply.borrow()).into_owned()
    }

    /// Waits until it has written `text`, and returns the rest of that line.
    pub(crate) async fn line(&self, text: &str) -> String {
        let mut reply = self.reply.clone();
        let after = |reply: &Vec<u8>| {
            let reply = String::from_utf8_lossy(reply).into_owned();
            let (_, rest) = reply.split_once(text)?;
            Some(rest.split_once('\n')?.0.to_owned())
        };
        let found = timeout(TIMEOUT, reply.wait_for(|reply| after(reply).is_some())).await;
        match found {
            Ok(Ok(reply)) => after(&reply).unwrap(),
            _ => panic!("it never printed {text:?}, only:\n{}", self.reply()),
        }
    }

    /// The loopback address in the line with `text`.
    pub(crate) async fn address(&self, text: &str) -> SocketAddr {
        let line = self.line(text).await;
        let (_, rest) = line
            .split_once("127.0.0.1:")
            .unwrap_or_else(|| panic!("no address in {line:?}"));
        let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
        SocketAddr::from(([127, 0, 0, 1], port.parse().unwrap()))
    }

    /// Ends it, waits for the exit, and returns all of its output.
    pub(crate) async fn end(self) -> (ExitStatus, String) {
        signal(self.id, Signal::TERM);
        self.ended().await
    }

    /// Waits until it ends by itself.
    pub(crate) async fn ended(mut self) -> (ExitStatus, String) {
        let ended = timeout(TIMEOUT, self.child.wait()).await;
        let status = ended.expect("it ends").unwrap();
        self.readers.wait().await;
        (status, self.reply())
    }
}

/// Signals a process without the program `kill`, which minimal systems lack.
pub(crate) fn signal(id: u32, signal: Signal) {
    let process = Pid::from_raw(id.try_into().unwrap()).unwrap();
    rustix::process::kill_process(process, signal).unwrap();
}

async fn listen(mut pipe: impl AsyncRead + Unpin, output: watch::Sender<Vec<u8>>) {
    let mut chunk = vec![0; 64 * 1024];
    while let Ok(read @ 1..) = pipe.read(&mut chunk).await {
        output.send_modify(|reply| reply.extend_from_slice(&chunk[..read]));
    }
}
