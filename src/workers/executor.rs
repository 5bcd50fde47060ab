//! One thread's jobs: whose turn it is.

use std::{
    io, mem,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use mio::{Events, Token};
use slab::Slab;

use super::{Job, reactor};

/// What is looked at between two looks at the sockets, at most.
const EVENTS: usize = 1024;
/// Not a socket: there is something in the inbox.
const INBOX: Token = Token(usize::MAX);

/// What others tell a thread.
#[derive(Debug)]
pub(super) struct Inbox {
    post: Mutex<Post>,
    /// Jobs that have not ended.
    jobs: AtomicUsize,
    bell: mio::Waker,
}

#[derive(Default)]
struct Post {
    /// The thread has ended, or is about to: it takes no jobs.
    closed: bool,
    jobs: Vec<Job>,
    woken: Vec<usize>,
    stop: bool,
}

impl std::fmt::Debug for Post {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Post").finish_non_exhaustive()
    }
}

impl Inbox {
    pub(super) fn jobs(&self) -> usize {
        self.jobs.load(Ordering::Relaxed)
    }

    /// Hands a job over; gives it back when the thread has ended.
    pub(super) fn give(&self, job: Job) -> Result<(), Job> {
        let mut refused = None;
        self.put(|post| {
            if post.closed {
                refused = Some(job);
            } else {
                self.jobs.fetch_add(1, Ordering::Relaxed);
                post.jobs.push(job);
            }
        });
        refused.map_or(Ok(()), Err)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.post().closed
    }

    /// No job is taken any more; those that have not begun are dropped.
    fn close(&self) {
        let jobs = {
            let mut post = self.post();
            post.closed = true;
            mem::take(&mut post.jobs)
        };
        drop(jobs);
    }

    pub(super) fn stop(&self) {
        self.put(|post| post.stop = true);
    }

    fn put(&self, what: impl FnOnce(&mut Post)) {
        let mut post = self.post();
        let rung = post.stop || !post.jobs.is_empty() || !post.woken.is_empty();
        what(&mut post);
        drop(post);
        if !rung && let Err(error) = self.bell.wake() {
            tracing::error!(%error, "a relay thread cannot be woken");
        }
    }

    fn post(&self) -> MutexGuard<'_, Post> {
        self.post.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wakes one job from wherever. The next job in its place may be woken in its stead, which does no harm.
struct JobWaker {
    inbox: Arc<Inbox>,
    key: usize,
}

impl Wake for JobWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.inbox.put(|post| post.woken.push(self.key));
    }
}

struct Running {
    job: Job,
    waker: Waker,
    /// Whether its turn comes anyway.
    is_due: bool,
}

/// Closes the inbox of a thread that ends, in whatever way.
struct CloseOnDrop(Arc<Inbox>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

pub(super) struct Executor {
    poll: mio::Poll,
    registry: Option<mio::Registry>,
    _close: CloseOnDrop,
    inbox: Arc<Inbox>,
    running: Slab<Running>,
    due: Vec<usize>,
}

impl Executor {
    pub(super) fn new() -> io::Result<(Self, Arc<Inbox>)> {
        let poll = mio::Poll::new()?;
        let inbox = Arc::new(Inbox {
            post: Mutex::default(),
            jobs: AtomicUsize::new(0),
            bell: mio::Waker::new(poll.registry(), INBOX)?,
        });
        let executor = Self {
            registry: Some(poll.registry().try_clone()?),
            _close: CloseOnDrop(Arc::clone(&inbox)),
            poll,
            inbox: Arc::clone(&inbox),
            running: Slab::new(),
            due: Vec::new(),
        };
        Ok((executor, inbox))
    }

    /// Runs until it is told to stop.
    pub(super) fn run(mut self) {
        if let Some(registry) = self.registry.take() {
            reactor::begin(registry);
        }
        let mut events = Events::with_capacity(EVENTS);
        let mut turn = Vec::new();
        loop {
            // Those that have not finished take turns with whoever has got something to do meanwhile.
            let patience = if self.due.is_empty() {
                reactor::patience()
            } else {
                Some(Duration::ZERO)
            };
            match self.poll.poll(&mut events, patience) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return tracing::error!(
                        %error,
                        "a relay thread has ended, with its sessions; hint: restart the proxy if others follow"
                    );
                }
            }
            let mut has_post = false;
            for event in &events {
                if event.token() == INBOX {
                    has_post = true;
                } else if let Some(key) = reactor::note(event) {
                    self.make_due(key);
                }
            }
            if patience.is_some() {
                reactor::note_silence(|key| self.make_due(key));
            }
            if has_post && !self.open_post() {
                return;
            }
            mem::swap(&mut turn, &mut self.due);
            for key in turn.drain(..) {
                self.go_on(key);
            }
        }
    }

    fn make_due(&mut self, key: usize) {
        if let Some(running) = self.running.get_mut(key)
            && !mem::replace(&mut running.is_due, true)
        {
            self.due.push(key);
        }
    }

    /// Takes in what others have said; false when that is to stop.
    fn open_post(&mut self) -> bool {
        let Post {
            jobs, woken, stop, ..
        } = mem::take(&mut *self.inbox.post());
        for job in jobs {
            let entry = self.running.vacant_entry();
            let key = entry.key();
            let inbox = Arc::clone(&self.inbox);
            entry.insert(Running {
                job,
                waker: Waker::from(Arc::new(JobWaker { inbox, key })),
                is_due: true,
            });
            self.due.push(key);
        }
        for key in woken {
            self.make_due(key);
        }
        !stop
    }

    fn go_on(&mut self, key: usize) {
        let Some(running) = self.running.get_mut(key) else {
            return;
        };
        running.is_due = false;
        reactor::turn_of(key);
        let mut context = Context::from_waker(&running.waker);
        // A panic, which the hook has reported, costs one job, never the thread.
        let polled = catch_unwind(AssertUnwindSafe(|| running.job.as_mut().poll(&mut context)));
        match polled {
            Ok(Poll::Pending) => {
                if reactor::is_cut_short() {
                    self.make_due(key);
                }
            }
            Ok(Poll::Ready(())) | Err(_) => {
                let ended = self.running.remove(key);
                if self.running.is_empty() {
                    self.running.shrink_to_fit();
                }
                self.inbox.jobs.fetch_sub(1, Ordering::Relaxed);
                let _ = catch_unwind(AssertUnwindSafe(|| drop(ended)));
            }
        }
    }
}
