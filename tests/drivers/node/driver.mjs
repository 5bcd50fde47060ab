// node-postgres: one broad job over one server, reported as `key = value` lines.
//
// The server is named by libpq's own variables alone, so the same script runs direct and through the proxy.
import { readFileSync } from 'node:fs';
import { isDeepStrictEqual } from 'node:util';
import { pipeline as flow } from 'node:stream/promises';
import { Readable } from 'node:stream';
import pg from 'pg';
import Cursor from 'pg-cursor';
import { from as copyFrom, to as copyTo } from 'pg-copy-streams';

const WAIT = 20_000; // ms that anything here may take before it counts as hung

const report = (key, value) => console.log(`${key} = ${typeof value === 'string' ? value : JSON.stringify(value)}`);

const failure = (key, error) => {
  for (const field of ['severity', 'code', 'message', 'detail', 'hint', 'position', 'schema', 'table', 'column', 'constraint', 'where', 'routine']) {
    // The number of a backend's temporary schema may differ.
    if (error[field] !== undefined) report(`${key}.${field}`, String(error[field]).replace(/pg_temp_\d+/, 'pg_temp_N'));
  }
};

// node-postgres reads PGSSLMODE, but a certificate authority must be handed to it.
const ssl = process.env.PGSSLMODE === 'verify-full' ? { ca: readFileSync(process.env.PGSSLROOTCERT), rejectUnauthorized: true } : false;
const config = (more = {}) => ({ ssl, connectionTimeoutMillis: WAIT, ...more });

async function withClient(more, job) {
  const client = new pg.Client(config(more));
  await client.connect();
  try {
    return await job(client);
  } finally {
    await client.end();
  }
}

const value = async (client, text, values) => Object.values((await client.query(text, values)).rows[0])[0];

// Which process serves a client; what a driver knows as its process id may be half of a cancel key that the edge made up.
const backend = (client) => value(client, 'select pg_backend_pid()');

async function startup() {
  const statuses = {};
  const client = new pg.Client(config({ application_name: "node's job", statement_timeout: 54321, lock_timeout: 4321, options: '-c search_path=public,pg_catalog -c geqo=off' }));
  client.connection.on('parameterStatus', ({ parameterName, parameterValue }) => { statuses[parameterName] = parameterValue; });
  await client.connect();
  // pg learns the process id for its own cancel and compares it with nothing; we do.
  report('startup.pid is pg_backend_pid', (await backend(client)) === client.processID);
  for (const name of Object.keys(statuses).sort()) report(`startup.status.${name}`, statuses[name]);
  const show = async (key) => {
    for (const name of ['application_name', 'statement_timeout', 'lock_timeout', 'search_path', 'geqo', 'client_encoding', 'TimeZone']) {
      report(`${key}.${name}`, await value(client, `show ${name}`));
    }
  };
  await show('startup.show');
  await client.query("set application_name = 'changed'; set statement_timeout = 1000; set search_path = pg_catalog");
  await client.query('reset all');
  await show('startup.after RESET ALL');
  await client.query("set timezone = 'Asia/Tokyo'; set lock_timeout = 1");
  await client.query('discard all');
  await show('startup.after DISCARD ALL');
  report('startup.current', (await client.query('select current_database(), current_user')).rows);
  await client.end();
  for (const [key, wrong] of [['startup.no such database', { database: 'no_such_database' }], ['startup.bad option', { options: '-c no_such_setting=1' }]]) {
    try {
      await withClient(wrong, async () => report(key, 'connected'));
    } catch (error) {
      report(key, error.code);
    }
  }
}

