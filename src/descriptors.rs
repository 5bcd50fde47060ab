//! The limit of open files: raised for us, since a session takes two, and not for a child of ours.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that are not for sessions: sockets of our own, logs, the workspace, name resolution.
const RESERVED: u64 = 100;
/// Where nothing tells the limit.
const USUAL: u64 = 1024;

/// Raises the soft limit to the hard one; returns what is in force then.
pub fn raise() -> u64 {
    rlimit::increase_nofile_limit(u64::MAX).unwrap_or(USUAL)
}

/// How many sessions this limit has room for.
pub fn sessions(limit: u64) -> usize {
    usize::try_from(limit.saturating_sub(RESERVED) / 2)
        .unwrap_or(usize::MAX)
        .clamp(1, 1 << 20)
}

/// How many unfinished handshakes an endpoint may hold under this limit: an eighth, between 256 and 2,048.
pub fn handshakes(limit: u64) -> usize {
    usize::try_from(limit / 8)
        .unwrap_or(usize::MAX)
        .clamp(256, 2048)
}

/// The limit of open files as it was before we raised our own.
#[derive(Clone, Debug)]
pub struct DescriptorLimit(Rlimit);

impl DescriptorLimit {
    /// The one in force.
    pub fn now() -> Self {
        Self(getrlimit(Resource::Nofile))
    }

    /// Lowers that of this process, as one that is about to become another program's.
    pub(crate) fn lower_to(soft: u64) -> rustix::io::Result<()> {
        let limit = getrlimit(Resource::Nofile);
        let is_unlimited = soft == u64::MAX;
        let lowered = Rlimit {
            current: if is_unlimited {
                limit.current
            } else {
                Some(soft)
            },
            maximum: limit.maximum,
        };
        setrlimit(Resource::Nofile, lowered)
    }
}

impl DescriptorLimit {
    /// The soft limit.
    pub fn soft(&self) -> u64 {
        self.0.current.unwrap_or(u64::MAX)
    }

    /// What the soft limit can be raised to.
    pub fn hard(&self) -> u64 {
        self.0.maximum.unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_takes_two_and_some_are_kept() {
        assert_eq!(sessions(1024), 462);
        assert_eq!(sessions(10), 1);
        assert_eq!(sessions(u64::MAX), 1 << 20);
        assert_eq!([1024, 8192, u64::MAX].map(handshakes), [256, 1024, 2048]);
        assert!(raise() >= DescriptorLimit::now().soft().min(USUAL));
    }
}
