//! Failed attempts to log in: their class, and the error that the client receives.
//!
//! `classes` is the table of reactions, `rules` the table of error texts, `hints` completes the hint of a refused login. An
//! error outside the tables is not retried: it goes to the client unchanged.

mod classes;
mod hints;
mod rules;

use std::{borrow::Cow, fmt, io};

pub(super) use classes::{Reaction, consequence};

use classes::INTERNAL_ERROR;

pub(crate) use crate::telemetry::labels::FailureClass as Class;

use super::{dropped, endpoint::Endpoint};
use crate::{
    net::message::ReadError,
    protocol::{
        auth::AuthError,
        error::{ErrorFields, Report, sqlstate},
        frame::FrameError,
        options::TooLong,
    },
    status::Label,
    telemetry::{chain, labels::LoginPhase, redact},
};

const REFUSED: &str = "Nothing listens on the port there, or a firewall rejects the connection: check PGHOST, PGPORT and the firewall. An endpoint that wakes may refuse for a few seconds.";
const NO_ANSWER: &str = "Check PGHOST and PGPORT, and what stands between this machine and the port: a firewall that drops packets, a shared cluster below DBR 18, a private link that is not set up, or a name that leads elsewhere (PGHOSTADDR).";
const NO_NAME: &str = "Check PGHOST and the machine's name resolution.";
const NO_TLS_ANSWER: &str = "Something takes connections and does not pass them on: check a private link, load balancer or firewall between this machine and the endpoint.";
const UNTRUSTED: &str = "The server's certificate is not trusted for this name. Behind a private CA set PGSSLROOTCERT; otherwise something between here and Lakebase intercepts TLS.";
const CROWDED: &str = "Open fewer connections at a time, or keep them in a pool.";
const TOO_LONG: &str =
    "Send fewer or shorter startup parameters, or set them once for the role: ALTER ROLE ... SET.";

/// A failed attempt to log in.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Its meaning.
    pub class: Class,
    /// Whether the host name could not be resolved, which is retried for less time than a sleeping endpoint.
    pub is_dns: bool,
    /// Whether the client's own settings may be the cause: then the endpoint's state is not changed.
    pub is_inconclusive: bool,
    origin: Origin,
    hint: Option<Cow<'static, str>>,
    /// An addition to the message.
    note: Option<String>,
}

#[derive(Clone, Debug)]
enum Origin {
    /// The server's ErrorResponse.
    Server(Box<ErrorFields>),
    /// The proxy's own error.
    Proxy {
        sqlstate: &'static str,
        message: String,
    },
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::Server(error) => {
                write!(f, "{} {}: {}", error.severity, error.code, error.message)?;
                match &error.detail {
                    Some(detail) => write!(f, " ({detail})"),
                    None => Ok(()),
                }
            }
            Origin::Proxy { message, .. } => f.write_str(message),
        }
    }
}

