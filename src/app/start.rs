//! Starting a bound program.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{App, AppError, Running, outcomes::Outcomes};
use crate::{
    admin::{self, Admin, AdminState},
    config::{DurationSetting, Settings},
    status::{HttpListener, Registry},
};

impl App {
    /// Starts everything.
    pub fn start(self) -> Result<Running, AppError> {
        let Self {
            bound,
            http,
            notes,
            admin,
            addresses,
            shared,
        } = self;
        let shared = Arc::new(shared);
        let Some(first) = bound.first().map(|endpoint| Arc::clone(&endpoint.served)) else {
            return Err(super::no_endpoint());
        };
        let (helpers, stop) = (&shared.helpers, &shared.stop);
        let health = Arc::clone(&shared.health);
        let http_listeners = [
            ("health and metrics", addresses.http),
            ("notes page", addresses.notes),
            ("/quitquitquit", addresses.admin),
        ];
        let http_listener = |(purpose, address): (_, Option<_>)| {
            address.map(|address| HttpListener { purpose, address })
        };
        let http_listeners = http_listeners.into_iter().filter_map(http_listener);
        shared.observer.http.set(http_listeners.collect()).ok();
        // Liveness checks every runtime: a blocked one serves no client, whatever the main runtime does.
        let (beating, beat_stop) = (Arc::clone(&health), stop.clone());
        let runtimes = Arc::clone(&shared.runtimes);
        helpers.spawn(async move {
            let all_respond = || {
                let runtimes = Arc::clone(&runtimes);
                async move { runtimes.all_respond().await }
            };
            beating.beat(&beat_stop, all_respond).await;
        });
        let http = http
            .map(|listener| {
                let (snapshots, logins) =
                    (Arc::clone(&shared.observer), Arc::clone(&shared.observer));
                let state = AdminState {
                    metrics: Arc::clone(&shared.metrics),
                    health: Arc::clone(&health),
                    snapshot: Arc::new(move || snapshots.snapshot()),
                    logins: Arc::new(move || logins.login_targets()),
                    log: shared.log.clone(),
                };
                Admin::spawn(listener, state, stop.clone())
            })
            .transpose()?;
        if let Some(interval) = shared.notifier.watchdog_interval() {
            let (health, notifier) = (Arc::clone(&health), shared.notifier.clone());
            helpers.spawn(stop.clone().run_until_cancelled_owned(async move {
                // On the main runtime, so that it stops when that blocks.
                loop {
                    if health.liveness().is_ok() {
                        notifier.alive();
                    }
                    sleep(interval).await;
                }
            }));
        }
        if let Some(log) = shared.log.clone() {
            let stop = stop.clone();
            helpers.spawn(async move {
                stop.run_until_cancelled(log.summarize()).await;
            });
        }
        let (reporters, outcomes) = Outcomes::of(bound.len());
        for (endpoint, reporter) in bound.into_iter().zip(reporters) {
            endpoint.start(&shared, Some(reporter));
        }
        #[cfg(feature = "notes")]
        if let Some(listener) = notes {
            let address = addresses
                .endpoints
                .first()
                .and_then(crate::listener::Bound::client_address);
            let stop = stop.clone();
            match address.map(crate::notes::NotesOptions::new) {
                Some(mut options) => {
                    options.password = shared.known_password.clone();
                    helpers.spawn(async move {
                        if let Err(error) = crate::notes::serve(listener, options, stop).await {
                            tracing::error!(%error, "the server of the notes page failed");
                        }
                    });
                }
                None => tracing::error!(
                    "the notes page has no address to connect to; hint: name the inherited Unix socket .s.PGSQL.<port>"
                ),
            }
        }
        #[cfg(not(feature = "notes"))]
        drop(notes);
        let end_requested = CancellationToken::new();
        if let Some(listener) = admin {
            helpers.spawn(admin::quit::serve(
                listener,
                end_requested.clone(),
                stop.clone(),
            ));
        }
        let (idle, over) = (end_requested.clone(), stop.clone());
        let until_idle = until_idle(
            shared.registry.clone(),
            shared.observer.settings.subscribe(),
        );
        helpers.spawn(async move {
            if let Some(time) = over.run_until_cancelled(until_idle).await {
                tracing::info!(
                    ?time,
                    "no client for this time; shutting down (--exit-when-idle)"
                );
                idle.cancel();
            }
        });
        if let Some(address) = addresses.admin {
            tracing::info!(%address, "answering /quitquitquit");
        }
        if let Some(address) = addresses.http {
            tracing::info!(%address, "serving health and metrics");
        }
        if let Some(address) = addresses.notes {
            tracing::info!(%address, "serving the notes page");
        }
        // With the connection test, `ready` reports startup once it has passed.
        if !shared.settings().run_connection_test() {
            health.set_started();
        }
        Ok(Running {
            addresses,
            shared: Arc::clone(&shared),
            first,
            http,
            end_requested,
            outcomes,
        })
    }
}

/// Returns after the idle time of the settings without a session; never without one. Cancel safe.
async fn until_idle(registry: Registry, mut settings: watch::Receiver<Settings>) -> Duration {
    loop {
        let DurationSetting(limit) = settings.borrow_and_update().exit_when_idle();
        // A reload of other settings must not restart the idle time.
        let is_changed = |settings: &Settings| settings.exit_when_idle().0 != limit;
        tokio::select! {
            () = registry.idle_for(limit), if !limit.is_zero() => return limit,
            Ok(_) = settings.wait_for(is_changed) => {}
        }
    }
}
