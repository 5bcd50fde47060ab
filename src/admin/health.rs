//! Whether the proxy has started, lives and is ready; set by whoever knows, read by the probes.
//!
//! | question | yes when |
//! |---|---|
//! | started | the listeners are up |
//! | alive | the runtime and every relay thread have answered, or it is not [`HEARTBEAT_LIMIT`] yet since they were asked |
//! | ready | started, not draining, and at least one endpoint has a valid credential |
//!
//! Readiness stays "yes" at the limit of connections (the clients being served would suffer from the traffic's
//! going elsewhere, since a sidecar has no elsewhere), and while an endpoint sleeps.

use std::{
    borrow::Cow,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

/// A heartbeat that was asked for and does not come within this: the process is not alive.
pub const HEARTBEAT_LIMIT: Duration = Duration::from_mins(1);
/// Stands for "no heartbeat is awaited".
const NONE: u64 = u64::MAX;

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
    /// Milliseconds from `origin` to when the heartbeat was asked for that has not come yet.
    asked: AtomicU64,
    ask: Notify,
    has_heart: AtomicBool,
}

impl Health {
    /// Not started, not draining, and with no heart to judge by until [`beat`](Self::beat) runs.
    pub fn new(credential: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self {
            is_started: AtomicBool::new(false),
            is_draining: AtomicBool::new(false),
            credential: Box::new(credential),
            origin: Instant::now(),
            asked: AtomicU64::new(NONE),
            ask: Notify::new(),
            has_heart: AtomicBool::new(false),
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

    /// Beats until `stop` whenever it is asked to, as long as `all_respond` returns; run it on the runtime that logs clients
    /// in. A process that nobody looks at is not woken for it. Cancel safe.
    pub async fn beat<R: Future<Output = ()>>(
        &self,
        stop: &CancellationToken,
        all_respond: impl Fn() -> R,
    ) {
        self.has_heart.store(true, Ordering::Release);
        let _stopped = stop
            .run_until_cancelled(async {
                loop {
                    self.ask.notified().await;
                    all_respond().await;
                    self.asked.store(NONE, Ordering::Release);
                }
            })
            .await;
        // A runtime on its way out is not a dead one.
        self.has_heart.store(false, Ordering::Release);
    }

    /// For `/startup`.
    pub fn startup(&self) -> Verdict {
        let mut verdict = Verdict::default();
        if !self.is_started.load(Ordering::Acquire) {
            verdict.reasons.push("proxy is not started".into());
        }
        verdict
    }

    /// For `/liveness`: what has come of the heartbeat that was asked for before, and asks for another.
    pub fn liveness(&self) -> Verdict {
        let mut verdict = Verdict::default();
        if !self.has_heart.load(Ordering::Acquire) {
            return verdict;
        }
        let now = self.millis();
        // The one that is awaited already counts from when it was first asked for.
        let since =
            match self
                .asked
                .compare_exchange(NONE, now, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => now,
                Err(since) => since,
            };
        self.ask.notify_one();
        let silence = Duration::from_millis(now.saturating_sub(since));
        if silence > HEARTBEAT_LIMIT {
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
        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(NONE - 1)
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
        let a_second = Duration::from_secs(1);
        let beats = async || {
            timeout(a_second, health.beat(&stop, || ready(())))
                .await
                .unwrap_err();
        };
        beats().await;
        assert!(health.liveness().is_ok());
        beats().await;
        // Nobody has asked for long, and there is nothing wrong with that.
        advance(2 * HEARTBEAT_LIMIT).await;
        assert!(health.liveness().is_ok());

        // The clock moves on, and nobody runs the heart.
        advance(HEARTBEAT_LIMIT).await;
        assert!(health.liveness().is_ok());
        advance(a_second).await;
        assert_eq!(health.liveness().reasons, ["no heartbeat for 61 s"]);

        // It runs, but somebody does not respond.
        timeout(a_second, health.beat(&stop, pending::<()>))
            .await
            .unwrap_err();
        assert!(!health.liveness().is_ok());
        beats().await;
        assert!(health.liveness().is_ok(), "it has found its way back");

        stop.cancel();
        health.beat(&stop, || ready(())).await;
        assert!(health.liveness().is_ok(), "an orderly end is not a death");
    }
}
