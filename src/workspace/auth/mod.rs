//! How we prove to the workspace who we are: one file per way, and the chain that picks one.
//!
//! A way yields workspace tokens; the cache keeps one and renews it ahead of its expiry. A new way is a file here, an arm
//! of [`TokenSource`], and its place in [`TokenSource::choose`].

mod cache;
mod oauth_m2m;
mod pat;

use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};

use super::{
    api::{Api, ApiError},
    settings::{Settings, SettingsError},
};

pub(super) use cache::{CachedToken, TokenCache};
use oauth_m2m::OAuthM2m;
use pat::Pat;

/// The ways to authenticate, by the names that `DATABRICKS_AUTH_TYPE` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthKind {
    /// OAuth machine-to-machine: the id and secret of a service principal.
    OAuthM2m,
    /// A personal access token.
    Pat,
}

impl AuthKind {
    /// The name in settings and in the user agent.
    pub fn label(self) -> &'static str {
        match self {
            Self::OAuthM2m => "oauth-m2m",
            Self::Pat => "pat",
        }
    }
}

/// A token that the workspace's API accepts, and how long it lives from now; `None`: nobody knows.
pub(super) struct WorkspaceToken {
    pub(super) secret: SecretString,
    pub(super) lifetime: Option<Duration>,
}

/// Yields workspace tokens.
pub(super) enum TokenSource {
    OAuthM2m(OAuthM2m),
    Pat(Pat),
}

impl TokenSource {
    /// Picks by `auth_type` or else by what is configured, in the order of the Databricks SDKs. Expects trimmed settings.
    pub(super) fn choose(settings: &Settings) -> Result<Self, SettingsError> {
        match settings.auth_type.as_deref() {
            Some("pat") => return Self::pat(settings),
            Some("oauth-m2m") => return Self::oauth_m2m(settings),
            Some(other) => {
                return Err(SettingsError::UnknownAuthType {
                    auth_type: other.to_owned(),
                });
            }
            None => {}
        }
        // The id alone means nothing: platforms set it to say who we are.
        match (&settings.token, &settings.client_secret) {
            (Some(_), Some(_)) => Err(SettingsError::Ambiguous {
                ways: vec!["`DATABRICKS_TOKEN`", "`DATABRICKS_CLIENT_SECRET`"],
            }),
            (Some(_), None) => Self::pat(settings),
            (None, Some(_)) => Self::oauth_m2m(settings),
            (None, None) if settings.client_id.is_some() => Err(SettingsError::Incomplete {
                missing: "DATABRICKS_CLIENT_SECRET",
                because: "`DATABRICKS_CLIENT_ID` is, and there is no other way to authenticate",
            }),
            (None, None) => Err(SettingsError::NoAuthentication),
        }
    }

    pub(super) fn kind(&self) -> AuthKind {
        match self {
            Self::OAuthM2m(_) => AuthKind::OAuthM2m,
            Self::Pat(_) => AuthKind::Pat,
        }
    }

    /// The service principal's application id, which is also its Postgres role, where this way knows it.
    pub(super) fn service_principal(&self) -> Option<&str> {
        match self {
            Self::OAuthM2m(source) => Some(source.client_id()),
            Self::Pat(_) => None,
        }
    }

    /// Whether asking again can yield another token.
    fn is_renewable(&self) -> bool {
        match self {
            Self::OAuthM2m(_) => true,
            Self::Pat(_) => false,
        }
    }

    async fn token(&self, api: &Api) -> Result<WorkspaceToken, ApiError> {
        match self {
            Self::OAuthM2m(source) => source.token(api).await,
            Self::Pat(source) => Ok(source.token()),
        }
    }

    fn pat(settings: &Settings) -> Result<Self, SettingsError> {
        let because = "`DATABRICKS_AUTH_TYPE` is `pat`";
        let token = settings.token.clone().ok_or(SettingsError::Incomplete {
            missing: "DATABRICKS_TOKEN",
            because,
        })?;
        must_be_sendable(&token, "DATABRICKS_TOKEN")?;
        Ok(Self::Pat(Pat::new(token)))
    }

