//! A Postgres of our own for one test, and a listener in front of it that stands in for the proxy.

use std::{
    net::SocketAddr,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tempfile::TempDir;
use tokio::net::{TcpListener, UnixStream};
use tokio_postgres::{Client, Config, NoTls};
use tokio_util::task::TaskTracker;

use crate::{
    harness::{self, eventually, port::ReservedPort},
    process::{Signal, signal},
};

/// A server without passwords on a Unix socket in a private directory, gone with the value.
pub(crate) struct Cluster {
    directory: TempDir,
    server: Child,
    port: u16,
    tasks: TaskTracker,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        Self::start_at(5432, "").await
    }

    /// Reached over TCP, too, with TLS on request; `ca_file` is the trusted root. `None` if this Postgres was built without
    /// TLS, as the one that is fetched where none is installed.
    pub(crate) async fn start_with_tls() -> Option<(Self, ReservedPort)> {
        let port = ReservedPort::new();
        let cluster = Self::start_at(port.number(), "127.0.0.1").await;
        let data = cluster.directory.path().join("data");
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(["localhost".to_owned()])
            .unwrap()
            .self_signed(&key)
            .unwrap();
        for (name, content) in [
            ("server.crt", certificate.pem()),
            ("server.key", key.serialize_pem()),
        ] {
            let path = data.join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            Owner::of(&data).give(&path);
        }
        let admin = cluster.connect("postgres").await;
        let library = admin.query_one("SHOW ssl_library", &[]).await.unwrap();
        if library.get::<_, &str>(0).is_empty() {
            return None;
        }
        admin
            .batch_execute("ALTER SYSTEM SET ssl = on")
            .await
            .unwrap();
        Some((cluster, port))
    }

    /// The certificate of [`start_with_tls`](Self::start_with_tls), which is its own authority.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.directory.path().join("data/server.crt")
    }

    async fn start_at(port: u16, listen: &str) -> Self {
        let shared = harness::server().await;
        let directory = TempDir::new().unwrap();
        let owner = Owner::of(shared.directory());
        owner.give(directory.path());
        let data = directory.path().join("data");
        let as_owner = |program: &str| {
            let mut command = Command::new(shared.bin_dir().join(program));
            command
                .current_dir(directory.path())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .env("LC_ALL", "C")
                .uid(owner.user)
                .gid(owner.group);
            command
        };
        let made = as_owner("initdb")
            .args([
                "-A",
                "trust",
                "-U",
                "postgres",
                "-E",
                "UTF8",
                "--no-sync",
                "-D",
            ])
            .arg(&data)
            .status();
        assert!(made.unwrap().success(), "initdb");
        let server = as_owner("postgres")
            .arg("-D")
            .arg(&data)
            .arg("-k")
            .arg(directory.path())
            .args(["-p", &port.to_string()])
            .args(["-c", &format!("listen_addresses={listen}")])
            .args(["-c", "fsync=off", "-c", "timezone=UTC"])
            .spawn()
            .unwrap();
        let cluster = Self {
            directory,
            server,
            port,
            tasks: TaskTracker::new(),
        };
        eventually("the server starts", async || {
            let connected = cluster.config("postgres").connect(NoTls).await;
            connected.is_ok().then_some(())
        })
        .await;
        cluster
    }

    /// A superuser's connection.
    pub(crate) async fn connect(&self, database: &str) -> Client {
        let (client, connection) = self.config(database).connect(NoTls).await.unwrap();
        self.tasks.spawn(connection);
        client
    }

    fn config(&self, database: &str) -> Config {
        let mut config = Config::new();
        config
            .host_path(self.directory.path())
            .port(self.port)
            .user("postgres")
            .dbname(database);
        config
    }

    /// Passes TCP connections on to the server, as the proxy would.
    pub(crate) async fn front(&self) -> Front {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let front = Front {
            address: listener.local_addr().unwrap(),
            opened: Arc::default(),
            open: Arc::default(),
        };
        let socket = self.directory.path().join(".s.PGSQL.5432");
        let (opened, open) = (Arc::clone(&front.opened), Arc::clone(&front.open));
        let tasks = self.tasks.clone();
        self.tasks.spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                opened.fetch_add(1, Ordering::SeqCst);
                open.fetch_add(1, Ordering::SeqCst);
                let (socket, open) = (socket.clone(), Arc::clone(&open));
                tasks.spawn(async move {
                    let mut server = UnixStream::connect(socket).await.unwrap();
                    tokio::io::copy_bidirectional(&mut client, &mut server)
                        .await
                        .ok();
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        front
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A fast shutdown; killing the postmaster would leave its children behind.
        signal(self.server.id(), Signal::INT);
        self.server.wait().ok();
    }
}

/// See [`Cluster::front`].
pub(crate) struct Front {
    pub(crate) address: SocketAddr,
    opened: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
}

impl Front {
    /// Connections so far.
    pub(crate) fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }

    /// Connections now.
    pub(crate) fn open(&self) -> usize {
        self.open.load(Ordering::SeqCst)
    }
}

/// Who the servers run as: another user if this is root, since Postgres refuses root.
struct Owner {
    user: u32,
    group: u32,
}

impl Owner {
    fn of(path: &Path) -> Self {
        let metadata = path.metadata().unwrap();
        Self {
            user: metadata.uid(),
            group: metadata.gid(),
        }
    }

    fn give(&self, path: &Path) {
        chown(path, Some(self.user), Some(self.group)).unwrap();
    }
}
