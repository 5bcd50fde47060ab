//! Every setting of the program, declared once.
//!
//! From a declaration come the flag, the variable `LAKEBASE_PROXY_*`, the key in the configuration file, the order of
//! precedence, the effect of a reload, `SHOW CONFIG`, the annotated `config/lakebase-proxy.toml` and the settings page of
//! the guides. The first paragraph of a comment is the text of `--help`; the others are added in the annotated file. To add a
//! setting, declare it here, run `UPDATE=1 cargo test --lib config::reference` and `deploy/guides/generate`, and use it:
//!
//! - `Restart`: `config.settings.<key>()`, at the start.
//! - `Live`: `shared.settings().<key>()` at each use, or for sessions a field of `SessionConfig`, `Timeouts`, `Keepalive`,
//!   `PoolSettings` or `AccessPolicy`. A test in `app::shared` fails for a setting that none of them has.
//! - `Endpoint`: a part of `EndpointConfig` or `ListenAddresses`, which a reload compares.

use std::{net::IpAddr, num::NonZeroUsize, path::PathBuf};

use super::{
    ClientTlsSetting, DEFAULT_FILTER, DatabaseMapping, DurationSetting, LOCALHOST, LocalAuth,
    ModeSetting, PinSessions, PoolMode, PortSetting, values,
};

