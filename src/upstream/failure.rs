//! What went wrong at login, what that means, and what the client is told.
//!
//! The table of failure classes is in [`rules`]. An error that is not in it is not retried: the server's own words go
//! to the client.

mod rules;

use std::{borrow::Cow, fmt, io};

use super::{dropped, endpoint::Endpoint, phases::Phase};
use crate::{
    config::DEFAULT_DATABASE,
    credential::Credential,
    net::message::ReadError,
    protocol::{
        auth::AuthError,
        error::{ErrorFields, Report, sqlstate},
        frame::FrameError,
        options::{SessionSettings, TooLong},
    },
    status::Label,
    telemetry::{chain, redact},
};

pub use crate::telemetry::labels::FailureClass as Class;

impl Class {
    /// For servers that put everything under `XX000`.
    fn sqlstate(self) -> &'static str {
        match self {
            Self::Capacity => sqlstate::TOO_MANY_CONNECTIONS,
            Self::Identity | Self::Permission | Self::WrongIdentity | Self::WrongKind => {
                sqlstate::INVALID_AUTHORIZATION
            }
            Self::Other => INTERNAL_ERROR,
            Self::Protocol => sqlstate::PROTOCOL_VIOLATION,
            Self::Waking => sqlstate::CANNOT_CONNECT_NOW,
        }
    }

    fn hint(self) -> Option<&'static str> {
        match self {
            Self::Capacity => Some(
                "The endpoint has no connection left: use fewer or smaller pools, or raise the compute's size.",
            ),
            Self::Identity => Some(
                "Check that PGUSER is the identity the credential belongs to, and that the role was made with databricks_create_role on this branch.",
            ),
            Self::Other => None,
            Self::Permission => Some("Grant the role what it lacks, or correct the setting."),
            Self::Protocol => Some(
                "Check PGHOST and PGPORT, and PGSSLROOTCERT if something on the way terminates TLS.",
            ),
            Self::Waking => Some(
                "The endpoint did not answer in time. Retry; if it lasts, check that the compute is not disabled and that the network reaches it.",
            ),
            Self::WrongIdentity => Some(
                "The login is as `{user}` (PGUSER), and the credential belongs to `{identity}`. If these are two, unset PGUSER; if they are one, bind the role to it, as its owner: SECURITY LABEL FOR databricks_auth ON ROLE {role} IS 'id=<numeric id of the identity in the workspace>,type={kind}';",
            ),
            Self::WrongKind => Some(
                "The endpoint takes OAuth credentials only. A personal access token or a native password cannot log in here.",
            ),
        }
    }
}

const REFUSED: &str = "Nothing listens on the port there, or a firewall rejects the connection: check PGHOST, PGPORT and the firewall. An endpoint that wakes may refuse for a few seconds.";
const NO_ANSWER: &str = "Check PGHOST and PGPORT, and what stands between this machine and the port: a firewall that drops packets, a shared cluster below DBR 18, a private link that is not set up, or a name that leads elsewhere (PGHOSTADDR).";
/// Hints about a login, with names in place of what differs.
const ANOTHER_IDENTITY: &str = "The login is as `{user}` (PGUSER), but the credential belongs to `{identity}`: unset PGUSER or set it to `{identity}`, unless `{user}` is a group that it belongs to.";
const NO_EXTENSION: &str = "If logins work in other databases, run in `{database}`: CREATE EXTENSION IF NOT EXISTS databricks_auth; (a plain CREATE DATABASE leaves it out).";
const OTHER_DATABASE: &str = "The client asked for the database `{database}`: check the name in its connection string (in Postgres it has underscores where the resource id has hyphens), or create the database. The endpoint's default is `{default}`.";

/// The catch-all of the edge.
const INTERNAL_ERROR: &str = "XX000";

/// One attempt to log in that came to nothing.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What it means.
    pub class: Class,
    /// Whether the endpoint's name could not be resolved: waited for less long than a sleeping endpoint.
    pub is_dns: bool,
    /// Whether the client's own settings may have caused it: then it says nothing about the endpoint.
    pub is_inconclusive: bool,
    cause: Cause,
    hint: Option<Cow<'static, str>>,
    /// What the message says besides the cause.
    note: Option<String>,
}

