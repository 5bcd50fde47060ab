//! The discovery of an endpoint: looks up what its settings leave open, until that succeeds.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::{
    AppError,
    endpoint::{Endpoints, Served},
    locate::{EndpointSource, LocatedEndpoint, locate},
    outcomes::Reporter,
};
use crate::{
    config::EndpointConfig,
    credential::{Pace, is_held_for},
    net::{backoff::jitter, tcp::leads_to},
    protocol::error::{Report, sqlstate},
    telemetry::{chain, labels::Reason},
    upstream::{Problem, Refusal, RoutePublisher},
};

/// Budget of one request to the workspace, retries included. Short, since the pace of attempts retries as well.
const REQUEST_BUDGET: Duration = Duration::from_secs(2);

/// The discovery of one endpoint.
pub(super) struct Discovery {
    pub(super) served: Arc<Served>,
    pub(super) source: EndpointSource,
    pub(super) endpoints: Endpoints,
    pub(super) finder: RoutePublisher,
    pub(super) reporter: Option<Reporter>,
}

impl Discovery {
    /// Tries until the endpoint is found. Retries follow the pace of credential requests, which fail for the same reasons.
    pub(super) async fn run(&self) -> LocatedEndpoint {
        let mut pace = Pace::new(Instant::now());
        // Attempts follow within seconds; a line for each would hide other events.
        let mut logged = None;
        loop {
            let error = match self.attempt().await {
                Ok(located) => return located,
                Err(error) => error,
            };
            let (kind, retry_after) = (error.kind, error.retry_after);
            pace.failed(Instant::now(), kind, retry_after, jitter);
            self.finder.failed(Problem {
                refusal: refusal(&self.served.config, &error),
                is_held_for: is_held_for(kind, retry_after),
                opens_at: pace.awaited(),
            });
            self.log(&error, &mut logged);
            if let Some(reporter) = &self.reporter {
                reporter.failed(error);
            }
            loop {
                // A client that arrives during the wait moves the attempt forward, so that the wait is computed again.
                let next = pace.next_without(self.finder.demand().exists());
                tokio::select! {
                    () = sleep_until(next) => break,
                    () = self.finder.demand().added() => {}
                }
            }
        }
    }

    async fn attempt(&self) -> Result<LocatedEndpoint, AppError> {
        // Retries within an attempt save a search of many requests from starting again.
        let located = locate(&self.served.config, &self.source, REQUEST_BUDGET).await?;
        refuse_loop(&located, &self.endpoints).await?;
        Ok(located)
    }

    /// Logs each error once, except the one that ends the program.
    fn log(&self, error: &AppError, logged: &mut Option<String>) {
        let text = chain(error).to_string();
        if logged.as_ref() == Some(&text) {
            return;
        }
        let endpoint = self.served.config.called();
        if error.kind.is_transient() {
            tracing::warn!(
                endpoint,
                error = text,
                hint = error.hint(),
                "cannot look up the endpoint, retrying"
            );
        } else if self.reporter.as_ref().is_none_or(Reporter::has_others) {
            // Without others this error ends the program, which prints it.
            tracing::error!(
                endpoint,
                error = text,
                hint = error.hint(),
                "endpoint cannot be used for now; others are served"
            );
        }
        *logged = Some(text);
    }
}

fn refusal(config: &EndpointConfig, error: &AppError) -> Refusal {
    let mut report = Report::new(
        sqlstate::CANNOT_CONNECT,
        format!(
            "Lakebase endpoint `{}` cannot be used: {}",
            config.called(),
            chain(error)
        ),
    );
    report.hint = error.hint().map(str::to_owned);
    Refusal {
        report,
        // `Waking` marks what a retry may fix: `Running::proxy_address` waits on for it.
        reason: if error.kind.is_transient() {
            Reason::Waking
        } else {
            Reason::Other
        },
    }
}

/// Refuses an upstream that is one of our own listeners: each connection would open another.
async fn refuse_loop(located: &LocatedEndpoint, endpoints: &Endpoints) -> Result<(), AppError> {
    let endpoint = &located.endpoint;
    let ours = endpoints.addresses();
    // No listener has the port: a loop is impossible, and the host need not be resolved.
    if !ours.iter().any(|ours| ours.port() == endpoint.port) {
        return Ok(());
    }
    // A name that does not resolve yet passes; the login reports the error.
    let resolved = match endpoint.addresses.as_fixed() {
        Some(fixed) => fixed.to_vec(),
        None => tokio::net::lookup_host((endpoint.host.as_str(), endpoint.port))
            .await
            .map(Iterator::collect)
            .unwrap_or_default(),
    };
    let is_ours = |address: SocketAddr| ours.iter().any(|ours| leads_to(address, *ours));
    if resolved.into_iter().any(is_ours) {
        return Err(AppError::new(
            format!("PGHOST `{}` with PGPORT {} is this proxy itself", endpoint.host, endpoint.port),
            Some("PGHOST and PGPORT name the Lakebase endpoint, --address and --port where this proxy listens".to_owned()),
        ));
    }
    Ok(())
}
