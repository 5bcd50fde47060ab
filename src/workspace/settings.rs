//! What the workspace room needs to know: the settings of the Databricks SDKs, from the environment and from
//! `~/.databrickscfg`, each with the place it came from.
//!
//! Names, precedence and the choice of a profile are those of the SDKs. Nothing here is sent anywhere.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, io,
    path::PathBuf,
    sync::Arc,
};

use secrecy::{ExposeSecret, SecretString};

use super::{auth, databrickscfg::SyntaxError, host::Host, profile};
use crate::config::without_userinfo;

/// What is set, as far as it is; empty values count as absent, white space around them is dropped.
macro_rules! settings {
    ($($(#[$doc:meta])* $variant:ident $field:ident: $type:ty, [$($name:literal),+], [$($variable:literal),*], $way:expr;)+) => {
        /// How to reach and authenticate to the workspace. Empty values count as absent, white space around them is dropped.
        #[derive(Clone, Debug, Default)]
        pub struct Settings {
            $($(#[$doc])* pub $field: Option<$type>,)+
            /// Where each value came from, where that is known.
            pub origin: Origin,
            /// The environment: where commands, proxies and tokens that other settings name are looked up.
            pub variables: Variables,
            /// Where the cloud's own services answer.
            pub services: Services,
        }

        /// One of the [`Settings`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Attribute { $($(#[$doc])* $variant,)+ }

        impl Attribute {
            /// Every one, in the order of the Databricks SDKs.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// Its names in a profile; the first is the usual one.
            pub(super) fn names(self) -> &'static [&'static str] {
                match self { $(Self::$variant => &[$($name),+],)+ }
            }

            /// The variables that set it; the first is the usual one.
            pub fn variables(self) -> &'static [&'static str] {
                match self { $(Self::$variant => &[$($variable),*],)+ }
            }

            /// Whether its value must not be shown.
            pub fn is_secret(self) -> bool {
                match self { $(Self::$variant => <$type as Text>::IS_SECRET,)+ }
            }

            /// The way to authenticate that is meant by setting it.
            pub(super) fn way(self) -> Option<Way> {
                match self { $(Self::$variant => $way,)+ }
            }
        }

        impl Settings {
            /// A value as text. Secrets are exposed.
            pub(super) fn text(&self, attribute: Attribute) -> Option<&str> {
                match attribute { $(Attribute::$variant => self.$field.as_ref().map(Text::text),)+ }
            }

            pub(super) fn set(&mut self, attribute: Attribute, value: Option<String>) {
                match attribute { $(Attribute::$variant => self.$field = value.map(Into::into),)+ }
            }
        }
    };
}

settings! {
    /// The workspace's address.
    Host host: String, ["host"], ["DATABRICKS_HOST"], None;
    /// The account, for account-wide federation.
    AccountId account_id: String, ["account_id"], ["DATABRICKS_ACCOUNT_ID"], None;
    /// The workspace, where one address serves several.
    WorkspaceId workspace_id: String, ["workspace_id"], ["DATABRICKS_WORKSPACE_ID"], None;
    /// The group whose rights are assumed.
    GroupId group_id: String, ["group_id"], ["DATABRICKS_GROUP_ID"], None;
    /// The cloud, where the address does not tell.
    Cloud cloud: String, ["cloud"], ["DATABRICKS_CLOUD"], None;
    /// Where the token endpoint is described.
    DiscoveryUrl discovery_url: String, ["discovery_url"], ["DATABRICKS_DISCOVERY_URL"], None;
    /// A personal access token.
    Token token: SecretString, ["token"], ["DATABRICKS_TOKEN"], Some(Way::Pat);
    /// The audience of an identity token that is asked for.
    TokenAudience token_audience: String, ["token_audience", "audience"], ["DATABRICKS_TOKEN_AUDIENCE"], None;
    /// The variable that holds an identity token.
    OidcTokenEnv oidc_token_env: String, ["oidc_token_env"], ["DATABRICKS_OIDC_TOKEN_ENV"], Some(Way::EnvOidc);
    /// The file that holds an identity token.
    OidcTokenFilepath oidc_token_filepath: String, ["oidc_token_filepath", "databricks_id_token_filepath"],
        ["DATABRICKS_OIDC_TOKEN_FILEPATH", "DATABRICKS_OIDC_TOKEN_FILE"], Some(Way::FileOidc);
    /// A user's name, for a password.
    Username username: String, ["username"], ["DATABRICKS_USERNAME"], Some(Way::Basic);
    /// A user's password.
    Password password: SecretString, ["password"], ["DATABRICKS_PASSWORD"], Some(Way::Basic);
    /// The application id of a service principal.
    ClientId client_id: String, ["client_id"], ["DATABRICKS_CLIENT_ID"], Some(Way::OAuth);
    /// An OAuth secret of a service principal.
    ClientSecret client_secret: SecretString, ["client_secret"], ["DATABRICKS_CLIENT_SECRET"], Some(Way::OAuth);
    /// Which profile of the file is meant.
    Profile profile: String, ["profile"], ["DATABRICKS_CONFIG_PROFILE"], None;
    /// The file of profiles.
    ConfigFile config_file: String, ["config_file"], ["DATABRICKS_CONFIG_FILE"], None;
    /// A service account of Google Cloud.
    GoogleServiceAccount google_service_account: String, ["google_service_account"], ["DATABRICKS_GOOGLE_SERVICE_ACCOUNT"], Some(Way::Google);
    /// Credentials of Google Cloud.
    GoogleCredentials google_credentials: SecretString, ["google_credentials"], ["GOOGLE_CREDENTIALS"], Some(Way::Google);
    /// The workspace's resource id in Azure.
    AzureWorkspaceResourceId azure_workspace_resource_id: String, ["azure_workspace_resource_id"], ["DATABRICKS_AZURE_RESOURCE_ID"], Some(Way::Azure);
    /// Whether the machine's managed identity is used.
    AzureUseMsi azure_use_msi: String, ["azure_use_msi"], ["ARM_USE_MSI"], Some(Way::Azure);
    /// A secret of an application in Entra ID.
    AzureClientSecret azure_client_secret: SecretString, ["azure_client_secret"], ["ARM_CLIENT_SECRET"], Some(Way::Azure);
    /// An application or a user-assigned managed identity in Entra ID.
    AzureClientId azure_client_id: String, ["azure_client_id"], ["ARM_CLIENT_ID"], Some(Way::Azure);
    /// The tenant in Entra ID.
    AzureTenantId azure_tenant_id: String, ["azure_tenant_id"], ["ARM_TENANT_ID"], Some(Way::Azure);
    /// Which of Azure's clouds.
    AzureEnvironment azure_environment: String, ["azure_environment"], ["ARM_ENVIRONMENT"], None;
    /// The Databricks CLI.
    DatabricksCliPath databricks_cli_path: String, ["databricks_cli_path"], ["DATABRICKS_CLI_PATH"], None;
    /// The way to authenticate, where several would do.
    AuthType auth_type: String, ["auth_type"], ["DATABRICKS_AUTH_TYPE"], None;
    /// A service on this machine that hands out workspace tokens; its path is a secret.
    MetadataServiceUrl metadata_service_url: SecretString, ["metadata_service_url"], ["DATABRICKS_METADATA_SERVICE_URL"], Some(Way::MetadataService);
    /// OAuth scopes, between commas or blanks.
    Scopes scopes: String, ["scopes"], [], None;
    /// OAuth authorization details (RFC 9396), as JSON.
    AuthorizationDetails authorization_details: String, ["authorization_details"], [], None;
    /// Where a GitHub Actions job asks for its identity token.
    ActionsIdTokenRequestUrl actions_id_token_request_url: String, ["actions_id_token_request_url"], ["ACTIONS_ID_TOKEN_REQUEST_URL"], None;
    /// What it shows there.
    ActionsIdTokenRequestToken actions_id_token_request_token: SecretString, ["actions_id_token_request_token"], ["ACTIONS_ID_TOKEN_REQUEST_TOKEN"], None;
}

trait Text {
    const IS_SECRET: bool;
    fn text(&self) -> &str;
}

impl Text for String {
    const IS_SECRET: bool = false;
    fn text(&self) -> &str {
        self
    }
}

impl Text for SecretString {
    const IS_SECRET: bool = true;
    fn text(&self) -> &str {
        self.expose_secret()
    }
}

/// The families of settings of which one alone may be present; the words are those of the Databricks SDKs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    Azure,
    Basic,
    EnvOidc,
    FileOidc,
    Google,
    MetadataService,
    OAuth,
    Pat,
}

impl Way {
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Azure => "azure",
            Self::Basic => "basic",
            Self::EnvOidc => "env-oidc",
            Self::FileOidc => "file-oidc",
            Self::Google => "google",
            Self::MetadataService => "metadata-service",
            Self::OAuth => "oauth",
            Self::Pat => "pat",
        }
    }

    /// What `auth_type` would choose it.
    fn auth_type(self) -> &'static str {
        match self {
            Self::Azure => "azure-client-secret`, `azure-msi` or `azure-cli",
            Self::OAuth => "oauth-m2m",
            Self::Google => "google-credentials",
            other => other.label(),
        }
    }
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A flag of the command line.
    Flag(&'static str),
    /// A variable of the environment.
    Variable(&'static str),
    /// A profile of a file.
    Profile {
        /// Its name.
        profile: String,
        /// The file.
        file: PathBuf,
    },
    /// The program itself.
    Given,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "from {flag}"),
            Self::Variable(variable) => write!(f, "from {variable}"),
            Self::Profile { profile, file } => {
                write!(f, "from profile `{profile}` of `{}`", file.display())
            }
            Self::Given => f.write_str("given"),
        }
    }
}

