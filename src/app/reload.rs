//! Reloads settings: everything that can fail is prepared first, then all of it is applied, or nothing.

use std::{future::pending, path::PathBuf, sync::Arc};

use super::{
    App, AppError, Served,
    discovery::security,
    endpoint::roots,
    serving::{BoundEndpoint, serve},
    shared::{self, Shared},
};
use crate::{
    config::{Change, Config, ConfigError, EndpointConfig, Source},
    listener::{self, Listener},
    net::{FileWatch, blocking, tls::Fingerprint},
    session::AccessPolicy,
    shutdown::{Phase, ReloadSignal},
    telemetry::{chain, labels::ReloadOutcome, logging::check_filter},
    upstream::{Endpoint, Security},
};

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
    roots: Vec<NewRoots>,
    access: Arc<AccessPolicy>,
}

/// Trusted roots that an endpoint's file holds now.
struct NewRoots {
    served: Arc<Served>,
    fingerprint: Option<Fingerprint>,
    security: Security,
}

impl App {
    /// The reloader of this program, whose settings are `config`.
    pub fn reloader(&self, source: Source, config: Config) -> Reloader {
        Reloader {
            shared: Arc::clone(&self.shared),
            source,
            config,
        }
    }

    /// Reloads at each `signal` and, with `--watch-config`, when a file changes.
    pub fn reload_on(&self, mut reloader: Reloader, mut signal: Option<ReloadSignal>) {
        let is_watching = reloader.config.settings.watch_config();
        let reloading = async move {
            // Marked before the check below, so that every change is found by one or the other.
            let mut watch = reloader.watch().await;
            // The files may have changed during the start.
            if is_watching && reloader.is_out_of_date().await {
                let _ = reloader.reload().await;
            }
            loop {
                let signaled = async {
                    match &mut signal {
                        Some(signal) => signal.next().await,
                        // `exec` passes none, as it forwards SIGHUP to its child.
                        None => pending().await,
                    }
                };
                tokio::select! {
                    () = signaled => {}
                    () = watch.changed(), if is_watching => {}
                }
                // Before reading, so that no later change is missed.
                watch = reloader.watch().await;
                // The log and the metrics have the result.
                let _ = reloader.reload().await;
            }
        };
        self.shared.run(Box::pin(reloading));
    }
}

impl Reloader {
    /// Loads the settings again and applies what differs; `None` if nothing does. After an error the settings in force stay.
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

    /// The files of the settings in force, as they are now.
    async fn watch(&self) -> FileWatch {
        let watch = FileWatch::new(self.source.files(&self.config));
        watch.mark().await;
        watch
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
            return Err(AppError::new("the proxy is shutting down", None::<String>));
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
        let served = self.shared.endpoints.now();
        let (draining, staying): (Vec<_>, Vec<_>) =
            served.iter().partition(|served| served.is_draining());
        for served in staying {
            prepared.roots.extend(new_roots(served).await?);
        }
        for endpoint in &change.added {
            let mut draining = draining.iter().copied();
            let same = draining
                .clone()
                .find(|served| served.config.has_same_listener(endpoint));
            // A removed endpoint that comes back while its sessions drain still has its listener: it serves again.
            if let Some(before) = same
                && before.config.has_same_config(endpoint)
                && !before.context.registry.closed().is_cancelled()
            {
                prepared.resumed.push(Arc::clone(before));
                continue;
            }
            let listener = bind(&mut draining, endpoint).await?;
            let bound = BoundEndpoint::new(&self.shared, endpoint.clone(), listener).await?;
            prepared.added.push(bound);
        }
        Ok(prepared)
    }

    /// The Unix sockets of endpoints that stay and have other permissions in `new`.
    fn mode_changes(&self, new: &Config) -> Vec<ModeChange> {
        let mut changes = Vec::new();
        for served in self.shared.endpoints.now().iter() {
            let unix = |config: &Config| {
                let mut endpoints = config.endpoints.iter();
                let same = endpoints.find(|it| it.has_same_listener(&served.config))?;
                same.listen.unix.clone()
            };
            let Some((old, new)) = unix(&self.config).zip(unix(new)) else {
                continue;
            };
            if old.mode != new.mode {
                let paths = served.bound.unix.iter();
                changes.extend(paths.map(|path| ModeChange {
                    served: Arc::clone(served),
                    path: path.clone(),
                    mode: new.mode,
                    widens: new.mode & !old.mode != 0,
                }));
            }
        }
        changes
    }

