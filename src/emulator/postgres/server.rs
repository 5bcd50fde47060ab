//! A throw-away Postgres in a temporary directory, listening on a Unix socket in a 0700 directory and nowhere else.
//!
//! The server refuses to run as root, so it is then started as another user. It runs under a small shell that watches
//! a pipe from us: whatever ends this process, `kill -9` included, the server stops and the directory goes.

use std::{
    ffi::OsStr,
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::Duration,
};

use tempfile::TempDir;
use tokio::time::{Instant, sleep};
use tokio_postgres::NoTls;

use super::{
    LocalPostgresOptions, SUPERUSER,
    copy::{self, Backup},
    fetch, find,
    schema::{Connected, query_error},
};
use crate::emulator::EmulatorError;

/// How long a server may take to answer its first query.
const START_TIMEOUT: Duration = Duration::from_mins(1);
/// Pause between looks at a starting server, doubled up to the second value.
const READY_BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// The port in the socket's name; nothing listens on TCP.
const SOCKET_PORT: u16 = 5432;
/// Lines of the server's log that go into an error.
const LOG_TAIL_LINES: usize = 5;

/// Runs the server until its standard input closes, and again after each line that arrives there; takes the directory away
/// afterwards. After five seconds of politeness it is cut off. `"$0"` is the directory, `"$@"` the server's command line.
const WATCHDOG: &str = r#"
exec 3<&0
while
    "$@" </dev/null >>"$0/postgres.log" 2>&1 3<&- &
    server=$!
    { read -r _ <&3 && : >"$0/restart"; kill -INT $server; sleep 5; kill -QUIT $server; } 2>/dev/null &
    watcher=$!
    wait $server
    kill $watcher 2>/dev/null
    rm "$0/restart" 2>/dev/null
do :; done
cd / && rm -rf "$0"
"#;

/// A running local Postgres; stops, and its directory goes, when dropped.
///
/// Several emulators may share one, which saves tests the start: each has its own identities and may have its own database.
#[derive(Debug)]
pub struct LocalPostgres {
    bin_dir: PathBuf,
    options: LocalPostgresOptions,
    directory: PathBuf,
    watchdog: Mutex<Child>,
}

impl LocalPostgres {
    /// Makes a cluster and starts it; returns when it answers queries.
    pub async fn start(options: LocalPostgresOptions) -> Result<Self, EmulatorError> {
        let server = blocking(move || Self::spawn(options)).await?;
        server.until_ready().await?;
        super::schema::prepare_template(&server.config("template1")).await?;
        Ok(server)
    }

    /// Another server, with a copy of all databases and roles as they are now. Clients may use this one meanwhile.
    pub(crate) async fn branch(&self) -> Result<Self, EmulatorError> {
        let backup = Backup::start(&self.config("postgres")).await?;
        let (bin_dir, options) = (self.bin_dir.clone(), self.options.clone());
        let source = self.directory.join("data");
        let (site, source) = blocking(move || {
            let site = Site::make(Owner::choose()?)?;
            copy::files(&source, &site.data).map_err(directory_error)?;
            Ok((site, source))
        })
        .await?;
        let log = backup.finish().await?;
        let server = blocking(move || {
            log.add(&source, &site.data).map_err(directory_error)?;
            site.owner.hand_over_tree(&site.data)?;
            site.launch(bin_dir, options)
        })
        .await?;
        server.until_ready().await?;
        Ok(server)
    }

    /// Restarts the server as `pg_ctl restart -m fast` does: its sessions end with FATAL 57P01. Returns when it answers
    /// queries again.
    pub async fn restart(&self) -> Result<(), EmulatorError> {
        let before = self.started_at().await?;
        let ended = || EmulatorError::PostgresEnded {
            log: self.log_tail(),
        };
        if let Ok(mut watchdog) = self.watchdog.lock() {
            let stdin = watchdog.stdin.as_mut().ok_or_else(ended)?;
            stdin.write_all(b"\n").map_err(|_| ended())?;
        }
        loop {
            self.until_ready().await?;
            // The old one may still answer, or end before it does.
            if self.started_at().await.is_ok_and(|at| at != before) {
                return Ok(());
            }
            sleep(READY_BACKOFF.0).await;
        }
    }