/// Where the values of [`Settings`] came from.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    pub(super) sources: BTreeMap<Attribute, Source>,
    /// The profile that was read.
    pub(super) profile: Option<(String, PathBuf)>,
    /// A profile that was asked for in a file that is not there.
    pub(super) missing: Option<(String, PathBuf)>,
    pub(super) is_resolved: bool,
}

/// The environment, read once; its values do not print.
#[derive(Clone, Default)]
pub struct Variables(Arc<HashMap<String, String>>);

impl Variables {
    /// A value that is not blank, without the white space around it.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0
            .get(name)
            .map(|value| value.trim())
            .filter(|value| !value.is_empty())
    }
}

impl FromIterator<(String, String)> for Variables {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(variables: I) -> Self {
        Self(Arc::new(variables.into_iter().collect()))
    }
}

impl fmt::Debug for Variables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} variables", self.0.len())
    }
}

/// Where the cloud's own services answer. The default is where they do; an emulator answers elsewhere.
#[derive(Clone, Debug, Default)]
pub struct Services {
    /// Microsoft Entra ID, instead of the one that belongs to the workspace's cloud. Ends with a slash.
    pub entra_id: Option<String>,
    /// The instance metadata service of Azure, instead of `http://169.254.169.254`.
    pub instance_metadata: Option<String>,
}

