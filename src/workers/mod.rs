//! Threads that do nothing but relay.
//!
//! Until a session is logged in it is a task of tokio's runtime like any other: there it needs timers, names resolved,
//! channels. After that it waits for its two sockets, mostly for hours, and then each message counts. So it is handed to
//! one of these threads and stays there: a small executor around an epoll set, with no timer to look at, no task to
//! share with other threads and no lock to take for a message. A round trip of `SELECT 1` takes 6,890 instructions
//! so, of which 4,500 are TLS; in tokio's runtime it took 11,050.
//!
//! A session stays on its thread, chosen as the one with the fewest: two bulk transfers may share one while another has
//! nothing to do, which is the price of not sharing for each message. They take turns there.
//!
//! What a session still needs of the runtime at its end (timers) is the runtime's: the threads are in its context.
//!
//! Knows nothing of Postgres.

mod bulk;
mod executor;
mod reactor;
mod socket;
mod watermark;

use std::{io, pin::Pin, sync::Arc, thread};

use tokio::runtime::Handle;

use self::executor::{Executor, Inbox};
pub use self::socket::{HangUp, Settle, Socket};

/// What is run: to its end, on one thread.
pub type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The threads; they end when this is dropped, and what they run with them.
#[derive(Debug)]
pub struct Workers(Vec<Arc<Inbox>>);

impl Workers {
    /// As many as the runtime that this is called in has threads.
    ///
    /// # Errors
    /// When the system gives no thread or no epoll set.
    pub fn start() -> io::Result<Self> {
        let runtime = Handle::current();
        let count = runtime.metrics().num_workers();
        // Dropped at an error, which ends those that run already.
        let mut workers = Self(Vec::with_capacity(count));
        for number in 0..count {
            let (executor, inbox) = Executor::new()?;
            let runtime = runtime.clone();
            thread::Builder::new()
                .name(format!("relay-{number}"))
                .spawn(move || {
                    let _context = runtime.enter();
                    executor.run();
                })?;
            workers.0.push(inbox);
        }
        Ok(workers)
    }

    /// Runs `job` on the thread with the fewest. A thread that has ended is given none; without any, the job is dropped.
    pub fn spawn(&self, mut job: Job) {
        loop {
            let alive = self.0.iter().filter(|inbox| !inbox.is_closed());
            let Some(inbox) = alive.min_by_key(|inbox| inbox.jobs()) else {
                tracing::error!("no relay thread is left; hint: restart the proxy");
                return;
            };
            match inbox.give(job) {
                Ok(()) => return,
                Err(refused) => job = refused,
            }
        }
    }

    /// Returns once every thread has got round to it; never when none is left. Cancel safe.
    pub async fn all_respond(&self) {
        let mut alive = false;
        for inbox in &self.0 {
            let (responds, response) = tokio::sync::oneshot::channel();
            // A thread that has ended has nothing to answer for: the job is dropped, and the channel with it.
            let _ = inbox.give(Box::pin(async move {
                let _ = responds.send(());
            }));
            alive |= response.await.is_ok();
        }
        if !alive {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for inbox in &self.0 {
            inbox.stop();
        }
    }
}

#[cfg(test)]
mod tests;
