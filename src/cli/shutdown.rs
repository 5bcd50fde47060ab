//! `shutdown`: ends a running proxy, for jobs whose other containers would otherwise wait for it.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;

use super::{CommandError, wait::address};
use crate::{
    config::{LOCALHOST, PortSetting, Settings},
    net::http::client::request,
};

const HINT: &str = "start the proxy with --quitquitquit, and use the same --admin-port for both";

#[derive(Args, Debug)]
pub(super) struct ShutdownArgs {
    /// The proxy's admin port, on 127.0.0.1 [default: 9091]
    #[arg(long, value_name = "PORT")]
    admin_port: Option<PortSetting>,
    /// The proxy's configuration file
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
}

pub(super) async fn run(arguments: ShutdownArgs) -> Result<ExitCode, CommandError> {
    let settings = Settings {
        admin_port: arguments.admin_port,
        config_file: arguments.config_file,
        ..Settings::default()
    }
    .with_file()?;
    let address = address(settings.admin_port(), LOCALHOST, "admin-port")?;
    // A GET would need the header X-Requested-With, which other sites' pages cannot add.
    let message = match request(address, "POST", "/quitquitquit").await {
        Ok(answer) if answer.status == 200 => return Ok(ExitCode::SUCCESS),
        Ok(answer) => format!(
            "the admin port answered {}: {}",
            answer.status,
            answer.body.trim()
        ),
        Err(error) => format!("cannot request the shutdown: {error}"),
    };
    Err(CommandError::new(message, Some(HINT.to_owned())))
}
