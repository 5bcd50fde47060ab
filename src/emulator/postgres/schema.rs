//! What an endpoint holds before the first login: roles, `databricks_create_role`, the database, the sample table.

use std::fmt::Write;

use tokio::task::JoinSet;
use tokio_postgres::{Client, Config, NoTls};

use super::escape_literal;
use crate::emulator::{EmulatorError, EmulatorOptions, identity::Identities};

/// Serializes preparation by emulators that share a server.
const PREPARATION_LOCK: i64 = 0x6c61_6b65_6261_7365;

/// Marks OAuth roles, in the role's comment; what follows is the identity type.
pub(super) const OAUTH_MARK: &str = "databricks:";

/// Roles every database of an endpoint knows.
const ROLES: &str = "
do $$ begin
    create role databricks_native nologin;
exception when duplicate_object then null; end $$;
do $$ begin
    create role databricks_superuser nologin createdb createrole;
    grant pg_read_all_data, pg_write_all_data, pg_monitor, pg_signal_backend to databricks_superuser;
exception when duplicate_object then null; end $$;
";

/// `databricks_create_role(identity, type)`: an OAuth role, made by a member of `databricks_superuser`.
const CREATE_ROLE: &str = r#"
create or replace function public.databricks_create_role(identity_name text, identity_type text)
returns void language plpgsql security definer
set search_path = pg_catalog set allow_system_table_mods = on as $function$
begin
    if not pg_has_role(session_user, 'databricks_superuser', 'member') then
        raise insufficient_privilege using message = 'permission denied to create role';
    end if;
    if upper(identity_type) not in ('USER', 'SERVICE_PRINCIPAL', 'GROUP') then
        raise invalid_parameter_value using
            message = format('invalid identity type "%s"', identity_type),
            hint = 'Use one of USER, SERVICE_PRINCIPAL, GROUP.';
    end if;
    execute format('create role %I login', identity_name);
    execute format('comment on role %I is %L', identity_name, 'databricks:' || upper(identity_type));
    -- SECURITY LABEL needs a provider that is loaded into the server; the label itself is a row.
    insert into pg_shseclabel (objoid, classoid, provider, label)
    select oid, 'pg_authid'::regclass, 'databricks_auth', format('id=%s,type=%s',
        ('x' || substr(encode(sha256(convert_to(identity_name, 'UTF8')), 'hex'), 1, 12))::bit(48)::bigint,
        upper(identity_type))
    from pg_roles where rolname = identity_name;
end $function$;
"#;

/// Enters the extension in the catalog by hand, so that `CREATE EXTENSION IF NOT EXISTS databricks_auth` finds it there:
/// its files cannot be installed without writing into the machine's Postgres.
#[cfg(unix)]
const EXTENSION: &str = "
set allow_system_table_mods = on;
insert into pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
select pg_nextoid('pg_extension', 'oid', 'pg_extension_oid_index'), 'databricks_auth', r.oid, n.oid, false, '1.0'
from pg_roles r, pg_namespace n
where r.rolname = current_user and n.nspname = 'public'
    and not exists (select from pg_extension where extname = 'databricks_auth');
alter extension databricks_auth add function public.databricks_create_role(text, text);
";

/// The tutorial's table and rows, a few minutes apart so that `newest first` has an order.
const NOTES: &str = "
create table if not exists public.notes (
    id serial primary key,
    content text not null,
    created_at timestamp default now()
);
insert into public.notes (content, created_at)
select content, now() - age from (values
    ('Welcome to Lakebase Autoscaling!', interval '2 minutes'),
    ('This app connects to Postgres', interval '1 minute'),
    ('Data fetched from your database', interval '0')
) as sample (content, age)
where not exists (select from public.notes);
";

/// Readies `template1` of an own server, so that every database made later has the function and the extension.
#[cfg(unix)]
pub(super) async fn prepare_template(template: &Config) -> Result<(), EmulatorError> {
    run(template, &[ROLES, CREATE_ROLE, EXTENSION].concat()).await
}