impl Failure {
    /// A server's ErrorResponse. `client_texts` are the texts of the client that the server had received before and may
    /// repeat.
    pub fn server<'a>(
        mut error: ErrorFields,
        client_texts: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        // Some servers repeat the password in their refusal.
        let texts = [
            Some(&mut error.severity),
            Some(&mut error.code),
            Some(&mut error.message),
            error.detail.as_mut(),
            error.hint.as_mut(),
        ];
        for text in texts.into_iter().flatten() {
            if let Cow::Owned(clean) = redact(text) {
                *text = clean;
            }
        }
        let (class, hint) = rules::classify(&error, client_texts);
        Self::new(class, Origin::Server(Box::new(error))).with_hint(hint)
    }

    /// The host name could not be resolved.
    pub(crate) fn resolve(host: &str, error: &io::Error) -> Self {
        let message = format!("cannot resolve host name `{host}`: {}", chain(error));
        let mut failure =
            // Retried: a sidecar may start before its network and resolver do.
            Self::ours(Class::Waking, sqlstate::CANNOT_CONNECT, message).with_hint(NO_NAME);
        failure.is_dns = true;
        failure
    }

    /// No address accepted the connection.
    pub(crate) fn dial(error: &io::Error) -> Self {
        let (reason, hint) = match error.kind() {
            io::ErrorKind::ConnectionRefused => ("connection refused".to_owned(), REFUSED),
            _ => (chain(error).to_string(), NO_ANSWER),
        };
        let message = format!("cannot connect: {reason}");
        Self::ours(Class::Waking, sqlstate::CANNOT_CONNECT, message).with_hint(hint)
    }

    /// An established connection failed before the login was complete.
    pub(crate) fn broken(error: &io::Error) -> Self {
        let message = match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                "the server closed the connection unexpectedly".to_owned()
            }
            _ => format!("the connection to the server failed: {}", chain(error)),
        };
        // Retried: an edge also closes connections while the endpoint suspends or wakes.
        Self::ours(Class::Waking, sqlstate::CONNECTION_FAILURE, message)
    }

    /// An attempt took longer than its limit.
    pub(crate) fn timed_out(phase: &str) -> Self {
        let message = format!("the server did not answer in time ({phase})");
        Self::ours(Class::Waking, sqlstate::CONNECTION_FAILURE, message)
    }

    /// The server requested the password and did not finish the login in time. The endpoint may be waking behind its edge,
    /// but a client's own settings (`post_auth_delay`) can have the same effect.
    pub(crate) fn slow_login() -> Self {
        let mut failure = Self::timed_out("login, after the password was sent");
        failure.is_inconclusive = true;
        failure
    }

    /// An attempt took longer than its limit in this phase.
    pub(crate) fn timed_out_in(phase: LoginPhase, endpoint: &Endpoint) -> Self {
        let Endpoint { host, port, .. } = endpoint;
        let (sqlstate, message, hint) = match phase {
            LoginPhase::Resolve => (
                sqlstate::CANNOT_CONNECT,
                format!("the name server did not answer in time for `{host}`"),
                NO_NAME,
            ),
            LoginPhase::Dial => (
                sqlstate::CANNOT_CONNECT,
                format!("no answer from `{host}` on port {port} (TCP connect)"),
                NO_ANSWER,
            ),
            LoginPhase::Tls => (
                sqlstate::CONNECTION_FAILURE,
                format!(
                    "`{host}` takes connections on port {port}, but did not answer in time (TLS)"
                ),
                NO_TLS_ANSWER,
            ),
            _ => return Self::timed_out("login"),
        };
        Self::ours(Class::Waking, sqlstate, message).with_hint(hint)
    }

    /// The client's budget ended before it had one of the slots for concurrent logins.
    pub(crate) fn crowded() -> Self {
        let message = "timed out waiting for a login slot";
        Self::ours(Class::Capacity, sqlstate::TOO_MANY_CONNECTIONS, message).with_hint(CROWDED)
    }

    /// The TLS handshake failed: the certificate, or the network under it.
    pub(crate) fn tls(error: &io::Error) -> Self {
        let tls = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let Some(tls) = tls else {
            // Retried: the network, or an edge that closes while the endpoint wakes.
            return Self::broken(error);
        };
        let message = format!("TLS failed: {tls}");
        // Not retried: what does not verify now does not verify after a wait either.
        let hint = matches!(tls, rustls::Error::InvalidCertificate(_)).then_some(UNTRUSTED);
        Self::ours(Class::Protocol, sqlstate::CANNOT_CONNECT, message).with_hint(hint)
    }

    /// The peer violates the Postgres protocol.
    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self::ours(Class::Protocol, sqlstate::PROTOCOL_VIOLATION, message)
    }

    fn ours(class: Class, sqlstate: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self::new(class, Origin::Proxy { sqlstate, message })
    }

    fn new(class: Class, origin: Origin) -> Self {
        Self {
            class,
            is_dns: false,
            is_inconclusive: false,
            origin,
            hint: None,
            note: None,
        }
    }

    fn with_hint(mut self, hint: impl Into<Option<&'static str>>) -> Self {
        self.hint = hint.into().map(Cow::Borrowed);
        self
    }

    /// The client's parameter that the server refuses by name.
    pub(super) fn refused_parameter<'a>(
        &self,
        parameters: &'a [(String, String)],
    ) -> Option<&'a str> {
        match &self.origin {
            Origin::Server(error) => dropped::refused(error, parameters),
            Origin::Proxy { .. } => None,
        }
    }

    /// Whether the server reports that the database does not exist.
    pub(crate) fn is_missing_database(&self) -> bool {
        self.is_server_error(sqlstate::UNDEFINED_DATABASE)
    }

    /// Whether the server reports this SQLSTATE.
    pub(crate) fn is_server_error(&self, sqlstate: &str) -> bool {
        matches!(&self.origin, Origin::Server(error) if error.code == sqlstate)
    }

    /// What a person can do.
    pub(crate) fn hint(&self) -> Option<&str> {
        self.hint.as_deref().or(consequence(self.class).hint)
    }

    /// The error for the client.
    pub fn report(&self, endpoint: &Label) -> Report {
        let mut report = match &self.origin {
            Origin::Server(error) => {
                let sqlstate = match error.code.as_str() {
                    // Drivers and pools decide on a retry by SQLSTATE, for which the catch-all is of no use.
                    "" | INTERNAL_ERROR => consequence(self.class).sqlstate,
                    code => code,
                };
                let mut message = format!(
                    "cannot log in to Lakebase endpoint {endpoint}: {}",
                    error.message
                );
                if let Some(note) = &self.note {
                    message = format!("{message} ({note})");
                }
                let mut report = Report::new(sqlstate, message)
                    .with_detail(format!("The server reported: {self}"));
                report.hint.clone_from(&error.hint);
                report
            }
            Origin::Proxy { sqlstate, message } => Report::new(
                sqlstate,
                format!("cannot reach Lakebase endpoint {endpoint}: {message}"),
            ),
        };
        if let Some(hint) = self.hint() {
            report.hint = Some(hint.to_owned());
        }
        report
    }
}

