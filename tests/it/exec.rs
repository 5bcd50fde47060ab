//! `exec`: the program itself with a child, in front of an emulator.

use std::{
    os::unix::process::ExitStatusExt,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use lakebase_proxy::emulator::Emulator;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdout, Command},
    time::Instant,
};

use crate::{
    harness::{
        self,
        binary::{self, PROGRAM},
        within,
    },
    process::{Signal, signal},
};

/// `exec` in front of `emulator` with these flags, of this shell script.
fn exec(emulator: &Emulator, flags: &[&str], script: &str) -> Command {
    let mut command = program(emulator, flags);
    command.args(["--", "sh", "-c", script]);
    command
}

fn program(emulator: &Emulator, flags: &[&str]) -> Command {
    let mut command = binary::command(&["exec", "--structured-logs"]);
    command
        .args(flags)
        .envs(emulator.environment())
        .stdout(Stdio::piped());
    command
}

struct Outcome {
    code: Option<i32>,
    out: String,
    log: String,
}

async fn outcome(command: &mut Command) -> Outcome {
    let output = within(
        "the program ends",
        command.env("PATH", harness::path()).output(),
    )
    .await
    .unwrap();
    Outcome {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        log: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A running `exec` and the output of its child, line by line.
struct Running {
    process: Child,
    out: tokio::io::Lines<BufReader<ChildStdout>>,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let command = command.env("PATH", harness::path());
        let mut process = command.stderr(Stdio::inherit()).spawn().unwrap();
        let out = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, out }
    }

    async fn line(&mut self) -> String {
        let line = within("a line of the child", self.out.next_line()).await;
        line.unwrap().expect("more output")
    }

    fn signal(&self, requested: Signal) {
        signal(self.process.id().unwrap(), requested);
    }

    async fn end(&mut self) -> ExitStatus {
        within("exec ends", self.process.wait()).await.unwrap()
    }
}

#[tokio::test]
async fn the_child_finds_its_database_without_a_password() {
    let emulator = harness::emulator().await;
    let script = "psql -XAtc 'select current_user, current_database()' && psql -XAtc 'select 1' \"$DATABASE_URL\"";
    let mut command = exec(&emulator, &[], script);
    // What would lead it elsewhere.
    let elsewhere = [
        ("PGPASSWORD", "wrong"),
        // The proxy's own setting: where the emulator is.
        ("PGHOSTADDR", "127.0.0.1"),
        ("PGSSLROOTCERT", "/nowhere"),
        ("PGSERVICE", "nowhere"),
        ("PGREQUIREAUTH", "scram-sha-256"),
        ("PGCHANNELBINDING", "require"),
        ("DATABASE_URL", ""),
    ];
    let roots = emulator.environment();
    let roots = roots.iter().any(|(name, _)| *name == "PGSSLROOTCERT");
    for (name, value) in elsewhere {
        if !(roots && name == "PGSSLROOTCERT") {
            command.env(name, value);
        }
    }
    let outcome = outcome(&mut command).await;
    let user = &emulator.identities().app.name;
    assert_eq!(
        outcome.out,
        format!("{user}|databricks_postgres\n1\n"),
        "{}",
        outcome.log
    );
    assert_eq!(outcome.code, Some(0));
}

#[tokio::test]
async fn the_child_gets_variables_of_the_proxy_instead_of_ours() {
    let emulator = harness::emulator().await;
    let mut command = exec(&emulator, &["--strip-secrets"], "env; ulimit -Sn");
    command
        .env("NOTIFY_SOCKET", "/nowhere")
        .env("LISTEN_FDS", "0")
        .env("LAKEBASE_PROXY_MAX_CONNECTIONS", "50")
        .env("KEPT", "kept")
        .env("DATABRICKS_OIDC_TOKEN_ENV", "MY_OIDC")
        .env("DATABRICKS_AUTH_TYPE", "oauth-m2m")
        .env("MY_OIDC", "an-identity-token")
        .env("COPY_OF_MINE", "Bearer an-identity-token")
        .env("MSI_SECRET", "x")
        .env("HTTPS_PROXY", "http://me:hunter2@127.0.0.1:9")
        .env("NO_PROXY", "*");
    let outcome = outcome(&mut command).await;
    let has = |start: &str| outcome.out.lines().any(|line| line.starts_with(start));
    assert!(has("PGHOST=127.0.0.1") && has("PGSSLMODE=disable") && has("KEPT=kept"));
    assert!(has("DATABASE_URL=postgresql://") && has("DATABRICKS_HOST="));
    for gone in [
        "NOTIFY_SOCKET",
        "LISTEN_",
        "LAKEBASE_PROXY_",
        "PGSSLROOTCERT",
        "DATABRICKS_TOKEN",
        "DATABRICKS_CLIENT_SECRET",
        "MY_OIDC",
        "COPY_OF_MINE",
        "MSI_SECRET",
        "HTTPS_PROXY",
    ] {
        assert!(!has(gone), "{gone}: {}", outcome.out);
    }
}

