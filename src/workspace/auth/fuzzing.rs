//! Entry points for tests/fuzz: answers of token endpoints, and tokens.

use jiff::tz::{Offset, TimeZone};

use super::{oauth::TokenResponse, token::claim};
use crate::workspace::times;

/// A token is accepted with an expiry or refused; nothing panics.
pub(in crate::workspace) fn token_response(body: &[u8]) {
    if let Ok(response) = serde_json::from_slice::<TokenResponse>(body) {
        let _ = response.into_token();
    }
}

pub(in crate::workspace) fn times(text: &str) {
    let _ = times::from_text(text, &TimeZone::UTC);
    let _ = times::from_text(text, &TimeZone::fixed(Offset::constant(-11)));
}

pub(in crate::workspace) fn claims(token: &str) {
    let _ = claim(token, "scope");
}
