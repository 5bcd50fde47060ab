// What the programs for Node.js have in common; see ../rounds.py.
import assert from 'node:assert/strict';
import { setTimeout as sleep } from 'node:timers/promises';

export const ROUNDS = 50;
const [WORKERS, PAUSE] = [3, 20];

export const run = async (schema, work) => {
  const end = Date.now() + Number(process.env.ROUNDS_SECONDS) * 1000;
  const worker = async (number) => {
    const session = {
      worker: number,
      settings: { search_path: schema, timezone: `Etc/GMT+${number}`, statement_timeout: `${30 + number}s`, 'app.tenant': `${schema} ${number}` },
      note: (round) => `${schema} ${number} ${round}`,
    };
    let done = 0;
    for (; Date.now() < end; done += 1) {
      const round = done % ROUNDS;
      await work(session, round, (what, found, expected) => assert.deepEqual(found, expected, `${schema}, worker ${number}, round ${done}: ${what}`));
      await sleep(PAUSE);
    }
    return done;
  };
  const done = await Promise.all(Array.from({ length: WORKERS }, (_, number) => worker(number)));
  console.log(done.reduce((sum, it) => sum + it));
};

export const sumTo = (round) => (round * (round + 1)) / 2;
export const notesTo = (session, round) => Array.from({ length: round + 1 }, (_, it) => session.note(it));
