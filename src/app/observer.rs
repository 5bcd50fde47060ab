//! Snapshots of the program for admin and console.

use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use jiff::Timestamp;
use tokio::time::Instant;

use super::Endpoints;
use crate::{
    admin::deep::LoginTarget,
    config::ShownSetting,
    session::SharedConfig,
    shutdown::Shutdown,
    status::{Health, HttpListener, Registry, Snapshot},
};

/// The state that a snapshot is taken of.
pub(super) struct Observer {
    pub(super) started: Timestamp,
    pub(super) origin: Instant,
    pub(super) endpoints: Endpoints,
    pub(super) config: SharedConfig,
    pub(super) registry: Registry,
    pub(super) shutdown: Shutdown,
    pub(super) health: Arc<Health>,
    pub(super) settings: ArcSwap<Vec<ShownSetting>>,
    pub(super) http: OnceLock<Vec<HttpListener>>,
}

impl Observer {
    pub(super) fn snapshot(&self) -> Snapshot {
        let endpoints = self.endpoints.now();
        Snapshot {
            started: self.started,
            uptime: self.origin.elapsed(),
            phase: self.shutdown.phase(),
            is_started: self.health.startup().is_ok(),
            readiness: self.health.readiness(),
            max_connections: self.config.load().max_connections,
            settings: Vec::clone(&self.settings.load()),
            http: self.http.get().cloned().unwrap_or_default(),
            registry: self.registry.clone(),
            endpoints: endpoints.iter().map(|served| served.snapshot()).collect(),
        }
    }

    /// The endpoints, for deep checks.
    pub(super) fn login_targets(&self) -> Vec<LoginTarget> {
        let terms = self.config.load().terms;
        let endpoints = self.endpoints.now();
        let target = |served: &Arc<super::Served>| LoginTarget {
            name: served.shown_name(),
            route: served.sessions.route.clone(),
            terms,
        };
        endpoints.iter().map(target).collect()
    }
}
