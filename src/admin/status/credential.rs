//! The lifetime of a credential on the page.

use jiff::Timestamp;

use super::format::{Figure, Severity, ago, between, clock, span};
use crate::status::{CredentialSnapshot, CredentialState, RefreshError};

/// A credential.
pub(super) struct CredentialView<'a> {
    pub(super) severity: Severity,
    pub(super) state: &'static str,
    pub(super) source: String,
    pub(super) left: String,
    pub(super) bar: Option<Bar>,
    pub(super) moments: Vec<Figure>,
    pub(super) error: Option<&'a RefreshError>,
}

/// The lifetime of a credential from left to right, in percent.
#[derive(Debug, PartialEq)]
pub(super) struct Bar {
    pub(super) due: f64,
    pub(super) due_width: f64,
    pub(super) urgent: f64,
    pub(super) urgent_width: f64,
    pub(super) now: f64,
    pub(super) label: String,
}

impl<'a> CredentialView<'a> {
    pub(super) fn new(status: &'a CredentialSnapshot, now: Timestamp) -> Self {
        let (severity, state) = match status.state {
            CredentialState::None => (Severity::Bad, "missing"),
            CredentialState::Fresh => (Severity::Good, "fresh"),
            CredentialState::Due => (Severity::Good, "due for a refresh"),
            CredentialState::Urgent => (Severity::Warn, "about to expire"),
            CredentialState::Expired => (Severity::Bad, "expired"),
        };
        // The credential still works, but its refresh fails.
        let severity = if status.last_error.is_some() && severity == Severity::Good {
            Severity::Warn
        } else {
            severity
        };
        let left = match (status.state, status.expires_at) {
            (CredentialState::None, _) => String::new(),
            (CredentialState::Expired, Some(at)) => format!("expired {}", ago(at, now)),
            (_, Some(at)) => format!("{} left", span(between(now, at))),
            (_, None) => "never expires".to_owned(),
        };
        let moments = [
            ("Minted", status.minted_at),
            ("Refresh due", status.due_at),
            ("Urgent from", status.urgent_at),
            ("Expires", status.expires_at),
            (
                "Next attempt",
                // Without an error it is the time of "Refresh due".
                status.next_attempt.filter(|_| status.last_error.is_some()),
            ),
        ];
        Self {
            severity,
            state,
            source: format!("from the {}", status.source),
            left,
            bar: Bar::new(status, now),
            moments: moments
                .into_iter()
                .filter_map(|(name, at)| Some(Figure::new(name, clock(at?, now))))
                .collect(),
            error: status.last_error.as_ref(),
        }
    }
}

impl Bar {
    fn new(status: &CredentialSnapshot, now: Timestamp) -> Option<Self> {
        let (minted, expires) = (status.minted_at?, status.expires_at?);
        let (due, urgent) = (status.due_at?, status.urgent_at?);
        let whole = between(minted, expires).as_secs_f64();
        if whole <= 0.0 {
            return None;
        }
        // A tenth of a percent is less than a pixel of most screens.
        let share = |at| {
            (between(minted, at).as_secs_f64() / whole * 1000.0)
                .round()
                .clamp(0.0, 1000.0)
                / 10.0
        };
        let (due, urgent, now_at) = (share(due), share(urgent), share(now));
        let round = |value: f64| (value * 10.0).round() / 10.0;
        Some(Self {
            due,
            due_width: round((urgent - due).max(0.0)),
            urgent,
            urgent_width: round(100.0 - urgent),
            now: now_at,
            label: format!(
                "{now_at:.0} % of the credential's lifetime has passed; a refresh is due at {due:.0} %, urgent at {urgent:.0} %"
            ),
        })
    }
}
