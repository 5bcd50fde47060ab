//! Where this machine keeps its Postgres programs.

use std::{
    env::split_paths,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Where packages put versions side by side: Debian and Ubuntu, the PGDG RPMs, Homebrew on ARM and on Intel, Postgres.app.
const VERSIONED: [(&str, &str); 5] = [
    ("/usr/lib/postgresql", "bin"),
    ("/usr", "bin"),
    ("/opt/homebrew/opt", "bin"),
    ("/usr/local/opt", "bin"),
    ("/Applications/Postgres.app/Contents/Versions", "bin"),
];

/// The first directory that is usable, in the order people expect: `PATH`, `pg_config`, then the usual places with the newest
/// version first.
pub(super) fn find(path: Option<&OsStr>, is_usable: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let from_path = path
        .into_iter()
        .flat_map(split_paths)
        .find(|directory| is_usable(directory));
    let from_pg_config = || from_pg_config().filter(|directory| is_usable(directory));
    from_path.or_else(from_pg_config).or_else(|| {
        VERSIONED.iter().find_map(|(root, bin)| {
            let mut found: Vec<(u32, PathBuf)> = versions(Path::new(root))
                .map(|(version, directory)| (version, directory.join(bin)))
                .filter(|(_, directory)| is_usable(directory))
                .collect();
            found.sort();
            found.pop().map(|(_, directory)| directory)
        })
    })
}

/// Whether `directory` holds the two programs needed.
pub(super) fn is_complete(directory: &Path) -> bool {
    ["initdb", "postgres"]
        .iter()
        .all(|program| directory.join(program).is_file())
}

fn from_pg_config() -> Option<PathBuf> {
    let output = Command::new("pg_config")
        .arg("--bindir")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
}

/// `15`, `postgresql@17`, `pgsql-16`: directories named for a major version.
fn versions(root: &Path) -> impl Iterator<Item = (u32, PathBuf)> {
    fs::read_dir(root)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let digits = name
                .trim_start_matches("postgresql@")
                .trim_start_matches("pgsql-");
            let version = if name == "postgresql" {
                0
            } else {
                digits.parse().ok()?
            };
            Some((version, entry.path()))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(directory: &Path) {
        fs::create_dir_all(directory).unwrap();
        for program in ["initdb", "postgres"] {
            fs::write(directory.join(program), "").unwrap();
        }
    }

    #[test]
    fn the_path_comes_first_and_incomplete_directories_are_passed_over() {
        let scratch = tempfile::tempdir().unwrap();
        let (client_only, server) = (scratch.path().join("client"), scratch.path().join("server"));
        fs::create_dir_all(&client_only).unwrap();
        fs::write(client_only.join("psql"), "").unwrap();
        place(&server);
        let path = std::env::join_paths([&client_only, &server]).unwrap();
        assert_eq!(find(Some(&path), is_complete), Some(server));
    }

    #[test]
    fn version_directories_are_read_from_their_names() {
        let scratch = tempfile::tempdir().unwrap();
        for name in ["15", "postgresql@17", "pgsql-16", "lib", "9.6"] {
            fs::create_dir(scratch.path().join(name)).unwrap();
        }
        let mut found: Vec<u32> = versions(scratch.path())
            .map(|(version, _)| version)
            .collect();
        found.sort_unstable();
        assert_eq!(found, [15, 16, 17]);
    }
}
