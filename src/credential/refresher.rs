//! The task that mints: when (`schedule` does the arithmetic), through [`Mint`], into the cell.
//!
//! An error that a person must act on is logged once, in one line.

use std::{
    future::{Future, pending},
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jiff::Timestamp;
use secrecy::ExposeSecret;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::{
    CallError, CredentialCell, CredentialState, CredentialStatus, MintAttempt, Minted,
    schedule::{Need, Pace},
};
use crate::{
    net::backoff::jitter,
    telemetry::{Metrics, labels::RefreshOutcome},
    workspace::{self, CredentialMinter},
};

/// Longest time between two reads of the wall clock: timers stand still while a laptop sleeps.
const CLOCK_CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// An attempt that has not ended by then counts as failed. Above the sum of the timeouts of any source's own steps, so that
/// it ends what hangs, and never a slow mint that would succeed.
pub(super) const MINT_TIMEOUT: Duration =
    Duration::from_secs(workspace::MINT_TIMEOUT.as_secs() + 10);

/// A boxed future, which keeps [`Mint`] usable as a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A source of credentials: the workspace, a password, a password file, a command.
pub trait Mint: Send + Sync + 'static {
    /// Requests a new credential. The implementation limits the time that takes. Cancel safe: the refresher drops it at
    /// its own timeout and at shutdown.
    fn mint(&self) -> BoxFuture<'_, Result<Minted, CallError>>;

    /// Completes when the source holds another credential, which is then minted at once. Cancel safe.
    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(pending())
    }
}

impl Mint for CredentialMinter {
    fn mint(&self) -> BoxFuture<'_, Result<Minted, CallError>> {
        Box::pin(self.request_credential())
    }
}

/// Keeps a cell filled; one per endpoint and identity.
pub struct Refresher {
    mint: Arc<dyn Mint>,
    cell: CredentialCell,
    metrics: Arc<Metrics>,
    pace: Pace,
    /// The error that is already logged: once, not per retry.
    reported: Option<Reported>,
}

#[derive(PartialEq)]
struct Reported {
    message: String,
    was_valid: bool,
}

impl Refresher {
    /// A refresher that has not started; see [`run`](Self::run).
    pub fn new(mint: Arc<dyn Mint>, cell: CredentialCell, metrics: Arc<Metrics>) -> Self {
        Self {
            mint,
            cell,
            metrics,
            pace: Pace::new(Instant::now()),
            reported: None,
        }
    }

