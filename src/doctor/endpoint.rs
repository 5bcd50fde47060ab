//! The steps towards one endpoint: what the workspace says of it, a credential for it, and the way in, as far as that
//! may be gone without waking it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::ServerName;
use tokio::time::{Instant, sleep, timeout};

use super::{
    certificates::{Certificate, Recorder},
    report::{Chart, Finding, spoken},
    step,
    workspace::{Access, listed},
};
use crate::{
    clock::Clock,
    config::{CredentialSource, EndpointConfig, TlsMode},
    credential::{Credential, CredentialCommand, Mint, MintError, Minted, Password, PasswordFile},
    protocol::options::SessionSettings,
    telemetry::Metrics,
    tls,
    upstream::{Class, Endpoint, Failure, Label, Limits, Security, is_loopback, probe},
    workspace::{
        CredentialMinter, EndpointInfo, EndpointState, HostName, LocateError, Located, Target,
        Wanted, Workspace,
    },
};

/// One step on the network.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// A certificate that lives no longer than this should have been replaced.
const NOTABLE_REMAINDER: SignedDuration = SignedDuration::from_hours(3 * 24);
const FIRST_PAUSE: Duration = Duration::from_millis(300);
const LAST_PAUSE: Duration = Duration::from_secs(3);

/// What may be done with the database, in one row.
const GRANTS: &str = "\
SELECT current_user, current_database(), has_database_privilege(current_database(), 'CREATE'), \
    count(*), count(*) FILTER (WHERE readable), min(nspname) FILTER (WHERE NOT readable) \
FROM (SELECT n.nspname, has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') AS readable \
      FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
      WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND n.nspname <> 'information_schema' \
        AND n.nspname NOT LIKE 'pg\\_%') AS tables";

/// One endpoint and what is needed to look at it.
pub(super) struct Examined<'a> {
    pub(super) config: &'a EndpointConfig,
    pub(super) limits: Limits,
    pub(super) workspace: Option<&'a Workspace>,
    pub(super) access: &'a Access,
    pub(super) clock: &'a Clock,
    pub(super) metrics: &'a Metrics,
    pub(super) connect: bool,
    /// Whether the settings make sense; if not, nothing is dialled.
    pub(super) is_usable: bool,
}

/// Where it is and how it is doing.
struct Found {
    target: Option<Target>,
    host: String,
    user: String,
    database: String,
    state: Option<EndpointState>,
}

/// Takes the steps.
pub(super) async fn check(chart: &mut Chart<'_>, examined: &Examined<'_>) {
    let Some(found) = locate(chart, examined).await else {
        chart.skip(&step::OF_ENDPOINT[1..], "no endpoint to go on with");
        return;
    };
    let credential = credential(chart, examined, found.target.as_ref()).await;
    let rest = &[
        step::ENDPOINT_TCP,
        step::EDGE_TLS,
        step::LOGIN,
        step::GRANTS,
        step::SELECT,
    ];
    let Some(addresses) = resolve(chart, examined, &found).await else {
        chart.skip(rest, "the endpoint's host cannot be used");
        return;
    };
    if let Some(why) = examined.must_stay_away(&found) {
        chart.skip(&rest[..3], why);
        let started = Instant::now();
        let finding = examined.role(&found).await;
        chart.note(
            step::GRANTS,
            started,
            finding.unwrap_or_else(|| Finding::skipped(why)),
        );
        chart.skip(&rest[4..], why);
        return;
    }
    enter(chart, examined, &found, addresses, credential).await;
}

