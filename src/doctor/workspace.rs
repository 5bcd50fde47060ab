//! The steps towards the workspace, from its clock to what it lets us do.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::ServerName;
use tokio::{
    net::{TcpStream, lookup_host},
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;
use url::Url;

use super::{
    certificates::Recorder,
    report::{Chart, Finding, spoken},
    settings::without_secrets,
    step,
};
use crate::{
    config::Roots,
    net::tls,
    telemetry::chain,
    workspace::{CallError, Profile, Workspace},
};

/// One step on the network.
const STEP_TIMEOUT: Duration = Duration::from_secs(10);
/// A difference between the clocks that is worth mending.
const NOTABLE_SKEW: SignedDuration = SignedDuration::from_mins(1);
/// What an entitlement to the API is called.
const WORKSPACE_ACCESS: &str = "workspace-access";

/// How far the workspace lets us.
#[derive(Debug, Default)]
pub(super) struct Access {
    /// Whether calls are worth trying.
    pub(super) can_call: bool,
    /// Who we are, if it said so.
    pub(super) profile: Option<Profile>,
}

/// Takes the steps.
pub(super) async fn check(
    chart: &mut Chart<'_>,
    workspace: &Workspace,
    variables: &[(String, String)],
) -> Access {
    clock(chart, workspace).await;
    if !reach(chart, workspace, variables).await {
        chart.skip(
            &[step::TOKEN, step::IDENTITY, step::ENTITLEMENT],
            "the workspace cannot be reached",
        );
        return Access::default();
    }
    if !token(chart, workspace).await {
        chart.skip(&[step::IDENTITY, step::ENTITLEMENT], "no workspace token");
        return Access::default();
    }
    identity(chart, workspace).await
}

async fn clock(chart: &mut Chart<'_>, workspace: &Workspace) {
    let started = Instant::now();
    let finding = match timeout(STEP_TIMEOUT, workspace.clock_skew()).await {
        Ok(Ok(skew)) if skew.abs() < NOTABLE_SKEW => {
            Finding::ok("this machine's clock agrees with the workspace's")
        }
        Ok(Ok(skew)) => {
            let way = if skew.is_negative() {
                "ahead of"
            } else {
                "behind"
            };
            Finding::warning(format!(
                "this machine's clock is {} {way} the workspace's",
                spoken(skew)
            ))
            .mend("set this machine's clock: `timedatectl set-ntp true`".to_owned())
        }
        // Why is for the steps below to find out.
        Ok(Err(_)) | Err(_) => Finding::skipped("the workspace did not tell its time"),
    };
    chart.note(step::CLOCK, started, finding);
}

/// Name, connection, certificate. Whether the workspace can be spoken to.
async fn reach(
    chart: &mut Chart<'_>,
    workspace: &Workspace,
    variables: &[(String, String)],
) -> bool {
    let names = &[step::DNS, step::TCP, step::WORKSPACE_TLS];
    // Made from a host, so it is an address with one.
    let url = Url::parse(&workspace.host().to_string()).ok();
    let target = url
        .as_ref()
        .and_then(|url| Some((url.host_str()?.to_owned(), url.port_or_known_default()?)));
    let (Some(url), Some((host, port))) = (url, target) else {
        chart.skip(names, "the workspace's address has no host");
        return false;
    };
    if !workspace.host().is_loopback()
        && let Some(proxy) = proxy(&host, variables)
    {
        let why = format!("calls go through the HTTP proxy {proxy}");
        chart.skip(names, &why);
        return true;
    }

    let started = Instant::now();
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    let addresses = match timeout(STEP_TIMEOUT, lookup_host((host.as_str(), port))).await {
        Ok(Ok(addresses)) => addresses.collect::<Vec<_>>(),
        Ok(Err(error)) => {
            let finding =
                Finding::failed(format!("the workspace's host `{host}` does not resolve"))
                    .detail(chain(&error).to_string())
                    .mend("check DATABRICKS_HOST and this machine's name resolution".to_owned());
            chart.note(step::DNS, started, finding);
            chart.skip(&names[1..], "the host does not resolve");
            return false;
        }
        Err(_) => {
            let finding = Finding::failed(format!("the name server did not answer for `{host}`"))
                .mend("check this machine's name resolution (/etc/resolv.conf)".to_owned());
            chart.note(step::DNS, started, finding);
            chart.skip(&names[1..], "the host does not resolve");
            return false;
        }
    };
    chart.note(
        step::DNS,
        started,
        Finding::ok(format!("{host} is {}", listed(&addresses))),
    );

    let started = Instant::now();
    let tcp = match timeout(STEP_TIMEOUT, connect_any(&addresses)).await {
        Ok(Ok(tcp)) => tcp,
        failed => {
            let detail = match failed {
                Ok(Err(error)) => chain(&error).to_string(),
                _ => "no answer in time".to_owned(),
            };
            let finding = Finding::failed(format!("cannot connect to {host}:{port}"))
                .detail(detail)
                .mend("check that a firewall lets this machine reach the workspace, or set HTTPS_PROXY".to_owned());
            chart.note(step::TCP, started, finding);
            chart.skip(&names[2..], "no connection");
            return false;
        }
    };
    chart.note(
        step::TCP,
        started,
        Finding::ok(format!("{host}:{port} takes connections")),
    );

    if url.scheme() == "http" {
        chart.skip(&names[2..], "plain HTTP on this machine");
        return true;
    }
    secure(chart, &host, tcp).await
}

async fn secure(chart: &mut Chart<'_>, host: &str, tcp: TcpStream) -> bool {
    let started = Instant::now();
    let prepared = tls::verifier(&Roots::System).and_then(|verifier| {
        let recorder = Recorder::new(verifier);
        let config = tls::client_config_with(Arc::clone(&recorder) as _, tls::ALPN_HTTP_1_1)?;
        Ok((recorder, config))
    });
    let (recorder, config) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            let finding = Finding::failed(error.to_string()).mend(
                "install the system's root certificates (Debian: apt install ca-certificates)"
                    .to_owned(),
            );
            chart.note(step::WORKSPACE_TLS, started, finding);
            return false;
        }
    };
    let Ok(name) = ServerName::try_from(host.to_owned()) else {
        let finding = Finding::failed(format!("`{host}` is not a host name"));
        chart.note(step::WORKSPACE_TLS, started, finding);
        return false;
    };
    let outcome = timeout(STEP_TIMEOUT, TlsConnector::from(config).connect(name, tcp)).await;
    let certificate = recorder.certificate();
    let (finding, is_well) = match outcome {
        Ok(Ok(_stream)) => {
            let shown = certificate.map(|shown| shown.to_string());
            (Finding::ok(shown.unwrap_or_default()), true)
        }
        Ok(Err(error)) => {
            let mend = match &certificate {
                Some(shown) => format!(
                    "if something inspects TLS here, install its root (`{}`) among the system's certificates; else check this machine's clock and DATABRICKS_HOST",
                    shown.authority
                ),
                None => {
                    "check DATABRICKS_HOST, and what stands between this machine and the workspace"
                        .to_owned()
                }
            };
            let finding = Finding::failed(format!("TLS failed: {}", chain(&error)))
                .detail(certificate.map(|shown| format!("shown was {shown}")))
                .mend(mend);
            (finding, false)
        }
        Err(_) => (
            Finding::failed("the workspace did not answer the TLS handshake in time")
                .mend("check DATABRICKS_HOST: what answers there may be no workspace".to_owned()),
            false,
        ),
    };
    chart.note(step::WORKSPACE_TLS, started, finding);
    is_well
}

