//! What each format version wrote is read forever, byte for byte.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgcairn::format::{LEAF_BYTES, SLOT, VERSION};
use pgcairn::read::fetch::{FetchOptions, Fetcher};
use pgcairn::read::view::{Content, NodeIndex, View, ViewOptions, read_all};
use pgcairn::read::wal;
use pgcairn::repo::Repository;
use pgcairn::repo::catalog::stanzas;
use pgcairn::store::{DirectoryStore, Store};

#[path = "golden/files.rs"]
mod files;

fn golden(version: u16) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v{version}"))
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => _ = fs::copy(entry.path(), &target).unwrap(),
        }
    }
}

/// A copy of the golden repository, so that no test can change it.
fn repository() -> (tempfile::TempDir, Repository) {
    let place = tempfile::tempdir().unwrap();
    copy(&golden(1), place.path());
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::open(place.path(), false).unwrap());
    assert_eq!(stanzas(&store).unwrap(), [files::STANZA]);
    (place, Repository::new(store, files::STANZA).unwrap())
}

fn view(repository: &Repository, options: &ViewOptions) -> View {
    let fetcher = Fetcher::new(repository.clone(), FetchOptions { memory_bytes: 1 << 20, disk: None });
    View::load(Arc::new(fetcher), files::LABEL, options).unwrap()
}

fn find(view: &View, path: &[u8]) -> NodeIndex {
    let step = |node, name: &[u8]| view.child(node, name).unwrap_or_else(|| panic!("no {}", path.escape_ascii()));
    path.split(|byte| *byte == b'/').fold(0, step)
}

/// Where the view has what the manifest keeps at `path`.
fn in_view(path: &[u8]) -> Vec<u8> {
    match path.strip_prefix(b"pg_tblspc/") {
        Some(rest) => [b".pgcairn/tablespaces/", rest].concat(),
        None => path.to_vec(),
    }
}

#[test]
fn every_format_version_has_a_golden_repository() {
    for version in 1..=VERSION {
        assert!(golden(version).join("archive").is_dir(), "write tests/golden/v{version} with examples/golden.rs");
    }
}

#[test]
fn every_file_comes_back() {
    let (_place, repository) = repository();
    let view = view(&repository, &ViewOptions::default());
    for (path, content) in files::small() {
        assert_eq!(read_all(&view, find(&view, &in_view(path))).unwrap(), content, "{}", path.escape_ascii());
    }
    let mapped = find(&view, b"base/5/16384");
    assert_eq!(read_all(&view, mapped).unwrap(), files::mapped());
    for (from, len) in [(SLOT + 5, 3 * 8192), (0, 1), (9 * SLOT, 11), (SLOT - 1, 2)] {
        let mut part = vec![0; len];
        assert_eq!(view.read_at(mapped, from as u64, &mut part).unwrap(), len);
        assert_eq!(part, files::mapped()[from..from + len]);
    }
    assert_eq!(view.crc(mapped).unwrap(), Some(crc32c::crc32c(&files::mapped())));
}

#[test]
fn a_file_with_an_index_is_read_anywhere() {
    let (_place, repository) = repository();
    let view = view(&repository, &ViewOptions::default());
    let (huge, slot) = (find(&view, b"base/5/16500"), files::huge_slot());
    assert_eq!(view.size(huge).unwrap(), files::HUGE_BYTES);
    for at in [0, LEAF_BYTES - 50, 63 * LEAF_BYTES + 7, 64 * LEAF_BYTES - 1, files::HUGE_BYTES - 100] {
        let mut part = [0; 100];
        let len = view.read_at(huge, at, &mut part).unwrap();
        let expected = (0..len).map(|byte| slot[(at as usize + byte) % SLOT]);
        assert!(part[..len].iter().copied().eq(expected), "at {at}");
    }
}

#[test]
fn directories_links_and_wal_are_there() {
    let (_place, repository) = repository();
    let view = view(&repository, &ViewOptions::copy());
    let tablespace = &view.description.tablespaces[0];
    assert_eq!((tablespace.oid, tablespace.path.as_str()), (files::TABLESPACE, files::TABLESPACE_PATH));
    let link = &view.node(find(&view, b"pg_tblspc/16400")).unwrap().content;
    assert!(matches!(link, Content::Link(target) if **target == *b"../.pgcairn/tablespaces/16400"));
    let empty = view.node(find(&view, b"pg_wal/archive_status")).unwrap();
    assert!(matches!(empty.content, Content::Directory) && empty.mode == 0o700);
    let segment = find(&view, format!("pg_wal/{}", files::SEGMENT).as_bytes());
    assert_eq!(read_all(&view, segment).unwrap(), files::segment());
    let conf = read_all(&view, find(&view, b"postgresql.auto.conf")).unwrap();
    assert!(conf.starts_with(b"work_mem = '64MB'\n") && conf.ends_with(b"archive_mode = 'off'\n"));
    let label = read_all(&view, find(&view, b"backup_label")).unwrap();
    assert!(label.starts_with(b"START WAL LOCATION: 0/1200028"));
    let manifest: serde_json::Value =
        serde_json::from_slice(&read_all(&view, find(&view, b"backup_manifest")).unwrap()).unwrap();
    assert_eq!(manifest["Files"].as_array().unwrap().len(), files::small().len() + 3);
}

#[test]
fn the_catalog_is_read() {
    let (_place, repository) = repository();
    let archive = repository.archive_info().unwrap();
    assert_eq!(archive.current().unwrap().system_id, files::SYSTEM_ID);
    let backups = repository.backup_info().unwrap().backups;
    assert_eq!(backups.keys().collect::<Vec<_>>(), [files::LABEL]);
    assert_eq!(backups[files::LABEL].stop_lsn, "0/1200100");
    assert_eq!(repository.resolve("latest").unwrap(), files::LABEL);
    let segments = repository.archive(archive.current().unwrap()).segments(&[files::SEGMENT.parse().unwrap()]).unwrap();
    assert!(segments[0].is_some());
}

#[test]
fn the_catalog_is_made_again_from_the_manifests() {
    let (place, repository) = repository();
    let whole = repository.backup_info().unwrap();
    for name in ["backup.info", "backup.info.copy"] {
        fs::remove_file(place.path().join("backup").join(files::STANZA).join(name)).unwrap();
    }
    assert_eq!(repository.backup_info().unwrap(), whole);
}

#[test]
fn archived_files_are_delivered() {
    let (place, repository) = repository();
    let target = place.path().join("RECOVERYXLOG");
    for (name, content) in [(files::SEGMENT, files::segment()), (files::HISTORY, files::HISTORY_TEXT.to_vec())] {
        wal::get(&repository, name, &target).unwrap();
        assert_eq!(fs::read(&target).unwrap(), content, "{name}");
    }
    assert!(matches!(wal::get(&repository, "000000020000000000000013", &target), Err(wal::GetError::NotThere)));
}
