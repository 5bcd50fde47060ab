//! Requests in flight between a client and a Postgres server, from the types of the messages that pass.
//!
//! Counting is not enough: a server that has failed an extended message discards everything up to the next Sync, simple
//! queries included, and COPY consumes Syncs. So this is a queue in the order of the client's messages, which the server's
//! messages empty by the server's own rules:
//!
//! - `PostgresMain` and `SocketBackend` (src/backend/tcop/postgres.c): an error in Parse, Bind, Describe, Execute, Close or
//!   Flush sets `ignore_till_sync`. Sync, Query and FunctionCall have one ReadyForQuery each, failed or not. Stray COPY
//!   messages are ignored.
//! - `CopyGetData` (src/backend/commands/copyfromparse.c): a COPY from the client reads up to CopyDone or CopyFail, and
//!   ignores Flush and Sync.
//! - "Message Flow" in the protocol documentation: the answer to each message.
//!
//! Message bodies are not read, so one thing cannot be known: whether a COPY that failed had consumed the Syncs sent ahead
//! of its data. [`Requests::is_at_rest`] is false until later answers have shown it.

mod queue;

use self::queue::{End, Group, Queue};
use super::frame::{Seen, tag};

/// The transaction state in the last `ReadyForQuery`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransactionStatus {
    /// Inside a failed transaction block.
    Failed,
    /// Outside a transaction block.
    #[default]
    Idle,
    /// Inside a transaction block.
    InTransaction,
}

impl TransactionStatus {
    /// That of a `ReadyForQuery`. Any byte but those of the protocol is one that no other client may follow.
    pub(crate) fn from_byte(byte: u8) -> Self {
        match byte {
            b'I' => Self::Idle,
            b'T' => Self::InTransaction,
            _ => Self::Failed,
        }
    }
}

/// The direction of a COPY.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyDirection {
    /// Both at once: a replication stream.
    Both,
    /// From the client.
    In,
    /// To the client.
    Out,
}

/// Requests completed since the last call of [`Requests::take_answered`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// One for each `ReadyForQuery`: a simple query, or everything up to a Sync.
    pub queries: u32,
    /// Those that left no transaction open.
    pub transactions: u32,
}

/// The requests in flight on one connection.
#[derive(Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts about one stream, not states of a machine"
)]
pub struct Requests {
    queue: Queue,
    /// Extended messages behind the queue that nothing has ended yet: the number of those unanswered.
    open: Option<u32>,
    /// The last of these was a Flush.
    flushed: bool,
    /// The server discards everything up to a Sync that has not been sent.
    skipping: bool,
    /// An answer to the query at the front has begun.
    begun: bool,
    copy: Option<CopyDirection>,
    /// Syncs taken for consumed by a COPY that failed. Each may have its ReadyForQuery yet.
    doubtful: u32,
    /// The server sent what these rules do not allow.
    lost: bool,
    terminated: bool,
    /// The server has reported a change of a parameter.
    reported: bool,
    /// The server's last message was an error: if nothing follows, it is the reason for the end.
    explained: bool,
    status: TransactionStatus,
    answered: Answered,
}

impl Requests {
    /// A connection right after its login.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the server is certain to wait for a request, in whatever transaction status, with nothing on its way. A
    /// Terminate counts as not sent.
    pub fn is_at_rest(&self) -> bool {
        !self.is_owed() && self.doubtful == 0 && !self.lost
    }

    /// Whether the server comes to rest without anything more from the client.
    pub fn comes_to_rest(&self) -> bool {
        self.open.is_none() && !self.skipping && self.copy.is_none_or(|it| it == CopyDirection::Out)
    }

    /// Whether the session can be ended without loss: no answer is to come, and no transaction is open.
    pub fn is_idle(&self) -> bool {
        (!self.is_owed() || self.skipping) && self.status == TransactionStatus::Idle
    }

    /// Whether a response is outstanding, or will be once the client sends its Sync.
    pub fn is_owed(&self) -> bool {
        self.queue.first.is_some() || self.open.is_some()
    }

    /// Whether nothing more should be read from the client until the server has answered something.
    pub fn is_full(&self) -> bool {
        self.queue.is_full()
    }

    /// `ReadyForQuery` messages to come, if nothing fails.
    pub fn outstanding(&self) -> u64 {
        self.queue.requests()
    }

    /// The COPY under way.
    pub fn copy(&self) -> Option<CopyDirection> {
        self.copy
    }

    /// Whether the client has sent Terminate.
    pub fn is_terminated(&self) -> bool {
        self.terminated
    }

    /// Whether the server has reported a change of a parameter.
    pub fn is_reported(&self) -> bool {
        self.reported
    }