#[tokio::test]
async fn the_child_has_the_limit_of_open_files_that_it_would_have_had() {
    let emulator = harness::emulator().await;
    let exec = PROGRAM;
    // No --max-connections, so that the proxy raises its own.
    let script = "ulimit -Sn; ulimit -Hn; grep 'open files' /proc/$PPID/limits | tr -s ' '";
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -Sn 345; ulimit -Hn 4000; exec \"$@\"", "sh"])
        .args([exec, "exec", "--", "sh", "-c", script])
        .envs(emulator.environment())
        .stdin(Stdio::null());
    let outcome = outcome(&mut command).await;
    assert_eq!(
        outcome.out, "345\n4000\nMax open files 4000 4000 files \n",
        "{}",
        outcome.log
    );
}

#[tokio::test]
async fn the_exit_code_is_that_of_the_child() {
    let emulator = harness::emulator().await;
    for (script, code) in [
        ("exit 3", 3),
        ("kill -KILL $$", 137),
        ("kill -TERM $$", 143),
    ] {
        assert_eq!(
            outcome(&mut exec(&emulator, &[], script)).await.code,
            Some(code),
            "{script}"
        );
    }
    let mut missing = program(&emulator, &[]);
    let outcome = outcome(missing.args(["--", "/nowhere/at-all"])).await;
    assert_eq!(outcome.code, Some(127));
    assert!(
        outcome
            .log
            .contains("lakebase-proxy: cannot run `/nowhere/at-all`: "),
        "{}",
        outcome.log
    );
}

/// By the kernel's OOM killer, or by an impatient supervisor: the program lived on, with a database that was gone.
#[tokio::test]
async fn the_child_ends_with_an_exec_that_is_killed() {
    let emulator = harness::emulator().await;
    let script = "echo started; exec sleep 1000";
    let mut running = Running::start(&mut exec(&emulator, &[], script));
    assert_eq!(running.line().await, "started");
    running.signal(Signal::KILL);
    assert_eq!(running.end().await.signal(), Some(9));
    let more = within("the child ends", running.out.next_line()).await;
    assert_eq!(more.unwrap(), None);
}

/// The parent may die before the child has set its parent-death signal.
#[tokio::test]
async fn a_child_whose_exec_has_gone_already_does_not_become_the_program() {
    let mut command = binary::command(&["__launch", "1", "1024", "echo", "started"]);
    let outcome = outcome(command.stdout(Stdio::piped())).await;
    assert_eq!((outcome.code, outcome.out.as_str()), (Some(143), ""));
}

