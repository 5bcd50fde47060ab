//! Reloads settings: everything that can fail is prepared first, then all of it is applied, or nothing.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    AppError, Served,
    locate::security,
    running::Running,
    serve::{self, BoundEndpoint},
    shared::{self, Shared},
};
use crate::{
    config::{Change, Config, ConfigError, EndpointConfig, Source},
    listener::{self, Listener},
    net::{FileWatch, blocking, tls::Fingerprint},
    session::AccessPolicy,
    shutdown::{Hangup, Phase},
    telemetry::{chain, labels::ReloadOutcome, logging::check_filter},
    upstream::{Endpoint, Security},
};

/// Limit for a listener to close.
const CLOSES_WITHIN: Duration = Duration::from_secs(1);

/// Applies new settings while the program runs.
pub struct Reloader {
    shared: Arc<Shared>,
    source: Source,
    config: Config,
}

/// A change for which everything that can fail is done.
struct Prepared {
    added: Vec<BoundEndpoint>,
    resumed: Vec<Arc<Served>>,
    roots: Vec<(Arc<Served>, Option<Fingerprint>, Security)>,
    access: Arc<AccessPolicy>,
}

impl Running {
    /// The reloader of this program, whose settings are `config`.
    pub fn reloader(&self, source: Source, config: Config) -> Reloader {
        Reloader {
            shared: Arc::clone(&self.shared),
            source,
            config,
        }
    }

    /// Reloads at each SIGHUP and, with `--watch-config`, when a file changes.
    pub fn reload_on(&self, mut reloader: Reloader, mut hangup: Option<Hangup>) {
        let stop = self.shared.stop.clone();
        let is_watching = reloader.config.settings.watch_config();
        let reloading = async move {
            let files = |reloader: &Reloader| reloader.source.files(&reloader.config);
            // Marked before the check below, so that every change is found by one or the other.
            let mut watch = FileWatch::new(files(&reloader));
            watch.mark().await;
            // The files may have changed during the start.
            if is_watching && reloader.is_out_of_date().await {
                let _ = reloader.reload().await;
            }
            loop {
                tokio::select! {
                    () = next(&mut hangup) => {}
                    () = watch.changed(), if is_watching => {}
                }
                // Before reading, so that no later change is missed.
                watch = FileWatch::new(files(&reloader));
                watch.mark().await;
                // The log and the metrics have the result.
                let _ = reloader.reload().await;
            }
        };
        self.shared
            .helpers
            .spawn(async move { Box::pin(stop.run_until_cancelled(reloading)).await });
    }
}

impl Reloader {
    /// Loads the settings again and applies what differs; `None` if nothing does. After an error the settings in force stay.
    ///
    /// Not cancel safe: the labels of endpoints that were prepared would stay in the metrics.
    pub async fn reload(&mut self) -> Result<Option<Change>, AppError> {
        let notifier = self.shared.notifier.clone();
        // Reports READY when dropped, whatever the outcome: with `Type=notify-reload`, systemd waits for that.
        let _reloading = notifier.reloading();
        let outcome = self.attempt().await;
        let metrics = &self.shared.metrics.process;
        let label = match &outcome {
            Ok(Some(change)) => {
                log_change(change);
                ReloadOutcome::Applied
            }
            Ok(None) => {
                tracing::info!("settings reloaded; nothing has changed");
                ReloadOutcome::Unchanged
            }
            Err(error) => {
                tracing::error!(error = %chain(error), hint = error.hint(), "settings not reloaded; the old ones stay in force");
                ReloadOutcome::Refused
            }
        };
        metrics.config_reloads[label].inc();
        metrics
            .config_last_reload_successful
            .set(i64::from(outcome.is_ok()));
        outcome
    }

    async fn load(&self) -> Result<Config, ConfigError> {
        let source = self.source.clone();
        blocking(move || source.load_again()).await
    }

    /// Whether a reload would apply or report anything.
    async fn is_out_of_date(&self) -> bool {
        let Ok(new) = self.load().await else {
            return true;
        };
        let change = self.config.change_to(new);
        if !change.is_empty() {
            return true;
        }
        let prepared = self.prepare(&change).await;
        prepared.map_or(true, |prepared| !prepared.roots.is_empty())
    }

