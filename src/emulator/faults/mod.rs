//! Faults on request: what goes wrong, where, how often and for whom.
//!
//! Tests script them through [`Faults`]; people through `/emulator/faults` and `--fault`. A fault never changes what is
//! legal: it shows a client what a bad network, a tired API or a misconfigured server would.

mod fault;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::{sync::watch, time::sleep};

pub(crate) use fault::Login;
pub use fault::{Action, BadCertificate, Fault, FaultError, Response, Site};

/// The most faults kept at a time.
const MAX_FAULTS: usize = 1000;

/// The list of faults; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    list: Arc<Mutex<Vec<Entry>>>,
    cleared: Arc<watch::Sender<u64>>,
    struck: Arc<watch::Sender<u64>>,
}

/// A fault in the list; it stays there when it is spent, so that its count can be read.
#[derive(Debug)]
struct Entry {
    fault: Fault,
    struck: Arc<watch::Sender<u64>>,
}

impl Entry {
    fn count(&self) -> u64 {
        *self.struck.borrow()
    }

    /// How often it will strike yet; `None`: until cleared.
    fn left(&self) -> Option<u32> {
        let struck = u32::try_from(self.count()).unwrap_or(u32::MAX);
        self.fault.times.map(|times| times.saturating_sub(struck))
    }

    fn is_pending(&self) -> bool {
        self.left() != Some(0)
    }
}

/// How often one fault has struck; outlives the fault.
#[derive(Clone, Debug)]
pub struct Strikes(Arc<watch::Sender<u64>>);

impl Strikes {
    /// How often so far; delays count.
    pub fn count(&self) -> u64 {
        *self.0.borrow()
    }

    /// Waits until it has struck `count` times. Cancel safe.
    pub async fn reach(&self, count: u64) {
        let _ = self.0.subscribe().wait_for(|struck| *struck >= count).await;
    }
}

/// A fault and how often it has struck.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FaultStatus {
    /// The fault; `times` is how often it will strike yet.
    #[serde(flatten)]
    pub fault: Fault,
    /// How often it has struck.
    pub struck: u64,
}

/// A fault that strikes now.
#[derive(Debug)]
pub(crate) struct Struck {
    pub(crate) action: Action,
    pub(crate) after_bytes: u64,
    pub(crate) cleared: Cleared,
}

/// Resolves when faults are cleared after this one struck.
#[derive(Debug)]
pub(crate) struct Cleared(watch::Receiver<u64>);

impl Cleared {
    /// Cancel safe.
    pub(crate) async fn wait(&mut self) {
        let _ = self.0.changed().await;
    }
}

impl Faults {
    /// `action` at `at`, until cleared.
    ///
    /// # Panics
    ///
    /// If it cannot happen there: the script is wrong. [`Faults::add`] returns the error instead.
    #[track_caller]
    pub fn always(&self, at: Site, action: Action) -> Strikes {
        self.scripted(Fault::new(at, action))
    }

    /// `action` at `at`, the next `count` times. Panics as [`Faults::always`] does.
    #[track_caller]
    pub fn times(&self, count: u32, at: Site, action: Action) -> Strikes {
        self.scripted(Fault::new(at, action).times(count))
    }

    /// `action` at `at`, the next time. Panics as [`Faults::always`] does.
    #[track_caller]
    pub fn once(&self, at: Site, action: Action) -> Strikes {
        self.times(1, at, action)
    }

    #[track_caller]
    #[expect(clippy::panic, reason = "a mistake in a test, reported at its line")]
    fn scripted(&self, fault: Fault) -> Strikes {
        match self.add(fault) {
            Ok(strikes) => strikes,
            Err(error) => panic!("{error}"),
        }
    }

    /// Adds a fault behind those that are there.
    pub fn add(&self, fault: Fault) -> Result<Strikes, FaultError> {
        fault.check()?;
        let mut list = self.lock();
        if list.len() >= MAX_FAULTS {
            // Spent ones are kept for their counts only.
            list.retain(Entry::is_pending);
        }
        if list.len() >= MAX_FAULTS {
            return Err(FaultError::TooMany);
        }
        let struck = Arc::new(watch::Sender::new(0));
        list.push(Entry {
            fault,
            struck: Arc::clone(&struck),
        });
        Ok(Strikes(struck))
    }

    /// Forgets them all, and ends what is stalled.
    pub fn clear(&self) {
        self.forget(|_| true);
    }

    /// Forgets those of one place, and ends what is stalled.
    pub fn clear_at(&self, at: Site) {
        self.forget(|fault| fault.at == at);
    }

    /// Those still to come.
    pub fn pending(&self) -> Vec<Fault> {
        let is_pending = |status: &FaultStatus| status.fault.times != Some(0);
        let all = self.statuses().into_iter().filter(is_pending);
        all.map(|status| status.fault).collect()
    }

    /// All since they were last cleared, with how often each has struck.
    pub fn statuses(&self) -> Vec<FaultStatus> {
        self.lock()
            .iter()
            .map(|entry| FaultStatus {
                fault: Fault {
                    times: entry.left(),
                    ..entry.fault.clone()
                },
                struck: entry.count(),
            })
            .collect()
    }

