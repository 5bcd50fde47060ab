//! What has come of the look-ups of the endpoints that the program was started with.

use std::sync::Arc;

use tokio::sync::watch;

use super::StartError;

/// What has come of one endpoint's look-up.
#[derive(Clone)]
enum Verdict {
    Found,
    /// Waiting does not cure it.
    Hopeless(Arc<StartError>),
    /// The first attempt is under way.
    Pending,
    /// The last attempt failed, and time may cure that.
    Retrying,
}

/// The verdicts on all of them; cheap to clone. A program without one endpoint that could ever be used ends.
#[derive(Clone)]
pub(super) struct Outlook(watch::Receiver<Vec<Verdict>>);

/// Reports on one endpoint.
#[derive(Clone)]
pub(super) struct Reporter {
    verdicts: watch::Sender<Vec<Verdict>>,
    index: usize,
}

impl Outlook {
    /// One reporter for each of `count` endpoints.
    pub(super) fn of(count: usize) -> (Vec<Reporter>, Self) {
        let (sender, receiver) = watch::channel(vec![Verdict::Pending; count]);
        let reporter = |index| Reporter {
            verdicts: sender.clone(),
            index,
        };
        ((0..count).map(reporter).collect(), Self(receiver))
    }

    /// Returns once an endpoint is found, or each has been tried; fails if none can be used. Cancel safe.
    pub(super) async fn known(&self) -> Result<(), StartError> {
        let is_known = |verdicts: &Vec<Verdict>| {
            let mut verdicts = verdicts.iter();
            verdicts.clone().any(|it| matches!(it, Verdict::Found))
                || verdicts.all(|it| !matches!(it, Verdict::Pending))
        };
        self.until(is_known).await
    }

    /// Returns once an endpoint is found; fails if none can be used. Cancel safe.
    pub(super) async fn found(&self) -> Result<(), StartError> {
        let is_found =
            |verdicts: &Vec<Verdict>| verdicts.iter().any(|it| matches!(it, Verdict::Found));
        self.until(is_found).await
    }

    async fn until(&self, is_reached: impl Fn(&Vec<Verdict>) -> bool) -> Result<(), StartError> {
        let mut verdicts = self.0.clone();
        let reached = verdicts
            .wait_for(|verdicts| hopeless(verdicts).is_some() || is_reached(verdicts))
            .await;
        match reached {
            Ok(verdicts) => match hopeless(&verdicts) {
                Some(error) => Err(StartError::Endpoint(error)),
                None => Ok(()),
            },
            // The look-ups end with the program, which then has reasons of its own.
            Err(_) => std::future::pending().await,
        }
    }
}

/// The first endpoint's error, if there is hope for none.
fn hopeless(verdicts: &[Verdict]) -> Option<Arc<StartError>> {
    let mut first = None;
    for verdict in verdicts {
        match verdict {
            Verdict::Hopeless(error) => first = first.or_else(|| Some(Arc::clone(error))),
            Verdict::Found | Verdict::Pending | Verdict::Retrying => return None,
        }
    }
    first
}

impl Reporter {
    pub(super) fn found(&self) {
        self.set(Verdict::Found);
    }

    pub(super) fn failed(&self, error: StartError) {
        self.set(if error.kind().0.is_transient() {
            Verdict::Retrying
        } else {
            Verdict::Hopeless(Arc::new(error))
        });
    }

    /// Whether other endpoints were started with this one.
    pub(super) fn has_others(&self) -> bool {
        self.verdicts.borrow().len() > 1
    }

    fn set(&self, verdict: Verdict) {
        self.verdicts.send_modify(|verdicts| {
            if let Some(it) = verdicts.get_mut(self.index) {
                *it = verdict;
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
    async fn hope_ends_only_when_no_endpoint_has_any() {
        let (reporters, outlook) = Outlook::of(2);
        let pending = async || timeout(A_WHILE, outlook.found()).await.is_err();
        reporters[1].failed(StartError::NoEndpoint);
        assert!(pending().await, "the first has not been tried");
        assert!(timeout(A_WHILE, outlook.known()).await.is_err());
        reporters[0].failed(StartError::HostName {
            host: "a b".to_owned(),
        });
        let error = outlook.found().await.unwrap_err();
        assert!(
            error.to_string().contains("a b"),
            "the first one's: {error}"
        );
        assert!(error.hint().is_some());
        reporters[1].found();
        assert!(outlook.found().await.is_ok() && outlook.known().await.is_ok());
    }
}
