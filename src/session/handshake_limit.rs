//! Limits the unfinished handshakes of one endpoint, without letting a flood of them delay a client that completes its
//! own.
//!
//! A new connection waits only while all permits are held by handshakes too young to be evicted. Evicted is the oldest
//! unfinished handshake of the source (address or uid) that has the most. A client that sends its startup message right
//! after it has connected, as all drivers do, is therefore served, however many others send nothing.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv6Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::status::Peer;

/// Up to this number, only the login timeout ends unfinished handshakes.
const MAX_WITHOUT_EVICTION: usize = 256;
/// Beyond [`MAX_WITHOUT_EVICTION`] a handshake is never evicted before this.
const MIN_TIME: Duration = Duration::from_secs(2);
/// The same when three quarters of the capacity are used: at least 1,000 handshakes a second are begun then.
const MIN_TIME_UNDER_PRESSURE: Duration = Duration::from_millis(250);
/// Time for an evicted client whose startup message waits to be read: after a standstill of the machine all handshakes
/// are old.
const EVICTION_GRACE: Duration = Duration::from_millis(10);
/// The interval of log lines about evictions.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The unfinished handshakes of one endpoint; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct HandshakeLimiter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    capacity: usize,
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Handshakes that hold a permit, evicted ones included.
    held: usize,
    /// Handshakes that have not been evicted.
    remaining: usize,
    /// Those by source, the oldest first.
    sources: HashMap<Source, BTreeMap<u64, UnfinishedHandshake>>,
    unlogged: UnloggedEvictions,
}

#[derive(Debug)]
struct UnfinishedHandshake {
    since: Instant,
    evicted: CancellationToken,
}

/// Evictions that are not logged yet.
#[derive(Debug, Default)]
struct UnloggedEvictions {
    count: u64,
    logged: Option<Instant>,
}

/// The unit that evictions are balanced between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    /// An IPv4 address, or the network of an IPv6 address that one host may choose from.
    Address(IpAddr),
    /// A user of this machine.
    Uid(u32),
}

impl From<Peer> for Source {
    fn from(peer: Peer) -> Self {
        match peer {
            Peer::Unix { uid, .. } => Self::Uid(uid),
            Peer::Tcp(address) => Self::Address(match address.ip().to_canonical() {
                IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
                ip @ IpAddr::V4(_) => ip,
            }),
        }
    }
}

impl HandshakeLimiter {
    /// A limiter of `capacity` unfinished handshakes.
    pub(crate) fn new(capacity: usize) -> Self {
        Self(Arc::new(Inner {
            capacity,
            state: Mutex::default(),
            freed: Notify::new(),
        }))
    }

    /// A permit for one more handshake. Waits only while the capacity is used up by handshakes too young to be evicted.
    /// Cancel safe.
    pub(crate) async fn enter(&self, peer: Peer) -> HandshakePermit {
        loop {
            // Before the attempt: `notify_waiters` wakes futures that exist, so no permit freed meanwhile is missed.
            let freed = self.0.freed.notified();
            let (permit, next_eviction) = self.try_enter(peer.into());
            if let Some(permit) = permit {
                return permit;
            }
            tokio::select! {
                () = freed => {}
                () = sleep_until(next_eviction) => {}
            }
        }
    }

