//! Reaching the endpoint: resolve, dial, TLS, log in; classify failures; hold clients and retry while it wakes.
//!
//! Knows nothing of the client: it is given [`SessionSettings`] and gives back a logged-in [`Connection`].
//!
//! [`SessionSettings`]: crate::protocol::options::SessionSettings

mod addresses;
mod budget;
mod connect;
mod databases;
mod dial;
mod dropped;
pub mod endpoint;
mod failure;
#[cfg(fuzzing)]
pub mod fuzzing;
mod login;
mod phases;
pub mod probe;
mod propagation;
mod route;
mod tcp;
mod tls_stream;
mod wake;

pub use addresses::Addresses;
pub use connect::{Connected, Refusal, Terms, Upstream};
pub use dial::Stream;
pub use dropped::DroppedParameters;
pub use endpoint::{Endpoint, Security, is_loopback};
pub use failure::{Class, Failure};
pub use login::{Connection, Greeting};
pub use phases::Phase;
pub use route::{Problem, Route, RouteFinder};
pub use tcp::{tune, unpace};
