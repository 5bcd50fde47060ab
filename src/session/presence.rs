//! Whether anybody is here: how a program that serves a job learns that the job has gone.

use tokio::{
    sync::watch,
    time::{Duration, sleep},
};

/// Counts the sessions of this process; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Presence(watch::Sender<usize>);

/// A session that is here until this is dropped.
#[derive(Debug)]
pub struct Present(watch::Sender<usize>);

impl Presence {
    /// One more.
    pub fn enter(&self) -> Present {
        self.0.send_modify(|count| *count = count.saturating_add(1));
        Present(self.0.clone())
    }

    /// Returns when nobody has been here for `time` on end, counted from this call at the earliest. Cancel safe.
    pub async fn gone_for(&self, time: Duration) {
        let mut count = self.0.subscribe();
        // The sender lives as long as `self`, so that neither wait can fail.
        while count.wait_for(|count| *count == 0).await.is_ok() {
            tokio::select! {
                () = sleep(time) => return,
                // Also for a session so short that it has left again.
                _ = count.changed() => {}
            }
        }
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, advance};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_time_without_a_session_begins_anew_with_each() {
        let presence = Presence::default();
        let began = Instant::now();
        let first = presence.enter();
        let visits = async {
            sleep(Duration::from_secs(100)).await;
            drop(first);
            sleep(Duration::from_secs(9)).await;
            // Come and gone between two looks.
            drop(presence.enter());
        };
        let ((), ()) = tokio::join!(visits, presence.gone_for(Duration::from_secs(10)));
        assert_eq!(began.elapsed().as_secs(), 119);

        advance(Duration::from_secs(1)).await;
        presence.gone_for(Duration::from_secs(5)).await;
        assert_eq!(began.elapsed().as_secs(), 125, "nobody ever came");
    }
}
