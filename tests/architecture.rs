//! The invariants of `src/lib.rs` that can be seen in the source text.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// A source file: its path from the workspace's root, and its code without comments and unit tests.
struct Source {
    path: String,
    code: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        match path.is_dir() {
            true if name != "tests" => files(&path, found),
            false if name.ends_with(".rs") && name != "tests.rs" => found.push(path),
            _ => {}
        }
    }
}

/// Everything below `directory` that is not a test.
fn sources(directory: &str) -> Vec<Source> {
    let mut paths = Vec::new();
    files(&root().join(directory), &mut paths);
    paths.sort();
    assert!(!paths.is_empty(), "nothing in {directory}");
    let source = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
        let is_code = |line: &&str| !line.trim_start().starts_with("//");
        let code = text.lines().filter(is_code).collect::<Vec<_>>().join("\n");
        Source { path: path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned(), code }
    };
    paths.into_iter().map(source).collect()
}

/// Lines with one of these words, of all files but `allowed`.
fn lines_with(directory: &str, words: &[&str], allowed: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources(directory).iter().filter(|source| !allowed.contains(&source.path.as_str())) {
        for line in source.code.lines().filter(|line| words.iter().any(|word| line.contains(word))) {
            found.push(format!("{}: {}", source.path, line.trim()));
        }
    }
    found
}

#[track_caller]
fn refuse(directory: &str, words: &[&str], allowed: &[&str]) {
    let found = lines_with(directory, words, allowed);
    assert!(found.is_empty(), "in {directory}:\n{}", found.join("\n"));
}

#[test]
fn formats_and_postgres_do_no_io() {
    let io = [
        "std::fs",
        "std::net",
        "std::process",
        "std::env",
        "std::thread",
        "std::os::unix",
        "File::",
        "TcpStream",
        "tokio",
        "nix::",
        "libc::",
        "io::Read",
        "io::Write",
        "io::stdin",
        "io::stdout",
        "postgres::Client",
    ];
    for directory in ["src/format", "src/postgres"] {
        refuse(directory, &io, &[]);
    }
}

#[test]
fn the_mount_knows_no_store_no_postgres_and_no_runtime() {
    refuse("mount/src", &["tokio", "aws_", "postgres::", "pgcairn::", "reqwest", "hyper"], &[]);
    let manifest = fs::read_to_string(root().join("mount/Cargo.toml")).unwrap();
    for word in ["tokio", "aws", "\npostgres", "path = \"..\""] {
        assert!(!manifest.contains(word), "mount/Cargo.toml names {word}");
    }
}

/// The rooms of the library, each with those that it may import; all may import what is in [`EVERYWHERE`].
const ROOMS: [(&str, &[&str]); 12] = [
    ("backup", &["repo", "format", "store", "postgres"]),
    ("archive", &["read", "repo", "format", "store", "postgres"]),
    ("restore", &["read", "recovery", "repo", "format", "store", "postgres"]),
    ("clone", &["postgres"]),
    ("verify", &["retention", "repo", "format", "store", "postgres"]),
    ("retention", &["repo", "format", "store", "postgres"]),
    ("read", &["recovery", "repo", "format", "store", "postgres"]),
    ("recovery", &["repo", "format", "store", "postgres"]),
    ("repo", &["format", "store", "postgres"]),
    ("format", &["postgres"]),
    ("store", &[]),
    ("postgres", &[]),
];
const EVERYWHERE: [&str; 5] = ["error", "files", "interrupt", "progress", "user"];

#[test]
fn imports_between_rooms_point_one_way() {
    for (room, allowed) in ROOMS {
        let mut found = Vec::new();
        for source in sources(&format!("src/{room}")).into_iter().chain(room_file(room)) {
            // also in groups: `crate::{a, b}` is not written here, so that every import names its room
            assert!(!source.code.contains("crate::{"), "{} imports rooms in a group", source.path);
            for (at, _) in source.code.match_indices("crate::") {
                let name: String =
                    source.code[at + 7..].chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect();
                let is_room = ROOMS.iter().any(|(other, _)| *other == name) || name == "cli";
                let is_allowed =
                    name == room || allowed.contains(&name.as_str()) || EVERYWHERE.contains(&name.as_str());
                if is_room && !is_allowed {
                    found.push(format!("{} imports crate::{name}", source.path));
                }
            }
        }
        assert!(found.is_empty(), "{}", found.join("\n"));
    }
    for room in ["backup", "retention", "verify", "repo", "recovery"] {
        refuse(&format!("src/{room}"), &["pgcairn_mount"], &[]);
    }
}

/// The file of a room that is not its directory's `mod.rs`.
fn room_file(room: &str) -> Option<Source> {
    let path = format!("src/{room}.rs");
    sources("src").into_iter().find(|source| source.path == path)
}

#[test]
fn every_module_of_the_library_is_a_room_or_known() {
    let text = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let modules: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    for module in &modules {
        let is_known = ROOMS.iter().any(|(room, _)| room == module) || EVERYWHERE.contains(module) || *module == "cli";
        assert!(is_known, "{module} is no room of the library");
    }
    assert_eq!(modules.len(), ROOMS.len() + EVERYWHERE.len() + 1);
}

#[test]
fn there_is_one_bridge_between_async_and_sync() {
    let bridges: Vec<String> = sources("src")
        .into_iter()
        .filter(|source| source.code.contains(".block_on("))
        .map(|source| source.path)
        .collect();
    assert_eq!(bridges, ["src/store/s3/bridge.rs"]);
    refuse("mount/src", &["block_on"], &[]);
}

#[test]
fn only_the_program_prints() {
    let prints = ["println!", "print!", "eprintln!", "eprint!", "dbg!", "io::stdout", "io::stderr"];
    // daemon.rs: the line by which a background child answers its parent; shell.rs: whether it is a terminal
    refuse("src", &prints, &["src/cli/output.rs", "src/cli/daemon.rs", "src/cli/demo/shell.rs"]);
    refuse("src/cli/demo", &["print!", "println!"], &[]);
    refuse("mount/src", &prints, &[]);
}

#[test]
fn only_retention_deletes() {
    // the demo removes the repository that it made; a lock is taken away by its holder, or when that is dead
    // of two wrapped secrets, a change of the passphrase takes the old one away
    // verify takes back its notes of harm, and repair pointers to nothing
    let allowed = [
        "src/cli/demo/home.rs",
        "src/repo/lock.rs",
        "src/repo/passwd.rs",
        "src/verify/harms.rs",
        "src/verify/repair.rs",
    ];
    for directory in
        ["src/backup", "src/archive", "src/recovery", "src/read", "src/restore", "src/verify", "src/repo", "src/cli"]
    {
        refuse(directory, &[".delete("], &allowed);
    }
}

#[test]
fn objects_are_put_in_few_places() {
    let puts = |directory| lines_with(directory, &["store.put("], &[]).len();
    assert_eq!(puts("src/read") + puts("src/cli"), 0);
    // packs; WAL objects; the manifest
    assert_eq!(puts("src/backup") + puts("src/archive"), 3);
    // info files with their copies, the latest pointers, and locks: all that is ever rewritten; and the wrapped secret
    assert_eq!(puts("src/repo"), 4);
    // marks, and what verify found harmed
    assert_eq!(puts("src/retention") + puts("src/verify"), 2);
}

#[test]
fn main_is_thin() {
    assert!(fs::read_to_string(root().join("src/main.rs")).unwrap().lines().count() <= 40);
}