impl Examined<'_> {
    /// Why nothing may be dialled, if so.
    fn must_stay_away(&self, found: &Found) -> Option<&'static str> {
        let is_elsewhere = found.target.is_none()
            && found
                .host
                .parse::<HostName>()
                .is_ok_and(|host| !host.is_lakebase());
        match found.state {
            _ if !self.is_usable => Some("the settings cannot be used"),
            _ if self.connect || is_elsewhere => None,
            Some(EndpointState::Active | EndpointState::Degraded) => None,
            Some(EndpointState::Idle) => Some("asleep: --connect wakes it and goes on"),
            _ => Some("it may be asleep: --connect goes on all the same"),
        }
    }

    /// What the workspace says about the role, where that is worth a word.
    async fn role(&self, found: &Found) -> Option<Finding> {
        let (Some(workspace), Some(Target::Endpoint(endpoint))) = (self.workspace, &found.target)
        else {
            return None;
        };
        let roles = workspace.roles(endpoint).await.ok()?;
        let Some(role) = roles.iter().find(|role| role.name == found.user) else {
            return Some(
                Finding::failed(format!(
                    "there is no Postgres role `{}` on this branch",
                    found.user
                ))
                .mend(create_role(&found.user)),
            );
        };
        if !role.is_oauth {
            return Some(
                Finding::failed(format!(
                    "the role `{}` was not made for OAuth logins",
                    found.user
                ))
                .mend(format!(
                    "as the role's owner: DROP ROLE {}; {}",
                    identifier(&found.user),
                    create_role(&found.user)
                )),
            );
        }
        let mismatch = self.mismatch(found).map(|mend| {
            Finding::warning(format!(
                "the login is as `{}`, which is not who we are",
                found.user
            ))
            .mend(mend)
        });
        Some(mismatch.unwrap_or_else(|| {
            Finding::ok(format!(
                "the workspace lists the role `{}`; its grants were not tried",
                found.user
            ))
        }))
    }

    /// What to do when the login's user is neither us nor a group of ours.
    fn mismatch(&self, found: &Found) -> Option<String> {
        let profile = self.access.profile.as_ref()?;
        let is_ours = profile.user_name == found.user || profile.groups.contains(&found.user);
        (!is_ours).then(|| {
            format!(
                "unset PGUSER, or set it to `{}`, whose credential this is",
                profile.user_name
            )
        })
    }
}

async fn locate(chart: &mut Chart<'_>, examined: &Examined<'_>) -> Option<Found> {
    let config = examined.config;
    if !matches!(config.credential, CredentialSource::Workspace) {
        chart.skip(&[step::ENDPOINT], "its credential is not the workspace's");
        return Some(Found {
            target: None,
            host: config.host.clone()?,
            user: config.user.clone()?,
            database: config.database_or_default().to_owned(),
            state: None,
        });
    }
    let workspace = examined.workspace.filter(|_| examined.access.can_call);
    let Some(workspace) = workspace else {
        chart.skip(&[step::ENDPOINT], "the workspace does not answer us");
        return None;
    };
    let started = Instant::now();
    let wanted = Wanted {
        name: config.name.clone(),
        host: config.host.clone(),
        app: config.app.clone(),
        read_only: config.read_only,
        user: config.user.clone(),
        database: config.database.clone(),
    };
    // Asked as if the host were not known, so that a wrong name shows.
    let asked = Wanted {
        host: wanted.host.clone().filter(|_| wanted.name.is_none()),
        ..wanted.clone()
    };
    let (located, finding) = match workspace.locate_within(&asked, Duration::ZERO).await {
        Ok(located) => {
            let finding = state_of(&located, config.host.as_deref());
            (located, finding)
        }
        Err(error) if is_answered_by_host(&error) && wanted.host.is_some() => {
            match workspace.locate_within(&wanted, Duration::ZERO).await {
                Ok(located) => {
                    let finding = Finding::ok(format!(
                        "`{}`; the identity may not look it up, PGHOST says where it is",
                        located.label
                    ));
                    (located, finding)
                }
                Err(error) => {
                    chart.note(step::ENDPOINT, started, of_locate(&error));
                    return None;
                }
            }
        }
        Err(error) => {
            chart.note(step::ENDPOINT, started, of_locate(&error));
            return None;
        }
    };
    chart.note(step::ENDPOINT, started, finding);
    let host = match &config.host {
        None => located.host,
        Some(host) if config.read_only => host
            .parse::<HostName>()
            .map_or_else(|_| host.clone(), |host| host.read_only().to_string()),
        Some(host) => host.clone(),
    };
    Some(Found {
        target: Some(located.target),
        host,
        user: located.user,
        database: located
            .database
            .unwrap_or_else(|| config.database_or_default().to_owned()),
        state: located.info.map(|info| info.state),
    })
}

