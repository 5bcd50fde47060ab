//! When to mint: pure arithmetic over one credential's lifetime and over the attempts made so far, and the state that
//! results.
//!
//! Nothing here waits, reads a clock or draws a random number: the refresher passes times and jitter in.

use std::{sync::Arc, time::Duration};

use jiff::{SignedDuration, Timestamp};
use tokio::time::Instant;

use super::{CallError, CallErrorKind, CredentialError, CredentialState, HOLD, is_held_for};
use crate::net::backoff::{Backoff, spread};

/// Least time between two successful mints, whatever the lifetime.
pub(super) const MIN_BETWEEN_MINTS: Duration = Duration::from_secs(5);
/// The random share of half the lifetime by which a refresh is early or late: a fleet must not mint in step.
const DUE_JITTER: f64 = 0.1;
/// Upper limit of the urgent window at the end of a lifetime.
const URGENT_WINDOW: SignedDuration = SignedDuration::from_mins(5);
/// The urgent window is at most the lifetime divided by this.
const URGENT_SHARE: i32 = 6;
/// With refresh on demand, a client gets a new credential if less than this is left, as with Cloud SQL Auth Proxy's
/// `--lazy-refresh`.
const LAZY_WINDOW: SignedDuration = SignedDuration::from_mins(4);
/// That window is at most the lifetime divided by this.
const LAZY_SHARE: i32 = 2;
/// Wait between retries while a credential is about to expire.
const URGENT_RETRY: Duration = Duration::from_secs(1);
/// After transient failures, without a waiting client.
const TRANSIENT: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
/// The same with a waiting client, or without a valid credential during the first [`EAGER_FAILURES`]: a proxy that starts
/// before its network serves within seconds once the network is up.
const TRANSIENT_AWAITED: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(3));
/// Failures in a row after which attempts without a waiting client become rare; about six minutes.
const EAGER_FAILURES: u32 = 120;
/// After failures that only a person can fix.
const REFUSED: Backoff = Backoff::new(Duration::from_secs(30), Duration::from_mins(5));
/// The same without a valid credential: readiness must recover without a client, since an orchestrator sends none before.
const REFUSED_MISSING: Backoff = Backoff::new(Duration::from_secs(30), Duration::from_mins(1));
/// The same with a waiting client, so that a corrected setting takes effect soon.
const REFUSED_AWAITED: Backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(30));
/// After a response that is no better than the current credential, as from a cache on the other side.
const UNCHANGED: Backoff = Backoff::new(MIN_BETWEEN_MINTS, Duration::from_mins(1));
/// Upper limit of `Retry-After`: no response of the other side may stop the attempts for good.
const RETRY_AFTER_MOST: Duration = Duration::from_mins(10);
/// A waiting client causes an attempt this long after the last one, whatever `Retry-After` requests: after a limit is
/// lifted, clients wait for seconds, not minutes.
const RETRY_AFTER_AWAITED_MOST: Duration = Duration::from_secs(15);

/// The wall-clock milestones of one credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lifetime {
    pub(super) due: Timestamp,
    pub(super) urgent: Timestamp,
    /// With refresh on demand: from when on a login waits for a new one.
    pub(super) lazy_due: Timestamp,
    pub(super) expires: Timestamp,
}

impl Lifetime {
    /// `jitter` lies in -1..=1 and moves the due time within its random share.
    pub(super) fn new(minted_at: Timestamp, expires: Timestamp, jitter: f64) -> Self {
        let whole = expires.duration_since(minted_at).max(SignedDuration::ZERO);
        let before = |left| expires.saturating_sub(left).unwrap_or(expires);
        let urgent = before((whole / URGENT_SHARE).min(URGENT_WINDOW));
        // `clamp` keeps a NaN, and `mul_f64` panics on it.
        let jitter = if jitter.is_finite() { jitter } else { 0.0 };
        let half = (whole / 2).mul_f64(1.0 - DUE_JITTER * jitter.clamp(-1.0, 1.0));
        Self {
            // Before `urgent` for any lifetime (0.55 < 5/6); `min` keeps it so if the constants change.
            due: before(half).min(urgent),
            urgent,
            lazy_due: before((whole / LAZY_SHARE).min(LAZY_WINDOW)),
            expires,
        }
    }

    pub(super) fn state(&self, now: Timestamp) -> CredentialState {
        if now >= self.expires {
            CredentialState::Expired
        } else if now >= self.urgent {
            CredentialState::Urgent
        } else if now >= self.due {
            CredentialState::Due
        } else {
            CredentialState::Fresh
        }
    }
}