/// What is set, and by what; for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provenance {
    /// Which setting.
    pub attribute: Attribute,
    /// Its name in a profile.
    pub name: &'static str,
    /// Its value; `None` for a secret.
    pub value: Option<String>,
    /// Where it came from.
    pub source: Source,
}

/// What the settings amount to, before anything is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The workspace's address.
    pub host: Host,
    /// The workspace's id, where the settings or the address name it.
    pub workspace_id: Option<String>,
    /// The ways to authenticate, in the order in which they are tried until one works.
    pub kinds: Vec<auth::AuthKind>,
    /// The profile that was read.
    pub profile: Option<String>,
    /// Every setting that is present.
    pub settings: Vec<Provenance>,
}

/// What is wrong with the settings.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The address belongs to the account console.
    #[error("`{host}` is an account console, not a workspace")]
    AccountConsole {
        /// The host given.
        host: String,
    },
    /// The settings of two ways to authenticate are present.
    #[error("more than one way to authenticate is configured: {}", ways.join(" and "))]
    Ambiguous {
        /// Each way, with the setting that asks for it.
        ways: Vec<String>,
        /// What `DATABRICKS_AUTH_TYPE` could choose.
        choices: String,
    },
    /// The file of profiles cannot be read.
    #[error("cannot read the profiles in `{}`", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file of profiles is not what it should be.
    #[error("cannot understand the profiles in `{}`", path.display())]
    FileSyntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: SyntaxError,
    },
    /// A group is to be assumed in a way that cannot.
    /// The words are those of the Databricks SDKs.
    #[error(
        "auth type \"{kind}\" does not support group role assumption. Use Databricks OAuth authentication"
    )]
    Group {
        /// The kind.
        kind: &'static str,
        /// The setting that asks for it.
        setting: String,
    },
    /// A way to authenticate lacks one of its settings.
    #[error("`{missing}` is not set, but {because}")]
    Incomplete {
        /// The variable that is missing.
        missing: &'static str,
        /// Why it is needed.
        because: String,
    },
    /// The address cannot be understood.
    #[error("`DATABRICKS_HOST` is not an address: `{host}`")]
    InvalidHost {
        /// What was given.
        host: String,
        /// Why.
        #[source]
        source: Option<url::ParseError>,
    },
    /// A value is not what it should be.
    #[error("{name} {problem}")]
    InvalidValue {
        /// The setting, as it was written.
        name: String,
        /// What is wrong; never the value.
        problem: &'static str,
    },
    /// A profile was asked for in a file that is not there, and nothing else does.
    #[error("the profile `{profile}` is asked for, but `{}` does not exist", path.display())]
    MissingFile {
        /// The profile.
        profile: String,
        /// The file.
        path: PathBuf,
    },
    /// A program that is needed is not there.
    #[error("{kind} needs the command `{command}`, which {problem}")]
    NoCommand {
        /// The way.
        kind: &'static str,
        /// The command.
        command: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Nothing to authenticate with.
    #[error("no way to authenticate to the workspace is configured")]
    NoAuthentication {
        /// What was looked for and found unfit.
        notes: Vec<String>,
        /// The workspace, for the hint.
        host: String,
    },
    /// No address.
    #[error("`DATABRICKS_HOST` is not set")]
    NoHost {
        /// How the workspace is named otherwise.
        resource_id: bool,
    },
    /// The file has no profile of that name.
    #[error("`{}` has no profile `{profile}`", path.display())]
    NoProfile {
        /// The profile asked for.
        profile: String,
        /// The file.
        path: PathBuf,
        /// Those that it has.
        known: Vec<String>,
    },
    /// Model Serving has put no token beside the model.
    #[error("model-serving needs the token in `{}`, which does not exist", path.display())]
    NoServingToken {
        /// Where it should be.
        path: PathBuf,
    },
    /// Secrets would travel in the clear.
    #[error("`DATABRICKS_HOST` must be https: `{host}`")]
    NotHttps {
        /// What was given.
        host: String,
    },
    /// A way that the SDKs have and we do not.
    #[error("signing in with {kind} is not supported")]
    Refused {
        /// Its name.
        kind: &'static str,
        /// What to use instead.
        instead: &'static str,
    },
    /// `[__settings__]` is no profile.
    #[error("`__settings__` is a reserved name, not a profile")]
    ReservedProfile,
    /// `DATABRICKS_AUTH_TYPE` names nothing that anybody knows.
    #[error("{setting} is `{auth_type}`, which is no way to authenticate")]
    UnknownAuthType {
        /// The setting, as it was written.
        setting: String,
        /// What was given.
        auth_type: String,
    },
}

