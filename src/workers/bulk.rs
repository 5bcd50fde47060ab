//! Bulk transfers are read in batches.
//!
//! A sender that keeps sending wakes its reader for each segment, here 8 kB of a COPY: the reader takes it, finds nothing
//! more and goes back to sleep, and most of its processor time goes into that. So a socket that has brought much without
//! having been written to is woken only for a batch (`SO_RCVLOWAT`), or once nothing has been read for a moment. A COPY
//! out takes 40 % less so. Whoever converses, or trickles, is never kept waiting.

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// What a socket must have brought since it was written to, in bytes: that takes tens of milliseconds, of which the
/// silence at the end is a small part.
const BULK: usize = 4 << 20;
/// The same, since a silence: the sender may have paused, and be no slower than before.
const BULK_AGAIN: usize = 512 * 1024;
/// What the thread is woken for then, in bytes. Half of it takes 30 % more processor time, twice as much no less.
const BATCH: usize = 128 * 1024;
/// What it is woken for otherwise.
const ANYTHING: usize = 1;
/// How long less than a batch may lie unread: the least that epoll can wait, rounded up.
const SILENCE: Duration = Duration::from_millis(1);

/// What flows from one socket.
#[derive(Debug, Default)]
pub(super) struct Flow {
    brought: usize,
    is_bulk: bool,
}

impl Flow {
    /// So many bytes were read.
    #[inline]
    pub(super) fn brought(&mut self, length: usize) {
        self.brought = self.brought.saturating_add(length);
    }

    /// Whether a batch is worth waiting for.
    #[inline]
    pub(super) fn is_bulk(&self) -> bool {
        self.brought >= BULK
    }

    /// Bytes that the thread is to be woken for from now on, where that changes.
    #[inline]
    pub(super) fn begin_batches(&mut self) -> Option<usize> {
        (!std::mem::replace(&mut self.is_bulk, true)).then_some(BATCH)
    }

    /// The socket was written to: bytes that the thread is to be woken for from now on, where that changes.
    #[inline]
    pub(super) fn written_to(&mut self) -> Option<usize> {
        self.brought = 0;
        self.end_batches()
    }

    /// No batch has come in time: as above.
    pub(super) fn silent(&mut self) -> Option<usize> {
        self.brought = BULK - BULK_AGAIN;
        self.end_batches()
    }

    #[inline]
    fn end_batches(&mut self) -> Option<usize> {
        std::mem::take(&mut self.is_bulk).then_some(ANYTHING)
    }
}

/// Sockets for whose next batch their thread waits, in the order in which its patience with them ends.
#[derive(Debug, Default)]
pub(super) struct Silences(VecDeque<(Instant, usize)>);

impl Silences {
    /// Waits for `token` from now on.
    pub(super) fn await_batch(&mut self, token: usize) {
        self.forget(token);
        self.0.push_back((Instant::now() + SILENCE, token));
    }

    /// Waits for `token` no longer.
    pub(super) fn forget(&mut self, token: usize) {
        self.0.retain(|(_, waiting)| *waiting != token);
    }

    /// How long the thread may sleep.
    pub(super) fn patience(&self) -> Option<Duration> {
        let (end, _) = self.0.front()?;
        Some(end.saturating_duration_since(Instant::now()))
    }

    /// The next socket that has been silent for too long; it is waited for no longer.
    pub(super) fn next_over(&mut self) -> Option<usize> {
        let over = self.0.pop_front_if(|(end, _)| *end <= Instant::now());
        over.map(|(_, token)| token)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[test]
    fn only_who_brings_much_unasked_is_read_in_batches() {
        let mut flow = Flow::default();
        for _ in 0..3 {
            flow.brought(BULK - 1);
            assert!(!flow.is_bulk());
            assert_eq!(flow.written_to(), None, "nothing has changed");
        }
        flow.brought(BULK);
        assert!(flow.is_bulk());
        assert_eq!(flow.begin_batches(), Some(BATCH));
        assert_eq!(flow.begin_batches(), None, "once is enough");
        assert_eq!(flow.written_to(), Some(ANYTHING));
        assert!(!flow.is_bulk());
    }

    #[test]
    fn after_a_silence_it_takes_less() {
        let mut flow = Flow::default();
        flow.brought(BULK);
        flow.begin_batches();
        assert_eq!(flow.silent(), Some(ANYTHING));
        flow.brought(BULK_AGAIN - 1);
        assert!(!flow.is_bulk());
        flow.brought(1);
        assert!(flow.is_bulk());
        assert_eq!(flow.begin_batches(), Some(BATCH));
    }

    #[tokio::test(start_paused = true)]
    async fn patience_is_with_those_who_are_waited_for() {
        let mut silences = Silences::default();
        assert_eq!(silences.patience(), None);
        silences.await_batch(1);
        silences.await_batch(2);
        silences.forget(2);
        advance(SILENCE / 2).await;
        silences.await_batch(3);
        assert_eq!(silences.patience(), Some(SILENCE / 2));
        assert_eq!(silences.next_over(), None);
        advance(SILENCE / 2).await;
        assert_eq!(silences.next_over(), Some(1));
        assert_eq!(silences.next_over(), None);
        assert_eq!(silences.patience(), Some(SILENCE / 2));
        silences.await_batch(3);
        assert_eq!(silences.patience(), Some(SILENCE), "waited for anew");
    }
}
