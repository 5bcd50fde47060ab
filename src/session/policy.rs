//! What a session goes by. It reads this once, when it begins: a reload is for those who come after.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;

use super::Entrance;
use crate::{config::DatabaseMapping, upstream::Terms};

/// The settings that sessions know.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Who is let in, and how.
    pub entrance: Arc<Entrance>,
    /// What the database names that clients send mean.
    pub database_mapping: DatabaseMapping,
    /// How long a client may take to say what it wants.
    pub client_login_timeout: Duration,
    /// Sessions at a time.
    pub max_connections: usize,
    /// How the endpoint is dealt with.
    pub terms: Terms,
}

/// The policy in force, shared by all endpoints; cheap to clone.
#[derive(Clone, Debug)]
pub struct Policies(Arc<ArcSwap<Policy>>);

impl Policies {
    /// This policy, until another is [set](Self::set).
    pub fn new(policy: Policy) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(policy)))
    }

    /// The one in force; takes no lock.
    pub fn now(&self) -> Arc<Policy> {
        self.0.load_full()
    }

    /// Puts another in force.
    pub fn set(&self, policy: Policy) {
        self.0.store(Arc::new(policy));
    }
}
