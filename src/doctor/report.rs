//! What was found: steps with their time, outcome and mend, as text for people and as JSON.

use std::{fmt::Write, time::Duration};

use anstyle::{AnsiColor, Style};
use serde::Serialize;
use tokio::time::Instant;

use crate::telemetry::{escape, escape_json};

/// Width of the steps' names.
const NAME_WIDTH: usize = 20;
/// Width of the settings' names.
const SETTING_WIDTH: usize = 26;
/// Before a step's words: outcome, time and name with the blanks between them.
const INDENT: usize = 2 + 7 + 2 + 7 + 2 + NAME_WIDTH + 1;

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Not as it must be.
    Failed,
    /// As it should be.
    Ok,
    /// Not tried: an earlier step failed, or it does not apply.
    Skipped,
    /// Works, but should be mended.
    Warning,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Ok => "ok",
            Self::Skipped => "skipped",
            Self::Warning => "warning",
        }
    }

    fn style(self) -> Style {
        match self {
            Self::Failed => AnsiColor::Red.on_default().bold(),
            Self::Ok => AnsiColor::Green.on_default(),
            Self::Skipped => Style::new().dimmed(),
            Self::Warning => AnsiColor::Yellow.on_default().bold(),
        }
    }
}

/// One setting and where it came from; a secret only by its presence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// The variable's or the flag's name.
    pub name: String,
    /// Its value, or `present` or `absent` for a secret.
    pub value: String,
    /// Where it came from.
    pub source: String,
}

/// One thing that was checked.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// What.
    pub name: &'static str,
    /// Of which endpoint, where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub seconds: f64,
    /// What was found, in one sentence.
    pub message: String,
    /// The other side's own words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

/// What one step came to, before it is timed and named.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub(super) outcome: Outcome,
    pub(super) message: String,
    pub(super) detail: Option<String>,
    pub(super) mend: Option<String>,
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

    #[must_use]
    pub(super) fn detail(mut self, detail: impl Into<Option<String>>) -> Self {
        self.detail = detail.into();
        self
    }

    #[must_use]
    pub(super) fn mend(mut self, mend: impl Into<Option<String>>) -> Self {
        self.mend = mend.into();
        self
    }

    fn new(outcome: Outcome, message: impl Into<String>) -> Self {
        Self {
            outcome,
            message: message.into(),
            detail: None,
            mend: None,
        }
    }
}

/// Everything that was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// The settings in force.
    pub settings: Vec<Setting>,
    /// The steps, in the order in which they were taken.
    pub steps: Vec<Step>,
}

impl Report {
    /// Whether nothing need be mended.
    pub fn is_well(&self) -> bool {
        self.first_trouble().is_none()
    }

    /// The first step that is not as it should be: the likely cause of those after it.
    pub fn first_trouble(&self) -> Option<&Step> {
        self.steps
            .iter()
            .find(|step| matches!(step.outcome, Outcome::Failed | Outcome::Warning))
    }

    /// As JSON, with a verdict.
    pub fn json(&self) -> String {
        #[derive(Serialize)]
        struct Verdict<'a> {
            ok: bool,
            #[serde(flatten)]
            report: &'a Report,
        }
        let verdict = Verdict {
            ok: self.is_well(),
            report: self,
        };
        // Strings and numbers only, which always serialise.
        let json = serde_json::to_string_pretty(&verdict).unwrap_or_default();
        escape_json(&json).into_owned()
    }

    /// As text with ANSI colours, which the writer strips where they do not belong.
    pub fn text(&self) -> String {
        let mut text = settings_text(&self.settings);
        for step in &self.steps {
            text.push_str(&step.text());
        }
        text.push_str(&self.verdict_text());
        text
    }

    /// The last line.
    pub(super) fn verdict_text(&self) -> String {
        let count = |outcome| {
            self.steps
                .iter()
                .filter(|step| step.outcome == outcome)
                .count()
        };
        let skipped = match count(Outcome::Skipped) {
            0 => String::new(),
            skipped => format!(", {skipped} skipped"),
        };
        match self.first_trouble() {
            None => format!("\nall is well{skipped}\n"),
            Some(first) => format!(
                "\n{} failed, {} warnings{skipped}; begin with: {}\n",
                count(Outcome::Failed),
                count(Outcome::Warning),
                first.name
            ),
        }
    }
}

impl Step {
    /// One line, and one each for detail and mend.
    pub(super) fn text(&self) -> String {
        let style = self.outcome.style();
        let time = match self.outcome {
            Outcome::Skipped => String::new(),
            _ => format!("{:.2} s", self.seconds),
        };
        let of = self
            .endpoint
            .as_ref()
            .map(|endpoint| format!(" [{}]", escape(endpoint)))
            .unwrap_or_default();
        let mut text = format!(
            "  {style}{:<7}{style:#}  {time:>7}  {:<NAME_WIDTH$} {}{of}\n",
            self.outcome.label(),
            self.name,
            escape(&self.message),
        );
        if let Some(detail) = &self.detail {
            let dim = Style::new().dimmed();
            let _ = writeln!(text, "{:INDENT$}{dim}{}{dim:#}", "", escape(detail));
        }
        if let Some(mend) = &self.mend {
            let cyan = AnsiColor::Cyan.on_default();
            let _ = writeln!(text, "{:INDENT$}{cyan}mend:{cyan:#} {}", "", escape(mend));
        }
        text
    }
}

