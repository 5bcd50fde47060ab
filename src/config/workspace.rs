//! Settings of the Databricks SDKs: the workspace's address and the credentials for it.
//!
//! Plain values, each with its origin. `workspace` adds the profile of `~/.databrickscfg` and chooses the kind of
//! authentication. Names, order and families are those of the SDK for Go (`config/config.go` of databricks-sdk-go).

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
};

use secrecy::{ExposeSecret, SecretString};

use super::Origin;

macro_rules! attributes {
    ($($variant:ident $field:ident: $type:ty, [$($name:literal),+], [$($variable:literal),*], $family:expr;)+) => {
        /// The settings of a workspace, trimmed; empty values are absent.
        #[derive(Clone, Debug, Default)]
        pub struct WorkspaceSettings {
            $(
                #[doc = concat!("The attribute ", stringify!($field), " of the SDKs.")]
                pub $field: Option<$type>,
            )+
            /// The environment, for the variables that settings, commands and HTTP proxies name.
            pub variables: Variables,
            /// Addresses of cloud services.
            pub services: Services,
            /// The origins of values, where they are known.
            pub origins: BTreeMap<Attribute, Origin>,
        }

        /// A setting of [`WorkspaceSettings`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[expect(missing_docs, reason = "each is described at its field")]
        pub enum Attribute { $($variant,)+ }

        impl Attribute {
            /// All of them, in the order of the SDKs.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// Its keys in a profile, the usual one first.
            pub(crate) fn keys(self) -> &'static [&'static str] {
                match self { $(Self::$variant => &[$($name),+],)+ }
            }

            /// The variables that set it, the usual one first.
            pub(crate) fn variables(self) -> &'static [&'static str] {
                match self { $(Self::$variant => &[$($variable),*],)+ }
            }

            /// Whether its value must not be shown.
            pub(crate) fn is_secret(self) -> bool {
                match self { $(Self::$variant => <$type as Text>::IS_SECRET,)+ }
            }

            /// The family of authentication that it configures.
            pub(crate) fn family(self) -> Option<AuthFamily> {
                match self { $(Self::$variant => $family,)+ }
            }
        }

        impl WorkspaceSettings {
            /// A value as text; exposes secrets.
            pub(crate) fn text(&self, attribute: Attribute) -> Option<&str> {
                match attribute { $(Attribute::$variant => self.$field.as_ref().map(Text::text),)+ }
            }

            /// Sets a value and notes its origin.
            pub(crate) fn set(&mut self, attribute: Attribute, value: &str, origin: Origin) {
                match attribute { $(Attribute::$variant => self.$field = Some(value.into()),)+ }
                self.origins.insert(attribute, origin);
            }
        }
    };
}

attributes! {
    Host host: String, ["host"], ["DATABRICKS_HOST"], None;
    // For account-wide federation.
    AccountId account_id: String, ["account_id"], ["DATABRICKS_ACCOUNT_ID"], None;
    // For unified hosts, which serve several workspaces.
    WorkspaceId workspace_id: String, ["workspace_id"], ["DATABRICKS_WORKSPACE_ID"], None;
    GroupId group_id: String, ["group_id"], ["DATABRICKS_GROUP_ID"], None;
    Cloud cloud: String, ["cloud"], ["DATABRICKS_CLOUD"], None;
    DiscoveryUrl discovery_url: String, ["discovery_url"], ["DATABRICKS_DISCOVERY_URL"], None;
    Token token: SecretString, ["token"], ["DATABRICKS_TOKEN"], Some(AuthFamily::Pat);
    TokenAudience token_audience: String, ["token_audience", "audience"], ["DATABRICKS_TOKEN_AUDIENCE"], None;
    OidcTokenEnv oidc_token_env: String, ["oidc_token_env"], ["DATABRICKS_OIDC_TOKEN_ENV"], Some(AuthFamily::EnvOidc);
    OidcTokenFilepath oidc_token_filepath: String, ["oidc_token_filepath", "databricks_id_token_filepath"],
        ["DATABRICKS_OIDC_TOKEN_FILEPATH", "DATABRICKS_OIDC_TOKEN_FILE"], Some(AuthFamily::FileOidc);
    Username username: String, ["username"], ["DATABRICKS_USERNAME"], Some(AuthFamily::Basic);
    Password password: SecretString, ["password"], ["DATABRICKS_PASSWORD"], Some(AuthFamily::Basic);
    ClientId client_id: String, ["client_id"], ["DATABRICKS_CLIENT_ID"], Some(AuthFamily::OAuth);
    ClientSecret client_secret: SecretString, ["client_secret"], ["DATABRICKS_CLIENT_SECRET"], Some(AuthFamily::OAuth);
    Profile profile: String, ["profile"], ["DATABRICKS_CONFIG_PROFILE"], None;
    ConfigFile config_file: String, ["config_file"], ["DATABRICKS_CONFIG_FILE"], None;
    GoogleServiceAccount google_service_account: String, ["google_service_account"],
        ["DATABRICKS_GOOGLE_SERVICE_ACCOUNT"], Some(AuthFamily::Google);
    GoogleCredentials google_credentials: SecretString, ["google_credentials"], ["GOOGLE_CREDENTIALS"], Some(AuthFamily::Google);
    AzureWorkspaceResourceId azure_workspace_resource_id: String, ["azure_workspace_resource_id"],
        ["DATABRICKS_AZURE_RESOURCE_ID"], Some(AuthFamily::Azure);
    AzureUseMsi azure_use_msi: String, ["azure_use_msi"], ["ARM_USE_MSI"], Some(AuthFamily::Azure);
    AzureClientSecret azure_client_secret: SecretString, ["azure_client_secret"], ["ARM_CLIENT_SECRET"], Some(AuthFamily::Azure);
    AzureClientId azure_client_id: String, ["azure_client_id"], ["ARM_CLIENT_ID"], Some(AuthFamily::Azure);
    AzureTenantId azure_tenant_id: String, ["azure_tenant_id"], ["ARM_TENANT_ID"], Some(AuthFamily::Azure);
    AzureEnvironment azure_environment: String, ["azure_environment"], ["ARM_ENVIRONMENT"], None;
    DatabricksCliPath databricks_cli_path: String, ["databricks_cli_path"], ["DATABRICKS_CLI_PATH"], None;
    AuthType auth_type: String, ["auth_type"], ["DATABRICKS_AUTH_TYPE"], None;
    // Its path is a secret.
    MetadataServiceUrl metadata_service_url: SecretString, ["metadata_service_url"],
        ["DATABRICKS_METADATA_SERVICE_URL"], Some(AuthFamily::MetadataService);
    Scopes scopes: String, ["scopes"], [], None;
    // RFC 9396, as JSON.
    AuthorizationDetails authorization_details: String, ["authorization_details"], [], None;
    ActionsIdTokenRequestUrl actions_id_token_request_url: String, ["actions_id_token_request_url"],
        ["ACTIONS_ID_TOKEN_REQUEST_URL"], None;
    ActionsIdTokenRequestToken actions_id_token_request_token: SecretString, ["actions_id_token_request_token"],
        ["ACTIONS_ID_TOKEN_REQUEST_TOKEN"], None;
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

/// Families of authentication settings; the SDKs allow one of them at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum AuthFamily {
    Azure,
    Basic,
    EnvOidc,
    FileOidc,
    Google,
    MetadataService,
    OAuth,
    Pat,
}

