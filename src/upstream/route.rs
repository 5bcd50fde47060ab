//! The way to an endpoint that may have to be looked up first.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::AsyncWriteExt,
    sync::{Notify, watch},
    time::{Instant, timeout, timeout_at},
};

use super::{Refusal, Terms, Upstream};
use crate::{
    credential::HOLD,
    protocol::{
        error::{Report, sqlstate},
        frame::tag,
        options::SessionSettings,
    },
    status::Label,
    telemetry::labels::Reason,
};

/// How long a server may take to receive a Terminate message.
const GOODBYE: Duration = Duration::from_secs(2);

/// Where the look-up of an endpoint stands.
#[derive(Clone)]
enum State {
    /// The last attempt has failed; another follows.
    Failing(Arc<Problem>),
    Found(Arc<Upstream>),
    /// The first attempt is under way.
    Looking,
}

/// Why an endpoint has not been found yet.
pub struct Problem {
    /// What clients are refused with.
    pub refusal: Refusal,
    /// Whether clients are held for the next attempt, since time may cure it.
    pub is_held_for: bool,
    /// When a waiting client can bring about the next attempt.
    pub opens_at: Instant,
}

/// The clients that wait for a look-up.
#[derive(Default)]
struct Demand {
    waiting: AtomicUsize,
    arrived: Notify,
}

/// What sessions hold; cheap to clone.
#[derive(Clone)]
pub struct Route {
    label: Label,
    state: watch::Receiver<State>,
    demand: Arc<Demand>,
}

/// What the task that looks the endpoint up holds.
pub struct RouteFinder {
    state: watch::Sender<State>,
    demand: Arc<Demand>,
}

impl Route {
    /// A route that is still to be found.
    pub fn to(label: Label) -> (RouteFinder, Self) {
        let (sender, state) = watch::channel(State::Looking);
        let demand = Arc::<Demand>::default();
        let finder = RouteFinder {
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

    /// For messages: the endpoint's name in the settings.
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// The way, if it has been found.
    pub fn found(&self) -> Option<Arc<Upstream>> {
        match &*self.state.borrow() {
            State::Found(upstream) => Some(Arc::clone(upstream)),
            State::Failing(_) | State::Looking => None,
        }
    }

    /// Why it has not been found yet, once an attempt has failed.
    pub fn problem(&self) -> Option<String> {
        match &*self.state.borrow() {
            State::Failing(problem) => Some(problem.refusal.report.message.clone()),
            State::Found(_) | State::Looking => None,
        }
    }

    /// Completes when the look-up has come to another result. Cancel safe.
    pub async fn changed(&mut self) {
        // Without a finder there is no change to come.
        if self.state.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// The way; waits as long as `patience` while it is being looked up. Cancel safe.
    ///
    /// A failure that time may cure is waited out. Any other is returned as soon as an attempt made during the wait has
    /// met it, or at once when the next attempt is further off than a few seconds.
    pub async fn upstream(&self, patience: Duration) -> Result<Arc<Upstream>, Refusal> {
        let deadline = Instant::now() + patience;
        let mut state = self.state.clone();
        let mut waiting = None;
        loop {
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
            waiting.get_or_insert_with(|| Waiting::new(&self.demand));
            if !matches!(timeout_at(deadline, state.changed()).await, Ok(Ok(()))) {
                return Err(problem.map_or_else(|| self.too_slow(), |it| it.refusal.clone()));
            }
        }
    }

    fn too_slow(&self) -> Refusal {
        Refusal {
            report: Report::new(
                sqlstate::CANNOT_CONNECT,
                format!("Lakebase endpoint {} could not be looked up in time", self.label),
            )
            .with_hint("Check that the workspace can be reached, or set PGHOST and PGUSER so that nothing need be looked up."),
            reason: Reason::Waking,
        }
    }
}

impl Route {
    /// One login as a client would make it, and an orderly goodbye. Cancel safe: dropping it drops the connection.
    pub async fn log_in_once(&self, terms: &Terms) -> Result<(), Refusal> {
        let upstream = self.upstream(terms.limits.connect_timeout).await?;
        let settings = SessionSettings {
            database: upstream.endpoint().database.clone(),
            fallback_database: None,
            parameters: vec![("application_name".to_owned(), "lakebase-proxy".to_owned())],
            client_encoding: None,
            replication: false,
            ..SessionSettings::default()
        };
        let mut connection = upstream.connect(&settings, terms).await?.connection;
        let goodbye = async {
            connection
                .stream
                .write_all(&[tag::TERMINATE, 0, 0, 0, 4])
                .await?;
            connection.stream.shutdown().await
        };
        // The login is what counts; whether the server takes the goodbye does not matter.
        let _ = timeout(GOODBYE, goodbye).await;
        Ok(())
    }
}

impl RouteFinder {
    /// Sessions go this way from now on.
    pub fn found(&self, upstream: Arc<Upstream>) {
        self.state.send_replace(State::Found(upstream));
    }

    /// An attempt has failed.
    pub fn failed(&self, problem: Problem) {
        self.state.send_replace(State::Failing(Arc::new(problem)));
    }

    /// Whether a client waits for the next attempt.
    pub fn is_awaited(&self) -> bool {
        self.demand.waiting.load(Ordering::SeqCst) > 0
    }

    /// Completes when a client begins to wait. Cancel safe.
    pub async fn demand(&self) {
        self.demand.arrived.notified().await;
    }
}

/// Counts a waiting client for as long as it waits.
struct Waiting<'a>(&'a Demand);

impl<'a> Waiting<'a> {
    fn new(demand: &'a Demand) -> Self {
        demand.waiting.fetch_add(1, Ordering::SeqCst);
        demand.arrived.notify_one();
        Self(demand)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
