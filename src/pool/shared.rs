//! A server connection that clients share, as one of them sees it.
//!
//! Between the relay, which has the client's view of the protocol, and the stream to the server: messages are renamed,
//! added, removed and answered on the way, so that the client finds its own prepared statements on any connection.

mod partial;

use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use self::partial::{Arrived, Front, Partial, emit};
use super::{
    ClientState, refusal,
    retention::RETENTION,
    server::{CLIENT_ENCODING, Record},
    settings::{Change, Dialect, Settings},
    statements::{Blocked, ClientMessage, Meaning, Passage, Sent},
};
use crate::{
    net::socket::{Socket, Transport},
    protocol::{
        frame::{HEADER_LEN, frame_body, tag},
        lexer::{Backslash, is_ascii_safe, statements},
        requests::TransactionStatus,
        tag::Command,
        traces::Traces,
    },
    telemetry::labels::PinReason,
    upstream::Stream,
};

/// Bytes of a message that are kept until it is whole. What is longer is passed in pieces, and names no statement of the pool's.
const MAX_HELD: usize = 1024 * 1024;

/// Requests in flight, while none of other clients wait: those that are sent cannot give way any more.
const MAX_UNITS: u64 = 16;

/// Bytes of memory for requests that a leased connection keeps from one to the next.
const MAX_KEPT: usize = 4096;

/// The stream of a leased connection.
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts about one stream, not states of a machine"
)]
pub(crate) struct SharedStream<'a> {
    stream: &'a mut Stream,
    record: &'a mut Record,
    client: &'a mut ClientState,
    from_client: Partial,
    from_server: Partial,
    /// Not yet written.
    to_server: BytesMut,
    /// Not yet read.
    to_client: BytesMut,
    /// A message of the client waits for an answer to an earlier one.
    is_blocked: bool,
    /// Parameters that have been reported since the last transaction, with their values before.
    reported: Vec<(String, Option<Vec<u8>>)>,
    has_ended: bool,
    /// The client has been served with this connection.
    has_served: bool,
    /// The client's next request waits for another connection.
    is_yielding: bool,
    /// No request does any more.
    stays: bool,
    /// The client has reset what its login set: the next lease sets that again.
    is_reset: bool,
    /// The client is at rest, and keeps the connection.
    is_kept: bool,
}

impl<'a> SharedStream<'a> {
    pub(super) fn new(
        stream: &'a mut Stream,
        record: &'a mut Record,
        client: &'a mut ClientState,
    ) -> Self {
        if record.slot.retention.end() {
            // This client needs it for longer.
            record.slot.pool().serve_again();
        }
        client.statements.begin(&mut record.statements);
        Self {
            stream,
            record,
            client,
            from_client: Partial::default(),
            from_server: Partial::default(),
            to_server: BytesMut::new(),
            to_client: BytesMut::new(),
            is_blocked: false,
            reported: Vec::new(),
            has_ended: false,
            has_served: false,
            is_yielding: false,
            stays: false,
            is_reset: false,
            is_kept: false,
        }
    }

    /// Whether the client, at rest, parts with the connection now, perhaps after a verification. Wakes the task when it does.
    pub(crate) fn parts(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.is_at_rest() {
            return false;
        }
        let pin = self.pin();
        if let Some(reason) = pin
            && self.client.reported_pin != pin
        {
            self.record.slot.pool().context.pinned(reason);
        }
        self.client.reported_pin = pin;
        (pin.is_none() || self.is_suspect()) && !self.keeps(cx)
    }

    fn is_suspect(&self) -> bool {
        self.client.is_suspect() && !self.is_unknown()
    }

