//! A server connection of a pool, and what is known of it.

use std::{
    future::poll_fn,
    hash::{DefaultHasher, Hash, Hasher},
    mem::MaybeUninit,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncWriteExt, ReadBuf},
    runtime::{self, Handle},
    time::{Instant, timeout},
};

use super::{
    request::Wanted,
    settings::Settings,
    slot::Slot,
    statements::{Scope, ServerStatements},
};
use crate::{
    net::{
        message::{ReadError, read_message, write_and_flush},
        socket::Transport,
    },
    protocol::{
        error::{ErrorFields, Report, sqlstate},
        frame::{FrameError, Message, SMALL_MESSAGE_LIMIT, tag, take_message},
        options::{LoginParameters, is_same_encoding, set},
        reported::Reported,
        startup::{CancelKey, query, terminate},
    },
    telemetry::{
        GaugeGuard,
        labels::{PoolClose, Reason},
    },
    upstream::{self, Refusal, Stream},
};

/// How long the server may take to answer a query of ours, or to accept a Terminate.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes read at a time of what the server sends without a request, which is short.
const INPUT_READ: usize = 1024;

/// A server connection of a pool. Dropped, it is closed and leaves its slot.
pub(super) struct ServerConnection {
    pub(super) stream: Stream,
    // A box, as the relay of a session needs the stream alone.
    pub(super) record: Box<Record>,
}

/// What is known of a server connection.
pub(super) struct Record {
    /// Its number, from the same series as those of sessions.
    pub(super) id: u64,
    pub(super) slot: Slot,
    pub(super) gauge: GaugeGuard,
    /// The parameters of its login, with the database that was opened.
    pub(super) login: Arc<LoginParameters>,
    pub(super) reported: Reported,
    /// A client has had it.
    pub(super) is_used: bool,
    /// The server has closed it under a client at rest.
    pub(super) has_ended: bool,
    /// The client that has used it since it was opened or reset, and has left it between two transactions.
    pub(super) left_by: Option<u64>,
    /// While it is idle: the client that gets it next, unless another needs it.
    pub(super) owner: Option<u64>,
    /// The `application_name` in force, as the login or a SET of ours has it; `None` if neither has set one.
    pub(super) name: Option<String>,
    /// A SET of ours has changed the client encoding since the login or the last reset.
    pub(super) is_encoding_set: bool,
    /// What its clients have set, in a mode that parts them from it between two transactions.
    pub(super) settings: Settings,
    /// What its clients have prepared, in a mode that parts them from it between two transactions.
    pub(super) statements: ServerStatements,
    /// The server's own cancel key.
    pub(super) key: Option<CancelKey>,
    pub(super) address: SocketAddr,
    /// The runtime that its socket is registered with.
    pub(super) runtime: runtime::Id,
    pub(super) opened_at: Instant,
    /// When it has reached its lifetime.
    pub(super) retire_at: Instant,
    /// Received, but not yet interpreted.
    pub(super) unread: BytesMut,
}

/// Why a server connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("the server closed the connection or the network failed: {0}")]
    Broken(#[from] ReadError),
    #[error("the server did not answer within {} s", .0.as_secs())]
    Late(Duration),
    #[error("a message of the server has not arrived as a whole")]
    Partial,
    #[error("the server reported: {}", .0.message)]
    Reported(Box<ErrorFields>),
    #[error("unexpected message type {0:#04x}")]
    Unexpected(u8),
    #[error("a startup parameter holds a zero byte")]
    ZeroByte,
    #[error("it could not be reset after another client")]
    NotReset(PoolClose),
}

impl Unusable {
    /// Whether the server refuses a statement, but not the client.
    pub(super) fn is_of_statement(&self) -> bool {
        matches!(self, Self::Reported(error) if error.severity == "ERROR")
    }