settings! {
    "Listening" {
        /// IP address to listen on for Postgres clients (repeatable); 127.0.0.1 includes ::1 where it exists
        ///
        /// Several are a list: `["127.0.0.1", "::1", "10.0.0.7"]`.
        #[arg(value_name = "IP", value_delimiter = ',', value_parser = values::address)]
        #[serde(deserialize_with = "values::addresses")]
        address: Vec<IpAddr> = vec![LOCALHOST] => Endpoint;

        /// Port to listen on for Postgres clients; 0 = any free port, `none` = Unix sockets only
        ///
        /// Each further endpoint takes the next port.
        #[arg(short, value_name = "PORT")]
        port: PortSetting = PortSetting::Port(5432) => Endpoint;

        /// Allow an address that other machines can reach; every client acts as the service principal
        allow_remote: bool = false => Live;

        /// Directory of a Unix socket named .s.PGSQL.PORT, where libpq looks for it
        ///
        /// Connect with `psql -h /run/lakebase-proxy`. Sockets passed by systemd (`LISTEN_FDS`) replace all addresses. A single
        /// endpoint takes all of them; of several, each takes those whose `FileDescriptorName=` is its name, otherwise one each
        /// in order.
        #[arg(value_name = "DIR")]
        unix_socket: PathBuf, "\"/run/lakebase-proxy\"" => Endpoint;

        /// Permissions of the Unix socket [default: 0600; 0666 with --unix-socket-allowed-uids]
        ///
        /// An octal string, as for `chmod`.
        #[arg(value_name = "MODE")]
        unix_socket_mode: ModeSetting, "\"0600\"" => Live;

        /// Users allowed on the Unix socket, by number, besides root and the proxy's own [default: by its permissions]
        ///
        /// The kernel reports the user of each client.
        #[arg(value_name = "UID", value_delimiter = ',')]
        unix_socket_allowed_uids: Vec<u32>, "[1000, 1001]" => Live;

        /// TLS for clients that request it; `required` refuses plain TCP connections from other machines [default: self-signed,
        /// the certificate of --client-tls-cert, or off with --allow-remote]
        ///
        /// "self-signed" creates a certificate in memory for the first client that requests TLS and logs its fingerprint. "required"
        /// uses the certificate of client_tls_cert or a self-signed one; loopback and Unix sockets are exempt.
        #[arg(value_enum, value_name = "MODE")]
        client_tls: ClientTlsSetting = ClientTlsSetting::SelfSigned => Live;

        /// PEM file with the certificate chain to present to clients; reloaded when it changes
        #[arg(value_name = "FILE")]
        client_tls_cert: PathBuf, "\"/etc/lakebase-proxy/tls.crt\"" => Live;

        /// PEM file with the private key of --client-tls-cert
        #[arg(value_name = "FILE")]
        client_tls_key: PathBuf, "\"/etc/lakebase-proxy/tls.key\"" => Live;

        /// Authentication of TCP clients: `password` requires SCRAM-SHA-256 [default: trust, or password where one is set]
        ///
        /// The password is in local_password_file or in LAKEBASE_PROXY_LOCAL_PASSWORD; any user name is accepted. Unix
        /// sockets require none, as the kernel reports the client's user.
        #[arg(value_enum, value_name = "METHOD")]
        local_auth: LocalAuth = LocalAuth::Trust => Live;

        /// File with the password for --local-auth=password [default: the variable LAKEBASE_PROXY_LOCAL_PASSWORD]
        #[arg(value_name = "FILE")]
        local_password_file: PathBuf, "\"/run/secrets/lakebase-proxy\"" => Live;
    }
    "Upstream" {
        /// Connect to the endpoint's read-only host
        read_only: bool = false => Endpoint;

        /// Profile of ~/.databrickscfg to authenticate to the workspace with [default: DATABRICKS_CONFIG_PROFILE]
        ///
        /// DATABRICKS_CONFIG_FILE names another file. Without a profile, the file's default profile applies if no variable
        /// configures authentication.
        #[arg(value_name = "NAME")]
        profile: String, "\"work\"" => Restart;

        /// Database of a client that names none, or one like its user: `default` falls back to PGDATABASE
        ///
        /// libpq sends the user name if no database is given. With "default", such a client gets the database of that name if
        /// it exists, otherwise PGDATABASE. With "exact", it gets the database it names.
        #[arg(value_enum, value_name = "MODE")]
        database_mapping: DatabaseMapping = DatabaseMapping::Default => Live;

        /// Refresh the credential on demand only, for platforms that freeze the CPU between requests (Cloud Run)
        ///
        /// A connecting client triggers the refresh if less than 4 minutes (at most half of the lifetime) are left. Readiness
        /// then means that the last attempt to mint a credential succeeded.
        lazy_refresh: bool = false => Restart;

        /// Log in to every endpoint once before reporting ready; exit with 1 if that fails
        ///
        /// The login is retried while the endpoint wakes.
        run_connection_test: bool = false => Restart;
    }
    "Limits" {
        /// Maximum concurrent sessions; 0 derives it from the file descriptor limit: (limit - 100) / 2
        ///
        /// Clients over the limit are refused with SQLSTATE 53300.
        #[arg(value_name = "N")]
        max_connections: usize = 0 => Live;

        /// Timeout for a client's startup message, from its connect
        #[arg(value_name = "TIME")]
        client_login_timeout: DurationSetting = DurationSetting::from_secs(15) => Live;

        /// Timeout of connecting a client to the endpoint, including retries while the endpoint wakes
        #[arg(value_name = "TIME")]
        connect_timeout: DurationSetting = DurationSetting::from_secs(60) => Live;

        /// Timeout of one connection attempt to the endpoint
        #[arg(value_name = "TIME")]
        server_connect_timeout: DurationSetting = DurationSetting::from_secs(15) => Live;

        /// Timeout for a database credential, after which a waiting client is refused with the reason
        ///
        /// It is shorter than the connect timeout of most drivers, so that the reason reaches the client.
        #[arg(value_name = "TIME")]
        credential_timeout: DurationSetting = DurationSetting::from_secs(8) => Live;

        /// Timeout of waiting for a free connection at an endpoint that is at its limit
        #[arg(value_name = "TIME")]
        capacity_timeout: DurationSetting = DurationSetting::from_secs(10) => Live;

        // The defaults of the probes are those of databricks-ai-bridge (`lakebase.py`).
        /// Idle time before the first TCP keepalive probe, on both sides; 0 = no probes
        #[arg(value_name = "TIME")]
        tcp_keepalive_idle: DurationSetting = DurationSetting::from_secs(30) => Live;

        /// Interval between TCP keepalive probes
        #[arg(value_name = "TIME")]
        tcp_keepalive_interval: DurationSetting = DurationSetting::from_secs(10) => Live;

        /// Unanswered TCP keepalive probes before a connection is closed
        #[arg(value_name = "N")]
        tcp_keepalive_count: u32 = 5 => Live;

        /// Maximum time that sent data may stay unacknowledged (TCP_USER_TIMEOUT); 0 = the kernel's default
        ///
        /// A client that stops reading is slow, not dead. With 0, the endpoint must acknowledge a request within the time
        /// that the probes take (80s), unless more than 16 kB are waiting to be sent.
        #[arg(value_name = "TIME")]
        tcp_user_timeout: DurationSetting = DurationSetting::ZERO => Live;
    }
    "Pooling" {
        /// Share server connections: until a client leaves, for each transaction, or once there are too few (`auto`)
        ///
        /// Prepared statements follow their client. Other state that outlives transactions (SET, LISTEN, temporary tables and the
        /// like) is never another client's: with `session` a reset removes it, with `transaction` and `auto` its client keeps the
        /// connection until it leaves.
        /// An `[[endpoint]]` table may set its own, so that one port serves the application and another one migrations.
        #[arg(value_enum, value_name = "MODE")]
        pool_mode: PoolMode = PoolMode::None => Endpoint;

        /// Keep the connection of a client whose session state outlives its transaction, or refuse the request (`transaction` only)
        ///
        /// A refused request gets an ERROR with SQLSTATE 0A000 that names the feature, and the session goes on. What shows only
        /// in the server's answer is not refused: its client keeps the connection.
        /// An `[[endpoint]]` table may set its own.
        #[arg(value_enum, value_name = "WHAT")]
        pin_sessions: PinSessions = PinSessions::Pin => Endpoint;

        /// Reset a server connection whenever another client gets it, also between two transactions
        ///
        /// One round trip for each change of client. It undoes what cannot be seen: settings and locks of functions whose text
        /// the session has not sent. What a client has SET and prepared follows it as without.
        pool_strict: bool = false => Live;

        /// Maximum server connections of a pool; there is one pool for each database
        ///
        /// All copies of the proxy share the limit of the compute (`SHOW max_connections`). A server that refuses a connection
        /// lowers the limit of the pool until it accepts more.
        #[arg(value_name = "N")]
        default_pool_size: NonZeroUsize = NonZeroUsize::new(20).unwrap_or(NonZeroUsize::MIN) => Live;

        /// Copies of the proxy that share the compute; `doctor` checks that their pools fit
        #[arg(value_name = "N")]
        fleet_size: NonZeroUsize = NonZeroUsize::MIN => Live;

        /// Further server connections of a pool while a client has waited longer than --reserve-pool-timeout
        #[arg(value_name = "N")]
        reserve_pool_size: usize = 0 => Live;

        /// Wait of a client after which a pool may use its reserve
        #[arg(value_name = "TIME")]
        reserve_pool_timeout: DurationSetting = DurationSetting::from_secs(5) => Live;

        /// Maximum server connections of a database, its reserve included; 0 = no further limit
        #[arg(value_name = "N")]
        max_db_connections: usize = 0 => Live;

        /// Timeout of a client's wait for a server connection of a full pool
        ///
        /// The client is refused with SQLSTATE 53300. The time that an endpoint takes to wake does not count.
        #[arg(value_name = "TIME")]
        query_wait_timeout: DurationSetting = DurationSetting::from_secs(120) => Live;

        /// Server connections opened ahead of need whenever a client has taken one [default: 1, or 0 with --pool-mode none]
        ///
        /// They close after server_idle_timeout. With `none`, a client gets one that no other has had.
        #[arg(value_name = "N")]
        spare_pool_size: usize, "1" => Live;

        /// Time without a client after which a server connection is closed
        ///
        /// Keep it below the suspend timeout of the endpoint. Nothing is sent on an idle connection.
        #[arg(value_name = "TIME")]
        server_idle_timeout: DurationSetting = DurationSetting::from_secs(60) => Live;

        /// Prepared statements that a server connection keeps when clients share it; one more drops the least recently used
        ///
        /// At least 1: statements always follow their client. PgBouncer's 0, which turns that off, has no counterpart.
        #[arg(value_name = "N")]
        max_prepared_statements: usize = 200 => Live;

        /// Memory for the texts of prepared statements of clients that share server connections, in MiB
        ///
        /// Equal texts of several clients count once. A client that prepares one more is sent an error, SQLSTATE 53200.
        #[arg(value_name = "MIB")]
        prepared_statement_memory: NonZeroUsize = NonZeroUsize::new(64).unwrap_or(NonZeroUsize::MIN) => Live;

        /// Age at which a server connection is closed once its client has left, 20 % more or less at random
        #[arg(value_name = "TIME")]
        server_lifetime: DurationSetting = DurationSetting::from_secs(3600) => Live;
    }
    "Health and metrics" {
        /// IP address for health checks and Prometheus metrics
        ///
        /// Needs no allow_remote, as probes and scrapers connect from outside the pod.
        #[arg(value_name = "IP")]
        http_address: IpAddr = LOCALHOST => Restart;

        /// Port for health checks and Prometheus metrics; 0 = any free port, `none` = off
        #[arg(value_name = "PORT")]
        http_port: PortSetting = PortSetting::Port(9090) => Restart;

        /// Open the admin console (`psql lakebase_proxy`) to TCP clients on this machine
        ///
        /// Unix socket clients of root and the proxy's own user always have it. With this setting, databases of the endpoint
        /// named lakebase_proxy or pgbouncer are unreachable.
        admin_console: bool = false => Live;
    }
    "Notes page" {
        /// Serve the notes page
        ///
        /// The tutorial's page of the five newest notes, a client of this proxy.
        notes: bool = false => Restart;

        /// IP address of the notes page [default: 127.0.0.1; 0.0.0.0 where DATABRICKS_APP_PORT is set]
        #[arg(value_name = "IP")]
        notes_address: IpAddr, "\"127.0.0.1\"" => Restart;

        /// Port of the notes page [default: DATABRICKS_APP_PORT, else 8000]
        #[arg(value_name = "PORT")]
        notes_port: PortSetting, "8000" => Restart;
    }
    "Shutdown" {
        /// Time to keep accepting clients after SIGTERM, before draining
        ///
        /// For pods whose other containers still need the database.
        #[arg(value_name = "TIME")]
        min_sigterm_delay: DurationSetting = DurationSetting::ZERO => Live;

        /// Maximum time for sessions to finish after SIGTERM or SIGINT
        ///
        /// Databricks Apps kills the process after 15 s.
        #[arg(value_name = "TIME")]
        max_sigterm_delay: DurationSetting = DurationSetting::from_secs(10) => Live;

        /// Exit with 0 instead of 143 after SIGTERM
        #[arg(visible_alias = "exit-zero-sigterm")]
        exit_zero_on_sigterm: bool = false => Live;

        /// Exit with 0 after this time without a client, counted from the start; for jobs. 0 = never
        #[arg(value_name = "TIME")]
        exit_when_idle: DurationSetting = DurationSetting::ZERO => Live;

        /// Serve /quitquitquit on the admin port: a shutdown as after SIGTERM, with exit code 0
        ///
        /// Accepts POST, and GET with any X-Requested-With header. `lakebase-proxy shutdown` sends the request.
        quitquitquit: bool = false => Restart;

        /// Port of /quitquitquit, always on 127.0.0.1
        #[arg(value_name = "PORT")]
        admin_port: PortSetting = PortSetting::Port(9091) => Restart;
    }
    "Logs" {
        /// Log as JSON, one object per line
        #[arg(short = 'l')]
        structured_logs: bool = false => Restart;

        /// Log filter, such as `debug` or `warn,lakebase_proxy::session=trace`
        ///
        /// `debug` logs each session, `trace` the type of each message. SQL and secrets are never logged.
        #[arg(value_name = "FILTER")]
        log_filter: String = DEFAULT_FILTER.to_owned() => Live;
    }
    "Configuration file" {
        /// Reload the configuration file when it changes, as SIGHUP does; includes mounted ConfigMaps
        ///
        /// A reload also reads the files of PGSSLROOTCERT and local_password_file, which are watched as well. Changes apply to new
        /// sessions; an invalid file changes nothing.
        watch_config: bool = false => Restart;
    }
}
