//! Names that the server has refused lately, in a list of limited length.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// Names that expire; beyond the capacity the oldest is removed.
#[derive(Debug)]
pub(super) struct RecentNames {
    names: Mutex<Vec<(String, Instant)>>,
    capacity: usize,
    lifetime: Duration,
}

impl RecentNames {
    pub(super) fn new(capacity: usize, lifetime: Duration) -> Self {
        Self {
            names: Mutex::default(),
            capacity,
            lifetime,
        }
    }

    /// Adds a name, or renews it. Returns whether it is new; an expired name that is still in the list is not.
    pub(super) fn insert(&self, name: &str) -> bool {
        let mut names = self.lock();
        let before = names.len();
        names.retain(|(known, _)| known != name);
        let is_new = names.len() == before;
        if names.len() >= self.capacity {
            // The oldest: every insertion is at the end.
            names.remove(0);
        }
        names.push((name.to_owned(), Instant::now() + self.lifetime));
        is_new
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        let now = Instant::now();
        let names = self.lock();
        names
            .iter()
            .any(|(known, expires_at)| known == name && *expires_at > now)
    }

    /// The names that have not expired, sorted.
    pub(super) fn list(&self) -> Vec<String> {
        let now = Instant::now();
        let names = self.lock();
        let current = names.iter().filter(|(_, expires_at)| *expires_at > now);
        let mut list: Vec<String> = current.map(|(name, _)| name.clone()).collect();
        list.sort_unstable();
        list
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(String, Instant)>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const LIFETIME: Duration = Duration::from_mins(1);

    #[tokio::test(start_paused = true)]
    async fn a_name_expires_and_is_new_only_once() {
        let names = RecentNames::new(64, LIFETIME);
        assert!(!names.contains("temporal"));
        assert!(names.insert("temporal"));
        assert!(names.contains("temporal"));
        assert_eq!(names.list(), ["temporal"]);
        advance(LIFETIME).await;
        assert!(!names.contains("temporal") && names.list().is_empty());
        assert!(!names.insert("temporal"), "logged before");
        assert!(names.contains("temporal"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_name_is_removed_beyond_the_capacity() {
        let names = RecentNames::new(64, LIFETIME);
        for number in 0..=64 {
            names.insert(&number.to_string());
        }
        assert!(!names.contains("0") && names.contains("1"));
        assert_eq!(names.list().len(), 64);
    }
}
