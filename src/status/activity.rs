//! What a session is doing: written by its relay, read by the status page and the console.

use std::sync::atomic::{AtomicU64, Ordering};

use enum_map::Enum;
use tokio::time::{Duration, Instant};

use crate::{
    protocol::requests::{Requests, TransactionStatus},
    telemetry::labels::PinReason,
};

/// What a session is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Activity {
    /// Not logged in yet: waits for the credential or the endpoint.
    Waiting,
    /// The server owes an answer.
    Active,
    /// Between transactions.
    Idle,
    /// In a transaction, waiting for the client.
    IdleInTransaction,
    /// The same in a failed transaction.
    IdleInFailedTransaction,
}

impl Activity {
    /// The name in `pg_stat_activity`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Active => "active",
            Self::Idle => "idle",
            Self::IdleInTransaction => "idle in transaction",
            Self::IdleInFailedTransaction => "idle in transaction (aborted)",
        }
    }

    fn code(self) -> u64 {
        match self {
            Self::Waiting => 0,
            Self::Active => 1,
            Self::Idle => 2,
            Self::IdleInTransaction => 3,
            Self::IdleInFailedTransaction => 4,
        }
    }

    fn from_code(code: u64) -> Self {
        match code {
            0 => Self::Waiting,
            1 => Self::Active,
            3 => Self::IdleInTransaction,
            4 => Self::IdleInFailedTransaction,
            _ => Self::Idle,
        }
    }
}

impl From<&Requests> for Activity {
    #[inline]
    fn from(requests: &Requests) -> Self {
        // First: the status is that of the last ReadyForQuery, which is out of date while the server works.
        if requests.is_owed() {
            return Self::Active;
        }
        match requests.status() {
            TransactionStatus::Idle => Self::Idle,
            TransactionStatus::InTransaction => Self::IdleInTransaction,
            TransactionStatus::Failed => Self::IdleInFailedTransaction,
        }
    }
}

/// A session's activity and byte counts. Written by one task without a lock, since that happens for every message.
#[derive(Debug)]
pub struct ActivityRecord {
    /// The registry's start, from which times are counted.
    origin: Instant,
    /// The activity in the lowest [`ACTIVITY_BITS`] bits, above them its start in milliseconds.
    // One word for both, so that a reader never combines an activity with the start of another.
    activity: AtomicU64,
    from_client: AtomicU64,
    from_server: AtomicU64,
    /// Why the session cannot part with its server connection in the same way: the number of the reason, above 0, and its start.
    pin: AtomicU64,
}

const ACTIVITY_BITS: u32 = 3;
const ACTIVITY_MASK: u64 = (1 << ACTIVITY_BITS) - 1;
const PIN_BITS: u32 = 6;
const PIN_MASK: u64 = (1 << PIN_BITS) - 1;

impl ActivityRecord {
    pub(crate) fn new(origin: Instant) -> Self {
        Self {
            origin,
            // The lowest bits are those of `Waiting`.
            activity: AtomicU64::new((micros(origin.elapsed()) / 1000) << ACTIVITY_BITS),
            from_client: AtomicU64::new(0),
            from_server: AtomicU64::new(0),
            pin: AtomicU64::new(0),
        }
    }

    /// Records why the session, at rest, cannot part with its server connection.
    pub(crate) fn pin(&self, reason: Option<PinReason>) {
        let code = reason.map_or(0, |reason| {
            u64::try_from(reason.into_usize() + 1).unwrap_or_default()
        });
        if self.pin.load(Ordering::Relaxed) & PIN_MASK != code {
            let since = (self.now() / 1000) << PIN_BITS;
            let pin = if code == 0 { 0 } else { since | code };
            self.pin.store(pin, Ordering::Relaxed);
        }
    }

    /// Why the session cannot part with its server connection, and since when, counted from the registry's start.
    pub(super) fn pinned(&self) -> Option<(PinReason, Duration)> {
        let value = self.pin.load(Ordering::Relaxed);
        let number = usize::try_from(value & PIN_MASK).ok()?.checked_sub(1)?;
        let reason = (number < PinReason::LENGTH).then(|| PinReason::from_usize(number))?;
        let since = Duration::from_millis(value >> PIN_BITS);
        Some((reason, since))
    }

    /// Records the activity and the bytes relayed so far: two stores, and a third with the time of [`now`](Self::now) only
    /// when the activity changes.
    #[inline]
    pub fn record(
        &self,
        activity: Activity,
        from_client: u64,
        from_server: u64,
        now: impl FnOnce() -> u64,
    ) {
        // Relaxed: each value is shown by itself, so that the order of the stores does not matter.
        self.from_client.store(from_client, Ordering::Relaxed);
        self.from_server.store(from_server, Ordering::Relaxed);
        // One task writes, so this load sees its own last store.
        if self.activity.load(Ordering::Relaxed) & ACTIVITY_MASK != activity.code() {
            let since = (now() / 1000) << ACTIVITY_BITS;
            self.activity
                .store(since | activity.code(), Ordering::Relaxed);
        }
    }

    /// Microseconds since the registry's start.
    // One conversion of what the clock reads, whatever it is used for.
    #[inline]
    pub fn now(&self) -> u64 {
        micros(self.origin.elapsed())
    }

    /// The activity, and its start counted from the registry's.
    pub(super) fn activity(&self) -> (Activity, Duration) {
        let value = self.activity.load(Ordering::Relaxed);
        (
            Activity::from_code(value & ACTIVITY_MASK),
            Duration::from_millis(value >> ACTIVITY_BITS),
        )
    }

    /// Bytes received from the client and from the server.
    pub(crate) fn bytes(&self) -> [u64; 2] {
        [&self.from_client, &self.from_server].map(|bytes| bytes.load(Ordering::Relaxed))
    }
}

fn micros(duration: Duration) -> u64 {
    // Wraps after 500,000 years; `as_micros` has 128 bits.
    let seconds = duration.as_secs().wrapping_mul(1_000_000);
    seconds.wrapping_add(duration.subsec_micros().into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::frame::Seen as Frame;

    #[test]
    fn activity_follows_from_the_requests_in_flight() {
        let mut requests = Requests::new();
        assert_eq!(Activity::from(&requests), Activity::Idle);
        requests.from_client(Frame::Message { tag: b'P' });
        assert_eq!(Activity::from(&requests), Activity::Active);
        requests.from_client(Frame::Message { tag: b'S' });
        for (status, activity) in [
            (b'T', Activity::IdleInTransaction),
            (b'E', Activity::IdleInFailedTransaction),
            (b'I', Activity::Idle),
        ] {
            requests.from_server(Frame::Status(status));
            assert_eq!(Activity::from(&requests), activity);
        }
    }
}