    async fn attempt(&mut self) -> Result<Option<Change>, AppError> {
        if self.shared.process.shutdown.phase() != Phase::Serving {
            return Err(AppError::new("the proxy is shutting down", None));
        }
        let mut change = self.config.change_to(self.load().await?);
        // Before anything is bound: commit cannot fail any more.
        check_filter(&change.config.settings.log_filter())?;
        let prepared = self.prepare(&change).await?;
        if !prepared.roots.is_empty() {
            change.applied.push("PGSSLROOTCERT");
        }
        if change.is_empty() {
            return Ok(None);
        }
        self.commit(&change, prepared);
        Ok(Some(change))
    }

    /// Binds, reads and checks. A failure leaves the settings in force as they are.
    async fn prepare(&self, change: &Change) -> Result<Prepared, AppError> {
        let before = Arc::clone(&self.shared.process.config.load_full().access);
        let (old, new) = (self.config.clone(), change.config.clone());
        // Reads certificates and derives a SCRAM verifier: too long for the main runtime's thread.
        let access = blocking(move || shared::access_policy(&new, Some((&old, &before)))).await?;
        let mut prepared = Prepared {
            added: Vec::new(),
            resumed: Vec::new(),
            roots: Vec::new(),
            access: Arc::new(access),
        };
        if let Err(error) = self.fill(change, &mut prepared).await {
            // The labels of endpoints that were never served must not stay in the metrics.
            for endpoint in &prepared.added {
                endpoint.served.context.metrics.retire();
            }
            return Err(error);
        }
        Ok(prepared)
    }

    async fn fill(&self, change: &Change, prepared: &mut Prepared) -> Result<(), AppError> {
        let served = self.shared.endpoints.now();
        for served in served
            .iter()
            .filter(|one| !one.context.registry.is_draining())
        {
            // The system's roots are read at the start only.
            if !serve::has_roots_file(&served.config) {
                continue;
            }
            let config = served.config.clone();
            let roots = blocking(move || serve::roots(&config)).await;
            if roots == **served.roots.load() {
                continue;
            }
            // Before it is found, discovery reads the file as it is at its next attempt.
            if let Some(upstream) = served.context.route.found() {
                let (tls, endpoint) = (served.config.tls.clone(), upstream.endpoint());
                let security = blocking(move || security(&tls, &endpoint.host)).await?;
                prepared.roots.push((Arc::clone(served), roots, security));
            }
        }
        for endpoint in &change.added {
            let draining = || {
                let served = served.iter();
                served.filter(|served| served.context.registry.is_draining())
            };
            // A removed endpoint that comes back while its sessions drain still has its listener: it serves again.
            if let Some(before) =
                draining().find(|served| served.config.has_same_listener(endpoint))
                && before.config.has_same_config(endpoint)
                && !before.context.registry.closed().is_cancelled()
            {
                prepared.resumed.push(Arc::clone(before));
                continue;
            }
            let conflicting = draining()
                .filter(|served| served.config.listen.conflict(&endpoint.listen).is_some());
            let listener = bind(conflicting, endpoint).await?;
            let metrics = self.shared.metrics.of_another(endpoint.called())?;
            let bound = BoundEndpoint::new(
                &self.shared,
                endpoint.clone(),
                listener,
                Arc::clone(&metrics),
            )
            .await;
            prepared
                .added
                .push(bound.inspect_err(|_| metrics.retire())?);
        }
        Ok(())
    }

    /// Changes the permissions of Unix sockets of endpoints that stay.
    fn set_modes(&self, new: &Config, change: ModeChange) {
        let unix = |endpoint: &EndpointConfig| endpoint.listen.unix.clone();
        for served in self.shared.endpoints.now().iter() {
            let is_it = |endpoint: &&EndpointConfig| endpoint.has_same_listener(&served.config);
            let old = self.config.endpoints.iter().find(is_it).and_then(unix);
            let new = new.endpoints.iter().find(is_it).and_then(unix);
            let Some((old, new)) = old.zip(new) else {
                continue;
            };
            // A change that adds some bits and removes others counts as one that widens.
            let tightens = new.mode & !old.mode == 0;
            if old.mode == new.mode || tightens != (change == ModeChange::Tighten) {
                continue;
            }
            for path in &served.bound.unix {
                if let Err(error) = listener::set_socket_mode(&served.config.listen, path, new.mode)
                {
                    // A warning only: the other changes of the reload cannot be undone any more.
                    tracing::warn!(socket = %path.display(), %error, "cannot change the permissions of a socket");
                }
            }
        }
    }

