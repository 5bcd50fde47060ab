//! Checks of one endpoint before a connection: the workspace's information, a credential, and addresses.

use std::{net::SocketAddr, time::Duration};

use jiff::SignedDuration;

use super::{
    check::{Finding, Need},
    grants::{create_role, identifier},
    report::spoken,
    workspace::{Access, listed, resolve},
};
use crate::{
    clock::Clock,
    config::{CredentialSource, EndpointConfig, PoolSettings, Timeouts},
    credential::{self, Credential},
    net::tcp::leads_to,
    telemetry::Metrics,
    workspace::{
        AppDatabases, CredentialMinter, EndpointInfo, EndpointState, HostName, LocateError,
        Located, Target, Workspace,
    },
};

/// An endpoint to check, with everything that the checks use.
pub(super) struct Examined<'a> {
    pub(super) config: &'a EndpointConfig,
    pub(super) timeouts: Timeouts,
    pub(super) pool: PoolSettings,
    pub(super) access: &'a Access<'a>,
    pub(super) clock: &'a Clock,
    pub(super) metrics: &'a Metrics,
    pub(super) connect: bool,
    /// Whether the settings are valid; otherwise nothing is dialed.
    pub(super) is_usable: bool,
}

/// The endpoint, located.
pub(super) struct Found<'a> {
    pub(super) examined: &'a Examined<'a>,
    /// The object of its credentials in the workspace; none for an endpoint with a credential of its own.
    pub(super) target: Option<(&'a Workspace, Target)>,
    pub(super) host: String,
    pub(super) user: String,
    pub(super) database: String,
    state: Option<EndpointState>,
}

impl Examined<'_> {
    pub(super) async fn locate(&self) -> Result<(Found<'_>, Finding), Finding> {
        let config = self.config;
        if !matches!(config.credential, CredentialSource::Workspace) {
            let finding = Finding::skipped("the workspace does not mint its credential");
            let (Some(host), Some(user)) = (config.host.clone(), config.user.clone()) else {
                return Err(finding);
            };
            let found = Found {
                examined: self,
                target: None,
                host,
                user,
                database: config.database_or_default().to_owned(),
                state: None,
            };
            return Ok((found, finding));
        }
        let Some(workspace) = self.access.workspace else {
            return Err(Finding::skipped("the workspace cannot be called"));
        };
        // Without the host, so that a wrong name shows.
        let without_host = EndpointConfig {
            host: config.host.clone().filter(|_| config.name.is_none()),
            ..config.clone()
        };
        // Zero disables retries: a check reports the first error.
        let (located, finding) = match workspace.locate(&without_host, Duration::ZERO).await {
            Ok(located) => {
                let finding = of_state(&located, config.host.as_deref());
                (located, finding)
            }
            // An identity that may not look the endpoint up can still log in at a known host.
            Err(error)
                if config.host.is_some()
                    && (matches!(error, LocateError::NoHost { .. }) || error.is_forbidden()) =>
            {
                let located = workspace.locate(config, Duration::ZERO).await?;
                let target = &located.target;
                let message =
                    format!("`{target}`; the identity may not look it up, PGHOST holds its host");
                (located, Finding::ok(message))
            }
            Err(error) => return Err(error.into()),
        };
        let host = match &config.host {
            None => located.host,
            // As in the proxy, PGHOST may be the read-write host.
            Some(host) if config.read_only => host
                .parse::<HostName>()
                .map_or_else(|_| host.clone(), |host| host.read_only().to_string()),
            Some(host) => host.clone(),
        };
        let database = located.database;
        let found = Found {
            examined: self,
            target: Some((workspace, located.target)),
            host,
            user: located.user,
            database: database.unwrap_or_else(|| config.database_or_default().to_owned()),
            state: located.info.map(|info| info.state),
        };
        Ok((found, finding))
    }
}

