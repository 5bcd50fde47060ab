//! Settings as somebody wrote them: flags, `LAKEBASE_PROXY_*` and the file have one shape, in which all may be absent.

use std::{net::IpAddr, path::PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{
    endpoint::EndpointSettings,
    origin::Origins,
    values::{
        AddressSetting, ClientTlsSetting, DatabaseMapping, DurationSetting, LocalAuth, ModeSetting,
        PortSetting, one_or_many,
    },
};

/// One layer of settings; see `config/lakebase-proxy.toml` for what each means.
#[derive(Args, Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Address to listen on for Postgres clients (repeatable) [default: 127.0.0.1, and ::1 with it]
    #[arg(
        long,
        value_name = "IP",
        value_delimiter = ',',
        help_heading = "Listening"
    )]
    #[serde(deserialize_with = "one_or_many")]
    pub address: Option<Vec<AddressSetting>>,

    /// Port to listen on for Postgres clients; 0 = any free one, `none` = do not [default: 5432]
    #[arg(short, long, value_name = "PORT", help_heading = "Listening")]
    pub port: Option<PortSetting>,

    /// Allow an address that other machines reach: whoever reaches it is the service principal
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Listening")]
    pub allow_remote: Option<bool>,

    /// Directory for a Unix socket named .s.PGSQL.PORT, where libpq looks for it
    #[arg(long, value_name = "DIR", help_heading = "Listening")]
    pub unix_socket: Option<PathBuf>,

    /// Permissions of the Unix socket [default: 0600; 0666 with --unix-socket-allowed-uids]
    #[arg(long, value_name = "MODE", help_heading = "Listening")]
    pub unix_socket_mode: Option<ModeSetting>,

    /// Users who may use the Unix socket, by number, beside the proxy's own and root [default: whom its permissions let
    /// in]
    #[arg(
        long,
        value_name = "UID",
        value_delimiter = ',',
        help_heading = "Listening"
    )]
    pub unix_socket_allowed_uids: Option<Vec<u32>>,

    /// Offer TLS to clients, with a certificate made at the start that clients cannot verify; `required` refuses TCP clients of
    /// other machines that do not use TLS, whichever certificate is shown [default: off, or by --client-tls-cert]
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Listening")]
    pub client_tls: Option<ClientTlsSetting>,

    /// Offer TLS to clients with the certificate in this PEM file, its issuers' behind it; read again when it changes
    #[arg(long, value_name = "FILE", help_heading = "Listening")]
    pub client_tls_cert: Option<PathBuf>,

    /// The private key of --client-tls-cert, a PEM file
    #[arg(long, value_name = "FILE", help_heading = "Listening")]
    pub client_tls_key: Option<PathBuf>,

    /// Whether TCP clients must know a password (SCRAM-SHA-256) [default: trust, or password where there is one]
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Listening")]
    pub local_auth: Option<LocalAuth>,

    /// File with that password, else it is in LAKEBASE_PROXY_LOCAL_PASSWORD
    #[arg(long, value_name = "FILE", help_heading = "Listening")]
    pub local_password_file: Option<PathBuf>,

    /// Sessions at a time; 0 = (descriptor limit - 100) / 2 [default: 0]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub max_connections: Option<usize>,

    /// How long a client may take to send its startup message [default: 15s]
    #[arg(long, value_name = "TIME", help_heading = "Limits")]
    pub client_login_timeout: Option<DurationSetting>,

    /// How long a client is held while the endpoint wakes [default: 60s]
    #[arg(long, value_name = "TIME", help_heading = "Limits")]
    pub connect_timeout: Option<DurationSetting>,

    /// How long one attempt at the endpoint may take [default: 15s]
    #[arg(long, value_name = "TIME", help_heading = "Limits")]
    pub server_connect_timeout: Option<DurationSetting>,

    /// How long a client is held while there is no database credential, before it is refused with the reason [default: 8s]
    #[arg(long, value_name = "TIME", help_heading = "Limits")]
    pub credential_timeout: Option<DurationSetting>,

    /// How long a client is held while the endpoint has no connection left [default: 10s]
    #[arg(long, value_name = "TIME", help_heading = "Limits")]
    pub capacity_timeout: Option<DurationSetting>,

    /// Silence before the first TCP keepalive probe, both sides; 0 = no probes [default: 30s]
    #[arg(long, value_name = "TIME", help_heading = "Limits")]
    pub tcp_keepalive_idle: Option<DurationSetting>,

    /// Time between TCP keepalive probes [default: 10s]
    #[arg(long, value_name = "TIME", help_heading = "Limits")]
    pub tcp_keepalive_interval: Option<DurationSetting>,

    /// Unanswered probes before a connection is given up [default: 5]
    #[arg(long, value_name = "N", help_heading = "Limits")]
    pub tcp_keepalive_count: Option<u32>,

    /// How long sent data may stay unacknowledged; 0 = as long as the kernel likes [default: 0]
    #[arg(long, value_name = "TIME", help_heading = "Limits")]
    pub tcp_user_timeout: Option<DurationSetting>,

    /// An endpoint, where there are several: NAME or HOST, then ?port=&address=&database=&user=&read_only= (repeatable;
    /// without a port each takes the next one)
    #[arg(
        long = "endpoint",
        value_name = "NAME?KEY=VALUE",
        help_heading = "Upstream"
    )]
    #[serde(rename = "endpoint", skip_serializing)]
    pub endpoints: Vec<EndpointSettings>,

    /// Connect to the endpoint's read-only host
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Upstream")]
    pub read_only: Option<bool>,

    /// Profile of ~/.databrickscfg to sign in to the workspace with [default: DATABRICKS_CONFIG_PROFILE]
    #[arg(long, value_name = "NAME", help_heading = "Upstream")]
    pub profile: Option<String>,

    /// Whether a client whose database is named like its user gets PGDATABASE if there is no such database [default: default]
    #[arg(long, value_enum, value_name = "HOW", help_heading = "Upstream")]
    pub database_mapping: Option<DatabaseMapping>,

    /// Refresh the credential only when a client needs one that is about to run out: for processors that stand still
    /// between requests
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Upstream")]
    pub lazy_refresh: Option<bool>,

    /// Log in once before being ready, and exit with 1 if that fails; retried while the endpoint wakes
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Upstream")]
    pub run_connection_test: Option<bool>,

    /// Address for health checks and metrics [default: 127.0.0.1]
    #[arg(long, value_name = "IP", help_heading = "Seen from outside")]
    pub http_address: Option<IpAddr>,

    /// Port for health checks and metrics; 0 = any free one, `none` = do not [default: 9090]
    #[arg(long, value_name = "PORT", help_heading = "Seen from outside")]
    pub http_port: Option<PortSetting>,

    /// Serve the notes page
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Notes page")]
    pub notes: Option<bool>,

    /// Address of the notes page [default: 127.0.0.1; 0.0.0.0 where DATABRICKS_APP_PORT is set]
    #[arg(long, value_name = "IP", help_heading = "Notes page")]
    pub notes_address: Option<IpAddr>,

    /// Port of the notes page [default: DATABRICKS_APP_PORT, else 8000]
    #[arg(long, value_name = "PORT", help_heading = "Notes page")]
    pub notes_port: Option<PortSetting>,

    /// Open the console (`psql lakebase_proxy`) to TCP clients on this machine, not only to Unix-socket peers of our own user
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Seen from outside")]
    pub admin_console: Option<bool>,

    /// How long to go on accepting clients after SIGTERM, before the drain begins [default: 0s]
    #[arg(long, value_name = "TIME", help_heading = "Ending")]
    pub min_sigterm_delay: Option<DurationSetting>,

    /// How long work under way may go on after SIGTERM or SIGINT [default: 10s]
    #[arg(long, value_name = "TIME", help_heading = "Ending")]
    pub max_sigterm_delay: Option<DurationSetting>,

    /// Exit with 0, not 143, after SIGTERM
    #[arg(long, visible_alias = "exit-zero-sigterm", num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Ending")]
    pub exit_zero_on_sigterm: Option<bool>,

    /// Exit with 0 once no client has been connected for this long, from the start on; for jobs
    #[arg(long, value_name = "TIME", help_heading = "Ending")]
    pub exit_when_idle: Option<DurationSetting>,

    /// Answer /quitquitquit at the admin port, which ends the proxy as SIGTERM does, but with exit code 0
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Ending")]
    pub quitquitquit: Option<bool>,

    /// Port of /quitquitquit, on 127.0.0.1 always [default: 9091]
    #[arg(long, value_name = "PORT", help_heading = "Ending")]
    pub admin_port: Option<PortSetting>,

    /// Log JSON, a line each
    #[arg(short = 'l', long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Logs")]
    pub structured_logs: Option<bool>,

    /// What to log, as in `debug` or `warn,lakebase_proxy::session=trace` [default: info for ours, warn for others]
    #[arg(long, value_name = "FILTER", help_heading = "Logs")]
    pub log_filter: Option<String>,

    /// TOML file of settings: the same names with underscores; flags and environment go before it. SIGHUP reads it again
    #[arg(long, value_name = "FILE", help_heading = "Settings")]
    #[serde(skip)]
    pub config_file: Option<PathBuf>,

    /// Read the file of settings again when it changes, as at SIGHUP; a mounted ConfigMap included
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL", help_heading = "Settings")]
    pub watch_config: Option<bool>,

    /// Where each of these was given.
    #[arg(skip)]
    #[serde(skip)]
    pub origins: Origins,
}

