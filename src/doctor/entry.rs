//! The last steps: the way in to the endpoint, and what may be done there.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::ServerName;
use tokio::time::{Instant, sleep, timeout};

use super::{
    certificates::{Certificate, Recorder},
    endpoint::{Examined, Found, STEP_TIMEOUT},
    grants::{self, bind_role, create_extension, identifier},
    report::{Chart, Finding, Outcome, spoken},
    step,
};
use crate::{
    config::{DEFAULT_DATABASE, TlsMode},
    credential::Credential,
    net::tls,
    protocol::options::SessionSettings,
    status::Label,
    telemetry::labels::LoginPhase,
    upstream::{Addresses, Class, DroppedParameters, Endpoint, Failure, Security, probe},
    workspace::Target,
};

/// A certificate that lives no longer than this should have been replaced.
const NOTABLE_REMAINDER: SignedDuration = SignedDuration::from_hours(3 * 24);
const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LAST_PAUSE: Duration = Duration::from_secs(3);

/// One way in, as far as it went.
#[derive(Default)]
struct Attempt {
    tcp: Option<(Duration, Result<(), Failure>)>,
    tls: Option<(Duration, Result<String, Failure>)>,
    login: Option<(Duration, Result<probe::Session, Failure>)>,
    certificate: Option<Certificate>,
}

impl Attempt {
    fn failure(&self) -> Option<&Failure> {
        let tcp = self.tcp.as_ref().and_then(|(_, tcp)| tcp.as_ref().err());
        let tls = self.tls.as_ref().and_then(|(_, tls)| tls.as_ref().err());
        let login = self
            .login
            .as_ref()
            .and_then(|(_, login)| login.as_ref().err());
        tcp.or(tls).or(login)
    }
}

/// Goes in, as often as it takes while the endpoint wakes, and tells how far that went.
pub(super) async fn enter(
    chart: &mut Chart<'_>,
    examined: &Examined<'_>,
    found: &Found,
    addresses: Vec<SocketAddr>,
    credential: Option<Credential>,
) {
    let (endpoint, recorder) = match prepare(examined, found) {
        Ok(prepared) => prepared,
        Err(why) => {
            let names = [
                step::ENDPOINT_TCP,
                step::EDGE_TLS,
                step::LOGIN,
                step::GRANTS,
                step::SELECT,
            ];
            chart.skip(&names, &why);
            return;
        }
    };
    let started = Instant::now();
    let deadline = started + examined.limits.connect_timeout;
    let mut pause = FIRST_PAUSE;
    let mut attempts = 0_u32;
    let attempt = loop {
        attempts += 1;
        let attempt = log_in_to(
            &found.database,
            examined,
            &endpoint,
            recorder.as_deref(),
            addresses.clone(),
            credential.as_ref(),
        )
        .await;
        let is_waking = attempt
            .failure()
            .is_some_and(|failure| failure.class == Class::Waking);
        // Only with --connect may it be asleep, and then it is worth the wait.
        if !is_waking || !examined.connect || Instant::now() + pause >= deadline {
            break attempt;
        }
        sleep(pause).await;
        pause = (pause * 2).min(LAST_PAUSE);
    };
    let woke = (attempts > 1).then(|| started.elapsed());
    let is_refused_here = attempt.login.as_ref().is_some_and(|(_, login)| {
        login
            .as_ref()
            .is_err_and(|failure| failure.class == Class::Identity)
    });
    // Where it is let in to the default database, this one lacks what such logins need.
    let works_elsewhere = is_refused_here
        && found.database != DEFAULT_DATABASE
        && log_in_to(
            DEFAULT_DATABASE,
            examined,
            &endpoint,
            None,
            addresses,
            credential.as_ref(),
        )
        .await
        .login
        .is_some_and(|(_, login)| login.is_ok());
    tell(chart, examined, found, attempt, woke, works_elsewhere).await;
}

