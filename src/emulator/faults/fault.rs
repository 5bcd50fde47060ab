//! One fault: where it strikes, what it does there, and for whom; refused where it cannot happen.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::emulator::edge::ServerError;

/// Where a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Site {
    /// The OIDC discovery document.
    Discovery,
    /// `POST /oidc/v1/token`.
    Token,
    /// `POST /api/2.0/postgres/credentials` and its Provisioned twin.
    Mint,
    /// Projects, branches, endpoints, instances, roles, databases, apps.
    Lookup,
    /// SCIM `Me`.
    Whoami,
    /// GitHub, Entra ID, the instance metadata service and the local metadata service.
    Voucher,
    /// The edge, after it accepted a connection.
    Accept,
    /// The edge, after `SSLRequest` and before its answer.
    SslRequest,
    /// The edge, after the TLS handshake and before the `StartupMessage`.
    Tls,
    /// The edge, after the `StartupMessage`.
    Startup,
    /// The edge, after the password.
    Password,
    /// A session that is logged in; see [`Fault::after_bytes`].
    Session,
    /// The edge, after a `CancelRequest` and before the signal is sent.
    Cancel,
}

/// What HTTP requests can meet.
const HTTP: &[&str] = &[
    "respond",
    "merge",
    "quote_numbers",
    "delay",
    "stall",
    "close",
    "reset",
    "blackhole",
];
/// What a connection to the edge can meet at any point.
const EDGE: &[&str] = &[
    "error",
    "answer",
    "delay",
    "stall",
    "close",
    "reset",
    "blackhole",
];
/// What it can meet before TLS only.
const SSL_REQUEST: &[&str] = &[
    "no_tls",
    "certificate",
    "error",
    "answer",
    "delay",
    "stall",
    "close",
    "reset",
    "blackhole",
];

/// What a `CancelRequest` can meet.
const CANCEL: &[&str] = &[
    "defer",
    "error",
    "answer",
    "delay",
    "stall",
    "close",
    "reset",
    "blackhole",
];

impl Site {
    /// Every site, the workspace's before the edge's.
    pub const ALL: [Self; 13] = [
        Self::Discovery,
        Self::Token,
        Self::Mint,
        Self::Lookup,
        Self::Whoami,
        Self::Voucher,
        Self::Accept,
        Self::SslRequest,
        Self::Tls,
        Self::Startup,
        Self::Password,
        Self::Session,
        Self::Cancel,
    ];

    /// Its name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Discovery => "discovery",
            Self::Token => "token",
            Self::Mint => "mint",
            Self::Lookup => "lookup",
            Self::Whoami => "whoami",
            Self::Voucher => "voucher",
            Self::Accept => "accept",
            Self::SslRequest => "ssl_request",
            Self::Tls => "tls",
            Self::Startup => "startup",
            Self::Password => "password",
            Self::Session => "session",
            Self::Cancel => "cancel",
        }
    }

    /// The actions that are possible here, by their names in JSON.
    pub fn actions(self) -> &'static [&'static str] {
        match self {
            Self::Discovery
            | Self::Token
            | Self::Mint
            | Self::Lookup
            | Self::Whoami
            | Self::Voucher => HTTP,
            Self::SslRequest => SSL_REQUEST,
            Self::Cancel => CANCEL,
            Self::Accept | Self::Tls | Self::Startup | Self::Password | Self::Session => EDGE,
        }
    }

    /// The conditions that can be judged here, by their names in JSON.
    pub fn conditions(self) -> &'static [&'static str] {
        match self {
            Self::Startup => &["user", "database"],
            Self::Password | Self::Session => &[
                "user",
                "database",
                "credential_younger_than",
                "credential_older_than",
            ],
            _ => &[],
        }
    }
}

