//! The layers of `src/lib.rs`: imports go downwards only, and modules form no cycle.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

/// The layers from top to bottom. A module imports from lower layers, and from its own as long as there is no cycle.
const LAYERS: &[&[&str]] = &[
    &["cli"],
    &["app"],
    &["listener", "admin", "console", "notes", "exec", "doctor"],
    &["session"],
    &["pool"],
    &["upstream"],
    &["credential"],
    &["workspace"],
    &["status"],
    &["net", "protocol", "telemetry", "systemd"],
    &["config", "clock", "shutdown"],
];
/// Stands in for the outside world: imports leaves only, and is imported by `cli` and tests only.
const EMULATOR: &str = "emulator";
const OF_EMULATOR: &[&str] = &["net", "protocol", "telemetry", "clock", "shutdown"];
/// Imports that are still to go, with who removes them.
const PENDING: &[(&str, &str, &str)] = &[];
/// Modules that are still to go, with who moves them.
const LEAVING: &[(&str, &str)] = &[];

/// What each module imports, each with a file that does.
type Imports = BTreeMap<(String, String), String>;

fn rank(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

/// Every import that breaks a rule: upwards, in a cycle of one layer, or of a module without a layer.
fn violations(imports: &Imports) -> Vec<(String, String, String)> {
    let mut violations = Vec::new();
    for ((from, to), file) in imports {
        let is_allowed = if from == EMULATOR {
            OF_EMULATOR.contains(&to.as_str())
        } else if to == EMULATOR {
            from == "cli"
        } else {
            match (rank(from), rank(to)) {
                (Some(upper), Some(lower)) if upper == lower => !reaches(imports, to, from),
                (Some(upper), Some(lower)) => upper < lower,
                _ => false,
            }
        };
        if !is_allowed {
            violations.push((from.clone(), to.clone(), file.clone()));
        }
    }
    violations
}

/// Whether imports within one layer lead from one module to another.
fn reaches(imports: &Imports, from: &str, to: &str) -> bool {
    let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(module) = next.pop() {
        if module == to {
            return true;
        }
        if seen.insert(module) {
            let imported = imports.keys().filter(|(from, _)| from == module);
            let in_layer = imported.filter(|(_, to)| rank(to) == rank(module));
            next.extend(in_layer.map(|(_, to)| to.as_str()));
        }
    }
    false
}

/// The imports of all files below `directory`, which is `src`.
fn imports(directory: &Path) -> Imports {
    let mut imports = Imports::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(current) = directories.pop() {
        for entry in fs::read_dir(current).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                if name != "tests" {
                    directories.push(path);
                }
                continue;
            }
            let is_root = matches!(name, "lib.rs" | "main.rs");
            let is_test = matches!(name, "tests.rs" | "fuzzing.rs");
            if path.extension() != Some("rs".as_ref()) || is_root || is_test {
                continue;
            }
            let relative = path.strip_prefix(directory).unwrap();
            let parts: Vec<&str> = relative.iter().map(|part| part.to_str().unwrap()).collect();
            let module = parts[0].trim_end_matches(".rs");
            // How many `super` lead to the root of the crate.
            let depth = parts.len() - usize::from(name == "mod.rs");
            for to in imported(&fs::read_to_string(&path).unwrap(), depth) {
                if to != module {
                    imports
                        .entry((module.to_owned(), to))
                        .or_insert_with(|| relative.display().to_string());
                }
            }
        }
    }
    imports
}

/// The top-level modules that a file names outside of its tests.
fn imported(source: &str, depth: usize) -> BTreeSet<String> {
    let code = without_tests(source);
    let mut modules = BTreeSet::new();
    for root in ["crate::".to_owned(), "super::".repeat(depth)] {
        for (at, _) in code.match_indices(&root) {
            let is_whole =
                !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            if is_whole {
                modules.extend(first_names(&code[at + root.len()..]));
            }
        }
    }
    // Not `super::super::super`, and no item of the root.
    modules.retain(|name| name != "super" && name.starts_with(|c: char| c.is_lowercase()));
    modules
}

