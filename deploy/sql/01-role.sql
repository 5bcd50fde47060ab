-- The app's role, once per branch, created by a user who is logged in to Lakebase with OAuth and may create roles:
--
--     psql -v client_id=<DATABRICKS_CLIENT_ID> -f deploy/sql/01-role.sql
--
-- In the SQL editor write the id itself: '...' where :'client_id' stands, "..." where :"client_id" does.

-- Lakebase's own; a plain CREATE ROLE makes a role that no OAuth credential can log in as.
create extension if not exists databricks_auth;
select databricks_create_role(:'client_id', 'SERVICE_PRINCIPAL');

-- Every database needs the extension: one made by a plain CREATE DATABASE lacks it, and OAuth logins fail there with
-- "password authentication failed". In that database: create extension if not exists databricks_auth;
--
-- The role is bound to its identity by a security label (select * from pg_seclabels). Where a login fails because the
-- token's identity "did not match the security label", and PGUSER is right, bind it anew; `lakebase-proxy doctor` prints
-- the statement with the number:
--     security label for databricks_auth on role "<client id>" is 'id=<numeric id in the workspace>,type=SERVICE_PRINCIPAL';

-- A service principal inherits nothing: what it may do is granted in so many words.
grant connect on database databricks_postgres to :"client_id";
-- CAN_CONNECT_AND_CREATE of a Databricks App gives nothing in schema public ("permission denied for schema public").
grant usage, create on schema public to :"client_id";
