//! Connections to the endpoint: resolve, dial, TLS, login; failure classes; retries while it wakes.
//!
//! Sends and receives nothing of the client: [`LoginParameters`] in, a logged-in [`Connection`] out, or the [`Refusal`] for
//! the client.
//!
//! [`LoginParameters`]: crate::protocol::options::LoginParameters

mod addresses;
mod budget;
mod connect;
mod dial;
mod dropped;
mod endpoint;
mod failure;
#[cfg(fuzzing)]
pub mod fuzzing;
mod login;
mod names;
mod phases;
pub(crate) mod probe;
mod route;
mod slots;
mod tls_stream;
mod wake;

pub use addresses::Addresses;
pub use connect::{ConnectSettings, Connected, Refusal, Upstream};
pub use dial::Stream;
pub use dropped::DroppedParameters;
pub use endpoint::{Endpoint, Security};
pub(crate) use failure::Class;
pub use failure::Failure;
pub use login::{Connection, Greeting};
pub(crate) use route::{Problem, Route, RoutePublisher};
#[cfg(test)]
pub(crate) use tls_stream::tests::tls_pair;
