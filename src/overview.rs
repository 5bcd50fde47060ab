//! What can be said of the running program, gathered for those who look: probes, the status page, the console.
//!
//! Holds handles, no copies: whatever is asked is answered as it is now. It asks nobody outside the process, so that a
//! look never wakes an endpoint.

use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use tokio::time::Instant;

use crate::{
    config::ShownSetting,
    credential::CredentialCell,
    session::{SessionConfig, SharedConfig},
    shutdown::{Phase, Shutdown},
    status::{EndpointSessions, Registry},
    telemetry::Metrics,
    upstream::Route,
};

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// One endpoint as the program serves it.
pub struct Place {
    /// What it is called in the settings.
    pub name: String,
    /// Where its clients connect.
    pub listening: Vec<String>,
    /// The way to it, once it is found.
    pub route: Route,
    /// Its sessions.
    pub sessions: EndpointSessions,
    /// Its credential.
    pub credentials: CredentialCell,
    /// Where its credential comes from.
    pub source: &'static str,
    /// What is counted for it.
    pub metrics: Arc<Metrics>,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// The whole program.
pub struct Overview {
    started: Timestamp,
    origin: Instant,
    registry: Registry,
    shutdown: Shutdown,
    config: SharedConfig,
    places: Box<dyn Fn() -> Vec<Arc<Place>> + Send + Sync>,
    settings: Mutex<Vec<ShownSetting>>,
    also: Mutex<Vec<(&'static str, SocketAddr)>>,
}

impl Overview {
    /// A program that begins now; `places` are its endpoints at any time, and cost no more than a look.
    pub fn new(
        registry: Registry,
        shutdown: Shutdown,
        config: SharedConfig,
        places: impl Fn() -> Vec<Arc<Place>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            started: Timestamp::now(),
            origin: Instant::now(),
            registry,
            shutdown,
            config,
            places: Box::new(places),
            settings: Mutex::default(),
            also: Mutex::default(),
        }
    }

    /// The endpoints, in the order of the settings.
    pub fn places(&self) -> Vec<Arc<Place>> {
        (self.places)()
    }

    /// Shows these settings from now on.
    pub fn set_settings(&self, settings: Vec<ShownSetting>) {
        *lock(&self.settings) = settings;
    }

    /// The settings in force.
    pub fn settings(&self) -> Vec<ShownSetting> {
        lock(&self.settings).clone()
    }

    /// Shows another address that is listened on, for what `purpose` says.
    pub fn listens(&self, purpose: &'static str, address: SocketAddr) {
        lock(&self.also).push((purpose, address));
    }

    /// What is listened on beside the endpoints' own addresses.
    pub fn also_listening(&self) -> Vec<(&'static str, SocketAddr)> {
        lock(&self.also).clone()
    }

    /// The configuration of sessions that begin now.
    pub fn session_config(&self) -> Arc<SessionConfig> {
        self.config.load_full()
    }

    /// The registry of sessions.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// How far the end has come.
    pub fn phase(&self) -> Phase {
        self.shutdown.phase()
    }

    /// When the program began.
    pub fn started(&self) -> Timestamp {
        self.started
    }

    /// How long ago.
    pub fn uptime(&self) -> Duration {
        self.origin.elapsed()
    }
}

impl fmt::Debug for Overview {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Overview")
            .field("started", &self.started)
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
