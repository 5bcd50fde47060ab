//! What people read about settings: the annotated `config/lakebase-proxy.toml` and the rows of `SHOW CONFIG`.

use std::fmt::Write as _;

use clap::{Args, Command};

use super::{Origin, Settings, declare::Reload};

const WIDTH: usize = 118;

const INTRODUCTION: &str = "\
# Every setting of lakebase-proxy, at its default. Settings without a default are commented out.
#
#     lakebase-proxy --config-file config/lakebase-proxy.toml
#
# Each is also a flag (`--max-connections`) and a variable (`LAKEBASE_PROXY_MAX_CONNECTIONS`). Flags override variables,
# variables override this file. Durations are written `15s`, `1m 30s`, or as a number of seconds.
#
# The workspace and the authentication to it are configured by Databricks' own variables (DATABRICKS_HOST and others), and
# a single endpoint by ENDPOINT_NAME, PGHOST, PGPORT, PGDATABASE, PGUSER, PGSSLMODE and PGSSLROOTCERT. Tables at the end of
# this file configure several endpoints.
";

const ENDPOINTS: &str = "\
# Each of several endpoints has a table (or a flag `--endpoint 'NAME?port=5433'`); the PG* and ENDPOINT_NAME variables then
# name none. Keys that are left out are looked up in the workspace, or have the defaults above.
#
# [[endpoint]]
# name = \"projects/my-project/branches/production/endpoints/primary\"
# listen = \"127.0.0.1:5432\"      # or a port; if unset, the next port from `port` on
# database = \"databricks_postgres\"
#
# [[endpoint]]
# name = \"projects/my-project/branches/production/endpoints/primary\"
# listen = 5433
# read_only = true
# pool_mode = \"session\"          # if unset, `pool_mode` above; `pin_sessions` likewise
# host = \"ep-cool-breeze-1.database.us-east-1.cloud.databricks.com\"   # if unset, looked up
# host_address = \"10.0.0.7\"      # dialed instead of the host's addresses; SNI and certificate check still use the host
#
# A server whose credential does not come from the workspace needs a host, a user and one of three credential sources.
#
# [[endpoint]]
# host = \"db.example.com\"
# port = 5432
# user = \"app\"
# credential = { password_env = \"APP_DB_PASSWORD\" }
#         or = { password_file = \"/run/secrets/app-db\" }       reloaded when it changes
#         or = { command = [\"my-token-tool\", \"--json\"] }       prints JSON: a token and optionally its expiry
";

/// One setting in force. None holds a secret: those are in variables and files of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShownSetting {
    /// The key in the configuration file.
    pub key: String,
    /// The value in force; empty if the setting is unset.
    pub value: String,
    /// The default; empty if the setting has none.
    pub default: String,
    /// Whether a reload applies a change.
    pub changeable: bool,
    /// The source of the value.
    pub origin: Origin,
}

impl Settings {
    /// Every setting but endpoint tables, in alphabetical order.
    pub fn shown(&self) -> Vec<ShownSetting> {
        let given = toml::Table::try_from(self).unwrap_or_default();
        let shown = |setting: super::declare::Setting| ShownSetting {
            value: text(given.get(setting.key).or(setting.default.as_ref())),
            default: text(setting.default.as_ref()),
            changeable: setting.is_live(),
            origin: self.origins.of(setting.key).clone(),
            key: setting.key.to_owned(),
        };
        let mut shown: Vec<_> = Self::declared().into_iter().map(shown).collect();
        shown.sort_by(|one, other| one.key.cmp(&other.key));
        shown
    }

