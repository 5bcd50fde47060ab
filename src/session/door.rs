//! Whether an endpoint takes new sessions. One that the settings no longer name takes none; its listeners stay for the
//! cancel requests of those it has, until the last has gone.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Presence, Present};

/// Where a door stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    Leaving,
    Shut,
}

/// The way in to one endpoint; cheap to clone.
#[derive(Clone, Debug)]
pub struct Door {
    state: watch::Sender<State>,
    shut: CancellationToken,
    sessions: Presence,
}

impl Door {
    /// An open door, which is shut for good when `shut` is cancelled.
    pub fn new(shut: CancellationToken) -> Self {
        Self {
            state: watch::Sender::new(State::Open),
            shut,
            sessions: Presence::default(),
        }
    }

    /// Takes no new session from now on.
    pub fn leave(&self) {
        self.change(State::Open, State::Leaving);
    }

    /// Takes sessions again, if it was [leaving](Self::leave) and is not shut yet.
    pub fn stay(&self) -> bool {
        self.change(State::Leaving, State::Open)
    }

    /// Whether new sessions are turned away.
    pub fn is_leaving(&self) -> bool {
        *self.state.borrow() != State::Open
    }

    /// Closes the listeners of a door that is leaving, whoever is still there.
    pub fn shut(&self) -> bool {
        let is_shut = self.change(State::Leaving, State::Shut);
        if is_shut {
            self.shut.cancel();
        }
        is_shut
    }

    /// Cancelled when the listeners are to close.
    pub fn is_shut(&self) -> &CancellationToken {
        &self.shut
    }

    /// Shuts once it is leaving and nobody is here; returns then, and when it was [shut](Self::shut) for another reason
    /// once nobody is here. Cancel safe.
    pub async fn until_left(&self) {
        let mut state = self.state.subscribe();
        // The sender lives as long as `self`, so that no wait can fail.
        while state.wait_for(|state| *state != State::Open).await.is_ok() {
            tokio::select! {
                () = self.sessions.gone_for(Duration::ZERO) => {
                    self.shut();
                    if *self.state.borrow() == State::Shut {
                        return;
                    }
                }
                _ = state.wait_for(|state| *state == State::Open) => {}
            }
        }
    }

    /// A session begins, which lasts until what is returned is dropped.
    pub(super) fn enter(&self) -> Present {
        self.sessions.enter()
    }

    fn change(&self, from: State, to: State) -> bool {
        self.state.send_if_modified(|state| {
            let applies = *state == from;
            if applies {
                *state = to;
            }
            applies
        })
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use tokio::time::timeout;

    use super::*;

    const A_WHILE: Duration = Duration::from_secs(100);

    #[tokio::test(start_paused = true)]
    async fn it_is_shut_when_the_last_has_left_and_not_before() {
        let door = Door::new(CancellationToken::new());
        let mut left = pin!(door.until_left());
        let session = door.enter();
        door.leave();
        assert!(timeout(A_WHILE, &mut left).await.is_err());
        assert!(!door.is_shut().is_cancelled());
        drop(session);
        left.await;
        assert!(door.is_shut().is_cancelled() && door.is_leaving());
        assert!(!door.stay(), "too late");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_comes_back_in_time_stays() {
        let door = Door::new(CancellationToken::new());
        let mut left = pin!(door.until_left());
        let session = door.enter();
        door.leave();
        assert!(timeout(A_WHILE, &mut left).await.is_err());
        assert!(door.stay() && !door.is_leaving());
        drop(session);
        assert!(timeout(A_WHILE, &mut left).await.is_err());
        assert!(!door.shut(), "an open door is left before it is shut");
        let _session = door.enter();
        door.leave();
        assert!(door.shut());
        assert!(
            timeout(A_WHILE, &mut left).await.is_err(),
            "somebody is there"
        );
    }
}
