//! The outcomes of discovery for the endpoints that the program started with.

use std::sync::Arc;

use tokio::sync::watch;

use super::AppError;

/// The outcome of one endpoint's discovery.
#[derive(Clone)]
enum Outcome {
    Found,
    /// An error that retries do not fix.
    Failed(Arc<AppError>),
    /// The first attempt is in progress.
    Pending,
    /// The last attempt failed; a retry may succeed.
    Retrying,
}

/// The outcomes of all endpoints; cheap to clone. The program ends if none can be used.
#[derive(Clone)]
pub(super) struct Outcomes(watch::Receiver<Vec<Outcome>>);

/// Reports on one endpoint.
#[derive(Clone)]
pub(super) struct Reporter {
    outcomes: watch::Sender<Vec<Outcome>>,
    index: usize,
}

impl Outcomes {
    /// One reporter for each of `count` endpoints.
    pub(super) fn of(count: usize) -> (Vec<Reporter>, Self) {
        let (sender, receiver) = watch::channel(vec![Outcome::Pending; count]);
        let reporter = |index| Reporter {
            outcomes: sender.clone(),
            index,
        };
        ((0..count).map(reporter).collect(), Self(receiver))
    }

    /// Returns once an endpoint is found, or each has been tried; fails if none can be used. Cancel safe.
    pub(super) async fn known(&self) -> Result<(), AppError> {
        let is_known = |outcomes: &Vec<Outcome>| {
            let mut outcomes = outcomes.iter();
            outcomes.clone().any(|it| matches!(it, Outcome::Found))
                || outcomes.all(|it| !matches!(it, Outcome::Pending))
        };
        self.until(is_known).await
    }

    /// Returns once an endpoint is found; fails if none can be used. Cancel safe.
    pub(super) async fn found(&self) -> Result<(), AppError> {
        let is_found =
            |outcomes: &Vec<Outcome>| outcomes.iter().any(|it| matches!(it, Outcome::Found));
        self.until(is_found).await
    }

    async fn until(&self, is_reached: impl Fn(&Vec<Outcome>) -> bool) -> Result<(), AppError> {
        let mut outcomes = self.0.clone();
        let reached = outcomes
            .wait_for(|outcomes| failure(outcomes).is_some() || is_reached(outcomes))
            .await;
        match reached {
            Ok(outcomes) => match failure(&outcomes) {
                Some(error) => Err(AppError::clone(&error)),
                None => Ok(()),
            },
            // The senders are dropped when the program ends anyway.
            Err(_) => std::future::pending().await,
        }
    }
}

/// The first endpoint's error, if all have failed.
fn failure(outcomes: &[Outcome]) -> Option<Arc<AppError>> {
    let mut first = None;
    for outcome in outcomes {
        match outcome {
            Outcome::Failed(error) => first = first.or_else(|| Some(Arc::clone(error))),
            // One endpoint that is found, or may still be, keeps the program running.
            Outcome::Found | Outcome::Pending | Outcome::Retrying => return None,
        }
    }
    first
}

impl Reporter {
    pub(super) fn found(&self) {
        self.set(Outcome::Found);
    }

    pub(super) fn failed(&self, error: AppError) {
        self.set(if error.kind.is_transient() {
            Outcome::Retrying
        } else {
            Outcome::Failed(Arc::new(error))
        });
    }

    /// Whether other endpoints were started with this one.
    pub(super) fn has_others(&self) -> bool {
        self.outcomes.borrow().len() > 1
    }

    fn set(&self, outcome: Outcome) {
        self.outcomes.send_modify(|outcomes| {
            if let Some(it) = outcomes.get_mut(self.index) {
                *it = outcome;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Duration, timeout};

    use super::*;

    const A_WHILE: Duration = Duration::from_millis(10);

    #[tokio::test(start_paused = true)]
    async fn discovery_fails_only_when_every_endpoint_has_failed() {
        let (reporters, outcomes) = Outcomes::of(2);
        let pending = async || timeout(A_WHILE, outcomes.found()).await.is_err();
        let refused = |message: &str| AppError::new(message, None);
        reporters[1].failed(refused("the second"));
        assert!(pending().await, "the first has not been tried");
        assert!(timeout(A_WHILE, outcomes.known()).await.is_err());
        reporters[0].failed(refused("the first"));
        let error = outcomes.found().await.unwrap_err();
        assert!(error.to_string().contains("the first"), "{error}");
        reporters[1].found();
        assert!(outcomes.found().await.is_ok() && outcomes.known().await.is_ok());
    }
}
