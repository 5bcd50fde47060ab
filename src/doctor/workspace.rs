//! Checks of the way to the workspace, from its clock to the identity's access.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::ServerName;
use tokio::{
    net::{TcpStream, lookup_host},
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;
use url::{Host, Url};

use super::{
    certificates::Recorder,
    report::{Finding, Steps, spoken},
    settings::without_secrets,
    step,
};
use crate::{
    config::Roots,
    net::tls,
    telemetry::chain,
    workspace::{CallError, Profile, Workspace},
};

/// For one step on the network.
pub(super) const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// A smaller difference between the clocks does no harm.
const NOTABLE_SKEW: SignedDuration = SignedDuration::from_mins(1);
/// The entitlement to use the API.
const WORKSPACE_ACCESS: &str = "workspace-access";

/// The identity's access to the workspace.
#[derive(Debug, Default)]
pub(super) struct Access {
    /// Whether further calls can work.
    pub(super) can_call: bool,
    pub(super) profile: Option<Profile>,
}

pub(super) async fn check(
    steps: &mut Steps<'_>,
    workspace: &Workspace,
    variables: &[(String, String)],
) -> Access {
    // First: a wrong clock makes certificates and tokens invalid, which the later checks would report.
    steps.check(step::CLOCK, clock(workspace)).await;
    if reach(steps, workspace, variables).await.is_none() {
        steps.skip_rest(step::OF_WORKSPACE, "the workspace cannot be reached");
        return Access::default();
    }
    if steps.check(step::TOKEN, token(workspace)).await.is_none() {
        steps.skip_rest(step::OF_WORKSPACE, "no workspace token");
        return Access::default();
    }
    identity(steps, workspace).await
}

async fn clock(workspace: &Workspace) -> Result<((), Finding), Finding> {
    // The steps below find the cause of a failure.
    let Ok(Ok(skew)) = timeout(STEP_TIMEOUT, workspace.clock_skew()).await else {
        return Err(Finding::skipped("the workspace did not send its time"));
    };
    if skew.abs() < NOTABLE_SKEW {
        let finding = Finding::ok("this machine's clock agrees with the workspace's");
        return Ok(((), finding));
    }
    let direction = if skew.is_negative() {
        "ahead of"
    } else {
        "behind"
    };
    let message = format!(
        "this machine's clock is {} {direction} the workspace's",
        spoken(skew)
    );
    let fix = "set this machine's clock: `timedatectl set-ntp true`";
    Err(Finding::warning(message).fix(fix))
}

/// Name, connection and certificate.
async fn reach(
    steps: &mut Steps<'_>,
    workspace: &Workspace,
    variables: &[(String, String)],
) -> Option<()> {
    // Made from a host, so both are there.
    let url = Url::parse(&workspace.host().to_string()).ok()?;
    let port = url.port_or_known_default()?;
    let host = match url.host()? {
        Host::Domain(name) => name.to_owned(),
        Host::Ipv4(address) => address.to_string(),
        // Without the brackets of a URL, which name resolution does not accept.
        Host::Ipv6(address) => address.to_string(),
    };
    // A direct connection would prove nothing: calls use the proxy.
    // Except to loopback, where calls are always direct.
    if !workspace.host().is_loopback()
        && let Some(proxy) = proxy(&host, variables)
    {
        let why = format!("calls go through the HTTP proxy {proxy}");
        steps.skip(&[step::DNS, step::TCP, step::WORKSPACE_TLS], &why);
        return Some(());
    }
    let addresses = steps.check(step::DNS, resolve(&host, port)).await?;
    let tcp = steps
        .check(step::TCP, connect(&host, port, &addresses))
        .await?;
    if url.scheme() == "http" {
        steps.skip(&[step::WORKSPACE_TLS], "plain HTTP on this machine");
        return Some(());
    }
    steps.check(step::WORKSPACE_TLS, secure(host, tcp)).await
}

async fn resolve(host: &str, port: u16) -> Result<(Vec<SocketAddr>, Finding), Finding> {
    match timeout(STEP_TIMEOUT, lookup_host((host, port))).await {
        Ok(Ok(addresses)) => {
            let addresses: Vec<_> = addresses.collect();
            let finding = Finding::ok(format!("{host} is {}", listed(&addresses)));
            Ok((addresses, finding))
        }
        Ok(Err(error)) => Err(Finding::failed(format!(
            "the workspace's host `{host}` does not resolve"
        ))
        .detail(chain(&error).to_string())
        .fix("check DATABRICKS_HOST and this machine's name resolution")),
        Err(_) => Err(no_name_server(host)),
    }
}

pub(super) fn no_name_server(host: &str) -> Finding {
    Finding::failed(format!("the name server did not answer for `{host}`"))
        .fix("check this machine's name resolution (/etc/resolv.conf)")
}

async fn connect(
    host: &str,
    port: u16,
    addresses: &[SocketAddr],
) -> Result<(TcpStream, Finding), Finding> {
    let detail = match timeout(STEP_TIMEOUT, TcpStream::connect(addresses)).await {
        Ok(Ok(tcp)) => {
            let finding = Finding::ok(format!("{host}:{port} takes connections"));
            return Ok((tcp, finding));
        }
        Ok(Err(error)) => chain(&error).to_string(),
        Err(_) => "no answer in time".to_owned(),
    };
    Err(Finding::failed(format!("cannot connect to {host}:{port}"))
        .detail(detail)
        .fix("check that a firewall lets this machine reach the workspace, or set HTTPS_PROXY"))
}

async fn secure(host: String, tcp: TcpStream) -> Result<((), Finding), Finding> {
    let verifier = tls::verifier(&Roots::System).map_err(|error| no_roots(&error))?;
    let recorder = Recorder::new(verifier);
    let config = tls::client_config_with(Arc::clone(&recorder) as _, tls::ALPN_HTTP_1_1);
    let connector = TlsConnector::from(config.map_err(|error| no_roots(&error))?);
    let name = ServerName::try_from(host.clone())
        .map_err(|_| Finding::failed(format!("`{host}` is not a host name")))?;
    let result = timeout(STEP_TIMEOUT, connector.connect(name, tcp)).await;
    let certificate = recorder.certificate();
    match result {
        Ok(Ok(_)) => {
            let shown = certificate.map(|shown| shown.to_string());
            Ok(((), Finding::ok(shown.unwrap_or_default())))
        }
        Ok(Err(error)) => {
            let fix = match &certificate {
                Some(shown) => format!(
                    "if something inspects TLS here, install its root (`{}`) among the system's certificates; else check this machine's clock and DATABRICKS_HOST",
                    shown.authority
                ),
                None => {
                    "check DATABRICKS_HOST, and what stands between this machine and the workspace"
                        .to_owned()
                }
            };
            Err(Finding::failed(format!("TLS failed: {}", chain(&error)))
                .detail(certificate.map(|shown| format!("the server sent {shown}")))
                .fix(fix))
        }
        Err(_) => Err(
            Finding::failed("the workspace did not answer the TLS handshake in time")
                .fix("check DATABRICKS_HOST: another server may answer there"),
        ),
    }
}

/// The finding where the system's roots cannot be used.
pub(super) fn no_roots(error: &tls::TlsError) -> Finding {
    Finding::failed(error.to_string())
        .fix("install the system's root certificates (Debian: apt install ca-certificates)")
}

async fn token(workspace: &Workspace) -> Result<((), Finding), Finding> {
    let facts = workspace
        .token_facts()
        .await
        .map_err(|error| of_call(&error))?;
    let expiry = match facts.expires_at {
        Some(at) => format!("expires in {}", spoken(at.duration_since(Timestamp::now()))),
        None => "without a known expiry".to_owned(),
    };
    let scopes = match &facts.scopes[..] {
        [] => String::new(),
        scopes => format!(", for {}", scopes.join(" ")),
    };
    let message = format!("{}, {expiry}{scopes}", facts.kind.label());
    Ok(((), Finding::ok(message)))
}

async fn identity(steps: &mut Steps<'_>, workspace: &Workspace) -> Access {
    let started = Instant::now();
    let profile = match workspace.profile().await {
        Ok(profile) => profile,
        Err(error) if is_entitlement(&error) => {
            steps.skip(
                &[step::IDENTITY],
                "the identity may not use the workspace's API",
            );
            let finding = no_entitlement(workspace, &error);
            steps.note(step::ENTITLEMENT, started.elapsed(), finding);
            return Access::default();
        }
        Err(error) => {
            steps.note(step::IDENTITY, started.elapsed(), of_call(&error));
            steps.skip(&[step::ENTITLEMENT], "the identity is unknown");
            return Access {
                // Other calls may be allowed even if this one is not.
                can_call: error.is_forbidden(),
                profile: None,
            };
        }
    };
    let workspace_id = profile.workspace_id.as_ref();
    let place = workspace_id.map_or(String::new(), |id| format!(" in workspace {id}"));
    let finding = Finding::ok(format!("{}{place}", profile.user_name));
    steps.note(step::IDENTITY, started.elapsed(), finding);
    let is_own = profile
        .entitlements
        .iter()
        .any(|name| name == WORKSPACE_ACCESS);
    let finding = Finding::ok(if is_own {
        "Workspace access is granted"
    } else {
        "Workspace access is not the identity's own, but the API answers"
    });
    // By the same call, whose time is noted above.
    steps.note(step::ENTITLEMENT, Duration::ZERO, finding);
    Access {
        can_call: true,
        profile: Some(profile),
    }
}

fn is_entitlement(error: &CallError) -> bool {
    let detail = error.detail.as_deref().unwrap_or_default();
    detail
        .to_ascii_lowercase()
        .contains("workspace-access entitlement")
}

fn no_entitlement(workspace: &Workspace, error: &CallError) -> Finding {
    let grant = r#"--json '{"schemas":["urn:ietf:params:scim:api:messages:2.0:PatchOp"],"Operations":[{"op":"add","path":"entitlements","value":[{"value":"workspace-access"}]}]}'"#;
    let (who, kind) = match workspace.service_principal() {
        Some(id) => (format!("the service principal {id}"), "service-principals"),
        None => ("the identity".to_owned(), "users"),
    };
    Finding::failed(format!("{who} lacks the Workspace access entitlement"))
        .detail(error.detail.clone())
        .fix(format!(
            "an admin grants it: databricks {kind} patch <ID> {grant}"
        ))
}

fn of_call(error: &CallError) -> Finding {
    Finding::failed(error.message.clone())
        .detail(error.detail.clone())
        .hint(error.hint.clone())
}

pub(super) fn listed(addresses: &[SocketAddr]) -> String {
    let mut shown: Vec<String> = addresses
        .iter()
        .map(|address| address.ip().to_string())
        .collect();
    shown.dedup();
    let more = shown.len().saturating_sub(3);
    shown.truncate(3);
    let shown = shown.join(", ");
    if more == 0 {
        shown
    } else {
        format!("{shown} and {more} more")
    }
}

/// The HTTP proxy for calls to this host, by the usual variables.
fn proxy(host: &str, variables: &[(String, String)]) -> Option<String> {
    let get = |names: [&str; 2]| {
        let mut set = variables
            .iter()
            .filter(|(_, value)| !value.trim().is_empty());
        let found = set.find(|(name, _)| names.contains(&name.as_str()));
        found.map(|(_, value)| value.trim())
    };
    let proxy = get(["HTTPS_PROXY", "https_proxy"]).or_else(|| get(["ALL_PROXY", "all_proxy"]))?;
    let exceptions = get(["NO_PROXY", "no_proxy"]).unwrap_or_default();
    let is_exception = exceptions.split(',').map(str::trim).any(|pattern| {
        let pattern = pattern.trim_start_matches('.');
        pattern == "*"
            || (!pattern.is_empty()
                && host
                    .strip_suffix(pattern)
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
    });
    (!is_exception).then(|| without_secrets(proxy))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy_for(host: &str, pairs: &[(&str, &str)]) -> Option<String> {
        let variables: Vec<_> = pairs
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        proxy(host, &variables)
    }

    #[test]
    fn a_proxy_is_named_without_its_password() {
        let set = ("HTTPS_PROXY", "http://me:hunter2@proxy.example:3128");
        let host = "dbc-1.cloud.databricks.com";
        assert_eq!(
            proxy_for(host, &[set]).as_deref(),
            Some("http://proxy.example:3128/")
        );
        assert_eq!(proxy_for(host, &[]), None);
        for excepted in ["*", ".databricks.com", "other, cloud.databricks.com", host] {
            assert_eq!(proxy_for(host, &[set, ("NO_PROXY", excepted)]), None);
        }
        assert!(proxy_for(host, &[set, ("NO_PROXY", "bricks.com")]).is_some());
    }
}
