//! The endpoints of this process, as they are now: a reload adds some and takes others away.

use std::{net::SocketAddr, sync::Arc};

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use crate::{
    config::EndpointConfig,
    credential::CredentialCell,
    credential::MintError,
    listener::Bound,
    net::tls::Fingerprint,
    session::EndpointContext,
    status::{
        CredentialSnapshot, EndpointSnapshot, RefreshAttempt, RefreshError, UpstreamSnapshot,
    },
    upstream::Security,
};

/// One endpoint that is served.
pub struct Served {
    /// What the settings say of it.
    pub config: EndpointConfig,
    /// Where its clients connect.
    pub bound: Bound,
    /// What its sessions share: the way there, the counts.
    pub(crate) sessions: Arc<EndpointContext>,
    /// Its credential.
    pub credentials: CredentialCell,
    /// The roots that its certificate was last verified by.
    pub(super) roots: ArcSwap<Option<Fingerprint>>,
    /// Ends what is done for it in the background.
    pub(super) stop: CancellationToken,
}

impl Served {
    /// Why there is no credential, where that is known: `: reason`.
    fn why_not_ready(&self) -> String {
        let error = self.credentials.status().last_error;
        let why = error.map(|error| error.to_string());
        why.or_else(|| self.sessions.route.problem())
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
        let upstream = self.sessions.route.found().map(|upstream| {
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
            listening: self.bound.words(),
            sessions: self.sessions.registry.clone(),
            metrics: Arc::clone(&self.sessions.metrics),
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

fn refresh_error(error: &MintError) -> RefreshError {
    RefreshError {
        kind: error.kind.into(),
        message: error.message.clone(),
        detail: error.detail.clone(),
        hint: error.hint.clone(),
    }
}

/// All that are served, in the order of the settings; cheap to clone. One that the settings no longer name is among them
/// until its last session has gone.
#[derive(Clone, Default)]
pub struct Endpoints(Arc<ArcSwap<Vec<Arc<Served>>>>);

impl Endpoints {
    /// Those of this moment; takes no lock.
    pub fn now(&self) -> Arc<Vec<Arc<Served>>> {
        self.0.load_full()
    }

    /// The first.
    pub fn first(&self) -> Option<Arc<Served>> {
        self.now().first().map(Arc::clone)
    }

    /// Whether logins can work anywhere, and if not, why.
    pub fn any_ready(&self) -> Result<(), String> {
        let mut why = String::new();
        for served in &*self.now() {
            if served.credentials.status().is_ready() {
                return Ok(());
            }
            if why.is_empty() {
                why = served.why_not_ready();
            }
        }
        Err(format!("no valid database credential{why}"))
    }

    /// Every address this process takes Postgres clients at.
    pub(super) fn addresses(&self) -> Vec<SocketAddr> {
        let now = self.now();
        let addresses = now.iter().flat_map(|served| served.bound.tcp.iter());
        addresses.copied().collect()
    }

    /// How the credentials stand, in one line.
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
            let mut list = Vec::clone(list);
            list.push(Arc::clone(served));
            list
        });
    }

    pub(super) fn remove(&self, served: &Arc<Served>) {
        self.0.rcu(|list| {
            let mut list = Vec::clone(list);
            list.retain(|other| !Arc::ptr_eq(other, served));
            list
        });
    }
}
