//! An endpoint's addresses, as the resolver said lately.
//!
//! A pool that opens twenty connections asks the resolver once. While the resolver fails or is slow, what it said before
//! serves: whoever answers there is verified. Addresses that take no connection are forgotten.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

use super::failure::Failure;

/// How long an answer is taken for the truth.
const FRESH: Duration = Duration::from_secs(5);
/// How long it serves when there is no other; RFC 8767 allows days.
const STALE: Duration = Duration::from_hours(1);
/// How long a resolver may take when there is an older answer; RFC 8767 proposes 1.8 s.
const PATIENCE: Duration = Duration::from_millis(1800);

/// What is known; shared by all copies.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    known: Arc<Mutex<Known>>,
    /// Set by hand, where the name does not resolve to what should be dialed; empty: the resolver's.
    fixed: Arc<[SocketAddr]>,
}

#[derive(Debug, Default)]
struct Known {
    answer: Option<Answer>,
    /// The last failure, for those who waited for it.
    failure: Option<(Instant, Failure)>,
}

#[derive(Debug)]
struct Answer {
    addresses: Vec<SocketAddr>,
    since: Instant,
    fresh_until: Instant,
}

impl Addresses {
    /// Always these, whatever the name resolves to; the resolver's when there are none.
    pub fn fixed(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            fixed: addresses.into_iter().collect(),
            ..Self::default()
        }
    }

    /// Those that were set by hand.
    pub fn as_fixed(&self) -> Option<&[SocketAddr]> {
        (!self.fixed.is_empty()).then_some(&*self.fixed)
    }

    /// The addresses, by `look_up` where they are not known; one at a time asks. Cancel safe.
    pub(super) async fn get(
        &self,
        look_up: impl Future<Output = Result<Vec<SocketAddr>, Failure>>,
    ) -> Result<Vec<SocketAddr>, Failure> {
        if let Some(fixed) = self.as_fixed() {
            return Ok(fixed.to_vec());
        }
        let asked = Instant::now();
        let mut known = self.known.lock().await;
        let Known { answer, failure } = &mut *known;
        if let Some((at, failure)) = failure
            && *at >= asked
        {
            return Err(failure.clone());
        }
        answer.take_if(|answer| answer.since.elapsed() >= STALE);
        if let Some(answer) = answer {
            if Instant::now() >= answer.fresh_until {
                match timeout(PATIENCE, look_up).await {
                    Ok(Ok(addresses)) => *answer = Answer::new(addresses),
                    Ok(Err(failure)) => answer.serve_on(&failure),
                    Err(slow) => answer.serve_on(&slow),
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

    /// They took no connection.
    pub(super) fn forget(&self) {
        // Whoever holds the lock is asking anew.
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

    /// For want of a better one.
    fn serve_on(&mut self, why: &(dyn std::error::Error + 'static)) {
        self.fresh_until = Instant::now() + FRESH;
        tracing::warn!(
            error = why,
            age = ?self.since.elapsed(),
            "the endpoint's name cannot be resolved; its last known addresses are used; hint: check the machine's name resolution"
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
    async fn an_address_set_by_hand_is_dialed_and_the_name_is_not_resolved() {
        let known = Addresses::fixed(answer(7));
        known.forget();
        assert_eq!(known.get(pending()).await.unwrap(), answer(7));
        assert!(Addresses::fixed([]).as_fixed().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn many_ask_once_and_again_when_the_answer_is_no_longer_fresh() {
        let (known, asked) = (Addresses::default(), Cell::new(0));
        let ask = async || {
            let look_up = async {
                asked.set(asked.get() + 1);
                tokio::time::sleep(Duration::from_millis(10)).await;
                Ok(answer(asked.get()))
            };
            known.get(look_up).await.unwrap()
        };
        assert_eq!(tokio::join!(ask(), ask()), (answer(1), answer(1)));
        advance(FRESH).await;
        assert_eq!(tokio::join!(ask(), ask()), (answer(2), answer(2)));
        known.forget();
        assert_eq!(ask().await, answer(3));
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_answer_serves_while_the_resolver_fails_or_is_slow_but_not_for_ever() {
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
        assert_eq!(began.elapsed(), PATIENCE);
        assert_eq!(
            known.get(pending()).await.unwrap(),
            answer(1),
            "not asked again at once"
        );
        advance(STALE).await;
        assert!(known.get(async { Err(failure()) }).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_failure_shares_it_and_who_comes_later_asks_again() {
        let (known, asked) = (Addresses::default(), Cell::new(0));
        let ask = async || {
            let look_up = async {
                asked.set(asked.get() + 1);
                tokio::time::sleep(Duration::from_secs(10)).await;
                Err(failure())
            };
            known.get(look_up).await.unwrap_err()
        };
        let (first, second) = tokio::join!(ask(), ask());
        assert!(first.is_dns && second.is_dns);
        assert_eq!(asked.get(), 1);
        advance(Duration::from_millis(1)).await;
        ask().await;
        assert_eq!(asked.get(), 2);
    }
}