#[tokio::test]
async fn without_a_credential_the_child_is_not_started() {
    let emulator = harness::emulator().await;
    let mut command = exec(&emulator, &["--connect-timeout", "300ms"], "echo started");
    let began = Instant::now();
    // No listener.
    command.env("DATABRICKS_HOST", "http://127.0.0.1:1");
    let outcome = outcome(&mut command).await;
    assert_eq!((outcome.code, outcome.out.as_str()), (Some(1), ""));
    let last = outcome
        .log
        .lines()
        .filter(|line| line.starts_with("lakebase-proxy: "));
    let last: Vec<_> = last.collect();
    assert_eq!(last.len(), 1, "{}", outcome.log);
    assert!(
        last[0].starts_with("lakebase-proxy: `sh` was not started: "),
        "{}",
        outcome.log
    );
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn a_proxy_that_fails_closes_the_connections_of_the_child() {
    let emulator = harness::emulator().await;
    let script = "echo ready; while read line; do psql -XAtc 'select 1' 2>/dev/null || echo refused; done; exit 6";
    // Enough for a login on a busy machine, and soon over without an answer.
    let flags = ["--connect-timeout", "5s"];
    let mut command = exec(&emulator, &flags, script);
    let mut running = Running::start(command.stdin(Stdio::piped()));
    let mut input = running.process.stdin.take().unwrap();
    assert_eq!(running.line().await, "ready");
    input.write_all(b"\n").await.unwrap();
    assert_eq!(running.line().await, "1");
    emulator.stop().await;
    input.write_all(b"\n").await.unwrap();
    assert_eq!(running.line().await, "refused");
    drop(input);
    assert_eq!(running.end().await.code(), Some(6));
}

#[tokio::test]
async fn on_sigterm_the_child_goes_first_and_still_has_its_database() {
    let emulator = harness::emulator().await;
    let script =
        "trap 'psql -XAtc \"select 42\"; exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    let mut running = Running::start(&mut exec(&emulator, &[], script));
    assert_eq!(running.line().await, "ready");
    running.signal(Signal::TERM);
    assert_eq!(running.line().await, "42", "a new session after SIGTERM");
    assert_eq!(running.end().await.code(), Some(7));
}

#[tokio::test]
async fn a_child_that_ignores_sigterm_is_killed_in_time() {
    let emulator = harness::emulator().await;
    let script = "trap '' TERM; echo ready; while :; do sleep 0.1; done";
    let flags = ["--max-sigterm-delay", "1s"];
    let mut running = Running::start(&mut exec(&emulator, &flags, script));
    assert_eq!(running.line().await, "ready");
    let reported = Instant::now();
    running.signal(Signal::TERM);
    assert_eq!(running.end().await.code(), Some(137));
    assert!(
        reported.elapsed() > Duration::from_millis(500),
        "it had its time"
    );

    // The second one does not wait.
    let flags = ["--max-sigterm-delay", "1h"];
    let mut running = Running::start(&mut exec(&emulator, &flags, script));
    assert_eq!(running.line().await, "ready");
    running.signal(Signal::TERM);
    running.signal(Signal::TERM);
    // Two that come as one are one.
    let again = async {
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            signal(running.process.id().unwrap(), Signal::TERM);
        }
    };
    let ended = async {
        let mut nothing = Vec::new();
        running
            .out
            .get_mut()
            .read_to_end(&mut nothing)
            .await
            .unwrap();
    };
    tokio::select! {
        () = again => {}
        () = within("the child is killed", ended) => {}
    }
    assert_eq!(running.end().await.code(), Some(137));
}

#[tokio::test]
async fn signals_are_passed_on() {
    let emulator = harness::emulator().await;
    let signals = [
        ("HUP", Signal::HUP),
        ("INT", Signal::INT),
        ("QUIT", Signal::QUIT),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
        ("WINCH", Signal::WINCH),
        ("TTIN", Signal::TTIN),
    ];
    let traps = signals.map(|(name, _)| format!("trap 'echo got {name}' {name}; "));
    let traps = traps.concat();
    let script = format!("{traps} echo ready; while :; do sleep 0.05; done");
    // Under nohup, SIGHUP is ignored.
    let mut command = Command::new("env");
    command
        .args(["--default-signal", "setsid", PROGRAM])
        .args(["exec", "--", "sh", "-c", &script])
        .envs(emulator.environment())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let mut running = Running::start(&mut command);
    assert_eq!(running.line().await, "ready");
    for (name, signal) in signals {
        running.signal(signal);
        assert_eq!(running.line().await, format!("got {name}"));
    }
    running.signal(Signal::TERM);
    assert_eq!(running.end().await.code(), Some(143), "the child's own");
}

