//! What a message of the client becomes on its way to the server.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use bytes::BytesMut;

use super::{
    Awaits, Blocked, ClientMessage, ClientStatements, Effect, InFlight, LARGE_STATEMENT, Latest,
    Lookup, MAX_CHARGE, MAX_NAMES, Meaning, POISON, Prepared, Scope, Sent, ServerStatements, Shown,
    Sql, Statement, cut, hash, is_shared_name, put,
    resolving::{Need, Resolved},
    shared_name,
    text::is_of_session,
};
use crate::protocol::{
    error::{Report, sqlstate},
    frame::{split_string, tag},
    requests::TransactionStatus,
};

/// One message of the client on its way to the server.
pub(super) struct Sending<'a> {
    pub(super) client: &'a mut ClientStatements,
    pub(super) server: &'a mut ServerStatements,
    pub(super) out: &'a mut BytesMut,
    /// Of what is prepared now.
    pub(super) meaning: Meaning,
}

impl Sending<'_> {
    pub(super) fn message(&mut self, message: ClientMessage<'_>) -> Result<Sent, Blocked> {
        let ClientMessage { tag, body, .. } = message;
        match tag {
            tag::PARSE => {
                let Some((name, rest)) = split_string(body) else {
                    return Ok(Sent::Unchanged);
                };
                if name.is_empty() {
                    self.parse_unnamed(message, rest);
                    Ok(Sent::Unchanged)
                } else {
                    self.parse(message, name, rest)
                }
            }
            tag::BIND => {
                let Some((portal, rest)) = split_string(body) else {
                    return Ok(Sent::Unchanged);
                };
                let Some((name, rest)) = split_string(rest) else {
                    return Ok(Sent::Unchanged);
                };
                let head = body.len() - rest.len();
                self.bind(message, portal, name, head)
            }
            tag::DESCRIBE if body.first() == Some(&b'S') => {
                let name = split_string(body.get(1..).unwrap_or_default());
                let (name, _) = name.unwrap_or_default();
                self.describe(message, name)
            }
            tag::CLOSE if body.first() == Some(&b'S') => {
                let name = split_string(body.get(1..).unwrap_or_default());
                let (name, _) = name.unwrap_or_default();
                Ok(self.close(message, name))
            }
            tag::DESCRIBE => {
                let statement = self.undescribed(body.get(1..).unwrap_or_default());
                self.record(Awaits::Describe(statement), Shown::All, Effect::None);
                Ok(Sent::Unchanged)
            }
            tag::CLOSE => {
                self.record(Awaits::Close, Shown::All, Effect::None);
                Ok(Sent::Unchanged)
            }
            tag::EXECUTE => {
                let (portal, _) = split_string(body).unwrap_or_default();
                let sql = self.client.portal.as_ref();
                let sql = sql.filter(|it| *it.0 == *portal);
                let sql = sql.map(|it| it.1.clone());
                let ends_failure = self.may_end_failure();
                if body.len() == message.length && (sql.is_some() || ends_failure) {
                    self.execute(message, sql, ends_failure);
                    return Ok(Sent::Rest(message.length));
                }
                self.record(Awaits::Execute, Shown::All, Effect::None);
                Ok(Sent::Unchanged)
            }
            tag::QUERY => self.query(message),
            tag::SYNC | tag::FUNCTION_CALL => {
                let awaits = if tag == tag::SYNC {
                    self.client.is_skipping = false;
                    Awaits::Sync
                } else {
                    Awaits::Query
                };
                self.record(awaits, Shown::All, Effect::None);
                self.client.end_unit();
                Ok(Sent::Unchanged)
            }
            tag::COPY_DONE | tag::COPY_FAIL => {
                let mut queue = self.client.queue.iter();
                // A stray one is ignored by the server.
                if queue.any(|it| matches!(it.awaits, Awaits::Execute | Awaits::Query)) {
                    self.record(Awaits::CopyEnd, Shown::All, Effect::None);
                }
                Ok(Sent::Unchanged)
            }
            _ => Ok(Sent::Unchanged),
        }
    }

    pub(super) fn record(&mut self, awaits: Awaits, shown: Shown, effect: Effect) {
        self.record_use(awaits, shown, effect, None);
    }

    pub(super) fn record_use(
        &mut self,
        awaits: Awaits,
        shown: Shown,
        effect: Effect,
        used: Option<u64>,
    ) {
        let client = &mut *self.client;
        client.next_id += 1;
        client.is_open = true;
        let (id, unit) = (client.next_id, client.unit);
        let latest = match &effect {
            Effect::Parsed {
                own: Some((name, statement)),
                ..
            } => Some((&name[..], Some(statement))),
            Effect::Closed { name, .. } => Some((&name[..], None)),
            Effect::Unnamed { statement, .. } => Some((&b""[..], statement.as_ref())),
            Effect::Sql(effects) => {
                if effects.iter().flatten().any(Sql::changes_names) {
                    client.forgets_all = Some(id);
                }
                // Most clients have no unnamed statement that a query could end.
                let is_ended = client.unnamed.is_some() || !client.latest.is_empty();
                let is_query = matches!(awaits, Awaits::Query);
                (is_query && is_ended).then_some((&b""[..], None))
            }
            _ => None,
        };
        if let Some((name, statement)) = latest {
            let latest = Latest {
                id,
                unit,
                statement: statement.cloned(),
            };
            client.latest.insert(name.into(), latest);
        }
        if let Some(number) = used {
            self.server.use_one(number);
        }
        client.queue.push_back(InFlight {
            id,
            unit,
            awaits,
            shown,
            effect,
            statement: used,
        });
    }

    /// Whether an Execute may end the failure of a transaction, on which the answers to what follows it depend.
    fn may_end_failure(&self) -> bool {
        self.client.status == TransactionStatus::Failed && !self.server.is_exclusive()
    }

    /// Executes a statement that changes what is known of the session.
    fn execute(&mut self, message: ClientMessage<'_>, sql: Option<Sql>, ends_failure: bool) {
        put(self.out, message.tag, &[message.body], 0);
        let is_exclusive = self.server.is_exclusive();
        let shown = match &sql {
            Some(Sql::Deallocate(name)) if !is_exclusive => {
                Shown::Instead(unknown_statement(name).encode_error())
            }
            _ => Shown::All,
        };
        let changes_names = sql.as_ref().is_some_and(Sql::changes_names);
        let effect = sql.map_or(Effect::None, |sql| Effect::Sql(vec![Some(sql)]));
        self.record(Awaits::Execute, shown, effect);
        if changes_names || ends_failure {
            // What follows in its own unit waits for it, too.
            self.flush();
        }
    }

    /// Has the server send the answers of an open unit, unless it has that from before.
    pub(super) fn flush(&mut self) {
        let client = &mut *self.client;
        if client.flushed_at != client.next_id {
            client.flushed_at = client.next_id;
            put(self.out, tag::FLUSH, &[], 0);
        }
    }

    /// The same for a message that must wait, if nothing before its own unit is in flight, whose answers come by themselves.
    pub(super) fn flush_if_alone(&mut self) {
        if self.client.is_open && !self.client.has_earlier_unit() {
            self.flush();
        }
    }

    fn parse_unnamed(&mut self, message: ClientMessage<'_>, rest: &[u8]) {
        let prepared = if message.length > LARGE_STATEMENT {
            self.client.had_large = true;
            self.client.texts.large()
        } else {
            Arc::new(Prepared::new(rest))
        };
        let effect = Effect::Unnamed {
            statement: Some(Statement::new(prepared, 0)),
            is_sent: true,
            is_clients: true,
        };
        self.record(Awaits::Parse, Shown::All, effect);
    }

    fn parse(
        &mut self,
        message: ClientMessage<'_>,
        name: &[u8],
        rest: &[u8],
    ) -> Result<Sent, Blocked> {
        let is_exclusive = self.server.is_exclusive();
        let key = cut(name);
        let is_taken = match self.client.lookup(key) {
            Lookup::Uncertain if !is_exclusive => return Err(Blocked),
            Lookup::Uncertain | Lookup::Absent => self.client.by_sql.contains(key),
            Lookup::Present(_) => true,
        };
        let has_place = self.client.names.len() < MAX_NAMES;
        if message.length > LARGE_STATEMENT && has_place {
            // The server has it by another name, and this text is not kept for the error that it may have first.
            if !is_exclusive && is_taken {
                self.poison(&statement_exists(name));
                return Ok(Sent::Rest(message.length));
            }
            return Ok(self.parse_large(message, name));
        }
        let mut meaning = self.meaning;
        if is_of_session(rest) {
            meaning.scope = Scope::Once(self.client.texts.number());
        }
        let interned = has_place.then(|| self.client.texts.intern(rest, meaning));
        let interned = interned.flatten().map(|(prepared, is_new)| {
            let charge = if is_new { rest.len() } else { 0 };
            Statement::new(prepared, charge)
        });
        let interned =
            interned.filter(|statement| self.client.charge + statement.charge <= MAX_CHARGE);
        let Some(statement) = interned else {
            self.poison(
                &Report::new("53200", "too many prepared statements").with_hint(
                    "Deallocate statements that are not used, or raise --prepared-statement-memory.",
                ),
            );
            return Ok(Sent::Rest(message.length));
        };
        let prepared = Arc::clone(&statement.prepared);
        let (number, unit) = (prepared.number, self.client.unit);
        if is_exclusive {
            let is_sent = !self.server.known.contains_key(&number);
            if is_sent {
                self.server.add(&prepared, key, unit, meaning.scope);
            }
            count(&self.client.texts.sent);
            let effect = Effect::Parsed {
                prepared,
                own: Some((key.into(), statement)),
                is_sent,
            };
            self.record(Awaits::Parse, Shown::All, effect);
            return Ok(Sent::Unchanged);
        }
        if self.server.is_uncertain(number, unit) {
            return Err(Blocked);
        }
        if is_taken {
            self.send_parse(&prepared, Need::Check)?;
            self.poison(&statement_exists(name));
            return Ok(Sent::Rest(message.length));
        }
        let is_failed = self.client.status == TransactionStatus::Failed;
        let is_answered = match self.server.known.get(&number) {
            Some(_) if self.client.has_earlier_unit() => return Err(Blocked),
            // What fails before it skips both.
            Some(known) => {
                known.pending.is_some()
                    || !known.is_doubtful && !is_failed && known.scope == meaning.scope
            }
            None => false,
        };
        if is_answered || !self.send_parse(&prepared, Need::Parse(key, &statement))? {
            count(&self.client.texts.answered);
            let mut answer = BytesMut::new();
            put(&mut answer, tag::PARSE_COMPLETE, &[], 0);
            let effect = Effect::Parsed {
                prepared,
                own: Some((key.into(), statement)),
                is_sent: false,
            };
            self.record(Awaits::Answer(answer), Shown::All, effect);
        }
        Ok(Sent::Rest(message.length))
    }

    /// Passes a text that is not kept.
    fn parse_large(&mut self, message: ClientMessage<'_>, name: &[u8]) -> Sent {
        let prepared = self.client.texts.large();
        self.client.had_large = true;
        let head = name.len() + 1;
        let shared = shared_name(prepared.number);
        let server_name = if self.server.is_exclusive() {
            cut(name)
        } else {
            &shared
        };
        put(
            self.out,
            tag::PARSE,
            &[server_name, b"\0"],
            message.length - head,
        );
        let unit = self.client.unit;
        let scope = prepared.meaning.scope;
        self.server.add(&prepared, server_name, unit, scope);
        let statement = Statement::new(Arc::clone(&prepared), 0);
        let effect = Effect::Parsed {
            prepared,
            own: Some((cut(name).into(), statement)),
            is_sent: true,
        };
        self.record(Awaits::Parse, Shown::All, effect);
        Sent::Rest(head)
    }

    fn bind(
        &mut self,
        message: ClientMessage<'_>,
        portal: &[u8],
        name: &[u8],
        head: usize,
    ) -> Result<Sent, Blocked> {
        let key = cut(name);
        let (own, statement) = if self.server.is_exclusive() && !self.lacks_unnamed(key) {
            let statement = match self.client.lookup(key) {
                Lookup::Present(statement) => Some(statement),
                // Of interest only if its Execute may change names.
                Lookup::Uncertain if self.client.may_change_session(key) => return Err(Blocked),
                Lookup::Absent | Lookup::Uncertain => None,
            };
            (None, statement)
        } else {
            let Some(resolved) = self.resolve(key, true)? else {
                return Ok(Sent::Rest(message.length));
            };
            (Some(resolved.name), resolved.statement)
        };
        let effect = self.bound(portal, statement.as_ref());
        let number = statement.map(|it| it.prepared.number).filter(|it| *it > 0);
        self.record_use(Awaits::Bind, Shown::All, effect, number);
        let Some(own) = own.filter(|it| **it != *name) else {
            return Ok(Sent::Unchanged);
        };
        let rest = message.length - head;
        put(self.out, tag::BIND, &[portal, b"\0", &own, b"\0"], rest);
        Ok(Sent::Rest(head))
    }

    /// Records what an Execute of the portal changes, and of which statement it is; returns the effect of the Bind.
    fn bound(&mut self, portal: &[u8], statement: Option<&Arc<Statement>>) -> Effect {
        let client = &mut *self.client;
        let undescribed = statement.filter(|it| !it.description.is_known());
        client.undescribed = undescribed.map(|it| (hash(portal), Arc::clone(it)));
        if let Some(sql) = statement.and_then(|it| it.prepared.sql.clone()) {
            client.portal = Some(Box::new((portal.into(), sql)));
            return Effect::Bound(client.portal.clone());
        }
        let mut recorded = client.portal.iter().chain(&client.bound);
        if recorded.any(|it| *it.0 == *portal) {
            client.portal = None;
            return Effect::Bound(None);
        }
        Effect::None
    }

    /// The statement that a portal is of, if that has not been described: then this describes it.
    fn undescribed(&self, portal: &[u8]) -> Option<Arc<Statement>> {
        let (hashed, statement) = self.client.undescribed.as_ref()?;
        let (portal, _) = split_string(portal)?;
        (*hashed == hash(portal)).then(|| Arc::clone(statement))
    }

    fn describe(&mut self, message: ClientMessage<'_>, name: &[u8]) -> Result<Sent, Blocked> {
        let key = cut(name);
        if self.server.is_exclusive() && !self.lacks_unnamed(key) {
            let statement = match self.client.lookup(key) {
                Lookup::Present(statement) => Some(statement),
                Lookup::Absent | Lookup::Uncertain => None,
            };
            self.record(Awaits::Describe(statement), Shown::All, Effect::None);
            return Ok(Sent::Unchanged);
        }
        // With nothing in flight: the server may be skipping, which this Sync would end too early.
        let is_first = !self.client.is_open && self.client.is_at_rest();
        let Some(resolved) = self.resolve(key, false)? else {
            return Ok(Sent::Rest(message.length));
        };
        if is_first && self.client.is_open {
            self.end_added();
        }
        let Resolved {
            name: own,
            statement,
        } = resolved;
        let number = statement.as_ref().map(|it| it.prepared.number);
        let number = number.filter(|it| *it > 0);
        self.record_use(
            Awaits::Describe(statement),
            Shown::All,
            Effect::None,
            number,
        );
        if *own == *name {
            return Ok(Sent::Unchanged);
        }
        put(self.out, tag::DESCRIBE, &[b"S", &own, b"\0"], 0);
        Ok(Sent::Rest(message.length))
    }

    fn close(&mut self, message: ClientMessage<'_>, name: &[u8]) -> Sent {
        let key = cut(name);
        // The server's own statement of the pool's stays for others, and until it is evicted.
        let at_server = match self.client.lookup(key) {
            _ if self.server.is_exclusive() => Some(name.into()),
            Lookup::Present(statement) if !name.is_empty() && statement.prepared.is_large() => {
                Some(self.name(&statement.prepared))
            }
            Lookup::Absent if self.client.may_have_by_sql(key) => Some(name.into()),
            _ => None,
        };
        let is_sent = at_server.is_some();
        let effect = if name.is_empty() {
            Effect::Unnamed {
                statement: None,
                is_sent,
                is_clients: true,
            }
        } else {
            let name = key.into();
            Effect::Closed { name, is_sent }
        };
        match at_server {
            Some(own) if *own == *name => {
                self.record(Awaits::Close, Shown::All, effect);
                return Sent::Unchanged;
            }
            Some(own) => {
                put(self.out, tag::CLOSE, &[b"S", &own, b"\0"], 0);
                self.record(Awaits::Close, Shown::All, effect);
            }
            None => {
                let mut answer = BytesMut::new();
                put(&mut answer, tag::CLOSE_COMPLETE, &[], 0);
                self.record(Awaits::Answer(answer), Shown::All, effect);
            }
        }
        Sent::Rest(message.length)
    }

    fn query(&mut self, message: ClientMessage<'_>) -> Result<Sent, Blocked> {
        let sql = match split_string(message.body) {
            Some((sql, _)) if message.length <= LARGE_STATEMENT => sql,
            _ => b"",
        };
        let effects = Sql::of_query(sql);
        if let [Some(Sql::Deallocate(name))] = &effects[..]
            && !self.server.is_exclusive()
        {
            if self.client.has_earlier_unit() {
                return Err(Blocked);
            }
            match self.client.lookup(name) {
                Lookup::Absent if !self.is_of_others(name) => {}
                found => {
                    self.deallocate(name, &found)?;
                    self.client.end_unit();
                    return Ok(Sent::Rest(message.length));
                }
            }
        }
        if let [Some(Sql::Prepare(name))] = &effects[..]
            && !self.server.is_exclusive()
        {
            // The server has the client's statement by another name.
            match self.client.lookup(name) {
                Lookup::Uncertain => return Err(Blocked),
                Lookup::Absent => {}
                Lookup::Present(_) => {
                    self.poison_query(&statement_exists(name));
                    return Ok(Sent::Rest(message.length));
                }
            }
        }
        self.record(Awaits::Query, Shown::All, Effect::Sql(effects));
        self.client.end_unit();
        Ok(Sent::Unchanged)
    }

    /// Ends a statement by a Query of that alone.
    fn deallocate(&mut self, name: &[u8], found: &Lookup) -> Result<(), Blocked> {
        let is_alone = !self.client.is_open;
        let status = match (found, self.client.status) {
            (Lookup::Present(_), TransactionStatus::Idle) if is_alone => Some(b"I"),
            (Lookup::Present(_), TransactionStatus::InTransaction) if is_alone => Some(b"T"),
            // Extended messages before it are ended by the query, and a failed transaction refuses it.
            _ => None,
        };
        if let Some(status) = status {
            let mut answer = BytesMut::new();
            put(&mut answer, tag::COMMAND_COMPLETE, &[b"DEALLOCATE\0"], 0);
            put(&mut answer, tag::READY_FOR_QUERY, &[status], 0);
            let effect = Effect::Closed {
                name: name.into(),
                is_sent: false,
            };
            self.record(Awaits::Answer(answer), Shown::All, effect);
            self.client.unnamed = None;
            return Ok(());
        }
        let is_failed = self.client.status == TransactionStatus::Failed;
        let mut queue = self.client.queue.iter();
        if is_failed && queue.any(|it| matches!(it.awaits, Awaits::Execute)) {
            return Err(Blocked);
        }
        let (shared, effects) = match found {
            // A failed transaction refuses the query, and a Parse before it would have it discarded.
            Lookup::Present(statement) if !is_alone && !is_failed => {
                self.ensure(&statement.prepared, Need::Name)?;
                let sql = Sql::Deallocate(name.into());
                (self.name(&statement.prepared), vec![Some(sql)])
            }
            // The server has a statement of the pool's by that name, which is not the client's.
            _ => (shared_name(0), Vec::new()),
        };
        self.query_of_deallocate(&shared, effects, &unknown_statement(name));
        Ok(())
    }

    /// Sends a Query that deallocates a statement; if the server does not have it, the client gets this report.
    fn query_of_deallocate(&mut self, name: &[u8], effects: Vec<Option<Sql>>, report: &Report) {
        put(self.out, tag::QUERY, &[&deallocate(name), b"\0"], 0);
        let shown = Shown::Instead(report.encode_error());
        self.record(Awaits::Query, shown, Effect::Sql(effects));
    }

    /// The name for a statement that the client has not prepared by the protocol: one that SQL has prepared, or none, as the
    /// server may have one of that name which is another client's.
    pub(super) fn name_by_sql(&self, name: &[u8]) -> Box<[u8]> {
        if self.is_of_others(name) {
            shared_name(0)
        } else {
            name.into()
        }
    }

    /// Whether the server may have a statement by this name which the client has not prepared.
    fn is_of_others(&self, name: &[u8]) -> bool {
        !self.client.may_have_by_sql(name)
            && (is_shared_name(name) || self.server.has_client_names())
    }

    /// Has the server fail as it would for `report`.
    pub(super) fn poison(&mut self, report: &Report) {
        put(self.out, tag::BIND, &[POISON], 0);
        let shown = Shown::Instead(report.encode_error());
        self.record(Awaits::Bind, shown, Effect::None);
    }

    /// The same in the place of a Query or function call.
    pub(super) fn poison_query(&mut self, report: &Report) {
        self.query_of_deallocate(&shared_name(0), Vec::new(), report);
        self.client.end_unit();
    }
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn statement_exists(name: &[u8]) -> Report {
    let name = String::from_utf8_lossy(name);
    let message = format!("prepared statement \"{name}\" already exists");
    Report::new("42P05", message)
}

pub(super) fn unknown_statement(name: &[u8]) -> Report {
    let name = String::from_utf8_lossy(name);
    if name.is_empty() {
        Report::new(
            sqlstate::UNDEFINED_STATEMENT,
            "unnamed prepared statement does not exist",
        )
    } else {
        Report::new(
            sqlstate::UNDEFINED_STATEMENT,
            format!("prepared statement \"{name}\" does not exist"),
        )
    }
}

/// The statement for a name of the pool's or of a client's.
pub(super) fn deallocate(name: &[u8]) -> Vec<u8> {
    let name = String::from_utf8_lossy(name).replace('"', "\"\"");
    format!("DEALLOCATE \"{name}\"").into_bytes()
}
