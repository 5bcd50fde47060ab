//! The events of a console (SetConsoleCtrlHandler), which a program without a window gets instead of signals; those that run
//! programs as services send the first two.

use std::{future::pending, io};

use tokio::signal::windows::{
    CtrlBreak, CtrlC, CtrlClose, CtrlLogoff, CtrlShutdown, ctrl_break, ctrl_c, ctrl_close,
    ctrl_logoff, ctrl_shutdown,
};

use super::Cause;

/// The events that end the program. Caught from its creation on.
#[derive(Debug)]
pub struct Signals {
    interrupt: CtrlC,
    terminate: CtrlBreak,
    close: CtrlClose,
    logoff: CtrlLogoff,
    shutdown: CtrlShutdown,
}

impl Signals {
    /// Starts to catch them.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            interrupt: ctrl_c()?,
            terminate: ctrl_break()?,
            close: ctrl_close()?,
            logoff: ctrl_logoff()?,
            shutdown: ctrl_shutdown()?,
        })
    }

    /// The next one. Cancel safe.
    pub async fn next(&mut self) -> Cause {
        tokio::select! {
            _ = self.interrupt.recv() => Cause::Interrupt,
            _ = self.terminate.recv() => Cause::Terminate,
            // After these the system ends the process within seconds, whatever it does.
            _ = self.close.recv() => Cause::Terminate,
            _ = self.logoff.recv() => Cause::Terminate,
            _ = self.shutdown.recv() => Cause::Terminate,
        }
    }
}

/// No event stands for a reload: `--watch-config` does it.
#[derive(Debug)]
pub struct ReloadSignal(());

impl ReloadSignal {
    /// As on Unix.
    pub fn catch() -> io::Result<Self> {
        Ok(Self(()))
    }

    /// Never completes.
    pub async fn next(&mut self) {
        pending::<()>().await;
    }
}
