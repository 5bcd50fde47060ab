//! Standard error behind a bounded buffer, so that a stalled reader delays no session.
//!
//! A separate thread writes; lines beyond the buffer are dropped and counted, and the count is logged when
//! reading resumes. `tracing-appender` does not fit: its buffer is bounded in lines, whatever their length, it does
//! not report what it dropped, and its guard writes to standard error without a bound when the last lines cannot be
//! written in time, which is exactly the case that must not block the exit.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use prometheus::IntCounter;

/// Maximum bytes of unwritten lines; some 5,000 lines.
const BUFFER: usize = 1 << 20;
/// Time for the last lines at exit.
const FLUSH: Duration = Duration::from_secs(2);
/// POSIX's smallest `PIPE_BUF`, and Linux's: a write of that size is not mixed with those of a child that shares the pipe.
const ATOMIC: usize = 4096;

thread_local! {
    /// True in the writing thread, whose one line about dropped lines always fits.
    static WRITES: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Takes lines without waiting; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Sink(Arc<Shared>);

/// Writes what is buffered when it is dropped, within a bound; what comes later is discarded.
#[derive(Debug)]
pub struct LogGuard(Sink);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// There are lines to write, or the end has come.
    filled: Condvar,
    /// All lines have been written.
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<u8>,
    is_writing: bool,
    has_ended: bool,
    /// Lines dropped and not reported in the log yet.
    dropped: u64,
    /// All lines dropped.
    dropped_ever: u64,
    counter: Option<IntCounter>,
}

impl State {
    fn drop_lines(&mut self, lines: u64) {
        self.dropped = self.dropped.saturating_add(lines);
        self.dropped_ever = self.dropped_ever.saturating_add(lines);
        if let Some(counter) = &self.counter {
            counter.inc_by(lines);
        }
    }
}

impl Sink {
    /// Target of the line about dropped lines.
    pub(super) const TARGET: &str = module_path!();

    /// Standard error.
    pub(super) fn stderr() -> io::Result<(Self, LogGuard)> {
        Self::start(stderr::Stderr::open()?)
    }

    fn start(output: impl Write + Send + 'static) -> io::Result<(Self, LogGuard)> {
        let sink = Self(Arc::default());
        let writer = sink.clone();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || writer.write_lines(output))?;
        Ok((sink.clone(), LogGuard(sink)))
    }

    /// Counts dropped lines here as well, including earlier ones.
    pub(super) fn count_dropped(&self, counter: &IntCounter) {
        let mut state = self.state();
        counter.inc_by(state.dropped_ever);
        state.counter = Some(counter.clone());
    }

    /// Takes one line, its end included, or drops it; never waits for the output.
    pub(super) fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if state.has_ended {
            return;
        }
        if state.lines.len().saturating_add(line.len()) > BUFFER && !WRITES.get() {
            state.drop_lines(1);
            return;
        }
        state.lines.extend_from_slice(line);
        // Unlocked first, since the woken thread takes the lock.
        drop(state);
        self.0.filled.notify_one();
    }

    /// Writes lines until the end.
    fn write_lines(&self, mut output: impl Write) {
        WRITES.set(true);
        let mut lines = Vec::new();
        while self.take(&mut lines) {
            let dropped = match write_whole_lines(&mut output, &lines) {
                Ok(()) => std::mem::take(&mut self.state().dropped),
                Err(unwritten) => {
                    self.state().drop_lines(unwritten);
                    0
                }
            };
            if dropped > 0 {
                tracing::warn!(
                    lines = dropped,
                    "log lines were dropped; hint: the reader of standard error does not keep up"
                );
            }
        }
    }

    /// Waits for lines and exchanges them for `written` ones; false at the end.
    fn take(&self, written: &mut Vec<u8>) -> bool {
        written.clear();
        // Frees the memory of a backlog.
        written.shrink_to(64 * 1024);
        let mut state = self.state();
        state.is_writing = false;
        loop {
            if !state.lines.is_empty() {
                // Swapped, so that the lock is not held while writing.
                std::mem::swap(&mut state.lines, written);
                // The lines have left the buffer unwritten: the guard must wait for them all the same.
                state.is_writing = true;
                return true;
            }
            self.0.emptied.notify_all();
            if state.has_ended {
                return false;
            }
            state = self
                .0
                .filled
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        let shared = &self.0.0;
        let unwritten = |state: &mut State| state.is_writing || !state.lines.is_empty();
        let waited = shared
            .emptied
            .wait_timeout_while(self.0.state(), FLUSH, unwritten);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.has_ended = true;
        drop(state);
        shared.filled.notify_one();
    }
}

