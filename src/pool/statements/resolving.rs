//! The statement that a message of the client names, and that the server has before it reads the message.

use std::sync::Arc;

use super::{
    Awaits, Blocked, Effect, InFlight, Lookup, Prepared, Scope, Shown, Sql, put,
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
    pub(super) statement: Arc<Prepared>,
}

impl Sending<'_> {
    /// Has the server parse a statement, anew if it has it; `false` if messages of this unit name it.
    pub(super) fn send_parse(
        &mut self,
        statement: &Arc<Prepared>,
        shown: Shown,
    ) -> Result<bool, Blocked> {
        let known = self.server.known.get(&statement.number);
        if known.is_some_and(|it| it.pending.is_some() || it.uses > 0) {
            if self.client.has_earlier_unit() {
                return Err(Blocked);
            }
            return Ok(false);
        }
        let old = self.server.known.remove(&statement.number);
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
        let name = shared_name(statement.number);
        put(self.out, tag::PARSE, &[&name, b"\0", &statement.body], 0);
        let scope = if self.client.is_setting() {
            // Perhaps another one, once the server reads this.
            Scope::Once(self.client.texts.number())
        } else {
            self.meaning.scope
        };
        let unit = self.client.unit;
        self.server.add(statement, &name, unit, scope);
        let effect = Effect::Parsed {
            statement: Arc::clone(statement),
            name: None,
            is_sent: true,
        };
        self.record(Awaits::Parse, shown, effect);
        Ok(true)
    }

    /// Sees to it that the server has a statement of the client's.
    pub(super) fn ensure(&mut self, statement: &Arc<Prepared>) -> Result<(), Blocked> {
        if self.server.is_uncertain(statement.number, self.client.unit) {
            return Err(Blocked);
        }
        if !self.has(statement) {
            self.send_parse(statement, Shown::ErrorsOfPool)?;
        }
        Ok(())
    }

    /// Whether the server has a statement of the client's as the client has prepared it, or as it would be prepared now.
    fn has(&self, statement: &Prepared) -> bool {
        let known = self.server.known.get(&statement.number);
        known.is_some_and(|known| match statement.meaning.scope {
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

    pub(super) fn name(&self, statement: &Prepared) -> Box<[u8]> {
        match self.server.known.get(&statement.number) {
            Some(known) => known.name.clone(),
            None => shared_name(statement.number),
        }
    }

    /// What the server knows a statement by; `None` if the error is on its way.
    pub(super) fn resolve(&mut self, name: &[u8]) -> Result<Option<Resolved>, Blocked> {
        let statement = match self.client.lookup(name) {
            Lookup::Uncertain => return Err(Blocked),
            Lookup::Present(statement) => statement,
            Lookup::Absent => {
                self.poison(&unknown_statement(name));
                return Ok(None);
            }
        };
        if name.is_empty() {
            if let Some(Sql::Deallocate(name)) = &statement.sql {
                // By the name that the server has it by.
                let shared = match self.client.lookup(name) {
                    Lookup::Uncertain => return Err(Blocked),
                    Lookup::Absent => self.name_by_sql(name),
                    Lookup::Present(prepared) => {
                        self.ensure(&prepared)?;
                        self.name(&prepared)
                    }
                };
                let sql = deallocate(&shared);
                self.parse_for_client(&statement, &[&sql, b"\0\0\0"]);
                return Ok(Some(Resolved {
                    name: Box::default(),
                    statement,
                }));
            }
            let is_here = self.client.latest.contains_key(name)
                || self
                    .server
                    .unnamed
                    .as_ref()
                    .is_some_and(|it| Arc::ptr_eq(it, &statement));
            if !is_here && statement.is_large() {
                self.poison(&unknown_statement(name));
                return Ok(None);
            }
            if !is_here {
                self.parse_for_client(&statement, &[&statement.body]);
            }
            return Ok(Some(Resolved {
                name: Box::default(),
                statement,
            }));
        }
        let is_compared = |it: &InFlight| matches!(&it.effect, Effect::Compared(it) if it.number == statement.number);
        if self.client.queue.iter().any(is_compared) {
            return Err(Blocked);
        }
        let is_described = statement.description.get().is_some();
        if !self.has(&statement) && is_described && statement.meaning != self.meaning {
            // A definition or a setting since may have changed what it returns, which the client does not expect.
            self.ensure(&statement)?;
            let name = self.name(&statement);
            put(self.out, tag::DESCRIBE, &[b"S", &name, b"\0"], 0);
            let awaits = Awaits::Describe(Some(Arc::clone(&statement)));
            let number = Some(statement.number);
            let effect = Effect::Compared(statement);
            self.record_use(awaits, Shown::ErrorsOfPool, effect, number);
            put(self.out, tag::FLUSH, &[], 0);
            return Err(Blocked);
        }
        if self
            .server
            .known
            .get(&statement.number)
            .is_some_and(|it| it.is_changed)
        {
            let what = "cached plan must not change result type";
            self.poison(&Report::new(sqlstate::FEATURE_NOT_SUPPORTED, what));
            return Ok(None);
        }
        self.ensure(&statement)?;
        let name = self.name(&statement);
        Ok(Some(Resolved { name, statement }))
    }

    /// Whether a query of the pool's has ended the client's unnamed statement at the server.
    pub(super) fn lacks_unnamed(&self, name: &[u8]) -> bool {
        name.is_empty()
            && self.server.unnamed.is_none()
            && self.client.unnamed.is_some()
            && !self.client.latest.contains_key(name)
    }

    /// Has the server parse the unnamed statement of the client.
    fn parse_for_client(&mut self, statement: &Arc<Prepared>, body: &[&[u8]]) {
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