    async fn started_at(&self) -> Result<String, EmulatorError> {
        let server = Connected::open(&self.config("postgres")).await?;
        let query = "select pg_postmaster_start_time()::text";
        let row = server.client.query_one(query, &[]).await;
        row.and_then(|row| row.try_get(0)).map_err(query_error)
    }

    /// What another server like this one is started with.
    pub(crate) fn options(&self) -> LocalPostgresOptions {
        LocalPostgresOptions {
            bin_dir: Some(self.bin_dir.clone()),
            ..self.options.clone()
        }
    }

    /// How to reach `database` as the superuser.
    pub(crate) fn config(&self, database: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(self.socket_directory())
            .port(SOCKET_PORT)
            .user(SUPERUSER)
            .dbname(database);
        config
    }

    /// The socket itself.
    pub(crate) fn socket(&self) -> PathBuf {
        self.socket_directory()
            .join(format!(".s.PGSQL.{SOCKET_PORT}"))
    }

    /// The directory everything is in: 0711, what is private in it 0700. It goes even if this process is killed.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where its programs are: beside `postgres` also `psql` and others, depending on the package.
    pub fn bin_dir(&self) -> &Path {
        &self.bin_dir
    }

    fn socket_directory(&self) -> PathBuf {
        self.directory.join("s")
    }

    fn spawn(options: LocalPostgresOptions) -> Result<Self, EmulatorError> {
        let owner = Owner::choose()?;
        let bin_dir = owner.programs(&options)?;
        // The other programs are beside the file itself: `PATH` may have symbolic links to some.
        let postgres = fs::canonicalize(bin_dir.join("postgres")).map_err(directory_error)?;
        let bin_dir = postgres.parent().unwrap_or(&bin_dir).to_owned();
        let site = Site::make(owner)?;
        initialize(&bin_dir, &site.data, &site.owner)?;
        site.launch(bin_dir, options)
    }

    async fn until_ready(&self) -> Result<(), EmulatorError> {
        let deadline = Instant::now() + START_TIMEOUT;
        let mut pause = READY_BACKOFF.0;
        let config = self.config("postgres");
        loop {
            match config.connect(NoTls).await {
                Ok(_) => return Ok(()),
                Err(source) if Instant::now() > deadline => {
                    return Err(EmulatorError::Query { source });
                }
                Err(_) if self.has_ended() => {
                    return Err(EmulatorError::PostgresEnded {
                        log: self.log_tail(),
                    });
                }
                Err(_) => sleep(pause).await,
            }
            pause = (pause * 2).min(READY_BACKOFF.1);
        }
    }

    fn has_ended(&self) -> bool {
        self.watchdog
            .lock()
            .is_ok_and(|mut watchdog| matches!(watchdog.try_wait(), Ok(Some(_))))
    }

    fn log_tail(&self) -> String {
        tail(&fs::read_to_string(self.directory.join("postgres.log")).unwrap_or_default())
    }
}

