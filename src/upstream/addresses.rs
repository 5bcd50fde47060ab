//! A cache of an endpoint's addresses.
//!
//! A pool that opens twenty connections causes one resolution. If resolution fails or is slow, stale addresses are used;
//! that is safe because TLS verifies the host name. Addresses that accept no connection are dropped.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

use super::failure::Failure;

/// How long resolved addresses are fresh.
const FRESH: Duration = Duration::from_secs(5);
/// How long stale addresses may be used; RFC 8767 allows days.
const MAX_AGE: Duration = Duration::from_hours(1);
/// How long resolution may take while there are stale addresses; RFC 8767 proposes 1.8 s.
const STALE_TIMEOUT: Duration = Duration::from_millis(1800);

/// The cache; shared by all copies.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    known: Arc<Mutex<Known>>,
    /// Configured addresses, in place of resolution; empty: none.
    fixed: Arc<[SocketAddr]>,
}

#[derive(Debug, Default)]
struct Known {
    answer: Option<Answer>,
    /// The last failure, for the clients that waited for it.
    failure: Option<(Instant, Failure)>,
}

#[derive(Debug)]
struct Answer {
    addresses: Vec<SocketAddr>,
    since: Instant,
    fresh_until: Instant,
}

impl Addresses {
    /// Always these, without resolution; resolution if there are none.
    pub(crate) fn fixed(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            fixed: addresses.into_iter().collect(),
            ..Self::default()
        }
    }

    /// The configured addresses.
    pub(crate) fn as_fixed(&self) -> Option<&[SocketAddr]> {
        (!self.fixed.is_empty()).then_some(&*self.fixed)
    }

    /// The addresses, by `look_up` unless they are fresh; one resolution at a time. Cancel safe.
    pub(super) async fn get(
        &self,
        look_up: impl Future<Output = Result<Vec<SocketAddr>, Failure>>,
    ) -> Result<Vec<SocketAddr>, Failure> {
        if let Some(fixed) = self.as_fixed() {
            return Ok(fixed.to_vec());
        }
        // Before the lock: a failure that was met while this client waited for it counts for this client as well.
        // Two hundred clients of a name that does not resolve would otherwise look it up one after the other.
        let started = Instant::now();
        // Held across the look-up on purpose: clients that come meanwhile share its result.
        let mut known = self.known.lock().await;
        let Known { answer, failure } = &mut *known;
        if let Some((at, failure)) = failure
            && *at >= started
        {
            return Err(failure.clone());
        }
        answer.take_if(|answer| answer.since.elapsed() >= MAX_AGE);
        if let Some(answer) = answer {
            if Instant::now() >= answer.fresh_until {
                match timeout(STALE_TIMEOUT, look_up).await {
                    Ok(Ok(addresses)) => *answer = Answer::new(addresses),
                    Ok(Err(failure)) => answer.extend(&failure),
                    Err(slow) => answer.extend(&slow),
                }
            }
            return Ok(answer.addresses.clone());
        }
        match look_up.await {
            Ok(addresses) => {
                *answer = Some(Answer::new(addresses.clone()));
                Ok(addresses)
            }
            Err(failed) => {
                *failure = Some((Instant::now(), failed.clone()));
                Err(failed)
            }
        }
    }

    /// Drops the addresses, which accepted no connection.
    pub(super) fn forget(&self) {
        // The holder of the lock resolves anew.
        if let Ok(mut known) = self.known.try_lock() {
            known.answer = None;
        }
    }
}

impl Answer {
    fn new(addresses: Vec<SocketAddr>) -> Self {
        let now = Instant::now();
        Self {
            addresses,
            since: now,
            fresh_until: now + FRESH,
        }
    }

    /// Uses stale addresses for another while.
    fn extend(&mut self, why: &(dyn std::error::Error + 'static)) {
        self.fresh_until = Instant::now() + FRESH;
        tracing::warn!(
            error = why,
            age = ?self.since.elapsed(),
            "cannot resolve the endpoint's name; stale addresses are used; hint: check the machine's name resolution"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::pending, io, net::Ipv4Addr};

    use tokio::time::advance;

    use super::*;

    fn answer(last: u8) -> Vec<SocketAddr> {
        vec![(Ipv4Addr::new(127, 0, 0, last), 5432).into()]
    }

    fn failure() -> Failure {
        Failure::resolve("db.example", &io::Error::other("the resolver is down"))
    }

    #[tokio::test]
    async fn a_configured_address_is_used_without_resolution() {
        let known = Addresses::fixed(answer(7));
        known.forget();
        assert_eq!(known.get(pending()).await.unwrap(), answer(7));
        assert!(Addresses::fixed([]).as_fixed().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn concurrent_clients_share_a_resolution_until_the_addresses_are_stale() {
        let (known, lookups) = (Addresses::default(), Cell::new(0));
        let resolve = async || {
            let look_up = async {
                lookups.set(lookups.get() + 1);
                tokio::time::sleep(Duration::from_millis(10)).await;
                Ok(answer(lookups.get()))
            };
            known.get(look_up).await.unwrap()
        };
        assert_eq!(tokio::join!(resolve(), resolve()), (answer(1), answer(1)));
        advance(FRESH).await;
        assert_eq!(tokio::join!(resolve(), resolve()), (answer(2), answer(2)));
        known.forget();
        assert_eq!(resolve().await, answer(3));
    }

    #[tokio::test(start_paused = true)]
    async fn stale_addresses_are_used_while_resolution_fails_or_is_slow_but_not_forever() {
        let known = Addresses::default();
        known.get(async { Ok(answer(1)) }).await.unwrap();
        advance(FRESH).await;
        assert_eq!(
            known.get(async { Err(failure()) }).await.unwrap(),
            answer(1)
        );
        advance(FRESH).await;
        let began = Instant::now();
        assert_eq!(known.get(pending()).await.unwrap(), answer(1));
        assert_eq!(began.elapsed(), STALE_TIMEOUT);
        assert_eq!(
            known.get(pending()).await.unwrap(),
            answer(1),
            "not resolved again at once"
        );
        advance(MAX_AGE).await;
        assert!(known.get(async { Err(failure()) }).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn clients_that_wait_for_a_resolution_share_its_failure_and_later_ones_do_not() {
        let (known, lookups) = (Addresses::default(), Cell::new(0));
        let resolve = async || {
            let look_up = async {
                lookups.set(lookups.get() + 1);
                tokio::time::sleep(Duration::from_secs(10)).await;
                Err(failure())
            };
            known.get(look_up).await.unwrap_err()
        };
        let (first, second) = tokio::join!(resolve(), resolve());
        assert!(first.is_dns && second.is_dns);
        assert_eq!(lookups.get(), 1);
        advance(Duration::from_millis(1)).await;
        resolve().await;
        assert_eq!(lookups.get(), 2);
    }
}
