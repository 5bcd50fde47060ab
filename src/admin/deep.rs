//! `/readiness?deep=1`: one real login at the endpoint.
//!
//! It wakes a sleeping endpoint, so that periodic probes should not request it. There is at most one login per endpoint
//! in [`INTERVAL`]; requests in between share its result.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;

use crate::upstream::{ConnectSettings, Route};

/// Time between two logins at an endpoint.
const INTERVAL: Duration = Duration::from_secs(10);
/// A login that takes longer counts as failed.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(15);

/// An endpoint to log in at.
pub struct LoginTarget {
    /// Its name in the status page.
    pub name: String,
    /// The route to it.
    pub(crate) route: Route,
    /// Timeouts and keepalive of a login.
    pub connect: ConnectSettings,
}

/// Lists the endpoints of this moment.
pub type LoginTargets = Arc<dyn Fn() -> Vec<LoginTarget> + Send + Sync>;

/// The result of a login.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// The endpoint.
    pub endpoint: String,
    /// Whether it succeeded.
    pub ok: bool,
    /// Its duration in milliseconds.
    pub took_ms: u64,
    /// Its age in milliseconds.
    pub age_ms: u64,
    /// The SQLSTATE of the error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sqlstate: Option<String>,
    /// The error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// The last login of each endpoint.
#[derive(Debug, Default)]
pub struct DeepCheck {
    last: Mutex<HashMap<String, Login>>,
    logins: TaskTracker,
}

#[derive(Clone, Debug)]
struct Login {
    began: Instant,
    outcome: watch::Receiver<Option<(Instant, Checked)>>,
}

impl DeepCheck {
    /// Logs in at the endpoint with this name, or at every endpoint without one; `None` if no endpoint has the name.
    /// Cancel safe: logins continue.
    pub async fn check(
        &self,
        mut targets: Vec<LoginTarget>,
        name: Option<&str>,
    ) -> Option<Vec<Checked>> {
        if let Some(name) = name {
            // Both forms: the status page shows `(read-only)` behind the label.
            targets.retain(|target| target.name == name || target.route.label().name() == name);
            if targets.is_empty() {
                return None;
            }
        }
        // All start before the first is awaited.
        let logins: Vec<_> = targets
            .into_iter()
            .map(|target| (target.name.clone(), self.login(target)))
            .collect();
        let mut checked = Vec::with_capacity(logins.len());
        for (name, mut login) in logins {
            let outcome = login.outcome.wait_for(Option::is_some).await;
            let outcome = outcome.ok().and_then(|outcome| outcome.clone());
            let (ended, outcome) = outcome.unwrap_or_else(|| (Instant::now(), interrupted(name)));
            checked.push(Checked {
                age_ms: millis(ended.elapsed()),
                ..outcome
            });
        }
        Some(checked)
    }

    /// The login in progress, the last one if it is recent, or a new one.
    fn login(&self, target: LoginTarget) -> Login {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(login) = last.get(&target.name) {
            // A login whose task has panicked has dropped its sender.
            let is_running =
                login.outcome.borrow().is_none() && login.outcome.has_changed().is_ok();
            if is_running || login.began.elapsed() < INTERVAL {
                return login.clone();
            }
        }
        let (done, outcome) = watch::channel(None);
        let login = Login {
            began: Instant::now(),
            outcome,
        };
        last.insert(target.name.clone(), login.clone());
        // A task of its own, since other requests share the login: the server drops the handler of a client that goes
        // away.
        self.logins.spawn(async move {
            let checked = log_in(target).await;
            done.send_replace(Some((Instant::now(), checked)));
        });
        login
    }
}

async fn log_in(target: LoginTarget) -> Checked {
    let began = Instant::now();
    let outcome = timeout(LOGIN_TIMEOUT, target.route.test_login(&target.connect)).await;
    let mut checked = Checked {
        ok: matches!(outcome, Ok(Ok(()))),
        took_ms: millis(began.elapsed()),
        endpoint: target.name,
        ..Checked::default()
    };
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(refusal)) => {
            checked.sqlstate = Some(refusal.report.sqlstate);
            checked.message = Some(refusal.report.message);
            checked.hint = refusal.report.hint;
        }
        Err(_elapsed) => {
            checked.message = Some(format!("no login within {} s", LOGIN_TIMEOUT.as_secs()));
        }
    }
    checked
}

fn interrupted(endpoint: String) -> Checked {
    Checked {
        endpoint,
        message: Some("the login was interrupted".to_owned()),
        ..Checked::default()
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