/// The first names of the paths in `a::b` or `{a::b, c::{d, e}}`.
fn first_names(path: &str) -> Vec<String> {
    let name = |text: &str| {
        let text = text.trim_start();
        let end = text.find(|c: char| !c.is_alphanumeric() && c != '_');
        text[..end.unwrap_or(text.len())].to_owned()
    };
    let Some(list) = path.strip_prefix('{') else {
        return vec![name(path)];
    };
    let (mut names, mut depth) = (vec![name(list)], 1);
    for (at, character) in list.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => names.push(name(&list[at + 1..])),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// A file as rustfmt writes it, without comments and without items for tests.
fn without_tests(source: &str) -> String {
    let mut code = String::new();
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        let trimmed = line.trim_start();
        if trimmed == "#[cfg(test)]" {
            let indent = &line[..line.len() - trimmed.len()];
            let end = format!("{indent}}}");
            let first = lines
                .find(|line| !line.trim_start().starts_with("#["))
                .unwrap_or_default();
            if !first.ends_with(';') && !first.ends_with('}') {
                lines.find(|line| line.trim_end_matches(';') == end);
            }
        } else if !trimmed.starts_with("//") {
            code.push_str(line);
            code.push('\n');
        }
    }
    code
}

#[test]
fn imports_go_downwards_and_form_no_cycle() {
    let imports = imports(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")));
    assert!(imports.len() > 40, "found only {} imports", imports.len());
    let is_pending = |from: &str, to: &str| {
        let is_leaving = |module| LEAVING.iter().any(|(leaving, _)| *leaving == module);
        let is_pending = PENDING.iter().any(|(a, b, _)| (*a, *b) == (from, to));
        is_pending || is_leaving(from) || is_leaving(to)
    };
    let unexpected: Vec<String> = violations(&imports)
        .into_iter()
        .filter(|(from, to, _)| !is_pending(from, to))
        .map(|(from, to, file)| format!("{from} -> {to} (src/{file})"))
        .collect();
    assert!(
        unexpected.is_empty(),
        "imports upwards, or in a cycle:\n{}",
        unexpected.join("\n")
    );
}

#[test]
fn a_planted_import_is_found() {
    let source = "\
        //! See [`crate::cli`].\n\
        use crate::{\n    telemetry::{Metrics, chain},\n    upstream,\n};\n\
        fn f() -> super::super::session::X {}\n\
        #[cfg(test)]\n\
        mod tests {\n    use crate::app;\n}\n";
    let found: Vec<String> = imported(source, 2).into_iter().collect();
    assert_eq!(found, ["session", "telemetry", "upstream"]);

    let planted = |pairs: &[(&str, &str)]| {
        let pair =
            |&(from, to): &(&str, &str)| ((from.to_owned(), to.to_owned()), "f.rs".to_owned());
        let found = violations(&pairs.iter().map(pair).collect());
        let found = found
            .into_iter()
            .map(|(from, to, _)| format!("{from} {to}"));
        found.collect::<Vec<_>>()
    };
    let allowed = [
        ("app", "session"),
        ("session", "config"),
        ("doctor", "admin"),
        ("cli", "emulator"),
    ];
    assert!(planted(&allowed).is_empty());
    assert_eq!(planted(&[("session", "console")]), ["session console"]);
    assert_eq!(planted(&[("config", "telemetry")]), ["config telemetry"]);
    assert_eq!(
        planted(&[("emulator", "session"), ("app", "emulator")]),
        ["app emulator", "emulator session"]
    );
    assert_eq!(planted(&[("app", "unknown")]), ["app unknown"]);
    let cycle = planted(&[
        ("net", "protocol"),
        ("protocol", "telemetry"),
        ("telemetry", "net"),
    ]);
    assert_eq!(cycle.len(), 3, "{cycle:?}");
}
