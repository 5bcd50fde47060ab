//! The counting itself: strace, callgrind, and what the kernel knows of a process's memory.

use std::{
    collections::{BTreeMap, HashMap},
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use super::{
    record::Figure,
    support::{
        client::Client,
        process::{status, written_memory},
        proxy::Proxy,
        upstream::Upstream,
    },
};

/// How work is shared out between workers depends on the moment.
const ONE_WORKER: &[&str] = &["env", "TOKIO_WORKER_THREADS=1"];
/// The same with a pool of 20 server connections.
const POOL: &[&str] = &[
    "env",
    "TOKIO_WORKER_THREADS=1",
    "LAKEBASE_PROXY_POOL_MODE=auto",
];
/// Round trips before anything is counted: the first ones find caches cold and lists empty.
const WARM_UP: u32 = 200;
const ROUND_TRIPS: u32 = 2000;
/// Memory is the slope between these two: what is there once for all is in both.
const SESSIONS: (usize, usize) = (400, 2000);

pub(crate) fn all(program: &Path, directory: &Path) -> BTreeMap<Figure, f64> {
    let upstream = Upstream::start(directory);
    let mut counted = BTreeMap::new();
    counted.insert(Figure::Resident, resident(program, &upstream));
    counted.insert(Figure::Memory, memory(program, ONE_WORKER, &upstream));
    counted.insert(Figure::MemoryAtRest, memory(program, POOL, &upstream));
    if there_is("strace") {
        counted.insert(
            Figure::SystemCalls,
            system_calls(program, &upstream, directory),
        );
    } else {
        println!("system calls are not counted: there is no strace");
    }
    if there_is("valgrind") {
        let (of_pool, _) = instructions(program, POOL, &upstream, directory);
        counted.insert(Figure::InstructionsOfPool, of_pool);
        let (own, allocations) = instructions(program, ONE_WORKER, &upstream, directory);
        counted.insert(Figure::Instructions, own);
        counted.insert(Figure::Allocations, allocations);
    } else {
        println!("instructions and allocations are not counted: there is no valgrind");
    }
    counted
}

fn there_is(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(tool).is_file())
}

fn round_trips(client: &mut Client, count: u32) {
    for _ in 0..count {
        client.select_1().expect("an answer");
    }
}

/// MB of a process without clients, with default settings: one runtime per core.
fn resident(program: &Path, upstream: &Upstream) -> f64 {
    let proxy = Proxy::start(program, &[], upstream);
    std::thread::sleep(Duration::from_secs(1));
    status(proxy.id(), "VmRSS:") as f64 / 1024.0
}

/// kB that one more idle session takes.
fn memory(program: &Path, prefix: &[&str], upstream: &Upstream) -> f64 {
    let proxy = Proxy::start(program, prefix, upstream);
    let mut clients = Vec::new();
    let mut grown_to = |count: usize| {
        while clients.len() < count {
            let mut client = Client::connect(proxy.address).expect("a session");
            client.select_1().expect("an answer");
            clients.push(client);
        }
        // The allocator returns freed pages after a second (`dirty_decay_ms` in .cargo/config.toml).
        std::thread::sleep(Duration::from_secs(2));
        written_memory(proxy.id())
    };
    let (few, many) = (grown_to(SESSIONS.0), grown_to(SESSIONS.1));
    many.saturating_sub(few) as f64 / (SESSIONS.1 - SESSIONS.0) as f64
}

