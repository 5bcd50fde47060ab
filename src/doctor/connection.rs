//! Checks of a connection to the endpoint: TCP, TLS, login, grants, and a query.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rustls::{ProtocolVersion, pki_types::ServerName};
use tokio::time::{Instant, sleep, timeout};

use super::{
    certificates::{Certificate, Recorder},
    check::{Finding, Need, Steps},
    endpoint::Found,
    grants::{self, bind_role, create_extension, identifier},
    report::{Outcome, spoken},
    workspace::STEP_TIMEOUT,
};
use crate::{
    config::{DEFAULT_DATABASE, PoolMode, PoolSettings, TlsMode},
    credential::Credential,
    net::{backoff::Backoff, tls},
    protocol::{error::sqlstate, options::LoginParameters},
    status::Label,
    telemetry::labels::LoginPhase,
    upstream::{
        Addresses, Class, DroppedParameters, Endpoint, Failure, Security,
        probe::{self, Session, Stream},
    },
    workspace::Target,
};

/// The remaining life of a certificate that should have been renewed.
const NOTABLE_REMAINDER: SignedDuration = SignedDuration::from_hours(3 * 24);
const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LAST_PAUSE: Duration = Duration::from_secs(3);

/// Checks the endpoint by a connection, or as far as possible without one.
pub(super) async fn check(
    steps: &mut Steps<'_>,
    found: Option<&Found<'_>>,
    connection: Need<Connection<'_>>,
) {
    // TCP, TLS and login, as far as the last attempt went.
    let mut attempt = Vec::new();
    let mut grants = None;
    let mut session = match &connection {
        Ok(connection) => match connection.log_in(&mut attempt).await {
            Ok(session) => session.ok_or_else(|| "no credential".to_owned()),
            Err(failure) => match attempt.get_mut(2) {
                Some((_, login)) => {
                    (*login, grants) = connection.refused(&failure).await;
                    Err("no session".to_owned())
                }
                None => Err("an earlier check failed".to_owned()),
            },
        },
        Err(why) => Err(why.clone()),
    };
    let mut attempt = attempt.into_iter();
    for name in ["endpoint TCP", "endpoint TLS", "login"] {
        let why = session.as_ref().err().map_or("", String::as_str);
        let skipped = || (Duration::ZERO, Finding::skipped(why));
        let (took, finding) = attempt.next().unwrap_or_else(skipped);
        steps.note(name, took, finding);
    }
    let started = Instant::now();
    // The workspace lists the roles without a connection to the endpoint.
    if let (Err(_), Some(found)) = (&connection, found) {
        grants = found.role().await;
    }
    match grants {
        Some(finding) => steps.note("role and grants", started.elapsed(), finding),
        None => {
            steps
                .run("role and grants", session.as_mut(), LoggedIn::grants)
                .await;
        }
    }
    steps
        .run("SELECT 1", session.as_mut(), LoggedIn::select_1)
        .await;
    steps
        .run("connections", session.as_mut(), LoggedIn::connections)
        .await;
    if let Ok(LoggedIn { session, .. }) = session {
        // With Terminate, so that the server logs no lost connection.
        let _ = timeout(STEP_TIMEOUT, session.end()).await;
    }
}

/// The parts of all attempts to log in.
pub(super) struct Connection<'a> {
    found: &'a Found<'a>,
    endpoint: Endpoint,
    recorder: Option<Arc<Recorder>>,
    addresses: Vec<SocketAddr>,
    credential: Option<Credential>,
}

impl<'a> Connection<'a> {
    pub(super) fn new(
        found: &'a Found<'a>,
        addresses: Vec<SocketAddr>,
        credential: Option<Credential>,
    ) -> Need<Self> {
        let (config, host) = (found.examined.config, &found.host);
        let (security, recorder) = match &config.tls {
            TlsMode::Disabled => (Security::Plain, None),
            TlsMode::Verified(roots) => {
                let name = ServerName::try_from(host.clone())
                    .map_err(|_| format!("`{host}` is not a host name"))?;
                let (config, recorder) = Recorder::client_config(roots, tls::ALPN_POSTGRESQL)
                    .map_err(|error| error.to_string())?;
                (Security::Tls { config, name }, Some(recorder))
            }
        };
        let endpoint = Endpoint {
            label: Label::new(config.display_name()),
            host: host.clone(),
            port: config.port,
            // Not used: the addresses of the check before are dialed.
            addresses: Addresses::default(),
            user: found.user.clone(),
            database: found.database.clone(),
            security,
            dropped: DroppedParameters::default(),
        };
        Ok(Self {
            found,
            endpoint,
            recorder,
            addresses,
            credential,
        })
    }

