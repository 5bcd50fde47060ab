//! The way to an endpoint that may have to be looked up first.

use std::{sync::Arc, time::Duration};

use tokio::{io::AsyncWriteExt, sync::watch, time::timeout};

use super::{Label, Refusal, Terms, Upstream};
use crate::{
    protocol::{
        error::{Report, sqlstate},
        frame::tag,
        options::SessionSettings,
    },
    telemetry::names::reason,
};

/// How long a server may take to hear a goodbye.
const GOODBYE: Duration = Duration::from_secs(2);

/// Where the look-up of an endpoint stands.
#[derive(Clone)]
enum State {
    Failed(Box<Refusal>),
    Found(Arc<Upstream>),
    Looking,
}

/// What sessions hold; cheap to clone.
#[derive(Clone)]
pub struct Route {
    label: Label,
    state: watch::Receiver<State>,
}

/// What whoever looks the endpoint up holds.
pub struct RouteFinder(watch::Sender<State>);

impl Route {
    /// A route that is still to be found.
    pub fn to(label: Label) -> (RouteFinder, Self) {
        let (sender, state) = watch::channel(State::Looking);
        (RouteFinder(sender), Self { label, state })
    }

    /// For messages: what the endpoint was called by whoever configured it.
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// The way, if it has been found.
    pub fn found(&self) -> Option<Arc<Upstream>> {
        match &*self.state.borrow() {
            State::Found(upstream) => Some(Arc::clone(upstream)),
            State::Failed(_) | State::Looking => None,
        }
    }

    /// The way; waits as long as `patience` while it is being looked up. Cancel safe.
    pub async fn upstream(&self, patience: Duration) -> Result<Arc<Upstream>, Refusal> {
        let mut state = self.state.clone();
        let known = timeout(
            patience,
            state.wait_for(|state| !matches!(state, State::Looking)),
        )
        .await;
        match known.map(|known| known.map(|state| state.clone())) {
            Ok(Ok(State::Found(upstream))) => Ok(upstream),
            Ok(Ok(State::Failed(refusal))) => Err(*refusal),
            Ok(Ok(State::Looking) | Err(_)) | Err(_) => Err(Refusal {
                report: Report::new(
                    sqlstate::CANNOT_CONNECT,
                    format!("Lakebase endpoint {} could not be looked up in time", self.label),
                )
                .with_hint("Check that the workspace can be reached, or set PGHOST and PGUSER so that nothing need be looked up."),
                reason: reason::WAKING,
            }),
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
        self.0.send_replace(State::Found(upstream));
    }

    /// Sessions are refused with this until it is found.
    pub fn failed(&self, refusal: Refusal) {
        self.0.send_replace(State::Failed(Box::new(refusal)));
    }
}