    fn commit(&mut self, change: &Change, prepared: Prepared) {
        let Prepared {
            added,
            resumed,
            roots,
            access,
        } = prepared;
        if let Some(log) = &self.shared.log
            && change.config.settings.log_filter() != self.config.settings.log_filter()
            && let Err(error) = log.set_filter(&change.config.settings.log_filter())
        {
            tracing::warn!(error = %chain(&error), "cannot change the log filter");
        }
        let changes_exposure = ["client_tls", "local_auth", "unix_socket_allowed_uids"]
            .iter()
            .any(|setting| change.applied.contains(setting));
        // Narrowing before and widening after: a socket is never open to users that neither the old nor the new settings allow.
        self.set_modes(&change.config, ModeChange::Tighten);
        self.shared.apply(&change.config, access);
        self.set_modes(&change.config, ModeChange::Widen);
        for (served, fingerprint, security) in roots {
            if let Some(upstream) = served.context.route.found() {
                let endpoint = Endpoint::clone(&upstream.endpoint());
                upstream.redirect(Endpoint {
                    security,
                    ..endpoint
                });
                served.roots.store(Arc::new(fingerprint));
            }
        }
        let served = self.shared.endpoints.now();
        for endpoint in &change.removed {
            // An endpoint that drains since an earlier reload may have had the same addresses.
            let mut staying = served
                .iter()
                .filter(|served| !served.context.registry.is_draining());
            if let Some(served) = staying.find(|served| served.config.has_same_listener(endpoint)) {
                served.context.registry.drain();
            }
        }
        for served in resumed {
            // If its last session ends at this moment, the next reload binds it again.
            served.context.registry.resume();
        }
        if changes_exposure {
            for served in self.shared.endpoints.now().iter() {
                serve::warn_of_exposure(served, &self.shared.process.config.load_full().access);
            }
        }
        for endpoint in added {
            self.shared.endpoints.add(&endpoint.served);
            // No reporter: discovery of an added endpoint must not end the program.
            endpoint.start(&self.shared, None);
        }
        self.config = change.config.clone();
    }
}

/// The direction in which the permissions of sockets change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ModeChange {
    Tighten,
    Widen,
}

/// Binds an endpoint's listener, if necessary after closing removed endpoints that still listen on its address.
async fn bind(
    conflicting: impl Iterator<Item = &Arc<Served>>,
    endpoint: &EndpointConfig,
) -> Result<Listener, AppError> {
    let mut shut = false;
    for before in conflicting {
        // It was open for cancel requests only, since a removed endpoint refuses sessions: a failed reload need not
        // open it again.
        before.context.registry.close();
        shut = true;
    }
    if !shut {
        return Ok(Listener::bind(&endpoint.listen)?);
    }
    let deadline = Instant::now() + CLOSES_WITHIN;
    loop {
        // The old socket is closed by its accept loop, a moment after `close` returns.
        match Listener::bind(&endpoint.listen) {
            Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(5)).await,
            result => return Ok(result?),
        }
    }
}

/// Logs what was applied, and what needs a restart.
fn log_change(change: &Change) {
    let names = |endpoints: &[EndpointConfig]| {
        let names: Vec<&str> = endpoints.iter().map(EndpointConfig::called).collect();
        (!names.is_empty()).then(|| names.join(", "))
    };
    let applied = (!change.applied.is_empty()).then(|| change.applied.join(", "));
    let (added, removed) = (names(&change.added), names(&change.removed));
    if applied.is_some() || added.is_some() || removed.is_some() {
        tracing::info!(applied, added, removed, "settings reloaded");
    }
    if !change.restart.is_empty() {
        tracing::warn!(
            settings = change.restart.join(", "),
            "changed settings need a restart; their old values stay in force"
        );
    }
}

async fn next(hangup: &mut Option<Hangup>) {
    match hangup {
        Some(hangup) => hangup.next().await,
        // `exec` passes none, as it forwards SIGHUP to its child.
        None => std::future::pending().await,
    }
}
