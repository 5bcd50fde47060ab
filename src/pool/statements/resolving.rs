//! The statement that a message of the client names, and that the server has before it reads the message.

use std::sync::Arc;

use super::{
    Awaits, Blocked, Effect, Lookup, Prepared, Scope, Shown, Sql, Statement, put,
    sending::{Sending, count, deallocate, unknown_statement},
    shared_name,
};
use crate::protocol::{
    error::{Report, sqlstate},
    frame::tag,
};

/// A statement of the client that the server has.
pub(super) struct Resolved {
    /// At the server.
    pub(super) name: Box<[u8]>,
    /// `None` if SQL has prepared it.
    pub(super) statement: Option<Arc<Statement>>,
}

/// Why the server must have a statement.
#[derive(Clone, Copy, Debug)]
pub(super) enum Need<'a> {
    /// The client prepares it, by this name.
    Parse(&'a [u8], &'a Arc<Statement>),
    /// The client prepares it by a name in use. The server parses it first, as it may have another error.
    Check,
    /// A Bind names it, whose rows must be those that the client expects.
    Bind(&'a Arc<Statement>),
    /// Another message names it.
    Name,
}

impl Sending<'_> {
    /// Has the server parse a statement, anew if it has it; `false` if messages of this unit name it.
    pub(super) fn send_parse(
        &mut self,
        prepared: &Arc<Prepared>,
        need: Need<'_>,
    ) -> Result<bool, Blocked> {
        let known = self.server.known.get(&prepared.number);
        if known.is_some_and(|it| it.pending.is_some() || it.uses > 0) {
            if self.client.has_earlier_unit() {
                return Err(Blocked);
            }
            return Ok(false);
        }
        let old = self.server.known.remove(&prepared.number);
        // More than one, when too many were in flight to evict any of them.
        let mut evicted = Vec::from_iter(old);
        evicted.extend(std::iter::from_fn(|| {
            self.server
                .evict()
                .inspect(|_| count(&self.client.texts.evicted))
        }));
        count(&self.client.texts.sent);
        for known in evicted {
            put(self.out, tag::CLOSE, &[b"S", &known.name, b"\0"], 0);
            let number = known.statement.number;
            self.server.leaving.insert(number, self.client.unit);
            let effect = Effect::Evicted(Box::new(known));
            self.record(Awaits::Close, Shown::Errors, effect);
        }
        let name = shared_name(prepared.number);
        put(self.out, tag::PARSE, &[&name, b"\0", &prepared.body], 0);
        let scope = if self.client.is_setting() {
            // Perhaps another one, once the server reads this.
            Scope::Once(self.client.texts.number())
        } else {
            self.meaning.scope
        };
        let unit = self.client.unit;
        self.server.add(prepared, &name, unit, scope);
        let (shown, own, described) = match need {
            Need::Parse(name, statement) => {
                let own = (name.into(), Arc::clone(statement));
                (Shown::All, Some(own), Some(statement))
            }
            Need::Check => (Shown::Errors, None, None),
            Need::Bind(statement) => (Shown::ErrorsOfPool, None, Some(statement)),
            Need::Name => (Shown::ErrorsOfPool, None, None),
        };
        let effect = Effect::Parsed {
            prepared: Arc::clone(prepared),
            own,
            is_sent: true,
        };
        self.record(Awaits::Parse, shown, effect);
        if let Some(statement) = described {
            self.send_describe(statement, &name);
        }
        Ok(true)
    }

    /// Has the server describe a statement, for the pool.
    fn send_describe(&mut self, statement: &Arc<Statement>, name: &[u8]) {
        put(self.out, tag::DESCRIBE, &[b"S", name, b"\0"], 0);
        let awaits = Awaits::Describe(Some(Arc::clone(statement)));
        let number = Some(statement.prepared.number).filter(|it| *it > 0);
        self.record_use(awaits, Shown::ErrorsOfPool, Effect::None, number);
    }

    /// Sees to it that the server has a statement of the client's.
    pub(super) fn ensure(
        &mut self,
        prepared: &Arc<Prepared>,
        need: Need<'_>,
    ) -> Result<(), Blocked> {
        if self.server.is_uncertain(prepared.number, self.client.unit) {
            return Err(Blocked);
        }
        if !self.has(prepared) {
            self.send_parse(prepared, need)?;
        }
        Ok(())
    }

    /// Whether the server has a statement of the client's as the client has prepared it, or as it would be prepared now.
    fn has(&self, prepared: &Prepared) -> bool {
        let known = self.server.known.get(&prepared.number);
        known.is_some_and(|known| match prepared.meaning.scope {
            _ if known.is_doubtful => false,
            // It is no other client's.
            Scope::Once(_) => true,
            scope @ Scope::Settings(_) => known.scope == scope || known.scope == self.meaning.scope,
        })
    }

    /// Ends what was added before the first message of a unit: a Parse takes a snapshot, which the client's messages may not,
    /// such as a BEGIN of another isolation level behind a Describe.
    pub(super) fn end_added(&mut self) {
        put(self.out, tag::SYNC, &[], 0);
        self.record(Awaits::Sync, Shown::Errors, Effect::None);
    }

    pub(super) fn name(&self, prepared: &Prepared) -> Box<[u8]> {
        match self.server.known.get(&prepared.number) {
            Some(known) => known.name.clone(),
            None => shared_name(prepared.number),
        }
    }

    /// The statement that a message names, which the server has; `None` if the error is on its way.
    pub(super) fn resolve(
        &mut self,
        name: &[u8],
        is_bind: bool,
    ) -> Result<Option<Resolved>, Blocked> {
        let statement = match self.client.lookup(name) {
            Lookup::Uncertain => return Err(Blocked),
            Lookup::Present(statement) => statement,
            Lookup::Absent if self.client.may_have_by_sql(name) => {
                return Ok(Some(Resolved {
                    name: name.into(),
                    statement: None,
                }));
            }
            Lookup::Absent => {
                self.poison(&unknown_statement(name));
                return Ok(None);
            }
        };
        let prepared = &statement.prepared;
        let own = if !name.is_empty() {
            let need = if is_bind {
                Need::Bind(&statement)
            } else {
                Need::Name
            };
            self.ensure(prepared, need)?;
            self.name(prepared)
        } else if let Some(Sql::Deallocate(deallocated)) = &prepared.sql {
            self.send_deallocate(&statement, deallocated)?;
            Box::default()
        } else if self.send_unnamed(&statement) {
            Box::default()
        } else {
            self.poison(&unknown_statement(name));
            return Ok(None);
        };
        if is_bind && !self.is_as_described(&statement, &own)? {
            // As a server whose plan is outdated, and to the next Parse it is another statement.
            self.client.outdated = Some(statement.prepared.meaning.epoch);
            let what = "cached plan must not change result type";
            self.poison(&Report::new(sqlstate::FEATURE_NOT_SUPPORTED, what));
            return Ok(None);
        }
        Ok(Some(Resolved {
            name: own,
            statement: Some(statement),
        }))
    }

    /// Whether the server's statement takes and returns what the client expects.
    fn is_as_described(
        &mut self,
        statement: &Arc<Statement>,
        name: &[u8],
    ) -> Result<bool, Blocked> {
        if !statement.description.is_known() || !statement.prepared.is_comparable() {
            return Ok(true);
        }
        let described = self.server.description(statement);
        if let Some(described) = described.filter(|it| it.is_whole()) {
            return Ok(!described.differs(&statement.description));
        }
        let same = |it: &Arc<Statement>| {
            let number = it.prepared.number;
            Arc::ptr_eq(it, statement) || number > 0 && number == statement.prepared.number
        };
        let mut queue = self.client.queue.iter();
        if !queue.any(|it| matches!(&it.awaits, Awaits::Describe(Some(it)) if same(it))) {
            self.send_describe(statement, name);
        }
        self.flush();
        Err(Blocked)
    }

    /// Has the server parse the client's unnamed statement, unless it has it; `false` if the text is not kept.
    fn send_unnamed(&mut self, statement: &Arc<Statement>) -> bool {
        let unnamed = self.server.unnamed.as_ref();
        let is_here = self.client.latest.contains_key(&b""[..])
            || unnamed.is_some_and(|it| Arc::ptr_eq(&it.statement, statement));
        if is_here {
            return true;
        }
        if statement.prepared.is_large() {
            return false;
        }
        self.parse_for_client(statement, &[&statement.prepared.body]);
        true
    }

    /// Has the server parse the client's unnamed DEALLOCATE of `deallocated`, with the name that the server has that by.
    fn send_deallocate(
        &mut self,
        statement: &Arc<Statement>,
        deallocated: &[u8],
    ) -> Result<(), Blocked> {
        let shared = match self.client.lookup(deallocated) {
            Lookup::Uncertain => return Err(Blocked),
            Lookup::Absent => self.name_by_sql(deallocated),
            Lookup::Present(deallocated) => {
                self.ensure(&deallocated.prepared, Need::Name)?;
                self.name(&deallocated.prepared)
            }
        };
        let sql = deallocate(&shared);
        self.parse_for_client(statement, &[&sql, b"\0\0\0"]);
        Ok(())
    }

    /// Whether a query of the pool's has ended the client's unnamed statement at the server.
    pub(super) fn lacks_unnamed(&self, name: &[u8]) -> bool {
        name.is_empty()
            && self.server.unnamed.is_none()
            && self.client.unnamed.is_some()
            && !self.client.latest.contains_key(name)
    }

    /// Has the server parse the unnamed statement of the client.
    fn parse_for_client(&mut self, statement: &Arc<Statement>, body: &[&[u8]]) {
        let body = body.concat();
        put(self.out, tag::PARSE, &[b"\0", &body], 0);
        let effect = Effect::Unnamed {
            statement: Some(Arc::clone(statement)),
            is_sent: true,
            is_clients: false,
        };
        self.record(Awaits::Parse, Shown::ErrorsOfPool, effect);
    }
}