fn prepare(
    examined: &Examined<'_>,
    found: &Found,
) -> Result<(Endpoint, Option<Arc<Recorder>>), String> {
    let (security, recorder) = match &examined.config.tls {
        TlsMode::Disabled => (Security::Plain, None),
        TlsMode::Verified(roots) => {
            let name = ServerName::try_from(found.host.clone())
                .map_err(|_| format!("`{}` is not a host name", found.host))?;
            let verifier = tls::verifier(roots).map_err(|error| error.to_string())?;
            let recorder = Recorder::new(verifier);
            let config = tls::client_config_with(Arc::clone(&recorder) as _, tls::ALPN_POSTGRESQL)
                .map_err(|error| error.to_string())?;
            (Security::Tls { config, name }, Some(recorder))
        }
    };
    let endpoint = Endpoint {
        label: Label::new(examined.config.called()),
        host: found.host.clone(),
        port: examined.config.port,
        addresses: Addresses::default(),
        user: found.user.clone(),
        database: found.database.clone(),
        security,
        dropped: DroppedParameters::default(),
    };
    Ok((endpoint, recorder))
}

async fn log_in_to(
    database: &str,
    examined: &Examined<'_>,
    endpoint: &Endpoint,
    recorder: Option<&Recorder>,
    addresses: Vec<SocketAddr>,
    credential: Option<&Credential>,
) -> Attempt {
    let limit = examined.limits.server_connect_timeout;
    let mut attempt = Attempt::default();
    let started = Instant::now();
    let dialed = timeout(limit, probe::connect(addresses)).await;
    let dialed = dialed.unwrap_or_else(|_| Err(Failure::timed_out_in(LoginPhase::Dial, endpoint)));
    let tcp = match dialed {
        Ok(tcp) => tcp,
        Err(failure) => {
            attempt.tcp = Some((started.elapsed(), Err(failure)));
            return attempt;
        }
    };
    attempt.tcp = Some((started.elapsed(), Ok(())));

    let started = Instant::now();
    let secured = timeout(limit, probe::secure(tcp, endpoint, examined.metrics)).await;
    let secured = secured.unwrap_or_else(|_| Err(Failure::timed_out_in(LoginPhase::Tls, endpoint)));
    attempt.certificate = recorder.and_then(Recorder::certificate);
    let stream = match secured {
        Ok(stream) => stream,
        Err(failure) => {
            attempt.tls = Some((started.elapsed(), Err(failure)));
            return attempt;
        }
    };
    let version = match &stream {
        probe::Stream::Plain(_) => "none, as PGSSLMODE=disable asks".to_owned(),
        probe::Stream::Tls(tls) => match tls.protocol_version() {
            Some(rustls::ProtocolVersion::TLSv1_2) => "TLS 1.2".to_owned(),
            _ => "TLS 1.3".to_owned(),
        },
    };
    attempt.tls = Some((started.elapsed(), Ok(version)));

    let Some(credential) = credential else {
        return attempt;
    };
    let settings = SessionSettings {
        database: database.to_owned(),
        fallback_database: None,
        parameters: vec![(
            "application_name".to_owned(),
            "lakebase-proxy doctor".to_owned(),
        )],
        client_encoding: None,
        replication: false,
        ..SessionSettings::default()
    };
    let started = Instant::now();
    let login = probe::Session::log_in(stream, endpoint, credential, &settings);
    let login = bounded(limit, "login", login).await;
    attempt.login = Some((started.elapsed(), login));
    attempt
}

async fn bounded<T>(
    limit: Duration,
    phase: &str,
    step: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    match timeout(limit, step).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Failure::timed_out(phase)),
    }
}