    /// Mints and refreshes until stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut is_changed = false;
        loop {
            let now = Instant::now();
            let attempt_at = self.pace.next_attempt(now, &self.need(now));
            if is_changed || attempt_at.is_some_and(|at| at <= now) {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = self.attempt(is_changed) => {}
                }
                // A change during the attempt completes `changed` again.
                is_changed = false;
                continue;
            }
            let planned = attempt_at.map(|at| self.wall(at - now));
            self.cell.plan(planned);
            // 0 stands for no plan: a gauge has no empty value.
            self.metrics
                .credential_next_refresh
                .set(planned.map_or(0.0, unix_seconds));
            let check_at = now + CLOCK_CHECK_INTERVAL;
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep_until(attempt_at.map_or(check_at, |at| at.min(check_at))) => {}
                () = self.cell.demand().added() => {}
                () = self.mint.changed() => is_changed = true,
            }
        }
    }

    fn need(&self, now: Instant) -> Need {
        let status = self.cell.status();
        let (at, awaited) = (self.cell.clock().now(), self.cell.demand().exists());
        let (state, due_in) = if status.is_lazy {
            // No timer: it would not fire in time while the platform freezes the CPU.
            (lazy_state(&status, awaited, at), None)
        } else {
            let left = status
                .lifetime
                .map(|lifetime| lifetime.due.duration_since(at));
            let due_in = left.map(|left| Duration::try_from(left).unwrap_or_default());
            (status.state, due_in)
        };
        Need {
            state,
            due_in,
            forced_at: self.cell.forced().due_at(now),
            awaited,
        }
    }

    /// `is_changed`: the source holds another credential, even if it expires earlier.
    async fn attempt(&mut self, is_changed: bool) {
        let began = Instant::now();
        self.cell.attempt_begins(began);
        // A second bound beside the source's own: a source that hangs would end all refreshes.
        let outcome = match timeout(MINT_TIMEOUT, self.mint.mint()).await {
            Ok(outcome) => outcome.and_then(|minted| self.checked(minted)),
            Err(_) => Err(CallError::unavailable(format!(
                "the request for a database credential did not end within {} s",
                MINT_TIMEOUT.as_secs()
            ))
            .with_hint("check that the workspace can be reached from here")),
        };
        let label = outcome
            .as_ref()
            .map_or_else(|error| error.kind.into(), |_| RefreshOutcome::Success);
        self.metrics.credential_refreshes[label].inc();
        let now = Instant::now();
        let outcome = match outcome {
            Ok(minted) => {
                let expires_at = minted.expires_at;
                self.accept(minted, now, is_changed);
                Ok(expires_at)
            }
            Err(error) => {
                self.pace.failed(now, error.kind, error.retry_after, jitter);
                self.report(&error);
                Err(Arc::new(error))
            }
        };
        let attempt = MintAttempt {
            at: self.cell.clock().now(),
            took: now - began,
            outcome,
        };
        // After the publication: a client that sees the end of the attempt must find its credential.
        self.cell.attempt_ended(attempt, self.pace.awaited());
    }

    /// An expired credential is an error: published, it would be minted again at once, without end.
    fn checked(&self, minted: Minted) -> Result<Minted, CallError> {
        match minted.expires_at {
            Some(expires_at) if expires_at <= self.cell.clock().now() => Err(CallError::malformed(
                "the workspace returned a database credential that has already expired",
            )
            .with_detail(format!("it expired at {expires_at}"))
            .with_hint("check this machine's clock")),
            _ => Ok(minted),
        }
    }

    /// Publishes the new credential if it is better than the current one.
    fn accept(&mut self, minted: Minted, now: Instant, is_changed: bool) {
        // A source may return what it has cached. A valid credential is replaced only by a longer-lived one, unless a server
        // has rejected it.
        let is_better = self.cell.latest().is_none_or(|current| {
            self.cell.forced().rejected() >= current.generation
                || lasts_longer(minted.expires_at, current.expires_at)
                // A file may be written again with the same password.
                || (is_changed && minted.secret.expose_secret() != current.secret.expose_secret())
        });
        if !is_better {
            debug!("the new database credential does not last longer than the current one");
            self.pace.unchanged(now, jitter);
            return;
        }
        let credential = self.cell.publish(minted, jitter());
        self.pace.succeeded(now);
        // Infinity, so that alerts on a near or past expiry stay quiet.
        let never = f64::INFINITY;
        self.metrics
            .credential_expiry
            .set(credential.expires_at.map_or(never, unix_seconds));
        self.metrics
            .credential_minted
            .set(unix_seconds(credential.minted_at));
        let expires_at = credential.expires_at.map(tracing::field::display);
        let was_failing = self.reported.take().is_some();
        if is_changed {
            info!(
                generation = credential.generation,
                "database credential changed at its source; new logins use it"
            );
        } else if credential.generation == 1 || was_failing {
            info!(
                generation = credential.generation,
                expires_at, "database credential obtained"
            );
        } else {
            debug!(
                generation = credential.generation,
                expires_at, "database credential refreshed"
            );
        }
    }

    /// Logs each error once, and again when the credential expires, which clients notice.
    fn report(&mut self, error: &CallError) {
        let state = self.cell.status().state;
        let reported = Reported {
            message: error.message.clone(),
            was_valid: state.is_valid(),
        };
        if self.reported.as_ref() == Some(&reported) {
            debug!(state = state.label(), error = %error, "minting a database credential failed again");
            return;
        }
        self.reported = Some(reported);
        let (detail, hint) = (error.detail.as_deref(), error.hint.as_deref());
        // Before the first credential a transient failure is a warning: a sidecar may start before its network.
        if !error.kind.is_transient() || state == CredentialState::Expired {
            error!(state = state.label(), error = %error, detail, hint, "cannot mint a database credential");
        } else {
            warn!(state = state.label(), error = %error, detail, hint, "cannot mint a database credential, retrying");
        }
    }

    fn wall(&self, wait: Duration) -> Timestamp {
        let now = self.cell.clock().now();
        now.saturating_add(wait).unwrap_or(now)
    }
}

/// With minting on demand only: `Expired` makes an attempt due at once, `Fresh` makes none due. Wanted are the first
/// credential, a new one for a client that waits while the current one is about to expire, and a retry after a failure,
/// without which a proxy that is not ready would never become ready.
fn lazy_state(status: &CredentialStatus, awaited: bool, at: Timestamp) -> CredentialState {
    let is_wanted = match status.state {
        CredentialState::None => true,
        CredentialState::Expired => awaited || status.last_error.is_some(),
        CredentialState::Fresh | CredentialState::Due | CredentialState::Urgent => {
            awaited && status.is_lazy_due_at(at)
        }
    };
    if is_wanted {
        CredentialState::Expired
    } else {
        CredentialState::Fresh
    }
}

fn unix_seconds(at: Timestamp) -> f64 {
    SystemTime::from(at)
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

fn lasts_longer(new: Option<Timestamp>, current: Option<Timestamp>) -> bool {
    match (new, current) {
        (_, None) => false,
        (None, Some(_)) => true,
        (Some(new), Some(current)) => new > current,
    }
}
