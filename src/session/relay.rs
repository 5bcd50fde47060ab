//! Bytes between a client and its server, aware of message boundaries, never holding a message.
//!
//! The end of each side:
//!
//! | what happens | what follows |
//! |---|---|
//! | the client closes its half | the server's half is closed; replies drain however long the server takes |
//! | the same, and no reply is owed | the server may take 5 s to close |
//! | the client resets, or takes no more | both are closed at once |
//! | the server closes | what it said goes to the client, then the client is closed |
//! | the server breaks between two messages, having said nothing | the client is told so, then closed |
//! | the server takes no more | its last words are read, as they explain why |
//! | draining | an idle session is ended with 57P01, others as soon as they are idle |
//! | cutting | every session is ended, with 57P01 where that cannot be mistaken for part of a reply |
//!
//! No word of ours lands inside a message, follows an error of the server's, or is said to a client that has said goodbye.

mod pipe;
mod unasked;

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use prometheus::IntCounter;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use self::{
    pipe::{Broken, Pipe, PipeState},
    unasked::UnaskedPasswords,
};
use crate::{
    net::socket::{HangUp, Transport},
    protocol::{
        error::{ErrorFields, Report, sqlstate},
        frame::{HEADER_LEN, tag},
        progress::{Answered, Progress},
    },
    shutdown::{Phase, Shutdown},
    status::ActivityRecord,
    telemetry::labels::SessionEnd,
};

/// How long the server may stay after a client has closed its half and no reply is owed.
const REPLY_PAUSE: Duration = Duration::from_secs(5);
/// How long a client may leave the last words of its server untouched.
const DELIVERY_PAUSE: Duration = Duration::from_mins(1);
/// The same, once the grace time of a shutdown is over.
const CUT_PAUSE: Duration = Duration::from_secs(1);
/// How often a client that has closed its half is checked for a reset: nothing is read from it any more, so that no event
/// reports one.
const HANG_UP_CHECK: Duration = Duration::from_secs(1);

/// How a relay came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The client left or broke.
    Client,
    /// The server left or broke.
    Server,
    /// We ended it.
    Shutdown {
        /// Whether the server waits for a message, so that a Terminate is understood as one.
        orderly: bool,
    },
}

impl End {
    /// The metric label.
    pub(super) const fn label(self) -> SessionEnd {
        match self {
            Self::Client => SessionEnd::Client,
            Self::Server => SessionEnd::Server,
            Self::Shutdown { .. } => SessionEnd::Shutdown,
        }
    }
}

/// Both directions of one session.
pub(super) struct Relay<'a, C, U> {
    client: &'a mut C,
    server: &'a mut U,
    shutdown: &'a Shutdown,
    to_server: Pipe,
    to_client: Pipe,
    progress: Progress,
    unasked: UnaskedPasswords,
    /// Who looks on.
    watch: Option<&'a ActivityRecord>,
    answers: Option<Answers>,
    loss: Loss,
    last_words: LastWords,
    /// Set once no more is read from the server.
    end: Option<End>,
}