/// Takes down the last attempt, and goes on where it ended.
async fn tell(
    chart: &mut Chart<'_>,
    examined: &Examined<'_>,
    found: &Found,
    attempt: Attempt,
    woke: Option<Duration>,
    works_elsewhere: bool,
) {
    let (host, port) = (&found.host, examined.config.port);
    if let Some((took, tcp)) = attempt.tcp {
        let finding = match &tcp {
            Ok(()) => Finding::ok(format!("{host}:{port} takes connections")),
            Err(failure) => {
                Finding::failed(failure.to_string()).mend(failure.hint().map(str::to_owned))
            }
        };
        chart.note_timed(step::ENDPOINT_TCP, took, finding);
    }
    let Some((took, tls)) = attempt.tls else {
        let names = [step::EDGE_TLS, step::LOGIN, step::GRANTS, step::SELECT];
        chart.skip(&names, "no connection");
        return;
    };
    let finding = match &tls {
        Ok(version) => of_certificate(version, attempt.certificate.as_ref()),
        Err(failure) => of_tls_failure(failure, attempt.certificate.as_ref(), host),
    };
    chart.note_timed(step::EDGE_TLS, took, finding);
    if tls.is_err() {
        chart.skip(&[step::LOGIN, step::GRANTS, step::SELECT], "no TLS");
        return;
    }
    match attempt.login {
        None => chart.skip(&[step::LOGIN, step::GRANTS, step::SELECT], "no credential"),
        Some((took, Err(failure))) if works_elsewhere => {
            let (database, words) = (&found.database, failure.to_string());
            let finding = Finding::failed(format!(
                "the login works in `{DEFAULT_DATABASE}` and not in `{database}`, which lacks the extension databricks_auth"
            ));
            let finding = finding.detail(words).mend(create_extension(database));
            chart.note_timed(step::LOGIN, took, finding);
            chart.skip(&[step::GRANTS, step::SELECT], "no session");
        }
        Some((took, Err(failure))) => refused(chart, examined, found, took, &failure).await,
        Some((took, Ok(session))) => {
            let after = woke
                .map(|woke| format!(", awake after {:.1} s", woke.as_secs_f64()))
                .unwrap_or_default();
            let finding = Finding::ok(format!(
                "as `{}` to `{}`{after}",
                found.user, found.database
            ));
            chart.note_timed(step::LOGIN, took, finding);
            ask(chart, examined, found, session).await;
        }
    }
}

fn of_certificate(version: &str, certificate: Option<&Certificate>) -> Finding {
    let Some(certificate) = certificate else {
        return Finding::ok(version);
    };
    let message = format!("{version}, {certificate}");
    let left = certificate.expires_at.duration_since(Timestamp::now());
    if left < NOTABLE_REMAINDER {
        return Finding::warning(message).mend(format!(
            "the certificate expires in {}: have it renewed",
            spoken(left)
        ));
    }
    Finding::ok(message)
}

