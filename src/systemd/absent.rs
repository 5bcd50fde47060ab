//! There is no service manager to notify.

use std::{io, time::Duration};

use crate::config::ServiceManager;

/// The connection to the service manager; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Notifier(());

impl Notifier {
    /// Ignores a socket of the settings: whatever set it is no systemd.
    pub fn connect(_: &ServiceManager) -> io::Result<Self> {
        Ok(Self::default())
    }

    /// Whether there is a service manager.
    pub fn is_connected(&self) -> bool {
        false
    }

    /// There are no watchdog notifications.
    pub fn watchdog_interval(&self) -> Option<Duration> {
        None
    }

    /// Does nothing.
    pub fn ready(&self) {}

    /// Does nothing.
    pub fn reloading(&self) -> Option<Reloading> {
        None
    }

    /// Does nothing.
    pub fn stopping(&self) {}

    /// Does nothing.
    pub fn alive(&self) {}

    /// Does nothing.
    pub fn status(&self, _: &str) {}
}

/// A reload that was reported to the service manager.
#[derive(Debug)]
pub struct Reloading(());
