//! Prints what the environment and the profile amount to, for a comparison with the Databricks SDKs. Test fixtures only:
//! secrets are printed.
#![allow(clippy::print_stdout, reason = "its output is its purpose")]

use lakebase_proxy::workspace::{Settings, Variables};
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;

fn main() {
    let variables: Variables = std::env::vars().collect();
    let settings = Settings::from_variables(variables).with_profile(std::env::args().nth(1));
    let told = settings.summary().and_then(|summary| {
        let settings = settings.clone().resolve()?;
        let exposed = |secret: &Option<SecretString>| {
            let text = secret.as_ref().map(ExposeSecret::expose_secret);
            text.map(str::to_owned)
        };
        Ok(json!({
            "host": summary.host.to_string(),
            "kind": summary.kinds.first().map(|kind| kind.label()),
            // The SDK names no profile where it falls back on the default one.
            "profile": summary.profile.filter(|name| settings.profile.is_some() || name != "DEFAULT"),
            "token": exposed(&settings.token),
            "client_id": settings.client_id,
            "client_secret": exposed(&settings.client_secret),
            "azure_client_secret": exposed(&settings.azure_client_secret),
        }))
    });
    match told {
        Ok(told) => println!("{told}"),
        Err(error) => println!("{}", json!({ "error": error.to_string() })),
    }
}