    fn oauth_m2m(settings: &Settings) -> Result<Self, SettingsError> {
        let incomplete = |missing, because| SettingsError::Incomplete { missing, because };
        let id = settings.client_id.clone().ok_or_else(|| {
            incomplete(
                "DATABRICKS_CLIENT_ID",
                "a service principal needs both its id and its secret",
            )
        })?;
        let secret = settings.client_secret.clone().ok_or_else(|| {
            incomplete(
                "DATABRICKS_CLIENT_SECRET",
                "a service principal needs both its id and its secret",
            )
        })?;
        must_be_sendable(&secret, "DATABRICKS_CLIENT_SECRET")?;
        // RFC 7617: a colon in the id would end it early.
        if id.contains(':') || id.chars().any(char::is_control) {
            return Err(SettingsError::InvalidValue {
                name: "DATABRICKS_CLIENT_ID",
            });
        }
        Ok(Self::OAuthM2m(OAuthM2m::new(id, secret)))
    }
}

fn must_be_sendable(secret: &SecretString, name: &'static str) -> Result<(), SettingsError> {
    if secret
        .expose_secret()
        .chars()
        .any(|c| !c.is_ascii_graphic())
    {
        return Err(SettingsError::InvalidValue { name });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(
        token: Option<&str>,
        id: Option<&str>,
        secret: Option<&str>,
        auth_type: Option<&str>,
    ) -> Result<AuthKind, String> {
        let settings = Settings {
            token: token.map(SecretString::from),
            client_id: id.map(str::to_owned),
            client_secret: secret.map(SecretString::from),
            auth_type: auth_type.map(str::to_owned),
            ..Settings::default()
        };
        TokenSource::choose(&settings.trimmed())
            .map(|source| source.kind())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_configured_decides() {
        assert_eq!(chosen(Some("t"), None, None, None), Ok(AuthKind::Pat));
        assert_eq!(chosen(Some("t"), Some("id"), None, None), Ok(AuthKind::Pat));
        assert_eq!(
            chosen(None, Some("id"), Some("s"), None),
            Ok(AuthKind::OAuthM2m)
        );
        assert_eq!(
            chosen(Some(" "), Some(" id "), Some("s\n"), Some("")),
            Ok(AuthKind::OAuthM2m)
        );
        assert_eq!(
            chosen(Some("t"), Some("id"), Some("s"), Some("pat")),
            Ok(AuthKind::Pat)
        );
        assert_eq!(
            chosen(Some("t"), Some("id"), Some("s"), Some("oauth-m2m")),
            Ok(AuthKind::OAuthM2m)
        );
    }

    #[test]
    fn two_ways_at_once_are_refused_by_the_names_of_both_variables() {
        let message = chosen(Some("t"), Some("id"), Some("s"), None).unwrap_err();
        assert!(
            message.contains("DATABRICKS_TOKEN") && message.contains("DATABRICKS_CLIENT_SECRET"),
            "{message}"
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(
            chosen(None, Some("id"), None, None)
                .unwrap_err()
                .contains("DATABRICKS_CLIENT_SECRET")
        );
        assert!(
            chosen(None, None, Some("s"), None)
                .unwrap_err()
                .contains("DATABRICKS_CLIENT_ID")
        );
        assert!(
            chosen(None, None, None, Some("pat"))
                .unwrap_err()
                .contains("DATABRICKS_TOKEN")
        );
        assert!(
            chosen(None, None, None, None)
                .unwrap_err()
                .contains("no way to authenticate")
        );
        assert!(
            chosen(None, None, None, Some("kerberos"))
                .unwrap_err()
                .contains("kerberos")
        );
    }

    #[test]
    fn a_secret_with_a_line_break_inside_is_refused_and_not_repeated() {
        let message = chosen(Some("hunter\n2"), None, None, None).unwrap_err();
        assert!(
            message.contains("DATABRICKS_TOKEN") && !message.contains("hunter"),
            "{message}"
        );
    }
}
