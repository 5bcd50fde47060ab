//! One thread's sockets: which of them may be read from and written to.
//!
//! Events are edge-triggered: a socket is taken to be ready until it says otherwise, and is then not asked again before
//! the next event. They wake the job that the socket belongs to, whoever asked.

use std::{
    cell::{Cell, RefCell},
    io,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use mio::{Interest, Registry, Token, event::Event};
use slab::Slab;

use super::bulk::{Flow, Silences};

/// How often a socket may be read from, and how often written to, in one turn of its job: a bulk transfer lets others in
/// after half a megabyte, a fraction of a millisecond, and hears what the other direction has to say.
const TURN: u8 = 8;

thread_local! {
    static REACTOR: RefCell<Option<Reactor>> = const { RefCell::new(None) };
    static NOW: Cell<Now> = const { Cell::new(Now { job: 0, turn: 0, is_cut_short: false }) };
}

/// Whose turn it is.
#[derive(Clone, Copy)]
struct Now {
    job: usize,
    turn: u32,
    /// Whether a socket has had its share while it could have gone on.
    is_cut_short: bool,
}

struct Reactor {
    registry: Registry,
    sources: Slab<(Arc<Readiness>, usize)>,
    silences: Silences,
}

const READABLE: u8 = 1;
const WRITABLE: u8 = 2;
/// No more comes: then a read that brings little need not have brought all there is.
const READ_CLOSED: u8 = 4;
/// The batch that is waited for has not come.
const SILENT: u8 = 8;
/// A batch is waited for.
const AWAITED: u8 = 16;

/// What is known of one socket; of one thread alone, so nothing is ordered by it.
#[derive(Debug, Default)]
struct Readiness(AtomicU8);

impl Readiness {
    /// Whether any of it holds.
    #[inline]
    fn has(&self, what: u8) -> bool {
        self.0.load(Ordering::Relaxed) & what != 0
    }

    #[inline]
    fn add(&self, what: u8) {
        self.0
            .store(self.0.load(Ordering::Relaxed) | what, Ordering::Relaxed);
    }

    #[inline]
    fn remove(&self, what: u8) {
        self.0
            .store(self.0.load(Ordering::Relaxed) & !what, Ordering::Relaxed);
    }
}

/// From now on this thread has sockets.
pub(super) fn begin(registry: Registry) {
    REACTOR.set(Some(Reactor {
        registry,
        sources: Slab::new(),
        silences: Silences::default(),
    }));
}

/// Takes note of an event, and says which job it is for.
pub(super) fn note(event: &Event) -> Option<usize> {
    REACTOR.with_borrow_mut(|reactor| {
        let Reactor {
            sources, silences, ..
        } = reactor.as_mut()?;
        let (readiness, job) = sources.get(event.token().0)?;
        let mut what = 0;
        if event.is_readable() || event.is_read_closed() || event.is_error() {
            what |= READABLE;
            if readiness.has(AWAITED) {
                readiness.remove(AWAITED);
                silences.forget(event.token().0);
            }
        }
        if event.is_read_closed() || event.is_error() {
            what |= READ_CLOSED;
        }
        if event.is_writable() || event.is_write_closed() || event.is_error() {
            what |= WRITABLE;
        }
        readiness.add(what);
        Some(*job)
    })
}

/// How long the thread may sleep; none is for as long as nothing happens.
pub(super) fn patience() -> Option<Duration> {
    REACTOR.with_borrow(|reactor| reactor.as_ref()?.silences.patience())
}

/// Takes note of sockets that have been silent for too long, and says which jobs they are for.
pub(super) fn note_silence(mut job_is_due: impl FnMut(usize)) {
    REACTOR.with_borrow_mut(|reactor| {
        let Some(Reactor {
            sources, silences, ..
        }) = reactor
        else {
            return;
        };
        while let Some(token) = silences.next_over() {
            if let Some((readiness, job)) = sources.get(token) {
                readiness.remove(AWAITED);
                readiness.add(SILENT);
                job_is_due(*job);
            }
        }
    });
}

/// It is this job's turn.
#[inline]
pub(super) fn turn_of(job: usize) {
    NOW.set(Now {
        job,
        turn: NOW.get().turn.wrapping_add(1),
        is_cut_short: false,
    });
}

/// Whether the job whose turn it was has more to do already.
#[inline]
pub(super) fn is_cut_short() -> bool {
    NOW.get().is_cut_short
}

/// A socket of this thread.
#[derive(Debug)]
pub(super) struct Source {
    readiness: Arc<Readiness>,
    token: usize,
    turn: u32,
    reads_left: u8,
    writes_left: u8,
    flow: Flow,
    /// Whether the last read has left nothing to read.
    is_drained: bool,
}

impl Source {
    /// Watches `socket` for the job whose turn it is.
    pub(super) fn new(socket: &mut impl mio::event::Source) -> io::Result<Self> {
        REACTOR.with_borrow_mut(|reactor| {
            let Some(Reactor {
                registry, sources, ..
            }) = reactor
            else {
                return Err(io::Error::other("this thread has no sockets"));
            };
            let readiness = Arc::new(Readiness(AtomicU8::new(WRITABLE)));
            let entry = sources.vacant_entry();
            let token = entry.key();
            registry.register(
                socket,
                Token(token),
                Interest::READABLE | Interest::WRITABLE,
            )?;
            entry.insert((Arc::clone(&readiness), NOW.get().job));
            Ok(Self {
                readiness,
                token,
                turn: 0,
                reads_left: 0,
                writes_left: 0,
                flow: Flow::default(),
                is_drained: false,
            })
        })
    }

    /// Whether there is nothing to read for now.
    #[inline]
    pub(super) fn is_quiet(&self) -> bool {
        !self.readiness.has(READABLE | SILENT)
    }

    /// Reads by `read` as far as the socket can be read from now: `None` is for later. `room` is how much would be read.
    #[inline]
    pub(super) fn read(
        &mut self,
        room: usize,
        read: impl FnOnce() -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        // As epoll(7) has it, what brings less than there was room for has brought all, but for the end.
        let was_readable = self.readiness.has(READABLE);
        let done = self.attempt(READABLE, READ_CLOSED, room, read);
        if let Some(Ok(length)) = done {
            self.flow.brought(length);
        }
        // Also where an event has told of what had been read before.
        self.is_drained = was_readable && !self.readiness.has(READABLE);
        done
    }

    /// To be asked before a read: bytes that the thread is to be woken for from now on, where that changes.
    #[inline]
    pub(super) fn end_of_batches(&mut self) -> Option<usize> {
        if !self.readiness.has(SILENT) {
            return None;
        }
        self.readiness.remove(SILENT);
        // Not every kernel tells of what has lain there already.
        self.readiness.add(READABLE);
        self.flow.silent()
    }

    /// To be asked after a read: as above.
    #[inline]
    pub(super) fn beginning_of_batches(&mut self) -> Option<usize> {
        if !self.is_drained || !self.flow.is_bulk() {
            return None;
        }
        self.readiness.add(AWAITED);
        REACTOR.with_borrow_mut(|reactor| {
            if let Some(reactor) = reactor {
                reactor.silences.await_batch(self.token);
            }
        });
        self.flow.begin_batches()
    }

    /// Writes by `write` as far as the socket can be written to now: `None` is for later. `length` is how much would be
    /// written.
    #[inline]
    pub(super) fn write(
        &mut self,
        length: usize,
        write: impl FnOnce() -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        self.attempt(WRITABLE, 0, length, write)
    }

    /// To be asked after a write: as above.
    #[inline]
    pub(super) fn end_of_flow(&mut self) -> Option<usize> {
        self.flow.written_to()
    }

    /// Does what the socket is ready for, within its share; less than `most` is the end of being ready, unless it is known
    /// to be `closed`.
    #[inline]
    fn attempt(
        &mut self,
        what: u8,
        closed: u8,
        most: usize,
        attempt: impl FnOnce() -> io::Result<usize>,
    ) -> Option<io::Result<usize>> {
        if !self.readiness.has(what) {
            return None;
        }
        self.take_turn();
        let left = if what == READABLE {
            &mut self.reads_left
        } else {
            &mut self.writes_left
        };
        if !spend(left) {
            return None;
        }
        match attempt() {
            Ok(done) => {
                if done < most && !self.readiness.has(closed) {
                    self.readiness.remove(what);
                }
                Some(Ok(done))
            }
            Err(error) => self.failed(what, error),
        }
    }

    fn failed(&mut self, what: u8, error: io::Error) -> Option<io::Result<usize>> {
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                self.readiness.remove(what);
                None
            }
            // Tried again in the next turn.
            io::ErrorKind::Interrupted => {
                cut_short();
                None
            }
            _ => Some(Err(error)),
        }
    }

    #[inline]
    fn take_turn(&mut self) {
        let turn = NOW.get().turn;
        if self.turn != turn {
            self.turn = turn;
            self.reads_left = TURN;
            self.writes_left = TURN;
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // The socket is closed with it, and so no longer watched. At the end of the thread there is nothing to tidy up.
        let _ = REACTOR.try_with(|reactor| {
            if let Ok(mut reactor) = reactor.try_borrow_mut()
                && let Some(Reactor {
                    sources, silences, ..
                }) = reactor.as_mut()
            {
                silences.forget(self.token);
                sources.try_remove(self.token);
                if sources.is_empty() {
                    sources.shrink_to_fit();
                }
            }
        });
    }
}

#[inline]
fn spend(left: &mut u8) -> bool {
    match left.checked_sub(1) {
        Some(less) => {
            *left = less;
            true
        }
        None => {
            cut_short();
            false
        }
    }
}

fn cut_short() {
    NOW.set(Now {
        is_cut_short: true,
        ..NOW.get()
    });
}
