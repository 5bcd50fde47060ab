//! Notifications to the service manager: ready, reloading, stopping, watchdog and status. Without a service manager they do
//! nothing.

#[cfg(not(target_os = "linux"))]
mod absent;
#[cfg(target_os = "linux")]
mod linux;

#[cfg(not(target_os = "linux"))]
pub use self::absent::{Notifier, Reloading};
#[cfg(target_os = "linux")]
pub use self::linux::{Notifier, Reloading};