/// What happens there.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Action {
    /// HTTP: this answer instead of the real one.
    Respond(Response),
    /// HTTP: the real answer, changed by this JSON merge patch (RFC 7396).
    Merge(Value),
    /// HTTP: the real answer, with every number as a string.
    QuoteNumbers,
    /// Wait this many milliseconds, then go on to the next fault for the site, or to the real answer.
    Delay(u64),
    /// Edge, at [`Site::Cancel`]: close at once, and send the signal this many milliseconds later.
    Defer(u64),
    /// Never answer; the connection ends when the client leaves or the fault is cleared.
    Stall,
    /// Close (FIN) without an answer.
    Close,
    /// Close with a reset (RST).
    Reset,
    /// Neither read nor write nor close, and acknowledge no packet (Linux), as a lost network path; a reset when the fault
    /// is cleared.
    Blackhole,
    /// Edge: this `ErrorResponse`, then close.
    Error(ServerError),
    /// Edge: these bytes, which need not be Postgres, then close.
    Answer(String),
    /// Edge, at [`Site::SslRequest`]: refuse TLS with `N`.
    NoTls,
    /// Edge, at [`Site::SslRequest`]: go on with a certificate that must not be trusted.
    Certificate(BadCertificate),
}

impl Action {
    /// Its name in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Respond(_) => "respond",
            Self::Merge(_) => "merge",
            Self::QuoteNumbers => "quote_numbers",
            Self::Delay(_) => "delay",
            Self::Defer(_) => "defer",
            Self::Stall => "stall",
            Self::Close => "close",
            Self::Reset => "reset",
            Self::Blackhole => "blackhole",
            Self::Error(_) => "error",
            Self::Answer(_) => "answer",
            Self::NoTls => "no_tls",
            Self::Certificate(_) => "certificate",
        }
    }
}

/// An HTTP answer.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Body; absent means the API's usual error shape for the status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Content type of `body`.
    #[serde(default = "json_type")]
    pub content_type: String,
    /// The `Retry-After` header, as sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<String>,
}

impl Response {
    /// The API's own error shape with this status.
    pub fn status(status: u16) -> Self {
        Self {
            status,
            body: None,
            content_type: json_type(),
            retry_after: None,
        }
    }

    /// This body with this status.
    pub fn body(status: u16, body: impl Into<String>) -> Self {
        Self {
            body: Some(body.into()),
            ..Self::status(status)
        }
    }

    /// The API's error shape with this status, code and message.
    pub fn error(status: u16, code: &str, message: &str) -> Self {
        let body = serde_json::json!({ "error_code": code, "message": message });
        Self::body(status, body.to_string())
    }

    /// With a `Retry-After` header.
    #[must_use]
    pub fn retry_after(self, value: impl Into<String>) -> Self {
        Self {
            retry_after: Some(value.into()),
            ..self
        }
    }

    fn check(&self) -> Result<(), FaultError> {
        use axum::http::HeaderValue;

        let is_header = |text: &str| HeaderValue::try_from(text).is_ok();
        if !(200..=599).contains(&self.status) {
            return Err(FaultError::Status(self.status));
        }
        if !is_header(&self.content_type) {
            return Err(FaultError::Header("content_type"));
        }
        if !self.retry_after.as_deref().is_none_or(is_header) {
            return Err(FaultError::Header("retry_after"));
        }
        Ok(())
    }
}

fn json_type() -> String {
    "application/json".to_owned()
}

/// What is wrong with a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BadCertificate {
    /// It ended years ago.
    Expired,
    /// It names the endpoint, but its authority is not trusted.
    OtherAuthority,
    /// It is for another host.
    WrongName,
}

/// One scripted fault.
///
/// ```
/// use lakebase_proxy::emulator::{Action, Fault, Site};
///
/// let fault = Fault::new(Site::Session, Action::Reset).times(2).after_bytes(100_000);
/// assert!(fault.check().is_ok());
/// let error = Fault::new(Site::Mint, Action::NoTls).check().unwrap_err();
/// assert!(error.to_string().starts_with("`no_tls` cannot happen at `mint`"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Fault {
    /// Where.
    pub at: Site,
    /// What.
    #[serde(rename = "do")]
    pub action: Action,
    /// How often; absent means until cleared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<u32>,
    /// For [`Site::Session`]: strike once this many bytes went to the client after login.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub after_bytes: u64,
    /// Only logins of this user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Only logins to this database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// Only credentials issued less than this many seconds ago.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential_younger_than: Option<u32>,
    /// Only credentials issued at least this many seconds ago.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credential_older_than: Option<u32>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature required by serde"
)]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

