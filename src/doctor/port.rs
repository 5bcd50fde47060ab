//! Whether the proxy's port and Unix socket are free, and if not, their owner.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use super::report::Finding;
use crate::{
    config::ListenAddresses,
    listener::{Listener, Taken},
    net::blocking,
    telemetry::chain,
};

/// State of a listening socket in `/proc/net/tcp` (`TCP_LISTEN`).
const LISTEN: &str = "0A";
/// The name of the proxy's process, within the kernel's limit of 15 characters.
const OURSELVES: &str = "lakebase-proxy";

/// Binds the addresses for a moment. Must run on a runtime.
pub(super) async fn check(addresses: &ListenAddresses) -> Finding {
    // The proxy's own way to bind, which fails for the same reasons.
    match Listener::bind(addresses) {
        Ok(_bound) if addresses.port == 0 => Finding::ok("any free port will do"),
        Ok(_bound) => Finding::ok(format!("{addresses} is free")),
        Err(error) => {
            let failed = Finding::failed(chain(&error).to_string()).hint(error.hint());
            match error.taken {
                Some(Taken::Tcp(address)) => taken_port(address).await,
                Some(Taken::Unix(path)) => taken_path(path).await.unwrap_or(failed),
                None => failed,
            }
        }
    }
}

/// A finding if the socket is that of a proxy: one that serves while `doctor` checks it is no problem.
async fn taken_path(path: PathBuf) -> Option<Finding> {
    let name = path.display().to_string();
    let owner = blocking(move || {
        let proc = Path::new("/proc");
        let table = fs::read_to_string(proc.join("net/unix")).ok()?;
        owner_of(proc, &listening_unix(&table, path.to_str()?))
    });
    let owner = owner.await.filter(|owner| owner.name == OURSELVES);
    owner.map(|owner| owner.is_serving(&name))
}

async fn taken_port(listen: SocketAddr) -> Finding {
    let flag = "choose another port with --port (0 = any free one)";
    let port = listen.port();
    // Reads the descriptors of every process.
    match blocking(move || owner(Path::new("/proc"), port)).await {
        Some(owner) if owner.name == OURSELVES => owner.is_serving(&listen.to_string()),
        Some(Owner { pid, name }) => {
            Finding::failed(format!("{listen} is taken by `{name}` (pid {pid})"))
                .fix(format!("stop it (`kill {pid}`), or {flag}"))
        }
        None => Finding::failed(format!(
            "{listen} is taken by a process that this user may not see"
        ))
        .fix(format!(
            "find it with `sudo ss -ltnp 'sport = :{port}'`, or {flag}"
        )),
    }
}

/// A process. Without its command line, which may hold secrets.
#[derive(Debug, PartialEq, Eq)]
struct Owner {
    pid: u32,
    name: String,
}

impl Owner {
    fn is_serving(&self, address: &str) -> Finding {
        let pid = self.pid;
        Finding::ok(format!(
            "{address} is served by a lakebase-proxy already (pid {pid})"
        ))
    }
}

/// The process that listens on `port`, if it is visible. Blocks.
fn owner(proc: &Path, port: u16) -> Option<Owner> {
    let inodes: Vec<String> = ["net/tcp", "net/tcp6"]
        .into_iter()
        .filter_map(|table| fs::read_to_string(proc.join(table)).ok())
        .flat_map(|table| listening(&table, port))
        .collect();
    owner_of(proc, &inodes)
}

/// The process that holds one of these sockets, if it is visible. Blocks.
fn owner_of(proc: &Path, inodes: &[String]) -> Option<Owner> {
    // Without a socket, no process need be searched.
    if inodes.is_empty() {
        return None;
    }
    fs::read_dir(proc)
        .ok()?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid = entry.file_name().to_str()?.parse().ok()?;
            Some((pid, entry.path()))
        })
        .find(|(_, process)| holds(process, inodes))
        .map(|(pid, process)| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            Owner {
                pid,
                name: name.trim().to_owned(),
            }
        })
}

