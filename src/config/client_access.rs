//! TLS and the password of clients.

use std::path::PathBuf;

use secrecy::SecretString;
use zeroize::Zeroizing;

use super::{ClientTlsSetting, ConfigError, Environment, LocalAuth, Settings, file};

/// TLS for clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ClientTls {
    /// With these PEM files; reloaded when they change.
    Files {
        /// The certificate chain.
        certificate: PathBuf,
        /// Its private key.
        key: PathBuf,
    },
    /// Off.
    #[default]
    Off,
    /// With a certificate created at startup, which clients cannot verify.
    SelfSigned,
}

/// The variable that may hold the password. There is no flag, as other users can read command lines.
pub(crate) const PASSWORD_VARIABLE: &str = "LAKEBASE_PROXY_LOCAL_PASSWORD";

fn incomplete(message: &str) -> ConfigError {
    ConfigError::new(
        message,
        "set both --client-tls-cert and --client-tls-key, or --client-tls=self-signed",
    )
}

/// Resolves TLS for clients. By default clients on this machine may use it, since some drivers insist; with listeners on other
/// addresses that is the operator's choice, as no client can verify a self-signed certificate.
pub(super) fn client_tls(settings: &Settings) -> Result<ClientTls, ConfigError> {
    let files = match (&settings.client_tls_cert, &settings.client_tls_key) {
        (Some(certificate), Some(key)) => Some(ClientTls::Files {
            certificate: certificate.clone(),
            key: key.clone(),
        }),
        (None, None) => None,
        (Some(_), None) => {
            return Err(incomplete(
                "--client-tls-cert is set, but not --client-tls-key",
            ));
        }
        (None, Some(_)) => {
            return Err(incomplete(
                "--client-tls-key is set, but not --client-tls-cert",
            ));
        }
    };
    match (settings.client_tls, files) {
        (Some(ClientTlsSetting::Off), _) => Ok(ClientTls::Off),
        (None, None) if settings.allow_remote() => Ok(ClientTls::Off),
        (_, None) => Ok(ClientTls::SelfSigned),
        (Some(ClientTlsSetting::SelfSigned), Some(_)) => Err(incomplete(
            "--client-tls is `self-signed`, but there is --client-tls-cert, too",
        )),
        (None | Some(ClientTlsSetting::Required), Some(files)) => Ok(files),
    }
}

/// Reads the password of TCP clients. A configured password enables authentication, unless it is explicitly off.
pub(super) fn password(
    settings: &Settings,
    environment: &Environment,
) -> Result<Option<SecretString>, ConfigError> {
    // Before the file is read: without authentication it may be missing.
    if settings.local_auth == Some(LocalAuth::Trust) {
        return Ok(None);
    }
    if let Some(path) = &settings.local_password_file {
        let text = file::text(path).map_err(|source| {
            let message = format!(
                "cannot read the password from `{}` (--local-password-file)",
                path.display()
            );
            ConfigError::new(message, "it must be a text file that the proxy can read")
                .caused_by(source)
        })?;
        // `SecretString` copies the line, so that this copy is wiped.
        let text = Zeroizing::new(text);
        // One line, as written by `echo` and editors.
        let line = text.strip_suffix('\n').unwrap_or(&text);
        let line = line.strip_suffix('\r').unwrap_or(line);
        if line.is_empty() {
            return Err(no_password());
        }
        return Ok(Some(SecretString::from(line)));
    }
    match environment.secret(PASSWORD_VARIABLE) {
        None if settings.local_auth == Some(LocalAuth::Password) => Err(no_password()),
        password => Ok(password),
    }
}

fn no_password() -> ConfigError {
    ConfigError::new(
        "--local-auth requires a password, but none is set",
        "set --local-password-file or LAKEBASE_PROXY_LOCAL_PASSWORD",
    )
}

#[cfg(test)]
mod tests {
    use std::fs;

    use secrecy::ExposeSecret;

    use super::*;

    fn settings(file: &str) -> Settings {
        toml::from_str(file).unwrap()
    }

    #[test]
    fn certificate_and_key_enable_tls_and_one_alone_is_an_error() {
        let tls = |file: &str| client_tls(&settings(file));
        assert_eq!(tls("").unwrap(), ClientTls::SelfSigned);
        for off in ["client_tls = \"off\"", "allow_remote = true"] {
            assert_eq!(tls(off).unwrap(), ClientTls::Off);
        }
        assert_eq!(
            tls("client_tls = \"self-signed\"").unwrap(),
            ClientTls::SelfSigned
        );
        let pair = "client_tls_cert = \"c\"\nclient_tls_key = \"k\"";
        assert!(matches!(tls(pair).unwrap(), ClientTls::Files { .. }));
        assert_eq!(
            tls(&format!("{pair}\nclient_tls = \"off\"")).unwrap(),
            ClientTls::Off
        );
        assert!(tls(&format!("{pair}\nclient_tls = \"self-signed\"")).is_err());
        assert!(tls("client_tls_cert = \"c\"").is_err());
        assert!(tls("client_tls_key = \"k\"").is_err());
    }

    #[test]
    fn a_configured_password_enables_authentication() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let resolve = |file: &str, variable: &str| {
            let variables = [(PASSWORD_VARIABLE.to_owned(), variable.to_owned())];
            password(&settings(file), &Environment::from_variables(variables))
                .map(|found| found.map(|found| found.expose_secret().to_owned()))
        };
        let named = format!("local_password_file = {:?}", file.path());
        assert_eq!(resolve("", "").unwrap(), None);
        assert_eq!(resolve("", " v ").unwrap().as_deref(), Some(" v "));
        assert_eq!(resolve("local_auth = \"trust\"", "v").unwrap(), None);
        assert!(resolve("local_auth = \"password\"", "").is_err());
        assert!(resolve(&named, "v").is_err(), "an empty file");
        fs::write(&file, "from the file\r\n").unwrap();
        assert_eq!(
            resolve(&named, "v").unwrap().as_deref(),
            Some("from the file")
        );
        let error = resolve("local_password_file = \"/no/such\"", "v").unwrap_err();
        assert!(error.hint().is_some());
    }
}
