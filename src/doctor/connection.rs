//! Checks of a connection to the endpoint: TCP, TLS, login, grants, and a query.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rustls::{ProtocolVersion, pki_types::ServerName};
use tokio::time::{Instant, sleep, timeout};

use super::{
    certificates::{Certificate, Recorder},
    endpoint::{Examined, Found, Ready},
    grants::{self, bind_role, create_extension, identifier},
    report::{Finding, Outcome, Steps, spoken},
    step,
    workspace::STEP_TIMEOUT,
};
use crate::{
    config::{DEFAULT_DATABASE, TlsMode},
    credential::Credential,
    net::{backoff::Backoff, tls},
    protocol::{error::sqlstate, options::LoginParameters},
    status::Label,
    telemetry::labels::LoginPhase,
    upstream::{Addresses, Class, DroppedParameters, Endpoint, Failure, Security, probe},
    workspace::Target,
};

/// The remaining life of a certificate that should have been renewed.
const NOTABLE_REMAINDER: SignedDuration = SignedDuration::from_hours(3 * 24);
const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LAST_PAUSE: Duration = Duration::from_secs(3);

/// One attempt to log in: the findings of its steps, and its end.
struct Attempt {
    steps: Vec<(&'static str, Duration, Finding)>,
    end: End,
}

enum End {
    /// TCP or TLS failed.
    Unreachable(Class),
    NoCredential,
    Refused(Duration, Failure),
    LoggedIn(Duration, probe::Session),
}

impl Attempt {
    fn class(&self) -> Option<Class> {
        match &self.end {
            End::Unreachable(class) => Some(*class),
            End::Refused(_, failure) => Some(failure.class),
            End::NoCredential | End::LoggedIn(..) => None,
        }
    }
}

/// Connects, with retries while the endpoint wakes, and reports the last attempt.
pub(super) async fn check(steps: &mut Steps<'_>, examined: &Examined<'_>, ready: Ready) {
    let Ready {
        found,
        addresses,
        credential,
    } = ready;
    let found = &found;
    let connection = match Connection::new(examined, found, addresses, credential) {
        Ok(connection) => connection,
        Err(why) => {
            steps.skip_rest(step::OF_ENDPOINT, &why);
            return;
        }
    };
    let started = Instant::now();
    // As long as a client would wait.
    let deadline = started + examined.timeouts.connect_timeout;
    let mut backoff = Backoff::new(FIRST_PAUSE, LAST_PAUSE);
    let attempt = loop {
        let attempt = connection.attempt(&found.database).await;
        // Without --connect the endpoint is awake, and a retry would not help.
        let is_waking = attempt.class() == Some(Class::Waking) && examined.connect;
        if !is_waking || Instant::now() >= deadline {
            break attempt;
        }
        sleep(backoff.next()).await;
    };
    for (name, took, finding) in attempt.steps {
        steps.note(name, took, finding);
    }
    match attempt.end {
        End::Unreachable(_) => {}
        End::NoCredential => steps.skip_rest(step::OF_ENDPOINT, "no credential"),
        End::Refused(took, failure) => {
            // A database without the extension refuses logins that the default database accepts.
            let lacks_extension = failure.class == Class::Identity
                && found.database != DEFAULT_DATABASE
                && matches!(
                    connection.attempt(DEFAULT_DATABASE).await.end,
                    End::LoggedIn(..)
                );
            if lacks_extension {
                let database = &found.database;
                let message = format!(
                    "the login works in `{DEFAULT_DATABASE}` and not in `{database}`, which lacks the extension databricks_auth"
                );
                let finding = Finding::failed(message).detail(failure.to_string());
                steps.note(step::LOGIN, took, finding.fix(create_extension(database)));
            } else {
                refused(steps, examined, found, took, &failure).await;
            }
            steps.skip_rest(step::OF_ENDPOINT, "no session");
        }
        End::LoggedIn(took, mut session) => {
            let woke = if backoff.is_fresh() {
                String::new()
            } else {
                format!(", awake after {:.1} s", started.elapsed().as_secs_f64())
            };
            let message = format!("as `{}` to `{}`{woke}", found.user, found.database);
            steps.note(step::LOGIN, took, Finding::ok(message));
            let limit = examined.timeouts.server_connect_timeout;
            let grants = async { Ok(((), grants(examined, found, &mut session).await)) };
            steps.check(step::GRANTS, grants).await;
            steps
                .check(step::SELECT, select_1(&mut session, limit))
                .await;
            // With Terminate, so that the server logs no lost connection.
            let _ = timeout(STEP_TIMEOUT, session.end()).await;
        }
    }
}

/// The parts of all attempts.
struct Connection<'a> {
    examined: &'a Examined<'a>,
    endpoint: Endpoint,
    recorder: Option<Arc<Recorder>>,
    addresses: Vec<SocketAddr>,
    credential: Option<Credential>,
}

