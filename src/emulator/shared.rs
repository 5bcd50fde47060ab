//! What the workspace API, the edge and the compute all know.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    EmulatorError,
    catalog::Catalog,
    certificates::{Authorities, Certificates},
    compute::Common,
    counts::Counters,
    endpoint::{Endpoint, Endpoints},
    faults::Faults,
    identity::{Identities, hex, random, uuid},
    postgres::Database,
    settings::Settings,
    tally::Tallies,
    token::{Audience, Claims, Signer},
};

/// The names of things in the emulated workspace.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    /// The workspace's id.
    pub(crate) workspace_id: String,
    /// The host that the endpoint answers on: SNI needs a name, so it is no address.
    pub(crate) host: String,
    /// Part of every uid, so that two emulators differ.
    pub(crate) suffix: String,
    /// The uid of the Provisioned instance that is the same compute.
    pub(crate) instance_uid: String,
    /// The name of the one database.
    pub(crate) database: String,
}

impl Names {
    /// The endpoint's resource name.
    pub(crate) const ENDPOINT: &str =
        "projects/lakebase-local/branches/production/endpoints/primary";
    /// The Provisioned instance's name.
    pub(crate) const INSTANCE: &str = "lakebase-local";
    /// The tenant in Microsoft Entra ID.
    pub(crate) const TENANT: &str = "5e1f7a3c-0000-4000-8000-00000000a2d1";
    /// What a GitHub Actions job shows to get its identity token.
    pub(crate) const AZURE_DEVOPS_ACCESS_TOKEN: &str = "azure-devops-access-token";
    pub(crate) const GITHUB_REQUEST_TOKEN: &str = "github-request-token";
    /// The one session of the local metadata service.
    pub(crate) const METADATA_SESSION: &str = "session-1";
    /// The app's name, for the apps API.
    pub(crate) const APP: &str = "lakebase-local-app";

    pub(crate) fn generate(database: &str) -> Result<Self, EmulatorError> {
        let number = u64::from_be_bytes(random()?) % 9_000_000_000_000_000;
        Ok(Self {
            workspace_id: (1_000_000_000_000_000 + number).to_string(),
            host: "localhost".to_owned(),
            suffix: hex(&random::<4>()?),
            instance_uid: uuid()?,
            database: database.to_owned(),
        })
    }

    /// The endpoint's uid.
    pub(crate) fn endpoint_uid(&self) -> String {
        format!("ep-local-breeze-{}", self.suffix)
    }

    /// The TLS server names that mean the endpoint with this uid.
    pub(crate) fn hosts(uid: &str) -> Vec<String> {
        let suffixes = ["", "-ro", "-pooler", "-ro-pooler"];
        suffixes
            .map(|suffix| format!("{uid}{suffix}.localhost"))
            .to_vec()
    }

    /// Whether a TLS server name is one of the built-in pooler's.
    pub(crate) fn is_pooler(server_name: &str) -> bool {
        let label = server_name.split('.').next().unwrap_or_default();
        label.to_ascii_lowercase().ends_with("-pooler")
    }
}

pub(crate) struct Shared {
    pub(crate) names: Names,
    pub(crate) workspace_url: String,
    pub(crate) identities: Identities,
    pub(crate) signer: Signer,
    pub(crate) authorities: Authorities,
    pub(crate) counters: Counters,
    pub(crate) tally: Tallies,
    pub(crate) faults: Faults,
    pub(crate) settings: watch::Sender<Settings>,
    /// The emulated endpoint.
    pub(crate) main: Arc<Endpoint>,
    /// It and those of branches made by the API.
    pub(crate) endpoints: Endpoints,
    /// The resources of the API.
    pub(crate) catalog: Catalog,
    pub(crate) tracker: TaskTracker,
    pub(crate) stop: CancellationToken,
    pub(crate) serial: AtomicU64,
    pub(crate) credentials_revoked_through: AtomicU64,
    pub(crate) tokens_revoked_through: AtomicU64,
}

impl Shared {
    /// The host of any endpoint, by its resource name.
    pub(crate) fn host_of(&self, endpoint: &str) -> String {
        if endpoint == Names::ENDPOINT {
            return self.names.host.clone();
        }
        let uid = self.catalog.uid_of(endpoint);
        format!("{}.localhost", uid.unwrap_or_default())
    }

    /// What a compute needs that starts now.
    pub(crate) fn common(&self) -> Common {
        Common {
            settings: self.settings.clone(),
            counters: self.counters.clone(),
            tracker: self.tracker.clone(),
            stop: self.stop.child_token(),
        }
    }

    /// Serves an endpoint on the hosts of this uid.
    pub(crate) fn serve(
        &self,
        name: &str,
        uid: &str,
        database: Database,
        is_read_only: bool,
    ) -> Result<Arc<Endpoint>, EmulatorError> {
        let hosts = Names::hosts(uid);
        let certificates = Certificates::generate(&self.authorities, &hosts)?;
        let common = self.common();
        let mut endpoint = Endpoint::start(name.to_owned(), hosts, certificates, database, common);
        endpoint.is_read_only = is_read_only;
        let endpoint = Arc::new(endpoint);
        self.endpoints.add(Arc::clone(&endpoint));
        Ok(endpoint)
    }

    /// The workspace's wall clock.
    pub(crate) fn now(&self) -> Timestamp {
        let skew = SignedDuration::from_secs(self.settings.borrow().clock_skew_seconds);
        let now = Timestamp::now();
        now.checked_add(skew).unwrap_or(now)
    }

    /// Issues a token for `subject`.
    pub(crate) fn issue(
        &self,
        subject: &str,
        audience: Audience,
        seconds: i64,
    ) -> Result<(String, Claims), EmulatorError> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed) + 1;
        self.signer
            .issue(subject, audience, self.now(), seconds, serial)
    }

    /// Whether a token was issued before the last revocation of its kind.
    pub(crate) fn is_revoked(&self, claims: &Claims, audience: Audience) -> bool {
        claims.serial <= self.revoked_through(audience).load(Ordering::Relaxed)
    }

    /// Makes every token of this kind issued so far worthless.
    pub(crate) fn revoke(&self, audience: Audience) {
        self.revoked_through(audience)
            .store(self.serial.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    fn revoked_through(&self, audience: Audience) -> &AtomicU64 {
        match audience {
            Audience::Database => &self.credentials_revoked_through,
            Audience::Workspace | Audience::Identity | Audience::Management => {
                &self.tokens_revoked_through
            }
        }
    }

    /// Whether a database was made without the extension that OAuth logins need.
    pub(crate) fn lacks_extension(&self, database: &str) -> bool {
        let settings = self.settings.borrow();
        let mut without = settings.databases_without_extension.iter();
        without.any(|name| name == database)
    }
}
