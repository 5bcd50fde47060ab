//! Requests in flight and the transaction status, tracked from the message types that pass.

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
    fn from_byte(byte: u8) -> Self {
        match byte {
            b'T' => Self::InTransaction,
            b'E' => Self::Failed,
            _ => Self::Idle,
        }
    }
}

/// The requests in flight on one connection.
#[derive(Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts about one stream, not states of a machine"
)]
pub struct Progress {
    /// Requests without their `ReadyForQuery` yet.
    outstanding: u32,
    /// Extended-protocol messages sent since the last `Sync`.
    unsynced: bool,
    /// Simple queries among the outstanding that follow extended messages without a `Sync` between: the server skips them
    /// if one of those messages fails.
    unsynced_simple: u32,
    last_request_simple: bool,
    copy_in: bool,
    terminated: bool,
    /// The server's last message was an error: if nothing follows, it is the reason for the end.
    explained: bool,
    status: TransactionStatus,
    answered: Answered,
}

/// Requests completed since the last call of [`Progress::take_answered`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// One for each `ReadyForQuery`: a simple query, or everything up to a Sync.
    pub queries: u32,
    /// Those that left no transaction open.
    pub transactions: u32,
}

impl Progress {
    /// A connection right after its login.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the server accepts a new request, outside any transaction.
    pub fn is_idle(&self) -> bool {
        (!self.is_owed() || self.is_skipping()) && self.status == TransactionStatus::Idle
    }

    /// Whether the server has failed an extended request and ignores everything up to a `Sync` that has not been sent.
    ///
    /// Also, for the moment between its error and its `ReadyForQuery`, when a simple query behind an extended one without
    /// a `Sync` fails.
    fn is_skipping(&self) -> bool {
        self.explained
            && (self.unsynced || self.unsynced_simple > 0)
            && self.outstanding <= self.unsynced_simple
    }

    /// Whether a response is outstanding, or will be once the client sends its Sync.
    pub fn is_owed(&self) -> bool {
        self.outstanding > 0 || self.unsynced
    }

