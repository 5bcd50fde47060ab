//! The queue of a client's messages that a server has yet to answer.
//!
//! Equal groups in a row are stored once, since a pipeline may have a million of them.

use std::collections::VecDeque;

/// Extended messages and the message that follows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// Parse, Bind, Describe, Execute and Close without their answer yet.
    pub(super) unanswered: u32,
    pub(super) end: End,
}

/// The message that ends a [`Group`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// CopyDone or CopyFail: ends a COPY, and is ignored without one.
    Copy,
    /// Query or FunctionCall.
    Query,
    /// The same, behind a Flush. An error may be that of the Flush, when a timeout has struck between the messages.
    QueryAfterFlush,
    Sync,
}

impl Group {
    pub(super) const COPY_END: Self = Self::lone(End::Copy);
    pub(super) const SYNC: Self = Self::lone(End::Sync);

    const fn lone(end: End) -> Self {
        Self { unanswered: 0, end }
    }

    pub(super) fn is_query(self) -> bool {
        self.unanswered == 0 && matches!(self.end, End::Query | End::QueryAfterFlush)
    }
}

/// The same group several times in a row, as pipelines have it.
#[derive(Debug)]
struct Run {
    group: Group,
    times: u32,
}

/// Groups in the order in which the server reads them.
#[derive(Debug, Default)]
pub(super) struct Queue {
    /// The group that the server answers next; apart from the rest so that a query at a time allocates nothing.
    pub(super) first: Option<Group>,
    rest: VecDeque<Run>,
}

impl Queue {
    /// Runs above which the queue is full. What the sockets' buffers hold rarely makes as many.
    const LIMIT: usize = 16 * 1024;
    /// Runs for which memory is kept while the queue is empty.
    const KEPT: usize = 16;

    pub(super) fn is_full(&self) -> bool {
        self.rest.len() > Self::LIMIT
    }

    /// Groups with a ReadyForQuery of their own.
    pub(super) fn requests(&self) -> u64 {
        let first = self.first.map(|group| (group, 1));
        let rest = self.rest.iter().map(|run| (run.group, run.times));
        first
            .into_iter()
            .chain(rest)
            .filter(|(group, _)| group.end != End::Copy)
            .map(|(_, times)| u64::from(times))
            .sum()
    }

    /// Whether a Sync or a query ends the extended messages at the front.
    pub(super) fn ends_extended(&self) -> bool {
        let rest = self.rest.iter().map(|run| run.group);
        self.first
            .into_iter()
            .chain(rest)
            .any(|group| group.end != End::Copy)
    }

    #[inline]
    pub(super) fn push(&mut self, group: Group) {
        if self.first.is_none() {
            self.first = Some(group);
            return;
        }
        match self.rest.back_mut() {
            Some(run) if run.group == group && run.times < u32::MAX => run.times += 1,
            _ => self.rest.push_back(Run { group, times: 1 }),
        }
    }

    /// Removes the first group.
    #[inline]
    pub(super) fn pop(&mut self) {
        self.first = self.second();
        if self.first.is_some() {
            self.remove_second();
        }
    }

    pub(super) fn second(&self) -> Option<Group> {
        self.rest.front().map(|run| run.group)
    }

    pub(super) fn remove_second(&mut self) {
        let Some(run) = self.rest.front_mut() else {
            return;
        };
        run.times -= 1;
        if run.times > 0 {
            return;
        }
        self.rest.pop_front();
        if self.rest.is_empty() && self.rest.capacity() > Self::KEPT {
            self.rest = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipeline_of_a_million_groups_takes_little_memory() {
        let mut queue = Queue::default();
        let group = Group {
            unanswered: 3,
            end: End::Sync,
        };
        for _ in 0..1_000_000 {
            queue.push(group);
        }
        assert_eq!((queue.requests(), queue.rest.len()), (1_000_000, 1));
        for _ in 0..1_000_000 {
            assert_eq!(queue.first, Some(group));
            queue.pop();
        }
        assert!(queue.first.is_none() && queue.requests() == 0);
    }

    #[test]
    fn the_queue_is_full_before_it_takes_much_memory_and_keeps_none_of_it() {
        let mut queue = Queue::default();
        while !queue.is_full() {
            queue.push(Group::SYNC);
            queue.push(Group::lone(End::Query));
        }
        assert!(queue.rest.len() * size_of::<Run>() < 256 * 1024);
        while queue.first.is_some() {
            queue.pop();
        }
        assert_eq!(queue.rest.capacity(), 0);
    }
}
