//! Prepared statements that follow their client to another server connection.
//!
//! On a connection that several clients share, each statement of the protocol has a name of the pool's, `lbp_` and a number;
//! equal texts are one statement. A Parse of what the server has is answered here, a Bind of what it has not is preceded by
//! a Parse, and answers to messages of the pool's are removed. On a connection that one client has had, every byte passes
//! as it is, and what the client prepares is only recorded.
//!
//! - Effects of a message count when its answer comes, in the order of the queue; an error undoes those up to the next Sync.
//!   What they are cannot be known while an earlier *unit*, which ends in a Sync or a Query, is outstanding: then the message
//!   waits ([`Blocked`]); for its own unit it does only behind a Flush.
//! - No error is answered here, because it must also fail the transaction: the server is sent a Bind of a statement that does
//!   not exist, and the client the error that it should have (`POISON`).
//! - Nothing is answered between an error and the Sync that ends its unit.

mod queue;
mod sending;
mod server;
mod sql;
mod text;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use bytes::{BufMut, BytesMut};

use self::{
    queue::{Awaits, Effect, InFlight, Portal, Shown},
    sending::Sending,
    server::{Known, Names},
    sql::Sql,
};
pub use self::{
    server::ServerStatements,
    text::{Meaning, Prepared, Scope, Texts},
};
use crate::protocol::{
    error::{ErrorFields, Report, sqlstate},
    frame::{split_string, tag, until_zero},
    requests::TransactionStatus,
    tag::{Command, Discard},
    words::{Words, add_words},
};

/// Statements that one client may have prepared.
const MAX_NAMES: usize = 10_000;
/// Bytes of text that no other client has prepared.
const MAX_CHARGE: usize = 16 * 1024 * 1024;
/// Longer texts are not kept.
pub const LARGE_STATEMENT: usize = 64 * 1024;

/// Messages in flight for which a connection keeps the memory.
const MAX_QUEUE_KEPT: usize = 64;

/// The body of a Bind of a statement that never exists.
const POISON: &[u8] = b"\0lbp_0\0\0\0\0\0\0\0";

/// A message of the client.
#[derive(Clone, Copy, Debug)]
pub struct ClientMessage<'a> {
    /// Its type.
    pub tag: u8,
    /// Of the body.
    pub length: usize,
    /// The body as far as it has arrived: with all names, and all of a Parse or Query that is not large.
    pub body: &'a [u8],
}

/// The message must be passed again when the server has answered something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked;

/// How the server is sent a message of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// As it is.
    Unchanged,
    /// Behind what was appended, as the body from this position on.
    Rest(usize),
}

/// What becomes of a message of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// The client gets it, before what was appended.
    Pass,
    /// The client does not get it.
    Drop,
}

/// The statements of one client, and its messages in flight.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "independent facts about one stream, not states of a machine"
)]
pub struct ClientStatements {
    texts: Arc<Texts>,
    /// Those prepared by a Parse, as of the last answer.
    names: BTreeMap<Box<[u8]>, Named>,
    unnamed: Option<Arc<Prepared>>,
    /// Names of those prepared by an SQL PREPARE.
    by_sql: BTreeSet<Box<[u8]>>,
    /// Bytes of the texts that it was the first to prepare.
    charge: usize,
    queue: VecDeque<InFlight>,
    /// What names stand for once the queue is answered, where that differs. The unnamed statement has the empty name.
    latest: BTreeMap<Box<[u8]>, Latest>,
    /// The last message in flight after which any name may be gone.
    forgets_all: Option<u64>,
    /// The last portal of a statement that changes names or settings, bound or to be bound by a message in flight.
    portal: Option<Portal>,
    /// The same as of the last answer, which an error returns to.
    bound: Option<Portal>,
    /// The statement of the last CommandComplete, if it concerns settings.
    completed: Option<Box<[u8]>>,
    /// The number of the connection that no other client has had, where messages pass as they are.
    pub(super) exclusive: Option<u64>,
    next_id: u64,
    /// The number of the unit that the next message belongs to.
    unit: u64,
    /// Messages of that unit have been sent.
    is_open: bool,
    /// The hash of the ParameterDescription that a RowDescription or NoData follows.
    parameters: u64,
    /// The server discards everything up to a Sync, which the client has not sent yet.
    is_skipping: bool,
    /// The server reads a COPY from the client.
    is_copying_in: bool,
    /// That of the last ReadyForQuery.
    status: TransactionStatus,
    /// Has prepared a text that is not kept; perhaps it has none any more.
    had_large: bool,
    /// A name may be recorded that the client does not have any more.
    has_lost_names: bool,
    /// An answer fitted no message in flight.
    is_lost: bool,
}

