//! State of the running proxy that the status page, the metrics and the console show.
//!
//! A leaf above `net`, `protocol`, `telemetry` and `config`: sessions write into it, admin and console read it.

mod activity;
mod endpoint;
mod health;
mod label;
mod peer;
mod recent;
mod registry;
mod snapshot;

pub use self::{
    activity::{Activity, ActivityRecord},
    endpoint::{EndpointSessions, Rejected},
    health::{Health, Verdict},
    label::Label,
    peer::{Encrypted, Peer},
    recent::{Recent, RecentFailure, RecentWake},
    registry::{ClientInfo, Counts, Pin, Registry, Server, SessionEntry, SessionInfo},
    snapshot::{
        CredentialSnapshot, CredentialState, EndpointSnapshot, HttpListener, IdleServer,
        PoolSnapshot, RefreshAttempt, RefreshError, Snapshot, StatementsSnapshot, TakeSnapshot,
        UpstreamSnapshot, VERSION,
    },
};
