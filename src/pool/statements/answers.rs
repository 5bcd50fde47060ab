//! What becomes of a message of the server, and what it changes.

use std::sync::Arc;

use bytes::BytesMut;

use super::{
    Awaits, ClientStatements, Effect, InFlight, Known, Passage, ServerStatements, Shown, Sql, put,
    server::Unnamed,
    shared_name,
    statement::{Description, hash, hash_of_columns},
};
use crate::protocol::{
    error::{ErrorFields, sqlstate},
    frame::{split_string, tag, until_zero},
    requests::TransactionStatus,
    tag::{Command, Discard},
};

impl ClientStatements {
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
                if self.status == TransactionStatus::Idle {
                    // Another client may have prepared one before this was committed.
                    self.has_defined |= std::mem::take(&mut self.is_defining);
                }
                match self.queue.front().map(|it| (&it.awaits, &it.shown)) {
                    Some((Awaits::Query, _)) if !self.is_begun && self.doubtful > 0 => {
                        self.doubtful -= 1;
                        Passage::Pass
                    }
                    Some((Awaits::Sync | Awaits::Query, shown)) => {
                        let passage = shown.passage();
                        self.complete(server);
                        passage
                    }
                    _ if self.doubtful > 0 => {
                        self.doubtful -= 1;
                        if std::mem::take(&mut self.is_skipping) {
                            // That Sync has ended what was taken for open.
                            self.end_unit();
                        }
                        Passage::Pass
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

    /// Records an answer that is part of the front message's, or ends it.
    fn progress(&mut self, server: &mut ServerStatements, kind: u8, body: &[u8]) -> Passage {
        let Some(front) = self.queue.front_mut() else {
            self.is_lost = true;
            return Passage::Pass;
        };
        let passage = front.shown.passage();
        if !self.is_begun {
            // Every ReadyForQuery of a message before this one has come.
            self.doubtful = 0;
            self.is_begun = matches!(front.awaits, Awaits::Query);
        }
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
                self.note_definition(command);
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
                self.note_definition(command);
                // A failed transaction executes nothing but what ends it, or its failure.
                if self.status == TransactionStatus::Failed {
                    self.status = TransactionStatus::InTransaction;
                }
                true
            }
            (Awaits::Describe(_), tag::PARAMETER_DESCRIPTION) => {
                self.parameters = Some(hash(body));
                false
            }
            (Awaits::Describe(statement), tag::ROW_DESCRIPTION | tag::NO_DATA) => {
                let parameters = self.parameters.take();
                if let Some(statement) = statement {
                    let columns = hash_of_columns(body);
                    statement.description.learn(parameters, columns);
                    if let Some(known) = server.description(statement) {
                        known.learn(parameters, columns);
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

    /// Records what a command may change of the meaning of texts.
    fn note_definition(&mut self, command: Command) {
        match command {
            Command::Definition => self.define(),
            // Of what was defined since a savepoint, perhaps.
            Command::Rollback => self.has_defined |= self.is_defining,
            _ => {}
        }
    }

    fn define(&mut self) {
        self.is_defining = true;
        self.has_defined = true;
    }

    /// Removes the Syncs that a COPY from the client has read before its CopyDone; returns how many.
    fn end_copy_in(&mut self) -> usize {
        let behind = || self.queue.iter().skip(1);
        let syncs = behind().take_while(|it| matches!(it.awaits, Awaits::Sync));
        let syncs = syncs.count();
        let end = behind().nth(syncs).map(|it| &it.awaits);
        let ends = usize::from(matches!(end, Some(Awaits::CopyEnd)));
        self.queue.drain(1..=syncs + ends);
        syncs
    }

    /// Ends the front message with success.
    fn complete(&mut self, server: &mut ServerStatements) {
        let Some(record) = self.queue.pop_front() else {
            return;
        };
        self.is_begun = false;
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
                prepared,
                own,
                is_sent,
            } => {
                let is_exclusive = server.is_exclusive();
                let known = server.known.get_mut(&prepared.number);
                if is_sent && let Some(known) = known {
                    known.pending = None;
                } else if let (Some((_, statement)), Some(known)) = (&own, known)
                    && !is_exclusive
                {
                    // Answered here, and so the client has what the server has.
                    statement.description.adopt(&known.description);
                }
                if let Some((name, statement)) = own {
                    self.charge += statement.charge;
                    self.names.insert(name, statement);
                }
            }
            Effect::Unnamed {
                statement,
                is_sent,
                is_clients,
            } => {
                if is_sent {
                    server.unnamed = statement.clone().map(|statement| Unnamed {
                        statement,
                        description: Description::default(),
                    });
                }
                if is_clients {
                    self.unnamed = statement;
                }
            }
            Effect::Closed { name, is_sent } => {
                self.by_sql.remove(&name);
                let closed = self.forget_name(&name);
                if is_sent && let Some(closed) = closed.map(|it| Arc::clone(&it.prepared)) {
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
            Effect::None | Effect::Evicted(_) => {}
        }
    }

    /// Ends a message that the server has not executed.
    fn skip(&mut self, server: &mut ServerStatements, record: InFlight) {
        self.settle(server, &record);
        match record.effect {
            Effect::Parsed {
                prepared,
                is_sent: true,
                ..
            } => {
                server.known.remove(&prepared.number);
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
                own: Some((name, _)),
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
        let is_copy = std::mem::take(&mut self.is_copying_in);
        let doubtful = if is_copy { self.end_copy_in() } else { 0 };
        match self.queue.front().map(|it| &it.awaits) {
            // Of a commit, or the reason for the end of the connection.
            None | Some(Awaits::Sync) => return self.show_error(body, to_client),
            Some(Awaits::Query) => {
                self.is_begun = true;
                self.doubtful = doubtful;
                return self.show_error(body, to_client);
            }
            Some(_) => self.doubtful = doubtful,
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
        self.undescribed = None;
        let code = ErrorFields::parse(body).code;
        let number = front.statement;
        if code == sqlstate::FEATURE_NOT_SUPPORTED {
            // "cached plan must not change result type", in any language.
            let known = number.and_then(|it| server.known.get(&it));
            self.outdated = known.map(|it| it.statement.meaning.epoch);
        }
        if code == sqlstate::UNDEFINED_STATEMENT && number.is_some() && !server.is_exclusive() {
            // Deallocated unseen, such as by a function. It is prepared anew when needed again.
            server.doubt();
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
                let renamed = self.with_name_of_client(body);
                without_position(renamed.as_deref().unwrap_or(body), to_client);
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
            .find(|(_, it)| it.prepared.number == number)?;
        let of_pool = [b"\"", &shared_name(number)[..], b"\""].concat();
        let at = body.windows(of_pool.len()).position(|it| it == of_pool)?;
        let (before, rest) = body.split_at(at);
        let behind = rest.get(of_pool.len()..)?;
        Some([before, b"\"", name, b"\"", behind].concat())
    }

    /// Appends the answers whose turn it is.
    pub(super) fn answer(&mut self, server: &mut ServerStatements, to_client: &mut BytesMut) {
        while let Some(Awaits::Answer(answer)) = self.queue.front().map(|it| &it.awaits) {
            to_client.extend_from_slice(answer);
            self.complete(server);
        }
    }

    fn forget(&mut self, server: &mut ServerStatements, sql: &Sql) {
        match sql {
            Sql::OfSettings(text) => self.completed = Some(text.clone()),
            Sql::Definition => self.define(),
            Sql::Prepare(name) => {
                self.by_sql.insert(name.clone());
            }
            Sql::Deallocate(name) => {
                self.by_sql.remove(name);
                let of_client = self.forget_name(name).map(|it| it.prepared.number);
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
