//! The latest attempts to mint, for the status page and the console.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use jiff::Timestamp;

use super::MintError;

/// Attempts kept.
const ATTEMPTS: usize = 30;

/// One attempt to mint.
#[derive(Clone, Debug)]
pub struct MintAttempt {
    /// When it ended.
    pub at: Timestamp,
    /// How long it took.
    pub took: Duration,
    /// The expiry of the new credential (`None`: never), or the error.
    pub outcome: Result<Option<Timestamp>, Arc<MintError>>,
}

/// A bounded list of attempts, newest first.
#[derive(Debug, Default)]
pub(super) struct History(VecDeque<MintAttempt>);

impl History {
    pub(super) fn push(&mut self, attempt: MintAttempt) {
        self.0.push_front(attempt);
        self.0.truncate(ATTEMPTS);
    }

    pub(super) fn latest(&self) -> Vec<MintAttempt> {
        self.0.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_attempt_is_first_and_old_ones_are_dropped() {
        let mut history = History::default();
        for second in 0..100 {
            history.push(MintAttempt {
                at: Timestamp::from_second(second).unwrap(),
                took: Duration::ZERO,
                outcome: Ok(None),
            });
        }
        let latest = history.latest();
        assert_eq!(latest.len(), ATTEMPTS);
        assert_eq!(latest[0].at.as_second(), 99);
    }
}