impl SettingsError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::AccountConsole { .. }
            | Self::InvalidHost { .. }
            | Self::NoHost { resource_id: false } => {
                "set `DATABRICKS_HOST` to the workspace's address, such as `https://dbc-1234.cloud.databricks.com`, or name a profile of ~/.databrickscfg with --profile"
            }
            Self::NoHost { resource_id: true } => {
                "`DATABRICKS_AZURE_RESOURCE_ID` alone is not enough: set `DATABRICKS_HOST`, which `az databricks workspace show --ids RESOURCE_ID --query workspaceUrl` prints"
            }
            Self::Ambiguous { choices, .. } => {
                return Some(format!(
                    "remove all but one, or choose with `DATABRICKS_AUTH_TYPE` (`{choices}`)"
                ));
            }
            Self::File { .. } => "check the file's permissions, or `DATABRICKS_CONFIG_FILE`",
            Self::FileSyntax { .. } => {
                "a profile is a line `[name]` and lines `key = value` below it"
            }
            Self::Group { setting, .. } => {
                return Some(format!(
                    "unset {setting}, or sign in as a service principal (oauth-m2m, or one of the oidc kinds)"
                ));
            }
            Self::Incomplete {
                missing: "DATABRICKS_CLIENT_ID" | "DATABRICKS_CLIENT_SECRET",
                ..
            } => "set both `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET`",
            Self::Incomplete { missing, .. } => return Some(format!("set `{missing}`")),
            Self::InvalidValue { problem, .. } if problem.contains("characters") => {
                "look for line breaks and other stray characters in the value"
            }
            Self::InvalidValue { .. } => return None,
            Self::MissingFile { .. } => {
                "run `databricks auth login`, which writes it, or set `DATABRICKS_HOST` and unset `DATABRICKS_CONFIG_PROFILE`"
            }
            Self::NoCommand { kind, problem, .. } => match (*kind, problem.contains("old")) {
                ("azure-cli", _) => {
                    "install the Azure CLI (https://learn.microsoft.com/cli/azure) and run `az login`"
                }
                (_, true) => {
                    "install the current Databricks CLI (https://docs.databricks.com/dev-tools/cli/install); the old one came from pip"
                }
                (_, false) => {
                    "install the Databricks CLI (https://docs.databricks.com/dev-tools/cli/install), or set `DATABRICKS_CLI_PATH` to it"
                }
            },
            Self::NoAuthentication { notes, host } => {
                let mut parts = vec![
                    format!("on a laptop: `databricks auth login --host {host}`"),
                    "elsewhere: set `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET` of a service principal".to_owned(),
                ];
                parts.extend(notes.iter().cloned());
                return Some(parts.join("; "));
            }
            Self::NoProfile { known, .. } => {
                return Some(if known.is_empty() {
                    "the file has no profile at all: run `databricks auth login`".to_owned()
                } else {
                    format!("it has {}", listed(known))
                });
            }
            Self::NoServingToken { .. } => {
                "log the model with the resources that it uses, so that Model Serving gives it a token, or set `DATABRICKS_CLIENT_ID` and `DATABRICKS_CLIENT_SECRET`"
            }
            Self::NotHttps { .. } => "only an address on this machine's loopback may be http",
            Self::Refused { instead, .. } => instead,
            Self::ReservedProfile => "name a profile that holds a host",
            Self::UnknownAuthType { .. } => {
                return Some(format!("one of {}", listed(&auth::AuthKind::labels())));
            }
        };
        Some(hint.to_owned())
    }
}