    /// Logs in, with retries while the endpoint wakes; `None` without a credential.
    async fn log_in(
        &self,
        steps: &mut Vec<(Duration, Finding)>,
    ) -> Result<Option<LoggedIn<'_>>, Failure> {
        let started = Instant::now();
        let examined = self.found.examined;
        // As long as a client would wait.
        let deadline = started + examined.timeouts.connect_timeout;
        let mut backoff = Backoff::new(FIRST_PAUSE, LAST_PAUSE);
        loop {
            // Only those of the last attempt are reported.
            steps.clear();
            let woken_since = (!backoff.is_fresh()).then_some(started);
            let database = &self.endpoint.database;
            let attempt = self.attempt(database, woken_since, steps).await;
            // Without --connect the endpoint is awake, and a retry would not help.
            let is_waking = examined.connect
                && (attempt.as_ref()).is_err_and(|failure| failure.class == Class::Waking);
            if !is_waking || Instant::now() >= deadline {
                let connection = self;
                return attempt.map(|it| {
                    it.map(|session| LoggedIn {
                        connection,
                        session,
                    })
                });
            }
            sleep(backoff.next()).await;
        }
    }

    async fn attempt(
        &self,
        database: &str,
        woken_since: Option<Instant>,
        steps: &mut Vec<(Duration, Finding)>,
    ) -> Result<Option<Session>, Failure> {
        let (found, endpoint) = (self.found, &self.endpoint);
        let connecting = probe::connect(self.addresses.clone());
        let tcp = self.step(steps, LoginPhase::Dial, connecting, |result| match result {
            Ok(_) => Finding::ok(format!(
                "{}:{} takes connections",
                found.host, endpoint.port
            )),
            Err(failure) => failure.into(),
        });
        let securing = probe::secure(tcp.await?, endpoint, found.examined.metrics);
        let stream = self.step(steps, LoginPhase::Tls, securing, |result| {
            // Recorded even if the handshake failed.
            let certificate = self.recorder.as_deref().and_then(Recorder::certificate);
            match result {
                Ok(stream) => of_certificate(stream, certificate.as_ref()),
                Err(failure) => of_tls_failure(failure, certificate.as_ref(), &found.host),
            }
        });
        let stream = stream.await?;
        let Some(credential) = &self.credential else {
            return Ok(None);
        };
        // pg_stat_activity shows whose session it is.
        let name = ("application_name", "lakebase-proxy doctor");
        let settings = LoginParameters {
            database: database.to_owned(),
            parameters: vec![(name.0.to_owned(), name.1.to_owned())],
            ..LoginParameters::default()
        };
        let login = Session::log_in(stream, endpoint, credential, &settings);
        let session = self.step(steps, LoginPhase::Login, login, |result| match result {
            Ok(_) => {
                let awake = woken_since.map(|since| since.elapsed().as_secs_f64());
                let woke =
                    awake.map_or(String::new(), |after| format!(", awake after {after:.1} s"));
                Finding::ok(format!("as `{}` to `{database}`{woke}", found.user))
            }
            Err(failure) => failure.into(),
        });
        session.await.map(Some)
    }

    /// Runs a step of an attempt within the time limit of one.
    async fn step<T>(
        &self,
        steps: &mut Vec<(Duration, Finding)>,
        phase: LoginPhase,
        step: impl Future<Output = Result<T, Failure>>,
        judge: impl FnOnce(Result<&T, &Failure>) -> Finding,
    ) -> Result<T, Failure> {
        let started = Instant::now();
        let limit = self.found.examined.timeouts.server_connect_timeout;
        let result = timeout(limit, step).await;
        let result = result.unwrap_or_else(|_| Err(Failure::timed_out_in(phase, &self.endpoint)));
        steps.push((started.elapsed(), judge(result.as_ref())));
        result
    }

    /// Finds the cause of a refused login: the findings on the login and, if its credential was accepted, on the grants.
    async fn refused(&self, failure: &Failure) -> (Finding, Option<Finding>) {
        let (found, text) = (self.found, failure.to_string());
        let (user, database) = (&found.user, &found.database);
        // By SQLSTATE: a server may translate its messages. Postgres checks the database after the credential.
        let grants = if failure.is_server_error(sqlstate::INSUFFICIENT_PRIVILEGE) {
            let (to, role) = (identifier(database), identifier(user));
            Finding::failed(format!("`{user}` may not connect to `{database}`")).fix(format!(
                "as the database's owner: GRANT CONNECT ON DATABASE {to} TO {role};"
            ))
        } else if failure.is_missing_database() {
            Finding::failed(format!("there is no database `{database}`"))
                .fix(self.which_database().await)
        } else {
            return (self.refused_login(failure, text).await, None);
        };
        let accepted = Finding::ok(format!("the credential of `{user}` is accepted"));
        (accepted, Some(grants.detail(text)))
    }

    async fn refused_login(&self, failure: &Failure, text: String) -> Finding {
        let (found, class) = (self.found, failure.class);
        let (user, database) = (&found.user, &found.database);
        // A database without the extension refuses logins that the default database accepts.
        if class == Class::Identity
            && database != DEFAULT_DATABASE
            && let Ok(Some(_)) = self.attempt(DEFAULT_DATABASE, None, &mut Vec::new()).await
        {
            let message = format!(
                "the login works in `{DEFAULT_DATABASE}` and not in `{database}`, which lacks the extension databricks_auth"
            );
            return Finding::failed(message)
                .detail(text)
                .fix(create_extension(database));
        }
        let cause = match class {
            Class::WrongIdentity => {
                let profile = found.examined.access.profile.as_ref();
                let id = profile.map(|profile| profile.id.as_str());
                let fix = found.mismatch().unwrap_or_else(|| bind_role(user, id));
                return Finding::failed(text).fix(fix);
            }
            // 28000 stands for a missing role too; the workspace's list of roles distinguishes them.
            Class::Identity | Class::Permission => found.role().await,
            _ => None,
        };
        // Another identity is not what a refusal for another reason, such as an IP access list, is about.
        let is_cause = |role: &Finding| match role.outcome {
            Outcome::Failed => true,
            Outcome::Warning => class == Class::Identity,
            Outcome::Ok | Outcome::Skipped => false,
        };
        match cause.filter(is_cause) {
            Some(role) => Finding {
                outcome: Outcome::Failed,
                ..role.detail(text)
            },
            None => failure.into(),
        }
    }

    async fn which_database(&self) -> String {
        let mut names = match &self.found.target {
            Some((workspace, Target::Endpoint(endpoint))) => {
                workspace.databases(endpoint).await.unwrap_or_default()
            }
            _ => Vec::new(),
        };
        names.truncate(10);
        if names.is_empty() {
            return "set PGDATABASE to the database's name in Postgres: with underscores (databricks_postgres) where its resource id has hyphens".to_owned();
        }
        format!("set PGDATABASE to one of: {}", names.join(", "))
    }
}