#[derive(Clone, Debug)]
enum Cause {
    /// The server said so.
    Server(Box<ErrorFields>),
    /// No server spoke.
    Ours {
        sqlstate: &'static str,
        message: String,
    },
}

impl std::error::Error for Failure {}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Cause::Server(said) => {
                write!(f, "{} {}: {}", said.severity, said.code, said.message)?;
                said.detail
                    .as_ref()
                    .map_or(Ok(()), |detail| write!(f, " ({detail})"))
            }
            Cause::Ours { message, .. } => f.write_str(message),
        }
    }
}

impl Failure {
    /// A server's ErrorResponse. `client_texts` are the texts of the client that the server had received by then, which
    /// it may repeat.
    pub fn server<'a>(
        mut said: ErrorFields,
        client_texts: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        // Servers have been known to repeat the password in their refusal.
        let texts = [
            Some(&mut said.severity),
            Some(&mut said.code),
            Some(&mut said.message),
            said.detail.as_mut(),
            said.hint.as_mut(),
        ];
        for text in texts.into_iter().flatten() {
            if let Cow::Owned(clean) = redact(text) {
                *text = clean;
            }
        }
        let (class, hint) = rules::classify(&said, client_texts);
        Self {
            class,
            is_dns: false,
            is_inconclusive: false,
            cause: Cause::Server(Box::new(said)),
            hint: hint.map(Cow::Borrowed),
            note: None,
        }
    }

    /// The name could not be resolved.
    pub fn resolve(host: &str, error: &io::Error) -> Self {
        let mut failure = Self::ours(
            Class::Waking,
            sqlstate::CANNOT_CONNECT,
            format!("cannot resolve host name `{host}`: {}", chain(error)),
        );
        failure.is_dns = true;
        failure.hint = Some("Check PGHOST and the machine's name resolution.".into());
        failure
    }

    /// No address took the connection.
    pub fn dial(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::ConnectionRefused {
            let mut failure = Self::ours(
                Class::Waking,
                sqlstate::CANNOT_CONNECT,
                "cannot connect: connection refused".to_owned(),
            );
            failure.hint = Some(REFUSED.into());
            return failure;
        }
        let mut failure = Self::ours(
            Class::Waking,
            sqlstate::CANNOT_CONNECT,
            format!("cannot connect: {}", chain(error)),
        );
        failure.hint = Some(NO_ANSWER.into());
        failure
    }

    /// An established connection broke before login was complete.
    pub fn broken(error: &io::Error) -> Self {
        let message = match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                "the server closed the connection unexpectedly".to_owned()
            }
            _ => format!("the connection to the server broke: {}", chain(error)),
        };
        Self::ours(Class::Waking, sqlstate::CONNECTION_FAILURE, message)
    }

    /// An attempt took longer than it may.
    pub fn timed_out(phase: &str) -> Self {
        Self::ours(
            Class::Waking,
            sqlstate::CONNECTION_FAILURE,
            format!("the server did not answer in time ({phase})"),
        )
    }

    /// The server asked for the password, and did not finish the login in time. The endpoint may be waking behind its
    /// edge, but a client's own settings (`post_auth_delay`) can have the same effect.
    pub fn slow_login() -> Self {
        let mut failure = Self::timed_out("login, after the password was sent");
        failure.is_inconclusive = true;
        failure
    }

    /// An attempt took longer than it may, in this phase.
    pub fn timed_out_in(phase: Phase, endpoint: &Endpoint) -> Self {
        match phase {
            Phase::Resolve => Self::slow_resolver(&endpoint.host),
            Phase::Dial => Self::no_answer(&endpoint.host, endpoint.port),
            Phase::Tls => Self::no_tls_answer(&endpoint.host, endpoint.port),
            Phase::Login => Self::timed_out("login"),
        }
    }

    fn slow_resolver(host: &str) -> Self {
        let mut failure = Self::ours(
            Class::Waking,
            sqlstate::CANNOT_CONNECT,
            format!("the name server did not answer in time for `{host}`"),
        );
        failure.hint = Some("Check PGHOST and the machine's name resolution.".into());
        failure
    }

    fn no_answer(host: &str, port: u16) -> Self {
        let mut failure = Self::ours(
            Class::Waking,
            sqlstate::CANNOT_CONNECT,
            format!("no answer from `{host}` on port {port} (TCP connect)"),
        );
        failure.hint = Some(NO_ANSWER.into());
        failure
    }

    fn no_tls_answer(host: &str, port: u16) -> Self {
        let mut failure = Self::ours(
            Class::Waking,
            sqlstate::CONNECTION_FAILURE,
            format!("`{host}` takes connections on port {port}, but did not answer in time (TLS)"),
        );
        failure.hint = Some("Something takes connections and does not pass them on: check a private link, load balancer or firewall between this machine and the endpoint.".into());
        failure
    }

    /// Too many clients are being logged in for this one to have had its turn.
    pub fn crowded() -> Self {
        let mut failure = Self::ours(
            Class::Capacity,
            sqlstate::TOO_MANY_CONNECTIONS,
            "too many clients log in at the same time".to_owned(),
        );
        failure.hint = Some("Open fewer connections at a time, or keep them in a pool.".into());
        failure
    }

    /// The TLS handshake failed: the certificate, or the network under it.
    pub fn tls(error: &io::Error) -> Self {
        let tls = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let Some(tls) = tls else {
            return Self::broken(error);
        };
        let mut failure = Self::ours(
            Class::Protocol,
            sqlstate::CANNOT_CONNECT,
            format!("TLS failed: {tls}"),
        );
        if let rustls::Error::InvalidCertificate(_) = tls {
            failure.hint = Some(
                "The server's certificate is not trusted for this name. Behind a private CA set PGSSLROOTCERT; otherwise something between here and Lakebase intercepts TLS."
                    .into(),
            );
        }
        failure
    }

    /// The other side does not speak as a Postgres server does.
    pub fn protocol(message: impl Into<String>) -> Self {
        Self::ours(
            Class::Protocol,
            sqlstate::PROTOCOL_VIOLATION,
            message.into(),
        )
    }

    fn ours(class: Class, sqlstate: &'static str, message: String) -> Self {
        Self {
            class,
            is_dns: false,
            is_inconclusive: false,
            cause: Cause::Ours { sqlstate, message },
            hint: None,
            note: None,
        }
    }

    /// Which of a client's parameters the server refuses by name.
    pub(super) fn refused_parameter<'a>(
        &self,
        parameters: &'a [(String, String)],
    ) -> Option<&'a str> {
        match &self.cause {
            Cause::Server(error) => dropped::refused(error, parameters),
            Cause::Ours { .. } => None,
        }
    }

    /// Adds to a refusal by the server what is known of the login: who it was as, where, and for which database.
    pub(super) fn explain(
        mut self,
        endpoint: &Endpoint,
        credential: &Credential,
        settings: &SessionSettings,
    ) -> Self {
        let Cause::Server(_) = &self.cause else {
            return self;
        };
        let user = &endpoint.user;
        let identity = credential.identity();
        let is_another = identity
            .as_ref()
            .is_some_and(|identity| !identity.eq_ignore_ascii_case(user));
        let is_role_missing = self.hint.as_deref() == Some(rules::MISSING_ROLE);
        let mut hint = self.hint().unwrap_or_default().to_owned();
        if is_another && (self.class == Class::Identity || is_role_missing) {
            ANOTHER_IDENTITY.clone_into(&mut hint);
        }
        if self.class == Class::Identity
            && identity.is_some()
            && settings.database != DEFAULT_DATABASE
        {
            hint.push(' ');
            hint.push_str(NO_EXTENSION);
        }
        if self.is_missing_database() && settings.database != endpoint.database {
            OTHER_DATABASE.clone_into(&mut hint);
        }
        let is_refused = matches!(
            self.class,
            Class::Identity | Class::WrongIdentity | Class::WrongKind
        );
        let is_token = identity.is_some() || credential.expires_at.is_some();
        if let Some(direct) = endpoint.direct_host().filter(|_| is_token)
            && (is_refused || self.hint.as_deref() == Some(rules::POOLER))
        {
            rules::POOLER.clone_into(&mut hint);
            self.note = Some(format!(
                "the pooler `{}` refused it, the direct host is `{direct}`",
                endpoint.host
            ));
        }
        if !hint.is_empty() {
            let direct = endpoint.direct_host().map_or_else(
                || "the same name without `-pooler`".to_owned(),
                |host| format!("`{host}`"),
            );
            let role = format!("\"{}\"", user.replace('"', "\"\""));
            let kind = if user.contains('@') {
                "USER"
            } else {
                "SERVICE_PRINCIPAL"
            };
            let known = [
                (
                    "{identity}",
                    identity
                        .as_deref()
                        .unwrap_or("an identity that it does not name"),
                ),
                ("{user}", user),
                ("{role}", &role),
                ("{kind}", kind),
                ("{database}", &settings.database),
                ("{default}", &endpoint.database),
                ("{direct}", &direct),
            ];
            self.hint = Some(fill(&hint, &known).into());
        }
        self
    }

    /// Whether the server found that the database does not exist.
    pub fn is_missing_database(&self) -> bool {
        matches!(&self.cause, Cause::Server(said) if said.code == sqlstate::UNDEFINED_DATABASE)
    }

    /// What a person can do about it.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref().or_else(|| self.class.hint())
    }

    /// What the client is told.
    pub fn report(&self, endpoint: &Label) -> Report {
        let mut report = match &self.cause {
            Cause::Server(said) => {
                let sqlstate = match said.code.as_str() {
                    "" | INTERNAL_ERROR => self.class.sqlstate(),
                    code => code,
                };
                let detail = format!("The server said: {self}");
                let note = match &self.note {
                    Some(note) => format!(" ({note})"),
                    None => String::new(),
                };
                Report::new(
                    sqlstate,
                    format!(
                        "cannot log in to Lakebase endpoint {endpoint}: {}{note}",
                        said.message
                    ),
                )
                .with_detail(detail)
            }
            Cause::Ours { sqlstate, message } => Report::new(
                sqlstate,
                format!("cannot reach Lakebase endpoint {endpoint}: {message}"),
            ),
        };
        let said_hint = match &self.cause {
            Cause::Server(said) => said.hint.clone(),
            Cause::Ours { .. } => None,
        };
        report.hint = self.hint().map(str::to_owned).or(said_hint);
        report
    }
}

