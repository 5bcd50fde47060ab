//! Resolution of an endpoint's settings to an [`Upstream`], which may take a look-up in the workspace.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::AsyncWriteExt,
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use super::{ConnectSettings, Refusal, Upstream};
use crate::{
    credential::{Demand, HOLD},
    net::message::write_and_flush,
    protocol::{
        error::{Report, sqlstate},
        options::LoginParameters,
        startup::terminate,
    },
    status::Label,
    telemetry::labels::Reason,
};

/// How long a server may take to receive a Terminate message.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The state of the look-up.
#[derive(Clone)]
enum State {
    /// The last attempt failed; another follows.
    Failing(Arc<Problem>),
    Found(Arc<Upstream>),
    /// The first attempt is in progress.
    Looking,
}

/// The error of the last look-up.
pub(crate) struct Problem {
    /// The refusal for clients.
    pub(crate) refusal: Refusal,
    /// Whether clients wait for the next attempt, because the failure is transient.
    pub(crate) is_held_for: bool,
    /// The earliest attempt that a waiting client can cause.
    pub(crate) opens_at: Instant,
}

/// The look-up's result as sessions see it; cheap to clone.
#[derive(Clone)]
pub(crate) struct Route {
    label: Label,
    state: watch::Receiver<State>,
    demand: Arc<Demand>,
}

/// The look-up's result as the task that makes it publishes it.
pub(crate) struct RoutePublisher {
    state: watch::Sender<State>,
    demand: Arc<Demand>,
}

impl Route {
    /// A route before its first look-up.
    pub(crate) fn channel(label: Label) -> (RoutePublisher, Self) {
        let (sender, state) = watch::channel(State::Looking);
        let demand = Arc::<Demand>::default();
        let finder = RoutePublisher {
            state: sender,
            demand: Arc::clone(&demand),
        };
        let route = Self {
            label,
            state,
            demand,
        };
        (finder, route)
    }

    /// The endpoint's name in the settings, for messages.
    pub(crate) fn label(&self) -> &Label {
        &self.label
    }

    /// The upstream, once the look-up has succeeded.
    pub(crate) fn found(&self) -> Option<Arc<Upstream>> {
        match &*self.state.borrow() {
            State::Found(upstream) => Some(Arc::clone(upstream)),
            State::Failing(_) | State::Looking => None,
        }
    }

    /// The refusal after the last attempt, until one succeeds; its reason is `Waking` if a retry may.
    pub(crate) fn problem(&self) -> Option<Refusal> {
        match &*self.state.borrow() {
            State::Failing(problem) => Some(problem.refusal.clone()),
            State::Found(_) | State::Looking => None,
        }
    }

    /// The upstream; waits up to `limit` for the look-up. Cancel safe.
    ///
    /// Transient failures are waited out. Any other is returned as soon as an attempt during the wait meets it, or at once if
    /// the next attempt is more than [`HOLD`] away.
    pub(crate) async fn upstream(&self, limit: Duration) -> Result<Arc<Upstream>, Refusal> {
        let deadline = Instant::now() + limit;
        let mut state = self.state.clone();
        let mut waiting = None;
        loop {
            // Marks the value as seen, so that `changed` returns for any later one.
            let problem = match &*state.borrow_and_update() {
                State::Found(upstream) => return Ok(Arc::clone(upstream)),
                State::Failing(problem) => Some(Arc::clone(problem)),
                State::Looking => None,
            };
            if let Some(problem) = &problem
                && !problem.is_held_for
                && (waiting.is_some() || problem.opens_at > deadline.min(Instant::now() + HOLD))
            {
                return Err(problem.refusal.clone());
            }
            // From here on the look-up is attempted at the pace for waiting clients.
            waiting.get_or_insert_with(|| self.demand.add());
            // Also when the publisher is gone, after which nothing changes any more.
            if !matches!(timeout_at(deadline, state.changed()).await, Ok(Ok(()))) {
                return Err(problem.map_or_else(|| self.timed_out(), |it| it.refusal.clone()));
            }
        }
    }

    fn timed_out(&self) -> Refusal {
        Refusal {
            report: Report::new(
                sqlstate::CANNOT_CONNECT,
                format!("Lakebase endpoint {} could not be looked up in time", self.label),
            )
            .with_hint("Check that the workspace can be reached, or set PGHOST and PGUSER so that no look-up is needed."),
            reason: Reason::Waking,
        }
    }

    /// One login as for a client, and an orderly end. Cancel safe: dropping it drops the connection.
    pub(crate) async fn test_login(&self, connect: &ConnectSettings) -> Result<(), Refusal> {
        let upstream = self.upstream(connect.timeouts.connect_timeout).await?;
        let settings = LoginParameters {
            database: upstream.endpoint().database.clone(),
            fallback_database: None,
            parameters: vec![("application_name".to_owned(), "lakebase-proxy".to_owned())],
            client_encoding: None,
            replication: false,
            ..LoginParameters::default()
        };
        let mut connection = upstream.connect(&settings, connect).await?.connection;
        let close = async {
            write_and_flush(&mut connection.stream, &terminate()).await?;
            connection.stream.shutdown().await
        };
        // The login has succeeded; errors of the close do not matter.
        let _ = timeout(CLOSE_TIMEOUT, close).await;
        Ok(())
    }
}

impl RoutePublisher {
    /// Publishes the upstream.
    pub(crate) fn found(&self, upstream: Arc<Upstream>) {
        self.state.send_replace(State::Found(upstream));
    }

    /// Publishes the error of an attempt.
    pub(crate) fn failed(&self, problem: Problem) {
        self.state.send_replace(State::Failing(Arc::new(problem)));
    }

    /// The clients that wait for the next attempt.
    pub(crate) fn demand(&self) -> &Demand {
        &self.demand
    }
}