    /// What is reported to the client.
    pub(super) fn refusal(self) -> Refusal {
        let report = match self {
            Self::Reported(error) => Report {
                sqlstate: error.code,
                message: error.message,
                detail: error.detail,
                hint: error.hint,
            },
            other => Report::new(
                sqlstate::CONNECTION_FAILURE,
                "the server connection was lost before the request was sent",
            )
            .with_detail(other.to_string())
            .with_hint("Send the request again."),
        };
        let reason = Reason::Other;
        Refusal { report, reason }
    }
}

impl From<std::io::Error> for Unusable {
    fn from(error: std::io::Error) -> Self {
        Self::Broken(error.into())
    }
}

impl From<FrameError> for Unusable {
    fn from(error: FrameError) -> Self {
        Self::Broken(error.into())
    }
}

impl ServerConnection {
    /// A connection that has just been opened with `login`.
    pub(super) fn new(
        connected: upstream::Connected,
        mut login: Arc<LoginParameters>,
        slot: Slot,
        lifetime: Duration,
    ) -> Self {
        let upstream::Connection {
            stream,
            greeting,
            address,
            gauge,
        } = connected.connection;
        if login.database != connected.database {
            Arc::make_mut(&mut login).database = connected.database;
        }
        let now = Instant::now();
        let max_statements = slot.pool().context.settings.load().max_prepared_statements;
        Self {
            stream,
            record: Box::new(Record {
                id: slot.pool().context.registry.registry().next_id(),
                slot,
                gauge,
                is_used: false,
                has_ended: false,
                left_by: None,
                owner: None,
                name: application_name(&login).map(str::to_owned),
                is_encoding_set: login.client_encoding.is_some(),
                settings: Settings::default(),
                statements: ServerStatements::new(max_statements),
                login,
                reported: Reported::parse(&greeting.parameter_status),
                key: greeting.key,
                address,
                runtime: Handle::current().id(),
                opened_at: now,
                // Equal lifetimes would end a pool's connections at once, as they were opened.
                retire_at: now + lifetime.mul_f64(rand::random_range(0.8..=1.2)),
                unread: greeting.leftover,
            }),
        }
    }

    /// Registers the socket with the current runtime, unless it is registered there.
    pub(super) fn move_here(self) -> std::io::Result<Self> {
        let Self { stream, mut record } = self;
        let here = Handle::current().id();
        let stream = if record.runtime == here {
            stream
        } else {
            record.runtime = here;
            stream.move_here()?
        };
        Ok(Self { stream, record })
    }

    /// Takes what the server has sent without a request, before a client would receive it. Takes a system call.
    ///
    /// # Errors
    /// Why the connection is of no use any more.
    pub(super) async fn take_input(&mut self) -> Result<(), Unusable> {
        self.record.take_all_unrequested()?;
        poll_fn(|cx| {
            while let Poll::Ready(taken) = self.poll_input(cx) {
                if taken.is_err() {
                    return Poll::Ready(taken);
                }
            }
            // What has arrived since the last turn of the runtime is known to the kernel only, and wakes this task. It may be
            // TLS's own, such as a ticket: then there is nothing to read.
            if self.stream.has_input() {
                Poll::Pending
            } else {
                Poll::Ready(Ok(()))
            }
        })
        .await?;
        if self.record.unread.is_empty() {
            Ok(())
        } else {
            // The rest of the message would come to the client.
            Err(Unusable::Partial)
        }
    }

    /// Sets what a new login of this client would set, and what the client has set since, where that differs. Not cancel safe.
    pub(super) async fn adopt(&mut self, wanted: &Wanted) -> Result<(), Unusable> {
        if let Some(sql) = self.record.adoption(wanted) {
            self.query(&sql, |_| {}).await?;
            self.record.settings = wanted.settings.clone();
            self.record.name = application_name(&wanted.login).map(str::to_owned);
            self.record.is_encoding_set = wanted.login.client_encoding.is_some();
            if self.record.statements.has_foreign_names(wanted.exclusive) {
                self.record.statements.share();
            }
        }
        Ok(())
    }

