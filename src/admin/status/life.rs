//! The life of a credential, as the page shows it.

use jiff::Timestamp;

use super::{
    view::{Figure, Mood},
    words::{ago, between, clock, span},
};
use crate::{
    credential::{CredentialState, CredentialStatus},
    overview::Place,
};

/// A credential as it is now.
pub(super) struct CredentialView {
    pub(super) mood: Mood,
    pub(super) state: &'static str,
    pub(super) source: String,
    pub(super) left: String,
    pub(super) bar: Option<Bar>,
    pub(super) moments: Vec<Figure>,
    pub(super) trouble: Option<Trouble>,
}

/// Why the last attempt failed.
pub(super) struct Trouble {
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

/// The life of a credential from left to right, in per cent of its length.
#[derive(Debug, PartialEq)]
pub(super) struct Bar {
    pub(super) due: f64,
    pub(super) due_width: f64,
    pub(super) urgent: f64,
    pub(super) urgent_width: f64,
    pub(super) now: f64,
    pub(super) words: String,
}

impl CredentialView {
    pub(super) fn new(place: &Place, now: Timestamp) -> Self {
        let status = place.credentials.status();
        let (mood, state) = match status.state {
            CredentialState::None => (Mood::Bad, "missing"),
            CredentialState::Fresh => (Mood::Good, "fresh"),
            CredentialState::Due => (Mood::Good, "due for a refresh"),
            CredentialState::Urgent => (Mood::Warn, "about to expire"),
            CredentialState::Expired => (Mood::Bad, "expired"),
        };
        let mood = if status.last_error.is_some() && mood == Mood::Good {
            Mood::Warn
        } else {
            mood
        };
        let left = match (status.state, status.expires_at) {
            (CredentialState::None, _) => String::new(),
            (CredentialState::Expired, Some(at)) => format!("expired {}", ago(at, now)),
            (_, Some(at)) => format!("{} left", span(between(now, at))),
            (_, None) => "never expires".to_owned(),
        };
        let moments = [
            ("Minted", status.minted_at),
            ("Refresh due", status.due_at()),
            ("Urgent from", status.urgent_at()),
            ("Expires", status.expires_at),
            (
                "Next attempt",
                status.next_attempt.filter(|_| status.last_error.is_some()),
            ),
        ];
        Self {
            mood,
            state,
            source: format!("from the {}", place.source),
            left,
            bar: Bar::new(&status, now),
            moments: moments
                .into_iter()
                .filter_map(|(name, at)| Some(Figure::new(name, clock(at?, now))))
                .collect(),
            trouble: status.last_error.map(|error| Trouble {
                message: match &error.detail {
                    Some(detail) => format!("{} ({detail})", error.message),
                    None => error.message.clone(),
                },
                hint: error.hint.clone(),
            }),
        }
    }
}

impl Bar {
    fn new(status: &CredentialStatus, now: Timestamp) -> Option<Self> {
        let (minted, expires) = (status.minted_at?, status.expires_at?);
        let (due, urgent) = (status.due_at()?, status.urgent_at()?);
        let whole = between(minted, expires).as_secs_f64();
        if whole <= 0.0 {
            return None;
        }
        // A tenth of a per cent is less than a pixel of most screens.
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
            words: format!(
                "{now_at:.0} % of the credential's life is over; it is due for a refresh at {due:.0} %, urgent at {urgent:.0} %"
            ),
        })
    }
}
