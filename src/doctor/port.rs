//! Whether the proxy's port and Unix socket are free, and if not, their owner.

use std::{fs, path::Path};

use tokio::time::timeout;

use super::{check::Finding, workspace::STEP_TIMEOUT};
use crate::{
    config::ListenAddresses,
    listener::{Listener, Taken},
    net::{
        blocking,
        unix::{self, UnixStream},
    },
    telemetry::chain,
};

/// State of a listening socket in `/proc/net/tcp` (`TCP_LISTEN`).
const LISTEN: &str = "0A";
/// The name of the proxy's process, within the kernel's limit of 15 characters.
const OURSELVES: &str = "lakebase-proxy";

/// Binds the addresses for a moment. Must run on a runtime.
pub(super) async fn check(addresses: &ListenAddresses) -> Finding {
    // The proxy's own way to bind, which fails for the same reasons.
    let error = match Listener::bind(addresses) {
        Ok(_bound) if addresses.port == 0 => return Finding::ok("any free port will do"),
        Ok(_bound) => return Finding::ok(format!("{addresses} is free")),
        Err(error) => error,
    };
    let failed = Finding::failed(chain(&error).to_string()).hint(error.hint());
    let (address, owner) = match &error.taken {
        Some(Taken::Tcp(address)) => {
            let port = address.port();
            // Reads the descriptors of every process.
            let owner = blocking(move || owner(Path::new("/proc"), port));
            (address.to_string(), owner.await)
        }
        Some(Taken::Unix(path)) => (path.display().to_string(), server_of(path).await),
        None => return failed,
    };
    let other = "choose another port with --port (0 = any free one)";
    match (error.taken, owner) {
        // A proxy that serves while `doctor` checks it is no problem.
        (_, Some(Owner { pid, name })) if name == OURSELVES => Finding::ok(format!(
            "{address} is served by a lakebase-proxy already (pid {pid})"
        )),
        (Some(Taken::Tcp(_)), Some(Owner { pid, name })) => {
            Finding::failed(format!("{address} is taken by `{name}` (pid {pid})"))
                .fix(format!("stop it (`kill {pid}`), or {other}"))
        }
        (Some(Taken::Tcp(tcp)), None) => {
            let message = format!("{address} is taken by a process that this user may not see");
            let fix = format!("find it with `{}`, or {other}", search(tcp.port()));
            Finding::failed(message).fix(fix)
        }
        _ => failed,
    }
}

/// A process. Without its command line, which may hold secrets.
#[derive(Debug, PartialEq, Eq)]
struct Owner {
    pid: u32,
    name: String,
}

impl Owner {
    fn new(proc: &Path, pid: u32) -> Self {
        let name = fs::read_to_string(proc.join(format!("{pid}/comm"))).unwrap_or_default();
        let name = name.trim().to_owned();
        Self { pid, name }
    }
}

/// The process that listens on a Unix socket, if it is visible.
async fn server_of(path: &Path) -> Option<Owner> {
    // To a client, SO_PEERCRED names the process that called listen(2) (unix(7)).
    let socket = timeout(STEP_TIMEOUT, UnixStream::connect(path)).await;
    let pid = unix::peer(&socket.ok()?.ok()?).ok()?.pid?;
    Some(Owner::new(Path::new("/proc"), pid.try_into().ok()?))
}

/// A command that shows the process that listens on `port`.
fn search(port: u16) -> String {
    if cfg!(windows) {
        format!("netstat -ano -p tcp | findstr :{port}")
    } else if cfg!(target_os = "linux") {
        format!("sudo ss -ltnp 'sport = :{port}'")
    } else {
        format!("sudo lsof -nP -iTCP:{port} -sTCP:LISTEN")
    }
}

/// The process that listens on `port`, if it is visible: on Linux alone, whose `/proc` names it. Blocks.
fn owner(proc: &Path, port: u16) -> Option<Owner> {
    let tables = ["net/tcp", "net/tcp6"].map(|table| fs::read_to_string(proc.join(table)));
    let tables = tables.iter().flatten();
    let sockets: Vec<String> = tables.flat_map(|table| listening(table, port)).collect();
    // Without a socket, no process need be searched.
    if sockets.is_empty() {
        return None;
    }
    let mut pids = fs::read_dir(proc)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let pid = pids.find(|pid| {
        // Other users' descriptors are visible to root only.
        let descriptors = fs::read_dir(proc.join(format!("{pid}/fd")));
        let mut descriptors = descriptors.into_iter().flatten().flatten();
        descriptors.any(|descriptor| {
            let target = fs::read_link(descriptor.path()).unwrap_or_default();
            sockets.iter().any(|socket| target == Path::new(socket))
        })
    })?;
    Some(Owner::new(proc, pid))
}

