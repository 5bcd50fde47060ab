//! One endpoint of the process: its listener, its look-up, its credential, its sessions.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::sleep;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    StartError,
    locate::{Located, locate},
    source::{Access, Own, Source},
};
use crate::{
    config::EndpointConfig,
    credential::{CredentialCell, Refresher},
    listener::Listener,
    protocol::error::{Report, sqlstate},
    session::Sessions,
    telemetry::{chain, names::reason},
    upstream::{Refusal, RouteFinder, Upstream, is_loopback},
};

/// Pauses between look-ups of an endpoint that could not be found while others serve.
const LOOK_UP_AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(5));

/// An endpoint with its listener bound.
pub(super) struct Gate {
    pub(super) config: EndpointConfig,
    pub(super) access: Access,
    pub(super) listener: Listener,
    pub(super) sessions: Arc<Sessions>,
    pub(super) credentials: CredentialCell,
    pub(super) finder: RouteFinder,
    pub(super) located: Option<Located>,
    pub(super) surroundings: Surroundings,
}

/// What a gate needs of the rest of the program.
#[derive(Clone)]
pub(super) struct Surroundings {
    /// Every address this process listens on.
    pub(super) ours: Arc<[SocketAddr]>,
}

impl Gate {
    /// Looks up what is open. A failure is told to the clients of this endpoint until a later look-up succeeds.
    pub(super) async fn look_up(&mut self) -> Result<(), StartError> {
        match attempt(&self.config, &self.access, &self.surroundings.ours).await {
            Ok(located) => {
                self.located = Some(located);
                Ok(())
            }
            Err(error) => {
                self.finder.failed(refusal(&self.config, &error));
                Err(error)
            }
        }
    }

    /// Serves clients on `clients`, and everything else on `helpers`.
    pub(super) fn start(
        self,
        clients: &TaskTracker,
        helpers: &TaskTracker,
        stop: &CancellationToken,
    ) {
        let Self {
            config,
            access,
            listener,
            sessions,
            credentials,
            finder,
            located,
            surroundings,
        } = self;
        listener.spawn(&sessions, clients, helpers);
        let (stop, tracker, metrics) =
            (stop.clone(), helpers.clone(), Arc::clone(&sessions.metrics));
        let serving = async move {
            let located = match located {
                Some(located) => located,
                None => {
                    let found = find(&config, &access, &surroundings.ours, &finder);
                    let Some(located) = stop.run_until_cancelled(found).await else {
                        return;
                    };
                    located
                }
            };
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
            if let Source::Own(Own::PasswordFile(file)) = &located.source {
                tracker.spawn(file.clone().watch(credentials.clone(), stop.clone()));
            }
            Refresher::new(located.source, credentials, metrics)
                .run(stop)
                .await;
        };
        helpers.spawn(serving);
    }
}

async fn attempt(
    config: &EndpointConfig,
    access: &Access,
    ours: &[SocketAddr],
) -> Result<Located, StartError> {
    let located = locate(config, access).await?;
    refuse_loop(&located, ours).await?;
    Ok(located)
}

/// Looks up again, ever more slowly, until the endpoint is found.
async fn find(
    config: &EndpointConfig,
    access: &Access,
    ours: &[SocketAddr],
    finder: &RouteFinder,
) -> Located {
    let (mut pause, longest) = LOOK_UP_AGAIN;
    loop {
        sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(longest);
        match attempt(config, access, ours).await {
            Ok(located) => return located,
            Err(error) => finder.failed(refusal(config, &error)),
        }
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
async fn refuse_loop(located: &Located, ours: &[SocketAddr]) -> Result<(), StartError> {
    let endpoint = &located.endpoint;
    if !ours.iter().any(|ours| ours.port() == endpoint.port) {
        return Ok(());
    }
    // A name that does not resolve now may later, and then not to us: that is for the login to find out.
    let resolved = tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port)).await;
    let is_ours = |address: SocketAddr| {
        ours.iter().any(|ours| {
            let same_machine =
                is_loopback(address.ip()) && (is_loopback(ours.ip()) || ours.ip().is_unspecified());
            address.port() == ours.port() && (address.ip() == ours.ip() || same_machine)
        })
    };
    if resolved.is_ok_and(|mut addresses| addresses.any(is_ours)) {
        return Err(StartError::Loop {
            host: endpoint.host.clone(),
            port: endpoint.port,
        });
    }
    Ok(())
}
