//! Relays bytes between a client and its server, aware of message boundaries, without ever holding a message.
//!
//! How a relay ends:
//!
//! | event | consequence |
//! |---|---|
//! | the client closes its half | the server's half is closed; replies drain however long the server takes |
//! | the same, and no reply is owed | the server has 5 s to close |
//! | the client resets, or accepts no more bytes | both are closed at once |
//! | the server closes | what it sent goes to the client, then the client is closed |
//! | the server breaks between two messages without an error | the client is sent an error, then closed |
//! | the server accepts no more bytes | what it sent last is read, as that explains why |
//! | the client leaves between two requests, and the server connection is a pool's | nothing reaches the server |
//! | client and server are at rest, and the connection may be another client's next | the session goes on without it |
//! | draining | an idle session is ended with 57P01, others as soon as they are idle |
//! | cutting | every session is ended, with 57P01 where that cannot be mistaken for part of a reply |
//!
//! No message of ours lands inside another, follows an error of the server's, or is sent to a client that has sent
//! Terminate.

pub(super) mod pipe;
mod unsolicited;

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::BytesMut;
use prometheus::IntCounter;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use self::{
    pipe::{Broken, Pipe, PipeState},
    unsolicited::UnsolicitedPasswords,
};
use super::close::shut_down;
use crate::{
    net::socket::{HangUp, Transport},
    pool::{Pools, SharedStream, Used},
    protocol::{
        error::{ErrorFields, Report, sqlstate},
        frame::{HEADER_LEN, Header, tag},
        requests::{Requests, TransactionStatus},
        traces::Traces,
    },
    shutdown::{Phase, Shutdown},
    status::ActivityRecord,
    telemetry::{
        Metrics,
        labels::{PinReason, SessionEnd},
        metrics::Took,
    },
    upstream::Stream,
};

/// Time for the server to close after the client has closed its half and no reply is owed.
const SERVER_CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may read nothing of what its server sent last.
const DELIVERY_TIMEOUT: Duration = Duration::from_mins(1);
/// The same, once the grace time of a shutdown is over, or the client has sent Terminate.
const CUT_DELIVERY_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a client that has closed its half is checked for a reset: nothing is read from it any more, so that no event
/// reports one.
const HANG_UP_CHECK: Duration = Duration::from_secs(1);

/// A whole Terminate message.
const TERMINATE: &[u8] = b"X\0\0\0\x04";

/// What ended a relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The client left or broke.
    Client,
    /// Not of the session: the client leaves nothing on the server connection, and needs another with its next request.
    Rest,
    /// The server left or broke.
    Server,
    /// We ended it.
    Shutdown {
        /// Whether the server is between messages, so that a Terminate is understood.
        orderly: bool,
    },
}

impl End {
    /// The metric label.
    pub(super) const fn label(self) -> SessionEnd {
        match self {
            Self::Client | Self::Rest => SessionEnd::Client,
            Self::Server => SessionEnd::Server,
            Self::Shutdown { .. } => SessionEnd::Shutdown,
        }
    }
}

/// The stream to a server, with what it knows of the session.
pub(super) trait ServerStream: Transport {
    /// Whether nothing is on its way that the session does not see.
    fn is_at_rest(&self) -> bool {
        true
    }

    /// Whether the session, at rest, parts with this connection now. Wakes the task when it does.
    fn parts(&mut self, _cx: &mut Context<'_>) -> bool {
        false
    }

    /// Why the session does not.
    fn pin(&self) -> Option<PinReason> {
        None
    }

    /// Whether the session is to go on with another connection, although it has sent its next request already.
    fn is_yielding(&self) -> bool {
        false
    }

    /// The session goes on with this connection to its end, although others wait for one.
    fn stay(&mut self) {}

    /// The front of what was written and has not reached the server.
    fn take_unsent(&mut self) -> BytesMut {
        BytesMut::new()
    }

    /// What the session has done, if the stream records it.
    fn traces(&self) -> Option<&Traces> {
        None
    }

