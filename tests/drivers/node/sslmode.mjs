// node-postgres with the connection string of the first argument: prints 42, and keeps the connection until standard input ends.
import pg from 'pg';

const client = new pg.Client({ connectionString: process.argv[2] });
await client.connect();
const { rows } = await client.query('select 6 * 7 as answer');
console.log(rows[0].answer);
process.stdin.on('end', () => client.end()).resume();