    /// Whether the client has sent Terminate.
    pub fn is_terminated(&self) -> bool {
        self.terminated
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
            tag::QUERY | tag::FUNCTION_CALL => {
                self.last_request_simple = true;
                if self.unsynced || self.unsynced_simple > 0 {
                    self.unsynced_simple = self.unsynced_simple.saturating_add(1);
                }
                // A simple request ends an extended one that lacks its Sync.
                self.unsynced = false;
                self.outstanding = self.outstanding.saturating_add(1);
            }
            tag::SYNC => {
                if self.is_skipping() {
                    self.outstanding = self.outstanding.saturating_sub(self.unsynced_simple);
                }
                self.unsynced_simple = 0;
                self.unsynced = false;
                self.outstanding = self.outstanding.saturating_add(1);
            }
            // While the server takes COPY data it ignores every Sync. None of the requests counted so far gets a response,
            // except the simple query that started the COPY.
            tag::COPY_DONE | tag::COPY_FAIL if self.copy_in => {
                self.copy_in = false;
                self.outstanding = u32::from(self.last_request_simple);
            }
            tag::TERMINATE => self.terminated = true,
            // Parse, Bind, Describe, Execute, Close, Flush.
            b'P' | b'B' | b'D' | tag::EXECUTE | b'C' | b'H' => {
                self.last_request_simple = false;
                self.unsynced = true;
            }
            _ => {}
        }
    }

    /// Records a message of the server.
    #[inline]
    pub fn from_server(&mut self, seen: Seen) {
        match seen {
            Seen::Status(byte) => {
                self.outstanding = self.outstanding.saturating_sub(1);
                self.unsynced_simple = self.unsynced_simple.min(self.outstanding);
                self.copy_in = false;
                self.status = TransactionStatus::from_byte(byte);
                let closed = u32::from(self.status == TransactionStatus::Idle);
                self.answered.queries = self.answered.queries.saturating_add(1);
                self.answered.transactions = self.answered.transactions.saturating_add(closed);
            }
            Seen::Message { tag } => {
                self.explained = tag == tag::ERROR_RESPONSE;
                self.copy_in |= tag == tag::COPY_IN_RESPONSE;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(progress: &mut Progress, tags: &[u8]) {
        for &tag in tags {
            progress.from_client(Seen::Message { tag });
        }
    }

    fn ready(progress: &mut Progress, status: u8) {
        progress.from_server(Seen::Message {
            tag: tag::READY_FOR_QUERY,
        });
        progress.from_server(Seen::Status(status));
    }

    #[test]
    fn a_query_has_one_response() {
        let mut progress = Progress::new();
        assert!(progress.is_idle());
        client(&mut progress, b"Q");
        assert!(!progress.is_idle());
        ready(&mut progress, b'I');
        assert!(progress.is_idle());
    }

    #[test]
    fn completed_requests_are_counted_once() {
        let mut progress = Progress::new();
        client(&mut progress, b"QQQ");
        ready(&mut progress, b'T');
        ready(&mut progress, b'E');
        ready(&mut progress, b'I');
        let all = Answered {
            queries: 3,
            transactions: 1,
        };
        assert_eq!(progress.take_answered(), all);
        assert_eq!(progress.take_answered(), Answered::default());
    }

    #[test]
    fn a_transaction_is_not_idle() {
        let mut progress = Progress::new();
        client(&mut progress, b"Q");
        ready(&mut progress, b'T');
        assert!(!progress.is_idle());
        client(&mut progress, b"Q");
        ready(&mut progress, b'E');
        assert_eq!(progress.status(), TransactionStatus::Failed);
    }

    #[test]
    fn pipelined_requests_are_counted_by_their_syncs() {
        let mut progress = Progress::new();
        client(&mut progress, b"PBDESPBES");
        ready(&mut progress, b'I');
        assert!(!progress.is_idle());
        ready(&mut progress, b'I');
        assert!(progress.is_idle());
        client(&mut progress, b"P");
        assert!(!progress.is_idle(), "a Parse without Sync is under way");
        client(&mut progress, b"Q");
        ready(&mut progress, b'I');
        assert!(progress.is_idle(), "the query ends the messages before it");
    }

    /// A drain once waited for its whole grace time: the query behind a failed Parse never gets a response.
    #[test]
    fn messages_skipped_up_to_a_sync_are_not_awaited() {
        let error = Seen::Message {
            tag: tag::ERROR_RESPONSE,
        };
        for request in [&b"PBEQ"[..], b"PBEQQ", b"PBE"] {
            let mut progress = Progress::new();
            client(&mut progress, request);
            assert!(!progress.is_idle(), "not failed yet");
            progress.from_server(error);
            assert!(progress.is_idle());
            client(&mut progress, b"PQ");
            assert!(progress.is_idle(), "skipped as well");
            client(&mut progress, b"S");
            assert!(!progress.is_idle());
            ready(&mut progress, b'I');
            assert!(progress.is_idle());
        }
        // An earlier request is under way, or has failed and its ReadyForQuery is about to come.
        for request in [&b"PBESPBE"[..], b"QPBE", b"Q"] {
            let mut progress = Progress::new();
            client(&mut progress, request);
            progress.from_server(error);
            assert!(!progress.is_idle());
        }
    }

    #[test]
    fn an_error_is_the_reason_for_an_end_only_while_nothing_follows_it() {
        let mut progress = Progress::new();
        let error = Seen::Message {
            tag: tag::ERROR_RESPONSE,
        };
        progress.from_server(error);
        assert!(progress.is_explained());
        ready(&mut progress, b'I');
        assert!(!progress.is_explained());
        client(&mut progress, b"E");
        assert!(!progress.is_explained(), "an Execute is no error");
    }

    #[test]
    fn a_sync_ignored_during_copy_is_not_awaited() {
        let mut progress = Progress::new();
        client(&mut progress, b"PBDES");
        progress.from_server(Seen::Message {
            tag: tag::COPY_IN_RESPONSE,
        });
        client(&mut progress, b"ddcS");
        ready(&mut progress, b'I');
        assert!(progress.is_idle());
    }

    #[test]
    fn a_simple_copy_has_one_response() {
        let mut progress = Progress::new();
        client(&mut progress, b"Q");
        progress.from_server(Seen::Message {
            tag: tag::COPY_IN_RESPONSE,
        });
        client(&mut progress, b"ddc");
        assert!(!progress.is_idle());
        ready(&mut progress, b'I');
        assert!(progress.is_idle());
    }
}
