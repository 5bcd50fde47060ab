//! `serve`: the proxy until a signal, and what `exec` shares with it.

use std::{future::pending, process::ExitCode, time::Duration};

use super::{CommandError, flags::warn_of_unknown_variables, start_log};
use crate::{
    app::{App, AppError, StartOptions},
    config::{Config, Environment, Settings, Source},
    listener::Inherited,
    shutdown::{Cause, ReloadSignal, Signals},
    systemd::Notifier,
    telemetry::{LogGuard, LogHandle},
};

/// A loaded configuration and an open log, before anything is bound.
pub(super) struct Prepared {
    pub(super) config: Config,
    log: LogHandle,
    notifier: Notifier,
}

impl Prepared {
    pub(super) fn load(source: &Source, log: &mut Option<LogGuard>) -> Result<Self, CommandError> {
        let config = source.load()?;
        let log = start_log(&config.settings.log_options(), log)?;
        warn_of_unknown_variables();
        let manager = &source.environment().service_manager;
        let notifier = Notifier::connect(manager).unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot connect to NOTIFY_SOCKET; the service manager gets no notifications");
            Notifier::default()
        });
        Ok(Self {
            config,
            log,
            notifier,
        })
    }

    /// Binds the listeners and starts serving.
    pub(super) async fn start(self, inherited: Inherited) -> Result<App, AppError> {
        let options = StartOptions {
            inherited,
            log: Some(self.log),
            notifier: self.notifier,
        };
        App::start_with(self.config, options).await
    }
}

/// Serves until a signal or a requested shutdown, and drains.
pub(super) async fn run(
    settings: Settings,
    inherited: Inherited,
    log: &mut Option<LogGuard>,
) -> Result<ExitCode, CommandError> {
    let source = Source::new(settings, Environment::of_process());
    let prepared = Prepared::load(&source, log)?;
    let config = prepared.config.clone();
    // Before the start, so that a signal during it is not lost.
    let mut signals = Signals::catch().map_err(CommandError::signals)?;
    let reload = ReloadSignal::catch().map_err(CommandError::signals)?;
    let running = tokio::select! {
        running = prepared.start(inherited) => running?,
        cause = signals.next() => {
            return Ok(cause.exit_code(config.settings.exit_zero_on_sigterm()));
        }
    };
    let reloader = running.reloader(source, config);
    running.reload_on(reloader, Some(reload));
    let cause = tokio::select! {
        cause = until_shutdown(&running) => cause,
        cause = signals.next() => Ok(cause),
    };
    let second_signal = async {
        signals.next().await;
    };
    // By the settings in force, which a reload may have changed.
    let zero_on_sigterm = running.is_zero_on_sigterm();
    match cause {
        Ok(Cause::Terminate) => running.end_after_delay(second_signal).await,
        // --min-sigterm-delay is for pods, whose other containers receive SIGTERM at the same time.
        Ok(Cause::Hangup | Cause::Interrupt | Cause::Request) => running.end(second_signal).await,
        // No endpoint can be used, so that no session has work to finish.
        Err(_) => running.end_within(Duration::ZERO, second_signal).await,
    }
    Ok(cause?.exit_code(zero_on_sigterm))
}

/// Logs how to connect, once the first endpoint has a credential or mints on demand.
async fn announce(running: &App) {
    let Ok(proxy) = running.proxy_address().await else {
        return;
    };
    if !running.is_lazy() {
        let mut credential = running.credentials().subscribe();
        let _ = credential.wait_for(|status| status.generation > 0).await;
    }
    let host = proxy.address.host();
    let host = match host.as_str() {
        "127.0.0.1" | "::1" => "localhost",
        other => other,
    };
    tracing::info!("ready: psql -h {host} -p {}", proxy.address.port());
}

/// Completes with a shutdown that was requested, or an error that retries cannot cure.
async fn until_shutdown(running: &App) -> Result<Cause, AppError> {
    running.ready().await?;
    let failed = async {
        match running.found().await {
            Ok(()) => {
                announce(running).await;
                pending().await
            }
            Err(error) => error,
        }
    };
    tokio::select! {
        () = running.shutdown_requested() => Ok(Cause::Request),
        error = failed => Err(error),
    }
}