fn of_tls_failure(failure: &Failure, certificate: Option<&Certificate>, host: &str) -> Finding {
    let finding = Finding::failed(failure.to_string());
    let Some(shown) = certificate else {
        return finding.mend(failure.hint().map(str::to_owned));
    };
    let names_host = shown.names.iter().any(|name| {
        name.eq_ignore_ascii_case(host)
            || name
                .strip_prefix("*.")
                .is_some_and(|zone| host.split_once('.').is_some_and(|(_, rest)| rest == zone))
    });
    let mend = if shown.expires_at < Timestamp::now() {
        "the certificate has expired, or this machine's clock is wrong: check the clock first"
            .to_owned()
    } else if names_host {
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
    finding.detail(format!("shown was {shown}")).mend(mend)
}

/// Finds the cause of a refusal among credential, role and grants.
async fn refused(
    chart: &mut Chart<'_>,
    examined: &Examined<'_>,
    found: &Found,
    took: Duration,
    failure: &Failure,
) {
    let words = failure.to_string();
    let lower = words.to_lowercase();
    let user = &found.user;
    let database = &found.database;
    // Postgres judges these once it knows who is there.
    let grant = if lower.contains("permission denied for database") {
        let mend = format!(
            "as the database's owner: GRANT CONNECT ON DATABASE {} TO {};",
            identifier(database),
            identifier(user)
        );
        Some(Finding::failed(format!("`{user}` may not connect to `{database}`")).mend(mend))
    } else if lower.contains("database \"") && lower.contains("does not exist") {
        Some(
            Finding::failed(format!("there is no database `{database}`"))
                .mend(examined.which_database(found).await),
        )
    } else {
        None
    };
    if let Some(finding) = grant {
        let accepted = Finding::ok(format!("the credential of `{user}` is accepted"));
        chart.note_timed(step::LOGIN, took, accepted);
        chart.note_timed(step::GRANTS, Duration::ZERO, finding.detail(words));
        chart.skip(&[step::SELECT], "no session");
        return;
    }
    let is_role_missing = lower.contains("role \"") && lower.contains("does not exist");
    let finding = if is_role_missing {
        examined.missing_role(found)
    } else if failure.class == Class::WrongIdentity {
        let id = examined
            .access
            .profile
            .as_ref()
            .map(|profile| profile.id.as_str());
        let mend = examined.mismatch(found);
        Finding::failed(words.clone()).mend(mend.unwrap_or_else(|| bind_role(user, id)))
    } else {
        let known = match failure.class {
            Class::Identity => examined
                .role(found)
                .await
                .filter(|finding| finding.mend.is_some()),
            _ => None,
        };
        match known {
            Some(finding) => Finding::failed(finding.message).mend(finding.mend),
            None => Finding::failed(words.clone()).mend(failure.hint().map(str::to_owned)),
        }
    };
    let detail = (finding.message != words).then_some(words);
    chart.note_timed(step::LOGIN, took, finding.detail(detail));
    chart.skip(&[step::GRANTS, step::SELECT], "no session");
}

impl Examined<'_> {
    async fn which_database(&self, found: &Found) -> String {
        let names = match (self.workspace, &found.target) {
            (Some(workspace), Some(Target::Endpoint(endpoint))) => {
                workspace.databases(endpoint).await.unwrap_or_default()
            }
            _ => Vec::new(),
        };
        match &names[..] {
            [] => "set PGDATABASE to the database's name in Postgres: with underscores (databricks_postgres) where its resource id has hyphens".to_owned(),
            names => format!(
                "set PGDATABASE to one of: {}",
                names.iter().take(10).cloned().collect::<Vec<_>>().join(", ")
            ),
        }
    }
}

async fn ask(
    chart: &mut Chart<'_>,
    examined: &Examined<'_>,
    found: &Found,
    mut session: probe::Session,
) {
    let limit = examined.limits.server_connect_timeout;
    let started = Instant::now();
    let answer = bounded(limit, "query", session.query(grants::QUESTION)).await;
    let mut finding = match &answer {
        Ok(rows) => grants::judge(rows, &found.user),
        Err(failure) => Finding::failed(failure.to_string()),
    };
    // A server with a password of its own need know nothing of identities.
    if finding.outcome == Outcome::Ok
        && found.target.is_some()
        && let Ok(rows) = bounded(limit, "query", session.query(grants::BINDING)).await
    {
        let profile = examined.access.profile.as_ref();
        let ours = profile.filter(|profile| profile.user_name == found.user);
        let identity = (found.user.as_str(), ours.map(|profile| profile.id.as_str()));
        finding = grants::judge_binding(&rows, identity, &found.database).unwrap_or(finding);
    }
    chart.note(step::GRANTS, started, finding);

    let started = Instant::now();
    let answer = bounded(limit, "query", session.query("SELECT 1")).await;
    let finding = match answer {
        Ok(rows) if rows == [vec![Some("1".to_owned())]] => Finding::ok("answered"),
        Ok(_) => Finding::failed("the server's answer is not 1")
            .mend("check what answers on PGHOST and PGPORT".to_owned()),
        Err(failure) => {
            Finding::failed(failure.to_string()).mend(failure.hint().map(str::to_owned))
        }
    };
    chart.note(step::SELECT, started, finding);
    let _ = timeout(STEP_TIMEOUT, session.end()).await;
}