    fn commit(&mut self, change: &Change, prepared: Prepared) {
        let new = &change.config;
        if let Some(log) = &self.shared.log
            && new.settings.log_filter() != self.config.settings.log_filter()
            && let Err(error) = log.set_filter(&new.settings.log_filter())
        {
            tracing::warn!(error = %chain(&error), "cannot change the log filter");
        }
        let changes_exposure = ["client_tls", "local_auth", "unix_socket_allowed_uids"]
            .iter()
            .any(|setting| change.applied.contains(setting));
        // Narrowing before and widening after: a socket is never open to users that neither the old nor the new settings allow.
        let modes = self.mode_changes(new);
        modes
            .iter()
            .filter(|it| !it.widens)
            .for_each(ModeChange::apply);
        self.shared.apply(new, prepared.access);
        modes
            .iter()
            .filter(|it| it.widens)
            .for_each(ModeChange::apply);
        for roots in prepared.roots {
            if let Some(upstream) = roots.served.context.route.found() {
                let endpoint = Endpoint::clone(&upstream.endpoint());
                upstream.redirect(Endpoint {
                    security: roots.security,
                    ..endpoint
                });
                roots.served.roots.store(Arc::new(roots.fingerprint));
            }
        }
        let served = self.shared.endpoints.now();
        for endpoint in &change.removed {
            // An endpoint that drains since an earlier reload may have had the same addresses.
            let mut staying = served.iter().filter(|served| !served.is_draining());
            if let Some(served) = staying.find(|served| served.config.has_same_listener(endpoint)) {
                served.context.registry.drain();
            }
        }
        for served in prepared.resumed {
            // If its last session ends at this moment, the next reload binds it again.
            served.context.registry.resume();
        }
        if changes_exposure {
            for served in served.iter() {
                served.warn_of_exposure(&self.shared.process.config.load_full().access);
            }
        }
        let mut added = Vec::with_capacity(prepared.added.len());
        for endpoint in prepared.added {
            // Here, so that a reload that fails leaves no labels in the metrics.
            match self
                .shared
                .metrics
                .of_another(endpoint.config.display_name())
            {
                Ok(metrics) => added.push((endpoint, metrics)),
                Err(error) => tracing::error!(%error, "cannot register metrics"),
            }
        }
        // Discovery of an added endpoint never ends the program.
        serve(&self.shared, added, false);
        self.config = new.clone();
    }
}

/// New permissions of a Unix socket.
struct ModeChange {
    served: Arc<Served>,
    path: PathBuf,
    mode: u32,
    /// A change that adds some bits and removes others counts as one that widens.
    widens: bool,
}

impl ModeChange {
    fn apply(&self) {
        let listen = &self.served.config.listen;
        if let Err(error) = listener::set_socket_mode(listen, &self.path, self.mode) {
            // A warning only: the other changes of the reload cannot be undone any more.
            tracing::warn!(socket = %self.path.display(), %error, "cannot change the permissions of a socket");
        }
    }
}

/// The roots of an endpoint whose file of them has changed.
async fn new_roots(served: &Arc<Served>) -> Result<Option<NewRoots>, AppError> {
    let fingerprint = roots(&served.config).await;
    if fingerprint == **served.roots.load() {
        return Ok(None);
    }
    // Before it is found, discovery reads the file as it is at its next attempt.
    let Some(upstream) = served.context.route.found() else {
        return Ok(None);
    };
    let (tls, endpoint) = (served.config.tls.clone(), upstream.endpoint());
    Ok(Some(NewRoots {
        served: Arc::clone(served),
        fingerprint,
        security: blocking(move || security(&tls, &endpoint.host)).await?,
    }))
}

/// Binds an endpoint's listener, if necessary after closing removed endpoints that still listen on its address.
async fn bind(
    draining: impl Iterator<Item = &Arc<Served>>,
    endpoint: &EndpointConfig,
) -> Result<Listener, AppError> {
    for before in draining {
        if before.config.listen.conflict(&endpoint.listen).is_some() {
            // It was open for cancel requests only, since a removed endpoint refuses sessions: a failed reload need not
            // open it again.
            before.context.registry.close();
            before.accepting.wait().await;
        }
    }
    Ok(Listener::bind(&endpoint.listen)?)
}

/// Logs what was applied, and what needs a restart.
fn log_change(change: &Change) {
    let names = |endpoints: &[EndpointConfig]| {
        let names: Vec<&str> = endpoints.iter().map(EndpointConfig::display_name).collect();
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
