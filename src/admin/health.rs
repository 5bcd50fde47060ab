//! Whether the proxy has started, lives and is ready; set by whoever knows, read by the probes.
//!
//! | question | yes when |
//! |---|---|
//! | started | the listeners are up |
//! | alive | the heartbeat came within [`HEARTBEAT_LIMIT`]: of the runtime, and of every relay thread |
//! | ready | started, not draining, and at least one endpoint has a valid credential |
//!
//! Readiness stays "yes" at the limit of connections (the clients being served would suffer from the traffic's
//! going elsewhere, since a sidecar has no elsewhere), and while an endpoint sleeps.

use std::{
    borrow::Cow,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

/// Without a heartbeat for this long the process is not alive.
pub const HEARTBEAT_LIMIT: Duration = Duration::from_mins(1);
/// How often the heart beats.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(5);
/// Stands for "no heartbeat yet".
const NEVER: u64 = u64::MAX;

/// Says whether any endpoint has a valid credential, and if not, why. Called at each probe: it must neither block nor
/// ask anybody.
pub type CredentialCheck = dyn Fn() -> Result<(), String> + Send + Sync;

/// The answer to one question about health.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// What stands against it; empty when all is well.
    pub reasons: Vec<Cow<'static, str>>,
}

impl Verdict {
    /// Whether all is well.
    pub fn is_ok(&self) -> bool {
        self.reasons.is_empty()
    }
}

/// What the probes are told.
pub struct Health {
    is_started: AtomicBool,
    is_draining: AtomicBool,
    credential: Box<CredentialCheck>,
    origin: Instant,
    /// Milliseconds from `origin` to the last heartbeat.
    last_beat: AtomicU64,
}

impl Health {
    /// Not started, not draining, and with no heartbeat to judge by until [`beat`](Self::beat) runs.
    pub fn new(credential: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self {
            is_started: AtomicBool::new(false),
            is_draining: AtomicBool::new(false),
            credential: Box::new(credential),
            origin: Instant::now(),
            last_beat: AtomicU64::new(NEVER),
        }
    }

    /// The listeners are up.
    pub fn set_started(&self) {
        self.is_started.store(true, Ordering::Release);
    }

    /// New clients are sent away from now on.
    pub fn set_draining(&self) {
        self.is_draining.store(true, Ordering::Release);
    }

    /// Beats until `stop`, as long as `all_respond` returns; run it on the runtime that logs clients in. Cancel safe.
    pub async fn beat<R: Future<Output = ()>>(
        &self,
        stop: &CancellationToken,
        all_respond: impl Fn() -> R,
    ) {
        let mut ticks = interval(HEARTBEAT_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let _stopped = stop
            .run_until_cancelled(async {
                loop {
                    ticks.tick().await;
                    all_respond().await;
                    self.last_beat.store(self.millis(), Ordering::Relaxed);
                }
            })
            .await;
        // A runtime on its way out is not a dead one.
        self.last_beat.store(NEVER, Ordering::Relaxed);
    }

    /// For `/startup`.
    pub fn startup(&self) -> Verdict {
        let mut verdict = Verdict::default();
        if !self.is_started.load(Ordering::Acquire) {
            verdict.reasons.push("proxy is not started".into());
        }
        verdict
    }

    /// For `/liveness`.
    pub fn liveness(&self) -> Verdict {
        let last = self.last_beat.load(Ordering::Relaxed);
        let silence = Duration::from_millis(self.millis().saturating_sub(last));
        let mut verdict = Verdict::default();
        if last != NEVER && silence > HEARTBEAT_LIMIT {
            verdict
                .reasons
                .push(format!("no heartbeat for {} s", silence.as_secs()).into());
        }
        verdict
    }

    /// For `/readiness`.
    pub fn readiness(&self) -> Verdict {
        let mut verdict = self.startup();
        if self.is_draining.load(Ordering::Acquire) {
            verdict.reasons.push("proxy is shutting down".into());
        }
        if let Err(reason) = (self.credential)() {
            verdict.reasons.push(reason.into());
        }
        verdict
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(NEVER - 1)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::{pending, ready},
        sync::{Arc, Mutex},
    };

    use tokio::time::{advance, timeout};

    use super::*;

    #[test]
    fn ready_needs_listeners_a_credential_and_no_shutdown() {
        let credential = Arc::new(Mutex::new(Err("no valid credential yet".to_owned())));
        let seen = Arc::clone(&credential);
        let health = Health::new(move || seen.lock().unwrap().clone());
        assert_eq!(health.startup().reasons, ["proxy is not started"]);
        assert_eq!(
            health.readiness().reasons,
            ["proxy is not started", "no valid credential yet"]
        );

        health.set_started();
        assert!(health.startup().is_ok());
        assert_eq!(health.readiness().reasons, ["no valid credential yet"]);

        *credential.lock().unwrap() = Ok(());
        assert!(health.readiness().is_ok());

        health.set_draining();
        assert_eq!(health.readiness().reasons, ["proxy is shutting down"]);
        assert!(health.startup().is_ok() && health.liveness().is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_that_stands_still_for_a_minute_is_not_alive() {
        let health = Health::new(|| Ok(()));
        assert!(health.liveness().is_ok(), "nothing to judge by yet");
        let stop = CancellationToken::new();
        timeout(Duration::from_secs(200), health.beat(&stop, || ready(())))
            .await
            .unwrap_err();
        assert!(health.liveness().is_ok());

        // The clock moves on, and nobody runs the heart.
        advance(HEARTBEAT_LIMIT + Duration::from_millis(1)).await;
        assert_eq!(health.liveness().reasons, ["no heartbeat for 60 s"]);

        // It runs, but somebody does not respond.
        timeout(Duration::from_secs(1), health.beat(&stop, pending::<()>))
            .await
            .unwrap_err();
        assert!(!health.liveness().is_ok());

        stop.cancel();
        health.beat(&stop, || ready(())).await;
        assert!(health.liveness().is_ok(), "an orderly end is not a death");
    }
}