impl Fault {
    /// `action` at `at`, for everyone, until cleared.
    pub fn new(at: Site, action: Action) -> Self {
        Self {
            at,
            action,
            times: None,
            after_bytes: 0,
            user: None,
            database: None,
            credential_younger_than: None,
            credential_older_than: None,
        }
    }

    /// Strikes `count` times.
    #[must_use]
    pub fn times(mut self, count: u32) -> Self {
        self.times = Some(count);
        self
    }

    /// See [`Fault::after_bytes`].
    #[must_use]
    pub fn after_bytes(mut self, count: u64) -> Self {
        self.after_bytes = count;
        self
    }

    /// Strikes logins of this user only.
    #[must_use]
    pub fn user(mut self, user: impl Into<String>) -> Self {
        self.user = Some(user.into());
        self
    }

    /// Strikes logins to this database only.
    #[must_use]
    pub fn database(mut self, database: impl Into<String>) -> Self {
        self.database = Some(database.into());
        self
    }

    /// Strikes credentials issued less than `seconds` ago only.
    #[must_use]
    pub fn credential_younger_than(mut self, seconds: u32) -> Self {
        self.credential_younger_than = Some(seconds);
        self
    }

    /// Strikes credentials issued at least `seconds` ago only.
    #[must_use]
    pub fn credential_older_than(mut self, seconds: u32) -> Self {
        self.credential_older_than = Some(seconds);
        self
    }

    /// Whether it can happen; the error names what can.
    pub fn check(&self) -> Result<(), FaultError> {
        let (site, action) = (self.at, self.action.name());
        if !site.actions().contains(&action) {
            return Err(FaultError::Action { site, action });
        }
        let given = [
            ("user", self.user.is_some()),
            ("database", self.database.is_some()),
            (
                "credential_younger_than",
                self.credential_younger_than.is_some(),
            ),
            (
                "credential_older_than",
                self.credential_older_than.is_some(),
            ),
        ];
        for (condition, is_given) in given {
            if is_given && !site.conditions().contains(&condition) {
                return Err(FaultError::Condition { site, condition });
            }
        }
        if self.after_bytes > 0 && (site != Site::Session || action == "delay") {
            return Err(FaultError::AfterBytes { site, action });
        }
        if self.times == Some(0) {
            return Err(FaultError::Never);
        }
        match &self.action {
            Action::Respond(response) => response.check(),
            Action::Merge(Value::Object(_)) => Ok(()),
            Action::Merge(_) => Err(FaultError::Merge),
            _ => Ok(()),
        }
    }

    /// Whether its conditions hold for this login.
    pub(super) fn applies_to(&self, login: &Login<'_>) -> bool {
        let is = |wanted: &Option<String>, given: Option<&str>| {
            wanted.is_none() || wanted.as_deref() == given
        };
        let age = login.credential_age;
        is(&self.user, login.user)
            && is(&self.database, login.database)
            && self
                .credential_younger_than
                .is_none_or(|limit| age.is_some_and(|age| age < i64::from(limit)))
            && self
                .credential_older_than
                .is_none_or(|limit| age.is_some_and(|age| age >= i64::from(limit)))
    }
}

/// What is known of a login when a fault may strike it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Login<'a> {
    pub(crate) user: Option<&'a str>,
    pub(crate) database: Option<&'a str>,
    /// Seconds since the credential was issued; `None` if there is none, or none of ours.
    pub(crate) credential_age: Option<i64>,
}

