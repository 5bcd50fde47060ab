//! The identities of the workspace and their authentication.

use std::fmt;

use aws_lc_rs::{
    digest::{SHA256, digest},
    rand,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use secrecy::{ExposeSecret, SecretString};

use super::EmulatorError;

/// What sort of Databricks identity this is; the words are those of `databricks_create_role` and the roles API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdentityKind {
    /// Signs in with client id and secret; its name is its application id.
    ServicePrincipal,
    /// A person; their name is an e-mail address.
    User,
}

impl IdentityKind {
    /// The word the roles API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ServicePrincipal => "SERVICE_PRINCIPAL",
            Self::User => "USER",
        }
    }
}

/// One identity of the workspace.
#[derive(Clone)]
pub struct Identity {
    /// Its name, which is also the name of its Postgres role: an e-mail address or an application id.
    pub name: String,
    /// Person or service principal.
    pub kind: IdentityKind,
    /// How SCIM shows it.
    pub display_name: String,
    /// Its numeric id in SCIM.
    pub id: String,
    /// The OAuth client secret, for service principals.
    pub client_secret: Option<SecretString>,
    /// A personal access token, for identities that have one.
    pub pat: Option<SecretString>,
    /// Groups it is a member of; a member may log in under the role of its group.
    pub groups: Vec<String>,
    /// Whether it has the Workspace access entitlement, without which the API refuses it.
    pub has_workspace_access: bool,
}

impl Identity {
    /// Whether this is its OAuth client secret.
    pub fn has_secret(&self, given: &SecretString) -> bool {
        let expected = self.client_secret.as_ref();
        expected.is_some_and(|secret| secret.expose_secret() == given.expose_secret())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

/// The identities of the emulated workspace.
#[derive(Clone, Debug)]
pub struct Identities {
    /// The app's own: has a role on the endpoint, as after the tutorial's `databricks_create_role`.
    pub app: Identity,
    /// A service principal that exists in the workspace but has no Postgres role.
    pub stranger: Identity,
    /// A service principal without the Workspace access entitlement.
    pub unentitled: Identity,
    /// A person, owner of the project and of the sample table, who signs in with a personal access token.
    pub user: Identity,
}

impl Identities {
    /// Makes up new ones, unlike any other emulator's.
    pub(crate) fn generate() -> Result<Self, EmulatorError> {
        let user_number = u32::from_be_bytes(random()?);
        let user_name = format!("ada.{user_number:08x}@example.com");
        Ok(Self {
            app: service_principal("lakebase app")?,
            stranger: service_principal("another app")?,
            unentitled: Identity {
                has_workspace_access: false,
                ..service_principal("app without workspace access")?
            },
            user: Identity {
                id: numeric_id(&user_name),
                name: user_name,
                kind: IdentityKind::User,
                display_name: "Ada Example".to_owned(),
                client_secret: None,
                pat: Some(SecretString::from(format!("dapi{}", hex(&random::<16>()?)))),
                groups: vec![format!("analysts-{user_number:08x}")],
                has_workspace_access: true,
            },
        })
    }

    /// Every identity.
    pub fn iter(&self) -> impl Iterator<Item = &Identity> {
        [&self.app, &self.stranger, &self.unentitled, &self.user].into_iter()
    }

    pub(crate) fn by_name(&self, name: &str) -> Option<&Identity> {
        self.iter().find(|identity| identity.name == name)
    }
}

/// Random bytes from the system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], EmulatorError> {
    let mut bytes = [0_u8; N];
    rand::fill(&mut bytes).map_err(|_| EmulatorError::Randomness)?;
    Ok(bytes)
}

/// A random UUID, version 4.
pub(crate) fn uuid() -> Result<String, EmulatorError> {
    let mut bytes = random::<16>()?;
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let all = hex(&bytes);
    Ok([
        &all[..8],
        &all[8..12],
        &all[12..16],
        &all[16..20],
        &all[20..],
    ]
    .join("-"))
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use fmt::Write;

    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// The id of an identity in SCIM. It follows from the name, so that `databricks_create_role` in the database can write it
/// into the role's security label.
fn numeric_id(name: &str) -> String {
    let digest = digest(&SHA256, name.as_bytes());
    let bytes = digest.as_ref().iter().take(6);
    let id = bytes.fold(0_u64, |id, byte| id << 8 | u64::from(*byte));
    id.to_string()
}

fn service_principal(display_name: &str) -> Result<Identity, EmulatorError> {
    let name = uuid()?;
    Ok(Identity {
        id: numeric_id(&name),
        name,
        kind: IdentityKind::ServicePrincipal,
        display_name: display_name.to_owned(),
        client_secret: Some(SecretString::from(format!(
            "dose{}",
            URL_SAFE_NO_PAD.encode(random::<24>()?)
        ))),
        pat: None,
        groups: Vec::new(),
        has_workspace_access: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_has_the_shape_that_clients_check() {
        let uuid = uuid().unwrap();
        let lengths: Vec<usize> = uuid.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert_eq!(&uuid[14..15], "4");
        assert!(matches!(&uuid[19..20], "8" | "9" | "a" | "b"));
    }

    #[test]
    fn secrets_do_not_print() {
        let identities = Identities::generate().unwrap();
        let secret = identities.app.client_secret.clone().unwrap();
        let pat = identities.user.pat.clone().unwrap();
        let printed = format!("{identities:?}");
        assert!(!printed.contains(secret.expose_secret()));
        assert!(!printed.contains(pat.expose_secret()));
    }
}
