#![allow(clippy::unwrap_used)]

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::symlink;
use std::time::{Duration, SystemTime};

use super::*;
use crate::postgres::Major;

fn layout() -> Layout {
    let tablespace_directory = Major::new(15).unwrap().tablespace_directory();
    Layout { tablespace_directory, relation_segment_pages: 131_072 }
}

fn data_directory() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("global")).unwrap();
    fs::write(root.path().join(crate::postgres::CONTROL_FILE), "control").unwrap();
    root
}

fn paths(scan: &Scan) -> Vec<String> {
    scan.found.iter().map(|found| found.path.escape_ascii().to_string()).collect()
}

#[test]
fn links_are_followed_to_any_directory_but_one_that_encloses_them() {
    let (root, etc) = (data_directory(), tempfile::tempdir().unwrap());
    // as Kubernetes shows a ConfigMap
    fs::create_dir_all(etc.path().join("..2024_01/deep")).unwrap();
    fs::write(etc.path().join("..2024_01/a.conf"), "a").unwrap();
    symlink("..2024_01", etc.path().join("..data")).unwrap();
    symlink("..data/a.conf", etc.path().join("a.conf")).unwrap();
    symlink(etc.path(), root.path().join("conf.d")).unwrap();
    // loops: up, to itself, to each other, and to the data directory by way of elsewhere
    symlink("..", etc.path().join("..2024_01/deep/up")).unwrap();
    symlink("self", root.path().join("self")).unwrap();
    symlink("pong", root.path().join("ping")).unwrap();
    symlink("ping", root.path().join("pong")).unwrap();
    symlink(root.path(), etc.path().join("home")).unwrap();
    symlink("nowhere", root.path().join("dangling")).unwrap();
    let found = scan(root.path(), layout()).unwrap();
    let in_etc = ["conf.d", "conf.d/..2024_01", "conf.d/..2024_01/a.conf", "conf.d/..2024_01/deep"];
    let by_link = ["conf.d/..data", "conf.d/..data/a.conf", "conf.d/..data/deep", "conf.d/a.conf"];
    assert_eq!(paths(&found), [&[""][..], &in_etc, &by_link, &["global", "global/pg_control"]].concat());
}

/// It would be stored in itself.
#[test]
fn the_repository_is_left_out_however_a_link_leads_there() {
    let (root, place) = (data_directory(), tempfile::tempdir().unwrap());
    let repository = place.path().canonicalize().unwrap().join("repo");
    fs::create_dir_all(repository.join("chunk/main")).unwrap();
    fs::write(repository.join("chunk/main/pack"), "x").unwrap();
    fs::write(place.path().join("other"), "x").unwrap();
    for (name, target) in [("backups", ""), ("chunks", "chunk/main"), ("pack", "chunk/main/pack")] {
        symlink(repository.join(target), root.path().join(name)).unwrap();
    }
    symlink(place.path(), root.path().join("disk")).unwrap();
    let found = scan_without(root.path(), layout(), Some(&repository)).unwrap();
    assert_eq!(paths(&found), ["", "disk", "disk/other", "global", "global/pg_control"]);
    // elsewhere it is a directory like any other
    let found = scan_without(root.path(), layout(), Some(Path::new("/nowhere"))).unwrap();
    assert!(paths(&found).contains(&"disk/repo/chunk/main/pack".to_owned()));
}

#[test]
fn links_that_lead_to_each_other_without_enclosing_end_too() {
    let (root, a) = (data_directory(), tempfile::tempdir().unwrap());
    for level in 0..40 {
        fs::create_dir(a.path().join(format!("{level}"))).unwrap();
        symlink(a.path().join(format!("{}", level + 1)), a.path().join(format!("{level}/x"))).unwrap();
        symlink(a.path().join(format!("{}", level + 1)), a.path().join(format!("{level}/y"))).unwrap();
    }
    symlink(a.path().join("0"), root.path().join("conf.d")).unwrap();
    assert_eq!(scan(root.path(), layout()).unwrap().found.len(), 3 + 255);
}

