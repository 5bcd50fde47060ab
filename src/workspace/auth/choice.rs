//! The choice among the kinds of authentication.
//!
//! Settings of one family select one kind, so that its failures are reported instead of skipped. Without any, the kinds
//! that are available on the machine are tried in the order of the SDK for Go until one works.

use std::collections::BTreeMap;

use super::{AuthKind, Source, kinds::azure_msi, unsupported};
use crate::{
    config::{Attribute, AuthFamily},
    workspace::{WorkspaceError, error::Problem, host::Host, settings::ResolvedSettings},
};

/// The sources to try, in order; at least one.
pub(in crate::workspace) fn choose(
    settings: &ResolvedSettings,
    host: &Host,
) -> Result<Vec<Source>, WorkspaceError> {
    if let Some(label) = &settings.auth_type {
        let mut kinds = AuthKind::ALL.iter().copied();
        let kind = kinds.find(|kind| kind.label() == label).ok_or_else(|| {
            unsupported::by_label(label).unwrap_or_else(|| {
                let known: Vec<&str> = AuthKind::ALL.iter().map(|kind| kind.label()).collect();
                let problem = format!("is `{label}`, which is no way to authenticate");
                settings
                    .invalid(Attribute::AuthType, &problem)
                    .with_hint(format!("one of `{}`", known.join("`, `")))
            })
        })?;
        if !may_use(settings, kind) {
            return Err(no_group(settings, kind));
        }
        // A named kind alone, as in the SDKs, so that its own error is reported.
        return Ok(vec![(kind.rules().create)(settings, host)?]);
    }
    let Some(family) = configured_family(settings)? else {
        return available(settings, host);
    };
    let is_selected = |kind: &&AuthKind| {
        kind.rules().family == Some(family) && (kind.rules().is_selected)(settings)
    };
    match AuthKind::ALL
        .iter()
        .copied()
        .find(|kind| is_selected(&kind))
    {
        // As in the SDKs, a kind that cannot assume the group is skipped unless `auth_type` names it.
        Some(kind) if !may_use(settings, kind) => {
            available(settings, host).map_err(|_| no_group(settings, kind))
        }
        Some(kind) => Ok(vec![(kind.rules().create)(settings, host)?]),
        None => match unsupported::by_family(family, settings) {
            Some(refusal) => Err(refusal),
            None => available(settings, host),
        },
    }
}

fn may_use(settings: &ResolvedSettings, kind: AuthKind) -> bool {
    settings.group_id.is_none() || kind.rules().can_assume_group
}

fn no_group(settings: &ResolvedSettings, kind: AuthKind) -> WorkspaceError {
    let setting = settings.named(Attribute::GroupId);
    // The message of the Databricks SDKs.
    WorkspaceError::new(format!(
        "auth type \"{}\" does not support group role assumption. Use Databricks OAuth authentication",
        kind.label()
    ))
    .with_hint(format!(
        "unset {setting}, or sign in as a service principal (oauth-m2m, or one of the oidc kinds)"
    ))
}

/// The family whose settings are present; settings of two are refused, as in the SDKs.
fn configured_family(settings: &ResolvedSettings) -> Result<Option<AuthFamily>, WorkspaceError> {
    let families = families(settings);
    if families.len() < 2 {
        return Ok(families.into_keys().next());
    }
    let choices = families.keys().flat_map(|family| {
        let kinds = AuthKind::ALL.iter();
        let kinds = kinds.filter(|kind| kind.rules().family == Some(*family));
        kinds
            .map(|kind| kind.label())
            .chain(unsupported::labels(*family).iter().copied())
    });
    let choices: Vec<&str> = choices.collect();
    let families = families
        .iter()
        .map(|(family, &attribute)| format!("{} ({})", family.label(), settings.named(attribute)));
    Err(WorkspaceError::new(format!(
        "more than one way to authenticate is configured: {}",
        families.collect::<Vec<_>>().join(" and ")
    ))
    .with_hint(format!(
        "remove all but one, or choose with `DATABRICKS_AUTH_TYPE` (`{}`)",
        choices.join("`, `")
    )))
}

