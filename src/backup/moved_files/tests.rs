#![allow(clippy::unwrap_used)]
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::*;
use crate::backup::copy::tests::{
    LABEL, assert_same, content, copy_directory, copy_since, data_directory, now_s, read_back,
};
use crate::backup::parent::Reuse;
use crate::postgres::files::DEFAULT_TABLESPACE;
use crate::repo::Repository;
use crate::store::MemoryStore;

const SECOND: &str = "20240107-120000F_20240108-120000I";

fn of(number: u32, size: u64, directory: Directory) -> Name {
    Name { number, segment: 0, size, directory }
}

#[test]
fn the_same_size_comes_first_then_the_nearest() {
    let (default, other) = (DEFAULT_TABLESPACE, 17_000);
    let mut names: Vec<Name> = [(1, 8), (4, 16), (5, 16), (7, 16), (8, 24)]
        .map(|(database, size)| of(1259, size, (database, default)))
        .into_iter()
        .chain([of(1258, 16, (9, default)), of(1260, 20, (9, default))])
        .collect();
    names.sort_unstable();
    let chosen = |size, database, home| {
        let chosen = choose(&names, of(1259, size, (database, other)), home);
        chosen.map(|name| (name.directory.0, name.size))
    };
    assert_eq!(chosen(16, 5, None), Some((5, 16)), "the database itself, moved");
    assert_eq!(chosen(16, 5, Some((7, default))), Some((5, 16)));
    assert_eq!(chosen(16, 99, Some((7, default))), Some((7, 16)), "where others came from");
    assert_eq!(chosen(16, 99, Some((8, default))), Some((4, 16)));
    assert_eq!(chosen(16, 99, None), Some((4, 16)));
    assert_eq!(chosen(20, 99, None), Some((7, 16)), "it grew");
    assert_eq!(chosen(4, 99, None), Some((1, 8)), "it shrank");
    assert_eq!(chosen(90, 99, None), Some((8, 24)));
    assert_eq!(choose(&names, of(1261, 16, (99, other)), None), None, "nothing is called so");
    assert_eq!(choose(&names, Name { segment: 4, ..of(1259, 16, (99, other)) }, None), None);
    assert_eq!(choose(&[], of(1259, 16, (99, other)), None), None);
}

fn incremental() -> Reuse {
    Reuse { unread: true, chunks_max: 4, leave_thin: false }
}

/// Sizes with and without a file map, of several leaves, and not of whole grains.
const SIZES: [usize; 5] = [8192, 100_000, 1 << 20, (3 << 20) + 8192, (33 << 20) + 100];

/// A data directory with one database, and a repository with a backup of it.
fn backed_up() -> (tempfile::TempDir, Repository) {
    let root = data_directory();
    for (number, size) in SIZES.into_iter().enumerate() {
        fs::write(root.path().join(format!("base/5/{}", 20_000 + number)), content(number as u64, size)).unwrap();
    }
    let repository = Repository::new(Arc::new(MemoryStore::new()), "main").unwrap();
    copy_directory(&repository, root.path()).unwrap();
    (root, repository)
}

/// The bytes that a backup after that stores; every byte of it is proved.
fn next(root: &Path, repository: &Repository, files: usize) -> u64 {
    let since = Some((LABEL, incremental()));
    let (bytes, _) = copy_since(repository, root, SECOND, since, now_s() + 100).unwrap();
    assert_same(root, &read_back(repository, SECOND), files + 1);
    bytes
}

#[test]
fn a_copied_or_moved_directory_is_not_stored_again() {
    let (root, repository) = backed_up();
    let directory = |path: &str| root.path().join(path);
    fs::create_dir(directory("base/90000")).unwrap();
    for number in 0..SIZES.len() {
        let name = 20_000 + number;
        fs::copy(directory(&format!("base/5/{name}")), directory(&format!("base/90000/{name}"))).unwrap();
    }
    let elsewhere = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), directory("pg_tblspc/70000")).unwrap();
    let space = directory("pg_tblspc/70000/PG_15_202209061");
    fs::create_dir(&space).unwrap();
    fs::create_dir(space.join("5")).unwrap();
    for number in 0..SIZES.len() {
        let name = (20_000 + number).to_string();
        fs::copy(directory("base/5").join(&name), space.join("5").join(&name)).unwrap();
        fs::remove_file(directory("base/5").join(&name)).unwrap();
    }
    let bytes = next(root.path(), &repository, 2 * SIZES.len());
    assert_eq!(bytes, 0, "nothing is new");
}

#[test]
fn of_a_twin_that_differs_only_what_differs_is_stored() {
    let (root, repository) = backed_up();
    fs::create_dir(root.path().join("base/90000")).unwrap();
    for (number, size) in SIZES.into_iter().enumerate() {
        let mut bytes = content(number as u64, size);
        bytes[size / 2] ^= 1;
        // and some have grown
        bytes.resize(size + number % 2 * 8192, 7);
        fs::write(root.path().join(format!("base/90000/{}", 20_000 + number)), bytes).unwrap();
    }
    let bytes = next(root.path(), &repository, 2 * SIZES.len());
    assert!(bytes > 0 && bytes < 100_000, "{bytes} bytes stored");
}

#[test]
fn a_twin_of_the_same_size_and_time_is_read_nevertheless() {
    let (root, repository) = backed_up();
    fs::create_dir(root.path().join("base/90000")).unwrap();
    let long_ago = SystemTime::now() - Duration::from_secs(86_400);
    let write = |path: &str, seed: u64| {
        for (number, size) in SIZES.into_iter().enumerate() {
            let path = root.path().join(format!("{path}/{}", 20_000 + number));
            fs::write(&path, content(seed + number as u64, size)).unwrap();
            fs::File::options().write(true).open(&path).unwrap().set_modified(long_ago).unwrap();
        }
    };
    write("base/5", 0);
    // the parent looked at files a day after they were changed: their time would be trusted
    copy_directory(&repository, root.path()).unwrap();
    write("base/90000", 1000);
    // every byte is compared in here
    let bytes = next(root.path(), &repository, 2 * SIZES.len());
    assert!(bytes > 10 << 20, "{bytes} bytes stored of noise that nobody has");
}