    fn traces_mut(&mut self) -> Option<&mut Traces> {
        None
    }
}

impl ServerStream for Stream {}

impl ServerStream for SharedStream<'_> {
    fn is_at_rest(&self) -> bool {
        SharedStream::is_at_rest(self)
    }

    fn parts(&mut self, cx: &mut Context<'_>) -> bool {
        SharedStream::parts(self, cx)
    }

    fn pin(&self) -> Option<PinReason> {
        self.client().current_pin()
    }

    fn is_yielding(&self) -> bool {
        SharedStream::is_yielding(self)
    }

    fn stay(&mut self) {
        SharedStream::stay(self);
    }

    fn take_unsent(&mut self) -> BytesMut {
        SharedStream::take_unsent(self)
    }

    fn traces(&self) -> Option<&Traces> {
        Some(SharedStream::traces(self))
    }

    fn traces_mut(&mut self) -> Option<&mut Traces> {
        Some(SharedStream::traces_mut(self))
    }
}

/// One side of a relay as it starts.
pub(super) struct Side<'a, S> {
    pub(super) stream: &'a mut S,
    /// Sent by this side already.
    pub(super) received: BytesMut,
    /// How much of that is counted already.
    pub(super) counted: usize,
    /// Counts the bytes that this side sends.
    pub(super) bytes: IntCounter,
}

/// What a relay reports to while it runs.
pub(super) struct Observers<'a> {
    pub(super) activity: &'a ActivityRecord,
    /// The endpoint's, which count and measure queries.
    pub(super) metrics: &'a Metrics,
    /// The path to the server counts as lost when it acknowledges nothing for this long.
    pub(super) loss_timeout: Option<Duration>,
    /// The server connection outlives the client: neither the client's end nor its Terminate reaches the server.
    pub(super) keeps_server: bool,
    /// Records what the session does on such a connection, unless the stream does.
    pub(super) traces: Option<&'a mut Traces>,
    /// The relay ends as soon as client and server are at rest, unless the session is pinned.
    pub(super) ends_at_rest: bool,
    /// The endpoint's pools.
    pub(super) pools: Option<&'a Pools>,
}

/// Both directions of one session.
pub(super) struct Relay<'a, C, U> {
    client: &'a mut C,
    server: &'a mut U,
    shutdown: &'a Shutdown,
    to_server: Pipe,
    to_client: Pipe,
    requests: Requests,
    unsolicited: UnsolicitedPasswords,
    activity: &'a ActivityRecord,
    metrics: &'a Metrics,
    began: Began,
    loss: PathLoss,
    server_error: TrailingError,
    keeps_server: bool,
    /// Of the session on a server connection that another client may get.
    traces: Option<&'a mut Traces>,
    ends_at_rest: bool,
    pools: Option<&'a Pools>,
    /// The client's Terminate was not relayed.
    is_withheld: bool,
    /// Set once no more is read from the server.
    end: Option<End>,
}

