//! Who logged in where, and for whom credentials were issued.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;

use super::faults;

/// The most rows of each kind: the names are the clients'.
const MAX_ROWS: usize = 1000;

/// A snapshot of logins and credentials, by who and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tally {
    /// Logins, one row for each host, user and database.
    pub logins: Vec<LoginCount>,
    /// Credentials issued, one row for each endpoint and identity.
    pub credentials: Vec<CredentialCount>,
}

impl Tally {
    /// Logins that were accepted for this user and database, over all hosts.
    pub fn accepted(&self, user: &str, database: &str) -> u64 {
        self.sum(user, database, |row| row.accepted)
    }

    /// Logins that were refused to this user and database, over all hosts.
    pub fn refused(&self, user: &str, database: &str) -> u64 {
        self.sum(user, database, |row| row.refused)
    }

    /// Credentials issued for this endpoint or Provisioned instance, to all identities.
    pub fn credentials_for(&self, endpoint: &str) -> u64 {
        let rows = self.credentials.iter();
        rows.filter(|row| row.endpoint == endpoint)
            .map(|row| row.issued)
            .sum()
    }

    fn sum(&self, user: &str, database: &str, count: fn(&LoginCount) -> u64) -> u64 {
        let rows = self.logins.iter();
        rows.filter(|row| row.user == user && row.database == database)
            .map(count)
            .sum()
    }
}

/// Logins of one user to one database on one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LoginCount {
    /// The TLS server name.
    pub host: String,
    /// The user of the `StartupMessage`.
    pub user: String,
    /// The database, the user's own name if none was given.
    pub database: String,
    /// Logins that reached `ReadyForQuery`.
    pub accepted: u64,
    /// Logins that the edge or Postgres refused.
    pub refused: u64,
}

/// Credentials of one identity for one endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CredentialCount {
    /// The endpoint's or the Provisioned instance's name.
    pub endpoint: String,
    /// The requesting identity.
    pub identity: String,
    /// How many were issued.
    pub issued: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct LoginKey {
    host: String,
    user: String,
    database: String,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct CredentialKey {
    endpoint: String,
    identity: String,
}

#[derive(Clone, Copy, Default)]
struct Logins {
    accepted: u64,
    refused: u64,
}

/// The live tally; cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Tallies(Arc<Mutex<Rows>>);

#[derive(Default)]
struct Rows {
    logins: BTreeMap<LoginKey, Logins>,
    credentials: BTreeMap<CredentialKey, u64>,
}

impl Tallies {
    pub(crate) fn accepted(&self, host: &str, login: &faults::Login<'_>) {
        self.login(host, login, |logins| logins.accepted += 1);
    }

    pub(crate) fn refused(&self, host: &str, login: &faults::Login<'_>) {
        self.login(host, login, |logins| logins.refused += 1);
    }

    pub(crate) fn issued(&self, endpoint: &str, identity: &str) {
        let key = CredentialKey {
            endpoint: endpoint.to_owned(),
            identity: identity.to_owned(),
        };
        let mut rows = self.lock();
        if let Some(count) = row(&mut rows.credentials, key) {
            *count += 1;
        }
    }

    pub(crate) fn snapshot(&self) -> Tally {
        let rows = self.lock();
        Tally {
            logins: rows
                .logins
                .iter()
                .map(|(key, counts)| LoginCount {
                    host: key.host.clone(),
                    user: key.user.clone(),
                    database: key.database.clone(),
                    accepted: counts.accepted,
                    refused: counts.refused,
                })
                .collect(),
            credentials: rows
                .credentials
                .iter()
                .map(|(key, issued)| CredentialCount {
                    endpoint: key.endpoint.clone(),
                    identity: key.identity.clone(),
                    issued: *issued,
                })
                .collect(),
        }
    }

    fn login(&self, host: &str, login: &faults::Login<'_>, change: impl FnOnce(&mut Logins)) {
        let key = LoginKey {
            host: host.to_owned(),
            user: login.user.unwrap_or_default().to_owned(),
            database: login.database.unwrap_or_default().to_owned(),
        };
        let mut rows = self.lock();
        if let Some(counts) = row(&mut rows.logins, key) {
            change(counts);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Rows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The row of `key`; `None` for a new one when there are too many.
fn row<K: Ord, V: Default>(rows: &mut BTreeMap<K, V>, key: K) -> Option<&mut V> {
    (rows.len() < MAX_ROWS || rows.contains_key(&key)).then(|| rows.entry(key).or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logins_are_counted_by_user_and_database() {
        let tallies = Tallies::default();
        let login = |user, database| faults::Login {
            user: Some(user),
            database: Some(database),
            credential_age: None,
        };
        tallies.accepted("one", &login("ada", "d"));
        tallies.accepted("two", &login("ada", "d"));
        tallies.refused("one", &login("ada", "d"));
        tallies.accepted("one", &login("ada", "e"));
        tallies.issued("projects/p", "ada");
        tallies.issued("projects/p", "bob");
        let tally = tallies.snapshot();
        assert_eq!(
            (tally.accepted("ada", "d"), tally.refused("ada", "d")),
            (2, 1)
        );
        assert_eq!(
            (tally.accepted("ada", "e"), tally.accepted("bob", "d")),
            (1, 0)
        );
        assert_eq!(tally.credentials_for("projects/p"), 2);
        assert_eq!((tally.logins.len(), tally.credentials.len()), (3, 2));
    }

    #[test]
    fn names_made_up_by_clients_do_not_fill_memory() {
        let tallies = Tallies::default();
        for number in 0..=MAX_ROWS {
            tallies.issued(&number.to_string(), "ada");
        }
        tallies.issued("0", "ada");
        let tally = tallies.snapshot();
        assert_eq!(tally.credentials.len(), MAX_ROWS);
        assert_eq!(tally.credentials_for("0"), 2);
    }
}
