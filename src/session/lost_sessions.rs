//! One log line for all sessions that an endpoint ends at about the same time.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{runtime::Handle, time::sleep};

use crate::status::Label;

/// From the first session that ends to the log line.
const WINDOW: Duration = Duration::from_secs(1);

/// The sessions that the endpoint has ended and that are not logged yet.
#[derive(Debug)]
pub(crate) struct LostSessions {
    endpoint: Label,
    unlogged: Mutex<Unlogged>,
}

#[derive(Debug, Default)]
struct Unlogged {
    sessions: u64,
    error: Option<String>,
}

impl LostSessions {
    pub(super) fn new(endpoint: Label) -> Self {
        Self {
            endpoint,
            unlogged: Mutex::default(),
        }
    }

    /// Counts one session; `error` is the server's, if it sent one.
    pub(super) fn add(self: &Arc<Self>, error: Option<String>) {
        let is_first = {
            let mut unlogged = self.unlogged();
            unlogged.sessions += 1;
            // The first one that has an error: a compute that ends closes all sessions for one reason.
            unlogged.error = unlogged.error.take().or(error);
            unlogged.sessions == 1
        };
        if is_first && let Ok(runtime) = Handle::try_current() {
            let this = Arc::clone(self);
            runtime.spawn(async move {
                sleep(WINDOW).await;
                this.log();
            });
        }
    }

    fn log(&self) {
        let Unlogged { sessions, error } = std::mem::take(&mut *self.unlogged());
        tracing::warn!(
            endpoint = %self.endpoint,
            sessions,
            server = error.as_deref().unwrap_or("nothing"),
            "the endpoint ended sessions; hint: a suspended, restarted or failed over compute does; clients must connect again"
        );
    }

    fn unlogged(&self) -> MutexGuard<'_, Unlogged> {
        self.unlogged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
