//! Checks of the way to the workspace, from its clock to the identity's access.

use std::{net::SocketAddr, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::ServerName;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;
use url::Url;

use super::{
    certificates::Recorder,
    check::{Finding, Need, Steps},
    report::spoken,
    settings::without_secrets,
};
use crate::{
    config::Roots,
    net::tls,
    telemetry::chain,
    upstream::probe,
    workspace::{CallError, Profile, Workspace},
};

/// For one step on the network.
pub(super) const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// A smaller difference between the clocks does no harm.
const NOTABLE_SKEW: SignedDuration = SignedDuration::from_mins(1);
/// The entitlement to use the API.
const WORKSPACE_ACCESS: &str = "workspace-access";
const UNREACHABLE: &str = "the workspace cannot be reached";

/// The identity's access to the workspace.
pub(super) struct Access<'a> {
    /// The workspace, if further calls can work.
    pub(super) workspace: Option<&'a Workspace>,
    pub(super) profile: Option<Profile>,
}

pub(super) async fn check<'a>(
    steps: &mut Steps<'_>,
    workspace: Result<&'a Workspace, &String>,
    variables: &[(String, String)],
) -> Access<'a> {
    // First: a wrong clock makes certificates and tokens invalid, which the later checks would report.
    steps.run("clock", workspace, clock).await;
    let reached = reach(steps, workspace, variables).await;
    let reached = reached.and(workspace.map_err(Clone::clone));
    let authenticated = steps
        .check("workspace token", reached, "no workspace token", token)
        .await;
    let profile = steps.check("who am I", authenticated, "", who_am_i).await;
    // By the same call, whose time is that of the check above.
    steps
        .run("entitlement", profile.as_ref(), entitlement)
        .await;
    let can_call = profile.as_ref().is_ok_and(|(_, profile)| match profile {
        Ok(_) => true,
        // Other calls may be allowed even if this one is not.
        Err(error) => error.is_forbidden() && !is_entitlement(error),
    });
    Access {
        workspace: workspace.ok().filter(|_| can_call),
        profile: profile.ok().and_then(|(_, profile)| profile.ok()),
    }
}

async fn clock(workspace: &Workspace) -> Result<Finding, Finding> {
    // The steps below find the cause of a failure.
    let Ok(Ok(skew)) = timeout(STEP_TIMEOUT, workspace.clock_skew()).await else {
        return Ok(Finding::skipped("the workspace did not send its time"));
    };
    if skew.abs() < NOTABLE_SKEW {
        let message = "this machine's clock agrees with the workspace's";
        return Ok(Finding::ok(message));
    }
    let direction = if skew.is_negative() {
        "ahead of"
    } else {
        "behind"
    };
    let skew = spoken(skew);
    let message = format!("this machine's clock is {skew} {direction} the workspace's");
    Ok(Finding::warning(message).fix("set this machine's clock: `timedatectl set-ntp true`"))
}

/// Name, connection and certificate.
async fn reach(
    steps: &mut Steps<'_>,
    workspace: Result<&Workspace, &String>,
    variables: &[(String, String)],
) -> Need<()> {
    let url = workspace.map_err(Clone::clone).and_then(|workspace| {
        let url = Url::parse(&workspace.host().to_string());
        url.map_err(|error| error.to_string())
    });
    let known = url.as_ref().ok();
    // Without the brackets of an IPv6 address in a URL, which name resolution does not accept.
    let host = known.and_then(Url::host_str).unwrap_or_default();
    let host = host.trim_matches(['[', ']']);
    let port = known
        .and_then(Url::port_or_known_default)
        .unwrap_or_default();
    // A direct connection would prove nothing: calls use the proxy. Except to loopback, where calls are always direct.
    let is_remote = workspace.is_ok_and(|workspace| !workspace.host().is_loopback());
    let proxy = proxy(host, variables).filter(|_| is_remote);
    let direct = match &proxy {
        Some(proxy) => Err(format!("calls go through the HTTP proxy {proxy}")),
        None => url.as_ref().map_err(Clone::clone),
    };
    let resolve = async |_| {
        let fix = "check DATABRICKS_HOST and this machine's name resolution";
        let addresses = resolve(host, port, fix).await?;
        let finding = Finding::ok(format!("{host} is {}", listed(&addresses)));
        Ok((addresses, finding))
    };
    let addresses = steps.check("DNS", direct, UNREACHABLE, resolve).await;
    let connect = async |addresses| connect(host, port, addresses).await;
    let tcp = steps.check("TCP", addresses, UNREACHABLE, connect).await;
    let secure = async |tcp| match known.map(Url::scheme) {
        Some("http") => Ok(((), Finding::skipped("plain HTTP on this machine"))),
        _ => Ok(((), secure(host, tcp).await?)),
    };
    let tls = steps.check("workspace TLS", tcp, UNREACHABLE, secure).await;
    if proxy.is_some() { Ok(()) } else { tls }
}

/// The addresses of a host.
pub(super) async fn resolve(host: &str, port: u16, fix: &str) -> Result<Vec<SocketAddr>, Finding> {
    match timeout(STEP_TIMEOUT, probe::resolve(host, port)).await {
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err(failure)) => Err(Finding::failed(failure.to_string()).fix(fix)),
        Err(_) => Err(
            Finding::failed(format!("the name server did not answer for `{host}`"))
                .fix("check this machine's name resolution (/etc/resolv.conf)"),
        ),
    }
}