/// Whether a known host makes up for the look-up that failed.
fn is_answered_by_host(error: &LocateError) -> bool {
    matches!(error, LocateError::NoHost { .. }) || error.is_forbidden()
}

fn of_locate(error: &LocateError) -> Finding {
    let (message, detail) = match error {
        LocateError::Call { source, .. } => (format!("{error}: {source}"), source.detail.clone()),
        LocateError::NotFound {
            source: Some(source),
            ..
        } => (error.to_string(), source.detail.clone()),
        _ => (error.to_string(), None),
    };
    Finding::failed(message).detail(detail).mend(error.hint())
}

fn state_of(located: &Located, host: Option<&str>) -> Finding {
    let Located { label, info, .. } = located;
    let Some(info) = info else {
        return Finding::ok(format!("`{label}`"));
    };
    let suspends = match info.suspend_timeout {
        Some(after) => format!(
            ", sleeps after {}",
            spoken(SignedDuration::try_from(after).unwrap_or(SignedDuration::MAX))
        ),
        None => String::new(),
    };
    let message = format!("`{label}` is {}{suspends}", info.state);
    if let Some(host) = host
        && let Some(own) = differs(host, info)
    {
        return Finding::warning(format!(
            "PGHOST is `{host}`, but `{label}` answers on `{own}`"
        ))
        .mend("unset PGHOST to have the host looked up, or correct it".to_owned());
    }
    match &info.state {
        EndpointState::Active | EndpointState::Idle | EndpointState::Init => Finding::ok(message),
        EndpointState::Degraded | EndpointState::Other(_) => Finding::warning(message)
            .mend("look at the endpoint in the workspace: it is not as it should be".to_owned()),
    }
}

/// The endpoint's own host, if `host` is not one of its names.
fn differs(host: &str, info: &EndpointInfo) -> Option<String> {
    // With or without a region, for writing or reading: the first label says whose it is.
    let label = |host: &str| {
        let label = host.split('.').next().unwrap_or_default();
        label.trim_end_matches("-ro").to_ascii_lowercase()
    };
    let known = [&info.host, &info.read_only_host];
    let own = info.host.as_ref().or(info.read_only_host.as_ref())?;
    let is_known = known
        .into_iter()
        .flatten()
        .any(|known| label(known) == label(host));
    (!is_known).then(|| own.clone())
}

async fn credential(
    chart: &mut Chart<'_>,
    examined: &Examined<'_>,
    target: Option<&Target>,
) -> Option<Credential> {
    let started = Instant::now();
    let minted = match (&examined.config.credential, examined.workspace, target) {
        (CredentialSource::Command(command), ..) => CredentialCommand(command.clone()).mint().await,
        (CredentialSource::Password(password), ..) => Password(password.clone()).mint().await,
        (CredentialSource::PasswordFile(path), ..) => PasswordFile(path.clone()).mint().await,
        (CredentialSource::Workspace, Some(workspace), Some(target)) => {
            CredentialMinter::new(workspace.clone(), target.clone())
                .mint()
                .await
        }
        (CredentialSource::Workspace, ..) => {
            chart.skip(&[step::CREDENTIAL], "no workspace to ask");
            return None;
        }
    };
    let now = examined.clock.now();
    let finding = match &minted {
        Ok(Minted { expires_at, .. }) => match expires_at {
            None => Finding::ok("does not expire"),
            Some(at) if *at <= now => Finding::failed("has expired already")
                .mend("check this machine's clock, and where the credential comes from".to_owned()),
            Some(at) => Finding::ok(format!("valid for {}", spoken(at.duration_since(now)))),
        },
        Err(MintError {
            message,
            detail,
            hint,
            ..
        }) => Finding::failed(message.clone())
            .detail(detail.clone())
            .mend(hint.clone()),
    };
    chart.note(step::CREDENTIAL, started, finding);
    let minted = minted.ok()?;
    Some(Credential {
        secret: minted.secret,
        expires_at: minted.expires_at,
        minted_at: now,
        generation: 1,
    })
}

