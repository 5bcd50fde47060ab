-- The app's role, once per branch, made by somebody who is logged in to Lakebase with OAuth and may create roles:
--
--     psql -v client_id=<DATABRICKS_CLIENT_ID> -f deploy/sql/01-role.sql
--
-- In the SQL editor write the id itself: '...' where :'client_id' stands, "..." where :"client_id" does.

-- Lakebase's own; a plain CREATE ROLE makes a role that no OAuth credential can log in as.
create extension if not exists databricks_auth;
select databricks_create_role(:'client_id', 'SERVICE_PRINCIPAL');

-- A service principal inherits nothing: what it may do is granted in so many words.
grant connect on database databricks_postgres to :"client_id";
grant usage, create on schema public to :"client_id";
