//! Checks of one endpoint before a connection: the workspace's information, a credential, and addresses.

use std::{net::SocketAddr, time::Duration};

use jiff::SignedDuration;
use tokio::time::timeout;

use super::{
    grants::{create_role, identifier},
    report::{Finding, Outcome, Steps, spoken},
    step,
    workspace::{Access, STEP_TIMEOUT, listed, no_name_server},
};
use crate::{
    clock::Clock,
    config::{CredentialSource, EndpointConfig, Timeouts},
    credential::{self, Credential},
    net::tcp::leads_to,
    telemetry::Metrics,
    upstream::probe,
    workspace::{
        AppDatabases, CredentialMinter, EndpointInfo, EndpointState, HostName, LocateError,
        Located, Target, Wanted, Workspace,
    },
};

/// An endpoint to check, with everything that the checks use.
pub(super) struct Examined<'a> {
    pub(super) config: &'a EndpointConfig,
    pub(super) timeouts: Timeouts,
    pub(super) workspace: Option<&'a Workspace>,
    pub(super) access: &'a Access,
    pub(super) clock: &'a Clock,
    pub(super) metrics: &'a Metrics,
    pub(super) connect: bool,
    /// Whether the settings are valid; otherwise nothing is dialed.
    pub(super) is_usable: bool,
}

/// The endpoint, located.
pub(super) struct Found {
    pub(super) target: Option<Target>,
    pub(super) host: String,
    pub(super) user: String,
    pub(super) database: String,
    state: Option<EndpointState>,
}

/// An endpoint whose checks so far allow a connection.
pub(super) struct Ready {
    pub(super) found: Found,
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) credential: Option<Credential>,
}

/// Checks everything before a connection; `None` if that must not or cannot be made.
pub(super) async fn check(steps: &mut Steps<'_>, examined: &Examined<'_>) -> Option<Ready> {
    let Some(found) = locate(steps, examined).await else {
        steps.skip_rest(step::OF_ENDPOINT, "the endpoint is unknown");
        return None;
    };
    let credential = match (&examined.config.credential, examined.workspace) {
        (CredentialSource::Workspace, None) => {
            steps.skip(&[step::CREDENTIAL], "no workspace");
            None
        }
        _ => {
            steps
                .check(step::CREDENTIAL, examined.credential(&found))
                .await
        }
    };
    let addresses = steps
        .check(step::ENDPOINT_DNS, examined.resolve(&found))
        .await;
    // Names are resolved even if nothing may be dialed: that wakes nothing.
    let Some(addresses) = addresses else {
        steps.skip_rest(step::OF_ENDPOINT, "the endpoint's host cannot be used");
        return None;
    };
    if let Some(why) = examined.reason_not_to_dial(&found) {
        steps.skip(&[step::ENDPOINT_TCP, step::EDGE_TLS, step::LOGIN], why);
        // The workspace lists the roles without a connection to the endpoint.
        let role = async {
            let finding = examined.role(&found).await;
            Err::<((), Finding), _>(finding.unwrap_or_else(|| Finding::skipped(why)))
        };
        steps.check(step::GRANTS, role).await;
        steps.skip_rest(step::OF_ENDPOINT, why);
        return None;
    }
    Some(Ready {
        found,
        addresses,
        credential,
    })
}

async fn locate(steps: &mut Steps<'_>, examined: &Examined<'_>) -> Option<Found> {
    let config = examined.config;
    if !matches!(config.credential, CredentialSource::Workspace) {
        steps.skip(
            &[step::ENDPOINT],
            "the workspace does not mint its credential",
        );
        return Some(Found {
            target: None,
            host: config.host.clone()?,
            user: config.user.clone()?,
            database: config.database_or_default().to_owned(),
            state: None,
        });
    }
    let Some(workspace) = examined.workspace.filter(|_| examined.access.can_call) else {
        steps.skip(&[step::ENDPOINT], "the workspace cannot be called");
        return None;
    };
    let located = steps
        .check(step::ENDPOINT, examined.locate(workspace))
        .await?;
    let host = match &config.host {
        None => located.host,
        // As in the proxy, PGHOST may be the read-write host.
        Some(host) if config.read_only => host
            .parse::<HostName>()
            .map_or_else(|_| host.clone(), |host| host.read_only().to_string()),
        Some(host) => host.clone(),
    };
    let database = located.database;
    Some(Found {
        target: Some(located.target),
        host,
        user: located.user,
        database: database.unwrap_or_else(|| config.database_or_default().to_owned()),
        state: located.info.map(|info| info.state),
    })
}