#[test]
fn names_that_mounts_and_restores_need_are_refused() {
    for name in [".pgcairn", "pgcairn.restore", "PG_VERSION.pgcairn", "global/pg_control.pgcairn"] {
        let root = data_directory();
        fs::write(root.path().join(name), "the user's own").unwrap();
        let error = scan(root.path(), layout()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    let root = data_directory();
    fs::write(root.path().join("global/.pgcairn"), "").unwrap();
    scan(root.path(), layout()).unwrap();
}

#[test]
fn names_of_any_bytes_are_found_and_such_a_path_of_a_tablespace_is_refused() {
    let root = data_directory();
    let odd = OsString::from_vec(b"donn\xe9es".to_vec());
    fs::write(root.path().join(&odd), "x").unwrap();
    assert!(paths(&scan(root.path(), layout()).unwrap()).contains(&"donn\\xe9es".to_owned()));
    let space = tempfile::tempdir().unwrap();
    let target = space.path().join(&odd);
    fs::create_dir(&target).unwrap();
    fs::create_dir(root.path().join("pg_tblspc")).unwrap();
    symlink(&target, root.path().join("pg_tblspc/16400")).unwrap();
    let error = scan(root.path(), layout()).unwrap_err();
    assert!(error.to_string().contains("tablespace 16400 is not UTF-8"), "{error}");
}

#[test]
fn a_file_is_told_from_another_of_the_same_size_and_time() {
    let root = data_directory();
    let (path, other) = (root.path().join("postgresql.conf"), root.path().join("other"));
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let write = |path: &Path, text: &str| {
        fs::write(path, text).unwrap();
        File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
    };
    write(&path, "one");
    let identity = || {
        let found = scan(root.path(), layout()).unwrap().found;
        let found = found.into_iter().find(|found| *found.path == *b"postgresql.conf").unwrap();
        (found.size, found.mtime, found.identity.unwrap())
    };
    let one = identity();
    assert_eq!(one, identity(), "nothing happened");
    // a reproducible image: the same size and time, another inode
    write(&other, "two");
    fs::rename(&other, &path).unwrap();
    let two = identity();
    assert_eq!((one.0, one.1), (two.0, two.1));
    assert_ne!(one.2, two.2);
    // changed in place, and its time put back
    std::thread::sleep(Duration::from_millis(20));
    write(&path, "six");
    assert_ne!(two.2, identity().2);
}

#[test]
fn only_what_is_older_than_its_own_file_system_is_settled() {
    let root = data_directory();
    let path = root.path().join("file");
    let set = |seconds: u64| {
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        fs::write(&path, "x").unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    };
    // its time of modification was set, its time of change was not
    for seconds in [1_700_000_000, 4_000_000_000] {
        set(seconds);
        let found = scan(root.path(), layout()).unwrap().found;
        assert!(found.iter().all(|found| !found.is_settled), "all of it was made just now");
    }
    let old = Scanner {
        root: root.path(),
        layout: layout(),
        scan: scan(root.path(), layout()).unwrap(),
        times: Vec::new(),
        newest: HashMap::from([(1, 1000), (2, 100)]),
        above: Vec::new(),
        links: 0,
        repository: None,
        repository_at: None,
    };
    let count = old.scan.found.len();
    let file = old.scan.found.iter().position(|found| found.kind == ScannedKind::File).unwrap();
    let settled = |device, time| {
        let mut times = vec![(9, 0); count];
        times[file] = (device, time);
        let scan = Scan { found: old.scan.found.clone(), tablespaces: Vec::new(), bytes: 0 };
        let scanner = Scanner { scan, times, newest: old.newest.clone(), above: Vec::new(), ..old };
        scanner.settled().found[file].is_settled
    };
    assert!(settled(1, 995));
    assert!(!settled(1, 996) && !settled(1, 1000) && !settled(1, 5000));
    // another file system has another clock
    assert!(!settled(2, 96) && settled(2, 95) && !settled(3, 1));
}