async fn token(chart: &mut Chart<'_>, workspace: &Workspace) -> bool {
    let started = Instant::now();
    let (finding, is_well) = match workspace.token_facts().await {
        Ok(facts) => {
            let expiry = match facts.expires_at {
                Some(at) => format!("expires in {}", spoken(at.duration_since(Timestamp::now()))),
                None => "does not say when it expires".to_owned(),
            };
            let scopes = match &facts.scopes[..] {
                [] => String::new(),
                scopes => format!(", for {}", scopes.join(" ")),
            };
            let kind = facts.kind.label();
            (Finding::ok(format!("{kind}, {expiry}{scopes}")), true)
        }
        Err(error) => (of_call(&error), false),
    };
    chart.note(step::TOKEN, started, finding);
    is_well
}

async fn identity(chart: &mut Chart<'_>, workspace: &Workspace) -> Access {
    let started = Instant::now();
    let profile = match workspace.profile().await {
        Ok(profile) => profile,
        Err(error) => {
            if is_entitlement(&error) {
                chart.skip(&[step::IDENTITY], "the workspace's API is closed to us");
                chart.note(
                    step::ENTITLEMENT,
                    started,
                    no_entitlement(workspace, &error),
                );
                return Access::default();
            }
            chart.note(step::IDENTITY, started, of_call(&error));
            chart.skip(&[step::ENTITLEMENT], "we do not know who we are");
            return Access {
                // Not to be allowed to ask that is no reason not to be allowed anything.
                can_call: error.is_forbidden(),
                profile: None,
            };
        }
    };
    let of = profile
        .workspace_id
        .as_ref()
        .map(|id| format!(" in workspace {id}"))
        .unwrap_or_default();
    chart.note(
        step::IDENTITY,
        started,
        Finding::ok(format!("{}{of}", profile.user_name)),
    );
    let started = Instant::now();
    let has_it = profile
        .entitlements
        .iter()
        .any(|entitlement| entitlement == WORKSPACE_ACCESS);
    let finding = if has_it {
        "Workspace access is granted"
    } else {
        "Workspace access is not the identity's own, but the API answers"
    };
    chart.note(step::ENTITLEMENT, started, Finding::ok(finding));
    Access {
        can_call: true,
        profile: Some(profile),
    }
}

