//! The endpoints that the process serves; a reload adds and removes some.

use std::{net::SocketAddr, sync::Arc};

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use crate::{
    config::EndpointConfig,
    credential::{CallError, CredentialCell},
    listener::Bound,
    net::tls::Fingerprint,
    session::EndpointContext,
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
}

impl Served {
    /// The reason why there is no credential as `: reason`; empty if it is not known.
    fn why_not_ready(&self) -> String {
        let error = self.credentials.status().last_error;
        let why = error.map(|error| error.to_string());
        // Before the endpoint is found no credential is requested; the look-up has the reason.
        why.or_else(|| self.context.route.problem())
            .map_or_else(String::new, |why| format!(": {why}"))
    }

    /// The name in the status page and the console.
    pub(super) fn shown_name(&self) -> String {
        let read_only = if self.config.read_only {
            " (read-only)"
        } else {
            ""
        };
        format!("{}{read_only}", self.config.called())
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

/// The endpoints in the order of the settings; cheap to clone. A removed one is among them until its last session ends.
#[derive(Clone, Default)]
pub struct Endpoints(Arc<ArcSwap<Vec<Arc<Served>>>>);

impl Endpoints {
    /// The endpoints now; takes no lock.
    pub fn now(&self) -> Arc<Vec<Arc<Served>>> {
        self.0.load_full()
    }

    /// The first endpoint.
    pub fn first(&self) -> Option<Arc<Served>> {
        self.now().first().map(Arc::clone)
    }

    /// Fails if no endpoint has a valid credential.
    pub fn any_ready(&self) -> Result<(), String> {
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
        let mut states = now
            .iter()
            .map(|served| (served, served.credentials.status()));
        if let Some((served, _)) = states.find(|(_, status)| !status.is_ready()) {
            let why = served.why_not_ready();
            return format!("serving; {count}no valid database credential{why}");
        }
        let states = now.iter().map(|served| served.credentials.status());
        match states.filter_map(|status| status.expires_at).min() {
            Some(at) => format!("serving; {count}database credential valid until {at:.0}"),
            None => format!("serving; {count}database credential without an end"),
        }
    }

    pub(super) fn add(&self, served: &Arc<Served>) {
        self.0.rcu(|list| {
            // Copied inside the closure: `rcu` runs it again if another task has stored a list meanwhile.
            let mut list = Vec::clone(list);
            list.push(Arc::clone(served));
            list
        });
    }

    pub(super) fn remove(&self, served: &Arc<Served>) {
        self.0.rcu(|list| {
            let mut list = Vec::clone(list);
            // By identity: a reload may have added another endpoint of this name while this one drained.
            list.retain(|other| !Arc::ptr_eq(other, served));
            list
        });
    }
}