impl<'a, C: Transport, U: ServerStream> Relay<'a, C, U> {
    pub(super) fn new(
        client: Side<'a, C>,
        server: Side<'a, U>,
        shutdown: &'a Shutdown,
        observers: Observers<'a>,
    ) -> Self {
        // Of the relays before, if there were any.
        let [from_client, from_server] = observers.activity.bytes();
        let counted = u64::try_from(client.counted).unwrap_or_default();
        let sent_before = from_client.wrapping_sub(counted);
        let mut relay = Self {
            client: client.stream,
            server: server.stream,
            shutdown,
            to_server: Pipe::new(client.bytes, sent_before),
            to_client: Pipe::new(server.bytes, from_server),
            requests: Requests::new(),
            unsolicited: UnsolicitedPasswords::default(),
            activity: observers.activity,
            metrics: observers.metrics,
            began: Began::default(),
            loss: PathLoss {
                timeout: observers.loss_timeout,
                answered: sent_before,
                ..PathLoss::default()
            },
            server_error: TrailingError::default(),
            keeps_server: observers.keeps_server,
            traces: observers.traces,
            ends_at_rest: observers.ends_at_rest,
            pools: observers.pools,
            is_withheld: false,
            end: None,
        };
        let mut from_client = &client.received[..];
        relay.unsolicited.strip(&mut from_client);
        relay
            .to_server
            .take_in(from_client, |seen| relay.requests.from_client(seen));
        relay.to_server.skip(counted);
        if let Some(traces) = &mut relay.traces {
            traces.client_sends(from_client);
            traces.server_sends(&server.received);
        }
        if relay.keeps_server && relay.requests.is_terminated() {
            relay.is_withheld = withhold_terminate(&mut from_client);
            relay.to_server.state = PipeState::Ending;
        }
        relay.to_server.kept.extend_from_slice(from_client);
        relay
            .to_client
            .take_in(&server.received, |seen| relay.requests.from_server(seen));
        relay.to_client.kept.extend_from_slice(&server.received);
        relay
    }

    /// The error that the server ended with.
    pub(super) fn server_error(&self) -> Option<String> {
        if self.loss.is_lost {
            return Some("no acknowledgement: the network path is lost".to_owned());
        }
        self.server_error.fatal()
    }

    /// What has become of the server connection of a pool; `None` if its next client would not find it between two requests.
    pub(super) fn used(&self) -> Option<Used> {
        let is_at_rest = self.requests.is_at_rest()
            && self.to_server.is_between_messages()
            && !self.to_server.unflushed
            && self.to_server.state != PipeState::Refused
            && self.to_client.is_at_boundary()
            && self.requests.is_terminated() == self.is_withheld
            && self.server.is_at_rest();
        let traces = self.traces()?;
        (self.keeps_server && is_at_rest).then(|| Used {
            status: self.requests.status(),
            is_touched: traces.is_used(),
            is_reported: self.requests.is_reported(),
            is_resettable: traces.is_resettable(),
        })
    }

    /// Whether the server owes an answer.
    pub(super) fn is_owed(&self) -> bool {
        self.requests.is_owed()
    }

    /// Whether the client has closed its half or sent Terminate.
    pub(super) fn is_left(&self) -> bool {
        self.to_server.state != PipeState::Open
    }

