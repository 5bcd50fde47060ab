//! `/readiness?deep=1`: one real login at the endpoint, because somebody asked.
//!
//! It wakes an endpoint that sleeps, so that no probe that comes by itself should ask for it. Each endpoint is logged in
//! at once in `EVERY` at most, whoever asks and how often; all who ask meanwhile share the answer.

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

use crate::{
    overview::{Overview, Place},
    upstream::Terms,
};

/// Time between two logins at an endpoint.
const EVERY: Duration = Duration::from_secs(10);
/// How long one login may take; an endpoint that needs longer is not ready.
const LIMIT: Duration = Duration::from_secs(15);

/// What came of a login.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// Where.
    pub endpoint: String,
    /// Whether it worked.
    pub ok: bool,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
    /// How long ago that was, in milliseconds.
    pub age_ms: u64,
    /// SQLSTATE of the refusal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sqlstate: Option<String>,
    /// Why it was refused.
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
    /// Logs in at the endpoint of that name, or at all of them; `None` if there is none of that name.
    pub async fn check(&self, overview: &Overview, name: Option<&str>) -> Option<Vec<Checked>> {
        let mut places = overview.places();
        if let Some(name) = name {
            places.retain(|place| place.name == name || place.route.label().name() == name);
            if places.is_empty() {
                return None;
            }
        }
        // All begin before the first is waited for.
        let logins: Vec<_> = places
            .iter()
            .map(|place| self.login(place, overview.session_config().terms))
            .collect();
        let mut checked = Vec::with_capacity(logins.len());
        for (place, mut login) in places.iter().zip(logins) {
            let outcome = login.outcome.wait_for(Option::is_some).await;
            let outcome = outcome.ok().and_then(|outcome| outcome.clone());
            let (ended, outcome) = outcome.unwrap_or_else(|| (Instant::now(), broken_off(place)));
            checked.push(Checked {
                age_ms: millis(ended.elapsed()),
                ..outcome
            });
        }
        Some(checked)
    }

    /// The login under way, the last one if it is recent, or a new one.
    fn login(&self, place: &Arc<Place>, terms: Terms) -> Login {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(login) = last.get(&place.name) {
            let is_under_way =
                login.outcome.borrow().is_none() && login.outcome.has_changed().is_ok();
            if is_under_way || login.began.elapsed() < EVERY {
                return login.clone();
            }
        }
        let (done, outcome) = watch::channel(None);
        let login = Login {
            began: Instant::now(),
            outcome,
        };
        last.insert(place.name.clone(), login.clone());
        let place = Arc::clone(place);
        self.logins.spawn(async move {
            let checked = log_in(&place, &terms).await;
            done.send_replace(Some((Instant::now(), checked)));
        });
        login
    }
}

async fn log_in(place: &Place, terms: &Terms) -> Checked {
    let began = Instant::now();
    let outcome = timeout(LIMIT, place.route.log_in_once(terms)).await;
    let mut checked = Checked {
        ok: matches!(outcome, Ok(Ok(()))),
        took_ms: millis(began.elapsed()),
        ..broken_off(place)
    };
    match outcome {
        Ok(Ok(())) => checked.message = None,
        Ok(Err(refusal)) => {
            checked.sqlstate = Some(refusal.report.sqlstate);
            checked.message = Some(refusal.report.message);
            checked.hint = refusal.report.hint;
        }
        Err(_elapsed) => {
            checked.message = Some(format!("no login within {} s", LIMIT.as_secs()));
        }
    }
    checked
}

fn broken_off(place: &Place) -> Checked {
    Checked {
        endpoint: place.name.clone(),
        ok: false,
        took_ms: 0,
        age_ms: 0,
        sqlstate: None,
        message: Some("the login was broken off".to_owned()),
        hint: None,
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
