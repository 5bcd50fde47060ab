//! The threads that serve clients.
//!
//! Each runs a current-thread runtime of its own. A client is placed on the one with the fewest sessions when it is accepted
//! and stays there: handshake, login, relay. Sharing nothing between threads makes each message cheaper: one
//! multi-thread runtime loses 8 to 10 % of throughput at 8 and 32 clients, and lets queries wait behind a COPY. The price
//! is that two bulk transfers may share a thread while another is idle; the relay bounds the turn that each takes.

use std::{
    io,
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use arc_swap::ArcSwap;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::mpsc,
};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

/// The threads; they end when this is dropped, and their sessions with them.
#[derive(Debug)]
pub(crate) struct SessionThreads(Vec<SessionThread>);

#[derive(Debug)]
struct SessionThread {
    /// Not the runtime's tasks: those that watch idle connections of a pool are no load, and the next client should find its
    /// connection on the thread where they are.
    sessions: TaskTracker,
    /// The thread's runtime now; replaced when it dies.
    runtime: Arc<ArcSwap<Handle>>,
    /// The thread ends when this is dropped. Tests send what makes its runtime die.
    #[cfg_attr(not(test), expect(dead_code, reason = "dropping it is its use"))]
    control: mpsc::Sender<()>,
}

impl SessionThreads {
    /// Starts `count` threads. Fails when the system provides no thread or no epoll set.
    pub(crate) fn start(count: NonZeroUsize) -> io::Result<Self> {
        // Dropping `threads` ends the ones already started.
        let mut threads = Self(Vec::with_capacity(count.get()));
        for number in 0..count.get() {
            threads.0.push(SessionThread::start(number)?);
        }
        Ok(threads)
    }

    /// Runs `session` on the thread with the fewest sessions, the first of several.
    pub(crate) fn spawn(&self, session: impl Future<Output = ()> + Send + 'static) {
        let threads = self.0.iter();
        if let Some(thread) = threads.min_by_key(|thread| thread.sessions.len()) {
            // Dropping the handle detaches the task; the tracker of clients waits for it.
            let session = thread.sessions.track_future(session);
            drop(thread.runtime.load().spawn(session));
        }
    }

    /// Runs `job` on the first thread, where it counts as no session. Cancel safe: the job is cancelled, too.
    pub(crate) async fn run_on_first<J>(&self, job: impl Fn() -> J)
    where
        J: Future<Output = ()> + Send + 'static,
    {
        if let Some(thread) = self.0.first() {
            thread.run(job).await;
        }
    }

    /// Returns once every thread has run a task. Cancel safe.
    pub(crate) async fn all_respond(&self) {
        for thread in &self.0 {
            thread.run(|| async {}).await;
        }
    }
}

impl SessionThread {
    fn start(number: usize) -> io::Result<Self> {
        let runtime = new_runtime()?;
        let handle = Arc::new(ArcSwap::from_pointee(runtime.handle().clone()));
        let (control, controlled) = mpsc::channel(1);
        let current = Arc::clone(&handle);
        thread::Builder::new()
            .name(format!("session-{number}"))
            .spawn(move || run(runtime, &current, controlled))?;
        Ok(Self {
            sessions: TaskTracker::new(),
            runtime: handle,
            control,
        })
    }

    /// Runs `job` to its end, from its start in the next runtime when one dies meanwhile.
    async fn run<J>(&self, job: impl Fn() -> J)
    where
        J: Future<Output = ()> + Send + 'static,
    {
        while AbortOnDropHandle::new(self.runtime.load().spawn(job()))
            .await
            .is_err()
        {
            tokio::task::yield_now().await;
        }
    }
}

