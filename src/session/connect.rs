//! From admission to the welcome: the registry entry, the server connection, and what the client is sent at login.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use jiff::Timestamp;
use tokio::time::{Instant, timeout};

use super::{
    CancelKeys, Session,
    access::Access,
    cancel::{CancelTarget, Registration},
    client::Client,
    close::{Closing, shutting_down},
    database,
    logged_in::LoggedIn,
};
use crate::{
    net::socket::Transport,
    pool::{LeaseRequest, Leased},
    protocol::{
        backend::welcome,
        error::{Report, sqlstate},
        options::LoginParameters,
    },
    shutdown::{Phase, Shutdown},
    status::{ClientInfo, Rejected, Server, SessionEntry},
    telemetry::labels::Reason,
    upstream::{Refusal, Upstream},
};

/// From this wait on the client is sent a notice about it.
const LONG_WAIT: Duration = Duration::from_secs(1);

/// A client with an entry in the registry, which counts against the connection limit.
pub(super) struct Admitted<'a> {
    access: Access<'a>,
    entry: SessionEntry,
    began_waiting: Instant,
}

/// A client with a server connection.
pub(super) struct Connected<'a> {
    session: &'a Session<'a>,
    negotiation: BytesMut,
    entry: SessionEntry,
    leased: Leased,
    shutdown: Shutdown,
    began: Instant,
}

impl<'a> Access<'a> {
    /// Registers the session, unless the proxy or the endpoint is shutting down or the limit is reached.
    pub(super) fn admit(self) -> Result<Admitted<'a>, Closing> {
        let Session {
            endpoint, config, ..
        } = self.session;
        // Before the limit, as a client may retry at another host during a shutdown.
        if endpoint.process.shutdown.phase() != Phase::Serving {
            return Err(shutting_down().into());
        }
        let client = ClientInfo::new(self.session.peer, self.encryption, &self.startup);
        let limit = config.max_connections;
        let rejected = match endpoint.registry.enter(self.session.id, client, limit) {
            Ok(entry) => {
                return Ok(Admitted {
                    access: self,
                    entry,
                    began_waiting: Instant::now(),
                });
            }
            Err(rejected) => rejected,
        };
        Err(match rejected {
            Rejected::Draining => Closing::refused(
                Report::new(
                    sqlstate::CANNOT_CONNECT_NOW,
                    format!(
                        "Lakebase endpoint {} is no longer among the settings of lakebase-proxy",
                        endpoint.route.label()
                    ),
                )
                .with_hint("Connect to another endpoint, or put it back and reload."),
                Reason::ShuttingDown,
            ),
            Rejected::Limit => Closing::refused(
                Report::new(
                    sqlstate::TOO_MANY_CONNECTIONS,
                    format!("sorry, too many clients already: lakebase-proxy takes {limit}"),
                )
                .with_hint("Close connections that are not used, or raise --max-connections."),
                Reason::MaxConnections,
            ),
        })
    }
}

impl<'a> Admitted<'a> {
    /// Connects to the endpoint, unless the client leaves or the proxy shuts down first.
    pub(super) async fn connect<S: Transport>(
        self,
        client: &mut Client<S>,
    ) -> Result<Connected<'a>, Closing> {
        let session = self.access.session;
        let endpoint = session.endpoint;
        // A client may wait for long.
        client.shrink();
        // The connect is cancel safe: a client that leaves gives up its place in the queue and its attempt.
        let connected = tokio::select! {
            connected = self.access.connect() => connected,
            () = client.wait_for_hang_up() => {
                tracing::debug!(session = session.id, "client left while it was being logged in");
                return Err(Closing::Silent);
            }
            () = endpoint.process.shutdown.draining().cancelled() => Err(shutting_down()),
        };
        let began = Instant::now();
        let waited = began.duration_since(self.began_waiting);
        // Before the result is known: refused clients count as well.
        endpoint.metrics.hold_seconds.observe(waited.as_secs_f64());
        let mut leased = connected.map_err(|refusal| self.access.hint_at_console(refusal))?;
        endpoint.metrics.server_assignments.inc();
        tracing::debug!(session = session.id, after = ?waited, "session begins");
        let shutdown = endpoint.pools.shutdown_of(&leased.database);
        self.entry.connected(Server {
            id: leased.id.unwrap_or(session.id),
            address: leased.address,
            process_id: leased.key.map(|key| key.process_id),
            database: std::mem::take(&mut leased.database).into(),
            waited,
        });
        if let Some(wait) = leased.woke_after {
            let recent = endpoint.registry.registry().recent();
            recent.woke(endpoint.route.label(), wait, Timestamp::now());
        }
        Ok(Connected {
            session,
            negotiation: self.access.negotiation,
            entry: self.entry,
            leased,
            shutdown,
            began,
        })
    }
}