impl<'a> Connection<'a> {
    fn new(
        examined: &'a Examined<'a>,
        found: &Found,
        addresses: Vec<SocketAddr>,
        credential: Option<Credential>,
    ) -> Result<Self, String> {
        let (security, recorder) = match &examined.config.tls {
            TlsMode::Disabled => (Security::Plain, None),
            TlsMode::Verified(roots) => {
                let name = ServerName::try_from(found.host.clone())
                    .map_err(|_| format!("`{}` is not a host name", found.host))?;
                let verifier = tls::verifier(roots).map_err(|error| error.to_string())?;
                // The proxy's own verifier, so that `doctor` accepts what the proxy accepts.
                let recorder = Recorder::new(verifier);
                let verifier = Arc::clone(&recorder) as _;
                let config = tls::client_config_with(verifier, tls::ALPN_POSTGRESQL)
                    .map_err(|error| error.to_string())?;
                (Security::Tls { config, name }, Some(recorder))
            }
        };
        let endpoint = Endpoint {
            label: Label::new(examined.config.called()),
            host: found.host.clone(),
            port: examined.config.port,
            // Not used: the addresses of the check before are dialed.
            addresses: Addresses::default(),
            user: found.user.clone(),
            database: found.database.clone(),
            security,
            dropped: DroppedParameters::default(),
        };
        Ok(Self {
            examined,
            endpoint,
            recorder,
            addresses,
            credential,
        })
    }

    async fn attempt(&self, database: &str) -> Attempt {
        // Not reported at once: only those of the last attempt are.
        let mut steps = Vec::new();
        let end = match self.stream(&mut steps).await {
            Ok(stream) => self.log_in(stream, database).await,
            Err(failure) => End::Unreachable(failure.class),
        };
        Attempt { steps, end }
    }