async fn resolve(
    chart: &mut Chart<'_>,
    examined: &Examined<'_>,
    found: &Found,
) -> Option<Vec<SocketAddr>> {
    let started = Instant::now();
    let (host, port) = (found.host.as_str(), examined.config.port);
    let resolved = timeout(STEP_TIMEOUT, probe::resolve(host, port)).await;
    let (finding, addresses) = match resolved {
        Ok(Ok(addresses)) if is_ourselves(&addresses, &examined.config.listen.tcp) => {
            let finding = Finding::failed(format!("`{host}` with port {port} is this proxy itself"))
                .mend("set PGHOST and PGPORT to the endpoint; --address and --port are where the proxy listens".to_owned());
            (finding, None)
        }
        Ok(Ok(addresses)) => (
            Finding::ok(format!("{host} is {}", listed(&addresses))),
            Some(addresses),
        ),
        Ok(Err(failure)) => {
            let mend = "check PGHOST and this machine's name resolution; behind PrivateLink the private DNS zone must know the name";
            (
                Finding::failed(failure.to_string()).mend(mend.to_owned()),
                None,
            )
        }
        Err(_) => (
            Finding::failed(format!("the name server did not answer for `{host}`"))
                .mend("check this machine's name resolution (/etc/resolv.conf)".to_owned()),
            None,
        ),
    };
    chart.note(step::ENDPOINT_DNS, started, finding);
    addresses
}

fn is_ourselves(addresses: &[SocketAddr], listen: &[SocketAddr]) -> bool {
    let is_ours = |address: &SocketAddr, listen: &SocketAddr| {
        address.port() == listen.port()
            && (address == listen
                || (is_loopback(address.ip())
                    && (is_loopback(listen.ip()) || listen.ip().is_unspecified())))
    };
    addresses
        .iter()
        .any(|address| listen.iter().any(|listen| is_ours(address, listen)))
}

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

async fn enter(
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
        let attempt = attempt(
            examined,
            found,
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
    tell(chart, examined, found, attempt, woke).await;
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
        user: found.user.clone(),
        database: found.database.clone(),
        security,
    };
    Ok((endpoint, recorder))
}