/// The published state of the credential; holds no secret.
#[derive(Clone, Debug)]
pub struct CredentialStatus {
    /// The generation of the current credential; 0 before the first.
    pub generation: u64,
    /// When the current credential was minted.
    pub minted_at: Option<Timestamp>,
    /// When it expires; `None` before the first and for one that never does.
    pub expires_at: Option<Timestamp>,
    /// Its state.
    pub state: CredentialState,
    /// Whether a new one is minted on demand only.
    pub is_lazy: bool,
    /// Why the last attempt failed; `None` after a success.
    pub last_error: Option<Arc<CallError>>,
    /// When the next attempt is planned.
    pub next_attempt: Option<Timestamp>,
    /// The milestones of the current credential.
    pub(super) lifetime: Option<Lifetime>,
    /// The number of attempts that have ended.
    pub(super) settled: u64,
    /// Whether an attempt is in progress.
    pub(super) in_flight: bool,
    /// The earliest attempt that a waiting client can cause.
    pub(super) opens_at: Instant,
}

impl CredentialStatus {
    /// Whether logins can work: now, or after a mint on demand.
    pub fn is_ready(&self) -> bool {
        // On demand, an expired credential is normal between clients: the next one has another minted.
        let is_mintable = self.is_lazy && self.generation > 0 && self.last_error.is_none();
        self.state.is_valid() || is_mintable
    }

    /// Whether a login must wait for a new one, where credentials are minted on demand only.
    pub(super) fn is_lazy_due_at(&self, now: Timestamp) -> bool {
        self.lifetime
            .is_some_and(|lifetime| now >= lifetime.lazy_due)
    }

    /// When its refresh is due; `None` if it never expires.
    pub fn due_at(&self) -> Option<Timestamp> {
        self.lifetime.map(|lifetime| lifetime.due)
    }

    /// When its refresh becomes urgent.
    pub fn urgent_at(&self) -> Option<Timestamp> {
        self.lifetime.map(|lifetime| lifetime.urgent)
    }

    pub(super) fn state_at(&self, now: Timestamp) -> CredentialState {
        match (&self.lifetime, self.generation) {
            (_, 0) => CredentialState::None,
            (Some(lifetime), _) => lifetime.state(now),
            (None, _) => CredentialState::Fresh,
        }
    }

    /// The last error, if no client waits for the attempt after it.
    pub(super) fn refusal(&self) -> Option<&Arc<CallError>> {
        self.last_error
            .as_ref()
            .filter(|error| !is_held_for(error.kind, error.retry_after))
    }

    /// Refuses a client at once if the last failure lasts and no attempt is possible soon.
    pub(super) fn refuse_if_hopeless(&self, deadline: Instant) -> Result<(), CredentialError> {
        match self.refusal() {
            Some(error) if !self.is_open_by(deadline) => {
                Err(CredentialError::Failed(Arc::clone(error)))
            }
            _ => Ok(()),
        }
    }

    /// Whether an attempt is in progress, or possible soon enough for a client to wait.
    pub(super) fn is_open_by(&self, deadline: Instant) -> bool {
        self.in_flight || self.opens_at <= deadline.min(Instant::now() + HOLD)
    }
}

/// The inputs of the next decision: the credential's state and the demand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    pub(super) state: CredentialState,
    /// Until the due time, for a fresh credential that has one.
    pub(super) due_in: Option<Duration>,
    /// When a refresh forced by a rejected login may start.
    pub(super) forced_at: Option<Instant>,
    /// Whether a client waits.
    pub(super) awaited: bool,
}

