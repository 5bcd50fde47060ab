//! The sessions of one endpoint, and whether it accepts more. An endpoint removed from the settings accepts none; its
//! listeners stay for the cancel requests of its sessions, until the last has ended.

use std::sync::Arc;

use prometheus::IntGauge;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{ClientInfo, Counts, Label, Registry, SessionEntry};
use crate::telemetry::Metrics;

/// The sessions of one endpoint; cheap to clone.
#[derive(Clone, Debug)]
pub struct EndpointSessions(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    registry: Registry,
    label: Label,
    state: watch::Sender<State>,
    /// Cancelled when the listeners are to close.
    closed: CancellationToken,
    waiting: IntGauge,
}

#[derive(Clone, Copy, Debug)]
struct State {
    lifecycle: Lifecycle,
    sessions: usize,
}

impl State {
    fn is_drained(&self) -> bool {
        self.lifecycle != Lifecycle::Serving && self.sessions == 0
    }
}

/// Whether the endpoint accepts sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lifecycle {
    Serving,
    /// Refuses new sessions; the listeners are open.
    Draining,
    /// The listeners are closed for good.
    Closed,
}

/// Why a session cannot be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// The endpoint was removed from the settings.
    Draining,
    /// The process has as many sessions as it may have.
    Limit,
}

impl EndpointSessions {
    /// An endpoint that accepts sessions; its listeners close when `closed` is cancelled.
    pub fn new(
        registry: &Registry,
        label: Label,
        metrics: &Metrics,
        closed: CancellationToken,
    ) -> Self {
        Self(Arc::new(Inner {
            registry: registry.clone(),
            label,
            state: watch::Sender::new(State {
                lifecycle: Lifecycle::Serving,
                sessions: 0,
            }),
            closed,
            waiting: metrics.clients_waiting.clone(),
        }))
    }

    /// The endpoint's name.
    pub fn label(&self) -> &Label {
        &self.0.label
    }

    /// The registry of the process.
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// Registers a session until the entry is dropped, unless the process has `limit` already.
    pub fn enter(
        &self,
        id: u64,
        client: ClientInfo,
        limit: usize,
    ) -> Result<SessionEntry, Rejected> {
        self.0.registry.enter(self, id, client, limit)
    }

    /// Counts by activity.
    pub fn counts(&self) -> Counts {
        self.0.registry.count(|endpoint| endpoint == self)
    }

    /// Refuses new sessions from now on.
    pub fn drain(&self) {
        self.change(Lifecycle::Serving, Lifecycle::Draining);
    }

    /// Accepts sessions again; `false` if it was not [draining](Self::drain) or is closed.
    pub fn resume(&self) -> bool {
        self.change(Lifecycle::Draining, Lifecycle::Serving)
    }

    /// Whether new sessions are refused.
    pub fn is_draining(&self) -> bool {
        self.0.state.borrow().lifecycle != Lifecycle::Serving
    }

    /// Closes the listeners of a draining endpoint, even with sessions left.
    pub fn close(&self) -> bool {
        // The state first: a resume must fail once the listeners close.
        let is_closed = self.change(Lifecycle::Draining, Lifecycle::Closed);
        if is_closed {
            self.0.closed.cancel();
        }
        is_closed
    }

    /// Cancelled when the listeners are to close.
    pub fn closed(&self) -> &CancellationToken {
        &self.0.closed
    }

    /// Closes the endpoint once it is draining and has no session left, and returns when it is closed and has none.
    /// Cancel safe.
    pub async fn drained(&self) {
        let mut state = self.0.state.subscribe();
        loop {
            // The sender lives as long as `self`, so the wait cannot fail.
            let _ = state.wait_for(State::is_drained).await;
            self.close();
            // Else it has resumed in between.
            if self.0.state.borrow().lifecycle == Lifecycle::Closed {
                return;
            }
        }
    }

    /// Counts one more session, in one step with the check that the endpoint accepts it: once it drains without
    /// sessions, none is to come.
    pub(super) fn add_session(&self) -> Result<(), Rejected> {
        let mut is_serving = false;
        self.0.state.send_if_modified(|state| {
            is_serving = state.lifecycle == Lifecycle::Serving;
            if is_serving {
                state.sessions = state.sessions.saturating_add(1);
            }
            // Nothing waits for more sessions, and a wake-up of another thread takes as long as the rest of this.
            false
        });
        if !is_serving {
            return Err(Rejected::Draining);
        }
        self.0.waiting.inc();
        Ok(())
    }

    pub(super) fn session_connected(&self) {
        self.0.waiting.dec();
    }

    pub(super) fn remove_session(&self, is_connected: bool) {
        if !is_connected {
            self.0.waiting.dec();
        }
        self.0.state.send_if_modified(|state| {
            state.sessions = state.sessions.saturating_sub(1);
            state.is_drained()
        });
    }

    fn change(&self, from: Lifecycle, to: Lifecycle) -> bool {
        // Compared and set in one step: a resume and the end of the last session may come at the same time.
        self.0.state.send_if_modified(|state| {
            let applies = state.lifecycle == from;
            if applies {
                state.lifecycle = to;
            }
            applies
        })
    }
}

/// Identity, since two endpoints may have the same name.
impl PartialEq for EndpointSessions {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

#[cfg(test)]
mod tests {
    use std::{pin::pin, time::Duration};

    use tokio::time::timeout;

    use super::*;
    use crate::status::registry::tests::{client, endpoint};

    const LONG: Duration = Duration::from_secs(100);

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_closes_when_its_last_session_has_ended() {
        let endpoint = endpoint(&Registry::default());
        let mut drained = pin!(endpoint.drained());
        let session = endpoint.enter(1, client(), 9).unwrap();
        endpoint.drain();
        assert!(timeout(LONG, &mut drained).await.is_err());
        assert!(!endpoint.closed().is_cancelled());
        assert_eq!(
            endpoint.enter(2, client(), 9).unwrap_err(),
            Rejected::Draining
        );
        drop(session);
        drained.await;
        assert!(endpoint.closed().is_cancelled() && endpoint.is_draining());
        assert!(!endpoint.resume(), "too late");
    }

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_that_resumes_in_time_stays_open() {
        let endpoint = endpoint(&Registry::default());
        let mut drained = pin!(endpoint.drained());
        let session = endpoint.enter(1, client(), 9).unwrap();
        endpoint.drain();
        assert!(timeout(LONG, &mut drained).await.is_err());
        assert!(endpoint.resume() && !endpoint.is_draining());
        drop(session);
        assert!(timeout(LONG, &mut drained).await.is_err());
        assert!(!endpoint.close(), "a serving endpoint drains first");
        let _session = endpoint.enter(2, client(), 9).unwrap();
        endpoint.drain();
        assert!(endpoint.close());
        assert!(
            timeout(LONG, &mut drained).await.is_err(),
            "a session is left"
        );
    }
}