impl From<TooLong> for Failure {
    fn from(error: TooLong) -> Self {
        Self::protocol(error.to_string()).with_hint(TOO_LONG)
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Frame(error) => error.into(),
            ReadError::Io(error) => Self::broken(&error),
        }
    }
}

impl From<FrameError> for Failure {
    fn from(error: FrameError) -> Self {
        Self::protocol(format!("the server does not speak Postgres: {error}"))
    }
}

impl From<AuthError> for Failure {
    fn from(error: AuthError) -> Self {
        match error {
            // The server did not prove that it knows the password, or rejected the proxy's proof.
            AuthError::Scram(_) => Self::ours(
                Class::Identity,
                sqlstate::INVALID_AUTHORIZATION,
                chain(&error).to_string(),
            ),
            AuthError::OutOfOrder
            | AuthError::TooCostly(_)
            | AuthError::Unsupported(_)
            | AuthError::ZeroByte => Self::protocol(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(code: &str, message: &str, detail: Option<&str>) -> Class {
        let error = ErrorFields {
            severity: "FATAL".to_owned(),
            code: code.to_owned(),
            message: message.to_owned(),
            detail: detail.map(str::to_owned),
            hint: None,
        };
        Failure::server(error, []).class
    }

    #[test]
    fn every_known_text_has_its_class() {
        let acl = "Source IP address: 1.2.3.4 is blocked by Databricks IP ACL for workspace: 1";
        let generic = "This could be due to paused instances, disabling readable secondaries, IP ACLs or private link configuration.";
        for (code, message, detail, expected) in [
            (
                "28000",
                "External authorization failed.",
                Some(generic),
                Class::Waking,
            ),
            (
                "28000",
                "External authorization failed.",
                Some(acl),
                Class::Permission,
            ),
            (
                "57P03",
                "the database system is starting up",
                None,
                Class::Waking,
            ),
            ("57P03", "irgendetwas auf Deutsch", None, Class::Waking),
            (
                "XX000",
                "endpoint is idle, retry request",
                None,
                Class::Waking,
            ),
            (
                "XX000",
                "Couldn't connect to compute node",
                None,
                Class::Waking,
            ),
            (
                "XX000",
                "Control plane request failed: endpoint is disabled",
                None,
                Class::Permission,
            ),
            (
                "XX000",
                "Control plane request failed: endpoint is temporarily unavailable.",
                None,
                Class::Waking,
            ),
            (
                "28P01",
                "password authentication failed for user \"x\"",
                None,
                Class::Identity,
            ),
            (
                "XX000",
                "password authentication failed for user 'x'",
                None,
                Class::Identity,
            ),
            (
                "XX000",
                "JWT token has expired (exp=1)",
                None,
                Class::Identity,
            ),
            (
                "28000",
                "Invalid authorization for databricks identity login",
                None,
                Class::Identity,
            ),
            (
                "XX000",
                "Provided authentication token is not a valid JWT encoding",
                None,
                Class::WrongKind,
            ),
            (
                "28000",
                "role \"x\" does not exist",
                None,
                Class::Permission,
            ),
            (
                "3D000",
                "database \"x\" does not exist",
                None,
                Class::Permission,
            ),
            (
                "42501",
                "permission denied for database \"x\"",
                None,
                Class::Permission,
            ),
            (
                "53300",
                "sorry, too many clients already",
                None,
                Class::Capacity,
            ),
            (
                "XX000",
                "Too many connections to this endpoint. Please try again later.",
                None,
                Class::Capacity,
            ),
            (
                "08P01",
                "Invalid protocol version. Protocol version: 196608",
                None,
                Class::Protocol,
            ),
            (
                "08006",
                "Connection does not have SNI.",
                None,
                Class::Protocol,
            ),
            (
                "0A000",
                "Unsupported frontend protocol 3.2. Server supports 3.0 to 3.0",
                None,
                Class::Protocol,
            ),
            ("08006", "Client handshake timeout.", None, Class::Waking),
            ("58000", "something new", None, Class::Other),
        ] {
            assert_eq!(
                class(code, message, detail),
                expected,
                "{code} {message} {detail:?}"
            );
        }
    }

    #[test]
    fn the_catch_all_code_is_replaced_and_every_other_kept() {
        let endpoint = Label::new("projects/p/branches/b/endpoints/e");
        let error = |code: &str| ErrorFields {
            severity: "ERROR".to_owned(),
            code: code.to_owned(),
            message: "password authentication failed for user 'x'".to_owned(),
            ..ErrorFields::default()
        };
        let report = Failure::server(error("XX000"), []).report(&endpoint);
        assert_eq!(report.sqlstate, "28000");
        assert!(report.message.contains("projects/p/branches/b/endpoints/e"));
        assert!(
            report
                .detail
                .is_some_and(|detail| detail.contains("password authentication failed"))
        );
        assert!(report.hint.is_some());
        assert_eq!(
            Failure::server(error("28P01"), [])
                .report(&endpoint)
                .sqlstate,
            "28P01"
        );
    }

    #[test]
    fn an_untrusted_certificate_is_never_retried() {
        let inner = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let failure = Failure::tls(&io::Error::new(io::ErrorKind::InvalidData, inner));
        assert_eq!(failure.class, Class::Protocol);
        assert!(
            failure
                .hint()
                .is_some_and(|hint| hint.contains("PGSSLROOTCERT"))
        );
        let reset = Failure::tls(&io::ErrorKind::ConnectionReset.into());
        assert_eq!(reset.class, Class::Waking);
    }
}
