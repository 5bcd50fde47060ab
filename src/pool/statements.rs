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
//! - What a statement takes and returns is described wherever it is prepared, by a Describe of the pool's behind the Parse, and
//!   a Bind on a connection where that differs from what the client knows fails with 0A000, as one after a definition does on a
//!   connection of its own.

mod answers;
mod queue;
mod resolving;
mod sending;
mod server;
mod sql;
mod statement;
mod text;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use bytes::{BufMut, BytesMut};

use self::{
    queue::{Awaits, Effect, InFlight, Portal, Shown},
    sending::Sending,
    server::{Known, Names},
    sql::Sql,
    statement::{Statement, hash},
};
pub use self::{
    server::ServerStatements,
    text::{Meaning, Prepared, Scope, Texts},
};
use crate::protocol::{
    error::Report,
    frame::{tag, until_zero},
    requests::TransactionStatus,
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

/// What the pool's names for statements begin with; a number follows.
const SHARED_NAME: &str = "lbp_";
/// The body of a Bind of a statement that never exists.
const POISON: &[u8] = b"\0lbp_0\0\0\0\0\0\0\0";

/// Bytes of a name that the server looks at (`NAMEDATALEN` of PostgreSQL, without its zero byte).
const MAX_NAME: usize = 63;

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
    names: BTreeMap<Box<[u8]>, Arc<Statement>>,
    unnamed: Option<Arc<Statement>>,
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
    /// What that was at the last Flush of the pool's.
    flushed_at: u64,
    /// The number of the unit that the next message belongs to.
    unit: u64,
    /// Messages of that unit have been sent.
    is_open: bool,
    /// The hash of the ParameterDescription that a RowDescription or NoData follows.
    parameters: Option<u64>,
    /// The statement of the portal that was bound last, by the hash of the portal's name, if it has not been described.
    undescribed: Option<(u64, Arc<Statement>)>,
    /// The epoch of a statement whose result has turned out to be outdated.
    outdated: Option<u64>,
    /// A definition was executed, and is perhaps not committed.
    is_defining: bool,
    /// One was executed, committed or undone since [`take_defined`](Self::take_defined).
    has_defined: bool,
    /// The server discards everything up to a Sync, which the client has not sent yet.
    is_skipping: bool,
    /// The server reads a COPY from the client.
    is_copying_in: bool,
    /// Syncs that a COPY which failed has read, or not. Then each has its ReadyForQuery yet.
    doubtful: usize,
    /// The server has begun to answer the query at the front.
    is_begun: bool,
    /// That of the last ReadyForQuery.
    status: TransactionStatus,
    /// Has prepared a text that is not kept; perhaps it has none any more.
    had_large: bool,
    /// A name may be recorded that the client does not have any more.
    has_lost_names: bool,
    /// An answer fitted no message in flight.
    is_lost: bool,
}

/// What a name stands for once a message in flight is answered.
#[derive(Debug)]
struct Latest {
    /// Of the message.
    id: u64,
    unit: u64,
    /// `None` if it closes the statement.
    statement: Option<Arc<Statement>>,
}

/// What a name stands for, when the server reads the client's next message.
enum Lookup {
    Present(Arc<Statement>),
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
            flushed_at: 0,
            unit: 0,
            is_open: false,
            parameters: None,
            undescribed: None,
            outdated: None,
            is_defining: false,
            has_defined: false,
            is_skipping: false,
            is_copying_in: false,
            doubtful: 0,
            is_begun: false,
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
        self.undescribed = None;
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

    /// Whether a definition was executed, and is perhaps not committed.
    pub(super) fn is_defining(&self) -> bool {
        self.is_defining
    }

    /// Whether statements that are prepared from now on may mean something else than before the last call.
    pub(super) fn take_defined(&mut self) -> bool {
        std::mem::take(&mut self.has_defined)
    }

    /// The epoch of a statement whose result has turned out to be outdated, since the last call.
    pub(super) fn take_outdated(&mut self) -> Option<u64> {
        self.outdated.take()
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

    /// Whether a statement in flight may change what others mean.
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
        for statement in self.names.values().chain(&self.unnamed) {
            add_words(until_zero(&statement.prepared.body), &mut words);
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
        self.queue.is_empty() && !self.is_skipping && self.doubtful == 0
    }

    /// Whether the client has a statement that cannot be prepared elsewhere.
    pub fn has_large(&self) -> bool {
        // The search is for those only that have ever had one.
        let mut all = self.names.values().chain(&self.unnamed);
        self.had_large && all.any(|it| it.prepared.is_large())
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
            // The server discards it, unless a Sync has ended that which is taken for one that a COPY has read.
            let is_ignored = matches!(
                message.tag,
                tag::COPY_DATA | tag::COPY_DONE | tag::COPY_FAIL | tag::FLUSH
            );
            self.is_lost |= self.doubtful > 0 && !is_ignored;
            return Ok(Sent::Rest(message.length));
        }
        let mut sending = Sending {
            client: self,
            server,
            out: to_server,
            meaning,
        };
        let sent = sending.message(message);
        if sent.is_err() {
            sending.flush_if_alone();
        }
        let sent = sent?;
        self.answer(server, to_client);
        Ok(sent)
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

    fn forget_names(&mut self) {
        self.by_sql.clear();
        self.names.clear();
        self.charge = 0;
    }

    fn forget_name(&mut self, name: &[u8]) -> Option<Arc<Statement>> {
        let statement = self.names.remove(name)?;
        self.charge = self.charge.saturating_sub(statement.charge);
        Some(statement)
    }

    fn lookup(&self, name: &[u8]) -> Lookup {
        if self.forgets_all.is_some() && !name.is_empty() {
            return Lookup::Uncertain;
        }
        let statement = match self.latest.get(name) {
            Some(latest) if latest.unit != self.unit => return Lookup::Uncertain,
            Some(latest) => latest.statement.as_ref(),
            None if name.is_empty() => self.unnamed.as_ref(),
            None => self.names.get(name),
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
            self.names.get(name)
        };
        let mut all = latest.into_iter().chain(current);
        all.any(|it| it.prepared.sql.is_some())
    }

    fn end_unit(&mut self) {
        self.unit += 1;
        self.is_open = false;
        // By then the portal may be another one.
        self.undescribed = None;
    }

    /// Whether an earlier unit is outstanding.
    fn has_earlier_unit(&self) -> bool {
        self.queue.front().is_some_and(|it| it.unit != self.unit)
    }
}

/// A name as the server has it.
fn cut(name: &[u8]) -> &[u8] {
    name.get(..MAX_NAME).unwrap_or(name)
}

/// The name of the pool's for a statement.
fn shared_name(number: u64) -> Box<[u8]> {
    format!("{SHARED_NAME}{number}").into_bytes().into()
}

/// Whether the pool may have given a statement this name.
fn is_shared_name(name: &[u8]) -> bool {
    name.starts_with(SHARED_NAME.as_bytes())
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

#[cfg(test)]
mod tests;