impl Found<'_> {
    pub(super) async fn credential(&self) -> Result<(Credential, Finding), Finding> {
        let own = credential::of_settings(&self.examined.config.credential);
        let minted = match (own, &self.target) {
            (Some(own), _) => own.mint().await?,
            (None, Some((workspace, target))) => {
                let minter = CredentialMinter::new((*workspace).clone(), target.clone());
                minter.request_credential().await?
            }
            (None, None) => return Err(Finding::skipped("no workspace")),
        };
        let now = self.examined.clock.now();
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

    pub(super) async fn resolve(&self) -> Result<(Vec<SocketAddr>, Finding), Finding> {
        let config = self.examined.config;
        let (host, port) = (self.host.as_str(), config.port);
        let fixed = config.host_addresses.iter();
        let fixed = fixed.map(|address| SocketAddr::new(*address, port));
        let (addresses, source) = if config.host_addresses.is_empty() {
            let fix = "check PGHOST and this machine's name resolution; behind PrivateLink the private DNS zone must have the name";
            (resolve(host, port, fix).await?, "")
        } else {
            (fixed.collect(), " (PGHOSTADDR or `host_address`)")
        };
        let is_ours = |address: &SocketAddr| {
            let mut listeners = config.listen.tcp.iter();
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

    /// Fails with the reason if the endpoint must not be dialed.
    pub(super) fn may_dial(&self) -> Need<()> {
        // A server of another provider, which takes a password, is not known to sleep.
        let name = self.host.parse::<HostName>();
        let is_elsewhere = self.target.is_none() && name.is_ok_and(|host| !host.is_lakebase());
        Err(match self.state {
            _ if !self.examined.is_usable => "the settings cannot be used",
            _ if self.examined.connect || is_elsewhere => return Ok(()),
            // Awake already.
            Some(EndpointState::Active | EndpointState::Degraded) => return Ok(()),
            Some(EndpointState::Idle) => "asleep: --connect wakes it and goes on",
            _ => "it may be asleep: --connect goes on all the same",
        }
        .to_owned())
    }

    /// The role, by the workspace's list; `None` if the list is not available.
    pub(super) async fn role(&self) -> Option<Finding> {
        let Some((workspace, Target::Endpoint(endpoint))) = &self.target else {
            return None;
        };
        let user = &self.user;
        let missing = format!("there is no Postgres role `{user}` on this branch");
        let roles = workspace.roles(endpoint).await.ok()?;
        let role = roles.iter().find(|role| role.name == *user);
        Some(match (role, self.mismatch()) {
            // A role for another name would not fit our credential either.
            (None, Some(fix)) => {
                Finding::failed(format!("{missing}, and `{user}` is not who we are")).fix(fix)
            }
            (None, None) => Finding::failed(missing).fix(create_role(user)),
            (Some(role), _) if !role.is_oauth => {
                let message = format!("the role `{user}` was not made for OAuth logins");
                let (role, create) = (identifier(user), create_role(user));
                let fix = format!("as the role's owner: DROP ROLE {role}; {create}");
                Finding::failed(message).fix(fix)
            }
            (Some(_), Some(fix)) => {
                let message = format!("the login is as `{user}`, which is not who we are");
                Finding::warning(message).fix(fix)
            }
            (Some(_), None) => Finding::ok(format!(
                "the workspace lists the role `{user}`; its grants were not tried"
            )),
        })
    }

    /// The fix where the login's user is neither our identity nor one of its groups.
    pub(super) fn mismatch(&self) -> Option<String> {
        let profile = self.examined.access.profile.as_ref()?;
        let ours = &profile.user_name;
        let is_ours = *ours == self.user || profile.groups.contains(&self.user);
        (!is_ours).then(|| format!("unset PGUSER, or set it to `{ours}`, whose credential this is"))
    }
}

impl From<LocateError> for Finding {
    fn from(error: LocateError) -> Self {
        let finding = Self::failed(error.to_string()).hint(error.hint());
        match error {
            LocateError::Call { source, .. } => Self {
                message: format!("{}: {source}", finding.message),
                ..finding.detail(source.detail)
            },
            LocateError::NotFound {
                source: Some(source),
                ..
            } => finding.detail(source.detail),
            _ => finding,
        }
    }
}

fn of_state(located: &Located, host: Option<&str>) -> Finding {
    let name = &located.target;
    let databases = located.app_databases.as_ref();
    let databases = databases.map(|known| format!("{known}; {}", AppDatabases::HINT));
    let Some(info) = &located.info else {
        return Finding::ok(format!("`{name}`")).detail(databases);
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
        EndpointState::Active | EndpointState::Idle | EndpointState::Init => {
            Finding::ok(message).detail(databases)
        }
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
