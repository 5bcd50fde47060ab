//! The report: steps with their time, outcome and fix, as text and as JSON.

use std::fmt::Write;

use anstyle::{AnsiColor, Style};
use serde::Serialize;

use crate::telemetry::{escape, escape_json};

/// Width of the steps' names.
const NAME_WIDTH: usize = 20;
/// Width of the settings' names.
const SETTING_WIDTH: usize = 26;
/// The widest value that the sources are aligned to.
const MAX_VALUE_WIDTH: usize = 60;
/// The width of outcome, time and name, with the blanks between them.
const INDENT: usize = 2 + 7 + 2 + 7 + 2 + NAME_WIDTH + 1;

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Does not work.
    Failed,
    /// Works.
    Ok,
    /// Not run, because an earlier step failed or it does not apply.
    Skipped,
    /// Works, but needs a fix.
    Warning,
}

impl Outcome {
    fn label(self) -> (&'static str, Style) {
        match self {
            Self::Failed => ("failed", AnsiColor::Red.on_default().bold()),
            Self::Ok => ("ok", AnsiColor::Green.on_default()),
            Self::Skipped => ("skipped", Style::new().dimmed()),
            Self::Warning => ("warning", AnsiColor::Yellow.on_default().bold()),
        }
    }
}

/// A setting and its origin; a secret is only `present` or `absent`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Setting {
    /// The variable's or the flag's name.
    pub name: String,
    /// Its value, or `present` or `absent` for a secret.
    pub value: String,
    /// Its origin.
    pub source: String,
}

/// A check and its finding.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// The check.
    pub name: &'static str,
    /// The endpoint, if there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub seconds: f64,
    /// The finding, in one sentence.
    pub message: String,
    /// The error text of the other side.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What to do about it.
    // Scripts read the key, which keeps its first name.
    #[serde(rename = "mend", skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// All settings and steps.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// The settings in force.
    pub settings: Vec<Setting>,
    /// The steps, in order.
    pub steps: Vec<Step>,
}

impl Report {
    /// Whether all checks are well.
    pub fn is_well(&self) -> bool {
        self.first_problem().is_none()
    }

    /// The first failure or warning: the likely cause of those after it.
    pub fn first_problem(&self) -> Option<&Step> {
        let is_problem = |step: &&Step| matches!(step.outcome, Outcome::Failed | Outcome::Warning);
        self.steps.iter().find(is_problem)
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
        // Strings and numbers always serialize.
        let json = serde_json::to_string_pretty(&verdict).unwrap_or_default();
        escape_json(&json).into_owned()
    }

    /// As text with ANSI colors, which the writer strips unless it is a terminal.
    pub fn text(&self) -> String {
        let steps: String = self.steps.iter().map(Step::text).collect();
        settings_text(&self.settings) + &steps + &self.verdict_text()
    }

    /// The last line.
    pub(super) fn verdict_text(&self) -> String {
        let steps = || self.steps.iter();
        let count = |outcome| steps().filter(|step| step.outcome == outcome).count();
        let skipped = match count(Outcome::Skipped) {
            0 => String::new(),
            skipped => format!(", {skipped} skipped"),
        };
        match self.first_problem() {
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
    /// One line, and one each for detail and fix.
    pub(super) fn text(&self) -> String {
        let (label, style) = self.outcome.label();
        let time = match self.outcome {
            Outcome::Skipped => String::new(),
            _ => format!("{:.2} s", self.seconds),
        };
        let endpoint = self.endpoint.as_deref();
        let of = endpoint.map_or(String::new(), |name| format!(" [{}]", escape(name)));
        // Messages quote servers, whose control characters must not reach a terminal.
        let mut text = format!(
            "  {style}{:<7}{style:#}  {time:>7}  {:<NAME_WIDTH$} {}{of}\n",
            label,
            self.name,
            escape(&self.message),
        );
        if let Some(detail) = &self.detail {
            let dim = Style::new().dimmed();
            let _ = writeln!(text, "{:INDENT$}{dim}{}{dim:#}", "", escape(detail));
        }
        if let Some(fix) = &self.fix {
            let cyan = AnsiColor::Cyan.on_default();
            let _ = writeln!(text, "{:INDENT$}{cyan}fix:{cyan:#} {}", "", escape(fix));
        }
        text
    }
}

/// The settings, a line each.
pub(super) fn settings_text(settings: &[Setting]) -> String {
    let widths = settings.iter().map(|it| it.value.chars().count());
    let width = widths.max().unwrap_or_default().min(MAX_VALUE_WIDTH);
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

/// A duration in one unit.
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
    use std::time::Duration;

    use super::*;
    use crate::doctor::check::{Finding, Steps};

    fn report(outcomes: &[Outcome]) -> Report {
        let mut ignored = |_: &Step| {};
        let mut steps = Steps::new(Vec::new(), &mut ignored);
        for outcome in outcomes {
            let finding = Finding::new(*outcome, "found").fix("do this");
            steps.note("login", Duration::from_millis(1234), finding);
        }
        steps.report
    }

    #[test]
    fn all_is_well_only_without_failures_and_warnings() {
        assert!(report(&[Outcome::Ok, Outcome::Skipped]).is_well());
        assert!(!report(&[Outcome::Ok, Outcome::Warning]).is_well());
        assert!(!report(&[Outcome::Failed]).is_well());
    }

    #[test]
    fn columns_are_aligned_with_any_color() {
        let text = report(&[Outcome::Ok, Outcome::Failed]).text();
        let plain = anstream::adapter::strip_str(&text).to_string();
        let columns: Vec<_> = plain
            .lines()
            .filter_map(|line| line.find("found"))
            .collect();
        assert_eq!(columns, [INDENT, INDENT]);
        assert!(plain.contains("1.23 s"), "{plain}");
        assert!(plain.lines().any(|line| line.trim() == "fix: do this"));
        assert!(plain.ends_with("1 failed, 0 warnings; begin with: login\n"));
    }

    #[test]
    fn foreign_text_cannot_forge_a_line() {
        let mut ignored = |_: &Step| {};
        let mut steps = Steps::new(Vec::new(), &mut ignored);
        let words = "no\n  ok       0.00 s  login\u{1b}[2K\u{202e}";
        let finding = Finding::failed(words).detail(words.to_owned());
        steps.note("login", Duration::ZERO, finding.fix(words));
        let text = steps.report.text();
        let plain = anstream::adapter::strip_str(&text).to_string();
        let escaped = plain.matches("no\\n  ok       0.00 s  login\\u{1b}[2K\\u{202e}");
        assert_eq!(escaped.count(), 3, "{plain}");
        let json = steps.report.json();
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