/// Readies roles and database for one emulator. Works on any server on which `maintenance` is a superuser.
pub(super) async fn prepare(
    maintenance: &Config,
    identities: &Identities,
    options: &EmulatorOptions,
    role_password: Option<&str>,
) -> Result<(), EmulatorError> {
    let mut guarded = Connected::open(maintenance).await?;
    let client = &guarded.client;
    client
        .execute("select pg_advisory_lock($1)", &[&PREPARATION_LOCK])
        .await
        .map_err(query_error)?;
    client.batch_execute(ROLES).await.map_err(query_error)?;
    for (identity, attributes) in [
        (&identities.app, ""),
        (&identities.user, " createdb createrole"),
    ] {
        let statement = format!(
            "create role {role} login{attributes}; comment on role {role} is {mark};",
            role = identifier(&identity.name),
            mark = escape_literal(&format!("{OAUTH_MARK}{}", identity.kind.as_str())),
        ) + &label(
            &identity.name,
            Some(&format!(
                "id={},type={}",
                identity.id,
                identity.kind.as_str()
            )),
        );
        client
            .batch_execute(&statement)
            .await
            .map_err(query_error)?;
        if let Some(password) = role_password {
            let statement = format!(
                "alter role {} password {}",
                identifier(&identity.name),
                escape_literal(password)
            );
            client
                .batch_execute(&statement)
                .await
                .map_err(query_error)?;
        }
    }
    let owner = format!(
        "grant databricks_superuser to {}",
        identifier(&identities.user.name)
    );
    client.batch_execute(&owner).await.map_err(query_error)?;

    let database = identifier(&options.database);
    let is_there = client
        .query_opt(
            "select from pg_database where datname = $1",
            &[&options.database],
        )
        .await
        .map_err(query_error)?
        .is_some();
    if !is_there {
        let statement = format!("create database {database} owner databricks_superuser");
        client
            .batch_execute(&statement)
            .await
            .map_err(query_error)?;
    }

    let app = identifier(&identities.app.name);
    let mut script = format!(
        "{CREATE_ROLE}\
         grant connect, create on database {database} to {app};\
         grant create, usage on schema public to {app};"
    );
    if options.sample_notes {
        script.push_str("set role databricks_superuser;");
        script.push_str(NOTES);
        let _ = write!(
            script,
            "grant select, insert, update, delete on public.notes to {app};\
             grant usage, select on sequence public.notes_id_seq to {app};"
        );
    }
    let mut inside = maintenance.clone();
    inside.dbname(&options.database);
    let done = run(&inside, &script).await;
    // Ends the session, and with it the lock.
    guarded.tasks.shutdown().await;
    done
}

/// Removes one emulator's roles; what they made goes to `databricks_superuser`.
pub(super) async fn forget(
    maintenance: &Config,
    database: &str,
    identities: &Identities,
) -> Result<(), EmulatorError> {
    let mut inside = maintenance.clone();
    inside.dbname(database);
    for identity in [&identities.app, &identities.user] {
        let role = identifier(&identity.name);
        let script = format!(
            "reassign owned by {role} to databricks_superuser; drop owned by {role}; drop role {role};"
        );
        run(&inside, &script).await?;
    }
    Ok(())
}

/// Statements that give a role this security label, or none. The label is entered by hand, as SECURITY LABEL needs a
/// provider that is loaded into the server.
pub(super) fn label(role: &str, label: Option<&str>) -> String {
    let role = escape_literal(role);
    let mut script = format!(
        "set allow_system_table_mods = on;
         delete from pg_shseclabel where provider = 'databricks_auth' and classoid = 'pg_authid'::regclass
             and objoid = (select oid from pg_roles where rolname = {role});"
    );
    if let Some(label) = label {
        let _ = write!(
            script,
            "insert into pg_shseclabel (objoid, classoid, provider, label)
             select oid, 'pg_authid'::regclass, 'databricks_auth', {} from pg_roles where rolname = {role};",
            escape_literal(label)
        );
    }
    script + "reset allow_system_table_mods;"
}

/// A name as an SQL identifier.
pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A client and the task that drives it; both end together.
pub(super) struct Connected {
    pub(super) client: Client,
    tasks: JoinSet<()>,
}

impl Connected {
    pub(super) async fn open(config: &Config) -> Result<Self, EmulatorError> {
        let (client, connection) = config.connect(NoTls).await.map_err(query_error)?;
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            // An error shows at the client's next query.
            let _ = connection.await;
        });
        Ok(Self { client, tasks })
    }
}

pub(super) async fn run(config: &Config, script: &str) -> Result<(), EmulatorError> {
    let Connected { client, mut tasks } = Connected::open(config).await?;
    let done = client.batch_execute(script).await.map_err(query_error);
    drop(client);
    // Sends Terminate before the end, so that the server releases the database.
    while tasks.join_next().await.is_some() {}
    done
}

pub(super) fn query_error(source: tokio_postgres::Error) -> EmulatorError {
    EmulatorError::Query { source }
}