/// At most so many names are listed in a hint.
const LISTED: usize = 12;

fn listed<S: AsRef<str>>(names: &[S]) -> String {
    let mut text: Vec<String> = names
        .iter()
        .take(LISTED)
        .map(|name| format!("`{}`", name.as_ref()))
        .collect();
    if names.len() > LISTED {
        text.push(format!("{} more", names.len() - LISTED));
    }
    text.join(", ")
}

impl Settings {
    /// Those that variables set.
    pub fn from_variables(variables: Variables) -> Self {
        let mut settings = Self::default();
        for &attribute in Attribute::ALL {
            let found = attribute
                .variables()
                .iter()
                .find_map(|name| Some((*name, variables.get(name)?.to_owned())));
            if let Some((name, value)) = found {
                settings.set(attribute, Some(value));
                let source = Source::Variable(name);
                settings.origin.sources.insert(attribute, source);
            }
        }
        settings.variables = variables;
        settings
    }

    /// With this profile of the file, whatever the environment names; `None` changes nothing.
    #[must_use]
    pub fn with_profile(mut self, profile: Option<String>) -> Self {
        if profile.is_some() {
            self.profile = profile;
            let source = Source::Flag("--profile");
            self.origin.sources.insert(Attribute::Profile, source);
        }
        self
    }

