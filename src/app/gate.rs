//! One endpoint of the process: its listener, its look-up, its credential, its sessions.

use std::{net::SocketAddr, os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

use tokio::{task::JoinSet, time::sleep};

use super::{
    StartError,
    endpoints::{Endpoints, Served},
    locate::{Located, locate},
    shared::Shared,
    source::{Access, Own, Source},
};
use crate::{
    config::{EndpointConfig, TlsMode},
    credential::{CredentialCell, Refresher},
    listener::Listener,
    protocol::error::{Report, sqlstate},
    session::{Entrance, Policy},
    systemd::Notifier,
    telemetry::{chain, names::reason},
    tls::{Fingerprint, Roots},
    upstream::{Refusal, RouteFinder, Upstream, is_loopback},
};

/// Pauses between look-ups of an endpoint that could not be found while others serve.
const LOOK_UP_AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(5));

/// An endpoint with its listener bound.
pub(super) struct Gate {
    pub(super) served: Arc<Served>,
    pub(super) access: Access,
    pub(super) listener: Listener,
    pub(super) finder: RouteFinder,
    pub(super) look_up: LookUp,
}

/// Where the look-up of an endpoint stands.
pub(super) enum LookUp {
    /// It has not been tried.
    Open,
    /// It has failed once.
    Failed,
    /// It is done.
    Done(Box<Located>),
}

impl Gate {
    /// Looks up what is open. A failure is told to the clients of this endpoint until a later look-up succeeds.
    async fn look_up(&mut self, endpoints: &Endpoints) -> Result<(), StartError> {
        let config = &self.served.config;
        match attempt(config, &self.access, endpoints).await {
            Ok(located) => {
                self.look_up = LookUp::Done(Box::new(located));
                Ok(())
            }
            Err(error) => {
                self.finder.failed(refusal(config, &error));
                self.look_up = LookUp::Failed;
                Err(error)
            }
        }
    }

    /// Serves clients, until the endpoint is no longer named and the last of them has gone.
    pub(super) fn start(self, shared: &Arc<Shared>, notifier: &Notifier) {
        let served = Arc::clone(&self.served);
        let sessions = &served.sessions;
        announce(&served, &shared.policies.now());
        let Self {
            access,
            listener,
            finder,
            look_up,
            ..
        } = self;
        listener.spawn(sessions, &shared.workers, &shared.clients, &shared.helpers);
        let keeping = keep(
            Arc::clone(&served),
            access,
            finder,
            look_up,
            Arc::clone(shared),
        );
        shared.helpers.spawn(keeping);
        if notifier.is_connected() {
            let telling = tell(
                served.credentials.clone(),
                shared.endpoints.clone(),
                notifier.clone(),
            );
            shared
                .helpers
                .spawn(served.stop.clone().run_until_cancelled_owned(telling));
        }
        let leaving = {
            let shared = Arc::clone(shared);
            async move {
                let left = served.sessions.door.until_left();
                if served.stop.run_until_cancelled(left).await.is_some() {
                    served.stop.cancel();
                    shared.endpoints.remove(&served);
                    served.sessions.metrics.retire();
                    tracing::info!(
                        endpoint = served.config.called(),
                        "endpoint removed, its last session has gone"
                    );
                }
            }
        };
        shared.helpers.spawn(leaving);
    }
}

/// Tells the service manager of each new credential.
async fn tell(credentials: CredentialCell, endpoints: Endpoints, notifier: Notifier) {
    let mut status = credentials.subscribe();
    loop {
        notifier.status(&endpoints.summary());
        // The sender lives as long as `credentials`.
        if status.changed().await.is_err() {
            return;
        }
    }
}

/// Says where an endpoint listens, and what that means.
fn announce(served: &Served, policy: &Policy) {
    let endpoint = served.config.called();
    let max_connections = policy.max_connections;
    for address in &served.bound.tcp {
        tracing::info!(%address, endpoint, max_connections, "listening for Postgres clients");
    }
    for path in &served.bound.unix {
        let socket = path.display();
        tracing::info!(%socket, endpoint, max_connections, "listening for Postgres clients");
    }
    warn_of_exposure(served, &policy.entrance);
}

/// Says who else gets in where an endpoint listens.
pub(super) fn warn_of_exposure(served: &Served, entrance: &Entrance) {
    for address in &served.bound.tcp {
        if address.ip().to_canonical().is_loopback() {
            continue;
        }
        if entrance.password.is_none() {
            tracing::warn!(
                %address,
                "anyone who reaches this address is the Lakebase identity; hint: bind loopback unless that is meant, or ask for a password with --local-auth"
            );
        } else if entrance.encryption.is_none() {
            tracing::warn!(
                %address,
                "what clients of this address say can be read on the way; hint: offer them TLS with --client-tls"
            );
        }
    }
    for path in &served.bound.unix {
        let socket = path.display();
        let is_open = std::fs::metadata(path).is_ok_and(|it| it.permissions().mode() & 0o002 != 0);
        if is_open && entrance.allowed_uids.is_none() {
            tracing::warn!(
                %socket,
                "any user of this machine who reaches this socket is the Lakebase identity; hint: list the users with --unix-socket-allowed-uids"
            );
        }
    }
}

