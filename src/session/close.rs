//! The end of a session that has no relay: silent, or with an error for the client.

use jiff::Timestamp;

use super::{Session, client::Client};
use crate::{
    net::socket::Transport,
    protocol::error::{Report, sqlstate},
    shutdown::Shutdown,
    telemetry::labels::Reason,
    upstream::Refusal,
};

/// How a session without a relay ends.
pub(super) enum Closing {
    /// The client has been served, or has left.
    Silent,
    /// In favor of newer handshakes.
    Evicted(Report),
    /// With an error that is logged and counted.
    // A box, as every phase returns this type.
    Refused(Box<Refusal>),
}

impl Closing {
    pub(super) fn refused(report: Report, reason: Reason) -> Self {
        Refusal { report, reason }.into()
    }
}

impl From<Refusal> for Closing {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

impl Session<'_> {
    pub(super) async fn close<S: Transport>(&self, client: &mut Client<S>, closing: Closing) {
        match closing {
            Closing::Silent => {}
            // Without waiting for the client: the descriptor is what is short. The log line is one of the limiter's, so
            // that a flood does not fill the log.
            Closing::Evicted(report) => {
                client.finish(&report.encode_fatal()).await;
            }
            Closing::Refused(refusal) => self.refuse(client, *refusal).await,
        }
    }

    async fn refuse<S: Transport>(&self, client: &mut Client<S>, refusal: Refusal) {
        let Refusal { mut report, reason } = refusal;
        let recent = self.endpoint.registry.registry().recent();
        let label = self.endpoint.route.label();
        recent.refused(self.id, label, reason, &report, Timestamp::now());
        self.count_refusal(reason);
        tracing::warn!(
            session = self.id,
            reason = reason.as_str(),
            sqlstate = report.sqlstate,
            detail = report.detail,
            hint = report.hint,
            "client refused: {}",
            report.message
        );
        let mut detail = report.detail.take().unwrap_or_default();
        if !detail.is_empty() {
            detail.push(' ');
        }
        // By this id the log line of a user's error is found.
        report.detail = Some(format!("{detail}(lakebase-proxy session {})", self.id));
        // A client that has not read the error in time is not waited for again.
        if client.finish(&report.encode_fatal()).await {
            client.linger().await;
        }
    }

    pub(super) fn count_refusal(&self, reason: Reason) {
        self.endpoint.metrics.clients_refused[reason].inc();
    }
}

pub(super) fn shutting_down() -> Refusal {
    Refusal {
        // 57P03: libpq then tries the next host of its list (fe-connect.c).
        report: Report::new(
            sqlstate::CANNOT_CONNECT_NOW,
            "lakebase-proxy is shutting down",
        )
        .with_hint("Connect again once it has restarted, or to another host."),
        reason: Reason::ShuttingDown,
    }
}

/// For a session that is ended by us, as PostgreSQL ends it: pools such as HikariCP then discard the connection.
pub(super) fn shut_down(shutdown: &Shutdown) -> Report {
    let message = if shutdown.is_alone() {
        "terminating connection due to administrator command"
    } else {
        "terminating connection because lakebase-proxy is shutting down"
    };
    Report::new(sqlstate::ADMIN_SHUTDOWN, message).with_hint("Connect again.")
}