    /// Runs until the session is over; what the server sent last has then been delivered to the client.
    ///
    /// Not cancel safe.
    pub(super) async fn run(&mut self) -> End {
        let shutdown = self.shutdown;
        // One future for both tokens in turn: a second would take room in the task of every session.
        let mut next = pin!(shutdown.draining().cancelled());
        let mut reached = None;
        let mut timer = None;
        poll_fn(|cx| {
            let mut phase = shutdown.phase();
            if reached != Some(phase) {
                let next = next.as_mut();
                phase = poll_phase(cx, phase, &mut reached, next, shutdown.cutting());
            }
            self.poll(cx, phase, &mut timer)
        })
        .await
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        phase: Phase,
        timer: &mut Option<ProgressTimeout>,
    ) -> Poll<End> {
        let before = (self.to_client.total, self.to_client.kept.len());
        let was_full = self.requests.is_full();
        let broken = self.poll_from_client(cx).is_err() || self.poll_from_server(cx).is_err();
        if was_full && !self.requests.is_full() {
            // The client was not read from, so that it cannot wake this task.
            cx.waker().wake_by_ref();
        }
        // The clock is read once at most, and by most polls not at all.
        let mut now = None;
        let activity = self.activity;
        let mut now = || *now.get_or_insert_with(|| activity.now());
        self.count(&mut now);
        let owed = self.requests.is_owed();
        if self.loss.update(self.to_server.total, owed)
            && let Some(socket) = self.server.socket()
        {
            socket.limit_acknowledgement(self.loss.timeout_in_force());
        }
        // After the counters, which would otherwise miss the last bytes.
        if broken {
            return Poll::Ready(End::Client);
        }
        let (sent, received) = (self.to_server.total, self.to_client.total);
        activity.record((&self.requests).into(), sent, received, now);
        // After both directions, so that a query that has just arrived is served and not cut off as idle.
        self.apply(phase);
        if self.server.is_yielding() && self.to_server.state != PipeState::Open {
            // The client has left: nothing would go on with another connection and send what is left.
            self.server.stay();
            cx.waker().wake_by_ref();
        }
        if self.keeps_server && self.end.is_none() && self.parts(cx) {
            return Poll::Ready(End::Rest);
        }
        if self.keeps_server && self.to_server.state == PipeState::Closed && self.end.is_none() {
            let is_malformed = self.traces().is_some_and(Traces::is_malformed);
            if is_malformed || !self.requests.comes_to_rest() || !self.to_server.is_at_boundary() {
                // The server waits for what the client does not send any more: it learns of the end, as on a direct connection.
                self.keeps_server = false;
                self.to_server.state = PipeState::Ending;
                cx.waker().wake_by_ref();
            } else if !self.requests.is_owed() {
                self.end = Some(End::Client);
            }
        }
        // Again for a new state: its timer must be polled in this turn, as nothing else may wake the task.
        loop {
            let allowed = match self.end {
                Some(end) => {
                    if self.to_client.poll_finish(cx, self.client).is_ready() {
                        return Poll::Ready(end);
                    }
                    if phase == Phase::Cutting || self.requests.is_terminated() {
                        CUT_DELIVERY_TIMEOUT
                    } else {
                        DELIVERY_TIMEOUT
                    }
                }
                None if self.to_server.state == PipeState::Open
                    || self.to_server.state == PipeState::Ending =>
                {
                    // No time limit while the client is connected: queries run for hours, sessions idle for days.
                    return Poll::Pending;
                }
                // As on a direct connection: a query ends with its answer, or with its client.
                None if self.awaits_last_reply() => {
                    if self.client.hang_up_state() == HangUp::Full {
                        return Poll::Ready(End::Client);
                    }
                    HANG_UP_CHECK
                }
                None => SERVER_CLOSE_TIMEOUT,
            };
            let progressed = before != (self.to_client.total, self.to_client.kept.len());
            let waiting = timer.get_or_insert_with(|| ProgressTimeout::new(allowed));
            ready!(waiting.poll(cx, allowed, progressed));
            match self.end {
                Some(end) => return Poll::Ready(end),
                // The client is still there: checked again after another interval.
                None if self.awaits_last_reply() => *timer = None,
                None if self.to_server.state == PipeState::Closed => {
                    return Poll::Ready(End::Client);
                }
                // The server neither accepts nor sends anything.
                None => self.server_is_lost(),
            }
        }
    }

    fn traces(&self) -> Option<&Traces> {
        self.traces.as_deref().or_else(|| self.server.traces())
    }

    /// What the client has sent and the server has not been.
    pub(super) fn take_unsent(&mut self) -> BytesMut {
        let mut unsent = self.server.take_unsent();
        unsent.extend_from_slice(&std::mem::take(&mut self.to_server.kept));
        unsent
    }

    /// Whether the server connection can be another client's now.
    fn parts(&mut self, cx: &mut Context<'_>) -> bool {
        let is_delivered = self.to_client.is_between_messages() && !self.to_client.unflushed;
        if self.ends_at_rest
            && self.server.is_yielding()
            && is_delivered
            && self.to_server.state == PipeState::Open
        {
            return true;
        }
        let is_at_rest = self.ends_at_rest
            && self.requests.is_at_rest()
            && self.requests.status() == TransactionStatus::Idle
            && self.to_server.state == PipeState::Open
            && self.to_server.is_between_messages()
            && !self.to_server.unflushed
            && is_delivered;
        if !is_at_rest {
            return false;
        }
        let parts = self.server.parts(cx);
        self.activity.pin(self.server.pin());
        parts
    }