    /// Whether nothing is on its way but what the client knows of.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.from_client.is_at_boundary()
            && self.from_server.is_at_boundary()
            && self.to_server.is_empty()
            && self.to_client.is_empty()
            && self.client.statements.is_at_rest()
            && !self.is_lost()
    }

    /// Why the client needs this connection.
    fn pin(&self) -> Option<PinReason> {
        if self.is_unknown() {
            Some(PinReason::UnknownState)
        } else if self.client.statements.has_large() {
            Some(PinReason::LargeStatement)
        } else {
            self.client.pin()
        }
    }

    pub(crate) fn client(&self) -> &ClientState {
        self.client
    }

    /// What the client has done.
    pub(crate) fn traces(&self) -> &Traces {
        &self.client.traces
    }

    pub(crate) fn traces_mut(&mut self) -> &mut Traces {
        &mut self.client.traces
    }

    /// Whether the connection is to be another client's, although this one has sent its next request already.
    pub(crate) fn is_yielding(&self) -> bool {
        self.is_yielding
    }

    /// The client has left, and what it has sent is sent to this connection, although others wait for one.
    pub(crate) fn stay(&mut self) {
        self.is_yielding = false;
        self.stays = true;
    }

    /// Whether the client, at rest, keeps the connection. Wakes the task when it no longer does.
    fn keeps(&mut self, cx: &mut Context<'_>) -> bool {
        let is_pinned = self.client.reported_pin.is_some();
        let is_over = self.record.has_ended || self.is_reset || !self.client.is_retaining();
        if is_over && !is_pinned {
            return false;
        }
        let slot = &self.record.slot;
        if !self.is_kept {
            let now = Instant::now();
            let ends_at = (!is_pinned).then(|| now + RETENTION);
            slot.retention.begin(now, ends_at, cx.waker());
            if let Some(ends_at) = ends_at {
                slot.pool().attend_by(ends_at);
            }
            self.is_kept = true;
        }
        // After the record of it: a client that waits sets this before it looks for what is kept.
        !slot.pool().is_short.load(Ordering::SeqCst) && !slot.retention.is_wanted()
    }

    /// The client is not at rest any more.
    fn leave_rest(&mut self) {
        self.client.is_verified = false;
        let slot = &self.record.slot;
        if std::mem::take(&mut self.is_kept) && slot.retention.end() {
            // Another client needs the connection of yet another.
            slot.pool().serve_again();
        }
    }

    /// The server has ended the connection; `true` if that is of no consequence to the client, which is at rest.
    fn is_spared(&mut self) -> bool {
        if self.is_kept && self.client.reported_pin.is_none() && !self.record.has_ended {
            self.record.has_ended = true;
            self.record
                .slot
                .pool()
                .context
                .metrics
                .pool_hidden_losses
                .inc();
        }
        self.record.has_ended
    }

    /// The front of what the client has sent and the server has not been.
    pub(crate) fn take_unsent(&mut self) -> BytesMut {
        std::mem::take(&mut self.from_client.held)
    }

    /// Whether a request of the client must wait: for answers to earlier ones, or for another connection.
    fn must_wait(&mut self, tag: u8) -> bool {
        // The shortage may be over since, and then the request is sent.
        self.is_yielding = false;
        let statements = &self.client.statements;
        let is_within = statements.is_within_request()
            || matches!(tag, tag::COPY_DATA | tag::COPY_DONE | tag::COPY_FAIL);
        if is_within {
            return false;
        }
        let in_flight = statements.units_in_flight();
        if in_flight >= MAX_UNITS {
            return true;
        }
        // One request at least, as it has waited for this connection.
        if self.stays
            || !self.has_served
            || !self.record.slot.pool().is_short.load(Ordering::Relaxed)
        {
            return false;
        }
        self.is_yielding = statements.is_at_rest() && statements.is_idle() && self.pin().is_none();
        in_flight > 0 || self.is_yielding
    }

    /// Whether what the client has is not known, so that no query shows it.
    fn is_unknown(&self) -> bool {
        self.is_lost() || self.client.statements.has_lost_names()
    }

    fn is_lost(&self) -> bool {
        self.from_client.is_lost || self.from_server.is_lost || self.client.statements.is_lost()
    }

    fn meaning(&mut self, tag: u8) -> Meaning {
        Meaning {
            scope: self.client.scope(tag == tag::PARSE),
            epoch: self.record.slot.pool().epoch.load(Ordering::Relaxed),
        }
    }

    /// Takes the next piece of what the client sends, which is the rest of `chunk`; nothing of it, if it must wait.
    fn take_from_client(
        &mut self,
        chunk: &[u8],
        bytes: &mut &[u8],
        unchanged: &mut usize,
    ) -> Result<(), Blocked> {
        let before = *bytes;
        let passed = self.from_client.take_rest(bytes);
        let at = chunk.len() - bytes.len();
        let taken = before.len() - bytes.len();
        if taken > 0 {
            let place = Some(at - passed.len());
            emit(passed, place, unchanged, &mut self.to_server);
            let taken = before.get(..taken).unwrap_or_default();
            self.client.traces.client_continues(taken);
        }
        if bytes.is_empty() {
            return Ok(());
        }
        match Front::of(bytes) {
            Front::Message(message)
                if self.from_client.held.is_empty() && message.is_enough_of_client() =>
            {
                let (frame, rest) = bytes.split_at(HEADER_LEN + message.body.len());
                self.client_sends(message, frame, Some(at), unchanged)?;
                *bytes = rest;
                Ok(())
            }
            _ => {
                self.from_client.hold(bytes);
                self.take_held()
            }
        }
    }

    /// Takes the client's message that is held, once enough of it is there.
    fn take_held(&mut self) -> Result<(), Blocked> {
        let held = std::mem::take(&mut self.from_client.held);
        match Front::of(&held) {
            Front::Message(message) if message.is_enough_of_client() => {
                if let Err(blocked) = self.client_sends(message, &held, None, &mut 0) {
                    self.from_client.held = held;
                    return Err(blocked);
                }
            }
            Front::Invalid => {
                self.from_client.is_lost = true;
                self.to_server.extend_from_slice(&held);
            }
            Front::Message(_) | Front::Nothing => self.from_client.held = held,
        }
        Ok(())
    }

    fn client_sends(
        &mut self,
        message: Arrived<'_>,
        frame: &[u8],
        at: Option<usize>,
        unchanged: &mut usize,
    ) -> Result<(), Blocked> {
        let Arrived { tag, length, body } = message;
        if self.must_wait(tag) {
            self.is_blocked = true;
            return Err(Blocked);
        }
        let message = ClientMessage { tag, length, body };
        let arrived = body.len();
        if let Some(reason) = self.refused(message) {
            let report = refusal::report(reason);
            let servers = &mut self.record.statements;
            let statements = &mut self.client.statements;
            statements.refuse(servers, tag, &report, &mut self.to_server);
            self.client.traces.client_is_refused();
            self.from_client.removed = length - arrived;
            return Ok(());
        }
        let meaning = self.meaning(tag);
        let sent = self.client.statements.client_sends(
            &mut self.record.statements,
            message,
            meaning,
            &mut self.to_server,
            &mut self.to_client,
        );
        self.is_blocked = sent.is_err();
        match sent? {
            Sent::Unchanged => {
                emit(frame, at, unchanged, &mut self.to_server);
                self.from_client.passed = length - arrived;
            }
            Sent::Rest(from) => {
                let rest = body.get(from..).unwrap_or_default();
                self.to_server.extend_from_slice(rest);
                self.from_client.removed = from.saturating_sub(arrived);
                self.from_client.passed = length - from.max(arrived);
            }
        }
        self.client.traces.client_begins(tag);
        self.client.traces.client_continues(body);
        Ok(())
    }

    /// Why a message is refused that would pin the client.
    fn refused(&self, message: ClientMessage<'_>) -> Option<PinReason> {
        // What the server discards is not looked at.
        if !self.client.refuses_pins || self.client.statements.is_skipping() {
            return None;
        }
        let reason = refusal::pin_of(message, self.dialect())?;
        let metrics = &self.record.slot.pool().context.metrics;
        metrics.pool_refused_pins[reason].inc();
        Some(reason)
    }

    fn dialect(&self) -> Dialect {
        Dialect {
            backslash: Backslash::Plain,
            is_utf8: self.reports(CLIENT_ENCODING, "UTF8"),
        }
    }

    /// Takes what the server has sent. As many of its bytes as are returned are the client's as they are; what else it gets is
    /// appended to `to_client`.
    fn take_from_server(&mut self, chunk: &[u8]) -> usize {
        let mut bytes = chunk;
        let mut unchanged = 0;
        while !bytes.is_empty() {
            let passed = self.from_server.take_rest(&mut bytes);
            if !passed.is_empty() {
                let at = chunk.len() - bytes.len() - passed.len();
                emit(passed, Some(at), &mut unchanged, &mut self.to_client);
                continue;
            }
            let at = chunk.len() - bytes.len();
            let is_whole = |bytes| match Front::of(bytes) {
                Front::Message(message) => message.is_enough_of_server().then_some(message),
                Front::Nothing | Front::Invalid => None,
            };
            if self.from_server.held.is_empty()
                && let Some(message) = is_whole(bytes)
            {
                let (frame, rest) = bytes.split_at(HEADER_LEN + message.body.len());
                bytes = rest;
                self.server_sends(message, frame, Some(at), &mut unchanged);
                continue;
            }
            self.from_server.hold(&mut bytes);
            let held = std::mem::take(&mut self.from_server.held);
            match Front::of(&held) {
                Front::Message(message) if message.is_enough_of_server() => {
                    self.server_sends(message, &held, None, &mut unchanged);
                }
                Front::Invalid => {
                    self.from_server.is_lost = true;
                    emit(&held, None, &mut unchanged, &mut self.to_client);
                }
                Front::Message(_) | Front::Nothing => self.from_server.held = held,
            }
        }
        unchanged
    }

    fn server_sends(
        &mut self,
        message: Arrived<'_>,
        frame: &[u8],
        at: Option<usize>,
        unchanged: &mut usize,
    ) {
        let Arrived { tag, length, body } = message;
        let left = length - body.len();
        let is_plain = match tag {
            // The most frequent ones.
            tag::DATA_ROW | tag::COPY_DATA => true,
            tag::ROW_DESCRIPTION => self.client.statements.is_in_query(),
            _ => false,
        };
        if is_plain {
            self.from_server.passed = left;
            return emit(frame, at, unchanged, &mut self.to_client);
        }
        // Its last message.
        if tag == tag::ERROR_RESPONSE && self.is_spared() {
            self.from_server.removed = left;
            return;
        }
        let command = (tag == tag::COMMAND_COMPLETE)
            .then(|| Command::of(body.strip_suffix(b"\0").unwrap_or_default()));
        let mut behind = BytesMut::new();
        let servers = &mut self.record.statements;
        let statements = &mut self.client.statements;
        let passage = statements.server_sends(servers, tag, body, &mut behind);
        self.raise_epoch();
        if let Some(command) = command {
            self.follow_command(command);
        } else {
            self.follow_settings(tag, frame);
        }
        match passage {
            Passage::Pass => {
                self.from_server.passed = left;
                emit(frame, at, unchanged, &mut self.to_client);
            }
            Passage::Drop => self.from_server.removed = left,
        }
        self.to_client.extend_from_slice(&behind);
    }

    /// Raises the epoch if statements that are prepared from now on may mean something else.
    fn raise_epoch(&mut self) {
        let statements = &mut self.client.statements;
        let epoch = &self.record.slot.pool().epoch;
        if statements.take_defined() {
            epoch.fetch_add(1, Ordering::Relaxed);
        }
        if let Some(outdated) = statements.take_outdated() {
            // By the first of many.
            let next = outdated + 1;
            let _ = epoch.compare_exchange(outdated, next, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Follows the session by a command that the server has completed.
    fn follow_command(&mut self, command: Command) {
        self.client.traces.completed(command);
        if command != Command::Other || self.client.traces.may_set_scope() {
            self.client.scope_of_transaction = None;
        }
        let text = self.client.statements.take_completed();
        if matches!(command, Command::Other | Command::Definition) {
            return;
        }
        let dialect = self.dialect();
        let text = text.unwrap_or_default();
        let statement = statements(&text, dialect.backslash).next();
        let changes = &mut self.client.changes;
        let completed = changes.complete(command, statement.as_ref(), dialect);
        self.learned(completed);
    }

    /// Follows the settings of the session by another message of the server.
    fn follow_settings(&mut self, tag: u8, frame: &[u8]) {
        let body = frame_body(frame);
        match tag {
            tag::PARAMETER_STATUS => {
                let Some((name, before)) = self.record.reported.replace(frame) else {
                    return;
                };
                if self.reported.iter().all(|(it, _)| *it != name) {
                    self.reported.push((name, before));
                }
            }
            tag::ERROR_RESPONSE => self.client.changes.fail(),
            tag::READY_FOR_QUERY => {
                // At once, as texts are read differently within the transaction, too.
                if !self.reported.is_empty() && self.reports("standard_conforming_strings", "off") {
                    self.learned(Err(PinReason::Unparsed));
                }
                self.has_served = true;
                let status =
                    TransactionStatus::from_byte(body.first().copied().unwrap_or_default());
                let changes = self.client.changes.ready(status);
                if !changes.is_empty() {
                    self.apply(&changes);
                    let login = &self.client.login;
                    let is_reset = changes.iter().any(Change::is_reset_of_login);
                    if is_reset {
                        self.record.reset_name();
                    }
                    self.is_reset |= is_reset
                        && (login.client_encoding.is_some() || !self.record.resets_to(login));
                }
                if status == TransactionStatus::Idle && !self.reported.is_empty() {
                    self.check_reported(&changes);
                }
            }
            _ => {}
        }
    }

    fn apply(&mut self, changes: &[Change]) {
        let none = Settings::default();
        let table = Arc::clone(&self.record.slot.pool().settings_table);
        let client = table.apply(&self.client.settings, &none, changes);
        let server = table.apply(&self.record.settings, &none, changes);
        let applied = match (client, server) {
            (Ok(client), Ok(server)) => {
                self.client.set(client);
                self.record.settings = server;
                Ok(())
            }
            (Err(reason), _) | (_, Err(reason)) => Err(reason),
        };
        self.learned(applied);
    }

    /// Suspects a client one of whose settings has been changed by something else than a SET.
    fn check_reported(&mut self, changes: &[Change]) {
        for (name, before) in std::mem::take(&mut self.reported) {
            let setting = name.to_ascii_lowercase();
            let is_explained = self.record.reported.value(&name) == before.as_deref()
                || changes.iter().any(|change| change.concerns(&setting))
                // By the server.
                || setting == "in_hot_standby";
            if is_explained {
                continue;
            }
            if self.client.settings.names().any(|it| it == setting) {
                // The server would show the same for what it has set itself.
                self.learned(Err(PinReason::Settings));
            } else if !self.client.unexplained.contains(&name) {
                self.client.unexplained.push(name);
            }
        }
        self.client.reported = self.record.reported.frames();
        let encoding = self.record.reported.value(CLIENT_ENCODING);
        if !is_ascii_safe(&String::from_utf8_lossy(encoding.unwrap_or_default())) {
            self.learned(Err(PinReason::Encoding));
        }
    }

    fn reports(&self, name: &str, value: &str) -> bool {
        self.record.reported.value(name) == Some(value.as_bytes())
    }

    fn learned(&mut self, result: Result<(), PinReason>) {
        if let Err(reason) = result {
            self.client.pin.get_or_insert(reason);
        }
    }

    /// Writes what is to be written, and what can be sent of a message that had to wait.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while !self.to_server.is_empty() {
                let written = ready!(Pin::new(&mut *self.stream).poll_write(cx, &self.to_server))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                self.to_server.advance(written);
            }
            // The connection's next request takes the same memory, unless that is much.
            if self.to_server.capacity() > MAX_KEPT {
                self.to_server = BytesMut::new();
            }
            if !self.is_blocked || self.from_client.held.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if self.take_held().is_err() && self.to_server.is_empty() {
                return self.poll_answer(cx);
            }
        }
    }

    /// Writes bytes in front of all that is to be written. An error comes again with the next write.
    fn write_first(&mut self, cx: &mut Context<'_>, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let written = if !self.to_server.is_empty() && bytes.len() <= MAX_KEPT {
            // In one write: each is a TLS record, a system call, and a wakeup of the server.
            0
        } else {
            match Pin::new(&mut *self.stream).poll_write(cx, bytes) {
                Poll::Ready(Ok(written)) => written,
                Poll::Ready(Err(_)) | Poll::Pending => 0,
            }
        };
        let left = bytes.get(written..).unwrap_or_default();
        if !left.is_empty() {
            let behind = std::mem::replace(&mut self.to_server, left.into());
            self.to_server.extend_from_slice(&behind);
        }
    }

    /// What was sent must reach the server, so that it answers. Its answer wakes the task.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut *self.stream).poll_flush(cx))?;
        Poll::Pending
    }
}