async fn attempt(
    examined: &Examined<'_>,
    found: &Found,
    endpoint: &Endpoint,
    recorder: Option<&Recorder>,
    addresses: Vec<SocketAddr>,
    credential: Option<&Credential>,
) -> Attempt {
    let limit = examined.limits.server_connect_timeout;
    let mut attempt = Attempt::default();
    let started = Instant::now();
    let tcp = match bounded(limit, "dial", probe::connect(addresses)).await {
        Ok(tcp) => tcp,
        Err(failure) => {
            attempt.tcp = Some((started.elapsed(), Err(failure)));
            return attempt;
        }
    };
    attempt.tcp = Some((started.elapsed(), Ok(())));

    let started = Instant::now();
    let secured = bounded(limit, "TLS", probe::secure(tcp, endpoint, examined.metrics)).await;
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
        database: found.database.clone(),
        parameters: vec![(
            "application_name".to_owned(),
            "lakebase-proxy doctor".to_owned(),
        )],
        client_encoding: None,
        replication: false,
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
) {
    let (host, port) = (&found.host, examined.config.port);
    if let Some((took, tcp)) = attempt.tcp {
        let finding = match &tcp {
            Ok(()) => Finding::ok(format!("{host}:{port} takes connections")),
            Err(failure) => Finding::failed(failure.to_string()).mend(format!(
                "check PGHOST and PGPORT, and that a firewall lets this machine reach {host}:{port}"
            )),
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
        Finding::failed(format!("there is no Postgres role `{user}` on this branch"))
            .mend(create_role(user))
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
    let answer = bounded(limit, "query", session.query(GRANTS)).await;
    let finding = match &answer {
        Ok(rows) => of_grants(rows, found),
        Err(failure) => Finding::failed(failure.to_string()),
    };
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

fn of_grants(rows: &[probe::Row], found: &Found) -> Finding {
    let cell = |column: usize| rows.first()?.get(column)?.as_deref();
    let number = |column: usize| cell(column)?.parse::<u64>().ok();
    let (Some(tables), Some(readable)) = (number(3), number(4)) else {
        return Finding::failed("the server does not say what the role may do");
    };
    let creates = match cell(2) {
        Some("t") => "may create schemas",
        _ => "may not create schemas",
    };
    let message = format!("{creates}; reads {readable} of {tables} tables");
    match (tables, readable, cell(5)) {
        (1.., 0, Some(schema)) => {
            let (schema, user) = (identifier(schema), identifier(&found.user));
            Finding::warning(message).mend(format!(
                "as the tables' owner: GRANT USAGE ON SCHEMA {schema} TO {user}; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {user};"
            ))
        }
        _ => Finding::ok(message),
    }
}

/// The statements that make a role for OAuth logins.
fn create_role(user: &str) -> String {
    let kind = if user.contains('@') {
        "USER"
    } else {
        "SERVICE_PRINCIPAL"
    };
    format!(
        "on this branch, as its owner: CREATE EXTENSION IF NOT EXISTS databricks_auth; SELECT databricks_create_role('{}', '{kind}');",
        user.replace('\'', "''")
    )
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{doctor::report::Outcome, workspace::EndpointType};

    fn found() -> Found {
        Found {
            target: None,
            host: "localhost".to_owned(),
            user: "o'neil@example.com".to_owned(),
            database: "db".to_owned(),
            state: None,
        }
    }

    #[test]
    fn statements_are_quoted() {
        assert!(
            create_role("o'neil@example.com")
                .ends_with("databricks_create_role('o''neil@example.com', 'USER');")
        );
        assert!(create_role("0f7d-1").ends_with("'SERVICE_PRINCIPAL');"));
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
    }

    #[test]
    fn a_role_that_reads_nothing_is_told_what_to_ask_for() {
        let row = |cells: &[&str]| {
            vec![
                cells
                    .iter()
                    .map(|cell| Some((*cell).to_owned()))
                    .collect::<probe::Row>(),
            ]
        };
        let finding = of_grants(&row(&["me", "db", "f", "3", "0", "public"]), &found());
        assert_eq!(finding.outcome, Outcome::Warning);
        let mend = finding.mend.unwrap();
        assert!(
            mend.contains("GRANT USAGE ON SCHEMA \"public\" TO \"o'neil@example.com\";"),
            "{mend}"
        );
        assert_eq!(
            of_grants(&row(&["me", "db", "t", "3", "2", "x"]), &found()).outcome,
            Outcome::Ok
        );
        assert_eq!(
            of_grants(&row(&["me", "db", "t", "0", "0"]), &found()).outcome,
            Outcome::Ok
        );
        assert_eq!(of_grants(&[], &found()).outcome, Outcome::Failed);
    }

    #[test]
    fn another_endpoints_host_is_noticed() {
        let info = EndpointInfo {
            name: String::new(),
            host: Some("ep-a-1.database.us-east-1.cloud.databricks.com".to_owned()),
            read_only_host: None,
            state: EndpointState::Active,
            disabled: false,
            endpoint_type: EndpointType::ReadWrite,
            suspend_timeout: None,
        };
        for same in [
            "ep-a-1.database.cloud.databricks.com",
            "EP-a-1-ro.database.cloud.databricks.com",
        ] {
            assert_eq!(differs(same, &info), None, "{same}");
        }
        assert!(differs("ep-b-2.database.cloud.databricks.com", &info).is_some());
    }
}