/// Why a fault is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// The site knows no such action.
    #[error("`{action}` cannot happen at `{}`; possible there: {}", site.name(), site.actions().join(", "))]
    Action {
        /// Where.
        site: Site,
        /// What.
        action: &'static str,
    },
    /// Bytes are counted in sessions only.
    #[error(
        "`after_bytes` cannot go with `{action}` at `{}`; it is possible at `session`, with anything but `delay`",
        site.name()
    )]
    AfterBytes {
        /// Where.
        site: Site,
        /// What.
        action: &'static str,
    },
    /// Unknown at the site.
    #[error("`{condition}` is not known at `{}`; possible there: {}", site.name(), listed(site.conditions()))]
    Condition {
        /// Where.
        site: Site,
        /// Which condition.
        condition: &'static str,
    },
    /// A header that cannot be sent.
    #[error("`{0}` is not a header value")]
    Header(&'static str),
    /// A merge patch that is not an object would replace the whole answer.
    #[error("`merge` wants a JSON object; `respond` replaces the whole answer")]
    Merge,
    /// A fault without an effect.
    #[error("`times` must be at least 1; without it the fault strikes until it is cleared")]
    Never,
    /// A status that HTTP does not have.
    #[error("`status` {0} is not a final HTTP status (200 to 599)")]
    Status(u16),
    /// The list is full.
    #[error("at most {} faults can wait at a time", super::MAX_FAULTS)]
    TooMany,
}