/// The settings, a line each.
pub(super) fn settings_text(settings: &[Setting]) -> String {
    let width = settings
        .iter()
        .map(|setting| setting.value.chars().count())
        .max()
        .unwrap_or_default()
        .min(60);
    let dim = Style::new().dimmed();
    let mut text = String::from("settings\n");
    for Setting {
        name,
        value,
        source,
    } in settings
    {
        let (value, source) = (escape(value), escape(source));
        let _ = writeln!(
            text,
            "  {name:<SETTING_WIDTH$} {value:<width$}  {dim}{source}{dim:#}"
        );
    }
    text.push_str("\nchecks\n");
    text
}

/// Collects steps as they are taken.
pub(super) struct Chart<'a> {
    pub(super) report: Report,
    /// Set while one of several endpoints is looked at.
    pub(super) endpoint: Option<String>,
    on_step: &'a mut dyn FnMut(&Step),
}

impl<'a> Chart<'a> {
    pub(super) fn new(settings: Vec<Setting>, on_step: &'a mut dyn FnMut(&Step)) -> Self {
        Self {
            report: Report {
                settings,
                steps: Vec::new(),
            },
            endpoint: None,
            on_step,
        }
    }

    /// Takes down what a step that began then came to.
    pub(super) fn note(&mut self, name: &'static str, started: Instant, finding: Finding) {
        self.note_timed(name, started.elapsed(), finding);
    }

    pub(super) fn note_timed(&mut self, name: &'static str, took: Duration, finding: Finding) {
        let Finding {
            outcome,
            message,
            detail,
            mend,
        } = finding;
        let step = Step {
            name,
            endpoint: self.endpoint.clone(),
            outcome,
            seconds: (took.as_secs_f64() * 1000.0).round() / 1000.0,
            message,
            detail,
            mend,
        };
        (self.on_step)(&step);
        self.report.steps.push(step);
    }

    /// Steps that are not taken, and why.
    pub(super) fn skip(&mut self, names: &[&'static str], why: &str) {
        for name in names {
            self.note_timed(name, Duration::ZERO, Finding::skipped(why));
        }
    }
}

/// How long something lasts still, as people say it.
pub(super) fn spoken(duration: jiff::SignedDuration) -> String {
    let seconds = duration.as_secs().abs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(outcomes: &[Outcome]) -> Report {
        let mut ignored = |_: &Step| {};
        let mut chart = Chart::new(Vec::new(), &mut ignored);
        for outcome in outcomes {
            let finding = Finding::new(*outcome, "said").mend("do this".to_owned());
            chart.note_timed("login", Duration::from_millis(1234), finding);
        }
        chart.report
    }

    #[test]
    fn all_is_well_only_without_failures_and_warnings() {
        assert!(report(&[Outcome::Ok, Outcome::Skipped]).is_well());
        assert!(!report(&[Outcome::Ok, Outcome::Warning]).is_well());
        assert!(!report(&[Outcome::Failed]).is_well());
    }

    #[test]
    fn columns_are_aligned_whatever_the_colour() {
        let text = report(&[Outcome::Ok, Outcome::Failed]).text();
        let plain = anstream::adapter::strip_str(&text).to_string();
        let columns: Vec<_> = plain.lines().filter_map(|line| line.find("said")).collect();
        assert_eq!(columns, [INDENT, INDENT]);
        assert!(plain.contains("1.23 s"), "{plain}");
        assert!(plain.lines().any(|line| line.trim() == "mend: do this"));
        assert!(plain.ends_with("1 failed, 0 warnings; begin with: login\n"));
    }

    #[test]
    fn each_finding_is_its_own_line_whatever_others_have_sent() {
        let mut ignored = |_: &Step| {};
        let mut chart = Chart::new(Vec::new(), &mut ignored);
        let words = "no\n  ok       0.00 s  login\u{1b}[2K\u{202e}";
        let finding = Finding::failed(words).detail(words.to_owned());
        chart.note_timed("login", Duration::ZERO, finding.mend(words.to_owned()));
        let text = chart.report.text();
        let plain = anstream::adapter::strip_str(&text).to_string();
        let escaped = plain.matches("no\\n  ok       0.00 s  login\\u{1b}[2K\\u{202e}");
        assert_eq!(escaped.count(), 3, "{plain}");
        let json = chart.report.json();
        assert!(!json.contains('\u{202e}') && json.contains("\\u202e"));
    }

    #[test]
    fn the_json_carries_the_verdict() {
        let json: serde_json::Value =
            serde_json::from_str(&report(&[Outcome::Warning]).json()).unwrap();
        assert_eq!(json["ok"], false);
        assert_eq!(json["steps"][0]["outcome"], "warning");
        assert_eq!(json["steps"][0]["mend"], "do this");
        assert_eq!(json["steps"][0]["seconds"], 1.234);
    }
}