#[derive(Clone, Debug)]
struct Named {
    statement: Arc<Prepared>,
    /// Its share of the client's.
    charge: usize,
}

/// What a name stands for once a message in flight is answered.
#[derive(Debug)]
struct Latest {
    /// Of the message.
    id: u64,
    unit: u64,
    /// `None` if it closes the statement.
    statement: Option<Arc<Prepared>>,
}

/// What a name stands for, when the server reads the client's next message.
enum Lookup {
    Present(Arc<Prepared>),
    Absent,
    /// An earlier unit decides, which has not been answered.
    Uncertain,
}

impl ClientStatements {
    /// A client that has prepared nothing.
    pub fn new(texts: &Arc<Texts>) -> Self {
        Self {
            texts: Arc::clone(texts),
            names: BTreeMap::new(),
            unnamed: None,
            by_sql: BTreeSet::new(),
            charge: 0,
            queue: VecDeque::new(),
            latest: BTreeMap::new(),
            forgets_all: None,
            portal: None,
            bound: None,
            completed: None,
            exclusive: None,
            next_id: 0,
            unit: 0,
            is_open: false,
            parameters: 0,
            is_skipping: false,
            is_copying_in: false,
            status: TransactionStatus::Idle,
            had_large: false,
            has_lost_names: false,
            is_lost: false,
        }
    }

    /// Begins to use a connection, both at rest.
    pub fn begin(&mut self, server: &mut ServerStatements) {
        self.queue = std::mem::take(&mut server.in_flight);
        let is_new = self.names.is_empty() && self.unnamed.is_none();
        match server.names {
            Names::Exclusive(number) if self.exclusive == Some(number) => return,
            Names::Fresh if is_new => {
                let number = self.texts.number();
                self.exclusive = Some(number);
                server.names = Names::Exclusive(number);
                return;
            }
            _ => {}
        }
        // What the client prepares here, its own connection does not have.
        self.exclusive = None;
        server.names = Names::Shared;
    }

    /// Parts with the connection, both at rest. The memory for messages in flight stays there, as clients may be many.
    pub(super) fn end(&mut self, server: &mut ServerStatements) {
        self.latest = BTreeMap::new();
        let queue = std::mem::take(&mut self.queue);
        if queue.capacity() <= MAX_QUEUE_KEPT {
            server.in_flight = queue;
        }
    }

    /// Whether the order of messages is not known any more, so that the connection must not be shared.
    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// Whether the names of the client are not known for certain, so that it needs its connection.
    pub(super) fn has_lost_names(&self) -> bool {
        self.has_lost_names
    }

    /// The statement that the last CommandComplete has ended, if it concerns settings.
    pub(super) fn take_completed(&mut self) -> Option<Box<[u8]>> {
        self.completed.take()
    }

    /// Whether a request has begun, whose answer needs more of the client.
    pub(super) fn is_within_request(&self) -> bool {
        self.is_open || self.is_copying_in || self.is_skipping
    }

    /// Requests without their ReadyForQuery.
    pub(super) fn units_in_flight(&self) -> u64 {
        let front = self.queue.front();
        front.map_or(0, |front| self.unit.saturating_sub(front.unit))
    }