    /// Runs a query of ours and passes each DataRow's body to `row`. Not cancel safe.
    pub(super) async fn query(
        &mut self,
        sql: &str,
        row: impl FnMut(&[u8]),
    ) -> Result<(), Unusable> {
        self.query_within(QUERY_TIMEOUT, sql, row).await
    }

    /// Runs a query of ours that may take up to `limit`. Not cancel safe.
    pub(super) async fn query_within(
        &mut self,
        limit: Duration,
        sql: &str,
        row: impl FnMut(&[u8]),
    ) -> Result<(), Unusable> {
        timeout(limit, self.exchange(sql, row))
            .await
            .unwrap_or(Err(Unusable::Late(limit)))
    }

    async fn exchange(&mut self, sql: &str, mut row: impl FnMut(&[u8])) -> Result<(), Unusable> {
        let message = query(sql).ok_or(Unusable::ZeroByte)?;
        write_and_flush(&mut self.stream, &message).await?;
        self.record.statements.forget_unnamed();
        let mut result = Ok(());
        loop {
            let unread = &mut self.record.unread;
            let message = read_message(&mut self.stream, unread, SMALL_MESSAGE_LIMIT).await?;
            match message.tag {
                tag::READY_FOR_QUERY if message.body() == b"I" => {
                    return self.record.take_all_unrequested().and(result);
                }
                tag::ERROR_RESPONSE => {
                    let error = ErrorFields::parse(message.body());
                    let error = Unusable::Reported(Box::new(error));
                    if !error.is_of_statement() {
                        return Err(error);
                    }
                    result = Err(error);
                }
                tag::DATA_ROW => row(message.body()),
                tag::COMMAND_COMPLETE | tag::EMPTY_QUERY_RESPONSE | tag::ROW_DESCRIPTION => {}
                _ => self.record.take_unrequested(&message)?,
            }
        }
    }

    /// Takes what the server sends without a request; ready once some has arrived, or why the connection is of no use any more.
    pub(super) fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Unusable>> {
        let mut space = [MaybeUninit::uninit(); INPUT_READ];
        let mut space = ReadBuf::uninit(&mut space);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut space))?;
        if space.filled().is_empty() {
            let end = std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
            return Poll::Ready(Err(end.into()));
        }
        self.record.unread.extend_from_slice(space.filled());
        Poll::Ready(self.record.take_all_unrequested())
    }

    /// Ends the connection in an orderly way, at most for [`QUERY_TIMEOUT`].
    pub(super) async fn terminate(mut self) {
        let closing = async {
            write_and_flush(&mut self.stream, &terminate()).await?;
            self.stream.shutdown().await
        };
        // The connection is dropped whatever happens.
        let _ = timeout(QUERY_TIMEOUT, closing).await;
    }
}

impl Record {
    /// Whether a session of `client` can use the connection: what a startup message fixes for good is equal.
    pub(super) fn suits(&self, client: &LoginParameters) -> bool {
        self.login.database == client.database
            && fixed(&self.login).eq(fixed(client))
            // What a new login without an encoding would have is known of such connections only.
            && (client.client_encoding.is_some() || self.login.client_encoding.is_none())
    }

    /// Whether a RESET by the client restores what its own login would have set.
    pub(super) fn resets_to(&self, client: &LoginParameters) -> bool {
        application_name(&self.login) == application_name(client)
            && self.login.client_encoding == client.client_encoding
    }