    async fn stream(
        &self,
        steps: &mut Vec<(&'static str, Duration, Finding)>,
    ) -> Result<probe::Stream, Failure> {
        let limit = self.examined.timeouts.server_connect_timeout;
        let (endpoint, started) = (&self.endpoint, Instant::now());
        let dialed = timeout(limit, probe::connect(self.addresses.clone())).await;
        let dialed =
            dialed.unwrap_or_else(|_| Err(Failure::timed_out_in(LoginPhase::Dial, endpoint)));
        let finding = match &dialed {
            Ok(_) => Finding::ok(format!(
                "{}:{} takes connections",
                endpoint.host, endpoint.port
            )),
            Err(failure) => of_failure(failure),
        };
        steps.push((step::ENDPOINT_TCP, started.elapsed(), finding));

        let (tcp, started) = (dialed?, Instant::now());
        let secured = timeout(limit, probe::secure(tcp, endpoint, self.examined.metrics)).await;
        let secured =
            secured.unwrap_or_else(|_| Err(Failure::timed_out_in(LoginPhase::Tls, endpoint)));
        // Recorded even if the handshake failed.
        let certificate = self.recorder.as_deref().and_then(Recorder::certificate);
        let finding = match &secured {
            Ok(stream) => of_certificate(stream, certificate.as_ref()),
            Err(failure) => of_tls_failure(failure, certificate.as_ref(), &endpoint.host),
        };
        steps.push((step::EDGE_TLS, started.elapsed(), finding));
        secured
    }

    async fn log_in(&self, stream: probe::Stream, database: &str) -> End {
        let Some(credential) = &self.credential else {
            return End::NoCredential;
        };
        // pg_stat_activity shows whose session it is.
        let name = (
            "application_name".to_owned(),
            "lakebase-proxy doctor".to_owned(),
        );
        let settings = LoginParameters {
            database: database.to_owned(),
            parameters: vec![name],
            ..LoginParameters::default()
        };
        let started = Instant::now();
        let login = probe::Session::log_in(stream, &self.endpoint, credential, &settings);
        let limit = self.examined.timeouts.server_connect_timeout;
        match bounded(limit, "login", login).await {
            Ok(session) => End::LoggedIn(started.elapsed(), session),
            Err(failure) => End::Refused(started.elapsed(), failure),
        }
    }
}

async fn bounded<T>(
    limit: Duration,
    phase: &str,
    step: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let result = timeout(limit, step).await;
    result.unwrap_or_else(|_| Err(Failure::timed_out(phase)))
}

fn of_failure(failure: &Failure) -> Finding {
    Finding::failed(failure.to_string()).hint(failure.hint())
}

fn of_certificate(stream: &probe::Stream, certificate: Option<&Certificate>) -> Finding {
    let version = match stream {
        probe::Stream::Plain(_) => "none, as PGSSLMODE=disable requests",
        probe::Stream::Tls(tls) if tls.protocol_version() == Some(ProtocolVersion::TLSv1_2) => {
            "TLS 1.2"
        }
        // rustls implements 1.2 and 1.3 only.
        probe::Stream::Tls(_) => "TLS 1.3",
    };
    let Some(certificate) = certificate else {
        return Finding::ok(version);
    };
    let message = format!("{version}, {certificate}");
    let left = certificate.expires_at.duration_since(Timestamp::now());
    if left < NOTABLE_REMAINDER {
        let fix = format!(
            "the certificate expires in {}: have it renewed",
            spoken(left)
        );
        return Finding::warning(message).fix(fix);
    }
    Finding::ok(message)
}

fn of_tls_failure(failure: &Failure, certificate: Option<&Certificate>, host: &str) -> Finding {
    let Some(shown) = certificate else {
        return of_failure(failure);
    };
    let is_for_host = shown.names.iter().any(|name| {
        let zone = name.strip_prefix("*.");
        name.eq_ignore_ascii_case(host)
            // A wildcard stands for exactly one label (RFC 9525 section 6.3).
            || zone.is_some_and(|zone| host.split_once('.').is_some_and(|(_, rest)| rest == zone))
    });
    let fix = if shown.expires_at < Timestamp::now() {
        "the certificate has expired, or this machine's clock is wrong: check the clock first"
            .to_owned()
    } else if is_for_host {
        format!(
            "set PGSSLROOTCERT to the PEM file of `{}` if you trust it; else find what intercepts TLS on the way",
            shown.authority
        )
    } else {
        format!(
            "set PGHOST to a name that the certificate is for: {}",
            shown.names.join(", ")
        )
    };
    Finding::failed(failure.to_string())
        .detail(format!("the server sent {shown}"))
        .fix(fix)
}

/// Finds the cause of a refusal among credential, role and grants.
async fn refused(
    steps: &mut Steps<'_>,
    examined: &Examined<'_>,
    found: &Found,
    took: Duration,
    failure: &Failure,
) {
    let text = failure.to_string();
    let (user, database) = (&found.user, &found.database);
    // By SQLSTATE: a server may translate its messages. Postgres checks the database after the credential.
    let grant = if failure.is_server_error(sqlstate::INSUFFICIENT_PRIVILEGE) {
        let fix = format!(
            "as the database's owner: GRANT CONNECT ON DATABASE {} TO {};",
            identifier(database),
            identifier(user)
        );
        Some(Finding::failed(format!("`{user}` may not connect to `{database}`")).fix(fix))
    } else if failure.is_missing_database() {
        let fix = which_database(examined, found).await;
        Some(Finding::failed(format!("there is no database `{database}`")).fix(fix))
    } else {
        None
    };
    if let Some(finding) = grant {
        let accepted = Finding::ok(format!("the credential of `{user}` is accepted"));
        steps.note(step::LOGIN, took, accepted);
        steps.note(step::GRANTS, Duration::ZERO, finding.detail(text));
        return;
    }
    let finding = match failure.class {
        Class::WrongIdentity => {
            let id = examined
                .access
                .profile
                .as_ref()
                .map(|profile| profile.id.as_str());
            let fix = examined.mismatch(found);
            Finding::failed(text.clone()).fix(fix.unwrap_or_else(|| bind_role(user, id)))
        }
        // 28000 stands for a missing role too; the workspace's list of roles tells them apart.
        Class::Identity | Class::Permission => {
            // Another identity is not what a refusal for another reason, such as an IP access list, is about.
            let is_cause = |role: &Finding| {
                role.outcome == Outcome::Failed
                    || (role.outcome == Outcome::Warning && failure.class == Class::Identity)
            };
            match examined.role(found).await.filter(is_cause) {
                Some(role) => Finding::failed(role.message).hint(role.fix),
                None => of_failure(failure),
            }
        }
        _ => of_failure(failure),
    };
    let detail = (finding.message != text).then_some(text);
    steps.note(step::LOGIN, took, finding.detail(detail));
}

async fn which_database(examined: &Examined<'_>, found: &Found) -> String {
    let mut names = match (examined.workspace, &found.target) {
        (Some(workspace), Some(Target::Endpoint(endpoint))) => {
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

async fn grants(examined: &Examined<'_>, found: &Found, session: &mut probe::Session) -> Finding {
    let limit = examined.timeouts.server_connect_timeout;
    let finding = match bounded(limit, "query", session.query(grants::QUESTION)).await {
        Ok(rows) => grants::judge(&rows, &found.user),
        Err(failure) => return Finding::failed(failure.to_string()),
    };
    // A server with a password of its own need not have identities.
    if finding.outcome == Outcome::Ok
        && found.target.is_some()
        && let Ok(rows) = bounded(limit, "query", session.query(grants::BINDING)).await
    {
        let profile = examined.access.profile.as_ref();
        // Another role, such as a group's, is bound to another id than ours.
        let ours = profile.filter(|profile| profile.user_name == found.user);
        let id = ours.map(|profile| profile.id.as_str());
        return grants::judge_binding(&rows, &found.user, id, &found.database).unwrap_or(finding);
    }
    finding
}

async fn select_1(session: &mut probe::Session, limit: Duration) -> Result<((), Finding), Finding> {
    match bounded(limit, "query", session.query("SELECT 1")).await {
        Ok(rows) if rows == [vec![Some("1".to_owned())]] => Ok(((), Finding::ok("answered"))),
        Ok(_) => Err(Finding::failed("the server's answer is not 1")
            .fix("check what answers on PGHOST and PGPORT")),
        Err(failure) => Err(of_failure(&failure)),
    }
}
