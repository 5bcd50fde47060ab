//! `wait`: returns once a proxy has started, for start-up order.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::CommandError;
use crate::{
    config::{DurationSetting, LOCALHOST, PortSetting, Settings},
    net::http::client::request,
};

/// The interval of Cloud SQL Auth Proxy's `wait`.
const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Args, Debug)]
pub(super) struct WaitArgs {
    /// Maximum time to wait
    #[arg(long, value_name = "TIME", default_value = "30s")]
    max: DurationSetting,
    /// Address of the proxy's health port [default: 127.0.0.1]
    #[arg(long, value_name = "IP")]
    http_address: Option<IpAddr>,
    /// The proxy's health port [default: 9090]
    #[arg(long, value_name = "PORT")]
    http_port: Option<PortSetting>,
    /// The proxy's configuration file
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
}

pub(super) async fn run(arguments: WaitArgs) -> Result<ExitCode, CommandError> {
    let settings = Settings {
        http_address: arguments.http_address,
        http_port: arguments.http_port,
        config_file: arguments.config_file,
        ..Settings::default()
    }
    .with_file()?;
    // 0.0.0.0 and :: are addresses to listen on, not to connect to.
    let ip = Some(settings.http_address()).filter(|ip| !ip.is_unspecified());
    let address = address(settings.http_port(), ip.unwrap_or(LOCALHOST), "http-port")?;
    let DurationSetting(max) = arguments.max;
    let mut ticks = interval(INTERVAL);
    // A request may take longer than the interval; no burst of requests may follow it.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = "no answer in time".to_owned();
    let started = async {
        loop {
            ticks.tick().await;
            match request(address, "GET", "/startup").await {
                Ok(answer) if answer.status == 200 => return,
                Ok(answer) => last = answer.body.trim().replace('\n', ": "),
                Err(error) => last = error,
            }
        }
    };
    match timeout(max, started).await {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(_) => Err(CommandError::new(
            format!("the proxy at {address} has not started within {max:?}: {last}"),
            Some("use the same --http-port for the proxy and `wait`; the proxy's log shows why it does not start".to_owned()),
        )),
    }
}

/// The address of a running proxy's port.
pub(super) fn address(
    port: PortSetting,
    ip: IpAddr,
    flag: &'static str,
) -> Result<SocketAddr, CommandError> {
    let address = port.at(ip).filter(|address| address.port() != 0);
    address.ok_or_else(|| {
        CommandError::new(
            format!("--{flag} is `none` or 0: no port to connect to"),
            Some("set it to the port that the proxy listens on".to_owned()),
        )
    })
}
