//! Database names that clients send by default and that the endpoint does not have.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// How long a name is remembered: a database that is created later is found after this time.
const REMEMBERED: Duration = Duration::from_mins(1);
/// More names than clients of one machine have users; the name that expires first makes room for another.
const CAPACITY: usize = 64;

/// The names that are remembered.
#[derive(Debug, Default)]
pub(super) struct MissingDatabases(Mutex<Vec<Missing>>);

#[derive(Debug)]
struct Missing {
    name: String,
    until: Instant,
}

impl MissingDatabases {
    /// Remembers that this database does not exist. Returns whether the name is new since the start, as far as
    /// the names that have expired are still known.
    pub(super) fn insert(&self, name: &str) -> bool {
        let until = Instant::now() + REMEMBERED;
        let mut names = self.lock();
        let known = names.len();
        names.retain(|missing| missing.name != name);
        let is_new = names.len() == known;
        if names.len() >= CAPACITY {
            // The oldest one: every insertion is at the end.
            names.remove(0);
        }
        names.push(Missing {
            name: name.to_owned(),
            until,
        });
        is_new
    }

    /// Whether this database was found not to exist lately.
    pub(super) fn contains(&self, name: &str) -> bool {
        let now = Instant::now();
        self.lock()
            .iter()
            .any(|missing| missing.name == name && missing.until > now)
    }

    /// The names found not to exist lately, sorted.
    pub(super) fn names(&self) -> Vec<String> {
        let now = Instant::now();
        let mut names: Vec<String> = self
            .lock()
            .iter()
            .filter(|missing| missing.until > now)
            .map(|missing| missing.name.clone())
            .collect();
        names.sort_unstable();
        names
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Missing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_name_is_remembered_for_a_while_and_new_only_once() {
        let missing = MissingDatabases::default();
        assert!(!missing.contains("temporal"));
        assert!(missing.insert("temporal"));
        assert!(missing.contains("temporal"));
        assert_eq!(missing.names(), ["temporal"]);
        advance(REMEMBERED).await;
        assert!(!missing.contains("temporal") && missing.names().is_empty());
        assert!(!missing.insert("temporal"), "logged before");
        assert!(missing.contains("temporal"));
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_name_makes_room() {
        let missing = MissingDatabases::default();
        for number in 0..=CAPACITY {
            missing.insert(&number.to_string());
        }
        assert!(!missing.contains("0") && missing.contains("1"));
        assert_eq!(missing.names().len(), CAPACITY);
    }
}
