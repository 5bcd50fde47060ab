//! One datagram for each notification (`sd_notify`'s protocol). One that cannot be sent is logged at debug level and ends nothing.

use std::{
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sd_notify::NotifyState;

use crate::config::ServiceManager;

/// Maximum length of a status in bytes: `systemctl status` shows no more.
const STATUS_LIMIT: usize = 400;

/// The connection to the service manager; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Notifier(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    socket: UnixDatagram,
    watchdog: Option<Duration>,
    is_ready: AtomicBool,
    status: Mutex<String>,
}

impl Notifier {
    /// Connects to the socket of the settings, if they have one.
    pub fn connect(manager: &ServiceManager) -> io::Result<Self> {
        let Some(name) = &manager.socket else {
            return Ok(Self::default());
        };
        let address = match name.as_bytes().split_first() {
            // sd_notify(3): `@` stands for the zero byte of an abstract name.
            Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        // A manager that does not read must not block us.
        socket.set_nonblocking(true)?;
        Ok(Self(Some(Arc::new(Inner {
            socket,
            watchdog: manager.watchdog,
            is_ready: AtomicBool::new(false),
            status: Mutex::default(),
        }))))
    }

    /// Whether there is a service manager.
    pub fn is_connected(&self) -> bool {
        self.0.is_some()
    }

    /// The interval of watchdog notifications: a third of the timeout, so that one may be late.
    pub fn watchdog_interval(&self) -> Option<Duration> {
        let watchdog = self.0.as_ref()?.watchdog?;
        Some((watchdog / 3).max(Duration::from_millis(1)))
    }

    /// Reports the end of the start or of a reload.
    pub fn ready(&self) {
        if let Some(inner) = &self.0 {
            inner.is_ready.store(true, Ordering::Release);
        }
        self.send(&[NotifyState::Ready]);
    }

    /// Reports a reload, which ends when the guard is dropped. `None` before [`ready`](Self::ready).
    pub fn reloading(&self) -> Option<Reloading<'_>> {
        let inner = self.0.as_ref()?;
        // The end of a reload is READY=1, which would report the start as complete.
        if !inner.is_ready.load(Ordering::Acquire) {
            return None;
        }
        // The manager matches the notification to its request by the time.
        match NotifyState::monotonic_usec_now() {
            Ok(now) => self.send(&[NotifyState::Reloading, now]),
            Err(error) => tracing::debug!(%error, "no monotonic clock"),
        }
        Some(Reloading(self))
    }

    /// Reports the start of the shutdown.
    pub fn stopping(&self) {
        self.send(&[
            NotifyState::Stopping,
            NotifyState::Status("shutting down: work under way may finish"),
        ]);
    }

    /// Sends a watchdog notification.
    pub fn alive(&self) {
        self.send(&[NotifyState::Watchdog]);
    }

    /// Sends a status of one line, if it has changed.
    pub fn status(&self, line: &str) {
        let Some(inner) = &self.0 else { return };
        let line = cut(line);
        {
            let mut last = inner.status.lock().unwrap_or_else(PoisonError::into_inner);
            if *last == line {
                return;
            }
            line.clone_into(&mut last);
        }
        self.send(&[NotifyState::Status(line)]);
    }

    fn send(&self, states: &[NotifyState<'_>]) {
        let Some(inner) = &self.0 else { return };
        // In one datagram, which the manager takes as one message (sd_notify(3)).
        let lines: Vec<String> = states.iter().map(ToString::to_string).collect();
        if let Err(error) = inner.socket.send(lines.join("\n").as_bytes()) {
            tracing::debug!(%error, "cannot notify the service manager");
        }
    }
}

/// A reload that was reported to the service manager.
#[derive(Debug)]
pub struct Reloading<'a>(&'a Notifier);

impl Drop for Reloading<'_> {
    fn drop(&mut self) {
        self.0.ready();
    }
}

/// One line of bounded length.
fn cut(line: &str) -> &str {
    let line = line.lines().next().unwrap_or_default();
    let end = (0..=STATUS_LIMIT.min(line.len())).rev();
    end.into_iter()
        .find_map(|end| line.get(..end))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(socket: &UnixDatagram) -> ServiceManager {
        let path = socket.local_addr().unwrap();
        ServiceManager {
            socket: Some(path.as_pathname().unwrap().as_os_str().to_owned()),
            watchdog: Some(Duration::from_secs(30)),
        }
    }

    fn received(socket: &UnixDatagram) -> String {
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    #[test]
    fn each_state_is_a_datagram_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        let notifier = Notifier::connect(&manager(&socket)).unwrap();
        assert_eq!(notifier.watchdog_interval(), Some(Duration::from_secs(10)));
        assert!(notifier.reloading().is_none(), "it has not started");
        notifier.ready();
        assert_eq!(received(&socket), "READY=1");
        let reloading = notifier.reloading();
        let reload = received(&socket);
        let time = reload.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
        assert!(time.parse::<u64>().unwrap() > 0);
        drop(reloading);
        assert_eq!(received(&socket), "READY=1");
        notifier.status("all is well\nREADY=0");
        notifier.status("all is well");
        notifier.status("it is not");
        assert_eq!(received(&socket), "STATUS=all is well");
        assert_eq!(received(&socket), "STATUS=it is not");
        notifier.alive();
        assert_eq!(received(&socket), "WATCHDOG=1");
        notifier.stopping();
        assert!(received(&socket).starts_with("STOPPING=1\nSTATUS="));
    }

    #[test]
    fn without_a_manager_nothing_happens() {
        let notifier = Notifier::connect(&ServiceManager::default()).unwrap();
        assert!(!notifier.is_connected());
        notifier.ready();
        notifier.status("x");
        assert_eq!(notifier.watchdog_interval(), None);
        let nowhere = ServiceManager {
            socket: Some("/nowhere/at/all".into()),
            watchdog: None,
        };
        assert!(Notifier::connect(&nowhere).is_err());
    }

    #[test]
    fn a_status_is_cut_between_characters() {
        let long = format!("x{}", "é".repeat(STATUS_LIMIT));
        assert_eq!(cut(&long).len(), STATUS_LIMIT - 1);
        assert_eq!(cut(""), "");
    }
}