    /// Whether the client has closed its half and the server still owes it a reply.
    fn awaits_last_reply(&self) -> bool {
        self.to_server.state == PipeState::Closed && self.requests.is_owed()
    }

    fn count(&mut self, now: impl FnOnce() -> u64) {
        self.to_server.count();
        self.to_client.count();
        self.began.measure(&mut self.requests, self.metrics, now);
    }

    /// Relays from the client. An error ends the session.
    fn poll_from_client(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        let over = matches!(self.to_server.state, PipeState::Closed | PipeState::Refused);
        if over || self.end.is_some() {
            return Ok(());
        }
        let (requests, unsolicited) = (&mut self.requests, &mut self.unsolicited);
        let (keeps_server, is_withheld) = (self.keeps_server, &mut self.is_withheld);
        let traces = &mut self.traces;
        // A cell, as one closure writes it and another reads it.
        let is_terminated = Cell::new(false);
        // A full queue bounds the memory for requests without an answer; the client waits, as on a full socket.
        let pumped = if requests.is_full() {
            self.to_server.poll_hold(cx, self.server)
        } else {
            self.to_server.poll_pump(
                cx,
                self.client,
                self.server,
                |chunk| unsolicited.strip(chunk),
                |seen| {
                    requests.from_client(seen);
                    is_terminated.set(requests.is_terminated());
                },
                |chunk| {
                    if let Some(traces) = traces {
                        traces.client_sends(chunk);
                    }
                    if keeps_server && is_terminated.get() {
                        *is_withheld = withhold_terminate(chunk);
                    }
                },
            )
        };
        if keeps_server {
            let traces = self.traces.as_deref_mut();
            let traces = traces.or_else(|| self.server.traces_mut());
            // The server waits 5 s for connections to end (CountOtherDBBackends of PostgreSQL).
            if let Some(database) = traces.and_then(Traces::take_database)
                && let Some(pools) = self.pools
            {
                pools.retire(&database);
            }
        }
        if keeps_server && is_terminated.get() && self.to_server.state == PipeState::Open {
            // Nothing that follows counts. What came before is still to be written.
            self.to_server.state = PipeState::Ending;
            cx.waker().wake_by_ref();
        }
        match pumped {
            Poll::Ready(Err(broken @ (Broken::Source | Broken::Silent))) => return Err(broken),
            // The server accepts no more, but may have sent the reason: reading from it continues.
            Poll::Ready(Err(Broken::Sink)) => self.to_server.state = PipeState::Refused,
            Poll::Ready(Ok(())) => {
                // An error here is left to the next read, which knows the reason.
                let is_done = if keeps_server {
                    self.to_server.poll_flush(cx, self.server).is_ready()
                } else {
                    Pin::new(&mut *self.server).poll_shutdown(cx).is_ready()
                };
                if is_done {
                    self.to_server.state = PipeState::Closed;
                }
            }
            Poll::Pending => {}
        }
        Ok(())
    }

    /// Relays from the server. An error ends the session.
    fn poll_from_server(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        if self.end.is_some() {
            return Ok(());
        }
        let (requests, server_error) = (&mut self.requests, &mut self.server_error);
        let traces = &mut self.traces;
        // A cell, as one closure writes it and another reads it.
        let ends_in_error = Cell::new(requests.is_explained());
        let pumped = self.to_client.poll_pump(
            cx,
            self.server,
            self.client,
            |_| {},
            |seen| {
                requests.from_server(seen);
                ends_in_error.set(requests.is_explained());
            },
            |chunk| {
                if let Some(traces) = traces {
                    traces.server_sends(chunk);
                }
                server_error.keep(chunk, ends_in_error.get());
            },
        );
        match pumped {
            Poll::Ready(Err(Broken::Sink)) => return Err(Broken::Sink),
            Poll::Ready(Err(Broken::Silent)) => {
                self.loss.is_lost = true;
                self.server_is_lost();
            }
            Poll::Ready(Err(Broken::Source) | Ok(())) => self.server_is_lost(),
            Poll::Pending => {}
        }
        Ok(())
    }

