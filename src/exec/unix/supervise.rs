//! Forwards signals to the child until it has ended.

use std::{future::pending, pin::pin, process::ExitCode, time::Duration};

use rustix::process::{Signal, getpid, kill_process};
use tokio::time::{Instant, sleep_until};

use super::{
    child::{Child, Event, killed_by},
    signals::{Signals, is_in_foreground},
};
use crate::shutdown::Cause;

/// The longest part of the grace time that is kept for the sessions.
const MAX_SESSION_GRACE: Duration = Duration::from_secs(1);
/// Limit for the end of a killed program; one that waits for a device may never end.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// The end of a child.
pub(crate) struct Exit {
    /// Its exit code; 128 and more if a signal killed it.
    pub(crate) code: u8,
    terminated: Option<Termination>,
}

/// The SIGTERM that was sent to the child.
struct Termination {
    cause: Cause,
    at: Instant,
}

impl Exit {
    /// The time since the child was sent SIGTERM; zero if it ended by itself.
    pub(crate) fn since_termination(&self) -> Duration {
        self.terminated
            .as_ref()
            .map_or(Duration::ZERO, |terminated| terminated.at.elapsed())
    }

    /// The exit code of the proxy. A child that ended by the SIGTERM it was sent did as requested.
    pub(crate) fn exit_code(&self, zero_on_sigterm: bool) -> ExitCode {
        let as_requested = match self.terminated.as_ref().map(|terminated| terminated.cause) {
            Some(Cause::Request) => true,
            Some(Cause::Terminate) => zero_on_sigterm,
            Some(Cause::Hangup | Cause::Interrupt) | None => false,
        };
        let is_zero = as_requested && self.code == killed_by(Signal::TERM);
        ExitCode::from(if is_zero { 0 } else { self.code })
    }
}

/// Forwards signals until the child has ended. `request`, like SIGTERM, ends it, with a kill before the end of `grace`.
pub(crate) async fn supervise(
    mut child: Child,
    grace: Duration,
    request: impl Future<Output = ()>,
    signals: &mut Signals,
) -> Exit {
    // The program's sessions must end within the grace time, too.
    let kill_after = grace.saturating_sub((grace / 10).min(MAX_SESSION_GRACE));
    let mut request = pin!(request);
    let mut terminated: Option<Termination> = None;
    let mut kill_at = None;
    let mut give_up_at = None;
    loop {
        let cause = tokio::select! {
            event = child.next() => match event {
                Event::Ended(code) => return Exit { code, terminated },
                Event::Stopped => {
                    stop_with(&child);
                    continue;
                }
            },
            signal = signals.next() => match signal {
                Signal::TERM if terminated.is_some() => {
                    kill_at = Some(Instant::now());
                    continue;
                }
                Signal::TERM => Cause::Terminate,
                // Sent by keys, to the child as well.
                Signal::INT | Signal::QUIT if is_in_foreground() => continue,
                signal => {
                    child.send(signal);
                    continue;
                }
            },
            // A future that has completed must not be polled again.
            () = &mut request, if terminated.is_none() => Cause::Request,
            () = until(kill_at) => {
                tracing::warn!(pid = child.id(), "program did not end after SIGTERM; killed");
                child.send(Signal::KILL);
                kill_at = None;
                give_up_at = Some(Instant::now() + KILL_TIMEOUT);
                continue;
            }
            () = until(give_up_at) => {
                let code = killed_by(Signal::KILL);
                return Exit { code, terminated };
            }
        };
        let at = Instant::now();
        terminated = Some(Termination { cause, at });
        kill_at = Some(at + kill_after);
        child.send(Signal::TERM);
        // A stopped program does not handle SIGTERM.
        child.send(Signal::CONT);
    }
}

/// Stops this process with a child that has stopped itself: otherwise the shell would not take the terminal back. The
/// terminal's own stop signal reaches both.
fn stop_with(child: &Child) {
    if is_in_foreground() && kill_process(getpid(), Signal::STOP).is_ok() {
        child.send(Signal::CONT);
    }
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => pending().await,
    }
}
