//! The repository through the library: in memory, whole views, altered manifests.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use pgcairn::error::Result;
use pgcairn::format::chunk::Encoder;
use pgcairn::format::manifest::{BlockWriter, Description, Entry, encode_description};
use pgcairn::format::pack::{Pack, PackKind, PackWriter};
use pgcairn::read::fetch::{FetchOptions, Fetcher};
use pgcairn::read::view::{Content, View, ViewOptions};
use pgcairn::repo::{Repository, layout};
use pgcairn::store::{Body, MemoryStore, Store};
use pgcairn_integration::{files, stanza};

/// The objects of a repository.
pub(crate) type Objects = BTreeMap<String, Bytes>;
/// What is in a view: each file's bytes, links and directories as text.
pub(crate) type Shown = BTreeMap<Vec<u8>, Bytes>;

/// All objects of a directory repository.
pub(crate) fn objects(repo: &Path) -> Objects {
    let contents = files::contents(repo).into_iter().filter(|(path, _)| !path.starts_with(".tmp"));
    contents.map(|(path, bytes)| (path.display().to_string(), bytes.into())).collect()
}

/// A store in memory that holds these objects.
pub(crate) fn memory(objects: &Objects) -> MemoryStore {
    let store = MemoryStore::new();
    for (key, bytes) in objects {
        store.put(key, Body::Bytes(bytes.clone())).unwrap();
    }
    store
}

/// The harness's stanza in this store.
pub(crate) fn repository(store: impl Store + 'static) -> Repository {
    Repository::new(Arc::new(store), stanza::NAME).unwrap()
}

/// Opens a backup without a disk cache.
pub(crate) fn view(repository: &Repository, label: &str) -> Result<View> {
    let fetcher = Fetcher::new(repository.clone(), FetchOptions { memory_bytes: 32 << 20, disk: None });
    View::load(Arc::new(fetcher), label, &ViewOptions::copy())
}

/// Reads everything in a view. A file that cannot be read is there with its error.
pub(crate) fn read_view(view: &View) -> BTreeMap<Vec<u8>, Result<Bytes>> {
    let mut shown = BTreeMap::new();
    let walked: std::result::Result<(), ()> = view.walk(&mut |path, number| {
        let content = &view.node(number).unwrap().content;
        let bytes = match content {
            Content::Directory => Ok(Bytes::from_static(b"directory")),
            Content::Link(target) => Ok(Bytes::copy_from_slice(target)),
            Content::Status => Ok(Bytes::new()),
            _ => read_file(view, number),
        };
        shown.insert(path.to_vec(), bytes);
        Ok(())
    });
    walked.unwrap();
    shown
}

/// In pieces, as a mount is read, so that one bad piece is met on its own.
fn read_file(view: &View, number: u32) -> Result<Bytes> {
    let mut bytes = vec![0; view.size(number)? as usize];
    for (piece, at) in bytes.chunks_mut(128 * 1024).zip((0..).step_by(128 * 1024)) {
        let read = view.read_at(number, at, piece)?;
        assert_eq!(read, piece.len(), "a short read inside a file");
    }
    Ok(bytes.into())
}

/// Reads everything, which must be readable.
pub(crate) fn read_whole(view: &View) -> Shown {
    let whole = |(path, bytes): (Vec<u8>, Result<Bytes>)| {
        let bytes = bytes.unwrap_or_else(|error| panic!("cannot read {}: {error:?}", path.escape_ascii()));
        (path, bytes)
    };
    read_view(view).into_iter().map(whole).collect()
}

/// A whole backup: its catalog entry, its view, every byte; `pg_control` among them.
pub(crate) fn assert_whole(repository: &Repository, label: &str) -> Shown {
    let info = repository.backup_info().unwrap();
    assert!(info.backups.contains_key(label), "{label} is not in the catalog");
    let shown = read_whole(&view(repository, label).unwrap());
    for path in ["PG_VERSION", "global/pg_control", "backup_label", "backup_manifest"] {
        assert!(shown.get(path.as_bytes()).is_some_and(|bytes| !bytes.is_empty()), "{label} has no {path}");
    }
    shown
}

/// The manifest of a backup, changed by `change` and sound in every checksum.
pub(crate) fn changed_manifest(
    repository: &Repository,
    label: &str,
    change: impl FnOnce(&mut Description, &mut Vec<Entry>),
) -> Vec<u8> {
    let mut entries = Vec::new();
    let mut description = repository.manifest(label, |entry| entries.push(entry)).unwrap();
    change(&mut description, &mut entries);
    let mut plains = encode_description(&description).unwrap();
    let mut writer = BlockWriter::default();
    plains.extend(entries.iter().filter_map(|entry| writer.push(entry)));
    plains.extend(writer.finish());
    // what the manifest holds itself stays where entries look for it
    let key = layout::manifest(&repository.stanza, label);
    let stored = repository.store.get(&key).unwrap();
    let old = Pack::parse(&key, &stored).unwrap();
    let own = old.chunks[0];
    let keys = &repository.keys;
    let mut pack = PackWriter::new(PackKind::Manifest, keys.seal_kind(), old.header.id, 0);
    pack.add(own.id, own.plain_len as usize, &stored[own.offset as usize..own.end() as usize]);
    let mut encoder = Encoder::new(3).unwrap();
    for plain in plains {
        let (id, mut stored) = (keys.digest(&plain).id, Vec::new());
        encoder.encode(keys, &id, &plain, &mut stored).unwrap();
        pack.add(id, plain.len(), &stored);
    }
    pack.finish()
}