    /// Ends the session because the server sends no more, with an error for the client unless the server has sent one.
    fn server_is_lost(&mut self) {
        // A server that closes after a Terminate does what the client has requested.
        self.end = Some(if self.requests.is_terminated() {
            End::Client
        } else {
            End::Server
        });
        // A client that has closed its half expects this.
        if matches!(self.to_server.state, PipeState::Open | PipeState::Refused) {
            // 08006: pools such as HikariCP discard a connection after any error of class 08.
            self.append_error(&if self.loss.is_lost {
                Report::new(
                    sqlstate::CONNECTION_FAILURE,
                    "the network path to the Lakebase endpoint is lost: it acknowledges nothing",
                )
                .with_hint("Whether the last statement was executed is not known. Connect again.")
            } else {
                Report::new(
                    sqlstate::CONNECTION_FAILURE,
                    "the Lakebase endpoint closed the connection",
                )
                .with_hint("The endpoint was suspended, restarted or failed over. Connect again.")
            });
        }
    }

    fn apply(&mut self, phase: Phase) {
        let may_end = match phase {
            Phase::Serving => false,
            Phase::Draining => {
                self.requests.is_idle()
                    && self.to_server.is_between_messages()
                    && self.to_client.is_between_messages()
            }
            Phase::Cutting => true,
        };
        if may_end && self.end.is_none() {
            self.end = Some(End::Shutdown {
                orderly: self.to_server.state == PipeState::Open
                    && self.to_server.is_between_messages(),
            });
            // As for a server that is shut down: pools such as HikariCP discard the connection.
            self.append_error(&shut_down(self.shutdown));
        }
    }

    /// Sends an error to the client, where it is understood as one.
    fn append_error(&mut self, report: &Report) {
        if !self.requests.is_terminated() && !self.requests.is_explained() {
            self.to_client.append(&report.encode_fatal());
        }
    }
}

/// Removes the Terminate that ends `chunk`; `false` if something follows it.
fn withhold_terminate(chunk: &mut &[u8]) -> bool {
    let Some(before) = chunk.strip_suffix(TERMINATE) else {
        return false;
    };
    *chunk = before;
    true
}

/// Watches the path to the server for loss by `TCP_USER_TIMEOUT`.
///
/// That also ends a connection whose peer is alive, acknowledges probes and does not read. So it is in force only while
/// fewer bytes await an answer than fit into any receive buffer: then a live peer acknowledges all of them.
#[derive(Default)]
struct PathLoss {
    timeout: Option<Duration>,
    is_lifted: bool,
    is_lost: bool,
    /// Bytes that had been sent when the server last owed nothing.
    answered: u64,
}

impl PathLoss {
    /// A quarter of the smallest initial receive window of any system (64 kB).
    const MAX_UNANSWERED: u64 = 16 * 1024;

    /// Whether the timeout that is to be in force changes.
    fn update(&mut self, sent: u64, is_owed: bool) -> bool {
        if !is_owed {
            self.answered = sent;
        }
        let is_lifted = sent.wrapping_sub(self.answered) > Self::MAX_UNANSWERED;
        self.timeout.is_some() && std::mem::replace(&mut self.is_lifted, is_lifted) != is_lifted
    }

    fn timeout_in_force(&self) -> Option<Duration> {
        self.timeout.filter(|_| !self.is_lifted)
    }
}

/// The end of what the server has sent, while that is an error.
#[derive(Default)]
struct TrailingError(Vec<u8>);

impl TrailingError {
    /// Longer errors are not kept.
    const LIMIT: usize = 1024;

    fn keep(&mut self, chunk: &[u8], ends_in_error: bool) {
        if !ends_in_error {
            // No allocation while there is no error.
            self.0 = Vec::new();
            return;
        }
        self.0.extend_from_slice(chunk);
        let excess = self.0.len().saturating_sub(Self::LIMIT);
        // The front: `fatal` looks for an error at the end.
        self.0.drain(..excess);
    }

