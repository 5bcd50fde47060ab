//! Hints of refused logins: which identity, role, host and database are involved.

use super::{Class, Failure, Origin, rules};
use crate::{
    config::DEFAULT_DATABASE, credential::Credential, protocol::options::LoginParameters,
    upstream::endpoint::Endpoint,
};

const ANOTHER_IDENTITY: &str = "The login is as `{user}` (PGUSER), but the credential belongs to `{identity}`: unset PGUSER or set it to `{identity}`, unless `{user}` is a group that it belongs to.";
const NO_EXTENSION: &str = "If logins work in other databases, run in `{database}`: CREATE EXTENSION IF NOT EXISTS databricks_auth; (a plain CREATE DATABASE leaves it out).";
const OTHER_DATABASE: &str = "The client requested the database `{database}`: check the name in its connection string (in Postgres it has underscores where the resource id has hyphens), or create the database. The endpoint's default is `{default}`.";

impl Failure {
    /// Completes the hint of a refusal by the server with the login's identities, host and database.
    pub(in crate::upstream) fn explain(
        mut self,
        endpoint: &Endpoint,
        credential: &Credential,
        parameters: &LoginParameters,
    ) -> Self {
        let Origin::Server(_) = &self.origin else {
            return self;
        };
        let user = &endpoint.user;
        let identity = credential.identity();
        // A role for a group differs from the identity of its members, so the hint names that case as well.
        let is_another = identity
            .as_ref()
            .is_some_and(|identity| !identity.eq_ignore_ascii_case(user));
        let is_role_missing = self.hint.as_deref() == Some(rules::MISSING_ROLE);
        let mut hint = self.hint().unwrap_or_default().to_owned();
        if is_another && (self.class == Class::Identity || is_role_missing) {
            ANOTHER_IDENTITY.clone_into(&mut hint);
        }
        if self.class == Class::Identity
            && identity.is_some()
            && parameters.database != DEFAULT_DATABASE
        {
            hint.push(' ');
            hint.push_str(NO_EXTENSION);
        }
        if self.is_missing_database() && parameters.database != endpoint.database {
            OTHER_DATABASE.clone_into(&mut hint);
        }
        let is_refused = matches!(
            self.class,
            Class::Identity | Class::WrongIdentity | Class::WrongKind
        );
        let is_token = identity.is_some() || credential.expires_at.is_some();
        if let Some(direct) = endpoint.direct_host().filter(|_| is_token)
            && (is_refused || self.hint.as_deref() == Some(rules::POOLER))
        {
            rules::POOLER.clone_into(&mut hint);
            self.note = Some(format!(
                "the pooler `{}` refused it, the direct host is `{direct}`",
                endpoint.host
            ));
        }
        if !hint.is_empty() {
            let direct = endpoint.direct_host().map_or_else(
                || "the same name without `-pooler`".to_owned(),
                |host| format!("`{host}`"),
            );
            let role = format!("\"{}\"", user.replace('"', "\"\""));
            // Users are named by e-mail address, service principals by application id.
            let kind = if user.contains('@') {
                "USER"
            } else {
                "SERVICE_PRINCIPAL"
            };
            let known = [
                (
                    "{identity}",
                    identity
                        .as_deref()
                        .unwrap_or("an identity that it does not name"),
                ),
                ("{user}", user),
                ("{role}", &role),
                ("{kind}", kind),
                ("{database}", &parameters.database),
                ("{default}", &endpoint.database),
                ("{direct}", &direct),
            ];
            self.hint = Some(fill(&hint, &known).into());
        }
        self
    }
}

/// Replaces placeholders by their values, in one pass: a value may look like another placeholder.
fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        filled.push_str(before);
        match values.iter().find(|(name, _)| from.starts_with(name)) {
            Some((name, value)) => {
                filled.push_str(value);
                rest = &from[name.len()..];
            }
            None => {
                filled.push('{');
                rest = &from[1..];
            }
        }
    }
    filled + rest
}