impl Examined<'_> {
    async fn locate(&self, workspace: &Workspace) -> Result<(Located, Finding), Finding> {
        let config = self.config;
        let wanted = Wanted::from(config);
        // Without the host, so that a wrong name shows.
        let without_host = Wanted {
            host: wanted.host.clone().filter(|_| wanted.name.is_none()),
            ..wanted.clone()
        };
        // Zero disables retries: a check reports the first error.
        let error = match workspace.locate(&without_host, Duration::ZERO).await {
            Ok(located) => {
                let mut finding = of_state(&located, config.host.as_deref());
                if let (Outcome::Ok, Some(databases)) = (finding.outcome, &located.app_databases) {
                    finding = finding.detail(format!("{databases}; {}", AppDatabases::HINT));
                }
                return Ok((located, finding));
            }
            Err(error) => error,
        };
        // An identity that may not look the endpoint up can still log in at a known host.
        let host_suffices = matches!(error, LocateError::NoHost { .. }) || error.is_forbidden();
        if !host_suffices || wanted.host.is_none() {
            return Err(of_locate(&error));
        }
        let located = workspace.locate(&wanted, Duration::ZERO).await;
        let located = located.map_err(|error| of_locate(&error))?;
        let message = format!(
            "`{}`; the identity may not look it up, PGHOST holds its host",
            located.target
        );
        Ok((located, Finding::ok(message)))
    }

    async fn credential(&self, found: &Found) -> Result<(Credential, Finding), Finding> {
        let own = credential::of_settings(&self.config.credential);
        let minted = match (own, self.workspace, &found.target) {
            (Some(own), ..) => own.mint().await,
            (None, Some(workspace), Some(target)) => {
                let minter = CredentialMinter::new(workspace.clone(), target.clone());
                minter.request_credential().await
            }
            (None, ..) => return Err(Finding::skipped("no workspace")),
        };
        let minted = minted.map_err(|error| {
            let finding = Finding::failed(error.message).detail(error.detail);
            finding.hint(error.hint)
        })?;
        let now = self.clock.now();
        let finding = match minted.expires_at {
            None => Finding::ok("does not expire"),
            Some(at) if at <= now => Finding::failed("has expired already")
                .fix("check this machine's clock, and the source of the credential"),
            Some(at) => Finding::ok(format!("valid for {}", spoken(at.duration_since(now)))),
        };
        let credential = Credential {
            secret: minted.secret,
            expires_at: minted.expires_at,
            minted_at: now,
            generation: 1,
        };
        Ok((credential, finding))
    }

    async fn resolve(&self, found: &Found) -> Result<(Vec<SocketAddr>, Finding), Finding> {
        let (host, port) = (found.host.as_str(), self.config.port);
        let fixed = self.config.host_addresses.iter();
        let fixed: Vec<_> = fixed
            .map(|address| SocketAddr::new(*address, port))
            .collect();
        let (addresses, source) = if fixed.is_empty() {
            let resolved = timeout(STEP_TIMEOUT, probe::resolve(host, port)).await;
            let addresses = resolved.map_err(|_| no_name_server(host))?.map_err(|failure| {
                let fix = "check PGHOST and this machine's name resolution; behind PrivateLink the private DNS zone must have the name";
                Finding::failed(failure.to_string()).fix(fix)
            })?;
            (addresses, "")
        } else {
            (fixed, " (PGHOSTADDR or `host_address`)")
        };
        let is_ours = |address: &SocketAddr| {
            let mut listeners = self.config.listen.tcp.iter();
            listeners.any(|listener| leads_to(*address, *listener))
        };
        // Each connection to it would open another.
        if addresses.iter().any(is_ours) {
            let message = format!("`{host}` with port {port} is this proxy itself");
            let fix = "set PGHOST and PGPORT to the endpoint; --address and --port are where the proxy listens";
            return Err(Finding::failed(message).fix(fix));
        }
        let finding = Finding::ok(format!("{host} is {}{source}", listed(&addresses)));
        Ok((addresses, finding))
    }

    /// Why the endpoint must not be dialed, if so.
    fn reason_not_to_dial(&self, found: &Found) -> Option<&'static str> {
        // A server of another provider, which takes a password, is not known to sleep.
        let is_elsewhere = found.target.is_none()
            && found
                .host
                .parse::<HostName>()
                .is_ok_and(|host| !host.is_lakebase());
        match found.state {
            _ if !self.is_usable => Some("the settings cannot be used"),
            _ if self.connect || is_elsewhere => None,
            // Awake already.
            Some(EndpointState::Active | EndpointState::Degraded) => None,
            Some(EndpointState::Idle) => Some("asleep: --connect wakes it and goes on"),
            _ => Some("it may be asleep: --connect goes on all the same"),
        }
    }

    /// The role, by the workspace's list; `None` if the list is not available.
    pub(super) async fn role(&self, found: &Found) -> Option<Finding> {
        let (Some(workspace), Some(Target::Endpoint(endpoint))) = (self.workspace, &found.target)
        else {
            return None;
        };
        let user = &found.user;
        let roles = workspace.roles(endpoint).await.ok()?;
        let Some(role) = roles.iter().find(|role| role.name == *user) else {
            return Some(self.missing_role(found));
        };
        Some(match self.mismatch(found) {
            _ if !role.is_oauth => {
                let fix = format!(
                    "as the role's owner: DROP ROLE {}; {}",
                    identifier(user),
                    create_role(user)
                );
                Finding::failed(format!("the role `{user}` was not made for OAuth logins")).fix(fix)
            }
            Some(fix) => {
                let message = format!("the login is as `{user}`, which is not who we are");
                Finding::warning(message).fix(fix)
            }
            None => Finding::ok(format!(
                "the workspace lists the role `{user}`; its grants were not tried"
            )),
        })
    }

    /// The finding where the role does not exist. A role for another name would not fit our credential either.
    pub(super) fn missing_role(&self, found: &Found) -> Finding {
        let user = &found.user;
        let missing = format!("there is no Postgres role `{user}` on this branch");
        match self.mismatch(found) {
            Some(fix) => {
                Finding::failed(format!("{missing}, and `{user}` is not who we are")).fix(fix)
            }
            None => Finding::failed(missing).fix(create_role(user)),
        }
    }

    /// The fix where the login's user is neither our identity nor one of its groups.
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