    /// The message of a FATAL or PANIC error that ends the bytes kept; other errors may quote SQL.
    fn fatal(&self) -> Option<String> {
        let bytes = &self.0;
        let is_last = |&start: &usize| {
            let header = Header::first(bytes.get(start..).unwrap_or_default());
            header.ok().flatten().is_some_and(|it| {
                it.tag == tag::ERROR_RESPONSE && start + it.frame_len() == bytes.len()
            })
        };
        let start = (0..bytes.len()).rev().find(is_last)?;
        let fields = ErrorFields::parse(bytes.get(start + HEADER_LEN..)?);
        matches!(fields.severity.as_str(), "FATAL" | "PANIC").then_some(fields.message)
    }
}

/// When what the server works on began, by the clock of [`ActivityRecord::now`].
#[derive(Default)]
struct Began {
    query: Option<u64>,
    transaction: Option<u64>,
}

impl Began {
    /// Counts what has been answered, and measures its time.
    #[inline]
    fn measure(&mut self, requests: &mut Requests, metrics: &Metrics, now: impl FnOnce() -> u64) {
        let answered = requests.take_answered();
        let is_owed = requests.is_owed();
        // Nothing has ended, and nothing has begun.
        if answered.queries == 0 && is_owed == self.query.is_some() {
            return;
        }
        let now = now();
        // All threads share the counters, so that a poll without an answer leaves them alone.
        if answered.queries > 0 {
            metrics.queries.inc_by(answered.queries.into());
            // A query whose answer is there by the time it is seen took no time.
            let since = |began: Option<u64>| now.saturating_sub(began.unwrap_or(now));
            let mut took = Took::new(since(self.query), answered.queries);
            metrics.query_seconds.add(&took);
            if answered.transactions > 0 {
                metrics.transactions.inc_by(answered.transactions.into());
                let is_same =
                    self.transaction == self.query && answered.transactions == answered.queries;
                if !is_same {
                    took = Took::new(since(self.transaction), answered.transactions);
                }
                metrics.transaction_seconds.add(&took);
                self.transaction = None;
            }
        }
        self.query = is_owed.then_some(now);
        if is_owed || requests.status() != TransactionStatus::Idle {
            self.transaction.get_or_insert(now);
        }
    }
}

/// The phase of the shutdown; `now` is the latest value that is available without a lock. The task is woken by the next
/// phase: `next` waits for the token of draining, then for that of `cutting`.
///
/// The tokens lock, so they are polled only when the phase is not the one that they have `reached`. It changes before its
/// token does: then the token is polled again, and wakes the task.
fn poll_phase<'a>(
    cx: &mut Context<'_>,
    now: Phase,
    reached: &mut Option<Phase>,
    mut next: Pin<&mut WaitForCancellationFuture<'a>>,
    cutting: &'a CancellationToken,
) -> Phase {
    let mut phase = reached.unwrap_or(Phase::Serving);
    if phase == Phase::Serving && next.as_mut().poll(cx).is_ready() {
        phase = Phase::Draining;
        next.set(cutting.cancelled());
    }
    if phase == Phase::Draining && next.poll(cx).is_ready() {
        phase = Phase::Cutting;
    }
    *reached = Some(phase);
    phase.max(now)
}

/// A timeout that starts anew with each progress of the other side.
struct ProgressTimeout {
    allowed: Duration,
    // A box, as it exists only while a session ends.
    sleep: Pin<Box<Sleep>>,
}

impl ProgressTimeout {
    fn new(allowed: Duration) -> Self {
        Self {
            allowed,
            sleep: Box::pin(sleep(allowed)),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>, allowed: Duration, progressed: bool) -> Poll<()> {
        if progressed || allowed != self.allowed {
            self.allowed = allowed;
            self.sleep.as_mut().reset(Instant::now() + allowed);
        }
        self.sleep.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests;
