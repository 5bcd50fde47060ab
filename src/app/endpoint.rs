//! An endpoint that the process serves: its listener, its tasks and its state, until its last session has ended.

use std::{net::SocketAddr, sync::Arc};

use arc_swap::ArcSwap;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{EndpointConfig, PoolMode, TlsMode},
    credential::{CallError, CredentialCell},
    listener::{self, Bound},
    net::{
        blocking,
        tcp::is_loopback,
        tls::{self, Fingerprint},
    },
    session::{AccessPolicy, EndpointContext, SessionConfig},
    status::{
        CredentialSnapshot, EndpointSnapshot, RefreshAttempt, RefreshError, UpstreamSnapshot,
    },
    upstream::Security,
};

/// The running state of one endpoint.
pub struct Served {
    /// Its configuration.
    pub config: EndpointConfig,
    /// The addresses that its clients connect to.
    pub bound: Bound,
    /// The context of its sessions.
    pub(crate) context: Arc<EndpointContext>,
    /// Its credential.
    pub credentials: CredentialCell,
    /// The fingerprint of the roots in use.
    pub(super) roots: ArcSwap<Option<Fingerprint>>,
    /// Ends its background tasks.
    pub(super) stop: CancellationToken,
    /// The tasks that hold its listening sockets.
    pub(super) accepting: TaskTracker,
}

impl Served {
    /// Whether it has been removed from the settings and serves its last sessions.
    pub(super) fn is_draining(&self) -> bool {
        self.context.registry.is_draining()
    }

    /// Logs its addresses, with warnings about exposed ones.
    pub(super) fn announce(&self, session_config: &SessionConfig) {
        let endpoint = self.config.display_name();
        let max_connections = session_config.max_connections;
        for address in &self.bound.tcp {
            tracing::info!(%address, endpoint, max_connections, "listening for Postgres clients");
        }
        for path in &self.bound.unix {
            let socket = path.display();
            tracing::info!(%socket, endpoint, max_connections, "listening for Postgres clients");
        }
        let pools = &self.context.pools;
        if pools.mode() != PoolMode::None {
            let pool = pools.settings();
            tracing::info!(
                endpoint,
                mode = pools.mode().as_str(),
                connections = pool.max_size(),
                fleet = pool.fleet_size,
                "clients share server connections, at most so many for each database"
            );
        }
        self.warn_of_exposure(&session_config.access);
    }

    /// Warns about addresses that other users or machines reach without authentication.
    pub(super) fn warn_of_exposure(&self, access: &AccessPolicy) {
        for address in &self.bound.tcp {
            if is_loopback(address.ip()) {
                continue;
            }
            if access.password.is_none() {
                tracing::warn!(
                    %address,
                    "anyone who reaches this address is the Lakebase identity; hint: bind loopback unless that is intended, or require a password with --local-auth"
                );
            } else if access.certificate.is_none() {
                tracing::warn!(
                    %address,
                    "connections to this address are not encrypted; hint: offer TLS with --client-tls"
                );
            }
        }
        for path in &self.bound.unix {
            let socket = path.display();
            if listener::is_open_to_all(path) && access.allowed_uids.is_none() {
                tracing::warn!(
                    %socket,
                    "any user of this machine who reaches this socket is the Lakebase identity; hint: list the users with --unix-socket-allowed-uids"
                );
            }
        }
    }

    pub(super) async fn remove_when_drained(self: Arc<Self>, endpoints: Endpoints) {
        let drained = async {
            self.context.registry.drained().await;
            // A reload finds it here as long as it holds its addresses, and waits for their release.
            self.accepting.wait().await;
        };
        // `None` at the end of the process, which removes no endpoint.
        if self.stop.run_until_cancelled(drained).await.is_some() {
            self.stop.cancel();
            endpoints.remove(&self);
            self.context.metrics.retire();
            tracing::info!(
                endpoint = self.config.display_name(),
                "endpoint removed after its last session ended"
            );
        }
    }

    /// The reason why there is no credential as `: reason`; empty if it is not known.
    fn why_not_ready(&self) -> String {
        let error = self.credentials.status().last_error;
        let why = error.map(|error| error.to_string());
        // Before the endpoint is found no credential is requested; the look-up has the reason.
        why.or_else(|| Some(self.context.route.problem()?.report.message))
            .map_or_else(String::new, |why| format!(": {why}"))
    }

    /// The name in the status page and the console.
    pub(super) fn shown_name(&self) -> String {
        let read_only = if self.config.read_only {
            " (read-only)"
        } else {
            ""
        };
        format!("{}{read_only}", self.config.display_name())
    }