/// The families whose settings are present, each with a setting of it.
fn families(settings: &ResolvedSettings) -> BTreeMap<AuthFamily, Attribute> {
    let mut families = BTreeMap::new();
    for &attribute in Attribute::ALL {
        let is_present = match attribute {
            Attribute::AzureUseMsi => azure_msi::is_enabled(settings),
            other => settings.text(other).is_some(),
        };
        if let Some(family) = attribute.family().filter(|_| is_present) {
            // A secret shows the intent better than an id.
            if attribute.is_secret() {
                families.insert(family, attribute);
            } else {
                families.entry(family).or_insert(attribute);
            }
        }
    }
    // A client id without a secret belongs to the identity token that is exchanged.
    if settings.client_secret.is_none()
        && (families.contains_key(&AuthFamily::EnvOidc)
            || families.contains_key(&AuthFamily::FileOidc))
    {
        families.remove(&AuthFamily::OAuth);
    }
    families
}

/// The sources that need no setting to select them.
fn available(settings: &ResolvedSettings, host: &Host) -> Result<Vec<Source>, WorkspaceError> {
    let (mut sources, mut notes) = (Vec::new(), Vec::new());
    let mut incomplete = None;
    let kinds = AuthKind::ALL.iter();
    for kind in kinds.filter(|kind| (kind.rules().is_available)(settings, host)) {
        match (kind.rules().create)(settings, host) {
            Ok(source) => sources.push(source),
            Err(error) => match error.problem {
                Problem::Absent => notes.push(error.to_string()),
                // Reported only if no other source is left: the variables may be meant for something else.
                Problem::Incomplete => incomplete = Some(error),
                // A setting with an invalid value is reported, even if another kind would work.
                Problem::Other => return Err(error),
            },
        }
    }
    let first = sources.first().map(|source| source.kind);
    // Only after they are made, so that an invalid setting is reported instead of the group.
    sources.retain(|source| may_use(settings, source.kind));
    if !sources.is_empty() {
        return Ok(sources);
    }
    if let Some(kind) = first {
        return Err(no_group(settings, kind));
    }
    if let Some(error) = unsupported::github_azure(settings).or(incomplete) {
        return Err(error);
    }
    if settings.client_id.is_some() {
        let because = format!(
            "{} is, and there is no other way to authenticate",
            settings.named(Attribute::ClientId)
        );
        return Err(WorkspaceError::incomplete(
            "DATABRICKS_CLIENT_SECRET",
            &because,
        ));
    }
    // The missing profile may hold the authentication.
    settings.check_profile_file()?;
    let mut hints = vec![
        format!("on a laptop: `databricks auth login --host {host}`"),
        "elsewhere: set `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET` of a service principal".to_owned(),
    ];
    hints.append(&mut notes);
    let message = "no way to authenticate to the workspace is configured";
    Err(WorkspaceError::new(message).with_hint(hints.join("; ")))
}

#[cfg(test)]
mod tests {
    use std::{env::consts::EXE_SUFFIX, fs, path::Path};

    use super::*;
    use crate::config::WorkspaceSettings;