    /// The annotated configuration file.
    pub fn reference() -> String {
        let command = Self::augment_args(Command::new("settings"));
        let mut file = format!("{INTRODUCTION}\n");
        let mut section = "";
        let mut restart = Vec::new();
        for setting in Self::declared() {
            if setting.section != section {
                section = setting.section;
                heading(&mut file, section);
            }
            let argument = command
                .get_arguments()
                .find(|it| it.get_id() == setting.key);
            let help = argument.and_then(|it| it.get_long_help().or(it.get_help()));
            let help = help.map(ToString::to_string).unwrap_or_default();
            comment(&mut file, &sentences(&help));
            let _ = match (setting.default, setting.example) {
                (Some(default), _) => writeln!(file, "{} = {}", setting.key, literal(&default)),
                (None, example) => writeln!(file, "# {} = {}", setting.key, example.unwrap_or("")),
            };
            file.push('\n');
            if setting.reload == Reload::Restart {
                restart.push(setting.key);
            }
        }
        comment(
            &mut file,
            &format!(
                "A change of these needs a restart: {}; any key of an endpoint that stays; another address or unix_socket at the same port. The log names them. Flags and variables keep their values.",
                restart.join(", ")
            ),
        );
        file.push('\n');
        heading(&mut file, "Endpoints");
        file + ENDPOINTS
    }
}

/// A value without quotes; the items of a list without brackets, as a flag takes them.
pub(crate) fn text(value: Option<&toml::Value>) -> String {
    match value {
        None => String::new(),
        Some(toml::Value::String(text)) => text.clone(),
        Some(toml::Value::Array(values)) => {
            let values: Vec<String> = values.iter().map(|value| text(Some(value))).collect();
            values.join(", ")
        }
        Some(other) => other.to_string(),
    }
}

/// A value as TOML; a list of one item as the item.
fn literal(value: &toml::Value) -> String {
    match value {
        toml::Value::Array(values) if values.len() == 1 => values.iter().map(literal).collect(),
        other => other.to_string(),
    }
}

/// A help text of several paragraphs as one paragraph of sentences.
fn sentences(help: &str) -> String {
    let help = match help.split_once(" [default: ") {
        Some((help, default)) => help.to_owned() + ". Default: " + &default.replacen(']', "", 1),
        None => help.to_owned(),
    };
    let sentence = |paragraph: &str| format!("{}.", paragraph.trim_end_matches('.'));
    help.split("\n\n")
        .map(sentence)
        .collect::<Vec<_>>()
        .join(" ")
}

fn heading(file: &mut String, section: &str) {
    let dashes = "-".repeat(WIDTH.saturating_sub(section.len() + 7));
    let _ = writeln!(file, "# --- {section} {dashes}\n");
}

/// Appends a paragraph as comment lines of at most [`WIDTH`] characters.
fn comment(file: &mut String, paragraph: &str) {
    let mut line = "#".to_owned();
    for word in paragraph.split_whitespace() {
        if line.len() + word.len() >= WIDTH {
            let _ = writeln!(file, "{line}");
            line.truncate(1);
        }
        line.extend([" ", word]);
    }
    let _ = writeln!(file, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_annotated_file_is_generated_from_the_declaration() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/config/lakebase-proxy.toml");
        let reference = Settings::reference();
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(path, &reference).unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(path).unwrap(),
            reference,
            "run `UPDATE=1 cargo test --lib config::reference`, then deploy/guides/generate"
        );
    }

    #[test]
    fn a_given_value_is_shown_beside_its_default() {
        let settings: Settings =
            toml::from_str("connect_timeout = \"90s\"\nport = \"none\"\nhttp_port = 0").unwrap();
        let shown = settings.shown();
        let find = |key: &str| {
            let setting = shown.iter().find(|setting| setting.key == key).unwrap();
            (setting.value.as_str(), setting.default.as_str())
        };
        assert_eq!(find("connect_timeout"), ("90s", "60s"));
        assert_eq!(find("port"), ("none", "5432"));
        assert_eq!(find("http_port"), ("0", "9090"));
        assert_eq!(find("client_login_timeout"), ("15s", "15s"));
        assert_eq!(find("address"), ("127.0.0.1", "127.0.0.1"));
        assert_eq!(find("unix_socket"), ("", ""));
    }
}