async function types(client) {
  const { rows: [row], fields } = await client.query({
    rowMode: 'array',
    text: `select 42::int2, -7::int4, 9007199254740993::int8, 1.5::float4, 2.25::float8, 123456789.123456789::numeric, true, false,
      'text'::text, 'x'::char(3), '\\xdeadbeef'::bytea, date '2026-02-28', time '23:59:59.999999', timestamp '2026-02-28 12:34:56.789',
      timestamptz '2026-02-28 12:34:56+00', interval '1 day 02:03:04', '{"a": [1, null]}'::jsonb, array[1, null, 3],
      array[['a', 'b'], ['c', 'd']], int4range(1, 5), 'infinity'::float8, null::int4, point(1, 2)`,
  });
  row.forEach((one, n) => report(`types.${String(n).padStart(2, '0')}.${fields[n].dataTypeID}`, one ?? null));
  const sent = ['naïve – 漢字 🐘', Buffer.from([0, 1, 255]), [1, null, 2], { deep: ['x', null] }, null, true, new Date(Date.UTC(2026, 1, 28))];
  const back = (await client.query({ rowMode: 'array', text: 'select $1::text, $2::bytea, $3::int[], $4::jsonb, $5::text, $6::bool, $7::timestamptz', values: sent })).rows[0];
  report('types.round trip', isDeepStrictEqual(back, sent));
  report('types.binary', (await client.query({ text: 'select 7::int4 as n, $1::bytea as b', values: [Buffer.from('ab')], binary: true })).rows);
  report('types.empty query', (await client.query('')).rows);
  report('types.1600 columns', (await client.query({ rowMode: 'array', text: `select ${[...Array(1600).keys()].join(',')}` })).rows[0].length);
}

async function large(client) {
  const text = '0123456789abcdef'.repeat(1 << 20);
  report('large.sent', (await client.query('select md5($1::text), length($1::text)', [text])).rows[0]);
  report('large.received', (await value(client, "select repeat('0123456789abcdef', 1 << 20)")) === text);
  const { rows } = await client.query('select g, md5(g::text) from generate_series(1, 100000) g');
  report('large.rows', [rows.length, rows.at(-1)]);
}

async function prepared(client) {
  for (let n = 0; n < 5; n += 1) report(`prepared.${n}`, await value(client, { name: 'doubled', text: 'select $1::int * 2' }, [n]));
  report('prepared.known to the server', await value(client, "select count(*) from pg_prepared_statements where name = 'doubled'"));
  // Queued without awaiting one another, answered in order.
  const many = await Promise.all([...Array(200).keys()].map((n) => value(client, 'select $1::int', [n])));
  report('prepared.queued', many.reduce((a, b) => a + b));
}

async function errors(client) {
  await client.query('create temp table strict (id int primary key, positive int constraint must_be_positive check (positive > 0), label text not null)');
  const statements = {
    unique: "insert into strict values (1, 1, 'a'), (1, 2, 'b')",
    check: "insert into strict values (2, -1, 'a')",
    'not null': 'insert into strict values (3, 1, null)',
    syntax: 'selec 1',
    'no table': 'select * from no_such_table',
    division: 'select 1 / 0',
    raised: "do $$ begin raise exception 'own words %', 7 using errcode = 'LB001', detail = 'a detail', hint = 'a hint'; end $$",
    unicode: "do $$ begin raise exception 'żółć 🐘'; end $$",
  };
  for (const [key, text] of Object.entries(statements)) {
    await client.query(text).catch((error) => failure(`errors.${key}`, error));
    await client.query({ text, values: [], name: `error ${key}` }).catch((error) => report(`errors.${key}.extended`, error.code));
  }
  await client.query('begin');
  await client.query("insert into strict values (1, 1, 'kept')");
  await client.query('savepoint inner_point');
  await client.query('select 1 / 0').catch((error) => report('errors.inside', error.code));
  await client.query('select 1').catch((error) => report('errors.in failed transaction', error.code));
  await client.query('rollback to savepoint inner_point');
  report('errors.commit', (await client.query('commit')).command);
  report('errors.kept', (await client.query('select id, label from strict')).rows);
}

async function copy(client) {
  await client.query('create temp table copied (id int, t text)');
  const rows = function* rows() {
    for (let n = 0; n < 20000; n += 1) yield `${n}\trow ${n} żółć 🐘\n`;
  };
  const incoming = client.query(copyFrom('copy copied from stdin'));
  await flow(Readable.from(rows()), incoming);
  report('copy.in', incoming.rowCount);
  let bytes = 0;
  const outgoing = client.query(copyTo('copy (select * from copied order by id) to stdout'));
  for await (const chunk of outgoing) bytes += chunk.length;
  report('copy.out', [outgoing.rowCount, bytes]);
  report('copy.checksum', await value(client, "select md5(string_agg(t, ',' order by id)) from copied"));
  await flow(Readable.from(['not a number\tx\n']), client.query(copyFrom('copy copied from stdin'))).catch((error) => failure('copy.bad row', error));
  await flow(Readable.from((function* gone() { yield '1\tx\n'; throw new Error('changed my mind'); })()), client.query(copyFrom('copy copied from stdin')))
    .catch((error) => report('copy.given up', error.message));
  await (async () => {
    for await (const chunk of client.query(copyTo('copy (select 1 / (50000 - g) from generate_series(1, 60000) g) to stdout'))) bytes += chunk.length;
  })().catch((error) => report('copy.out fails midway', error.code));
  report('copy.left', await value(client, 'select count(*) from copied'));
}