/// A logged-in connection.
struct LoggedIn<'a> {
    connection: &'a Connection<'a>,
    session: Session,
}

impl LoggedIn<'_> {
    async fn query(&mut self, sql: &str) -> Result<Vec<probe::Row>, Finding> {
        let limit = self
            .connection
            .found
            .examined
            .timeouts
            .server_connect_timeout;
        let result = timeout(limit, self.session.query(sql)).await;
        let result = result.unwrap_or_else(|_| Err(Failure::timed_out("query")));
        result.map_err(|failure| Finding::from(&failure))
    }

    async fn grants(&mut self) -> Result<Finding, Finding> {
        let found = self.connection.found;
        let finding = grants::judge(&self.query(grants::QUESTION).await?, &found.user);
        // A server with a password of its own need not have identities.
        if finding.outcome == Outcome::Ok
            && found.target.is_some()
            && let Ok(rows) = self.query(grants::BINDING).await
        {
            let profile = found.examined.access.profile.as_ref();
            // Another role, such as a group's, is bound to another id than ours.
            let ours = profile.filter(|profile| profile.user_name == found.user);
            let id = ours.map(|profile| profile.id.as_str());
            let problem = grants::judge_binding(&rows, &found.user, id, &found.database);
            return Ok(problem.unwrap_or(finding));
        }
        Ok(finding)
    }

    async fn connections(&mut self) -> Result<Finding, Finding> {
        let rows = self.query(CONNECTIONS).await?;
        let mut numbers = rows
            .iter()
            .flatten()
            .map(|value| value.as_ref()?.parse().ok());
        let mut number = || numbers.next().flatten().unwrap_or_default();
        let (limit, reserved, now): (usize, usize, usize) = (number(), number(), number());
        let examined = &self.connection.found.examined;
        let limit = limit.saturating_sub(reserved);
        Ok(judge_pools(
            examined.config.pool_mode,
            &examined.pool,
            limit,
            now,
        ))
    }

    async fn select_1(&mut self) -> Result<Finding, Finding> {
        if self.query("SELECT 1").await? == [vec![Some("1".to_owned())]] {
            return Ok(Finding::ok("answered"));
        }
        Err(Finding::failed("the server's answer is not 1")
            .fix("check what answers on PGHOST and PGPORT"))
    }
}

