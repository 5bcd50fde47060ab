//! The endpoints that the edge serves: each a host, a compute with its sessions, and the Postgres of its branch.

use std::sync::{Arc, PoisonError, RwLock};

use super::{
    certificates::Certificates,
    compute::{Common, Compute},
    postgres::Database,
    sessions::{BackendKey, CancelKey, Disruption, Sessions},
    shared::Names,
};

/// What a client reaches on one host.
pub(crate) struct Endpoint {
    /// Its resource name.
    pub(crate) name: String,
    /// The TLS server names that mean it.
    pub(crate) hosts: Vec<String>,
    pub(crate) certificates: Certificates,
    pub(crate) compute: Compute,
    pub(crate) sessions: Sessions,
    pub(crate) database: Database,
    /// Whether its sessions may only read.
    pub(crate) is_read_only: bool,
    common: Common,
}

impl Endpoint {
    pub(crate) fn start(
        name: String,
        hosts: Vec<String>,
        certificates: Certificates,
        database: Database,
        common: Common,
    ) -> Self {
        let sessions = Sessions::new(common.counters.clone());
        Self {
            name,
            hosts,
            certificates,
            compute: Compute::start(common.clone(), sessions.clone(), database.clone()),
            sessions,
            database,
            is_read_only: false,
            common,
        }
    }

    /// Whether no connection is accepted.
    pub(crate) fn is_disabled(&self) -> bool {
        self.compute.limits().is_disabled
            || (self.name == Names::ENDPOINT && self.common.settings.borrow().is_disabled)
    }

    /// Ends its sessions and its tasks.
    fn stop(&self) {
        self.sessions.disrupt(Disruption::Close);
        self.common.stop.cancel();
    }
}

/// All endpoints that answer.
#[derive(Default)]
pub(crate) struct Endpoints(RwLock<Vec<Arc<Endpoint>>>);

impl Endpoints {
    pub(crate) fn add(&self, endpoint: Arc<Endpoint>) {
        let mut list = self.0.write().unwrap_or_else(PoisonError::into_inner);
        list.push(endpoint);
    }

    /// Ends those that `is_it` names.
    pub(crate) fn remove(&self, is_it: impl Fn(&Endpoint) -> bool) {
        let mut list = self.0.write().unwrap_or_else(PoisonError::into_inner);
        list.retain(|endpoint| {
            let is_kept = !is_it(endpoint);
            if !is_kept {
                endpoint.stop();
            }
            is_kept
        });
    }

    pub(crate) fn list(&self) -> Vec<Arc<Endpoint>> {
        let list = self.0.read().unwrap_or_else(PoisonError::into_inner);
        list.clone()
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<Arc<Endpoint>> {
        self.find(|endpoint| endpoint.name == name)
    }

    pub(crate) fn by_host(&self, server_name: &str) -> Option<Arc<Endpoint>> {
        self.find(|endpoint| {
            let mut hosts = endpoint.hosts.iter();
            hosts.any(|host| host.eq_ignore_ascii_case(server_name))
        })
    }

    /// The server process that a cancel key stands for, and its Postgres.
    pub(crate) fn by_key(&self, key: CancelKey) -> Option<(BackendKey, Database)> {
        let list = self.0.read().unwrap_or_else(PoisonError::into_inner);
        list.iter().find_map(|endpoint| {
            let backend = endpoint.sessions.backend_of(key)?;
            Some((backend, endpoint.database.clone()))
        })
    }

    fn find(&self, is_it: impl Fn(&Endpoint) -> bool) -> Option<Arc<Endpoint>> {
        let list = self.0.read().unwrap_or_else(PoisonError::into_inner);
        list.iter().find(|endpoint| is_it(endpoint)).cloned()
    }
}
