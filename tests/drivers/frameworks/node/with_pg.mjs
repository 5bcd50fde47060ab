// node-postgres: a pool, with named statements and a cursor.
import assert from 'node:assert/strict';
import pg from 'pg';
import { notesTo, run, sumTo } from './rounds.mjs';

const SCHEMA = 'of_node_postgres';
const pool = new pg.Pool({ max: 3, idleTimeoutMillis: 0 });
await pool.query(`drop schema if exists ${SCHEMA} cascade; create schema ${SCHEMA} create table item (worker int, round int, note text, unique (worker, round))`);

await run(SCHEMA, async (session, round, equal) => {
  const { worker, settings } = session;
  const c = await pool.connect();
  const named = (name, text, ...values) => c.query({ name, text, values });
  try {
    await c.query(Object.entries(settings).map(([name, value]) => `set ${name} = '${value}'`).join(';'));
    for (const [name, value] of Object.entries(settings)) {
      equal(name, (await named('setting', 'select current_setting($1) as value', name)).rows, [{ value }]);
    }
    if (round === 0) await named('clear', 'delete from item where worker = $1', worker);
    const insert = (note) => named('insert', 'insert into item values ($1, $2, $3)', worker, round, note);
    await c.query('begin');
    await insert(session.note(round));
    await c.query('savepoint once');
    await assert.rejects(insert('twice'), { code: '23505' });
    await c.query('rollback to once');
    equal('rows', (await named('rows', 'select count(*)::int, sum(round)::int from item where worker = $1', worker)).rows, [{ count: round + 1, sum: sumTo(round) }]);
    await c.query('commit');
    await c.query("begin; set local statement_timeout = '77s'");
    await named('undo', "update item set note = 'undone' where worker = $1", worker);
    await c.query('rollback');
    equal('timeout', (await c.query('show statement_timeout')).rows, [{ statement_timeout: settings.statement_timeout }]);
    const { rows } = await named('notes', 'select note from item where worker = $1 order by round', worker);
    equal('notes', rows.map((row) => row.note), notesTo(session, round));
  } finally {
    c.release();
  }
});
await pool.end();