impl Drop for LocalPostgres {
    fn drop(&mut self) {
        if let Ok(watchdog) = self.watchdog.get_mut() {
            // Closing the pipe is the signal; the watchdog bounds the wait.
            drop(watchdog.stdin.take());
            let _ = watchdog.wait();
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The directories of a server that does not run yet.
struct Site {
    owner: Owner,
    scratch: TempDir,
    data: PathBuf,
}

impl Site {
    fn make(owner: Owner) -> Result<Self, EmulatorError> {
        // A socket's path may have 107 bytes at most, so names are short.
        let scratch = tempfile::Builder::new()
            .prefix("lakebase-")
            .permissions(Permissions::from_mode(0o711))
            .tempdir()
            .map_err(directory_error)?;
        let data = scratch.path().join("data");
        owner.hand_over(scratch.path())?;
        for directory in [&data, &scratch.path().join("s")] {
            fs::create_dir(directory).map_err(directory_error)?;
            fs::set_permissions(directory, Permissions::from_mode(0o700))
                .map_err(directory_error)?;
            owner.hand_over(directory)?;
        }
        Ok(Self {
            owner,
            scratch,
            data,
        })
    }

    /// Starts the server of the files in `data`.
    fn launch(
        self,
        bin_dir: PathBuf,
        options: LocalPostgresOptions,
    ) -> Result<LocalPostgres, EmulatorError> {
        let Self {
            owner,
            scratch,
            data,
        } = self;
        fs::write(
            data.join("postgresql.auto.conf"),
            settings(&options, &scratch.path().join("s")),
        )
        .map_err(directory_error)?;
        fs::write(data.join("pg_hba.conf"), ACCESS).map_err(directory_error)?;
        let log = scratch.path().join("postgres.log");
        File::create(&log).map_err(directory_error)?;
        owner.hand_over(&log)?;

        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(WATCHDOG).arg(scratch.path());
        command.arg(bin_dir.join("postgres")).arg("-D").arg(&data);
        let mut command = owner.run(command);
        // Its own process group: Ctrl-C is for us, who then stop it in order.
        let watchdog = command
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|source| EmulatorError::Spawn {
                program: "postgres",
                source,
            })?;
        Ok(LocalPostgres {
            bin_dir,
            options,
            directory: scratch.keep(),
            watchdog: Mutex::new(watchdog),
        })
    }
}

/// Runs what waits for files and programs.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EmulatorError> + Send + 'static,
) -> Result<T, EmulatorError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| EmulatorError::Interrupted)?
}

/// Who the server runs as: another user if we are root.
struct Owner(Option<(u32, u32)>);

impl Owner {
    fn choose() -> Result<Self, EmulatorError> {
        let ours = fs::metadata("/proc/self")
            .or_else(|_| tempfile::tempfile()?.metadata())
            .map_err(directory_error)?;
        if ours.uid() != 0 {
            return Ok(Self(None));
        }
        let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
        ["postgres", "nobody"]
            .iter()
            .find_map(|name| passwd_entry(&users, name))
            .map(|ids| Self(Some(ids)))
            .ok_or(EmulatorError::NoUnprivilegedUser)
    }

    /// The programs to run: the named ones, else this machine's, a Python environment's, the cache's, else fetched ones.
    fn programs(&self, options: &LocalPostgresOptions) -> Result<PathBuf, EmulatorError> {
        if let Some(directory) = options.bin_dir.clone() {
            return if find::is_complete(&directory) {
                Ok(directory)
            } else {
                Err(EmulatorError::NoPostgresIn { directory })
            };
        }
        let is_usable =
            |directory: &Path| find::is_complete(directory) && self.can_enter(directory);
        let path = std::env::var_os("PATH");
        let installed = find::find(path.as_deref(), is_usable);
        if let Some(found) = installed.or_else(|| fetch::in_python_environment(is_usable)) {
            return Ok(found);
        }
        let cache = fetch::user_cache(self.0.is_some());
        fetch::in_cache(cache, options.download)
            .map_err(|reason| EmulatorError::NoPostgres { reason })
    }

    /// Whether the server's user, if it is another, may read what is below `directory`: often not in root's home.
    fn can_enter(&self, directory: &Path) -> bool {
        let Some((uid, _)) = self.0 else {
            return true;
        };
        let is_open = |path: &Path| {
            path.metadata().is_ok_and(|metadata| {
                let search = if metadata.uid() == uid { 0o100 } else { 0o001 };
                metadata.mode() & search != 0
            })
        };
        fs::canonicalize(directory).is_ok_and(|path| path.ancestors().all(is_open))
    }