#[tokio::test]
async fn ignored_signals_stay_ignored() {
    let emulator = harness::emulator().await;
    let script = "echo ready; read line; echo still here";
    let mut command = Command::new("sh");
    command
        .args(["-c", "trap '' HUP; exec \"$@\"", "sh"])
        .arg(PROGRAM)
        .args(["exec", "--", "sh", "-c", script])
        .envs(emulator.environment())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let mut running = Running::start(&mut command);
    assert_eq!(running.line().await, "ready");
    running.signal(Signal::HUP);
    let mut input = running.process.stdin.take().unwrap();
    input.write_all(b"\n").await.unwrap();
    assert_eq!(running.line().await, "still here");
    assert_eq!(running.end().await.code(), Some(0));
}

#[tokio::test]
async fn a_clean_end_by_sigterm_can_be_zero() {
    let emulator = harness::emulator().await;
    for (flags, script, code) in [
        (
            &["--exit-zero-on-sigterm"][..],
            "echo ready; exec sleep 60",
            0,
        ),
        (
            &["--exit-zero-on-sigterm"],
            "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done",
            9,
        ),
        (&[], "echo ready; exec sleep 60", 143),
    ] {
        let mut running = Running::start(&mut exec(&emulator, flags, script));
        assert_eq!(running.line().await, "ready");
        running.signal(Signal::TERM);
        assert_eq!(running.end().await.code(), Some(code), "{flags:?} {script}");
    }
}

#[tokio::test]
async fn two_live_side_by_side() {
    let emulator = harness::emulator().await;
    let script = "echo $PGPORT; psql -XAtc 'select 1'; read line";
    let start = || {
        let mut command = exec(&emulator, &[], script);
        command.stdin(Stdio::piped());
        Running::start(&mut command)
    };
    let (mut one, mut other) = (start(), start());
    let ports = (one.line().await, other.line().await);
    assert_ne!(ports.0, ports.1);
    assert_eq!(
        (one.line().await, other.line().await),
        ("1".into(), "1".into())
    );
    for running in [&mut one, &mut other] {
        drop(running.process.stdin.take());
        running.end().await;
    }
}

#[tokio::test]
async fn as_pid_1_orphans_are_reaped_and_the_status_is_that_of_the_child() {
    let emulator = harness::emulator().await;
    // Orphans that end before, beside and after; each would stay as a zombie of PID 1.
    let script = "for i in 1 2 3 4 5; do (sh -c 'sleep 0.05; exit 4' &) ; done; \
                  psql -XAtc 'select 1'; sleep 0.5; \
                  echo zombies $(cat /proc/[0-9]*/status | grep -c '^State:.Z'); exit 3";
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(PROGRAM)
        .args(["exec", "--", "sh", "-c", script])
        .envs(emulator.environment())
        .stdin(Stdio::null());
    let outcome = outcome(&mut command).await;
    if outcome.log.contains("Operation not permitted") {
        return; // No namespaces here.
    }
    assert_eq!(outcome.out, "1\nzombies 0\n", "{}", outcome.log);
    assert_eq!(outcome.code, Some(3));
}

#[tokio::test]
async fn pid_1_passes_sigterm_on() {
    let emulator = harness::emulator().await;
    let script = "trap 'echo stopped; exit 5' TERM; echo ready; while :; do sleep 0.05; done";
    let mut command = Command::new("unshare");
    command
        .args([
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            "sh",
            "-c",
        ])
        // The shell is replaced by the program, which then is PID 1.
        .arg(format!("exec {PROGRAM} exec -- sh -c \"$0\""))
        .arg(script)
        .envs(emulator.environment())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let mut running = Running::start(&mut command);
    let Ok(Some(line)) = within("a line", running.out.next_line()).await else {
        return; // No namespaces here.
    };
    assert_eq!(line, "ready");
    let unshare = running.process.id().unwrap();
    let init = std::fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
    signal(init.trim().parse().unwrap(), Signal::TERM);
    assert_eq!(running.line().await, "stopped");
    let status = running.end().await;
    assert_eq!((status.code(), status.signal()), (Some(5), None));
}

/// A terminal with a program in it, typed at and read from.
struct Terminal {
    process: Child,
    out: ChildStdout,
    seen: String,
}

