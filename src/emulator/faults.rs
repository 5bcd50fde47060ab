//! Faults on request: what goes wrong, where, and how often.
//!
//! Tests script them through [`Faults`]; people through `/emulator/faults`. A fault never changes what is legal: it
//! shows a client what a bad network, a tired API or a misconfigured server would.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::sleep};

use super::edge::ServerError;

/// The most faults kept at a time.
const MAX_FAULTS: usize = 1000;

/// Where a fault strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Site {
    /// The OIDC discovery document.
    Discovery,
    /// `POST /oidc/v1/token`.
    Token,
    /// `POST /api/2.0/postgres/credentials` and its Provisioned twin.
    Mint,
    /// Projects, branches, endpoints, instances, roles, databases.
    Lookup,
    /// SCIM `Me`.
    Whoami,
    /// GitHub, Entra ID, the instance metadata service and the local metadata service.
    Voucher,
    /// The edge, when a connection was accepted.
    Accept,
    /// The edge, after `SSLRequest` and before its answer.
    SslRequest,
    /// The edge, when TLS stands and nothing was said inside it.
    Tls,
    /// The edge, after the `StartupMessage`.
    Startup,
    /// The edge, after the password.
    Password,
    /// A session that is logged in; see [`Fault::after_bytes`].
    Session,
}

/// What happens there.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Action {
    /// HTTP: this answer instead of the real one.
    Respond(Response),
    /// Wait this many milliseconds, then go on to the next fault for the place, or to the real answer.
    Delay(u64),
    /// Never answer; the connection ends when the client leaves or the fault is cleared.
    Stall,
    /// Close without a word (FIN).
    Close,
    /// Close with a reset (RST).
    Reset,
    /// Edge: this `ErrorResponse`, then close.
    Error(ServerError),
    /// Edge: these bytes, which need not be Postgres, then close.
    Answer(String),
    /// Edge, at [`Site::SslRequest`]: refuse TLS with `N`.
    NoTls,
    /// Edge, at [`Site::SslRequest`]: go on with a certificate that must not be trusted.
    Certificate(BadCertificate),
}

/// An HTTP answer.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Body; absent means the API's usual error shape for the status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Content type of `body`.
    #[serde(default = "json_type")]
    pub content_type: String,
    /// The `Retry-After` header, as sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<String>,
}

impl Response {
    /// The API's own error shape with this status.
    pub fn status(status: u16) -> Self {
        Self {
            status,
            body: None,
            content_type: json_type(),
            retry_after: None,
        }
    }

    /// This body with this status.
    pub fn body(status: u16, body: impl Into<String>) -> Self {
        Self {
            body: Some(body.into()),
            ..Self::status(status)
        }
    }

    /// With a `Retry-After` header.
    #[must_use]
    pub fn retry_after(self, value: impl Into<String>) -> Self {
        Self {
            retry_after: Some(value.into()),
            ..self
        }
    }
}

fn json_type() -> String {
    "application/json".to_owned()
}

/// What is wrong with a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BadCertificate {
    /// It ended years ago.
    Expired,
    /// It names the endpoint, but an authority signed it that nobody trusts.
    OtherAuthority,
    /// It is for another host.
    WrongName,
}

/// One scripted fault.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Fault {
    /// Where.
    pub at: Site,
    /// What.
    #[serde(rename = "do")]
    pub action: Action,
    /// How often; absent means until cleared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub times: Option<u32>,
    /// For [`Site::Session`]: strike once this many bytes went to the client after login.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub after_bytes: u64,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "the signature serde asks for"
)]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// The list of faults; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    list: Arc<Mutex<Vec<Fault>>>,
    cleared: Arc<watch::Sender<u64>>,
    struck: Arc<watch::Sender<u64>>,
}

/// A fault that strikes now.
#[derive(Debug)]
pub(crate) struct Struck {
    pub(crate) action: Action,
    pub(crate) after_bytes: u64,
    pub(crate) cleared: Cleared,
}

/// Resolves when faults are cleared after this one struck.
#[derive(Debug)]
pub(crate) struct Cleared(watch::Receiver<u64>);

impl Cleared {
    /// Cancel safe.
    pub(crate) async fn wait(&mut self) {
        let _ = self.0.changed().await;
    }
}

impl Faults {
    /// `action` at `at`, until cleared.
    pub fn always(&self, at: Site, action: Action) {
        self.add(Fault {
            at,
            action,
            times: None,
            after_bytes: 0,
        });
    }

    /// `action` at `at`, the next `count` times.
    pub fn times(&self, count: u32, at: Site, action: Action) {
        self.add(Fault {
            at,
            action,
            times: Some(count),
            after_bytes: 0,
        });
    }