fn listed(names: &[&str]) -> String {
    if names.is_empty() {
        "no conditions".to_owned()
    } else {
        names.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Fault, serde_json::Error> {
        serde_json::from_str(text)
    }

    /// One of each, so that the table of actions is tried whole.
    fn actions() -> Vec<Action> {
        [
            r#"{"respond":{"status":503}}"#,
            r#"{"merge":{"a":null}}"#,
            r#""quote_numbers""#,
            r#"{"delay":1}"#,
            r#"{"defer":1}"#,
            r#""stall""#,
            r#""close""#,
            r#""reset""#,
            r#""blackhole""#,
            r#"{"error":{"severity":"FATAL","code":"53300","message":"full"}}"#,
            r#"{"answer":"HTTP/1.1 400"}"#,
            r#""no_tls""#,
            r#"{"certificate":"expired"}"#,
        ]
        .into_iter()
        .map(|text| serde_json::from_str(text).unwrap())
        .collect()
    }

    #[test]
    fn the_json_people_write_is_understood() {
        let fault =
            parse(r#"{"at":"mint","do":{"respond":{"status":429,"retry_after":"2"}},"times":3}"#)
                .unwrap();
        assert_eq!(
            fault.action,
            Action::Respond(Response::status(429).retry_after("2"))
        );
        let fault = parse(r#"{"at":"ssl_request","do":{"certificate":"wrong_name"}}"#).unwrap();
        assert_eq!(fault.action, Action::Certificate(BadCertificate::WrongName));
        let fault = parse(
            r#"{"at":"password","do":{"error":{"severity":"FATAL","code":"53300","message":"sorry, too many clients already"}}}"#,
        )
        .unwrap();
        assert!(matches!(fault.action, Action::Error(error) if error.code == "53300"));
        assert_eq!(
            parse(r#"{"at":"accept","do":"reset"}"#).unwrap().action,
            Action::Reset
        );
    }

    /// `"time": 1` was taken for a fault without a count, which strikes for ever.
    #[test]
    fn misspelt_fields_are_refused_and_the_right_ones_named() {
        for (text, wrong, right) in [
            (r#"{"at":"mint","do":"close","time":1}"#, "time", "times"),
            (
                r#"{"at":"mint","do":{"respond":{"status":429,"retry-after":"2"}}}"#,
                "retry-after",
                "retry_after",
            ),
            (
                r#"{"at":"password","do":{"error":{"severity":"FATAL","sqlstate":"53300","message":"x"}}}"#,
                "sqlstate",
                "code",
            ),
            (r#"{"at":"login","do":"close"}"#, "login", "startup"),
            (r#"{"at":"mint","do":"drop"}"#, "drop", "blackhole"),
            (
                r#"{"at":"ssl_request","do":{"certificate":"old"}}"#,
                "old",
                "expired",
            ),
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(
                error.contains(&format!("`{wrong}`")) && error.contains(&format!("`{right}`")),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn names_are_those_of_the_json() {
        for site in Site::ALL {
            assert_eq!(serde_json::to_value(site).unwrap(), site.name());
        }
        for action in actions() {
            let json = serde_json::to_value(&action).unwrap();
            let name = match &json {
                Value::Object(object) => object.keys().next().unwrap(),
                Value::String(name) => name,
                _ => panic!("{json}"),
            };
            assert_eq!(name, action.name());
        }
    }

    #[test]
    fn each_site_takes_what_can_happen_there_and_nothing_else() {
        for site in Site::ALL {
            for action in actions() {
                let checked = Fault::new(site, action.clone()).check();
                if site.actions().contains(&action.name()) {
                    assert_eq!(checked, Ok(()));
                    continue;
                }
                let error = checked.unwrap_err().to_string();
                let expected = format!(
                    "`{}` cannot happen at `{}`; possible there: {}",
                    action.name(),
                    site.name(),
                    site.actions().join(", ")
                );
                assert_eq!(error, expected);
            }
        }
    }

    #[test]
    fn conditions_are_refused_where_they_cannot_be_judged() {
        let close = |site| Fault::new(site, Action::Close);
        for fault in [
            close(Site::Startup).user("ada").database("d"),
            close(Site::Password).credential_younger_than(30),
            close(Site::Session)
                .credential_older_than(30)
                .after_bytes(1),
        ] {
            assert_eq!(fault.check(), Ok(()));
        }
        for (fault, words) in [
            (close(Site::Accept).user("ada"), "no conditions"),
            (close(Site::Mint).database("d"), "no conditions"),
            (
                close(Site::Startup).credential_younger_than(1),
                "user, database",
            ),
            (close(Site::Password).after_bytes(1), "`session`"),
            (
                Fault::new(Site::Session, Action::Delay(1)).after_bytes(1),
                "`session`",
            ),
            (close(Site::Mint).times(0), "at least 1"),
            (
                Fault::new(Site::Mint, Action::Respond(Response::status(42))),
                "200 to 599",
            ),
            (
                Fault::new(
                    Site::Mint,
                    Action::Respond(Response::status(429).retry_after("1\r\nx: y")),
                ),
                "retry_after",
            ),
            (
                Fault::new(Site::Mint, Action::Merge(Value::Null)),
                "`respond`",
            ),
        ] {
            let error = fault.check().expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn conditions_choose_the_login() {
        let fault = Fault::new(Site::Password, Action::Close)
            .user("ada")
            .database("d")
            .credential_younger_than(30);
        let login = Login {
            user: Some("ada"),
            database: Some("d"),
            credential_age: Some(29),
        };
        assert!(fault.applies_to(&login));
        for other in [
            Login {
                user: Some("bob"),
                ..login
            },
            Login {
                database: None,
                ..login
            },
            Login {
                credential_age: Some(30),
                ..login
            },
            Login {
                credential_age: None,
                ..login
            },
        ] {
            assert!(!fault.applies_to(&other), "{other:?}");
        }
    }

    proptest::proptest! {
        /// Only its kind decides whether a fault can happen, and what can is written as it is read.
        #[test]
        fn faults_are_read_back(site in 0..Site::ALL.len(), action in 0..13_usize, times: Option<u32>, user: Option<String>, age: Option<u32>) {
            let fault = Fault {
                times,
                user,
                credential_older_than: age,
                ..Fault::new(Site::ALL[site], actions()[action].clone())
            };
            let text = serde_json::to_string(&fault).unwrap();
            proptest::prop_assert_eq!(parse(&text).unwrap(), fault.clone());
            let _ = fault.check();
        }

        #[test]
        fn no_json_makes_it_panic(text in "[{}\":,a-z_0-9\\[\\]]{0,40}") {
            if let Ok(fault) = parse(&text) {
                let _ = fault.check();
            }
        }
    }
}
