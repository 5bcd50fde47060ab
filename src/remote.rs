//! `wait` and `shutdown`: errands at a proxy that runs already, known by its ports alone.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use crate::{
    admin::client::{AskError, ask},
    config::{ConfigError, DurationSetting, LOCALHOST, PortSetting, Settings},
};

/// How often `wait` asks, as Cloud SQL Auth Proxy's does.
const INTERVAL: Duration = Duration::from_secs(1);

/// What to wait for.
#[derive(Args, Clone, Debug)]
pub struct WaitArgs {
    /// How long to wait
    #[arg(long, value_name = "TIME", default_value = "30s")]
    pub max: DurationSetting,
    /// Address of the proxy's health port [default: 127.0.0.1]
    #[arg(long, value_name = "IP")]
    pub http_address: Option<IpAddr>,
    /// The proxy's health port [default: 9090]
    #[arg(long, value_name = "PORT")]
    pub http_port: Option<PortSetting>,
    /// The file that the proxy has its settings from
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,
}

/// What to end.
#[derive(Args, Clone, Debug)]
pub struct ShutdownArgs {
    /// The proxy's admin port, on 127.0.0.1 [default: 9091]
    #[arg(long, value_name = "PORT")]
    pub admin_port: Option<PortSetting>,
    /// The file that the proxy has its settings from
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,
}

/// Why an errand came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The port is not reached, or not what it should be.
    #[error("cannot ask the proxy to end")]
    Ask(#[source] AskError),
    /// The settings do not do.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The settings turn the port off.
    #[error("--{flag} is `none` or 0: there is no port to ask at")]
    NoPort {
        /// Which.
        flag: &'static str,
    },
    /// It does not start.
    #[error("the proxy at {address} has not started within {max:?}: {last}")]
    NotStarted {
        /// Where.
        address: SocketAddr,
        /// The time given.
        max: Duration,
        /// What came of the last attempt.
        last: String,
    },
    /// It refuses to end.
    #[error("the admin port answered {status}: {body}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// What it said.
        body: String,
    },
}

impl RemoteError {
    /// What to do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Ask(_) | Self::Refused { .. } => {
                Some("start the proxy with --quitquitquit, and give both the same --admin-port")
            }
            Self::Config(error) => error.hint(),
            Self::NoPort { .. } => Some("name the port that the proxy listens on"),
            Self::NotStarted { .. } => Some(
                "give the proxy and `wait` the same --http-port; the proxy's own log says why it does not start",
            ),
        }
    }
}

/// Returns once the proxy's listeners are up.
///
/// # Errors
/// When they are not within the time given.
pub async fn wait(arguments: WaitArgs) -> Result<(), RemoteError> {
    let settings = Settings {
        http_address: arguments.http_address,
        http_port: arguments.http_port,
        config_file: arguments.config_file,
        ..Settings::default()
    }
    .with_file()?;
    let ip = Some(settings.http_address()).filter(|ip| !ip.is_unspecified());
    let address = address(settings.http_port(), ip.unwrap_or(LOCALHOST), "http-port")?;
    let DurationSetting(max) = arguments.max;
    let deadline = Instant::now() + max;
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last = "nobody answered in time".to_owned();
    let starting = async {
        loop {
            ticks.tick().await;
            match ask(address, "GET", "/startup").await {
                Ok(answer) if answer.status == 200 => return,
                Ok(answer) => last = answer.body.trim().replace('\n', ": "),
                Err(error) => last = crate::telemetry::chain(&error).to_string(),
            }
        }
    };
    timeout_at(deadline, starting)
        .await
        .map_err(|_| RemoteError::NotStarted { address, max, last })
}

/// Asks the proxy to end.
///
/// # Errors
/// When it does not say that it will.
pub async fn shutdown(arguments: ShutdownArgs) -> Result<(), RemoteError> {
    let settings = Settings {
        admin_port: arguments.admin_port,
        config_file: arguments.config_file,
        ..Settings::default()
    }
    .with_file()?;
    let address = address(settings.admin_port(), LOCALHOST, "admin-port")?;
    let answer = ask(address, "POST", "/quitquitquit")
        .await
        .map_err(RemoteError::Ask)?;
    if answer.status == 200 {
        return Ok(());
    }
    Err(RemoteError::Refused {
        status: answer.status,
        body: answer.body.trim().to_owned(),
    })
}

fn address(port: PortSetting, ip: IpAddr, flag: &'static str) -> Result<SocketAddr, RemoteError> {
    port.at(ip)
        .filter(|address| address.port() != 0)
        .ok_or(RemoteError::NoPort { flag })
}
