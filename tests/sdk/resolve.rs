//! Prints what the environment and the profile amount to, for a comparison with the Databricks SDKs. Test fixtures only:
//! secrets are printed.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use lakebase_proxy::{
    config::{Variables, WorkspaceSettings},
    workspace::ResolvedSettings,
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;

fn main() {
    let variables: Variables = std::env::vars().collect();
    let settings = WorkspaceSettings::from_variables(variables)
        .with_profile(std::env::args().nth(1).as_deref());
    let result = ResolvedSettings::new(settings).and_then(|settings| {
        let (host, _) = settings.address()?;
        let kinds = settings.auth_kinds()?;
        let exposed = |secret: &Option<SecretString>| {
            let text = secret.as_ref().map(ExposeSecret::expose_secret);
            text.map(str::to_owned)
        };
        Ok(json!({
            "host": host.to_string(),
            "kind": kinds.first().map(|kind| kind.label()),
            // The SDK names no profile where it falls back on the default one.
            "profile": settings.profile_name().filter(|name| settings.profile.is_some() || *name != "DEFAULT"),
            "token": exposed(&settings.token),
            "client_id": settings.client_id,
            "client_secret": exposed(&settings.client_secret),
            "azure_client_secret": exposed(&settings.azure_client_secret),
        }))
    });
    match result {
        Ok(json) => println!("{json}"),
        Err(error) => println!("{}", json!({ "error": error.to_string() })),
    }
}