/// Finds the endpoint where that has not been done, and keeps its credential.
async fn keep(
    served: Arc<Served>,
    access: Access,
    finder: RouteFinder,
    look_up: LookUp,
    shared: Arc<Shared>,
) {
    let stop = served.stop.clone();
    let located = match look_up {
        LookUp::Done(located) => *located,
        LookUp::Open | LookUp::Failed => {
            let is_first = matches!(look_up, LookUp::Open);
            let found = find(
                &served.config,
                &access,
                &shared.endpoints,
                &finder,
                is_first,
            );
            let Some(located) = stop.run_until_cancelled(found).await else {
                return;
            };
            located
        }
    };
    let metrics = Arc::clone(&served.sessions.metrics);
    let credentials = served.credentials.clone();
    let route = Upstream::new(located.endpoint, credentials.clone(), Arc::clone(&metrics));
    let endpoint = route.endpoint();
    tracing::info!(
        endpoint = %endpoint.label,
        host = endpoint.host,
        user = endpoint.user,
        database = endpoint.database,
        "endpoint found"
    );
    finder.found(Arc::new(route));
    drop((endpoint, served));
    if let Source::Own(Own::PasswordFile(file)) = &located.source {
        let watching = file.clone().watch(credentials.clone(), stop.clone());
        shared.helpers.spawn(watching);
    }
    drop(shared);
    Refresher::new(located.source, credentials, metrics)
        .run(stop)
        .await;
}

/// Looks all endpoints up at a time. One that cannot be found does not stop the others; if none can, the first one's
/// failure is returned.
pub(super) async fn look_up(
    gates: Vec<Gate>,
    endpoints: &Endpoints,
) -> Result<Vec<Gate>, StartError> {
    let total = gates.len();
    let mut looking = JoinSet::new();
    for (index, mut gate) in gates.into_iter().enumerate() {
        let endpoints = endpoints.clone();
        looking.spawn(async move {
            let result = gate.look_up(&endpoints).await;
            (index, gate, result)
        });
    }
    let mut done = looking.join_all().await;
    done.sort_by_key(|(index, ..)| *index);
    let failed = done.iter().filter(|(.., result)| result.is_err()).count();
    let mut gates = Vec::with_capacity(total);
    for (_, gate, result) in done {
        match result {
            Err(error) if failed == total => return Err(error),
            Err(error) => not_found(&gate.served.config, &error),
            Ok(()) => {}
        }
        gates.push(gate);
    }
    Ok(gates)
}

/// What the roots of an endpoint hold now.
pub(super) fn roots(config: &EndpointConfig) -> Option<Fingerprint> {
    match &config.tls {
        TlsMode::Disabled => None,
        TlsMode::Verified(roots) => roots.fingerprint(),
    }
}

/// Whether its certificate is verified by a file of roots.
pub(super) fn has_roots_of_its_own(config: &EndpointConfig) -> bool {
    matches!(&config.tls, TlsMode::Verified(Roots::File(_)))
}

fn not_found(config: &EndpointConfig, error: &StartError) {
    tracing::error!(
        endpoint = config.called(),
        error = %chain(error),
        hint = error.hint(),
        "endpoint cannot be used for now; the others serve"
    );
}

async fn attempt(
    config: &EndpointConfig,
    access: &Access,
    endpoints: &Endpoints,
) -> Result<Located, StartError> {
    let located = locate(config, access).await?;
    refuse_loop(&located, endpoints).await?;
    Ok(located)
}

/// Looks up, ever more slowly, until the endpoint is found.
async fn find(
    config: &EndpointConfig,
    access: &Access,
    endpoints: &Endpoints,
    finder: &RouteFinder,
    mut is_first: bool,
) -> Located {
    let (mut pause, longest) = LOOK_UP_AGAIN;
    loop {
        if !is_first {
            sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
            pause = (pause * 2).min(longest);
        }
        match attempt(config, access, endpoints).await {
            Ok(located) => return located,
            Err(error) => {
                if is_first {
                    not_found(config, &error);
                }
                finder.failed(refusal(config, &error));
            }
        }
        is_first = false;
    }
}

fn refusal(config: &EndpointConfig, error: &StartError) -> Refusal {
    let mut report = Report::new(
        sqlstate::CANNOT_CONNECT,
        format!(
            "Lakebase endpoint `{}` cannot be used: {}",
            config.called(),
            chain(error)
        ),
    );
    report.hint = error.hint();
    Refusal {
        report,
        reason: if error.may_heal() {
            reason::WAKING
        } else {
            reason::OTHER
        },
    }
}

/// A proxy that dials itself would take every connection it makes for a client's.
async fn refuse_loop(located: &Located, endpoints: &Endpoints) -> Result<(), StartError> {
    let endpoint = &located.endpoint;
    let ours = endpoints.addresses();
    if !ours.iter().any(|ours| ours.port() == endpoint.port) {
        return Ok(());
    }
    // A name that does not resolve now may later, and then not to us: that is for the login to find out.
    let resolved = match endpoint.addresses.as_fixed() {
        Some(fixed) => fixed.to_vec(),
        None => tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port))
            .await
            .map(Iterator::collect)
            .unwrap_or_default(),
    };
    let is_ours = |address: SocketAddr| {
        ours.iter().any(|ours| {
            let same_machine =
                is_loopback(address.ip()) && (is_loopback(ours.ip()) || ours.ip().is_unspecified());
            address.port() == ours.port() && (address.ip() == ours.ip() || same_machine)
        })
    };
    if resolved.into_iter().any(is_ours) {
        return Err(StartError::Loop {
            host: endpoint.host.clone(),
            port: endpoint.port,
        });
    }
    Ok(())
}