impl Terminal {
    fn start(emulator: &Emulator, line: &str) -> Self {
        // A test runner in the background may ignore Ctrl-C, and so would whatever it starts.
        let mut process = Command::new("env")
            .args(["--default-signal=INT,QUIT,TSTP", "script"])
            .args(["-qefc", line, "/dev/null"])
            .envs(emulator.environment())
            .env("PROXY", PROGRAM)
            .env("PATH", harness::path())
            .env("TERM", "dumb")
            .env("PAGER", "cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let out = process.stdout.take().unwrap();
        Self {
            process,
            out,
            seen: String::new(),
        }
    }

    async fn type_in(&mut self, keys: &str) {
        let keyboard = self.process.stdin.as_mut().unwrap();
        keyboard.write_all(keys.as_bytes()).await.unwrap();
        keyboard.flush().await.unwrap();
    }

    /// Reads on until this is to be seen; forgets what was before it.
    async fn until(&mut self, text: &str) {
        let mut chunk = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let read = within(text, self.out.read(&mut chunk)).await.unwrap();
            assert!(read > 0, "it ends without printing {text:?}: {}", self.seen);
            self.seen.push_str(&String::from_utf8_lossy(&chunk[..read]));
        }
    }

    async fn code(mut self) -> Option<i32> {
        let mut rest = Vec::new();
        let _ = within("the end", self.out.read_to_end(&mut rest)).await;
        within("the end", self.process.wait()).await.unwrap().code()
    }
}

#[tokio::test]
async fn in_a_terminal_ctrl_c_cancels_the_query_and_not_psql() {
    let emulator = harness::emulator().await;
    let superuser = harness::superuser().await;
    let mut terminal = Terminal::start(&emulator, "exec $PROXY exec -- psql -X");
    terminal.until("databricks_postgres=>").await;
    terminal.type_in("select 'asleep', pg_sleep(600);\n").await;
    let role = &emulator.identities().app.name;
    harness::eventually("the query runs", async || {
        let query = "select 1 from pg_stat_activity where usename = $1 and state = 'active' and query like '%asleep%'";
        superuser.query_opt(query, &[role]).await.unwrap()
    })
    .await;
    terminal.type_in("\x03").await;
    terminal
        .until("canceling statement due to user request")
        .await;
    terminal.until("databricks_postgres=>").await;
    terminal.type_in("select 'still ' || 'here';\n").await;
    terminal.until("still here").await;
    terminal.type_in("\\q\n").await;
    assert_eq!(terminal.code().await, Some(0));
}

#[tokio::test]
async fn in_a_terminal_ctrl_c_ends_a_program_that_it_would_have_ended() {
    let emulator = harness::emulator().await;
    let line = "exec $PROXY exec -- sh -c 'echo ready; exec sleep 600'";
    let mut terminal = Terminal::start(&emulator, line);
    terminal.until("ready").await;
    terminal.type_in("\x03").await;
    assert_eq!(terminal.code().await, Some(130));
}

#[tokio::test]
async fn in_a_shell_job_control_works() {
    let emulator = harness::emulator().await;
    let mut terminal = Terminal::start(&emulator, "exec bash --norc --noprofile -i");
    terminal.type_in("PS1='pro''mpt> '\n").await;
    terminal.until("prompt>").await;
    terminal
        .type_in("$PROXY exec -- sh -c 'echo rea''dy; exec cat'\n")
        .await;
    terminal.until("ready").await;
    terminal.type_in("\x1a").await;
    terminal.until("Stopped").await;
    terminal.until("prompt>").await;
    terminal.type_in("fg\n").await;
    terminal.until("PROXY exec").await;
    terminal.type_in("a line for cat\n").await;
    // The terminal's echo and cat's own.
    terminal.until("a line for cat").await;
    terminal.until("a line for cat").await;
    terminal.type_in("\x04").await;
    terminal.until("prompt>").await;

    // A program that stops itself alone.
    terminal
        .type_in("$PROXY exec -- sh -c 'kill -STOP $$; echo go''es on'\n")
        .await;
    terminal.until("Stopped").await;
    terminal.until("prompt>").await;
    terminal.type_in("fg\n").await;
    terminal.until("goes on").await;
    terminal.until("prompt>").await;
    terminal.type_in("exit 0\n").await;
    assert_eq!(terminal.code().await, Some(0));
}