fn system_calls(program: &Path, upstream: &Upstream, directory: &Path) -> f64 {
    let proxy = Proxy::start(program, ONE_WORKER, upstream);
    let mut client = Client::connect(proxy.address).expect("a session");
    round_trips(&mut client, WARM_UP);
    let file = directory.join("strace");
    let mut tracer = Command::new("strace")
        .args(["-f", "-c", "-o"])
        .arg(&file)
        .args(["-p", &proxy.id().to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .expect("strace starts");
    let mut attached = String::new();
    let mut output = BufReader::new(tracer.stderr.take().expect("it is piped"));
    output
        .read_line(&mut attached)
        .expect("strace prints a line");
    assert!(attached.contains("attached"), "strace: {attached}");
    round_trips(&mut client, ROUND_TRIPS);
    run("kill", &["-INT", &tracer.id().to_string()]);
    tracer.wait().expect("strace ends");
    let table = std::fs::read_to_string(&file).expect("strace writes a table");
    let total = table
        .lines()
        .find(|line| line.trim_end().ends_with(" total"))
        .and_then(|line| line.split_whitespace().nth(3))
        .and_then(|calls| calls.parse::<f64>().ok());
    total.unwrap_or_else(|| panic!("no total in\n{table}")) / f64::from(ROUND_TRIPS)
}

fn instructions(
    program: &Path,
    prefix: &[&str],
    upstream: &Upstream,
    directory: &Path,
) -> (f64, f64) {
    let out = directory.join("callgrind.out");
    let out = format!("--callgrind-out-file={}", out.display());
    let prefix = [prefix, &["valgrind", "--tool=callgrind", "-q", &out]].concat();
    let proxy = Proxy::start(program, &prefix, upstream);
    let mut client = Client::connect(proxy.address).expect("a session");
    round_trips(&mut client, WARM_UP);
    let id = proxy.id().to_string();
    run("callgrind_control", &["--zero", &id]);
    round_trips(&mut client, ROUND_TRIPS);
    run("callgrind_control", &["--dump", &id]);
    let dump = directory.join("callgrind.out.1");
    let text = std::fs::read_to_string(&dump).expect("callgrind writes its counts");
    if let Some(keep) = std::env::var_os("KEEP_CALLGRIND") {
        std::fs::write(keep, &text).expect("the counts can be kept");
    }
    let total = text
        .lines()
        .find_map(|line| {
            line.strip_prefix("totals: ")
                .or_else(|| line.strip_prefix("summary: "))
        })
        .and_then(|total| total.trim().parse::<f64>().ok());
    let total = total.unwrap_or_else(|| panic!("no total in {}", dump.display()));
    let round_trips = f64::from(ROUND_TRIPS);
    (total / round_trips, allocations(&text) / round_trips)
}

/// How often the allocator was called, in a file of callgrind's: `cfn=(id) name` names the callee, where it is named for
/// the first time, and the next line has the number of calls.
fn allocations(counts: &str) -> f64 {
    // Those of C, which jemalloc answers to as well, and those of its own that Rust's allocations of some alignment and
    // reallocations are counted.
    const ENTRIES: [&str; 7] = [
        "malloc",
        "calloc",
        "realloc",
        "posix_memalign",
        "aligned_alloc",
        "mallocx",
        "rallocx",
    ];
    let mut names: HashMap<&str, &str> = HashMap::new();
    let (mut counted, mut callee) = (0.0, "");
    for line in counts.lines() {
        let symbol = ["fn=", "cfn="]
            .iter()
            .find_map(|key| line.strip_prefix(key));
        if let Some(symbol) = symbol {
            let (id, name) = symbol.split_once(' ').unwrap_or((symbol, ""));
            if !name.is_empty() {
                names.insert(id, name);
            }
            if line.starts_with('c') {
                callee = names.get(id).copied().unwrap_or_default();
            }
        } else if let Some(calls) = line.strip_prefix("calls=")
            && ENTRIES.contains(&callee)
        {
            let calls = calls.split(' ').next().and_then(|calls| calls.parse().ok());
            counted += calls.unwrap_or(0.0);
        }
    }
    counted
}

fn run(tool: &str, arguments: &[&str]) {
    let status = Command::new(tool)
        .args(arguments)
        .stdout(Stdio::null())
        .status()
        .unwrap_or_else(|error| panic!("{tool}: {error}"));
    assert!(status.success(), "{tool} {arguments:?}: {status}");
}
