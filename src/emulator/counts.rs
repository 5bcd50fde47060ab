//! What has happened so far, for tests to assert on and to wait for.

use std::{sync::Arc, time::Duration};

use serde::Serialize;
use tokio::{sync::watch, time::timeout};

/// A snapshot of everything the emulator counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Counts {
    /// Requests for the OIDC discovery document (either place).
    pub discoveries: u64,
    /// Requests to `/oidc/v1/token`.
    pub token_requests: u64,
    /// Workspace tokens issued.
    pub tokens_issued: u64,
    /// Requests for a database credential (either API).
    pub mint_requests: u64,
    /// Database credentials issued.
    pub credentials_issued: u64,
    /// Requests for projects, branches, endpoints, instances, roles and databases.
    pub lookups: u64,
    /// Requests for SCIM `Me`.
    pub whoami_requests: u64,
    /// Requests to any other path of the API.
    pub other_requests: u64,
    /// TCP connections accepted by the edge, whatever became of them.
    pub dials: u64,
    /// Connections that completed TLS.
    pub tls_handshakes: u64,
    /// `StartupMessage`s understood.
    pub startups: u64,
    /// Passwords received.
    pub passwords: u64,
    /// Logins that reached `ReadyForQuery`.
    pub logins: u64,
    /// Logins that the edge or Postgres refused after a `StartupMessage`.
    pub refusals: u64,
    /// `CancelRequest`s received.
    pub cancels: u64,
    /// `CancelRequest`s whose key was known and passed on.
    pub cancels_forwarded: u64,
    /// Connections open at the edge now, logged in or not.
    pub connections: u64,
    /// Sessions logged in now.
    pub sessions: u64,
    /// Times the compute went to sleep.
    pub suspensions: u64,
    /// Times the compute woke up.
    pub wakes: u64,
}

impl Counts {
    /// All requests to the workspace API, the token endpoint included.
    pub fn api_requests(&self) -> u64 {
        self.discoveries
            + self.token_requests
            + self.mint_requests
            + self.lookups
            + self.whoami_requests
            + self.other_requests
    }
}

/// The live counters; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Counters(Arc<watch::Sender<Counts>>);

impl Counters {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Counts::default())))
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Counts)) {
        self.0.send_modify(change);
    }

    pub(crate) fn snapshot(&self) -> Counts {
        *self.0.borrow()
    }

    /// Adds one through `field` now and takes it away when the guard goes.
    pub(crate) fn gauge(&self, field: fn(&mut Counts) -> &mut u64) -> Gauge {
        self.change(|counts| *field(counts) += 1);
        Gauge {
            counters: self.clone(),
            field,
        }
    }

    pub(crate) async fn until(
        &self,
        within: Duration,
        mut reached: impl FnMut(&Counts) -> bool,
    ) -> Option<Counts> {
        let mut seen = self.0.subscribe();
        let found = timeout(within, seen.wait_for(|counts| reached(counts))).await;
        found.ok().and_then(Result::ok).map(|counts| *counts)
    }
}

/// One unit of a gauge.
pub(crate) struct Gauge {
    counters: Counters,
    field: fn(&mut Counts) -> &mut u64,
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.counters.change(|counts| {
            let value = (self.field)(counts);
            *value = value.saturating_sub(1);
        });
    }
}
