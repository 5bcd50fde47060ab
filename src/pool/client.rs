//! What follows a client from one server connection to the next.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::{
    Used, local,
    request::{LeaseRequest, Wanted},
    server::{scope, values},
    settings::{Pending, Settings},
    statements::{ClientStatements, Scope, Texts},
};
use crate::{
    config::{PinSessions, PoolMode},
    protocol::{
        frame::{SMALL_MESSAGE_LIMIT, take_message},
        options::LoginParameters,
        reported::Reported,
        requests::TransactionStatus,
        traces::Traces,
        words::add_words,
    },
    telemetry::labels::PinReason,
    upstream::{ConnectSettings, Upstream},
};

/// A client of the pool: its login, its statements, its settings, and what ties it to a connection.
pub(crate) struct ClientState {
    /// Its login.
    pub(super) login: Arc<LoginParameters>,
    /// The ParameterStatus messages of its last connection.
    pub(super) reported: Bytes,
    pub(super) statements: ClientStatements,
    /// What it has set.
    pub(super) settings: Settings,
    pub(super) changes: Pending,
    /// What it has done.
    pub(super) traces: Traces,
    /// By its login and its settings.
    scope: Scope,
    /// The scope for what it prepares now, if its transaction has another one.
    pub(super) scope_of_transaction: Option<Scope>,
    /// Why it needs its connection until it leaves.
    pub(super) pin: Option<PinReason>,
    /// Reported at the end of its last transaction.
    pub(super) reported_pin: Option<PinReason>,
    /// Reported settings that something else than a SET has changed: a function, or a reload of the server's configuration.
    pub(super) unexplained: Vec<String>,
    /// A [verification](super::verify) has failed, and the client has sent nothing since.
    pub(super) is_verified: bool,
    /// Identifies it among the clients of the endpoint.
    pub(super) number: u64,
    /// It keeps its connection between two transactions, unless another client needs that.
    is_retaining: bool,
    /// Is refused what would [pin](super::refusal) it.
    pub(super) refuses_pins: bool,
}

impl ClientState {
    /// Of a client that has a connection for the first time.
    pub(super) fn new(
        login: Arc<LoginParameters>,
        reported: Bytes,
        texts: &Arc<Texts>,
        mode: PoolMode,
        pin_sessions: PinSessions,
    ) -> Self {
        let refuses_pins = mode == PoolMode::Transaction && pin_sessions == PinSessions::Refuse;
        let mut traces = Traces::default();
        for value in values(&login) {
            traces.mentions(value.as_bytes());
        }
        Self {
            scope: scope(&login, &Settings::default()),
            scope_of_transaction: None,
            login,
            reported,
            statements: ClientStatements::new(texts),
            settings: Settings::default(),
            changes: Pending::default(),
            traces,
            pin: None,
            reported_pin: None,
            unexplained: Vec::new(),
            is_verified: false,
            number: texts.number(),
            is_retaining: mode == PoolMode::Auto,
            refuses_pins,
        }
    }

    /// It has set this.
    pub(super) fn set(&mut self, settings: Settings) {
        self.scope = scope(&self.login, &settings);
        self.settings = settings;
    }

    /// The scope for what it prepares now, by a Parse of its own or of the pool's.
    pub(super) fn scope(&mut self, is_own: bool) -> Scope {
        // What `set_config` has set is not known, and no other client has what is defined here.
        let is_unknown = self.traces.may_set_scope() && self.statements.is_in_transaction()
            || self.statements.is_defining()
            || self.traces.may_have_temporary();
        let number = || Scope::Once(self.statements.number());
        if is_own && (is_unknown || self.statements.is_setting()) {
            // Perhaps another one, once the server reads it.
            return number();
        }
        if !is_unknown && !self.changes.is_of_scope() {
            return self.scope;
        }
        // The same until a command may have changed it.
        *self.scope_of_transaction.get_or_insert_with(number)
    }