/// One line, as the formatting layer wants to write it.
impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes `lines`, several at a time where they are short; the error is the number of those that were not written.
fn write_whole_lines(output: &mut impl Write, lines: &[u8]) -> Result<(), u64> {
    let mut rest = lines;
    while !rest.is_empty() {
        let (chunk, after) = rest.split_at(whole_lines(rest));
        if output.write_all(chunk).is_err() {
            return Err(count_lines(rest));
        }
        rest = after;
    }
    Ok(())
}

/// The length of the first lines that fit into one atomic write; of one line at least.
fn whole_lines(lines: &[u8]) -> usize {
    let within = lines.get(..ATOMIC).unwrap_or(lines);
    let end = within.iter().rposition(|&byte| byte == b'\n');
    let end = end.or_else(|| lines.iter().position(|&byte| byte == b'\n'));
    end.map_or(lines.len(), |end| end.saturating_add(1))
}

fn count_lines(lines: &[u8]) -> u64 {
    lines
        .split_inclusive(|&byte| byte == b'\n')
        .fold(0, |count, _| count + 1)
}

/// Standard error by a descriptor of its own: the lock of `io::stderr` would be held for as long as nothing is read.
#[cfg(unix)]
mod stderr {
    use std::{
        fs::File,
        io::{self, Write},
        os::fd::AsFd,
    };

    use rustix::event::{PollFd, PollFlags, poll};

    #[derive(Debug)]
    pub(super) struct Stderr(File);

    impl Stderr {
        pub(super) fn open() -> io::Result<Self> {
            let descriptor = io::stderr().as_fd().try_clone_to_owned()?;
            Ok(Self(descriptor.into()))
        }
    }

    impl Write for Stderr {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            loop {
                match self.0.write(bytes) {
                    // Another process that shares the pipe may have made it non-blocking.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        poll(&mut [PollFd::new(&self.0, PollFlags::OUT)], None)?;
                    }
                    written => return written,
                }
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}

/// std's, which converts the text for a console.
#[cfg(windows)]
mod stderr {
    use std::io;

    pub(super) struct Stderr;

    impl Stderr {
        #[expect(clippy::unnecessary_wraps, reason = "fails on Unix")]
        pub(super) fn open() -> io::Result<io::Stderr> {
            Ok(io::stderr())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{PipeReader, Read, pipe},
        sync::mpsc,
    };

    use super::*;

    /// Fills a pipe, and returns how much it holds.
    fn clogged() -> (PipeReader, Sink, LogGuard) {
        let (reader, writer) = pipe().unwrap();
        let (sink, guard) = Sink::start(writer).unwrap();
        (reader, sink, guard)
    }

    fn line(number: usize) -> Vec<u8> {
        format!("{number:0>127}\n").into_bytes()
    }

    #[test]
    fn lines_that_find_no_room_are_dropped_and_counted() {
        let (mut reader, sink, guard) = clogged();
        let counter = IntCounter::new("dropped", "lines").unwrap();
        sink.count_dropped(&counter);
        let pushed = 4 * BUFFER / 128;
        for number in 0..pushed {
            sink.push(&line(number));
        }
        let dropped = usize::try_from(counter.get()).unwrap();
        assert!(dropped >= pushed / 4, "{dropped} of {pushed}");
        let (done, read) = mpsc::channel();
        thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            done.send(all).unwrap();
        });
        drop(guard);
        let read = String::from_utf8(read.recv().unwrap()).unwrap();
        // What was not dropped is whole, and in order.
        let numbers: Vec<usize> = read.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(numbers.len(), pushed - dropped);
        assert!(numbers.is_sorted() && read.lines().all(|line| line.len() == 127));
    }

    #[test]
    fn the_end_does_not_wait_for_a_reader_for_ever() {
        let (_reader, sink, guard) = clogged();
        for number in 0..BUFFER / 64 {
            sink.push(&line(number));
        }
        drop(guard);
        sink.push(b"late\n");
        assert!(sink.state().has_ended);
    }

    #[test]
    fn a_reader_that_has_gone_costs_lines_and_nothing_else() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let (sink, guard) = Sink::start(writer).unwrap();
        sink.push(b"one\n");
        drop(guard);
        assert_eq!(sink.state().dropped_ever, 1);
    }

    #[test]
    fn lines_are_written_whole() {
        let lines = [b"a\n".repeat(3000), b"b".repeat(5000), b"\nc\n".to_vec()].concat();
        assert_eq!(whole_lines(&lines), ATOMIC);
        assert_eq!(whole_lines(&lines[6000..]), 5001);
        assert_eq!(whole_lines(&lines[11_001..]), 2);
        assert_eq!(count_lines(&lines), 3002);
    }
}
