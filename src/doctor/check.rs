//! Runs checks one after the other: each on what it needs of earlier ones, with its time, its finding and a fix.

use std::time::Duration;

use tokio::time::Instant;

use super::report::{Outcome, Report, Setting, Step};
use crate::{net::tls::TlsError, upstream::Failure, workspace::CallError};

/// The result of a check.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) outcome: Outcome,
    pub(super) message: String,
    pub(super) detail: Option<String>,
    pub(super) fix: Option<String>,
}

impl Finding {
    pub(super) fn ok(message: impl Into<String>) -> Self {
        Self::new(Outcome::Ok, message)
    }

    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(Outcome::Failed, message)
    }

    pub(super) fn skipped(message: impl Into<String>) -> Self {
        Self::new(Outcome::Skipped, message)
    }

    pub(super) fn warning(message: impl Into<String>) -> Self {
        Self::new(Outcome::Warning, message)
    }

    pub(super) fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        Self {
            outcome,
            message: message.into(),
            detail: None,
            fix: None,
        }
    }

    /// The error text of the other side.
    #[must_use]
    pub(super) fn detail(mut self, detail: impl Into<Option<String>>) -> Self {
        self.detail = detail.into();
        self
    }

    /// What to do about it, in one sentence.
    #[must_use]
    pub(super) fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// The hint of an error as the fix.
    #[must_use]
    pub(super) fn hint(mut self, hint: Option<impl Into<String>>) -> Self {
        self.fix = hint.map(Into::into);
        self
    }
}

impl From<CallError> for Finding {
    fn from(error: CallError) -> Self {
        Self::failed(error.message)
            .detail(error.detail)
            .hint(error.hint)
    }
}

impl From<&Failure> for Finding {
    fn from(failure: &Failure) -> Self {
        Self::failed(failure.to_string()).hint(failure.hint())
    }
}

impl From<TlsError> for Finding {
    fn from(error: TlsError) -> Self {
        Self::failed(error.to_string())
            .fix("install the system's root certificates (Debian: apt install ca-certificates)")
    }
}

/// What a check needs of an earlier one, or why that is missing.
pub(super) type Need<T> = Result<T, String>;

/// The steps so far.
pub(super) struct Steps<'a> {
    pub(super) report: Report,
    /// The endpoint that is checked, if there are several.
    pub(super) endpoint: Option<String>,
    on_step: &'a mut dyn FnMut(&Step),
}

impl<'a> Steps<'a> {
    pub(super) fn new(settings: Vec<Setting>, on_step: &'a mut dyn FnMut(&Step)) -> Self {
        let report = Report {
            settings,
            steps: Vec::new(),
        };
        Self {
            report,
            endpoint: None,
            on_step,
        }
    }

    /// Runs a check on what it needs, or skips it if that is missing. If it fails, the checks that need its value are
    /// skipped for the reason `otherwise`.
    pub(super) async fn check<N, T>(
        &mut self,
        name: &'static str,
        needed: Result<N, impl AsRef<str>>,
        otherwise: &str,
        check: impl AsyncFnOnce(N) -> Result<(T, Finding), Finding>,
    ) -> Need<T> {
        let started = Instant::now();
        let (value, finding) = match needed {
            Ok(needed) => match check(needed).await {
                Ok((value, finding)) => (Ok(value), finding),
                Err(finding) => (Err(otherwise.to_owned()), finding),
            },
            Err(why) => (Err(why.as_ref().to_owned()), Finding::skipped(why.as_ref())),
        };
        self.note(name, started.elapsed(), finding);
        value
    }

    /// Runs a check that no other needs.
    pub(super) async fn run<N>(
        &mut self,
        name: &'static str,
        needed: Result<N, impl AsRef<str>>,
        check: impl AsyncFnOnce(N) -> Result<Finding, Finding>,
    ) {
        let check = async |needed| check(needed).await.map(|finding| ((), finding));
        let _ = self.check(name, needed, "", check).await;
    }

    pub(super) fn note(&mut self, name: &'static str, took: Duration, finding: Finding) {
        let step = Step {
            name,
            endpoint: self.endpoint.clone(),
            outcome: finding.outcome,
            seconds: (took.as_secs_f64() * 1000.0).round() / 1000.0,
            message: finding.message,
            detail: finding.detail,
            fix: finding.fix,
        };
        (self.on_step)(&step);
        self.report.steps.push(step);
    }
}