    /// Trims every value, drops the empty ones, and fills in what the profile says. Reads a file, and no more.
    pub fn resolve(mut self) -> Result<Self, SettingsError> {
        if self.origin.is_resolved {
            return Ok(self);
        }
        for &attribute in Attribute::ALL {
            let value = self.text(attribute).map(str::trim);
            let value = value.filter(|value| !value.is_empty()).map(str::to_owned);
            self.set(attribute, value);
        }
        profile::read(&mut self)?;
        if self.host.is_none() && auth::is_serving(&self.variables) {
            let found = auth::SERVING_HOSTS.iter();
            let mut found = found.filter_map(|name| Some((*name, self.variables.get(name)?)));
            if let Some((name, host)) = found.next() {
                let host = host.to_owned();
                self.set(Attribute::Host, Some(host));
                let source = Source::Variable(name);
                self.origin.sources.insert(Attribute::Host, source);
            }
        }
        self.origin.is_resolved = true;
        Ok(self)
    }

    /// What they amount to, before anything is asked. Reads the profile.
    pub fn summary(&self) -> Result<Summary, SettingsError> {
        let settings = self.clone().resolve()?;
        let (host, id_in_host) = settings.address()?;
        let kinds = auth::choose(&settings, &host)?
            .iter()
            .map(auth::TokenSource::kind)
            .collect();
        Ok(Summary {
            workspace_id: settings.workspace_id.clone().or(id_in_host),
            host,
            kinds,
            profile: settings
                .origin
                .profile
                .as_ref()
                .map(|(name, _)| name.clone()),
            settings: settings.provenance(),
        })
    }

    /// Every setting that is present, with its source. After [`resolve`](Self::resolve), those of the profile too.
    pub fn provenance(&self) -> Vec<Provenance> {
        Attribute::ALL
            .iter()
            .filter_map(|&attribute| {
                let value = self.text(attribute)?;
                Some(Provenance {
                    attribute,
                    name: attribute.names().first().copied().unwrap_or_default(),
                    value: (!attribute.is_secret()).then(|| shown(attribute, value)),
                    source: self.source(attribute),
                })
            })
            .collect()
    }

    /// Every secret among them.
    pub(super) fn secrets(&self) -> Vec<SecretString> {
        let secrets = Attribute::ALL
            .iter()
            .filter(|attribute| attribute.is_secret());
        secrets
            .filter_map(|&attribute| self.text(attribute).map(Into::into))
            .collect()
    }

    /// The variables that hold secrets of the workspace: those that this program reads, under their own names and those
    /// that other settings give, and what hosts of the same identity set beside them.
    pub fn secret_variables(&self) -> Vec<String> {
        let settings = self.clone().resolve();
        let settings = settings.as_ref().unwrap_or(self);
        let mut names: Vec<String> = Attribute::ALL
            .iter()
            .filter(|attribute| attribute.is_secret())
            .flat_map(|attribute| attribute.variables())
            .chain(SECRET_VARIABLES)
            .map(|&name| name.to_owned())
            .collect();
        names.extend(settings.oidc_token_env.clone());
        // Each in lower case too.
        for name in PROXY_VARIABLES {
            for name in [name.to_owned(), name.to_ascii_lowercase()] {
                if self.variables.get(&name).is_some_and(has_password) {
                    names.push(name);
                }
            }
        }
        names
    }

