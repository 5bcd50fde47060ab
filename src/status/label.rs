//! The name of an endpoint in messages.

use std::{fmt, sync::Arc};

/// An endpoint's name in the settings; cheap to clone. Two endpoints may have the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label(Arc<str>);

impl Label {
    /// A label.
    pub fn new(name: &str) -> Self {
        Self(name.into())
    }

    /// The name without quotes.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.0)
    }
}