fn of_locate(error: &LocateError) -> Finding {
    let (message, detail) = match error {
        LocateError::Call { source, .. } => (format!("{error}: {source}"), source.detail.clone()),
        LocateError::NotFound {
            source: Some(source),
            ..
        } => (error.to_string(), source.detail.clone()),
        _ => (error.to_string(), None),
    };
    Finding::failed(message).detail(detail).hint(error.hint())
}

fn of_state(located: &Located, host: Option<&str>) -> Finding {
    let name = &located.target;
    let Some(info) = &located.info else {
        return Finding::ok(format!("`{name}`"));
    };
    if let Some(host) = host
        && let Some(own) = other_host(host, info)
    {
        let message = format!("PGHOST is `{host}`, but `{name}` answers on `{own}`");
        let fix = "unset PGHOST to have the host looked up, or correct it";
        return Finding::warning(message).fix(fix);
    }
    let suspends = match info.suspend_timeout.map(SignedDuration::try_from) {
        Some(Ok(after)) => format!(", sleeps after {}", spoken(after)),
        Some(Err(_)) | None => String::new(),
    };
    let message = format!("`{name}` is {}{suspends}", info.state);
    match &info.state {
        EndpointState::Active | EndpointState::Idle | EndpointState::Init => Finding::ok(message),
        EndpointState::Degraded | EndpointState::Other(_) => Finding::warning(message)
            .fix("look at the endpoint in the workspace: it is not as it should be"),
    }
}

/// The endpoint's own host, if `host` is not one of its names.
fn other_host(host: &str, info: &EndpointInfo) -> Option<String> {
    // With or without a region, for writing or reading: the first label identifies the endpoint.
    let label = |host: &str| {
        let label = host.split('.').next().unwrap_or_default();
        label.trim_end_matches("-ro").to_ascii_lowercase()
    };
    let mut hosts = [&info.host, &info.read_only_host].into_iter().flatten();
    let own = hosts.clone().next()?;
    let is_its_own = hosts.any(|known| label(known) == label(host));
    (!is_its_own).then(|| own.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_endpoints_host_is_noticed() {
        let info = EndpointInfo {
            host: Some("ep-a-1.database.us-east-1.cloud.databricks.com".to_owned()),
            ..EndpointInfo::default()
        };
        for same in [
            "ep-a-1.database.cloud.databricks.com",
            "EP-a-1-ro.database.cloud.databricks.com",
        ] {
            assert_eq!(other_host(same, &info), None, "{same}");
        }
        assert!(other_host("ep-b-2.database.cloud.databricks.com", &info).is_some());
    }
}