    /// Where a value came from.
    pub fn source(&self, attribute: Attribute) -> Source {
        match self.origin.sources.get(&attribute) {
            Some(source) => source.clone(),
            None => attribute
                .variables()
                .first()
                .map_or(Source::Given, |name| Source::Variable(name)),
        }
    }

    /// A setting as whoever wrote it would call it.
    pub(super) fn named(&self, attribute: Attribute) -> String {
        match self.source(attribute) {
            Source::Flag(name) | Source::Variable(name) => format!("`{name}`"),
            source => format!(
                "`{}` {source}",
                attribute.names().first().copied().unwrap_or_default()
            ),
        }
    }

    /// The workspace's address and the workspace id that stands in it.
    pub(super) fn address(&self) -> Result<(Host, Option<String>), SettingsError> {
        let Some(host) = &self.host else {
            if let Some((profile, path)) = self.origin.missing.clone() {
                return Err(SettingsError::MissingFile { profile, path });
            }
            return Err(SettingsError::NoHost {
                resource_id: self.azure_workspace_resource_id.is_some(),
            });
        };
        Host::parse(host)
    }

    /// The ways to authenticate whose settings are present, each with the one that shows it.
    pub(super) fn ways(&self) -> BTreeMap<Way, Attribute> {
        let mut ways = BTreeMap::new();
        for &attribute in Attribute::ALL {
            if let Some(way) = attribute.way().filter(|_| self.is_present(attribute)) {
                // A secret says more of what is meant than an id.
                if attribute.is_secret() {
                    ways.insert(way, attribute);
                } else {
                    ways.entry(way).or_insert(attribute);
                }
            }
        }
        // An id without a secret belongs to the identity token that it is exchanged with.
        if self.client_secret.is_none()
            && (ways.contains_key(&Way::EnvOidc) || ways.contains_key(&Way::FileOidc))
        {
            ways.remove(&Way::OAuth);
        }
        ways
    }

    pub(super) fn uses_msi(&self) -> bool {
        let value = self.azure_use_msi.as_deref().unwrap_or_default();
        matches!(
            value.to_ascii_lowercase().as_str(),
            "true" | "1" | "t" | "yes" | "on"
        )
    }

    fn is_present(&self, attribute: Attribute) -> bool {
        match attribute {
            Attribute::AzureUseMsi => self.uses_msi(),
            other => self.text(other).is_some(),
        }
    }

    /// Refuses the settings of two ways at once, unless one is chosen.
    pub(super) fn one_way(&self) -> Result<Option<Way>, SettingsError> {
        let ways = self.ways();
        if ways.len() > 1 {
            let choices: Vec<&str> = ways.keys().map(|way| way.auth_type()).collect();
            return Err(SettingsError::Ambiguous {
                ways: ways
                    .iter()
                    .map(|(way, &attribute)| format!("{} ({})", way.label(), self.named(attribute)))
                    .collect(),
                choices: choices.join("`, `"),
            });
        }
        Ok(ways.into_keys().next())
    }
}

/// Secrets that are no settings of the Databricks SDKs: identity tokens, and what Azure's hosts let a managed identity use.
const SECRET_VARIABLES: &[&str] = &[
    "ARM_CLIENT_CERTIFICATE_PASSWORD",
    "ARM_OIDC_REQUEST_TOKEN",
    "ARM_OIDC_TOKEN",
    "AZURE_CLIENT_CERTIFICATE_PASSWORD",
    "AZURE_CLIENT_SECRET",
    "AZURE_PASSWORD",
    "DATABRICKS_GOOGLE_CREDENTIALS",
    "DATABRICKS_OIDC_TOKEN",
    "IDENTITY_HEADER",
    "MSI_SECRET",
    "SYSTEM_ACCESSTOKEN",
];

/// What names an HTTP proxy, whose address may hold a password.
const PROXY_VARIABLES: [&str; 3] = ["ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY"];

fn has_password(address: &str) -> bool {
    let (_, rest) = address.split_once("://").unwrap_or(("", address));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    authority.contains('@')
}