    const HOST: (&str, &str) = ("DATABRICKS_HOST", "https://dbc-1.cloud.databricks.com");
    const AZURE: (&str, &str) = ("DATABRICKS_HOST", "https://adb-1.2.azuredatabricks.net");
    const ID: (&str, &str) = ("DATABRICKS_CLIENT_ID", "sp");
    const SECRET: (&str, &str) = ("DATABRICKS_CLIENT_SECRET", "hunter2");
    const TOKEN: (&str, &str) = ("DATABRICKS_TOKEN", "hunter2");
    const GITHUB: [(&str, &str); 2] = [
        (
            "ACTIONS_ID_TOKEN_REQUEST_URL",
            "https://github.example/token?x=1",
        ),
        ("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "hunter2"),
    ];

    const COLLECTION: (&str, &str) = (
        "SYSTEM_TEAMFOUNDATIONCOLLECTIONURI",
        "https://dev.azure.com/org/",
    );
    const PIPELINE: [(&str, &str); 5] = [
        ("SYSTEM_ACCESSTOKEN", "hunter2"),
        ("SYSTEM_TEAMPROJECTID", "p"),
        ("SYSTEM_PLANID", "plan"),
        ("SYSTEM_JOBID", "job"),
        ("SYSTEM_HOSTTYPE", "build"),
    ];

    fn chosen(variables: &[(&str, &str)]) -> Result<String, String> {
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let settings = WorkspaceSettings::from_variables(variables);
        let kinds = ResolvedSettings::new(settings).and_then(|settings| settings.auth_kinds());
        let kinds =
            kinds.map_err(|error| format!("{error} / {}", error.hint().unwrap_or_default()))?;
        let labels: Vec<&str> = kinds.iter().map(|kind| kind.label()).collect();
        Ok(labels.join(" "))
    }

    fn program(directory: &Path, name: &str, size: u64) {
        let path = directory.join(format!("{name}{EXE_SUFFIX}"));
        let file = fs::File::create(&path).unwrap();
        file.set_len(size).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;

            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    #[test]
    fn settings_select_the_kind() {
        for (variables, kind) in [
            (&[HOST, TOKEN][..], "pat"),
            (&[HOST, ID, SECRET], "oauth-m2m"),
            (
                &[HOST, TOKEN, ID, SECRET, ("DATABRICKS_AUTH_TYPE", "pat")],
                "pat",
            ),
            (
                &[
                    HOST,
                    TOKEN,
                    ID,
                    SECRET,
                    ("DATABRICKS_AUTH_TYPE", "oauth-m2m"),
                ],
                "oauth-m2m",
            ),
            (
                &[HOST, ("DATABRICKS_OIDC_TOKEN_FILEPATH", "/f"), ID],
                "file-oidc",
            ),
            (
                &[HOST, ("DATABRICKS_OIDC_TOKEN_ENV", "X"), ("X", "jwt")],
                "env-oidc",
            ),
            (&[HOST, ("DATABRICKS_OIDC_TOKEN", "jwt"), ID], "env-oidc"),
            (&[HOST, ID, GITHUB[0], GITHUB[1]], "github-oidc"),
            (
                &[
                    HOST,
                    ID,
                    GITHUB[0],
                    GITHUB[1],
                    ("DATABRICKS_OIDC_TOKEN", "jwt"),
                ],
                "github-oidc env-oidc",
            ),
            (
                &[
                    HOST,
                    ("DATABRICKS_METADATA_SERVICE_URL", "http://localhost:1/x"),
                ],
                "metadata-service",
            ),
            (&[AZURE, ("ARM_USE_MSI", "true")], "azure-msi"),
            (
                &[
                    AZURE,
                    ("ARM_CLIENT_ID", "i"),
                    ("ARM_CLIENT_SECRET", "s"),
                    ("ARM_TENANT_ID", "t"),
                ],
                "azure-client-secret",
            ),
            (&[HOST, ("DATABRICKS_TOKEN", " "), ID, SECRET], "oauth-m2m"),
            (
                &[
                    HOST,
                    ID,
                    COLLECTION,
                    PIPELINE[0],
                    PIPELINE[1],
                    PIPELINE[2],
                    PIPELINE[3],
                    PIPELINE[4],
                ],
                "azure-devops-oidc",
            ),
        ] {
            assert_eq!(chosen(variables).as_deref(), Ok(kind), "{variables:?}");
        }
    }

    #[test]
    fn available_kinds_are_tried_in_the_order_of_the_go_sdk() {
        let bin = tempfile::tempdir().unwrap();
        program(bin.path(), "databricks", 2 << 20);
        program(bin.path(), "az", 100);
        let path = ("PATH", bin.path().to_str().unwrap());
        assert_eq!(chosen(&[HOST, path]).unwrap(), "databricks-cli");
        assert_eq!(chosen(&[AZURE, path]).unwrap(), "databricks-cli azure-cli");
        assert_eq!(
            chosen(&[
                HOST,
                path,
                ID,
                GITHUB[0],
                GITHUB[1],
                ("DATABRICKS_OIDC_TOKEN", "t")
            ])
            .unwrap(),
            "databricks-cli github-oidc env-oidc"
        );
        // Settings that select a kind exclude the others.
        assert_eq!(chosen(&[HOST, path, TOKEN]).unwrap(), "pat");
        // Only some kinds can assume a group.
        assert_eq!(
            chosen(&[
                HOST,
                path,
                ID,
                ("DATABRICKS_OIDC_TOKEN", "t"),
                ("DATABRICKS_GROUP_ID", "7")
            ])
            .unwrap(),
            "env-oidc"
        );
    }

    #[test]
    fn settings_of_two_families_are_refused_with_the_origin_of_both() {
        for (variables, names) in [
            (
                &[HOST, TOKEN, ID, SECRET][..],
                &[
                    "oauth (`DATABRICKS_CLIENT_SECRET`)",
                    "pat (`DATABRICKS_TOKEN`)",
                    "`oauth-m2m`",
                    "`pat`",
                ][..],
            ),
            (
                &[HOST, TOKEN, ID],
                &["oauth (`DATABRICKS_CLIENT_ID`)", "pat (`DATABRICKS_TOKEN`)"],
            ),
            (
                &[HOST, TOKEN, ("ARM_TENANT_ID", "t")],
                &["azure (`ARM_TENANT_ID`)", "pat (", "`azure-cli`"],
            ),
            (
                &[HOST, ID, SECRET, ("DATABRICKS_OIDC_TOKEN_FILE", "/f")],
                &["file-oidc (`DATABRICKS_OIDC_TOKEN_FILE`)", "oauth ("],
            ),
        ] {
            let message = chosen(variables).unwrap_err();
            assert!(message.starts_with("more than one way"), "{message}");
            for name in names {
                assert!(message.contains(name), "no {name} in {message}");
            }
        }
    }

    #[test]
    fn missing_and_invalid_settings_are_named() {
        let forced = |kind| ("DATABRICKS_AUTH_TYPE", kind);
        for (variables, parts) in [
            (
                &[HOST, ID][..],
                &["DATABRICKS_CLIENT_SECRET", "`DATABRICKS_CLIENT_ID` is"][..],
            ),
            (&[HOST, SECRET], &["DATABRICKS_CLIENT_ID"]),
            (&[HOST, forced("pat")], &["DATABRICKS_TOKEN"]),
            (
                &[HOST],
                &[
                    "no way to authenticate",
                    "databricks auth login --host https://dbc-1",
                    "`databricks`, which is not installed",
                ],
            ),
            (
                &[AZURE],
                &["no way to authenticate", "`az`, which is not installed"],
            ),
            (
                &[HOST, forced("kerberos")],
                &[
                    "`DATABRICKS_AUTH_TYPE` is `kerberos`",
                    "`pat`",
                    "`azure-cli`",
                ],
            ),
            (
                &[HOST, forced("databricks-cli")],
                &[
                    "databricks-cli needs the command `databricks`",
                    "DATABRICKS_CLI_PATH",
                ],
            ),
            (
                &[HOST, forced("azure-cli")],
                &["azure-cli needs the command `az`", "az login"],
            ),
            (
                &[HOST, forced("file-oidc")],
                &["DATABRICKS_OIDC_TOKEN_FILEPATH"],
            ),
            (&[HOST, forced("env-oidc")], &["DATABRICKS_OIDC_TOKEN"]),
            (
                &[HOST, ("DATABRICKS_OIDC_TOKEN_ENV", "MINE")],
                &["`MINE` is not set"],
            ),
            (
                &[HOST, forced("github-oidc"), ID],
                &["ACTIONS_ID_TOKEN_REQUEST_URL", "id-token: write"],
            ),
            (
                &[HOST, forced("github-oidc"), GITHUB[0], GITHUB[1]],
                &["DATABRICKS_CLIENT_ID"],
            ),
            (
                &[HOST, forced("metadata-service")],
                &["DATABRICKS_METADATA_SERVICE_URL"],
            ),
            (
                &[
                    HOST,
                    (
                        "DATABRICKS_METADATA_SERVICE_URL",
                        "http://metadata.example/hunter2",
                    ),
                ],
                &["this machine"],
            ),
            (
                &[AZURE, ("ARM_CLIENT_SECRET", "hunter2")],
                &["ARM_CLIENT_ID"],
            ),
            (
                &[HOST, TOKEN, ("DATABRICKS_GROUP_ID", "7")],
                &[
                    "auth type \"pat\" does not support group role assumption. Use Databricks OAuth authentication",
                    "unset `DATABRICKS_GROUP_ID`",
                ],
            ),
            (
                &[
                    AZURE,
                    ("ARM_USE_MSI", "true"),
                    forced("azure-msi"),
                    ("DATABRICKS_GROUP_ID", "7"),
                ],
                &["auth type \"azure-msi\" does not support group role assumption"],
            ),
            (
                &[HOST, forced("model-serving")],
                &["IS_IN_DATABRICKS_MODEL_SERVING_ENV"],
            ),
            (
                &[
                    HOST,
                    ("IS_IN_DB_MODEL_SERVING_ENV", "true"),
                    ("SERVING_CREDENTIALS_DIR", "/nowhere"),
                ],
                &[
                    "no way to authenticate",
                    "`/nowhere/model-dependencies-oauth-token`, which does not exist",
                ],
            ),
            (&[TOKEN], &["`DATABRICKS_HOST` is not set"]),
            (
                &[("DATABRICKS_AZURE_RESOURCE_ID", "/subscriptions/x")],
                &[
                    "`DATABRICKS_HOST` is not set",
                    "az databricks workspace show",
                ],
            ),
            // Known, and refused by name.
            (
                &[
                    HOST,
                    ("DATABRICKS_USERNAME", "u"),
                    ("DATABRICKS_PASSWORD", "hunter2"),
                ],
                &["with basic is not supported", "databricks auth login"],
            ),
            (
                &[HOST, ("GOOGLE_CREDENTIALS", "{}")],
                &["google-credentials", "service principal"],
            ),
            (
                &[HOST, ("DATABRICKS_GOOGLE_SERVICE_ACCOUNT", "a")],
                &["google-id"],
            ),
            (
                &[HOST, forced("external-browser")],
                &["external-browser", "databricks auth login"],
            ),
            (
                &[HOST, forced("azure-devops-oidc"), ID],
                &["SYSTEM_ACCESSTOKEN", "$(System.AccessToken)"],
            ),
            (
                &[HOST, forced("azure-devops-oidc"), ID, PIPELINE[0]],
                &["SYSTEM_TEAMFOUNDATIONCOLLECTIONURI", "Azure Pipelines"],
            ),
            // A job whose step does not map the token.
            (
                &[HOST, ID, COLLECTION],
                &["SYSTEM_ACCESSTOKEN", "$(System.AccessToken)"],
            ),
            (
                &[AZURE, ("ARM_CLIENT_ID", "i"), GITHUB[0], GITHUB[1]],
                &["github-oidc-azure", "azure/login"],
            ),
        ] {
            let message = chosen(variables).expect_err("an error");
            for part in parts {
                assert!(message.contains(part), "no `{part}` in: {message}");
            }
            assert!(!message.contains("hunter2"), "{message}");
        }
    }

    #[test]
    fn kinds_that_cannot_assume_a_group_are_skipped_unless_named() {
        let group = ("DATABRICKS_GROUP_ID", "7");
        let identity = ("DATABRICKS_OIDC_TOKEN", "jwt");
        for variables in [
            &[HOST, TOKEN, identity, group][..],
            &[AZURE, ("ARM_USE_MSI", "true"), identity, group],
        ] {
            assert_eq!(
                chosen(variables).as_deref(),
                Ok("env-oidc"),
                "{variables:?}"
            );
        }
        let bin = tempfile::tempdir().unwrap();
        program(bin.path(), "databricks", 2 << 20);
        let path = ("PATH", bin.path().to_str().unwrap());
        let message = chosen(&[HOST, path, group]).unwrap_err();
        let words = "auth type \"databricks-cli\" does not support group role assumption";
        assert!(message.starts_with(words), "{message}");
    }

    #[test]
    fn the_token_of_model_serving_comes_last_and_brings_its_host() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("model-dependencies-oauth-token"), "").unwrap();
        program(scratch.path(), "databricks", 2 << 20);
        let path = scratch.path().to_str().unwrap();
        let serving = [
            ("IS_IN_DATABRICKS_MODEL_SERVING_ENV", "true"),
            ("SERVING_CREDENTIALS_DIR", path),
            (
                "DATABRICKS_MODEL_SERVING_HOST_URL",
                "https://dbc-1.cloud.databricks.com",
            ),
        ];
        assert_eq!(chosen(&serving).unwrap(), "model-serving");
        let [is_serving, directory, host] = serving;
        let found = chosen(&[is_serving, directory, host, ("PATH", path)]);
        assert_eq!(found.unwrap(), "databricks-cli model-serving");
        assert_eq!(
            chosen(&[is_serving, directory, host, TOKEN]).unwrap(),
            "pat"
        );
        // Elsewhere neither counts.
        assert!(
            chosen(&[directory, host])
                .unwrap_err()
                .contains("`DATABRICKS_HOST` is not set")
        );
    }