impl AsyncRead for SharedStream<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        space: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if !self.to_client.is_empty() {
                let length = self.to_client.len().min(space.remaining());
                space.put_slice(&self.to_client.split_to(length));
                if self.to_client.is_empty() {
                    self.to_client = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            if self.has_ended {
                return Poll::Ready(Ok(()));
            }
            if self.client.statements.is_lost() && !self.record.statements.is_exclusive() {
                // Whatever follows might be taken for another answer.
                tracing::warn!(
                    connection = self.record.id,
                    "the server's answers do not fit the requests; the session is closed"
                );
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            let before = space.filled().len();
            let read = ready!(Pin::new(&mut *self.stream).poll_read(cx, space));
            let received = space.filled().get(before..).unwrap_or_default();
            if (read.is_err() || received.is_empty()) && self.is_spared() {
                // The relay ends at once.
                return Poll::Pending;
            }
            read?;
            if received.is_empty() {
                // In the middle of a message perhaps.
                self.has_ended = true;
                self.to_client = std::mem::take(&mut self.from_server.held);
                continue;
            }
            let unchanged = self.take_from_server(received);
            space.set_filled(before + unchanged);
            if self.is_blocked || self.client.statements.is_lost() {
                cx.waker().wake_by_ref();
            }
            if unchanged > 0 {
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for SharedStream<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut rest = bytes;
        if !bytes.is_empty() {
            self.leave_rest();
        }
        loop {
            ready!(self.poll_send(cx))?;
            let mut unchanged = 0;
            let mut take = |rest: &mut _| self.take_from_client(bytes, rest, &mut unchanged);
            while !rest.is_empty() && take(&mut rest).is_ok() {}
            let taken = bytes.len() - rest.len();
            if taken > 0 {
                self.write_first(cx, bytes.get(..unchanged).unwrap_or_default());
                // An error comes again with the next write, and what is left is written by the flush.
                let _ = self.poll_send(cx);
                return Poll::Ready(Ok(taken));
            }
            if bytes.is_empty() {
                return Poll::Ready(Ok(0));
            }
            if self.to_server.is_empty() {
                ready!(self.poll_answer(cx))?;
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut *self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        Pin::new(&mut *self.stream).poll_shutdown(cx)
    }
}

impl Transport for SharedStream<'_> {
    fn socket(&self) -> Option<&Socket> {
        self.stream.socket()
    }
}