/// The server's connection limit, those that it keeps for superusers, and the connections of clients now.
const CONNECTIONS: &str = "SELECT current_setting('max_connections'), current_setting('superuser_reserved_connections'), \
    (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')";

/// What the control plane and monitoring of a compute use, and a reserve: the pools of all proxies should leave it.
const RESERVED_CONNECTIONS: usize = 10;

/// Whether the pools of `fleet_size` proxies fit into the server's limit.
fn judge_pools(mode: PoolMode, pool: &PoolSettings, limit: usize, now: usize) -> Finding {
    let message = format!("the server accepts {limit} connections; {now} are open");
    if mode == PoolMode::None {
        return Finding::ok(message);
    }
    let share = (limit * 9 / 10).saturating_sub(RESERVED_CONNECTIONS) / pool.fleet_size;
    let size = pool.max_size();
    let message = format!(
        "{message}; pool_mode {} with {size} for each database, on {} proxies (--fleet-size)",
        mode.as_str(),
        pool.fleet_size
    );
    if size > share {
        return Finding::warning(message).fix(format!(
            "set --default-pool-size to {} or less, as all proxies share the server's limit, or choose a larger compute",
            share.max(1)
        ));
    }
    Finding::ok(message)
}

fn of_certificate(stream: &Stream, certificate: Option<&Certificate>) -> Finding {
    let version = match stream {
        Stream::Plain(_) => "none, as PGSSLMODE=disable requests",
        Stream::Tls(tls) if tls.protocol_version() == Some(ProtocolVersion::TLSv1_2) => "TLS 1.2",
        // rustls implements 1.2 and 1.3 only.
        Stream::Tls(_) => "TLS 1.3",
    };
    let Some(certificate) = certificate else {
        return Finding::ok(version);
    };
    let message = format!("{version}, {certificate}");
    let left = certificate.expires_at.duration_since(Timestamp::now());
    if left < NOTABLE_REMAINDER {
        let left = spoken(left);
        let fix = format!("the certificate expires in {left}: have it renewed");
        return Finding::warning(message).fix(fix);
    }
    Finding::ok(message)
}

fn of_tls_failure(failure: &Failure, certificate: Option<&Certificate>, host: &str) -> Finding {
    let Some(shown) = certificate else {
        return failure.into();
    };
    let fix = if shown.expires_at < Timestamp::now() {
        "the certificate has expired, or this machine's clock is wrong: check the clock first"
            .to_owned()
    } else if shown.is_for(host) {
        format!(
            "set PGSSLROOTCERT to the PEM file of `{}` if you trust it; else find what intercepts TLS on the way",
            shown.authority
        )
    } else {
        let names = shown.names.join(", ");
        format!("set PGHOST to a name that the certificate is for: {names}")
    };
    Finding::failed(failure.to_string())
        .detail(format!("the server sent {shown}"))
        .fix(fix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_leave_a_tenth_and_ten_connections_of_the_servers_limit() {
        let pool = |default_pool_size, fleet_size| PoolSettings {
            default_pool_size,
            fleet_size,
            ..PoolSettings::default()
        };
        for (mode, pool, outcome) in [
            (PoolMode::None, pool(1000, 8), Outcome::Ok),
            (PoolMode::Session, pool(83, 1), Outcome::Ok),
            (PoolMode::Session, pool(84, 1), Outcome::Warning),
            (PoolMode::Session, pool(10, 8), Outcome::Ok),
            (PoolMode::Session, pool(11, 8), Outcome::Warning),
        ] {
            // A compute of 0.5 CU.
            let finding = judge_pools(mode, &pool, 104, 3);
            assert_eq!(finding.outcome, outcome, "{pool:?}: {finding:?}");
        }
        let finding = judge_pools(PoolMode::Session, &pool(20, 8), 104, 3);
        assert!(
            finding
                .fix
                .unwrap()
                .contains("--default-pool-size to 10 or less")
        );
    }
}