    /// A permit, or when to look again at the latest.
    fn try_enter(&self, source: Source) -> (Option<HandshakePermit>, Instant) {
        let now = Instant::now();
        let mut state = self.state();
        // First, as evictions begin long before the capacity is used up.
        let next_eviction = state.evict(now, self.0.capacity);
        if state.held >= self.0.capacity {
            return (None, next_eviction);
        }
        let number = state.next;
        state.next = number.wrapping_add(1);
        state.held += 1;
        state.remaining += 1;
        let evicted = CancellationToken::new();
        let handshake = UnfinishedHandshake {
            since: now,
            evicted: evicted.clone(),
        };
        state
            .sources
            .entry(source)
            .or_default()
            .insert(number, handshake);
        let permit = HandshakePermit {
            limiter: self.clone(),
            source,
            number,
            evicted,
        };
        (Some(permit), next_eviction)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Evicts as many as are too many and old enough; returns when the next will be old enough.
    fn evict(&mut self, now: Instant, capacity: usize) -> Instant {
        loop {
            let min_time = if self.remaining > capacity / 4 * 3 {
                MIN_TIME_UNDER_PRESSURE
            } else if self.remaining > MAX_WITHOUT_EVICTION {
                MIN_TIME
            } else {
                // Those evicted already are about to end.
                return now + MIN_TIME;
            };
            let Some(source) = self.largest_source() else {
                return now + MIN_TIME;
            };
            let Some(oldest) = self
                .sources
                .get(&source)
                .and_then(|those| those.first_key_value())
            else {
                return now + MIN_TIME;
            };
            let (number, due) = (*oldest.0, oldest.1.since + min_time);
            if due > now {
                return due;
            }
            if let Some(handshake) = self.remove(source, number) {
                handshake.evicted.cancel();
                self.unlogged.one_more(now);
            }
        }
    }

    /// The source with the most handshakes.
    fn largest_source(&self) -> Option<Source> {
        // By number and not by age, so that a flood does not push out the few handshakes of other sources.
        let (source, _) = self.sources.iter().max_by_key(|(_, those)| those.len())?;
        Some(*source)
    }

    /// Takes a handshake out of those that may be evicted, if it is among them.
    fn remove(&mut self, source: Source, number: u64) -> Option<UnfinishedHandshake> {
        let those = self.sources.get_mut(&source)?;
        let handshake = those.remove(&number)?;
        if those.is_empty() {
            self.sources.remove(&source);
        }
        self.remaining -= 1;
        Some(handshake)
    }
}

impl UnloggedEvictions {
    /// Counts it; logs at most one line per interval.
    fn one_more(&mut self, now: Instant) {
        self.count += 1;
        if self
            .logged
            .is_none_or(|logged| now.duration_since(logged) >= LOG_EVERY)
        {
            tracing::warn!(
                evicted = self.count,
                "many clients connect and send no startup message; the oldest are refused; hint: at debug level the log has their addresses"
            );
            *self = Self {
                count: 0,
                logged: Some(now),
            };
        }
    }
}

/// The permit of an unfinished handshake, returned when dropped.
#[derive(Debug)]
pub(crate) struct HandshakePermit {
    limiter: HandshakeLimiter,
    source: Source,
    number: u64,
    evicted: CancellationToken,
}

impl HandshakePermit {
    /// Returns once the handshake is to end in favor of newer ones. Cancel safe.
    pub(super) async fn evicted_after_grace(&self) {
        self.evicted.cancelled().await;
        sleep(EVICTION_GRACE).await;
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        let mut state = self.limiter.state();
        // Nothing for an evicted handshake, which counts in `held` only.
        state.remove(self.source, self.number);
        state.held -= 1;
        // Before the notification, so that a woken task does not wait for this lock.
        drop(state);
        self.limiter.0.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::time::{advance, timeout};

    use super::*;

    const CAPACITY: usize = 1024;

    fn peer(last: u8) -> Peer {
        Peer::Tcp(SocketAddr::from(([192, 0, 2, last], 1)))
    }

    async fn enter(limiter: &HandshakeLimiter, last: u8, count: usize) -> Vec<HandshakePermit> {
        let mut permits = Vec::new();
        for _ in 0..count {
            permits.push(limiter.enter(peer(last)).await);
        }
        permits
    }

    fn evicted(permits: &[HandshakePermit]) -> usize {
        let evicted = permits.iter().filter(|it| it.evicted.is_cancelled());
        evicted.count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_newer_handshake_evicts_the_oldest_and_not_before_its_time() {
        let limiter = HandshakeLimiter::new(CAPACITY);
        let first = enter(&limiter, 1, MAX_WITHOUT_EVICTION).await;
        advance(MIN_TIME * 10).await;
        let _second = enter(&limiter, 1, 1).await;
        assert_eq!(evicted(&first), 0, "not one too many");
        let _third = enter(&limiter, 1, 1).await;
        assert!(first[0].evicted.is_cancelled() && evicted(&first) == 1);

        let limiter = HandshakeLimiter::new(CAPACITY);
        let began = Instant::now();
        let permits = enter(&limiter, 1, MAX_WITHOUT_EVICTION * 2).await;
        assert_eq!((evicted(&permits), began.elapsed()), (0, Duration::ZERO));
        advance(MIN_TIME / 2).await;
        let late = enter(&limiter, 1, 1).await;
        assert_eq!(evicted(&permits), 0, "too young");
        advance(MIN_TIME / 2).await;
        let _later = enter(&limiter, 1, 1).await;
        // Down to the number that is left alone, the newest of all not among them yet.
        assert_eq!(
            (evicted(&permits), evicted(&late)),
            (MAX_WITHOUT_EVICTION + 1, 0)
        );
        drop((permits, late));
    }

    /// A flood that fills the capacity over and over holds the next one up for a moment only.
    #[tokio::test(start_paused = true)]
    async fn under_pressure_handshakes_end_sooner() {
        let limiter = HandshakeLimiter::new(CAPACITY);
        let flood = enter(&limiter, 1, CAPACITY).await;
        let began = Instant::now();
        let leaving = async {
            flood[0].evicted_after_grace().await;
            drop(flood);
        };
        let (_permit, ()) = tokio::join!(limiter.enter(peer(1)), leaving);
        let took = began.elapsed();
        assert!(took >= MIN_TIME_UNDER_PRESSURE, "{took:?}");
        assert!(took < MIN_TIME_UNDER_PRESSURE * 2, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn handshakes_of_the_largest_source_are_evicted() {
        let limiter = HandshakeLimiter::new(CAPACITY);
        let honest = enter(&limiter, 1, 10).await;
        advance(Duration::from_millis(1)).await;
        let flood = enter(&limiter, 2, MAX_WITHOUT_EVICTION * 2).await;
        advance(MIN_TIME).await;
        let _newer = enter(&limiter, 3, 1).await;
        assert_eq!(evicted(&honest), 0);
        assert_eq!(evicted(&flood), MAX_WITHOUT_EVICTION + 10);
    }

    #[tokio::test(start_paused = true)]
    async fn every_permit_is_returned() {
        let limiter = HandshakeLimiter::new(2);
        let permits = enter(&limiter, 1, 2).await;
        let entering = limiter.enter(peer(1));
        assert!(timeout(MIN_TIME / 100, entering).await.is_err());
        drop(permits);
        drop(enter(&limiter, 1, 2).await);
        let state = limiter.state();
        assert_eq!((state.held, state.remaining), (0, 0));
        assert!(state.sources.is_empty());
    }

    #[test]
    fn one_host_is_one_source() {
        let source = |ip: &str| Source::from(Peer::Tcp(SocketAddr::new(ip.parse().unwrap(), 7)));
        assert_eq!(source("2001:db8::1"), source("2001:db8::ffff:2"));
        assert_ne!(source("2001:db8::1"), source("2001:db8:0:1::1"));
        assert_eq!(source("::ffff:192.0.2.1"), source("192.0.2.1"));
        assert_ne!(source("192.0.2.1"), source("192.0.2.2"));
    }
}
