// node-postgres: ten connections of a pool that stay open while the compute suspends, and requests that work after that.
import assert from 'node:assert/strict';
import { setTimeout as sleep } from 'node:timers/promises';
import pg from 'pg';

const SIZE = 10;
const ROUNDS = 5;
const WAIT = 30_000; // ms that anything here may take before it counts as hung

// Until the proxy has no server connections with these labels.
const untilNone = async (labels) => {
  const deadline = Date.now() + WAIT;
  for (;;) {
    const metrics = await (await fetch(process.env.METRICS_URL)).text();
    const found = metrics.split('\n').filter((line) => line.startsWith(`lakebase_proxy_pool_servers${labels}`) && !line.endsWith(' 0'));
    if (found.length === 0) return;
    assert(Date.now() < deadline, found.join());
    await sleep(50);
  }
};

// Suspends the compute, and waits until the proxy knows that its connections are gone.
const suspend = async () => {
  // A login that is under way would wake it.
  await untilNone('{state="opening"');
  const done = await fetch(`${process.env.EMULATOR_URL}/emulator/events`, { method: 'POST', body: JSON.stringify({ event: 'suspend' }) });
  assert.equal(done.status, 204);
  await untilNone('{');
};

const pool = new pg.Pool({ min: SIZE, max: SIZE, idleTimeoutMillis: 0, connectionTimeoutMillis: WAIT });
let connected = 0;
pool.on('connect', () => (connected += 1));
pool.on('error', (error) => {
  console.error(error);
  process.exit(1);
});

const work = async (number) => {
  const client = await pool.connect();
  try {
    for (let turn = 0; turn < 3; turn += 1) {
      const named = { name: 'sum', text: 'select $1::int + $2::int as sum', values: [number, turn] };
      assert.equal((await client.query(named)).rows[0].sum, number + turn);
    }
    await client.query('insert into pool_rows values ($1)', [number]);
  } finally {
    client.release();
  }
};

await pool.query('drop table if exists pool_rows');
await pool.query('create table pool_rows (a int)');
for (let round = 0; round < ROUNDS; round += 1) {
  if (round > 0) await suspend();
  await Promise.all(Array.from({ length: SIZE }, (_, number) => work(number)));
}
const { rows } = await pool.query('select count(*)::int as count from pool_rows');
assert.equal(rows[0].count, SIZE * ROUNDS);
await pool.query('drop table pool_rows');
// None was replaced.
assert.equal(connected, SIZE);
await pool.end();
console.log('end = of the job');