/// An address may hold a password.
fn shown(attribute: Attribute, value: &str) -> String {
    match attribute {
        Attribute::Host | Attribute::DiscoveryUrl => without_userinfo(value).into_owned(),
        _ => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Settings {
        let variables = variables
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Settings::from_variables(variables.collect())
            .resolve()
            .unwrap()
    }

    #[test]
    fn variables_are_trimmed_and_blank_ones_are_absent() {
        let settings = of(&[
            ("DATABRICKS_HOST", " h \n"),
            ("DATABRICKS_CLIENT_ID", "  "),
            ("DATABRICKS_OIDC_TOKEN_FILE", "/f"),
        ]);
        assert_eq!(settings.host.as_deref(), Some("h"));
        assert_eq!(settings.client_id, None);
        assert_eq!(settings.oidc_token_filepath.as_deref(), Some("/f"));
        assert_eq!(
            settings.source(Attribute::OidcTokenFilepath),
            Source::Variable("DATABRICKS_OIDC_TOKEN_FILE")
        );
    }

    #[test]
    fn every_setting_says_where_it_came_from_and_secrets_are_not_shown() {
        let settings = of(&[
            ("DATABRICKS_HOST", "https://me:hunter2@h"),
            ("DATABRICKS_TOKEN", "hunter2"),
        ])
        .with_profile(Some("p".to_owned()));
        let told: Vec<String> = settings
            .provenance()
            .iter()
            .map(|provenance| {
                format!(
                    "{} {} {}",
                    provenance.name,
                    provenance.value.as_deref().unwrap_or("***"),
                    provenance.source
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                "host ...@h from DATABRICKS_HOST",
                "token *** from DATABRICKS_TOKEN",
                "profile p from --profile"
            ]
        );
        assert!(!format!("{settings:?}").contains("DATABRICKS_TOKEN=hunter2"));
    }

    #[test]
    fn an_id_without_a_secret_belongs_to_the_identity_token_beside_it() {
        let ways = |variables: &[(&str, &str)]| {
            let ways: Vec<&str> = of(variables).ways().keys().map(|way| way.label()).collect();
            ways.join(" ")
        };
        let id = ("DATABRICKS_CLIENT_ID", "i");
        let file = ("DATABRICKS_OIDC_TOKEN_FILEPATH", "f");
        assert_eq!(ways(&[id, file]), "file-oidc");
        assert_eq!(
            ways(&[id, file, ("DATABRICKS_CLIENT_SECRET", "s")]),
            "file-oidc oauth"
        );
        assert_eq!(ways(&[id, ("DATABRICKS_TOKEN", "t")]), "oauth pat");
        assert_eq!(ways(&[("ARM_USE_MSI", "false")]), "");
        assert_eq!(ways(&[("ARM_USE_MSI", "True")]), "azure");
    }

    #[test]
    fn every_secret_has_its_variable_among_the_secret_ones() {
        let settings = of(&[
            ("DATABRICKS_OIDC_TOKEN_ENV", "MY_OIDC"),
            ("HTTPS_PROXY", "http://me:pass@proxy:3128"),
            ("http_proxy", "me:pass@proxy:3128"),
            ("ALL_PROXY", "http://proxy:3128/@"),
        ]);
        let names = settings.secret_variables();
        for name in [
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
            "ARM_CLIENT_SECRET",
            "DATABRICKS_CLIENT_SECRET",
            "DATABRICKS_METADATA_SERVICE_URL",
            "DATABRICKS_OIDC_TOKEN",
            "DATABRICKS_PASSWORD",
            "DATABRICKS_TOKEN",
            "GOOGLE_CREDENTIALS",
            "HTTPS_PROXY",
            "IDENTITY_HEADER",
            "MSI_SECRET",
            "MY_OIDC",
            "SYSTEM_ACCESSTOKEN",
            "http_proxy",
        ] {
            assert!(names.iter().any(|known| known == name), "{name}");
        }
        for name in ["ALL_PROXY", "DATABRICKS_HOST", "DATABRICKS_CLIENT_ID"] {
            assert!(!names.iter().any(|known| known == name), "{name}");
        }
    }
}
