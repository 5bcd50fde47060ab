//! Attends to a pool's connections when their time has come: an idle one is watched and later closed, a client at rest
//! parts with the one that it keeps.
//!
//! One task for each pool, on the main runtime of the process. A runtime of sessions has no timer to spare for this: while
//! there is one, every wait of the runtime arms a timer of the kernel's, which costs about 1 us of a query's 20.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use super::{Pool, idle::Idle};

/// There is no task.
const NEVER: u64 = u64::MAX;
/// The task is looking at the connections.
const NOW: u64 = u64::MAX - 1;

/// When the connections of a pool are looked at.
pub(super) struct Upkeep {
    began: Instant,
    /// The time of the next look, in ms since `began`.
    next: AtomicU64,
    /// The time has been set earlier.
    earlier: Notify,
}

impl Upkeep {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            next: AtomicU64::new(NEVER),
            earlier: Notify::new(),
        }
    }

    fn ms(&self, at: Instant) -> u64 {
        // Rounded up: a look must not come too early.
        let since = at.saturating_duration_since(self.began) + Duration::from_micros(999);
        u64::try_from(since.as_millis()).map_or(NOW - 1, |ms| ms.min(NOW - 1))
    }

    fn time(&self) -> Instant {
        self.began + Duration::from_millis(self.next.load(Ordering::SeqCst))
    }
}

impl Pool {
    /// Has the connections looked at by this time. Costs a load, if they are anyway.
    pub(super) fn attend_by(self: &Arc<Self>, at: Instant) {
        let Upkeep { next, earlier, .. } = &self.upkeep;
        let at = self.upkeep.ms(at);
        if next.load(Ordering::SeqCst) <= at {
            return;
        }
        match next.fetch_min(at, Ordering::SeqCst) {
            NEVER => {
                let context = &self.context;
                let task = Arc::clone(self).attend();
                context.tasks.spawn_on(task, &context.main_runtime);
            }
            before if before > at => earlier.notify_one(),
            _ => {}
        }
    }

    /// Ends once no connection has a time that comes.
    async fn attend(self: Arc<Self>) {
        let Upkeep { next, earlier, .. } = &self.upkeep;
        loop {
            tokio::select! {
                biased;
                () = self.context.over() => {}
                () = earlier.notified() => continue,
                () = sleep_until(self.upkeep.time()) => {}
            }
            next.store(NOW, Ordering::SeqCst);
            if let Some(at) = self.look() {
                next.fetch_min(self.upkeep.ms(at), Ordering::SeqCst);
                continue;
            }
            // Unless a time has been set since.
            let ended = next.compare_exchange(NOW, NEVER, Ordering::SeqCst, Ordering::SeqCst);
            if ended.is_ok() {
                return;
            }
        }
    }

    /// Does what is due, and returns the time of the next look. Once the pool is over, everything is due.
    fn look(self: &Arc<Self>) -> Option<Instant> {
        let now = Instant::now();
        let mut state = self.lock();
        let ending = self.attend_to_idle(&mut state, now);
        for retention in &state.retentions {
            retention.end_by(now);
        }
        let idle = state.idle.iter().map(Idle::due_at);
        let kept = state.retentions.iter().filter_map(|it| it.ends_at());
        // At the end sessions at rest end by themselves.
        let is_over = self.context.is_over();
        let next = idle.chain(kept.filter(|_| !is_over)).min();
        drop(state);
        for (server, reason) in ending {
            self.close(server, reason);
        }
        next
    }
}
