//! What a client needs of a server connection.

use std::sync::Arc;

use super::settings::Settings;
use crate::{
    protocol::options::LoginParameters,
    upstream::{ConnectSettings, Upstream},
};

/// What a client needs.
pub(crate) struct LeaseRequest<'a> {
    /// Opens connections.
    pub(super) upstream: &'a Arc<Upstream>,
    /// What its connection must be like.
    pub(super) wanted: Wanted,
    /// Timeouts of opening one.
    pub(super) connect: &'a ConnectSettings,
}

impl<'a> LeaseRequest<'a> {
    pub(crate) fn new(
        upstream: &'a Arc<Upstream>,
        mut login: LoginParameters,
        connect: &'a ConnectSettings,
    ) -> Self {
        upstream.settle_database(&mut login);
        Self {
            upstream,
            wanted: Wanted::from(Arc::new(login)),
            connect,
        }
    }
}

/// What a client expects of a server connection.
#[derive(Clone)]
pub(super) struct Wanted {
    /// The login that it would have made.
    pub(super) login: Arc<LoginParameters>,
    /// What it has set since.
    pub(super) settings: Settings,
    /// Its number, if it has had one.
    pub(super) client: Option<u64>,
    /// The same, if it keeps one between two transactions.
    pub(super) owner: Option<u64>,
    /// The connection that knows its statements by its own names.
    pub(super) exclusive: Option<u64>,
}

impl From<Arc<LoginParameters>> for Wanted {
    fn from(login: Arc<LoginParameters>) -> Self {
        Self {
            login,
            settings: Settings::default(),
            client: None,
            owner: None,
            exclusive: None,
        }
    }
}
