//! Startup, liveness and readiness of the proxy.
//!
//! | probe | succeeds when |
//! |---|---|
//! | startup | the listeners are up |
//! | liveness | every runtime has answered the last heartbeat, or was sent it less than a minute ago |
//! | readiness | started, not draining, and at least one endpoint has a valid credential |
//!
//! Readiness does not fail at the connection limit: a sidecar's traffic has nowhere else to go, so that a failure would
//! only end the clients being served. Nor does it fail while an endpoint sleeps.

use std::{
    borrow::Cow,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

/// Liveness fails when a heartbeat takes longer than this.
const HEARTBEAT_LIMIT: Duration = Duration::from_mins(1);
/// In place of a time: no heartbeat is outstanding.
const NONE: u64 = u64::MAX;

/// Returns why no endpoint has a valid credential, if so. Runs at each probe, so it must neither block nor send anything.
type CredentialCheck = dyn Fn() -> Result<(), String> + Send + Sync;

/// The result of one probe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Why the probe fails; empty on success.
    pub reasons: Vec<Cow<'static, str>>,
}

impl Verdict {
    /// Whether the probe succeeds.
    pub fn is_ok(&self) -> bool {
        self.reasons.is_empty()
    }
}

/// The state behind the probes.
pub struct Health {
    is_started: AtomicBool,
    is_draining: AtomicBool,
    // A function, so that this module depends on no credential.
    credential: Box<CredentialCheck>,
    origin: Instant,
    /// When the outstanding heartbeat was requested, in milliseconds since `origin`.
    requested: AtomicU64,
    request: Notify,
    is_beating: AtomicBool,
}

impl Health {
    /// Not started and not draining; alive until [`beat`](Self::beat) runs.
    pub fn new(credential: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self {
            is_started: AtomicBool::new(false),
            is_draining: AtomicBool::new(false),
            credential: Box::new(credential),
            origin: Instant::now(),
            requested: AtomicU64::new(NONE),
            request: Notify::new(),
            is_beating: AtomicBool::new(false),
        }
    }

    /// Records that the listeners are up.
    pub fn set_started(&self) {
        self.is_started.store(true, Ordering::Release);
    }

    /// Records that new clients are refused.
    pub fn set_draining(&self) {
        self.is_draining.store(true, Ordering::Release);
    }

    /// Answers each requested heartbeat once `all_respond` returns, until `stop`. Without probes it never wakes the process.
    /// Cancel safe.
    pub async fn beat<R: Future<Output = ()>>(
        &self,
        stop: &CancellationToken,
        all_respond: impl Fn() -> R,
    ) {
        self.is_beating.store(true, Ordering::Release);
        let _stopped = stop
            .run_until_cancelled(async {
                loop {
                    self.request.notified().await;
                    all_respond().await;
                    // After all responses, so that a runtime that hangs leaves the time in place.
                    self.requested.store(NONE, Ordering::Release);
                }
            })
            .await;
        // A runtime that shuts down is alive.
        self.is_beating.store(false, Ordering::Release);
    }

    /// The startup probe.
    pub fn startup(&self) -> Verdict {
        let mut verdict = Verdict::default();
        if !self.is_started.load(Ordering::Acquire) {
            verdict.reasons.push("proxy is not started".into());
        }
        verdict
    }

    /// The liveness probe: judges the outstanding heartbeat and requests another.
    pub fn liveness(&self) -> Verdict {
        let mut verdict = Verdict::default();
        if !self.is_beating.load(Ordering::Acquire) {
            return verdict;
        }
        let now = self.millis();
        // An outstanding heartbeat counts from its first request.
        let since =
            match self
                .requested
                .compare_exchange(NONE, now, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => now,
                Err(since) => since,
            };
        // After the time is stored: otherwise an answer could come first, and the time would stay for the next probe.
        self.request.notify_one();
        let silence = Duration::from_millis(now.saturating_sub(since));
        if silence > HEARTBEAT_LIMIT {
            verdict
                .reasons
                .push(format!("no heartbeat for {} s", silence.as_secs()).into());
        }
        verdict
    }

    /// The readiness probe.
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
        // Below `NONE`, which means that no heartbeat is outstanding.
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
    fn readiness_needs_listeners_a_credential_and_no_shutdown() {
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
    async fn liveness_fails_when_a_runtime_blocks_for_a_minute() {
        let health = Health::new(|| Ok(()));
        assert!(health.liveness().is_ok(), "no heartbeat yet");
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
        // Without probes there is no heartbeat to miss.
        advance(2 * HEARTBEAT_LIMIT).await;
        assert!(health.liveness().is_ok());

        // The clock moves on, and no runtime answers.
        advance(HEARTBEAT_LIMIT).await;
        assert!(health.liveness().is_ok());
        advance(a_second).await;
        assert_eq!(health.liveness().reasons, ["no heartbeat for 61 s"]);

        // It runs, but another runtime does not respond.
        timeout(a_second, health.beat(&stop, pending::<()>))
            .await
            .unwrap_err();
        assert!(!health.liveness().is_ok());
        beats().await;
        assert!(health.liveness().is_ok(), "it has recovered");

        stop.cancel();
        health.beat(&stop, || ready(())).await;
        assert!(health.liveness().is_ok(), "a shutdown is no failure");
    }
}