impl Session<'_> {
    /// The endpoint's upstream, once its look-up has succeeded.
    pub(super) async fn upstream(&self) -> Result<Arc<Upstream>, Refusal> {
        let timeouts = self.config.connect.timeouts;
        // The look-up is a request to the workspace, so it is limited like that for a credential.
        let budget = timeouts.connect_timeout.min(timeouts.credential_timeout);
        self.endpoint.route.upstream(budget).await
    }
}

impl Access<'_> {
    async fn connect(&self) -> Result<Leased, Refusal> {
        let Session {
            endpoint, config, ..
        } = self.session;
        let upstream = self.session.upstream().await?;
        let login = self.login(&upstream.endpoint().database);
        let request = LeaseRequest::new(&upstream, login, &config.connect);
        endpoint.pools.connect(&request).await
    }

    fn login(&self, default_database: &str) -> LoginParameters {
        let (database, fallback) = database::choose(
            self.session.config.database_mapping,
            self.startup.parameter("user"),
            self.startup.parameter("database"),
            default_database,
        );
        let mut login = LoginParameters::new(&self.startup, database);
        login.fallback_database = fallback;
        login
    }

    /// The client may have meant the console, which does not accept it.
    fn hint_at_console(&self, mut refusal: Refusal) -> Refusal {
        let console = self.session.endpoint.process.console.as_ref();
        if refusal.report.sqlstate == sqlstate::UNDEFINED_DATABASE
            && console.is_some_and(|console| console.is_named(&self.startup))
        {
            refusal.report.hint = Some(
                "If the proxy's own console is meant: it answers on the Unix socket (--unix-socket), and on TCP with --admin-console."
                    .to_owned(),
            );
        }
        refusal
    }
}

impl<'a> Connected<'a> {
    /// Sends AuthenticationOk to ReadyForQuery.
    pub(super) async fn welcome<S: Transport>(
        self,
        client: &mut Client<S>,
    ) -> Result<Box<LoggedIn<'a>>, Closing> {
        let session = self.session;
        let endpoint = session.endpoint;
        let Leased {
            lease,
            parameter_status,
            mut notices,
            key: server_key,
            address,
            leftover,
            woke_after,
            client: state,
            ..
        } = self.leased;
        // A client that keeps its connection mostly compares the process id with that of its server.
        let is_parting = state.as_ref().is_some_and(|state| !state.is_retaining());
        // Before the welcome: the client may cancel as soon as it has its key.
        let registration = server_key.map(|key| {
            let target = CancelTarget { address, key };
            endpoint.cancel_keys.register(target, is_parting)
        });
        let key = registration
            .as_ref()
            .map_or_else(CancelKeys::unused_key, Registration::key);
        if let Some(wait) = woke_after.filter(|wait| *wait >= LONG_WAIT) {
            let notice = format!(
                "Lakebase endpoint {} woke after {:.1} s",
                endpoint.route.label(),
                wait.as_secs_f64()
            );
            notices.extend_from_slice(&Report::new("00000", notice).encode_notice());
        }
        // One write for all messages of the login, instead of a system call for each.
        let mut message = self.negotiation;
        message.extend_from_slice(&welcome(&parameter_status, key, &notices));
        let logged_in = Box::new(LoggedIn {
            session,
            traces: (lease.is_pooled() && state.is_none()).then(Box::default),
            unsent: 0,
            discarding: None,
            lease: Some(lease),
            shares: state.is_some(),
            state,
            leftover,
            began: self.began,
            entry: self.entry,
            shutdown: self.shutdown,
            registration,
        });
        // A client that does not read would otherwise keep its server connection.
        let sent = timeout(session.config.client_login_timeout, client.send(&message)).await;
        if !matches!(sent, Ok(Ok(()))) {
            tracing::debug!(session = session.id, "client did not take its welcome");
            let ended = logged_in.left_before_use();
            logged_in.close(ended, client).await;
            return Err(Closing::Silent);
        }
        Ok(logged_in)
    }
}