    fn hand_over(&self, path: &Path) -> Result<(), EmulatorError> {
        let Some((uid, gid)) = self.0 else {
            return Ok(());
        };
        chown(path, Some(uid), Some(gid)).map_err(directory_error)
    }

    /// [`Owner::hand_over`] for a directory and everything in it.
    fn hand_over_tree(&self, path: &Path) -> Result<(), EmulatorError> {
        if self.0.is_none() {
            return Ok(());
        }
        self.hand_over(path)?;
        if path.is_dir() {
            for entry in fs::read_dir(path).map_err(directory_error)? {
                self.hand_over_tree(&entry.map_err(directory_error)?.path())?;
            }
        }
        Ok(())
    }

    fn run(&self, mut command: Command) -> Command {
        // A clean environment: PG* variables of the user are for clients, not for this server.
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("LC_ALL", "C")
            .current_dir("/");
        if let Some((uid, gid)) = self.0 {
            command.uid(uid).gid(gid);
        }
        command
    }
}

fn passwd_entry(users: &str, name: &str) -> Option<(u32, u32)> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let is_it = fields.next() == Some(name);
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        is_it.then_some((uid, gid))
    })
}

/// Native logins are checked by Postgres, all others by the edge; the directory excludes all other users.
const ACCESS: &str = "\
local all +databricks_native scram-sha-256
local all all trust
local replication all trust
";

fn initialize(bin_dir: &Path, data: &Path, owner: &Owner) -> Result<(), EmulatorError> {
    let mut failure = String::new();
    // Lakebase's locale first; systems without it (macOS) have plain C.
    for locale in ["C.UTF-8", "C"] {
        let mut command = owner.run(Command::new(bin_dir.join("initdb")));
        command.arg("-D").arg(data).args([
            "-U",
            SUPERUSER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]);
        command
            .arg(format!("--locale={locale}"))
            .stdin(Stdio::null());
        let output = command.output().map_err(|source| EmulatorError::Spawn {
            program: "initdb",
            source,
        })?;
        if output.status.success() {
            return Ok(());
        }
        failure = tail(&String::from_utf8_lossy(&output.stderr));
    }
    Err(EmulatorError::Initdb { output: failure })
}

fn settings(options: &LocalPostgresOptions, socket_directory: &Path) -> String {
    let sockets = quote(socket_directory.as_os_str());
    let durable = if options.fsync { "on" } else { "off" };
    format!(
        "listen_addresses = ''\n\
         port = {SOCKET_PORT}\n\
         unix_socket_directories = {sockets}\n\
         unix_socket_permissions = 0700\n\
         max_connections = {max_connections}\n\
         fsync = {durable}\n\
         synchronous_commit = {durable}\n\
         full_page_writes = {durable}\n\
         shared_buffers = '64MB'\n\
         max_wal_size = '4GB'\n\
         wal_level = replica\n\
         password_encryption = 'scram-sha-256'\n\
         timezone = 'UTC'\n\
         log_timezone = 'UTC'\n\
         logging_collector = off\n\
         log_min_messages = 'fatal'\n\
         log_min_error_statement = 'panic'\n",
        max_connections = options.max_connections,
    )
}

fn quote(text: &OsStr) -> String {
    format!("'{}'", text.to_string_lossy().replace('\'', "''"))
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("; ")
}

fn directory_error(source: io::Error) -> EmulatorError {
    EmulatorError::Directory { source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_whole_names() {
        let users = "root:x:0:0::/root:/bin/sh\npostgres2:x:7:8::/:/bin/sh\npostgres:x:101:104:,,,:/var:/bin/sh\n";
        assert_eq!(passwd_entry(users, "postgres"), Some((101, 104)));
        assert_eq!(passwd_entry(users, "nobody"), None);
    }

    #[test]
    fn only_the_last_lines_of_a_log_are_quoted() {
        let log = (1..=9)
            .map(|line| format!("line {line}\n"))
            .collect::<Vec<_>>()
            .join("\n");
        assert_eq!(tail(&log), "line 5; line 6; line 7; line 8; line 9");
    }
}
