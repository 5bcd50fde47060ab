//! The steps towards one endpoint: what the workspace says of it, a credential for it, and whether the way in may be gone
//! without waking it.

use std::{net::SocketAddr, time::Duration};

use jiff::SignedDuration;
use tokio::time::{Instant, timeout};

use super::{
    entry::enter,
    grants::{create_role, identifier},
    report::{Chart, Finding, Outcome, spoken},
    step,
    workspace::{Access, listed},
};
use crate::{
    clock::Clock,
    config::{CredentialSource, EndpointConfig, Timeouts},
    credential::{self, Credential, MintError, Minted},
    net::tcp::is_loopback,
    telemetry::Metrics,
    upstream::probe,
    workspace::{
        AppDatabases, CredentialMinter, EndpointInfo, EndpointState, HostName, LocateError,
        Located, Target, Wanted, Workspace,
    },
};

/// One step on the network.
pub(super) const STEP_TIMEOUT: Duration = Duration::from_secs(10);

/// One endpoint and what is needed to look at it.
pub(super) struct Examined<'a> {
    pub(super) config: &'a EndpointConfig,
    pub(super) limits: Timeouts,
    pub(super) workspace: Option<&'a Workspace>,
    pub(super) access: &'a Access,
    pub(super) clock: &'a Clock,
    pub(super) metrics: &'a Metrics,
    pub(super) connect: bool,
    /// Whether the settings make sense; if not, nothing is dialled.
    pub(super) is_usable: bool,
}

/// Where it is and how it is doing.
pub(super) struct Found {
    pub(super) target: Option<Target>,
    pub(super) host: String,
    pub(super) user: String,
    pub(super) database: String,
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
    pub(super) async fn role(&self, found: &Found) -> Option<Finding> {
        let (Some(workspace), Some(Target::Endpoint(endpoint))) = (self.workspace, &found.target)
        else {
            return None;
        };
        let roles = workspace.roles(endpoint).await.ok()?;
        let Some(role) = roles.iter().find(|role| role.name == found.user) else {
            return Some(self.missing_role(found));
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

    /// There is no such role. One for somebody else's name would refuse our credential as well.
    pub(super) fn missing_role(&self, found: &Found) -> Finding {
        let user = &found.user;
        let missing = format!("there is no Postgres role `{user}` on this branch");
        match self.mismatch(found) {
            Some(mend) => {
                Finding::failed(format!("{missing}, and `{user}` is not who we are")).mend(mend)
            }
            None => Finding::failed(missing).mend(create_role(user)),
        }
    }

    /// What to do when the login's user is neither us nor a group of ours.
    pub(super) fn mismatch(&self, found: &Found) -> Option<String> {
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
            let mut finding = state_of(&located, config.host.as_deref());
            if let (Outcome::Ok, Some(databases)) = (finding.outcome, &located.app_databases) {
                finding = finding.detail(format!("{databases}; {}", AppDatabases::HINT));
            }
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
    let own = credential::of_settings(&examined.config.credential);
    let minted = match (own, examined.workspace, target) {
        (Some(own), ..) => own.mint().await,
        (None, Some(workspace), Some(target)) => {
            CredentialMinter::new(workspace.clone(), target.clone())
                .mint()
                .await
        }
        (None, ..) => {
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
    let fixed: Vec<SocketAddr> = examined
        .config
        .host_addresses
        .iter()
        .map(|address| SocketAddr::new(*address, port))
        .collect();
    let resolved = if fixed.is_empty() {
        timeout(STEP_TIMEOUT, probe::resolve(host, port)).await
    } else {
        Ok(Ok(fixed.clone()))
    };
    let (finding, addresses) = match resolved {
        Ok(Ok(addresses)) if is_ourselves(&addresses, &examined.config.listen.tcp) => {
            let finding = Finding::failed(format!("`{host}` with port {port} is this proxy itself"))
                .mend("set PGHOST and PGPORT to the endpoint; --address and --port are where the proxy listens".to_owned());
            (finding, None)
        }
        Ok(Ok(addresses)) if !fixed.is_empty() => (
            Finding::ok(format!(
                "{host} is dialed at {}, as PGHOSTADDR or `host_address` asks",
                listed(&addresses)
            )),
            Some(addresses),
        ),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::EndpointType;

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
