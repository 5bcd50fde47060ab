//! The file descriptor limit: raised for this process, since a session takes two, but not for its children.

pub use self::system::DescriptorLimit;

/// Descriptors kept for listeners, logs, workspace requests and name resolution.
const RESERVED: u64 = 100;

/// Raises the soft limit to the hard one and logs it, with a warning if it is too low for `max_connections`.
pub fn raise(max_connections: usize) {
    let before = DescriptorLimit::now().soft();
    let limit = DescriptorLimit::raise().unwrap_or(before);
    let (supported, max_connections) = (sessions(limit), self::max_connections(max_connections));
    tracing::debug!(limit, before, max_connections, "file descriptor limit");
    if max_connections > supported {
        tracing::warn!(
            max_connections,
            supported,
            "the file descriptor limit is too low for --max-connections; hint: raise it (ulimit -n, LimitNOFILE=) or lower --max-connections"
        );
    }
}

/// The limit of sessions for the setting `max_connections`, whose 0 derives it from the descriptor limit.
pub fn max_connections(setting: usize) -> usize {
    match setting {
        0 => sessions(DescriptorLimit::now().soft()),
        limit => limit,
    }
}

/// The sessions that a descriptor limit supports: each takes two descriptors.
fn sessions(limit: u64) -> usize {
    usize::try_from(limit.saturating_sub(RESERVED) / 2)
        .unwrap_or(usize::MAX)
        .clamp(1, 1 << 20)
}

/// The limit of unfinished handshakes per endpoint: an eighth of the descriptor limit, between 256 and 2,048.
pub(crate) fn max_handshakes() -> usize {
    // The hard limit, to which `raise` sets the soft one.
    handshakes(DescriptorLimit::now().hard())
}

fn handshakes(limit: u64) -> usize {
    usize::try_from(limit / 8)
        .unwrap_or(usize::MAX)
        .clamp(256, 2048)
}

#[cfg(unix)]
mod system {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    /// A file descriptor limit, such as the one before it was raised.
    #[derive(Clone, Debug)]
    pub struct DescriptorLimit(Rlimit);

    impl DescriptorLimit {
        /// The limit in force.
        pub fn now() -> Self {
            Self(getrlimit(Resource::Nofile))
        }

        /// Raises the soft limit to the hard one, for which no privilege is needed (getrlimit(2)).
        pub(super) fn raise() -> rustix::io::Result<u64> {
            let limit = getrlimit(Resource::Nofile);
            let current = limit.maximum;
            setrlimit(Resource::Nofile, Rlimit { current, ..limit })?;
            Ok(current.unwrap_or(u64::MAX))
        }

        /// Lowers the limit of this process, which is about to become another program.
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

        /// The soft limit.
        pub fn soft(&self) -> u64 {
            self.0.current.unwrap_or(u64::MAX)
        }

        /// The hard limit.
        pub fn hard(&self) -> u64 {
            self.0.maximum.unwrap_or(u64::MAX)
        }
    }
}

/// Windows limits handles by memory alone, to some 16 million per process.
#[cfg(windows)]
mod system {
    /// The limit of handles.
    #[derive(Clone, Debug)]
    pub struct DescriptorLimit(u64);

    impl DescriptorLimit {
        /// The limit in force.
        pub fn now() -> Self {
            Self(1 << 24)
        }

        pub(super) fn raise() -> Option<u64> {
            None
        }

        /// The limit.
        pub fn soft(&self) -> u64 {
            self.0
        }

        /// The limit.
        pub fn hard(&self) -> u64 {
            self.0
        }
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
        raise(0);
        let limit = DescriptorLimit::now();
        assert_eq!(limit.soft(), limit.hard());
        assert_eq!(
            (max_connections(7), max_connections(0)),
            (7, sessions(limit.soft()))
        );
    }
}
