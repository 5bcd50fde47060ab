//! One log line for the sessions that an endpoint ends in one moment.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{runtime::Handle, time::sleep};

use crate::status::Label;

/// From the first session that ends to the line.
const WINDOW: Duration = Duration::from_secs(1);

/// The sessions of one endpoint that it has ended and that the log does not know of yet.
#[derive(Debug)]
pub struct Dropped {
    endpoint: Label,
    recent: Mutex<Recent>,
}

#[derive(Debug, Default)]
struct Recent {
    sessions: u64,
    words: Option<String>,
}

impl Dropped {
    /// Of that endpoint.
    pub fn new(endpoint: Label) -> Self {
        Self {
            endpoint,
            recent: Mutex::default(),
        }
    }

    /// One more session; `words` are the server's, if it has sent an error.
    pub(super) fn add(self: &Arc<Self>, words: Option<String>) {
        let is_first = {
            let mut recent = self.recent();
            recent.sessions += 1;
            recent.words = recent.words.take().or(words);
            recent.sessions == 1
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
        let Recent { sessions, words } = std::mem::take(&mut *self.recent());
        tracing::warn!(
            endpoint = %self.endpoint,
            sessions,
            server = words.as_deref().unwrap_or("nothing"),
            "the endpoint ended sessions; hint: a suspended, restarted or failed over compute does; clients must connect again"
        );
    }

    fn recent(&self) -> std::sync::MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