fn new_runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Drives a runtime until the thread is to stop, and another in its place when it dies: its I/O driver panics when epoll
/// fails. A panic of a session never gets here.
fn run(mut runtime: Runtime, current: &ArcSwap<Handle>, mut control: mpsc::Receiver<()>) {
    let until_dropped = async |control: &mut mpsc::Receiver<()>| {
        assert!(control.recv().await.is_none(), "killed by a test");
    };
    // Unwind safe: a runtime that has panicked is only shut down.
    while catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(until_dropped(&mut control));
    }))
    .is_err()
    {
        let successor = match new_runtime() {
            Ok(successor) => successor,
            Err(error) => {
                // From now on `all_respond` waits and liveness fails, so that the process is restarted from outside.
                return tracing::error!(
                    %error,
                    "a session thread has died and cannot be replaced; hint: restart the proxy"
                );
            }
        };
        tracing::error!("a session thread has died with its sessions and is replaced");
        // Before the shutdown: a session that is placed meanwhile must not be dropped with the dead runtime.
        current.store(Arc::new(successor.handle().clone()));
        std::mem::replace(&mut runtime, successor).shutdown_background();
    }
    // Name look-ups on its blocking threads need not be awaited.
    runtime.shutdown_background();
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        sync::oneshot,
        time::{sleep, timeout},
    };

    use super::*;

    /// More than any of these tests takes when all is well.
    const LONG: Duration = Duration::from_secs(30);

    fn start(count: usize) -> SessionThreads {
        SessionThreads::start(NonZeroUsize::new(count).unwrap()).unwrap()
    }

    /// The result of `job`; `None` when it panicked or was dropped.
    async fn run<J>(threads: &SessionThreads, job: J) -> Option<J::Output>
    where
        J: Future<Output: Send> + Send + 'static,
    {
        let (sender, result) = oneshot::channel();
        threads.spawn(async move {
            let _ = sender.send(job.await);
        });
        timeout(LONG, result).await.unwrap().ok()
    }

    #[tokio::test]
    async fn timers_and_channels_of_another_runtime_work() {
        let runtimes = start(1);
        let (sender, mut receiver) = mpsc::channel::<u32>(1);
        let job = run(&runtimes, async move {
            sleep(Duration::from_millis(1)).await;
            receiver.recv().await
        });
        let (outcome, ()) = tokio::join!(job, async { sender.send(7).await.unwrap() });
        assert_eq!(outcome.unwrap(), Some(7));
    }

    #[tokio::test]
    async fn a_panic_ends_one_session_alone() {
        let runtimes = start(1);
        let (sender, receiver) = oneshot::channel();
        let waiting = run(&runtimes, receiver);
        let both = async {
            let panicked: Option<()> = run(&runtimes, async { panic!("on purpose") }).await;
            assert_eq!(panicked, None);
            sender.send(1).unwrap();
        };
        let (outcome, ()) = tokio::join!(waiting, both);
        assert_eq!(outcome, Some(Ok(1)));
    }

    #[tokio::test]
    async fn sessions_are_placed_where_the_fewest_are() {
        let runtimes = start(3);
        let (waiters, mut gone) = mpsc::channel::<()>(1);
        for _ in 0..9 {
            let waiter = waiters.clone();
            runtimes.spawn(async move { waiter.closed().await });
        }
        let tasks = |thread: &SessionThread| thread.runtime.load().metrics().num_alive_tasks();
        let shares: Vec<_> = runtimes.0.iter().map(tasks).collect();
        assert_eq!(shares, [3, 3, 3]);
        runtimes.all_respond().await;
        gone.close();
    }

    #[tokio::test]
    async fn sessions_still_running_at_the_end_are_dropped() {
        let runtimes = start(1);
        let (sender, mut receiver) = mpsc::channel::<()>(1);
        runtimes.spawn(async move { sender.closed().await });
        runtimes.all_respond().await;
        drop(runtimes);
        assert_eq!(timeout(LONG, receiver.recv()).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_runtime_that_dies_is_replaced() {
        let runtimes = start(1);
        let (sender, mut receiver) = mpsc::channel::<()>(1);
        runtimes.spawn(async move { sender.closed().await });
        runtimes.all_respond().await;
        runtimes.0[0].control.send(()).await.unwrap();
        assert_eq!(timeout(LONG, receiver.recv()).await.unwrap(), None, "lost");
        timeout(LONG, runtimes.all_respond()).await.unwrap();
        assert_eq!(run(&runtimes, async { 2 }).await, Some(2));
    }
}