    /// Version managers and packagers install a small script in place of the program.
    #[cfg(unix)]
    #[test]
    fn the_old_cli_is_recognized_by_its_entry_point() {
        let bin = tempfile::tempdir().unwrap();
        let path = ("PATH", bin.path().to_str().unwrap());
        let databricks = bin.path().join("databricks");
        for imported in ["cli", "main"] {
            program(bin.path(), "databricks", 0);
            let script = format!(
                "#!/usr/bin/python3\nimport re\nimport sys\nfrom databricks_cli.cli import {imported}\n\
                 if __name__ == '__main__':\n    sys.exit({imported}())\n"
            );
            fs::write(&databricks, script).unwrap();
            let forced = ("DATABRICKS_AUTH_TYPE", "databricks-cli");
            let message = chosen(&[HOST, path, forced]).unwrap_err();
            assert!(message.contains("is the old one"), "{message}");
            assert!(message.contains("from pip"), "{message}");
            let message = chosen(&[HOST, path]).unwrap_err();
            assert!(message.contains("is the old one"), "{message}");
        }
        for script in [
            "#!/usr/bin/env bash\nexec mise exec -- databricks \"$@\"\n",
            "#!/bin/sh\nexec /nix/store/x-databricks-cli/bin/databricks \"$@\"\n",
        ] {
            fs::write(&databricks, script).unwrap();
            assert_eq!(chosen(&[HOST, path]).unwrap(), "databricks-cli");
        }
        // The next one on the path counts.
        let other = tempfile::tempdir().unwrap();
        program(other.path(), "databricks", 10);
        fs::write(&databricks, "from databricks_cli.cli import main").unwrap();
        let both = format!("{}:{}", bin.path().display(), other.path().display());
        assert_eq!(chosen(&[HOST, ("PATH", &both)]).unwrap(), "databricks-cli");
    }