    pub(super) fn snapshot(&self) -> EndpointSnapshot {
        let status = self.credentials.status();
        let upstream = self.context.route.found().map(|upstream| {
            let endpoint = upstream.endpoint();
            UpstreamSnapshot {
                host: endpoint.host.clone(),
                port: endpoint.port,
                user: endpoint.user.clone(),
                database: endpoint.database.clone(),
                is_encrypted: matches!(endpoint.security, Security::Tls { .. }),
                missing_databases: upstream.missing_databases(),
            }
        });
        let attempts = self.credentials.attempts().into_iter();
        let attempts = attempts.map(|attempt| RefreshAttempt {
            at: attempt.at,
            took: attempt.took,
            outcome: attempt.outcome.map_err(|error| refresh_error(&error)),
        });
        EndpointSnapshot {
            name: self.shown_name(),
            listening: self.bound.to_strings(),
            sessions: self.context.registry.clone(),
            metrics: Arc::clone(&self.context.metrics),
            pool_mode: self.context.pools.mode(),
            pool_settings: self.context.pools.settings(),
            is_paused: self.context.pools.is_paused(),
            statements: self.context.pools.statements(),
            pools: self.context.pools.snapshot(),
            upstream,
            credential: CredentialSnapshot {
                source: self.config.credential.label(),
                state: status.state,
                generation: status.generation,
                minted_at: status.minted_at,
                due_at: status.due_at(),
                urgent_at: status.urgent_at(),
                expires_at: status.expires_at,
                next_attempt: status.next_attempt,
                last_error: status.last_error.as_deref().map(refresh_error),
                attempts: attempts.collect(),
            },
        }
    }
}

fn refresh_error(error: &CallError) -> RefreshError {
    RefreshError {
        kind: error.kind.into(),
        message: error.message.clone(),
        detail: error.detail.clone(),
        hint: error.hint.clone(),
    }
}

/// The fingerprint of the trusted roots; the system's have none, as they are read at the start only.
pub(super) async fn roots(config: &EndpointConfig) -> Option<Fingerprint> {
    match config.tls.clone() {
        TlsMode::Disabled => None,
        TlsMode::Verified(roots) => blocking(move || tls::fingerprint(&roots)).await,
    }
}

/// The endpoints in the order of the settings; cheap to clone. A removed one is among them until its last session ends.
#[derive(Clone, Default)]
pub struct Endpoints(watch::Sender<Arc<Vec<Arc<Served>>>>);

impl Endpoints {
    /// The endpoints now.
    pub fn now(&self) -> Arc<Vec<Arc<Served>>> {
        Arc::clone(&self.0.borrow())
    }

    /// Changes with the list, and with the result of each endpoint's discovery.
    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<Vec<Arc<Served>>>> {
        self.0.subscribe()
    }

    /// Reports a result of discovery to subscribers.
    pub(super) fn notify(&self) {
        self.0.send_modify(|_| {});
    }

    /// Fails if no endpoint has a valid credential.
    pub(super) fn any_ready(&self) -> Result<(), String> {
        let mut why = String::new();
        for served in &*self.now() {
            // One suffices: a pod that is not ready gets no traffic, not even for its other endpoints.
            if served.credentials.status().is_ready() {
                return Ok(());
            }
            if why.is_empty() {
                why = served.why_not_ready();
            }
        }
        Err(format!("no valid database credential{why}"))
    }

    /// Every TCP address that accepts Postgres clients.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let now = self.now();
        let addresses = now.iter().flat_map(|served| served.bound.tcp.iter());
        addresses.copied().collect()
    }

    /// A status line for the service manager.
    pub(super) fn summary(&self) -> String {
        let now = self.now();
        let count = match now.len() {
            1 => String::new(),
            count => format!("{count} endpoints, "),
        };
        let mut next_expiry = None;
        for served in now.iter() {
            let status = served.credentials.status();
            if !status.is_ready() {
                let why = served.why_not_ready();
                return format!("serving; {count}no valid database credential{why}");
            }
            next_expiry = next_expiry.into_iter().chain(status.expires_at).min();
        }
        match next_expiry {
            Some(at) => format!("serving; {count}database credential valid until {at:.0}"),
            None => format!("serving; {count}database credential without an end"),
        }
    }

    pub(super) fn add(&self, served: &Arc<Served>) {
        self.0
            .send_modify(|list| Arc::make_mut(list).push(Arc::clone(served)));
    }

    fn remove(&self, served: &Arc<Served>) {
        // By identity: a reload may have added another endpoint of this name while this one drained.
        self.0
            .send_modify(|list| Arc::make_mut(list).retain(|other| !Arc::ptr_eq(other, served)));
    }
}
