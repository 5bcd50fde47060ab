-- The tutorial's table with three rows to look at, in database databricks_postgres; running it again does no harm:
--
--     psql -v client_id=<DATABRICKS_CLIENT_ID> -f deploy/sql/02-notes.sql

create table if not exists public.notes (
    id serial primary key,
    content text not null,
    created_at timestamp default now()
);

insert into public.notes (content)
select content
from unnest(array[
    'Welcome to Lakebase Autoscaling!',
    'This app connects to Postgres',
    'Data fetched from your database'
]) as sample (content)
where not exists (select from public.notes);

-- The user who runs this owns the table: the app's role needs rights on it, and on the sequence behind `id` to insert.
grant select, insert, update, delete on public.notes to :"client_id";
grant usage, select on sequence public.notes_id_seq to :"client_id";