    /// Whether no transaction is open, if nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.status == TransactionStatus::Idle
    }

    /// Whether a transaction is open, if only that of a request in flight.
    pub(super) fn is_in_transaction(&self) -> bool {
        !self.is_idle() || self.is_open || !self.queue.is_empty()
    }

    /// A number that is never used again.
    pub(super) fn number(&self) -> u64 {
        self.texts.number()
    }

    /// Whether a statement in flight changes settings.
    pub(super) fn is_setting(&self) -> bool {
        let mut queue = self.queue.iter();
        queue.any(|it| matches!(&it.effect, Effect::Sql(sql) if sql.iter().any(Option::is_some)))
    }

    /// Named statements.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether the client has no named statement.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The words that its statements mention.
    pub(super) fn words(&self) -> Words {
        let mut words = Words::default();
        let named = self.names.values().map(|it| &it.statement);
        for statement in named.chain(&self.unnamed) {
            add_words(until_zero(&statement.body), &mut words);
        }
        words
    }

    /// Whether the client may have statements of PREPARE.
    pub(super) fn has_by_sql(&self) -> bool {
        !self.by_sql.is_empty()
    }

    /// Whether SQL has prepared a statement by this name, or does in flight: if that fails, what follows in its unit is skipped.
    fn may_have_by_sql(&self, name: &[u8]) -> bool {
        let prepares = |sql: &Option<Sql>| matches!(sql, Some(Sql::Prepare(it)) if **it == *name);
        let mut queue = self.queue.iter();
        self.by_sql.contains(name)
            || queue.any(|it| matches!(&it.effect, Effect::Sql(sql) if sql.iter().any(prepares)))
    }

    /// Forgets what a simple query of the client ends that no server has seen: the unnamed statement, or all.
    pub(super) fn forget_at_rest(&mut self, has_all_ended: bool) {
        let is_ended = self.unnamed.take().is_some() || has_all_ended && !self.names.is_empty();
        if has_all_ended {
            self.forget_names();
        }
        if is_ended {
            // Messages pass as they are to the client's own connection, which still has what has ended.
            self.exclusive = None;
        }
    }

    /// Whether a simple query is being answered.
    pub(super) fn is_in_query(&self) -> bool {
        let front = self.queue.front();
        front.is_some_and(|it| matches!(it.awaits, Awaits::Query))
    }

    /// Whether nothing is in flight.
    pub fn is_at_rest(&self) -> bool {
        self.queue.is_empty() && !self.is_skipping
    }

    /// Whether the client has a statement that cannot be prepared elsewhere.
    pub fn has_large(&self) -> bool {
        // The search is for those only that have ever had one.
        let mut named = self.names.values().map(|it| &it.statement);
        let unnamed = self.unnamed.as_ref();
        self.had_large && (named.any(|it| it.is_large()) || unnamed.is_some_and(|it| it.is_large()))
    }

    /// Records a message of the client. Appends what the server is to be sent in place of it, and what the client is to be sent
    /// at once.
    ///
    /// # Errors
    /// An earlier message must have its answer first. Nothing was recorded, though the server may have to be sent something.
    pub fn client_sends(
        &mut self,
        server: &mut ServerStatements,
        message: ClientMessage<'_>,
        meaning: Meaning,
        to_server: &mut BytesMut,
        to_client: &mut BytesMut,
    ) -> Result<Sent, Blocked> {
        if self.is_skipping && message.tag != tag::SYNC {
            // The server discards it.
            return Ok(Sent::Rest(message.length));
        }
        let mut sending = Sending {
            client: self,
            server,
            out: to_server,
            meaning,
        };
        let sent = sending.message(message)?;
        self.answer(server, to_client);
        Ok(sent)
    }

    /// Records a message of the server, other than DataRow and CopyData. Appends what the client is to be sent behind it or in
    /// place of it.
    pub fn server_sends(
        &mut self,
        server: &mut ServerStatements,
        kind: u8,
        body: &[u8],
        to_client: &mut BytesMut,
    ) -> Passage {
        let passage = match kind {
            tag::NOTICE_RESPONSE | tag::NOTIFICATION_RESPONSE | tag::PARAMETER_STATUS => {
                return Passage::Pass;
            }
            tag::ERROR_RESPONSE => self.fail(server, body, to_client),
            tag::READY_FOR_QUERY => {
                self.status =
                    TransactionStatus::from_byte(body.first().copied().unwrap_or_default());
                self.is_copying_in = false;
                match self.queue.front().map(|it| (&it.awaits, &it.shown)) {
                    Some((Awaits::Sync | Awaits::Query, shown)) => {
                        let passage = shown.passage();
                        self.complete(server);
                        passage
                    }
                    _ => {
                        self.is_lost = true;
                        Passage::Pass
                    }
                }
            }
            _ => self.progress(server, kind, body),
        };
        self.answer(server, to_client);
        passage
    }

    /// Has the server fail in the place of a message of the client, which is answered with this report.
    pub(super) fn refuse(
        &mut self,
        server: &mut ServerStatements,
        tag: u8,
        report: &Report,
        to_server: &mut BytesMut,
    ) {
        let mut sending = Sending {
            client: self,
            server,
            out: to_server,
            meaning: Meaning::default(),
        };
        match tag {
            tag::QUERY | tag::FUNCTION_CALL => sending.poison_query(report),
            _ => sending.poison(report),
        }
    }

    /// Whether the server discards what the client sends, up to the next Sync.
    pub(super) fn is_skipping(&self) -> bool {
        self.is_skipping
    }

    /// Records an answer that is part of the front message's, or ends it.
    fn progress(&mut self, server: &mut ServerStatements, kind: u8, body: &[u8]) -> Passage {
        let Some(front) = self.queue.front_mut() else {
            self.is_lost = true;
            return Passage::Pass;
        };
        let passage = front.shown.passage();
        let is_end = match (&front.awaits, kind) {
            (Awaits::Query, tag::COMMAND_COMPLETE) => {
                let is_copy = std::mem::take(&mut self.is_copying_in);
                let command = Command::of(until_zero(body));
                let sql = match &mut front.effect {
                    Effect::Sql(effects) if !effects.is_empty() => effects.remove(0),
                    _ => None,
                };
                match sql.filter(|it| it.has_tag(command)) {
                    Some(sql) => self.forget(server, &sql),
                    None => self.forget_unseen(server, command),
                }
                if is_copy {
                    self.end_copy_in();
                }
                false
            }
            (Awaits::Execute | Awaits::Query, tag::COPY_IN_RESPONSE) => {
                self.is_copying_in = true;
                false
            }
            (Awaits::Query, _) | (Awaits::Execute, tag::COPY_OUT_RESPONSE | tag::COPY_DONE) => {
                false
            }
            (Awaits::Parse, tag::PARSE_COMPLETE)
            | (Awaits::Bind, tag::BIND_COMPLETE)
            | (Awaits::Close, tag::CLOSE_COMPLETE) => true,
            (
                Awaits::Execute,
                tag::COMMAND_COMPLETE | tag::EMPTY_QUERY_RESPONSE | tag::PORTAL_SUSPENDED,
            ) => {
                let command = Command::of(until_zero(body));
                let mut is_seen = false;
                if let Effect::Sql(effects) = &mut front.effect {
                    effects.retain(|it| it.as_ref().is_some_and(|it| it.has_tag(command)));
                    is_seen = !effects.is_empty();
                }
                if !is_seen {
                    self.forget_unseen(server, command);
                }
                // A failed transaction executes nothing but what ends it, or its failure.
                if self.status == TransactionStatus::Failed {
                    self.status = TransactionStatus::InTransaction;
                }
                true
            }
            (Awaits::Describe(_), tag::PARAMETER_DESCRIPTION) => {
                self.parameters = hash(0, body);
                false
            }
            (Awaits::Describe(statement), tag::ROW_DESCRIPTION | tag::NO_DATA) => {
                let description = hash(self.parameters, body);
                if let Some(statement) = statement {
                    let known = *statement.description.get_or_init(|| description);
                    if let Effect::Compared(statement) = &front.effect
                        && known != description
                        && let Some(known) = server.known.get_mut(&statement.number)
                    {
                        known.is_changed = true;
                    }
                }
                true
            }
            _ => {
                self.is_lost = true;
                false
            }
        };
        if is_end {
            if std::mem::take(&mut self.is_copying_in) {
                self.end_copy_in();
            }
            self.complete(server);
        }
        passage
    }

    /// Removes the Syncs that a COPY from the client has read before its CopyDone. One that has failed may not have read them;
    /// then their answers show it.
    fn end_copy_in(&mut self) {
        let behind = || self.queue.iter().skip(1);
        let syncs = behind().take_while(|it| matches!(it.awaits, Awaits::Sync));
        let syncs = syncs.count();
        let end = behind().nth(syncs).map(|it| &it.awaits);
        let ends = usize::from(matches!(end, Some(Awaits::CopyEnd)));
        self.queue.drain(1..=syncs + ends);
    }

    /// Ends the front message with success.
    fn complete(&mut self, server: &mut ServerStatements) {
        let Some(record) = self.queue.pop_front() else {
            return;
        };
        // The end of a COPY that there was not.
        while matches!(
            self.queue.front().map(|it| &it.awaits),
            Some(Awaits::CopyEnd)
        ) {
            self.queue.pop_front();
        }
        self.settle(server, &record);
        match record.effect {
            Effect::Parsed {
                statement,
                name,
                is_sent,
            } => {
                if is_sent && let Some(known) = server.known.get_mut(&statement.number) {
                    known.pending = None;
                }
                if let Some((name, charge)) = name {
                    self.charge += charge;
                    self.names.insert(name, Named { statement, charge });
                }
            }
            Effect::Unnamed {
                statement,
                is_sent,
                is_clients,
            } => {
                if is_sent {
                    server.unnamed.clone_from(&statement);
                }
                if is_clients {
                    self.unnamed = statement;
                }
            }
            Effect::Closed { name, is_sent } => {
                let closed = self.forget_name(&name);
                if is_sent && let Some(closed) = closed {
                    // A statement of two names has one of them at the server.
                    let is_closed = |known: &Known| known.name == name || closed.is_large();
                    server
                        .known
                        .retain(|number, known| *number != closed.number || !is_closed(known));
                }
            }
            Effect::Sql(effects) => {
                if matches!(record.awaits, Awaits::Query) {
                    // At its start, whatever has become of it.
                    self.unnamed = None;
                    server.unnamed = None;
                } else {
                    for sql in effects.into_iter().flatten() {
                        self.forget(server, &sql);
                    }
                }
            }
            Effect::Bound(portal) => self.bound = portal,
            Effect::None | Effect::Evicted(_) | Effect::Compared(_) => {}
        }
    }

    /// Ends a message that the server has not executed.
    fn skip(&mut self, server: &mut ServerStatements, record: InFlight) {
        self.settle(server, &record);
        match record.effect {
            Effect::Parsed {
                statement,
                is_sent: true,
                ..
            } => {
                server.known.remove(&statement.number);
            }
            Effect::Evicted(known) => {
                server.known.insert(known.statement.number, *known);
            }
            _ => {}
        }
    }

    /// What every end of a message has in common.
    fn settle(&mut self, server: &mut ServerStatements, record: &InFlight) {
        if let Some(number) = record.statement {
            server.release(number);
        }
        let name: &[u8] = match &record.effect {
            Effect::Parsed {
                name: Some((name, _)),
                ..
            }
            | Effect::Closed { name, .. } => name,
            Effect::Unnamed { .. } => b"",
            Effect::Evicted(known) => {
                server.leaving.remove(&known.statement.number);
                return;
            }
            Effect::Sql(_) => {
                if self.forgets_all == Some(record.id) {
                    self.forgets_all = None;
                }
                b""
            }
            _ => return,
        };
        if self.latest.get(name).is_some_and(|it| it.id == record.id) {
            self.latest.remove(name);
        }
    }

    fn fail(
        &mut self,
        server: &mut ServerStatements,
        body: &[u8],
        to_client: &mut BytesMut,
    ) -> Passage {
        if std::mem::take(&mut self.is_copying_in) {
            self.end_copy_in();
        }
        match self.queue.front().map(|it| &it.awaits) {
            // Of a commit, or the reason for the end of the connection.
            None | Some(Awaits::Sync | Awaits::Query) => {
                return self.show_error(body, to_client);
            }
            Some(_) => {}
        }
        let is_sync = |it: &InFlight| matches!(it.awaits, Awaits::Sync);
        let sync = self.queue.iter().position(is_sync);
        let is_added = |at: &usize| {
            let sync = self.queue.get(*at);
            sync.is_some_and(|it| matches!(it.shown, Shown::Errors))
        };
        let passage = if let Some(sync) = sync.filter(is_added) {
            // What the client has sent needs it, and has the error.
            let mut report = BytesMut::new();
            if self.show_error(body, &mut report) == Passage::Pass {
                put(&mut report, tag::ERROR_RESPONSE, &[body], 0);
            }
            if let Some(behind) = self.queue.get_mut(sync + 1) {
                behind.shown = Shown::Instead(report);
            }
            Passage::Drop
        } else {
            self.show_error(body, to_client)
        };
        let Some(front) = self.queue.pop_front() else {
            return passage;
        };
        let error = ErrorFields::parse(body);
        if error.code == sqlstate::FEATURE_NOT_SUPPORTED && error.message.contains("cached plan") {
            let known = front.statement.and_then(|it| server.known.get_mut(&it));
            if let Some(known) = known {
                known.is_stale = true;
            }
        }
        if error.code == sqlstate::UNDEFINED_STATEMENT
            && let Some(number) = front.statement
            && !server.is_exclusive()
        {
            // Ended unseen, such as by a function. It is prepared anew when needed again.
            server.known.remove(&number);
        }
        if let Effect::Unnamed {
            is_sent,
            is_clients,
            ..
        } = front.effect
        {
            // A Parse destroys the unnamed statement before it fails.
            if is_sent {
                server.unnamed = None;
            }
            if is_clients {
                self.unnamed = None;
            }
        }
        self.portal.clone_from(&self.bound);
        let sync = self.queue.iter().position(is_sync);
        self.is_skipping = sync.is_none();
        let discarded: Vec<InFlight> = self
            .queue
            .drain(..sync.unwrap_or(self.queue.len()))
            .collect();
        // Backwards: a statement may have been evicted and prepared again.
        for record in discarded.into_iter().rev().chain([front]) {
            self.skip(server, record);
        }
        passage
    }

    /// What the client gets of an error of the front message.
    fn show_error(&self, body: &[u8], to_client: &mut BytesMut) -> Passage {
        match self.queue.front().map(|it| &it.shown) {
            Some(Shown::Instead(report))
                if ErrorFields::parse(body).code == sqlstate::UNDEFINED_STATEMENT =>
            {
                to_client.extend_from_slice(report);
                Passage::Drop
            }
            Some(Shown::ErrorsOfPool) => {
                without_position(body, to_client);
                Passage::Drop
            }
            _ => match self.with_name_of_client(body) {
                Some(renamed) => {
                    put(to_client, tag::ERROR_RESPONSE, &[&renamed], 0);
                    Passage::Drop
                }
                None => Passage::Pass,
            },
        }
    }

    /// An error that names the front message's statement, by the name that the client knows.
    fn with_name_of_client(&self, body: &[u8]) -> Option<Vec<u8>> {
        let number = self.queue.front()?.statement?;
        let (name, _) = self
            .names
            .iter()
            .find(|(_, it)| it.statement.number == number)?;
        let of_pool = [b"\"", &shared_name(number)[..], b"\""].concat();
        let at = body.windows(of_pool.len()).position(|it| it == of_pool)?;
        let (before, rest) = body.split_at(at);
        let behind = rest.get(of_pool.len()..)?;
        Some([before, b"\"", name, b"\"", behind].concat())
    }

    /// Appends the answers whose turn it is.
    fn answer(&mut self, server: &mut ServerStatements, to_client: &mut BytesMut) {
        while let Some(Awaits::Answer(answer)) = self.queue.front().map(|it| &it.awaits) {
            to_client.extend_from_slice(answer);
            self.complete(server);
        }
    }

    fn forget(&mut self, server: &mut ServerStatements, sql: &Sql) {
        match sql {
            Sql::OfSettings(text) => self.completed = Some(text.clone()),
            Sql::Prepare(name) => {
                self.by_sql.insert(name.clone());
            }
            Sql::Deallocate(name) => {
                self.by_sql.remove(name);
                let of_client = self.forget_name(name).map(|it| it.number);
                server.known.retain(|number, known| {
                    Some(*number) != of_client && known.name != *name || known.pending.is_some()
                });
            }
            Sql::DeallocateAll => {
                self.forget_names();
                server.known.retain(|_, known| known.pending.is_some());
            }
        }
    }

    /// After a statement without a known text, by its command tag: it was too long, or of a portal that is not recorded.
    fn forget_unseen(&mut self, server: &mut ServerStatements, command: Command) {
        match command {
            Command::DeallocateAll | Command::Discard(Discard::All) => {
                self.forget(server, &Sql::DeallocateAll);
            }
            // Of which name is not known.
            Command::Deallocate => self.has_lost_names = true,
            _ => {}
        }
    }

    fn forget_names(&mut self) {
        self.by_sql.clear();
        self.names.clear();
        self.charge = 0;
    }

    fn forget_name(&mut self, name: &[u8]) -> Option<Arc<Prepared>> {
        let named = self.names.remove(name)?;
        self.charge = self.charge.saturating_sub(named.charge);
        Some(named.statement)
    }

    fn lookup(&self, name: &[u8]) -> Lookup {
        if self.forgets_all.is_some() && !name.is_empty() {
            return Lookup::Uncertain;
        }
        let statement = match self.latest.get(name) {
            Some(latest) if latest.unit != self.unit => return Lookup::Uncertain,
            Some(latest) => latest.statement.as_ref(),
            None if name.is_empty() => self.unnamed.as_ref(),
            None => self.names.get(name).map(|it| &it.statement),
        };
        match statement {
            Some(statement) => Lookup::Present(Arc::clone(statement)),
            None => Lookup::Absent,
        }
    }

    /// Whether a statement that may have this name changes what is known of the session.
    fn may_change_session(&self, name: &[u8]) -> bool {
        let latest = self.latest.get(name).and_then(|it| it.statement.as_ref());
        let current = if name.is_empty() {
            self.unnamed.as_ref()
        } else {
            self.names.get(name).map(|it| &it.statement)
        };
        latest.into_iter().chain(current).any(|it| it.sql.is_some())
    }

    /// Whether an earlier unit is outstanding.
    fn has_earlier_unit(&self) -> bool {
        self.queue.front().is_some_and(|it| it.unit != self.unit)
    }
}

/// The name of the pool's for a statement.
fn shared_name(number: u64) -> Box<[u8]> {
    format!("lbp_{number}").into_bytes().into()
}

/// Appends a message whose last `rest` bytes follow.
fn put(out: &mut BytesMut, tag: u8, parts: &[&[u8]], rest: usize) {
    let length = 4 + rest + parts.iter().map(|it| it.len()).sum::<usize>();
    out.put_u8(tag);
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    for part in parts {
        out.put_slice(part);
    }
}

/// Appends an ErrorResponse without the position in the text.
fn without_position(mut body: &[u8], out: &mut BytesMut) {
    let mut fields = Vec::new();
    while let Some((field, rest)) = split_string(body).filter(|(field, _)| !field.is_empty()) {
        if field.first() != Some(&b'P') {
            fields.extend_from_slice(field);
            fields.push(0);
        }
        body = rest;
    }
    fields.push(0);
    put(out, tag::ERROR_RESPONSE, &[&fields], 0);
}

fn hash(seed: u64, body: &[u8]) -> u64 {
    // Only within the process, and of what servers send.
    let mut hasher = DefaultHasher::new();
    (seed, body).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
