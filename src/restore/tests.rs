//! A directory made equal to a backup, whatever was in it; and what must not be touched.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use super::*;
use crate::backup::copy::tests::{LABEL, content, copy_directory, copy_since, now_s};
use crate::backup::parent::Reuse;
use crate::format::chunk::Keys;
use crate::format::manifest::NamedDatabase;
use crate::format::{GRAIN, LEAF_BYTES, SLOT};
use crate::progress::Silent;
use crate::read::fetch::{FetchOptions, Fetcher};
use crate::read::view::ViewOptions;
use crate::repo::Repository;
use crate::store::{Effect, ErrorKind, Fault, MemoryStore, Record, Store};

const CONTROL: &[u8] = include_bytes!("../postgres/fixtures/pg_control_15");
const LARGE: &str = "base/5/20002";
const VERSION: &str = "PG_15_202209061";

mod small;

/// A cluster, its backup, and a place for copies.
struct Fixture {
    place: tempfile::TempDir,
    repository: Repository,
    label: String,
    recording: Arc<crate::store::Recording>,
    faults: Arc<crate::store::FaultPlan>,
}

impl Fixture {
    fn new(secret: &[u8]) -> Self {
        Self::with(secret, |_| {})
    }

    /// With more files in the source.
    fn with(secret: &[u8], more: impl FnOnce(&Path)) -> Self {
        let place = tempfile::tempdir().unwrap();
        let source = place.path().join("source");
        for directory in ["global", "base/1", "base/5", "pg_wal/archive_status", "pg_tblspc", "pg_notify"] {
            fs::create_dir_all(source.join(directory)).unwrap();
        }
        let space = place.path().join("space");
        fs::create_dir_all(space.join(VERSION).join("5")).unwrap();
        symlink(&space, source.join("pg_tblspc/16400")).unwrap();
        let file = |path: &str, bytes: Vec<u8>| fs::write(source.join(path), bytes).unwrap();
        file("global/pg_control", CONTROL.to_vec());
        file("PG_VERSION", b"15\n".to_vec());
        file("postgresql.conf", b"port = 1\n".to_vec());
        file("base/1/PG_VERSION", b"15\n".to_vec());
        file("base/1/20000", content(1, 3 * GRAIN));
        file("base/5/20000", content(2, 5 * SLOT + 100));
        file("base/1/20001", Vec::new());
        file("base/5/20001_init", content(7, GRAIN));
        file("base/5/PG_VERSION", b"15\n".to_vec());
        file("base/5/pg_filenode.map", content(8, 512));
        file(LARGE, content(3, LEAF_BYTES as usize + 2 * SLOT));
        file(&format!("pg_tblspc/16400/{VERSION}/5/20003"), content(4, 2 << 20));
        more(&source);
        let fault = Fault::new(MemoryStore::new());
        let faults = fault.plan();
        let record = Record::new(fault);
        let recording = record.recording();
        let repository = Repository { keys: Keys::new(secret), ..Repository::new(Arc::new(record), "main").unwrap() };
        copy_directory(&repository, &source).unwrap();
        // no cluster works here any more
        fs::rename(&source, place.path().join("was")).unwrap();
        Self { place, repository, label: LABEL.to_owned(), recording, faults }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn view(&self) -> View {
        let options = FetchOptions { memory_bytes: 64 << 20, disk: None };
        let fetcher = Arc::new(Fetcher::new(self.repository.clone(), options));
        View::load(fetcher, &self.label, &ViewOptions { changes: true, ..ViewOptions::copy() }).unwrap()
    }

    /// A copy called `name` has its tablespace beside it.
    fn options(&self, name: &str, delta: bool) -> RestoreOptions {
        RestoreOptions {
            process_max: 2,
            owner: None,
            tablespaces: BTreeMap::from([(16400, self.path(&format!("{name}-space")))]),
            delta,
            databases: Databases::default(),
            copy: true,
        }
    }

    fn restore(&self, name: &str, delta: bool) -> Result<Restored> {
        restore(&self.view(), &self.path(name), &self.options(name, delta), &Silent)
    }

    /// What is in a copy: mode, time and bytes of each file, by path; targets of links.
    fn contents(&self, name: &str) -> BTreeMap<PathBuf, (u32, i64, Vec<u8>)> {
        let mut found = BTreeMap::new();
        for (root, prefix) in [(self.path(name), ""), (self.path(&format!("{name}-space")), "space")] {
            let mut directories = vec![root.clone()];
            while let Some(directory) = directories.pop() {
                for entry in fs::read_dir(&directory).unwrap() {
                    let (path, entry) = entry.map(|entry| (entry.path(), entry)).unwrap();
                    let metadata = entry.metadata().unwrap();
                    let (mut mtime, mut bytes) = (0, Vec::new());
                    if metadata.is_dir() {
                        directories.push(path.clone());
                    } else if metadata.is_file() {
                        (mtime, bytes) = (metadata.mtime(), fs::read(&path).unwrap());
                    }
                    let key = Path::new(prefix).join(path.strip_prefix(&root).unwrap());
                    found.insert(key, (metadata.mode(), mtime, bytes));
                }
            }
        }
        found
    }

    #[track_caller]
    fn assert_equal(&self, name: &str, fresh: &str) {
        let (found, expected) = (self.contents(name), self.contents(fresh));
        let paths = |of: &BTreeMap<PathBuf, _>| of.keys().cloned().collect::<Vec<_>>();
        assert_eq!(paths(&found), paths(&expected));
        for (path, (mode, mtime, bytes)) in &expected {
            let (found_mode, found_mtime, found_bytes) = &found[path];
            assert!(found_bytes == bytes, "{} differs", path.display());
            assert_eq!((found_mode, found_mtime), (mode, mtime), "{}", path.display());
        }
    }
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn nothing_equal_is_fetched_and_nothing_equal_is_written() {
    for secret in [&b""[..], b"a secret"] {
        let fixture = Fixture::new(secret);
        let fresh = fixture.restore("fresh", true).unwrap();
        assert_eq!((fresh.equal, fresh.removed), (0, 0), "an absent directory is written whole");
        fixture.restore("copy", false).unwrap();
        let inode = |path| fs::metadata(fixture.path("copy").join(path)).unwrap().ino();
        let (version, large) = (inode("PG_VERSION"), inode(LARGE));
        fixture.recording.reset();
        let restored = fixture.restore("copy", true).unwrap();
        assert_eq!(restored.bytes - restored.equal, CONTROL.len() as u64 + 3, "pg_control and PG_VERSION");
        assert_eq!((restored.removed, restored.files, restored.bytes), (0, fresh.files, fresh.bytes));
        assert_ne!(inode("PG_VERSION"), version, "who trusts the times of files must see another cluster");
        assert_eq!(inode(LARGE), large);
        let fetched = fixture.recording.gets().bytes;
        // two threads may fetch the same hashes at the same time
        assert!(fetched < restored.bytes / 50, "{fetched} bytes fetched of {}", restored.bytes);
        fixture.assert_equal("copy", "fresh");
    }
}

#[test]
fn what_differs_is_written_and_what_does_not_belong_goes() {
    let fixture = Fixture::new(b"");
    fixture.restore("fresh", false).unwrap();
    fixture.restore("copy", false).unwrap();
    let (copy, space) = (fixture.path("copy"), fixture.path("copy-space"));
    let set_len = |path: &Path, len| OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
    // two grains of a large file, in two leaves
    flip(&copy.join(LARGE), 3 * SLOT as u64 + 5);
    flip(&copy.join(LARGE), LEAF_BYTES + 9);
    // too long, too short, missing, another's mode
    fs::write(copy.join("base/1/20001"), "grown").unwrap();
    set_len(&copy.join("base/5/20000"), SLOT as u64 + 10);
    fs::remove_file(copy.join("base/1/20000")).unwrap();
    fs::set_permissions(copy.join("base/1/PG_VERSION"), fs::Permissions::from_mode(0o644)).unwrap();
    set_len(&space.join(VERSION).join("5/20003"), 3 << 20);
    flip(&space.join(VERSION).join("5/20003"), 0);
    // another name of a file elsewhere
    fs::remove_file(copy.join("postgresql.conf")).unwrap();
    fs::write(fixture.path("theirs"), "port = 2\n").unwrap();
    fs::hard_link(fixture.path("theirs"), copy.join("postgresql.conf")).unwrap();
    // what does not belong: five files and links, rows of an unlogged relation among them; a directory in place of a file, and a file in place of a directory
    fs::write(copy.join("base/5/20001"), content(9, GRAIN)).unwrap();
    fs::create_dir(copy.join("base/7")).unwrap();
    fs::write(copy.join("base/7/1"), "x").unwrap();
    fs::write(copy.join("postmaster.pid"), format!("{}\n", i32::MAX)).unwrap();
    fs::write(space.join(VERSION).join("5/9"), "x").unwrap();
    symlink(fixture.path("theirs"), copy.join("base/link")).unwrap();
    fs::remove_file(copy.join("base/5/20001_init")).unwrap();
    fs::create_dir(copy.join("base/5/20001_init")).unwrap();
    fs::remove_dir(copy.join("pg_notify")).unwrap();
    fs::write(copy.join("pg_notify"), "x").unwrap();
    // another version's directory in the tablespace is not ours
    fs::create_dir(space.join("PG_14_202107181")).unwrap();
    let restored = fixture.restore("copy", true).unwrap();
    assert_eq!(restored.removed, 5);
    fs::remove_dir(space.join("PG_14_202107181")).unwrap();
    fixture.assert_equal("copy", "fresh");
    assert_eq!(fs::read(fixture.path("theirs")).unwrap(), b"port = 2\n");
    let rest = [CONTROL.len(), 3 * GRAIN, 2 * GRAIN, 4 * SLOT + 100 + GRAIN, GRAIN, 9, GRAIN];
    assert!(restored.bytes - restored.equal <= rest.iter().sum::<usize>() as u64, "{restored:?}");
}

#[test]
fn slots_of_two_backups_are_compared_too() {
    let mut fixture = Fixture::new(b"");
    let was = fixture.path("was");
    flip(&was.join(LARGE), 7 * SLOT as u64 + 3 * GRAIN as u64);
    flip(&was.join("base/5/20000"), 2 * GRAIN as u64);
    let reuse = Reuse { unread: false, chunks_max: 4, leave_thin: false };
    let label = "20240107-120000F_20240108-180000I";
    fixture.restore("copy", false).unwrap();
    copy_since(&fixture.repository, &was, label, Some((LABEL, reuse)), now_s()).unwrap();
    fs::remove_dir_all(&was).unwrap();
    fixture.label = label.to_owned();
    fixture.restore("fresh", false).unwrap();
    let restored = fixture.restore("copy", true).unwrap();
    // the label of the backup in postgresql.auto.conf is another
    let most = (2 * GRAIN + CONTROL.len()) as u64 + 200;
    let written = restored.bytes - restored.equal;
    assert!(written > 2 * GRAIN as u64 && written < most + 4096, "{written} bytes written");
    fixture.assert_equal("copy", "fresh");
}

#[test]
fn what_was_noted_may_be_lost_but_not_the_files() {
    let fixture = Fixture::new(b"");
    fixture.restore("fresh", false).unwrap();
    fixture.restore("copy", false).unwrap();
    flip(&fixture.path("copy").join(LARGE), 5);
    let view = fixture.view();
    for object in fixture.repository.store.list("chunk/", None).unwrap().objects {
        let bytes = fixture.repository.store.get(&object.key).unwrap();
        // the kind of a pack, behind magic and version
        if bytes[10] == crate::format::pack::PackKind::Change as u8 {
            fixture.repository.store.delete(std::slice::from_ref(&object.key)).unwrap();
        }
    }
    let restored = restore(&view, &fixture.path("copy"), &fixture.options("copy", true), &Silent).unwrap();
    assert!(restored.equal < restored.bytes / 10, "{restored:?}");
    fixture.assert_equal("copy", "fresh");
}

#[test]
fn a_restore_that_fails_leaves_nothing_startable_and_is_continued() {
    let fixture = Fixture::new(b"");
    fixture.restore("fresh", false).unwrap();
    for (name, delta) in [("plain", false), ("delta", true)] {
        if delta {
            fixture.restore(name, false).unwrap();
            (0..8).for_each(|slot| flip(&fixture.path(name).join(LARGE), slot * (4 << 20)));
        }
        let (mut failures, mut is_made) = (0, false);
        for call in 1..200 {
            let view = fixture.view();
            fixture.faults.from_nth(call, Effect::Fail(ErrorKind::Other));
            let made = restore(&view, &fixture.path(name), &fixture.options(name, delta || call > 1), &Silent);
            fixture.faults.clear();
            is_made = made.is_ok();
            if is_made {
                break;
            }
            failures += 1;
            assert!(!fixture.path(name).join("global/pg_control").exists(), "call {call} of {name}");
            let refused = fixture.restore(name, false).unwrap_err();
            assert!(refused.hint_text().unwrap().contains("--delta"), "{refused:?}");
        }
        assert!(is_made && failures > 2, "{failures} failures of {name}");
        fixture.assert_equal(name, "fresh");
    }
}

#[track_caller]
fn refused(fixture: &Fixture, name: &str, why: &str) {
    let before = fixture.contents(name);
    let error = fixture.restore(name, true).unwrap_err();
    assert!(error.to_string().contains(why), "{error:?}");
    assert!(error.hint_text().is_some(), "{error:?}");
    assert!(fixture.contents(name) == before, "something was changed");
}

#[test]
fn what_is_not_this_clusters_is_not_touched() {
    let fixture = Fixture::new(b"");
    fixture.restore("copy", false).unwrap();
    let (copy, space) = (fixture.path("copy"), fixture.path("copy-space"));
    let control = copy.join("global/pg_control");

    let pid = copy.join("postmaster.pid");
    for text in [std::process::id().to_string(), String::new(), "-5432".to_owned()] {
        fs::write(&pid, text).unwrap();
        refused(&fixture, "copy", "a server runs in");
    }
    fs::remove_file(&pid).unwrap();

    fs::write(&control, include_bytes!("../postgres/fixtures/pg_control_16")).unwrap();
    refused(&fixture, "copy", "another cluster's");
    fs::write(&control, vec![3; 512]).unwrap();
    refused(&fixture, "copy", "nobody knows whose it is");
    fs::remove_file(&control).unwrap();
    refused(&fixture, "copy", "not a data directory");
    fs::write(copy.join("pgcairn.restore"), r#"{"system-id": 1, "label": "x", "tablespaces": []}"#).unwrap();
    refused(&fixture, "copy", "another cluster's: pgcairn.restore");
    fs::remove_file(copy.join("pgcairn.restore")).unwrap();
    fs::write(&control, CONTROL).unwrap();

    let ready = copy.join("pg_wal/archive_status/000000010000000000000009.ready");
    fs::write(&ready, "").unwrap();
    fs::write(copy.join("pg_wal/000000010000000000000009"), "the last transactions").unwrap();
    refused(&fixture, "copy", "1 WAL files in");
    fs::remove_file(&ready).unwrap();

    // links where the backup has files and directories
    let (wal, elsewhere) = (copy.join("pg_wal"), fixture.path("wal"));
    fs::rename(&wal, &elsewhere).unwrap();
    symlink(&elsewhere, &wal).unwrap();
    refused(&fixture, "copy", "pg_wal is a symbolic link");
    fs::remove_file(&wal).unwrap();
    fs::rename(&elsewhere, &wal).unwrap();
    let conf = copy.join("postgresql.conf");
    fs::rename(&conf, fixture.path("conf")).unwrap();
    symlink(fixture.path("conf"), &conf).unwrap();
    refused(&fixture, "copy", "postgresql.conf is a symbolic link");
    fs::remove_file(&conf).unwrap();

    // a tablespace's directory that no link of this data directory leads to
    let link = copy.join("pg_tblspc/16400");
    fs::remove_file(&link).unwrap();
    refused(&fixture, "copy", "not the place of tablespace 16400");
    // one that the source works with
    fs::rename(fixture.path("was"), fixture.path("source")).unwrap();
    fs::remove_file(fixture.path("source/pg_tblspc/16400")).unwrap();
    symlink(&space, fixture.path("source/pg_tblspc/16400")).unwrap();
    symlink(&space, &link).unwrap();
    refused(&fixture, "copy", "is the place of tablespace 16400 of the cluster in");
    fs::remove_file(fixture.path("source/pg_tblspc/16400")).unwrap();
    fixture.restore("copy", true).unwrap();
}

#[test]
fn two_restores_do_not_meet() {
    let fixture = Fixture::new(b"");
    fixture.restore("copy", false).unwrap();
    let said = Said::of(&fixture.view().description, Vec::new());
    let marker = Marker::set(&fixture.path("copy"), &said).unwrap();
    refused(&fixture, "copy", "another restore writes to");
    marker.remove().unwrap();
    fixture.restore("copy", true).unwrap();
}

#[test]
fn a_database_that_is_left_out_is_zeros_until_it_is_wanted() {
    let fixture = Fixture::new(b"");
    fixture.restore("fresh", false).unwrap();
    let restore_with = |name: &str, include: &[&str], exclude: &[&str], named: bool| {
        let mut view = fixture.view();
        if named {
            let database = |(oid, name): (u32, &str)| NamedDatabase { oid, name: name.into() };
            view.description.databases = [(1, "template1"), (5, "shop")].map(database).into();
        }
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let databases = Databases { include: words(include), exclude: words(exclude) };
        restore(&view, &fixture.path(name), &RestoreOptions { databases, ..fixture.options(name, true) }, &Silent)
    };
    for (exclude, named) in [("shop", true), ("5", false), ("5", true)] {
        let restored = restore_with("copy", &[], &[exclude], named).unwrap();
        let name = named.then(|| "shop".to_owned());
        assert_eq!(restored.zeroed, [ZeroedDatabase { oid: 5, name }]);
        let (found, whole) = (fixture.contents("copy"), fixture.contents("fresh"));
        assert_eq!(found.keys().collect::<Vec<_>>(), whole.keys().collect::<Vec<_>>());
        for (path, (_, _, bytes)) in &found {
            let text = path.to_str().unwrap();
            let is_zeroed = text.contains("base/5/2") || text.contains("/5/20003") || text == "base/5/pg_filenode.map";
            assert_eq!(bytes.len(), whole[path].2.len(), "{text}");
            match is_zeroed {
                true => assert!(bytes.iter().all(|byte| *byte == 0), "{text} has bytes"),
                false => assert!(*bytes == whole[path].2, "{text} differs"),
            }
        }
        assert_eq!(fs::metadata(fixture.path("copy").join(LARGE)).unwrap().blocks(), 0);
    }
    // both have small oids, so that both are every cluster's own
    assert_eq!(restore_with("copy", &["shop"], &[], true).unwrap().zeroed, []);
    fixture.assert_equal("copy", "fresh");
    let error = restore_with("copy", &["shop"], &["5"], true).unwrap_err();
    assert!(error.to_string().contains("database shop (5) is included and excluded"), "{error:?}");
    let error = restore_with("copy", &["shop"], &[], false).unwrap_err();
    assert!(error.hint_text().unwrap().contains("give the oid, one of 1, 5"), "{error:?}");
    fixture.assert_equal("copy", "fresh");
}

/// pg_control lies in the manifest, and is what a restore writes last.
#[test]
fn a_view_reads_on_when_its_backup_is_removed() {
    let fixture = Fixture::new(b"");
    let view = fixture.view();
    let manifest = crate::repo::layout::manifest("main", LABEL);
    fixture.repository.store.delete(&[manifest]).unwrap();
    restore(&view, &fixture.path("copy"), &fixture.options("copy", false), &Silent).unwrap();
    let control = fs::read(fixture.path("copy").join("global/pg_control")).unwrap();
    assert_eq!(control, CONTROL);
}