impl AuthFamily {
    /// The name in the SDKs.
    pub(crate) fn label(self) -> &'static str {
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
}

/// The environment, read once. Does not print: any value may be a secret.
#[derive(Clone, Default)]
pub struct Variables(Arc<HashMap<String, String>>);

impl Variables {
    /// A value that is not blank, trimmed.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let value = self.raw(name)?.trim();
        (!value.is_empty()).then_some(value)
    }

    /// A value as it is: a password may begin with a blank.
    pub(super) fn raw(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
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

/// Addresses of cloud services; absent outside of tests, where an emulator replaces them.
#[derive(Clone, Debug, Default)]
pub struct Services {
    /// Microsoft Entra ID, with a slash at the end.
    pub entra_id: Option<String>,
    /// Azure's instance metadata service.
    pub instance_metadata: Option<String>,
}

impl WorkspaceSettings {
    /// The settings that variables hold.
    pub fn from_variables(variables: Variables) -> Self {
        let mut settings = Self::default();
        for &attribute in Attribute::ALL {
            let mut names = attribute.variables().iter();
            if let Some((name, value)) = names.find_map(|name| Some((name, variables.get(name)?))) {
                settings.set(attribute, value, Origin::Variable((*name).to_owned()));
            }
        }
        settings.variables = variables;
        settings
    }

    /// Selects a profile, in place of the environment's; `None` changes nothing.
    #[must_use]
    pub fn with_profile(mut self, profile: Option<&str>) -> Self {
        if let Some(profile) = profile.map(str::trim).filter(|name| !name.is_empty()) {
            self.set(Attribute::Profile, profile, Origin::Flag);
        }
        self
    }

    /// The origin of a value; the usual variable where it is unknown.
    pub(crate) fn origin(&self, attribute: Attribute) -> Origin {
        let usual = || match attribute.variables().first() {
            Some(name) => Origin::Variable((*name).to_owned()),
            None => Origin::Default,
        };
        self.origins.get(&attribute).cloned().unwrap_or_else(usual)
    }

    /// A setting by the name that its author used: a variable, a flag, or a key and its profile.
    pub(crate) fn named(&self, attribute: Attribute) -> String {
        let key = attribute.keys().first().copied().unwrap_or_default();
        match self.origin(attribute) {
            Origin::Variable(name) => format!("`{name}`"),
            Origin::Flag => format!("`--{key}`"),
            Origin::Default => format!("`{key}`"),
            origin @ (Origin::File(_) | Origin::Profile { .. }) => format!("`{key}` from {origin}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_are_trimmed_and_blank_ones_are_absent() {
        let variables = [
            ("DATABRICKS_HOST", " h \n"),
            ("DATABRICKS_CLIENT_ID", "  "),
            ("DATABRICKS_OIDC_TOKEN_FILE", "/f"),
        ];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let settings = WorkspaceSettings::from_variables(variables.into_iter().collect());
        assert_eq!(settings.host.as_deref(), Some("h"));
        assert_eq!(settings.client_id, None);
        assert_eq!(settings.oidc_token_filepath.as_deref(), Some("/f"));
        assert_eq!(
            settings.named(Attribute::OidcTokenFilepath),
            "`DATABRICKS_OIDC_TOKEN_FILE`"
        );
    }

    #[test]
    fn each_setting_has_an_origin_and_secrets_do_not_print() {
        let variables = [("DATABRICKS_TOKEN".to_owned(), "hunter2".to_owned())];
        let settings = WorkspaceSettings::from_variables(variables.into_iter().collect())
            .with_profile(Some(" p "));
        let origin = |attribute| settings.origin(attribute).to_string();
        assert_eq!(origin(Attribute::Token), "variable DATABRICKS_TOKEN");
        assert_eq!(origin(Attribute::Profile), "flag");
        assert_eq!(settings.profile.as_deref(), Some("p"));
        assert!(!format!("{settings:?}").contains("hunter2"));
    }
}
