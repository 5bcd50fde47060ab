#!/usr/bin/env node
// Becomes the program for this platform, which npm has installed as an optional package. Nothing is downloaded here.
"use strict";

const { spawn } = require("node:child_process");
const { constants } = require("node:os");

const name = `lakebase-proxy-${process.platform}-${process.arch}`;

let program;
try {
  program = require.resolve(`${name}/bin/lakebase-proxy`);
} catch {
  console.error(`lakebase-proxy: the package \`${name}\` is not installed`);
  console.error("hint: install without --omit=optional; a lock file made on another platform has to be made anew; other platforms: build from source with `cargo install`");
  process.exit(1);
}

const parameters = process.argv.slice(2);

if (typeof process.execve === "function") {
  // Node 22.15 and later: no process stays behind, signals and exit code are the program's own.
  process.removeAllListeners("warning"); // execve calls itself experimental on standard error
  process.execve(program, [program, ...parameters], process.env);
}

const child = spawn(program, parameters, { stdio: "inherit" });
child.on("error", (error) => {
  console.error(`lakebase-proxy: cannot run ${program}: ${error.message}`);
  process.exit(error.code === "ENOENT" ? 127 : 126);
});
// What ends it, and what `exec` passes on to its child. A terminal sends Ctrl-C to both; told twice, the proxy would hurry.
for (const signal of ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT"]) {
  process.on(signal, () => child.kill(signal));
}
process.on("SIGINT", () => process.stdin.isTTY || child.kill("SIGINT"));
child.on("exit", (code, signal) => process.exit(signal ? 128 + constants.signals[signal] : code));