    /// Waits until `count` faults have struck since the start; delays count.
    pub async fn struck(&self, count: u64) {
        let _ = self
            .struck
            .subscribe()
            .wait_for(|struck| *struck >= count)
            .await;
    }

    /// Takes what strikes at `at` now: waits the delays, and returns the first fault that is more than a delay.
    ///
    /// Cancel safe; a fault that was taken stays taken.
    pub(crate) async fn strike(&self, at: Site) -> Option<Struck> {
        self.strike_login(at, &Login::default()).await
    }

    /// [`Faults::strike`] where something is known of the login.
    pub(crate) async fn strike_login(&self, at: Site, login: &Login<'_>) -> Option<Struck> {
        let (delay, struck) = self.take(at, login);
        if !delay.is_zero() {
            sleep(delay).await;
        }
        struck
    }

    fn take(&self, at: Site, login: &Login<'_>) -> (Duration, Option<Struck>) {
        let list = self.lock();
        let mut delay = Duration::ZERO;
        let mut found = None;
        let mut count = 0;
        for Entry { fault, struck } in list.iter().filter(|entry| {
            entry.fault.at == at && entry.is_pending() && entry.fault.applies_to(login)
        }) {
            struck.send_modify(|struck| *struck += 1);
            count += 1;
            if let Action::Delay(millis) = fault.action {
                delay = delay.saturating_add(Duration::from_millis(millis));
            } else {
                found = Some(Struck {
                    action: fault.action.clone(),
                    after_bytes: fault.after_bytes,
                    // Under the lock: a clearing that comes next is seen.
                    cleared: Cleared(self.cleared.subscribe()),
                });
                break;
            }
        }
        drop(list);
        if count > 0 {
            self.struck.send_modify(|struck| *struck += count);
        }
        (delay, found)
    }

    fn forget(&self, is_it: impl Fn(&Fault) -> bool) {
        let mut list = self.lock();
        list.retain(|entry| !is_it(&entry.fault));
        self.cleared.send_modify(|epoch| *epoch += 1);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn faults_strike_in_order_and_wear_out() {
        let faults = Faults::default();
        faults.times(2, Site::Mint, Action::Close);
        faults.once(Site::Mint, Action::Reset);
        faults.always(Site::Token, Action::Stall);
        for expected in [
            Some(Action::Close),
            Some(Action::Close),
            Some(Action::Reset),
            None,
        ] {
            assert_eq!(
                faults.strike(Site::Mint).await.map(|fault| fault.action),
                expected
            );
        }
        assert_eq!(faults.pending().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_delay_is_waited_before_the_next_fault() {
        let faults = Faults::default();
        faults.once(Site::Mint, Action::Delay(700));
        faults.once(Site::Mint, Action::Close);
        let before = tokio::time::Instant::now();
        assert_eq!(
            faults.strike(Site::Mint).await.unwrap().action,
            Action::Close
        );
        assert_eq!(before.elapsed(), Duration::from_millis(700));
        assert!(faults.pending().is_empty());
    }

    /// The sum of delays once overflowed, which ended the connection's task in a panic.
    #[tokio::test(start_paused = true)]
    async fn the_longest_delays_add_up() {
        let faults = Faults::default();
        for _ in 0..MAX_FAULTS {
            faults.always(Site::Mint, Action::Delay(u64::MAX));
        }
        let (delay, _) = faults.take(Site::Mint, &Login::default());
        assert!(delay > Duration::from_millis(u64::MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn each_fault_counts_its_strikes_also_when_it_is_spent_or_cleared() {
        let faults = Faults::default();
        let twice = faults.times(2, Site::Mint, Action::Close);
        let always = faults.always(Site::Mint, Action::Reset);
        for _ in 0..3 {
            faults.strike(Site::Mint).await;
        }
        twice.reach(2).await;
        assert_eq!((twice.count(), always.count()), (2, 1));
        let statuses = faults.statuses();
        assert_eq!((statuses[0].struck, statuses[0].fault.times), (2, Some(0)));
        assert_eq!((statuses[1].struck, statuses[1].fault.times), (1, None));
        assert_eq!(faults.pending().len(), 1);
        faults.clear();
        assert_eq!((twice.count(), faults.statuses().len()), (2, 0));
    }

    #[test]
    fn a_full_list_gives_up_spent_faults_first() {
        let faults = Faults::default();
        for _ in 0..MAX_FAULTS {
            faults.once(Site::Mint, Action::Close);
        }
        let one_more = || faults.add(Fault::new(Site::Mint, Action::Close));
        assert_eq!(one_more().unwrap_err(), FaultError::TooMany);
        faults.take(Site::Mint, &Login::default());
        one_more().unwrap();
    }

    #[test]
    #[should_panic(expected = "`no_tls` cannot happen at `mint`")]
    fn a_script_that_cannot_happen_fails_the_test_that_wrote_it() {
        Faults::default().always(Site::Mint, Action::NoTls);
    }
}