    /// `action` at `at`, the next time.
    pub fn once(&self, at: Site, action: Action) {
        self.times(1, at, action);
    }

    /// Adds a fault behind those that are there.
    pub fn add(&self, fault: Fault) {
        let mut list = self.lock();
        if fault.times != Some(0) && list.len() < MAX_FAULTS {
            list.push(fault);
        }
    }

    /// Forgets them all, and ends what is stalled.
    pub fn clear(&self) {
        self.forget(|_| true);
    }

    /// Forgets those of one place, and ends what is stalled.
    pub fn clear_at(&self, at: Site) {
        self.forget(|fault| fault.at == at);
    }

    /// Those still to come.
    pub fn pending(&self) -> Vec<Fault> {
        self.lock().clone()
    }

    /// Waits until `count` faults have struck since the start; delays count.
    pub async fn struck(&self, count: u64) {
        let _ = self
            .struck
            .subscribe()
            .wait_for(|struck| *struck >= count)
            .await;
    }

    /// Takes what strikes at `at` now: waits the delays, and returns the first fault that is more than a delay.
    ///
    /// Cancel safe; a fault that was taken stays taken.
    pub(crate) async fn strike(&self, at: Site) -> Option<Struck> {
        let (delay, struck) = self.take(at);
        if !delay.is_zero() {
            sleep(delay).await;
        }
        struck
    }

    fn take(&self, at: Site) -> (Duration, Option<Struck>) {
        let mut list = self.lock();
        let mut delay = Duration::ZERO;
        let mut found = None;
        let mut count = 0;
        for fault in list.iter_mut().filter(|fault| fault.at == at) {
            if let Some(times) = &mut fault.times {
                *times = times.saturating_sub(1);
            }
            count += 1;
            if let Action::Delay(millis) = fault.action {
                delay += Duration::from_millis(millis);
            } else {
                found = Some(Struck {
                    action: fault.action.clone(),
                    after_bytes: fault.after_bytes,
                    // Under the lock: a clearing that comes next is seen.
                    cleared: Cleared(self.cleared.subscribe()),
                });
                break;
            }
        }
        list.retain(|fault| fault.times != Some(0));
        drop(list);
        if count > 0 {
            self.struck.send_modify(|struck| *struck += count);
        }
        (delay, found)
    }

    fn forget(&self, is_it: impl Fn(&Fault) -> bool) {
        let mut list = self.lock();
        list.retain(|fault| !is_it(fault));
        self.cleared.send_modify(|epoch| *epoch += 1);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Fault>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn faults_strike_in_order_and_wear_out() {
        let faults = Faults::default();
        faults.times(2, Site::Mint, Action::Close);
        faults.once(Site::Mint, Action::Reset);
        faults.always(Site::Token, Action::Stall);
        for expected in [
            Some(Action::Close),
            Some(Action::Close),
            Some(Action::Reset),
            None,
        ] {
            assert_eq!(
                faults.strike(Site::Mint).await.map(|fault| fault.action),
                expected
            );
        }
        assert_eq!(faults.pending().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_delay_is_waited_before_the_next_fault() {
        let faults = Faults::default();
        faults.once(Site::Mint, Action::Delay(700));
        faults.once(Site::Mint, Action::Close);
        let before = tokio::time::Instant::now();
        assert_eq!(
            faults.strike(Site::Mint).await.unwrap().action,
            Action::Close
        );
        assert_eq!(before.elapsed(), Duration::from_millis(700));
        assert!(faults.pending().is_empty());
    }

    #[test]
    fn the_json_people_write_is_understood() {
        let fault: Fault = serde_json::from_str(
            r#"{"at":"mint","do":{"respond":{"status":429,"retry_after":"2"}},"times":3}"#,
        )
        .unwrap();
        assert_eq!(
            fault.action,
            Action::Respond(Response::status(429).retry_after("2"))
        );
        let fault: Fault =
            serde_json::from_str(r#"{"at":"ssl_request","do":{"certificate":"wrong_name"}}"#)
                .unwrap();
        assert_eq!(fault.action, Action::Certificate(BadCertificate::WrongName));
        let fault: Fault = serde_json::from_str(
            r#"{"at":"password","do":{"error":{"severity":"FATAL","code":"53300","message":"sorry, too many clients already"}}}"#,
        )
        .unwrap();
        assert!(matches!(fault.action, Action::Error(error) if error.code == "53300"));
        assert_eq!(
            serde_json::from_str::<Fault>(r#"{"at":"accept","do":"reset"}"#)
                .unwrap()
                .action,
            Action::Reset
        );
    }
}