/// The earliest next attempt in each situation, set by the past attempts.
#[derive(Debug)]
pub(crate) struct Pace {
    failures: u32,
    /// With a valid credential.
    relaxed: Instant,
    /// Without a valid credential.
    missing: Instant,
    /// With one that is about to expire.
    urgent: Instant,
    /// With a waiting client.
    awaited: Instant,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self::all(0, now)
    }

    fn all(failures: u32, at: Instant) -> Self {
        Self {
            failures,
            relaxed: at,
            missing: at,
            urgent: at,
            awaited: at,
        }
    }

    /// Records a mint whose credential was published.
    pub(super) fn succeeded(&mut self, now: Instant) {
        *self = Self::all(0, now + MIN_BETWEEN_MINTS);
    }

    /// Records a mint whose credential is no better than the current one. `jitter` yields values in -1..=1.
    pub(super) fn unchanged(&mut self, now: Instant, mut jitter: impl FnMut() -> f64) {
        let failures = self.failures.saturating_add(1);
        let wait = UNCHANGED.nth(failures, jitter()).max(MIN_BETWEEN_MINTS);
        *self = Self {
            awaited: now + MIN_BETWEEN_MINTS,
            ..Self::all(failures, now + wait)
        };
    }

    /// Records a failed mint. `jitter` yields values in -1..=1.
    pub(crate) fn failed(
        &mut self,
        now: Instant,
        kind: CallErrorKind,
        retry_after: Option<Duration>,
        mut jitter: impl FnMut() -> f64,
    ) {
        self.failures = self.failures.saturating_add(1);
        let least = retry_after.unwrap_or_default().min(RETRY_AFTER_MOST);
        let (relaxed, missing, awaited) = if !kind.is_transient() {
            (REFUSED, REFUSED_MISSING, REFUSED_AWAITED)
        } else if self.failures <= EAGER_FAILURES {
            (TRANSIENT, TRANSIENT_AWAITED, TRANSIENT_AWAITED)
        } else {
            (TRANSIENT, TRANSIENT, TRANSIENT_AWAITED)
        };
        let relaxed = relaxed.nth(self.failures, jitter());
        let missing = missing.nth(self.failures, jitter());
        let awaited = awaited.nth(self.failures, jitter());
        // A refusal does not pass by itself, however little time is left.
        let urgent = if kind.is_transient() {
            spread(URGENT_RETRY, jitter())
        } else {
            relaxed
        };
        self.relaxed = now + relaxed.max(least);
        self.missing = now + missing.max(least);
        self.urgent = now + urgent.max(least);
        self.awaited = now + awaited.max(least.min(RETRY_AFTER_AWAITED_MOST));
    }

    /// The earliest attempt with a waiting client.
    pub(crate) fn awaited(&self) -> Instant {
        self.awaited
    }

    /// The next attempt without a valid credential.
    pub(crate) fn next_without(&self, is_awaited: bool) -> Instant {
        if is_awaited {
            // Each has a jitter of its own, so that `awaited` may be the later one.
            self.awaited.min(self.missing)
        } else {
            self.missing
        }
    }

    /// When to mint next; `None`: not before something changes.
    pub(super) fn next_attempt(&self, now: Instant, need: &Need) -> Option<Instant> {
        let by_demand = if need.awaited {
            self.awaited.min(self.relaxed)
        } else {
            self.relaxed
        };
        let scheduled = match need.state {
            CredentialState::None | CredentialState::Expired => {
                Some(self.next_without(need.awaited).max(now))
            }
            CredentialState::Urgent => Some(self.urgent.min(by_demand).max(now)),
            // Demand does not count: with a valid credential a client waits only after a rejection: `forced`.
            CredentialState::Due => Some(self.relaxed.max(now)),
            CredentialState::Fresh => need.due_in.map(|due_in| self.relaxed.max(now + due_in)),
        };
        let forced = need.forced_at.map(|at| at.max(by_demand).max(now));
        [scheduled, forced].into_iter().flatten().min()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + second).unwrap()
    }

    #[test]
    fn a_lifetime_has_its_milestones() {
        let hour = Lifetime::new(at(0), at(3600), 0.0);
        assert_eq!((hour.due, hour.urgent), (at(1800), at(3300)));
        let minute = Lifetime::new(at(0), at(60), 0.0);
        assert_eq!((minute.due, minute.urgent), (at(30), at(50)));
        assert_eq!((hour.lazy_due, minute.lazy_due), (at(3360), at(30)));
        assert_eq!(minute.state(at(29)), CredentialState::Fresh);
        assert_eq!(minute.state(at(30)), CredentialState::Due);
        assert_eq!(minute.state(at(50)), CredentialState::Urgent);
        assert_eq!(minute.state(at(60)), CredentialState::Expired);
    }

    #[test]
    fn jitter_moves_the_due_time_by_a_tenth_of_the_half_life() {
        assert_eq!(Lifetime::new(at(0), at(3600), -1.0).due, at(1620));
        assert_eq!(Lifetime::new(at(0), at(3600), 1.0).due, at(1980));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_retried_slowly_and_sooner_with_a_waiting_client() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        pace.failed(now, CallErrorKind::Refused, None, || 0.0);
        let idle = Need {
            state: CredentialState::None,
            due_in: None,
            forced_at: None,
            awaited: false,
        };
        assert_eq!(
            pace.next_attempt(now, &idle),
            Some(now + Duration::from_secs(30))
        );
        let awaited = Need {
            awaited: true,
            ..idle
        };
        assert_eq!(
            pace.next_attempt(now, &awaited),
            Some(now + Duration::from_secs(5))
        );
        for _ in 0..20 {
            pace.failed(now, CallErrorKind::Refused, None, || 0.0);
        }
        assert_eq!(
            pace.next_attempt(now, &idle),
            Some(now + Duration::from_mins(1))
        );
        assert_eq!(
            pace.next_attempt(now, &awaited),
            Some(now + Duration::from_secs(30))
        );
        let valid = Need {
            state: CredentialState::Due,
            ..idle
        };
        assert_eq!(
            pace.next_attempt(now, &valid),
            Some(now + Duration::from_mins(5))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_credential_attempts_are_seconds_apart_for_minutes_and_rare_afterwards() {
        let start = Instant::now();
        let (mut now, mut pace) = (start, Pace::new(start));
        let mut attempt = |now: &mut Instant| {
            pace.failed(*now, CallErrorKind::Unavailable, None, || 1.0);
            let wait = pace.next_without(false) - *now;
            *now += wait;
            wait
        };
        while now - start < Duration::from_mins(5) {
            let wait = attempt(&mut now);
            assert!(wait <= Duration::from_millis(4500), "{wait:?}");
        }
        for _ in 0..EAGER_FAILURES {
            attempt(&mut now);
        }
        assert_eq!(attempt(&mut now), Duration::from_secs(45));
    }

    #[tokio::test(start_paused = true)]
    async fn a_credential_without_expiry_is_refreshed_only_when_forced() {
        let now = Instant::now();
        let need = Need {
            state: CredentialState::Fresh,
            due_in: None,
            forced_at: None,
            awaited: true,
        };
        assert_eq!(Pace::new(now).next_attempt(now, &need), None);
        let forced = Need {
            forced_at: Some(now),
            ..need
        };
        assert_eq!(Pace::new(now).next_attempt(now, &forced), Some(now));
    }

    proptest! {
        #[test]
        fn the_milestones_are_in_order_for_any_lifetime(seconds in 0_i64..400_000, jitter in -1.0..=1.0_f64) {
            let life = Lifetime::new(at(0), at(seconds), jitter);
            prop_assert!(life.due >= at(0));
            prop_assert!(life.due <= life.urgent);
            prop_assert!(life.urgent <= life.expires);
            if seconds >= 60 {
                let due = life.due.duration_since(at(0)).as_secs_f64();
                #[expect(clippy::cast_precision_loss, reason = "small numbers")]
                let half = seconds as f64 / 2.0;
                prop_assert!(due >= half * 0.89 && due <= half * 1.11, "{due} of {half}");
            }
        }

        #[test]
        fn no_attempt_follows_another_without_a_pause(
            kinds in proptest::collection::vec((0_u8..5, 0_u64..4000, -1.0..=1.0_f64), 1..60),
            awaited: bool,
            state in 0_u8..4,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let _guard = runtime.enter();
            let mut now = Instant::now();
            let mut pace = Pace::new(now);
            let state = [CredentialState::None, CredentialState::Due, CredentialState::Urgent, CredentialState::Expired]
                [usize::from(state)];
            for (kind, retry_after, jitter) in kinds {
                let retry_after = Duration::from_secs(retry_after);
                match kind {
                    0 => pace.succeeded(now),
                    1 => pace.unchanged(now, || jitter),
                    2 => pace.failed(now, CallErrorKind::Unavailable, None, || jitter),
                    3 => pace.failed(now, CallErrorKind::RateLimited, Some(retry_after), || jitter),
                    _ => pace.failed(now, CallErrorKind::Refused, None, || jitter),
                }
                let need = Need { state, due_in: None, forced_at: Some(now), awaited };
                let next = pace.next_attempt(now, &need).unwrap();
                let pause = next - now;
                prop_assert!(pause >= Duration::from_millis(500), "{pause:?}");
                prop_assert!(pause <= RETRY_AFTER_MOST, "{pause:?}");
                if kind < 2 {
                    prop_assert!(pause >= MIN_BETWEEN_MINTS);
                }
                if kind == 3 && awaited {
                    prop_assert!(pause >= retry_after.min(RETRY_AFTER_AWAITED_MOST));
                } else if kind == 3 {
                    prop_assert!(pause >= retry_after.min(RETRY_AFTER_MOST));
                }
                now = next;
            }
        }
    }
}