/// Puts what is known in place of its names, in one pass: a value may look like the name of another.
fn fill(template: &str, known: &[(&str, &str)]) -> String {
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        filled.push_str(before);
        match known.iter().find(|(name, _)| from.starts_with(name)) {
            Some((name, value)) => {
                filled.push_str(value);
                rest = &from[name.len()..];
            }
            None => {
                filled.push('{');
                rest = &from[1..];
            }
        }
    }
    filled + rest
}

impl From<TooLong> for Failure {
    fn from(error: TooLong) -> Self {
        let mut failure = Self::ours(
            Class::Protocol,
            sqlstate::PROTOCOL_VIOLATION,
            error.to_string(),
        );
        failure.hint = Some(
            "Send fewer or shorter startup parameters, or set them once for the role: ALTER ROLE ... SET."
                .into(),
        );
        failure
    }
}

impl From<FrameError> for Failure {
    fn from(error: FrameError) -> Self {
        Self::protocol(format!("the server does not speak Postgres: {error}"))
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

impl From<AuthError> for Failure {
    fn from(error: AuthError) -> Self {
        match error {
            // The server proved not to know the password, or refused ours in the middle.
            AuthError::Scram(_) => Self::ours(
                Class::Identity,
                sqlstate::INVALID_AUTHORIZATION,
                chain(&error).to_string(),
            ),
            AuthError::OutOfOrder | AuthError::TooCostly(_) | AuthError::Unsupported(_) => {
                Self::protocol(error.to_string())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(code: &str, message: &str, detail: Option<&str>) -> Class {
        let said = ErrorFields {
            severity: "FATAL".to_owned(),
            code: code.to_owned(),
            message: message.to_owned(),
            detail: detail.map(str::to_owned),
            hint: None,
        };
        Failure::server(said, []).class
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
        let said = |code: &str| ErrorFields {
            severity: "ERROR".to_owned(),
            code: code.to_owned(),
            message: "password authentication failed for user 'x'".to_owned(),
            ..ErrorFields::default()
        };
        let report = Failure::server(said("XX000"), []).report(&endpoint);
        assert_eq!(report.sqlstate, "28000");
        assert!(report.message.contains("projects/p/branches/b/endpoints/e"));
        assert!(
            report
                .detail
                .is_some_and(|detail| detail.contains("password authentication failed"))
        );
        assert!(report.hint.is_some());
        assert_eq!(
            Failure::server(said("28P01"), [])
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