    /// Whether the server's last message was an error, which no message of the proxy may follow.
    pub fn is_explained(&self) -> bool {
        self.explained
    }

    /// The last known transaction state.
    pub fn status(&self) -> TransactionStatus {
        self.status
    }

    /// Requests completed since the last call.
    #[inline]
    pub fn take_answered(&mut self) -> Answered {
        std::mem::take(&mut self.answered)
    }

    /// Records a message of the client.
    #[inline]
    pub fn from_client(&mut self, seen: Seen) {
        let Seen::Message { tag } = seen else { return };
        match tag {
            tag::COPY_DATA => {}
            tag::TERMINATE => self.terminated = true,
            tag::SYNC => {
                self.skipping = false;
                self.end_group(End::Sync);
            }
            // Discarded. Unless a Sync that counts as consumed has ended the skipping already.
            _ if self.skipping => {
                self.lost |= self.doubtful > 0
                    && !matches!(tag, tag::COPY_DONE | tag::COPY_FAIL | tag::FLUSH);
            }
            tag::QUERY | tag::FUNCTION_CALL => self.end_group(if self.flushed {
                End::QueryAfterFlush
            } else {
                End::Query
            }),
            tag::PARSE | tag::BIND | tag::DESCRIBE | tag::EXECUTE | tag::CLOSE => {
                self.flushed = false;
                let open = self.open.get_or_insert_default();
                *open = open.saturating_add(1);
            }
            tag::FLUSH => self.flushed = self.open.is_some(),
            tag::COPY_DONE | tag::COPY_FAIL => match self.open {
                // The extended messages go on after it.
                Some(1..) => {
                    self.end_group(End::Copy);
                    self.open = Some(0);
                }
                _ if self.queue.first.is_some() => self.queue.push(Group::COPY_END),
                _ => {}
            },
            _ => {}
        }
    }

    /// Records a message of the server.
    #[inline]
    pub fn from_server(&mut self, seen: Seen) {
        match seen {
            Seen::Status(byte) => {
                if self.begun {
                    self.advance();
                } else {
                    self.ready();
                }
                self.copy = None;
                self.status = TransactionStatus::from_byte(byte);
                let closed = u32::from(self.status == TransactionStatus::Idle);
                self.answered.queries = self.answered.queries.saturating_add(1);
                self.answered.transactions = self.answered.transactions.saturating_add(closed);
            }
            Seen::Message { tag } => {
                self.explained = tag == tag::ERROR_RESPONSE;
                // Most messages by far change nothing.
                let is_within = match tag {
                    tag::DATA_ROW | tag::COPY_DATA | tag::READY_FOR_QUERY => true,
                    tag::ROW_DESCRIPTION | tag::COMMAND_COMPLETE => {
                        self.begun && self.copy.is_none()
                    }
                    _ => false,
                };
                if !is_within {
                    self.answer(tag);
                }
            }
        }
    }

    fn answer(&mut self, tag: u8) {
        match tag {
            // Within an answer, or no answer at all.
            tag::COPY_DONE
            | tag::PARAMETER_DESCRIPTION
            | tag::NOTICE_RESPONSE
            | tag::NOTIFICATION_RESPONSE => {}
            tag::PARAMETER_STATUS => self.reported = true,
            tag::ROW_DESCRIPTION | tag::EMPTY_QUERY_RESPONSE | tag::FUNCTION_CALL_RESPONSE => {
                self.complete();
            }
            tag::COMMAND_COMPLETE => {
                if self.copy.take() == Some(CopyDirection::In) {
                    self.end_copy_in();
                }
                self.complete();
            }
            tag::PARSE_COMPLETE
            | tag::BIND_COMPLETE
            | tag::CLOSE_COMPLETE
            | tag::NO_DATA
            | tag::PORTAL_SUSPENDED => self.complete_extended(),
            tag::COPY_IN_RESPONSE => self.begin_copy(CopyDirection::In),
            tag::COPY_OUT_RESPONSE => self.begin_copy(CopyDirection::Out),
            tag::COPY_BOTH_RESPONSE => self.begin_copy(CopyDirection::Both),
            tag::ERROR_RESPONSE => self.fail(),
            _ => self.lost = true,
        }
    }

    /// Ends what is open with a message of the client's.
    fn end_group(&mut self, end: End) {
        self.flushed = false;
        let unanswered = self.open.take().unwrap_or_default();
        self.queue.push(Group { unanswered, end });
    }

    /// Goes on to the next group, past the ends of COPYs that there are not.
    #[inline]
    fn advance(&mut self) {
        self.begun = false;
        self.queue.pop();
        while self.queue.first == Some(Group::COPY_END) {
            self.queue.pop();
        }
    }