async function notifications() {
  await withClient({}, (listener) => withClient({}, async (speaker) => {
    const received = [];
    const pid = await backend(speaker);
    const both = new Promise((resolve) => {
      listener.on('notification', ({ channel, payload, processId }) => {
        received.push([channel, payload, processId === pid]);
        if (received.length === 2) resolve();
      });
    });
    await listener.query('listen drivers_node');
    await speaker.query("notify drivers_node, 'one'");
    await speaker.query("select pg_notify('drivers_node', $1)", ['two 🐘']);
    await both;
    report('notify.received', received);
  }));
}

async function notices(client) {
  const seen = [];
  client.on('notice', ({ severity, code, message }) => seen.push([severity, code, message.slice(0, 40), message.length]));
  await client.query("do $$ begin raise notice 'first'; raise warning 'second' using hint = 'h'; raise notice '%', repeat('x', 70000); end $$");
  report('notices', seen);
}

// The process that sleeps: a pool may run each transaction at another one.
async function asleep() {
  return withClient({}, async (watcher) => {
    for (const end = Date.now() + WAIT; Date.now() < end;) {
      const pid = await value(watcher, "select max(pid) from pg_stat_activity where state = 'active' and wait_event = 'PgSleep'");
      if (pid) return pid;
      await new Promise((resolve) => { setTimeout(resolve, 20); });
    }
    throw new Error('no backend began to sleep');
  });
}

async function cancel() {
  await withClient({}, async (client) => {
    const began = Date.now();
    const query = new pg.Query('select pg_sleep(60)');
    const ended = new Promise((resolve) => { query.on('error', resolve); query.on('end', () => resolve(undefined)); });
    client.query(query);
    await asleep();
    // node-postgres sends a CancelRequest from a client that was never connected.
    new pg.Client(config()).cancel(client, query);
    failure('cancel', await ended);
    report('cancel.prompt', Date.now() - began < WAIT);
    report('cancel.usable', await value(client, 'select 1'));
  });
}

async function cursors(client) {
  const cursor = client.query(new Cursor('select g from generate_series(1, 10000) g where g <> $1', [5]));
  report('cursors.first', await cursor.read(3));
  let total = 3;
  for (let rows = await cursor.read(700); rows.length > 0; rows = await cursor.read(700)) total += rows.length;
  report('cursors.total', total);
  await cursor.close();
  const abandoned = client.query(new Cursor('select generate_series(1, 1000000)'));
  await abandoned.read(10);
  await abandoned.close();
  report('cursors.abandoned', await value(client, 'select 1'));
}

async function results(client) {
  const all = await client.query("select 1 as a; select 'two' as b, 2 as c; create temp table third (n int); insert into third select generate_series(1, 5); select count(*) from third");
  for (const one of all) report('results', [one.command, one.rowCount, one.rows]);
  await client.query('insert into third values (6); select 1 / 0; select 3').catch((error) => report('results.error', error.code));
  report('results.undone', await value(client, 'select count(*) from third'));
}

async function pool() {
  const pooled = new pg.Pool(config({ max: 6, application_name: 'pooled' }));
  const values = await Promise.all([...Array(100).keys()].map(async (n) => (await pooled.query('select $1::int as n', [n])).rows[0].n));
  report('pool.sum', values.reduce((a, b) => a + b));
  report('pool.application_name', await value(pooled, 'show application_name'));
  await pooled.end();
}

// The client receives the server's own error when its backend is terminated.
async function ended() {
  const victim = new pg.Client(config());
  victim.on('error', () => {});
  await victim.connect();
  const query = victim.query('select pg_sleep(60)').then(() => undefined, (error) => error);
  const pid = await asleep();
  await withClient({}, (killer) => killer.query('select pg_terminate_backend($1)', [pid]));
  failure('ended', await query);
}

await startup();
await withClient({}, async (client) => {
  for (const section of [types, large, prepared, errors, copy, notices, cursors, results]) await section(client);
});
await cancel();
await notifications();
await pool();
await ended();
report('end', 'of the job');