fn is_entitlement(error: &CallError) -> bool {
    error.detail.as_ref().is_some_and(|detail| {
        detail
            .to_ascii_lowercase()
            .contains("workspace-access entitlement")
    })
}

fn no_entitlement(workspace: &Workspace, error: &CallError) -> Finding {
    let grant = r#"--json '{"schemas":["urn:ietf:params:scim:api:messages:2.0:PatchOp"],"Operations":[{"op":"add","path":"entitlements","value":[{"value":"workspace-access"}]}]}'"#;
    let (who, kind) = match workspace.service_principal() {
        Some(id) => (format!("the service principal {id}"), "service-principals"),
        None => ("the identity".to_owned(), "users"),
    };
    Finding::failed(format!("{who} lacks the Workspace access entitlement"))
        .detail(error.detail.clone())
        .mend(format!(
            "an admin grants it: databricks {kind} patch <ID> {grant}"
        ))
}

/// A failed call in the words that every caller of it uses.
pub(super) fn of_call(error: &CallError) -> Finding {
    Finding::failed(error.message.clone())
        .detail(error.detail.clone())
        .mend(error.hint.clone())
}

/// The first address that takes a connection.
async fn connect_any(addresses: &[SocketAddr]) -> std::io::Result<TcpStream> {
    TcpStream::connect(addresses).await
}

pub(super) fn listed(addresses: &[SocketAddr]) -> String {
    let mut shown: Vec<String> = addresses
        .iter()
        .map(|address| address.ip().to_string())
        .collect();
    shown.dedup();
    let more = shown.len().saturating_sub(3);
    shown.truncate(3);
    let more = match more {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{}{more}", shown.join(", "))
}

/// The HTTP proxy that a call to this host goes through, by the usual variables.
fn proxy(host: &str, variables: &[(String, String)]) -> Option<String> {
    let get = |names: &[&str]| {
        variables
            .iter()
            .find(|(name, value)| names.contains(&name.as_str()) && !value.trim().is_empty())
            .map(|(_, value)| value.trim())
    };
    let proxy =
        get(&["HTTPS_PROXY", "https_proxy"]).or_else(|| get(&["ALL_PROXY", "all_proxy"]))?;
    let excepted = get(&["NO_PROXY", "no_proxy"]).unwrap_or_default();
    let is_excepted = excepted.split(',').map(str::trim).any(|pattern| {
        let pattern = pattern.trim_start_matches('.');
        pattern == "*"
            || (!pattern.is_empty()
                && host
                    .strip_suffix(pattern)
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
    });
    (!is_excepted).then(|| without_secrets(proxy))
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