async fn connect(
    host: &str,
    port: u16,
    addresses: Vec<SocketAddr>,
) -> Result<(TcpStream, Finding), Finding> {
    let detail = match timeout(STEP_TIMEOUT, probe::connect(addresses)).await {
        Ok(Ok(tcp)) => {
            let finding = Finding::ok(format!("{host}:{port} takes connections"));
            return Ok((tcp, finding));
        }
        Ok(Err(failure)) => failure.to_string(),
        Err(_) => "no answer in time".to_owned(),
    };
    Err(Finding::failed(format!("cannot connect to {host}:{port}"))
        .detail(detail)
        .fix("check that a firewall lets this machine reach the workspace, or set HTTPS_PROXY"))
}

async fn secure(host: &str, tcp: TcpStream) -> Result<Finding, Finding> {
    let (config, recorder) = Recorder::client_config(&Roots::System, tls::ALPN_HTTP_1_1)?;
    let name = ServerName::try_from(host.to_owned())
        .map_err(|_| Finding::failed(format!("`{host}` is not a host name")))?;
    let connecting = TlsConnector::from(config).connect(name, tcp);
    let result = timeout(STEP_TIMEOUT, connecting).await;
    let shown = recorder.certificate();
    match result {
        Ok(Ok(_)) => {
            let shown = shown.map(|shown| shown.to_string());
            Ok(Finding::ok(shown.unwrap_or_default()))
        }
        Ok(Err(error)) => {
            let fix = match &shown {
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
                .detail(shown.map(|shown| format!("the server sent {shown}")))
                .fix(fix))
        }
        Err(_) => Err(
            Finding::failed("the workspace did not answer the TLS handshake in time")
                .fix("check DATABRICKS_HOST: another server may answer there"),
        ),
    }
}

async fn token(workspace: &Workspace) -> Result<(&Workspace, Finding), Finding> {
    let facts = workspace.token_facts().await?;
    let expiry = match facts.expires_at {
        Some(at) => format!("expires in {}", spoken(at.duration_since(Timestamp::now()))),
        None => "without a known expiry".to_owned(),
    };
    let scopes = match &facts.scopes[..] {
        [] => String::new(),
        scopes => format!(", for {}", scopes.join(" ")),
    };
    let message = format!("{}, {expiry}{scopes}", facts.kind.label());
    Ok((workspace, Finding::ok(message)))
}

type Identity<'a> = (&'a Workspace, Result<Profile, CallError>);

async fn who_am_i(workspace: &Workspace) -> Result<(Identity<'_>, Finding), Finding> {
    let profile = workspace.profile().await;
    let finding = match &profile {
        Ok(profile) => {
            let workspace_id = profile.workspace_id.as_ref();
            let place = workspace_id.map_or(String::new(), |id| format!(" in workspace {id}"));
            Finding::ok(format!("{}{place}", profile.user_name))
        }
        Err(error) if is_entitlement(error) => {
            Finding::skipped("the identity may not use the workspace's API")
        }
        Err(error) => error.clone().into(),
    };
    Ok(((workspace, profile), finding))
}

async fn entitlement((workspace, profile): &Identity<'_>) -> Result<Finding, Finding> {
    let error = match profile {
        Ok(profile) => {
            let mut own = profile.entitlements.iter();
            return Ok(Finding::ok(if own.any(|name| name == WORKSPACE_ACCESS) {
                "Workspace access is granted"
            } else {
                "Workspace access is not the identity's own, but the API answers"
            }));
        }
        Err(error) if is_entitlement(error) => error,
        Err(_) => return Ok(Finding::skipped("the identity is unknown")),
    };
    let grant = r#"--json '{"schemas":["urn:ietf:params:scim:api:messages:2.0:PatchOp"],"Operations":[{"op":"add","path":"entitlements","value":[{"value":"workspace-access"}]}]}'"#;
    let (who, kind) = match workspace.service_principal() {
        Some(id) => (format!("the service principal {id}"), "service-principals"),
        None => ("the identity".to_owned(), "users"),
    };
    let message = format!("{who} lacks the Workspace access entitlement");
    let fix = format!("an admin grants it: databricks {kind} patch <ID> {grant}");
    Err(Finding::failed(message)
        .detail(error.detail.clone())
        .fix(fix))
}

fn is_entitlement(error: &CallError) -> bool {
    let detail = error.detail.as_deref().unwrap_or_default();
    let detail = detail.to_ascii_lowercase();
    detail.contains("workspace-access entitlement")
}

/// The first addresses, and the number of the others.
pub(super) fn listed(addresses: &[SocketAddr]) -> String {
    let addresses = addresses.iter().map(|address| address.ip().to_string());
    let mut shown: Vec<String> = addresses.collect();
    shown.dedup();
    let more = shown.len().saturating_sub(3);
    shown.truncate(3);
    let shown = shown.join(", ");
    match more {
        0 => shown,
        _ => format!("{shown} and {more} more"),
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
        let rest = host.strip_suffix(pattern).filter(|_| !pattern.is_empty());
        pattern == "*" || rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
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