impl<'a, C, U> Relay<'a, C, U>
where
    C: Transport,
    U: Transport,
{
    /// A relay that begins with what client and server have sent already; the counters count the bytes of each.
    pub(super) fn new(
        (client, from_client, client_bytes): (&'a mut C, &[u8], IntCounter),
        (server, from_server, server_bytes): (&'a mut U, &[u8], IntCounter),
        shutdown: &'a Shutdown,
    ) -> Self {
        let mut relay = Self {
            client,
            server,
            shutdown,
            to_server: Pipe::new(client_bytes),
            to_client: Pipe::new(server_bytes),
            progress: Progress::new(),
            unasked: UnaskedPasswords::default(),
            watch: None,
            answers: None,
            loss: Loss::default(),
            last_words: LastWords::default(),
            end: None,
        };
        let mut from_client = from_client;
        relay.unasked.strip(&mut from_client);
        relay
            .to_server
            .take_in(from_client, |seen| relay.progress.from_client(seen));
        relay.to_server.kept.extend_from_slice(from_client);
        relay
            .to_client
            .take_in(from_server, |seen| relay.progress.from_server(seen));
        relay.to_client.kept.extend_from_slice(from_server);
        relay
    }

    /// Lets `watch` know where the session stands.
    pub(super) fn watched(mut self, watch: &'a ActivityRecord) -> Self {
        self.watch = Some(watch);
        self
    }

    /// Lets `answers` count what the server has answered.
    pub(super) fn counting(mut self, answers: Answers) -> Self {
        self.answers = Some(answers);
        self
    }

    /// Counts the path to the server as lost when it acknowledges nothing for `limit`.
    pub(super) fn limited(mut self, limit: Option<Duration>) -> Self {
        self.loss.limit = limit;
        self
    }

    /// The error that the server ended with.
    pub(super) fn last_words(&self) -> Option<String> {
        if self.loss.is_lost {
            return Some("no acknowledgement: the network path is lost".to_owned());
        }
        self.last_words.fatal()
    }

    /// Runs until the session is over; what the server said last has then been handed to the client.
    ///
    /// Not cancel safe.
    pub(super) async fn run(&mut self) -> End {
        let shutdown = self.shutdown;
        let mut next = pin!(shutdown.draining().cancelled());
        let mut reached = None;
        let mut patience = None;
        poll_fn(|cx| {
            let phase = poll_phase(
                cx,
                shutdown.phase(),
                &mut reached,
                next.as_mut(),
                shutdown.cutting(),
            );
            self.poll(cx, phase, &mut patience)
        })
        .await
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        phase: Phase,
        patience: &mut Option<Patience>,
    ) -> Poll<End> {
        let before = (self.to_client.total, self.to_client.kept.len());
        let broken = self.poll_from_client(cx).is_err() || self.poll_from_server(cx).is_err();
        self.count();
        let owed = self.progress.is_owed();
        if self.loss.follow(self.to_server.total, owed)
            && let Some(socket) = self.server.socket()
        {
            socket.limit_acknowledgement(self.loss.limit_in_force());
        }
        if broken {
            return Poll::Ready(End::Client);
        }
        if let Some(watch) = self.watch {
            let activity = (&self.progress).into();
            watch.record(activity, self.to_server.total, self.to_client.total);
        }
        self.heed(phase);
        loop {
            let allowed = match self.end {
                Some(end) => {
                    // A client that is gone needs no telling.
                    if self.to_client.poll_finish(cx, self.client).is_ready() {
                        return Poll::Ready(end);
                    }
                    if phase == Phase::Cutting {
                        CUT_PAUSE
                    } else {
                        DELIVERY_PAUSE
                    }
                }
                None if self.to_server.state == PipeState::Open
                    || self.to_server.state == PipeState::Ending =>
                {
                    return Poll::Pending;
                }
                // As on a direct connection: a query ends with its answer, or with its client.
                None if self.awaits_last_reply() => {
                    if self.client.hang_up() == HangUp::Full {
                        return Poll::Ready(End::Client);
                    }
                    HANG_UP_CHECK
                }
                None => REPLY_PAUSE,
            };
            let progressed = before != (self.to_client.total, self.to_client.kept.len());
            let waiting = patience.get_or_insert_with(|| Patience::new(allowed));
            ready!(waiting.poll(cx, allowed, progressed));
            match self.end {
                Some(end) => return Poll::Ready(end),
                None if self.awaits_last_reply() => *patience = None,
                None if self.to_server.state == PipeState::Closed => {
                    return Poll::Ready(End::Client);
                }
                // A server that neither takes nor says anything.
                None => self.server_is_lost(),
            }
        }
    }

    /// Whether the client has closed its half and the server still owes it a reply.
    fn awaits_last_reply(&self) -> bool {
        self.to_server.state == PipeState::Closed && self.progress.is_owed()
    }

    fn count(&mut self) {
        self.to_server.count();
        self.to_client.count();
        if let Some(answers) = &self.answers {
            answers.count(self.progress.take_answered());
        }
    }

    /// Passes on what the client says. An error is the end of the session.
    fn poll_from_client(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        let over = matches!(self.to_server.state, PipeState::Closed | PipeState::Refused);
        if over || self.end.is_some() {
            return Ok(());
        }
        let (progress, unasked) = (&mut self.progress, &mut self.unasked);
        let pumped = self.to_server.poll_pump(
            cx,
            self.client,
            self.server,
            |chunk| unasked.strip(chunk),
            |seen| progress.from_client(seen),
            |_| {},
        );
        match pumped {
            Poll::Ready(Err(broken @ (Broken::Source | Broken::Silent))) => return Err(broken),
            // The server takes no more, but may have said why: go on reading from it.
            Poll::Ready(Err(Broken::Sink)) => self.to_server.state = PipeState::Refused,
            Poll::Ready(Ok(())) => {
                if Pin::new(&mut *self.server).poll_shutdown(cx).is_ready() {
                    self.to_server.state = PipeState::Closed;
                }
            }
            Poll::Pending => {}
        }
        Ok(())
    }

    /// Passes on what the server says. An error is the end of the session.
    fn poll_from_server(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        if self.end.is_some() {
            return Ok(());
        }
        let (progress, last_words) = (&mut self.progress, &mut self.last_words);
        let ends_in_error = Cell::new(progress.is_explained());
        let pumped = self.to_client.poll_pump(
            cx,
            self.server,
            self.client,
            |_| {},
            |seen| {
                progress.from_server(seen);
                ends_in_error.set(progress.is_explained());
            },
            |chunk| last_words.keep(chunk, ends_in_error.get()),
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

    /// No more comes from the server. Says why the session ends when the server has not.
    fn server_is_lost(&mut self) {
        // A server that closes after a Terminate does what the client has asked for.
        self.end = Some(if self.progress.is_terminated() {
            End::Client
        } else {
            End::Server
        });
        // A client that has closed its half has asked for this.
        if matches!(self.to_server.state, PipeState::Open | PipeState::Refused) {
            self.say(&if self.loss.is_lost {
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

    fn heed(&mut self, phase: Phase) {
        let may_end = match phase {
            Phase::Serving => false,
            Phase::Draining => {
                self.progress.is_idle()
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
            self.say(
                &Report::new(
                    sqlstate::ADMIN_SHUTDOWN,
                    "terminating connection because lakebase-proxy is shutting down",
                )
                .with_hint("Connect again."),
            );
        }
    }

    /// A last word to the client, where it is understood as one.
    fn say(&mut self, report: &Report) {
        if !self.progress.is_terminated() && !self.progress.is_explained() {
            self.to_client.append(&report.encode_fatal());
        }
    }
}

/// Whether the path to the server counts as lost when it acknowledges nothing.
///
/// `TCP_USER_TIMEOUT` also ends a connection whose peer is alive, acknowledges probes and does not read. So it is in force
/// only while fewer bytes wait for an answer than any receive buffer has room for: then a live peer acknowledges them all.
#[derive(Default)]
struct Loss {
    limit: Option<Duration>,
    is_lifted: bool,
    is_lost: bool,
    /// Bytes that had been sent when the server last owed nothing.
    answered: u64,
}

impl Loss {
    /// A quarter of the smallest receive window that systems begin with (64 kB).
    const UNANSWERED: u64 = 16 * 1024;

    /// Whether the limit that is to be in force changes.
    fn follow(&mut self, sent: u64, is_owed: bool) -> bool {
        if !is_owed {
            self.answered = sent;
        }
        let is_lifted = sent.wrapping_sub(self.answered) > Self::UNANSWERED;
        self.limit.is_some() && std::mem::replace(&mut self.is_lifted, is_lifted) != is_lifted
    }

    fn limit_in_force(&self) -> Option<Duration> {
        self.limit.filter(|_| !self.is_lifted)
    }
}

/// The end of what the server has sent, while that is an error.
#[derive(Default)]
struct LastWords(Vec<u8>);

impl LastWords {
    /// Longer errors are not kept.
    const LIMIT: usize = 1024;

    fn keep(&mut self, chunk: &[u8], ends_in_error: bool) {
        if !ends_in_error {
            // No allocation where there has been no error.
            self.0 = Vec::new();
            return;
        }
        self.0.extend_from_slice(chunk);
        let excess = self.0.len().saturating_sub(Self::LIMIT);
        self.0.drain(..excess);
    }

    /// The message of a FATAL or PANIC error that ends the bytes kept; other errors may quote SQL.
    fn fatal(&self) -> Option<String> {
        let bytes = &self.0;
        let is_last = |&start: &usize| {
            let header = bytes.get(start..).and_then(<[u8]>::first_chunk);
            matches!(header, Some(&[tag::ERROR_RESPONSE, a, b, c, d])
                if usize::try_from(u32::from_be_bytes([a, b, c, d])) == Ok(bytes.len() - start - 1))
        };
        let start = (0..bytes.len()).rev().find(is_last)?;
        let fields = ErrorFields::parse(bytes.get(start + HEADER_LEN..)?);
        matches!(fields.severity.as_str(), "FATAL" | "PANIC").then_some(fields.message)
    }
}

/// Counts what the server has answered.
pub(super) struct Answers {
    /// Answers up to a ReadyForQuery.
    pub(super) queries: IntCounter,
    /// Those after which no transaction was open.
    pub(super) transactions: IntCounter,
}

impl Answers {
    fn count(&self, answered: Answered) {
        if answered.queries > 0 {
            self.queries.inc_by(answered.queries.into());
        }
        if answered.transactions > 0 {
            self.transactions.inc_by(answered.transactions.into());
        }
    }
}

/// The phase, of which `now` is the latest that could be had without a lock; the task is woken by the next. `next` waits
/// for the token of draining, and then for that of `cutting`.
///
/// The tokens lock, so they are asked only when the phase is not the one they have `reached` with us. It changes before
/// its token does: then the token is asked again, and will wake us meanwhile.
fn poll_phase<'a>(
    cx: &mut Context<'_>,
    now: Phase,
    reached: &mut Option<Phase>,
    mut next: Pin<&mut WaitForCancellationFuture<'a>>,
    cutting: &'a CancellationToken,
) -> Phase {
    if *reached == Some(now) {
        return now;
    }
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

/// How long the other side may go on doing nothing.
struct Patience {
    allowed: Duration,
    sleep: Pin<Box<Sleep>>,
}

impl Patience {
    fn new(allowed: Duration) -> Self {
        Self {
            allowed,
            sleep: Box::pin(sleep(allowed)),
        }
    }

    /// Ready once nothing has happened for as long as is allowed.
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