/// The inodes of the sockets that listen on `port`, from a table in `/proc/net`.
fn listening(table: &str, port: u16) -> Vec<String> {
    let suffix = format!(":{port:04X}");
    inodes(table, |columns| {
        // The columns of proc_pid_net(5), of which 9 is the inode.
        let (local, state) = (columns.get(1)?, columns.get(3)?);
        let is_it = local.ends_with(&suffix) && *state == LISTEN;
        columns.get(9).filter(|_| is_it)
    })
}

/// The inodes of the Unix sockets with this path.
fn listening_unix(table: &str, path: &str) -> Vec<String> {
    inodes(table, |columns| {
        columns.get(6).filter(|_| columns.get(7) == Some(&path))
    })
}

/// The column that `find` returns for each line behind the heading.
fn inodes<'t>(
    table: &'t str,
    find: impl for<'c> Fn(&'c [&'t str]) -> Option<&'c &'t str>,
) -> Vec<String> {
    let inode = |line: &'t str| {
        let columns: Vec<&str> = line.split_ascii_whitespace().collect();
        find(&columns).map(|inode| (*inode).to_owned())
    };
    table.lines().skip(1).filter_map(inode).collect()
}

fn holds(process: &Path, inodes: &[String]) -> bool {
    // Other users' descriptors are visible to root only.
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else {
        return false;
    };
    descriptors.flatten().any(|descriptor| {
        fs::read_link(descriptor.path()).is_ok_and(|target| {
            let target = target.to_string_lossy();
            target
                .strip_prefix("socket:[")
                .and_then(|rest| rest.strip_suffix(']'))
                .is_some_and(|inode| inodes.iter().any(|wanted| wanted == inode))
        })
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use crate::config::UnixSocket;

    use super::*;
    use crate::doctor::report::Outcome;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000   104        0 4711 1 0000000000000000 100 0 0 10 0
   1: 0100007F:1538 0100007F:D431 01 00000000:00000000 00:00000000 00000000   104        0 4712 1 0000000000000000 20 4 30 10 -1
   2: 0100007F:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4713 1 0000000000000000 100 0 0 10 0
";

    #[test]
    fn a_unix_socket_is_found_by_its_path() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 4711 /run/x/.s.PGSQL.5432\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 4712\n";
        assert_eq!(listening_unix(table, "/run/x/.s.PGSQL.5432"), ["4711"]);
        assert!(listening_unix(table, "/run/x").is_empty());
    }

    #[test]
    fn a_listener_is_found_among_processes() {
        assert_eq!(listening(TABLE, 5432), ["4711"]);
        assert_eq!(listening(TABLE, 80), ["4713"]);
        assert!(listening(TABLE, 54321).is_empty());
        assert!(listening("header\ngarbage", 5432).is_empty());

        let proc = TempDir::new().unwrap();
        let at = |path: &str| proc.path().join(path);
        fs::create_dir_all(at("net")).unwrap();
        fs::write(at("net/tcp"), TABLE).unwrap();
        for (pid, inode) in [("7", "4712"), ("42", "4711")] {
            fs::create_dir_all(at(&format!("{pid}/fd"))).unwrap();
            symlink(format!("socket:[{inode}]"), at(&format!("{pid}/fd/3"))).unwrap();
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

    #[tokio::test]
    async fn a_unix_socket_in_use_is_reported_and_left_alone() {
        let directory = TempDir::new().unwrap();
        let addresses = ListenAddresses {
            port: 7,
            tcp: Vec::new(),
            unix: Some(UnixSocket {
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
        assert!(path.exists());
    }

    #[tokio::test]
    async fn a_taken_port_names_its_owner_and_a_free_one_is_free() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let finding = check(&addresses(address)).await;
        assert_eq!(finding.outcome, Outcome::Failed);
        let pid = format!("pid {}", std::process::id());
        assert!(finding.message.contains(&pid), "{}", finding.message);
        assert!(finding.fix.unwrap().contains("--port"));

        let free = check(&addresses("127.0.0.1:0".parse().unwrap())).await;
        assert_eq!(free.outcome, Outcome::Ok);
        let elsewhere = check(&addresses("192.0.2.1:0".parse().unwrap())).await;
        assert!(elsewhere.fix.unwrap().contains("--address"));
    }
}
