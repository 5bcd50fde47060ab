//! The last attempts to mint, for whoever looks; the log has them all.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use jiff::Timestamp;

use super::MintError;

/// Attempts remembered.
const ATTEMPTS: usize = 30;

/// One attempt to mint.
#[derive(Clone, Debug)]
pub struct MintAttempt {
    /// When it ended.
    pub at: Timestamp,
    /// How long it took.
    pub took: Duration,
    /// The expiry of the credential it brought (`None`: never), or why it brought none.
    pub outcome: Result<Option<Timestamp>, Arc<MintError>>,
}

/// The latest attempts, bounded.
#[derive(Debug, Default)]
pub(super) struct History(VecDeque<MintAttempt>);

impl History {
    pub(super) fn push(&mut self, attempt: MintAttempt) {
        self.0.push_front(attempt);
        self.0.truncate(ATTEMPTS);
    }

    /// The latest first.
    pub(super) fn latest(&self) -> Vec<MintAttempt> {
        self.0.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_come_first_and_old_ones_go() {
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