    /// How it leaves a connection that it has kept.
    pub(crate) fn used(&self) -> Used {
        Used {
            status: TransactionStatus::Idle,
            is_touched: self.traces.is_used(),
            is_reported: self.traces.is_used(),
            is_resettable: self.traces.is_resettable(),
        }
    }

    /// Whether a query may show that the client can part with its connection.
    pub(crate) fn is_suspect(&self) -> bool {
        let is_suspect =
            self.traces.is_suspect() || !self.unexplained.is_empty() && self.traces.pin().is_none();
        self.pin.is_none() && !self.is_verified && !self.statements.has_large() && is_suspect
    }

    /// Why it needs its connection, unless that cannot be known.
    pub(super) fn pin(&self) -> Option<PinReason> {
        let unexplained = (!self.unexplained.is_empty()).then_some(PinReason::Settings);
        self.pin.or_else(|| self.traces.pin()).or(unexplained)
    }

    /// What a query has shown of it.
    pub(super) fn verified(&mut self, is_clean: bool) {
        self.is_verified = !is_clean;
        if is_clean {
            self.reported_pin = None;
            self.unexplained.clear();
            // It may do the same again by what it has prepared, or in a temporary schema that it has set.
            let mut words = self.statements.words();
            for text in self.settings.texts().chain(values(&self.login)) {
                add_words(text.as_bytes(), &mut words);
            }
            self.traces.verified(&words);
        }
    }

    /// Whether nothing ties it to a connection.
    pub(super) fn is_free(&self) -> bool {
        self.pin().is_none() && !self.changes.is_pending()
    }

    /// Why it cannot part with its connection.
    pub(crate) fn current_pin(&self) -> Option<PinReason> {
        self.reported_pin
    }

    /// For its next connection.
    pub(crate) fn request<'a>(
        &self,
        upstream: &'a Arc<Upstream>,
        connect: &'a ConnectSettings,
    ) -> LeaseRequest<'a> {
        LeaseRequest {
            upstream,
            wanted: Wanted {
                login: Arc::clone(&self.login),
                settings: self.settings.clone(),
                client: Some(self.number),
                owner: self.owner(),
                exclusive: self.statements.exclusive,
            },
            connect,
        }
    }

    /// Whether the client has its last connection again, unless another needs that.
    pub(crate) fn is_retaining(&self) -> bool {
        self.is_retaining
    }

    /// By which it is given its last connection again.
    pub(super) fn owner(&self) -> Option<u64> {
        self.is_retaining.then_some(self.number)
    }

    /// Whether it may have left anything on its connections.
    pub(super) fn has_left_something(&self) -> bool {
        self.traces.is_used()
    }

    /// Takes the query at the front of what the client, at rest, has sent, and returns its answer, if no server is needed
    /// for that.
    pub(crate) fn answer(&mut self, received: &mut BytesMut) -> Option<BytesMut> {
        let resets = local::resets(received)?;
        // It has nothing that they would reset, but what it has prepared.
        let has_nothing =
            self.settings == Settings::default() && self.is_free() && !self.statements.has_by_sql();
        if !has_nothing {
            return None;
        }
        let ends_statements = resets.iter().any(|it| it.ends_statements());
        self.statements.forget_at_rest(ends_statements);
        if !self.is_retaining && resets.iter().any(|it| it.resets_settings()) {
            // To `pool_strict` it is another client from now on: what functions have left is not this one's any more.
            self.number = self.statements.number();
        }
        take_message(received, SMALL_MESSAGE_LIMIT).ok()?;
        Some(local::answer(&resets))
    }

    /// The ParameterStatus messages that the client lacks, on a connection that has these.
    pub(crate) fn report(&mut self, reported: Bytes) -> BytesMut {
        let before = std::mem::replace(&mut self.reported, reported);
        // By address first: most clients have had the connection before.
        if before.as_ptr() == self.reported.as_ptr() || before == self.reported {
            return BytesMut::new();
        }
        Reported::parse(&self.reported).difference(&Reported::parse(&before))
    }
}