    /// Records an answer that ends an extended message, or is part of that to a query.
    fn complete(&mut self) {
        if self.queue.first.is_some_and(Group::is_query) {
            self.begin();
        } else {
            self.complete_extended();
        }
    }

    /// Records that a query is being answered, so that every Sync before it has been.
    fn begin(&mut self) {
        self.begun = true;
        self.doubtful = 0;
    }

    fn complete_extended(&mut self) {
        self.doubtful = 0;
        match (&mut self.queue.first, &mut self.open) {
            (Some(Group { unanswered, .. }), _) | (None, Some(unanswered)) if *unanswered > 0 => {
                *unanswered -= 1;
            }
            _ => self.lost = true,
        }
        if self.queue.first == Some(Group::COPY_END) {
            self.advance();
        }
    }

    /// Completes a request with its ReadyForQuery, other than a query whose answer has begun.
    fn ready(&mut self) {
        match self.queue.first {
            Some(Group::SYNC) => self.advance(),
            _ if self.doubtful > 0 => {
                self.doubtful -= 1;
                if std::mem::take(&mut self.skipping) {
                    self.open = None;
                }
            }
            Some(_) => {
                self.lost = true;
                self.advance();
            }
            None => {
                self.lost = true;
                self.skipping = false;
                self.open = None;
            }
        }
    }

    fn begin_copy(&mut self, copy: CopyDirection) {
        self.copy = Some(copy);
        self.doubtful = 0;
        match (self.queue.first, self.open) {
            (Some(group), _) if group.is_query() => self.begun = true,
            (
                Some(Group {
                    unanswered: 1.., ..
                }),
                _,
            )
            | (None, Some(1..)) => {}
            _ => self.lost = true,
        }
    }

    /// Removes what a COPY that succeeded has consumed: everything up to its CopyDone.
    fn end_copy_in(&mut self) {
        self.remove_copy_syncs();
        match self.queue.first {
            Some(group) if group.is_query() && self.queue.second() == Some(Group::COPY_END) => {
                self.queue.remove_second();
            }
            Some(Group {
                unanswered: 1,
                end: End::Copy,
            }) => {}
            _ => self.lost = true,
        }
    }

    /// Removes the Syncs that the running COPY ignores if it reads as far, and returns their number.
    fn remove_copy_syncs(&mut self) -> u32 {
        const EXECUTE_AND_SYNC: Group = Group {
            unanswered: 1,
            end: End::Sync,
        };
        let Some(copy) = self.queue.first else {
            return 0;
        };
        if copy != EXECUTE_AND_SYNC && !copy.is_query() {
            return 0;
        }
        let mut removed = 0;
        while self.queue.second() == Some(Group::SYNC) {
            self.queue.remove_second();
            removed += 1;
        }
        if copy == EXECUTE_AND_SYNC {
            removed += 1;
            // Without its Sync, the Execute is followed by what came after that.
            self.queue.pop();
            match &mut self.queue.first {
                Some(next) => next.unanswered = next.unanswered.saturating_add(1),
                None => self.open = Some(self.open.unwrap_or_default().saturating_add(1)),
            }
            if !self.queue.ends_extended() {
                self.open.get_or_insert_default();
            }
        }
        removed
    }

    fn fail(&mut self) {
        let is_copy_in = self.copy.take() == Some(CopyDirection::In);
        match (self.queue.first, self.open) {
            // From the commit of a Sync, or the reason for the end of the connection.
            (Some(Group::SYNC), _) | (None, None) => {}
            (Some(group), _) if group.is_query() => {
                self.lost |= group.end == End::QueryAfterFlush;
                self.begin();
                if is_copy_in {
                    self.doubtful = self.remove_copy_syncs();
                }
            }
            (Some(_), _) | (_, Some(_)) => {
                self.doubtful = if is_copy_in {
                    self.remove_copy_syncs()
                } else {
                    0
                };
                self.skip();
            }
        }
    }

    /// Discards everything up to the next Sync.
    fn skip(&mut self) {
        let mut discarded = 0_u32;
        while let Some(group) = self.queue.first {
            discarded = discarded.saturating_add(group.unanswered);
            if group.end == End::Sync {
                break;
            }
            discarded = discarded.saturating_add(u32::from(group.end != End::Copy));
            self.queue.pop();
        }
        if self.queue.first.is_some() {
            self.queue.first = Some(Group::SYNC);
        } else {
            discarded = discarded.saturating_add(self.open.unwrap_or_default());
            self.open = Some(0);
            self.flushed = false;
            self.skipping = true;
        }
        // Besides the message that failed: they are not discarded if a Sync was not consumed by the COPY.
        self.lost |= self.doubtful > 0 && discarded > 1;
    }
}

#[cfg(test)]
mod tests;