    #[test]
    fn a_secret_with_a_line_break_inside_is_refused_and_not_repeated() {
        let message = chosen(&[HOST, ("DATABRICKS_TOKEN", "hunter\n2")]).unwrap_err();
        assert!(
            message.contains("`DATABRICKS_TOKEN` holds") && !message.contains("hunter"),
            "{message}"
        );
    }

    #[test]
    fn an_id_without_a_secret_belongs_to_the_identity_token_beside_it() {
        let labels = |variables: &[(&str, &str)]| {
            let variables = variables.iter();
            let variables =
                variables.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            let settings = WorkspaceSettings::from_variables(variables.collect());
            let found = families(&ResolvedSettings::new(settings).unwrap());
            let labels: Vec<&str> = found.keys().map(|family| family.label()).collect();
            labels.join(" ")
        };
        let id = ("DATABRICKS_CLIENT_ID", "i");
        let file = ("DATABRICKS_OIDC_TOKEN_FILEPATH", "f");
        assert_eq!(labels(&[id, file]), "file-oidc");
        assert_eq!(
            labels(&[id, file, ("DATABRICKS_CLIENT_SECRET", "s")]),
            "file-oidc oauth"
        );
        assert_eq!(labels(&[id, ("DATABRICKS_TOKEN", "t")]), "oauth pat");
        assert_eq!(labels(&[("ARM_USE_MSI", "false")]), "");
        assert_eq!(labels(&[("ARM_USE_MSI", "True")]), "azure");
    }
}