impl Settings {
    /// This layer, with `below` where it says nothing.
    #[must_use]
    pub fn or(self, below: Self) -> Self {
        macro_rules! layer {
            ($endpoints:ident, $origins:ident; $($field:ident),+ $(,)?) => {
                Self { $endpoints, $origins, $($field: self.$field.or(below.$field)),+ }
            };
        }
        let endpoints = if self.endpoints.is_empty() {
            below.endpoints
        } else {
            self.endpoints
        };
        let origins = self.origins.or(below.origins);
        layer! {
            endpoints, origins;
            address, port, allow_remote, unix_socket, unix_socket_mode, unix_socket_allowed_uids, client_tls, client_tls_cert, client_tls_key, local_auth, local_password_file, max_connections, client_login_timeout, connect_timeout,
            server_connect_timeout, credential_timeout, capacity_timeout, tcp_keepalive_idle, tcp_keepalive_interval,
            tcp_keepalive_count, tcp_user_timeout, read_only, database_mapping, http_address,
            http_port, notes, notes_address, notes_port, min_sigterm_delay, max_sigterm_delay,
            admin_console, exit_zero_on_sigterm, exit_when_idle, quitquitquit, admin_port, run_connection_test,
            structured_logs, log_filter, config_file, profile,
            watch_config, lazy_refresh,
        }
    }
}