    /// The statements that make it what a new login of the client with these settings would be.
    fn adoption(&self, wanted: &Wanted) -> Option<String> {
        let Wanted {
            login, settings, ..
        } = wanted;
        let mut statements = Vec::from_iter(self.settings.difference(settings));
        // What the client has set itself stands above already.
        let is_set = |settings: &Settings, name| settings.names().any(|it| it == name);
        if !is_set(settings, APPLICATION_NAME) {
            let own = application_name(&self.login);
            let current = if is_set(&self.settings, APPLICATION_NAME) {
                // Of a client before, whose setting is reset above.
                own
            } else {
                self.name.as_deref()
            };
            match application_name(login) {
                wanted if wanted == current => {}
                None if own.is_none() => statements.push(format!("RESET {APPLICATION_NAME}")),
                wanted => statements.push(set(APPLICATION_NAME, wanted.unwrap_or_default())),
            }
        }
        if !is_set(settings, CLIENT_ENCODING) {
            if let Some(wanted) = &login.client_encoding {
                let current = self.reported.value(CLIENT_ENCODING).unwrap_or_default();
                if is_set(&self.settings, CLIENT_ENCODING)
                    || !is_same_encoding(&String::from_utf8_lossy(current), wanted)
                {
                    statements.push(set(CLIENT_ENCODING, wanted));
                }
            } else if self.is_encoding_set {
                statements.push(format!("RESET {CLIENT_ENCODING}"));
            }
        }
        if self.statements.has_foreign_names(wanted.exclusive) {
            // Once: the pool gives them other names as they are needed again. Last, as an error before does not undo it.
            statements.push("DEALLOCATE ALL".to_owned());
        }
        (!statements.is_empty()).then(|| statements.join("; "))
    }

    /// After a RESET of what the login has set.
    pub(super) fn reset_name(&mut self) {
        self.name = application_name(&self.login).map(str::to_owned);
    }

    fn take_all_unrequested(&mut self) -> Result<(), Unusable> {
        while let Some(message) = take_message(&mut self.unread, SMALL_MESSAGE_LIMIT)? {
            self.take_unrequested(&message)?;
        }
        if self.unread.is_empty() {
            // An idle connection holds no buffer.
            self.unread = BytesMut::new();
        }
        Ok(())
    }

    /// Takes a message that the server may send at any time ("Asynchronous Operations" in the protocol documentation).
    fn take_unrequested(&mut self, message: &Message) -> Result<(), Unusable> {
        match message.tag {
            tag::PARAMETER_STATUS => self.reported.record(message),
            // For no client: the one that it might concern has left.
            tag::NOTICE_RESPONSE | tag::NOTIFICATION_RESPONSE => {}
            tag::ERROR_RESPONSE => {
                let error = ErrorFields::parse(message.body());
                return Err(Unusable::Reported(Box::new(error)));
            }
            other => return Err(Unusable::Unexpected(other)),
        }
        Ok(())
    }
}

const APPLICATION_NAME: &str = "application_name";
pub(super) const CLIENT_ENCODING: &str = "client_encoding";

/// The parameters that [`ServerConnection::adopt`] does not set: a RESET by the client must restore them.
fn fixed(login: &LoginParameters) -> impl Iterator<Item = &(String, String)> {
    let parameters = login.parameters.iter().chain(&login.folded);
    parameters.filter(|(name, _)| name != APPLICATION_NAME && name != CLIENT_ENCODING)
}

/// The values of the parameters that are fixed.
pub(super) fn values(login: &LoginParameters) -> impl Iterator<Item = &String> {
    fixed(login).map(|(_, value)| value)
}

/// What decides how a server reads the statements of a client that has set this since its login.
pub(super) fn scope(login: &LoginParameters, settings: &Settings) -> Scope {
    let mut hasher = DefaultHasher::new();
    login.database.hash(&mut hasher);
    for parameter in fixed(login) {
        parameter.hash(&mut hasher);
    }
    let encoding = login.client_encoding.as_ref();
    encoding.map(|it| it.to_ascii_lowercase()).hash(&mut hasher);
    for setting in settings.of_scope() {
        setting.hash(&mut hasher);
    }
    Scope::Settings(hasher.finish())
}

/// What a login sets, if it sets one: the parameter of that name goes before what `options` has.
fn application_name(login: &LoginParameters) -> Option<&str> {
    let mut parameters = login.parameters.iter().chain(&login.folded);
    let parameter = parameters.find(|(name, _)| name == APPLICATION_NAME);
    parameter.map(|(_, value)| value.as_str())
}
