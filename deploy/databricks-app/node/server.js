// The tutorial's notes app for Node. There is no token code: node-postgres finds lakebase-proxy in the environment.
import { createServer } from "node:http";
import pg from "pg";

// Idle connections are closed after 60 s: a compute that is suspended meanwhile would end them.
const pool = new pg.Pool({ max: 10, idleTimeoutMillis: 60_000 });
// An idle connection that the server ends is replaced at the next query; without this line Node would end, too.
pool.on("error", (error) => console.error(`idle connection: ${error.message}`));

const escape = (text) => String(text).replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

async function recentNotes() {
  const { rows } = await pool.query("select content, created_at::text from notes order by created_at desc, id desc limit 5");
  const items = rows.map((note) => `<li>${escape(note.content)} - ${escape(note.created_at)}</li>`);
  return `<!doctype html>
<html lang="en">
<title>Hello from Lakebase!</title>
<h1>Hello from Lakebase!</h1>
<h2>Recent Notes:</h2>
<ul>
${items.join("\n")}
</ul>
</html>
`;
}

const server = createServer(async (request, response) => {
  if (request.method !== "GET" || new URL(request.url, "http://app").pathname !== "/") {
    response.writeHead(404).end();
    return;
  }
  try {
    const page = await recentNotes();
    response.writeHead(200, { "content-type": "text/html; charset=utf-8" }).end(page);
  } catch (error) {
    console.error(`notes: ${error.message}`);
    response.writeHead(503, { "content-type": "text/plain" }).end("The notes cannot be read now.\n");
  }
});

server.listen(Number(process.env.DATABRICKS_APP_PORT ?? 8000), "0.0.0.0", () => console.log("listening"));

// Requests that are under way are answered before the connections go.
process.on("SIGTERM", () => {
  server.close(async () => {
    await pool.end();
    process.exit(0);
  });
  server.closeIdleConnections();
});