/// The sockets that listen on `port`, as the links in `/proc/<pid>/fd` name them, from a table in `/proc/net`.
fn listening(table: &str, port: u16) -> Vec<String> {
    let suffix = format!(":{port:04X}");
    let socket = |line: &str| {
        // The columns of proc_pid_net(5), of which 9 is the inode.
        let columns: Vec<&str> = line.split_ascii_whitespace().collect();
        let (local, state, inode) = (columns.get(1)?, columns.get(3)?, columns.get(9)?);
        (local.ends_with(&suffix) && *state == LISTEN).then(|| format!("socket:[{inode}]"))
    };
    table.lines().skip(1).filter_map(socket).collect()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::doctor::report::Outcome;

    #[cfg(unix)]
    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000   104        0 4711 1 0000000000000000 100 0 0 10 0
   1: 0100007F:1538 0100007F:D431 01 00000000:00000000 00:00000000 00000000   104        0 4712 1 0000000000000000 20 4 30 10 -1
   2: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0000000000000000 100 0 0 10 0
";

    #[cfg(unix)]
    #[test]
    fn a_listener_is_found_among_processes() {
        assert_eq!(listening(TABLE, 5432), ["socket:[4711]"]);
        assert_eq!(listening(TABLE, 80), ["socket:[4713]"]);
        assert!(listening(TABLE, 54321).is_empty());
        assert!(listening("header\ngarbage", 5432).is_empty());

        let proc = tempfile::TempDir::new().unwrap();
        let at = |path: &str| proc.path().join(path);
        fs::create_dir_all(at("net")).unwrap();
        fs::write(at("net/tcp"), TABLE).unwrap();
        for (pid, inode) in [("7", "4712"), ("42", "4711")] {
            fs::create_dir_all(at(&format!("{pid}/fd"))).unwrap();
            std::os::unix::fs::symlink(format!("socket:[{inode}]"), at(&format!("{pid}/fd/3")))
                .unwrap();
            fs::write(at(&format!("{pid}/comm")), "postgres\n").unwrap();
        }
        assert_eq!(
            owner(proc.path(), 5432),
            Some(Owner {
                pid: 42,
                name: "postgres".to_owned()
            })
        );
        assert_eq!(owner(proc.path(), 80), None);
    }

    fn addresses(address: SocketAddr) -> ListenAddresses {
        ListenAddresses {
            port: address.port(),
            tcp: vec![address],
            unix: None,
        }
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn a_unix_socket_in_use_is_reported_and_left_alone() {
        let directory = tempfile::TempDir::new().unwrap();
        let addresses = ListenAddresses {
            port: 7,
            tcp: Vec::new(),
            unix: Some(crate::config::UnixSocket {
                directory: directory.path().to_owned(),
                mode: 0o600,
            }),
        };
        assert_eq!(check(&addresses).await.outcome, Outcome::Ok);
        let path = directory.path().join(".s.PGSQL.7");
        assert!(!path.exists(), "it was bound for a moment only");
        let _taken = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let finding = check(&addresses).await;
        assert_eq!(finding.outcome, Outcome::Failed);
        assert!(finding.message.contains("--unix-socket"));
        let owner = server_of(&path).await.unwrap();
        assert_eq!(owner.pid, std::process::id());
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_taken_port_names_its_owner_and_a_free_one_is_free() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let finding = check(&addresses(address)).await;
        assert_eq!(finding.outcome, Outcome::Failed);
        if cfg!(target_os = "linux") {
            let pid = format!("pid {}", std::process::id());
            assert!(finding.message.contains(&pid), "{}", finding.message);
        }
        assert!(finding.fix.unwrap().contains("--port"));

        let free = check(&addresses("127.0.0.1:0".parse().unwrap())).await;
        assert_eq!(free.outcome, Outcome::Ok);
        let elsewhere = check(&addresses("192.0.2.1:0".parse().unwrap())).await;
        assert!(elsewhere.fix.unwrap().contains("--address"));
    }
}
