#![allow(clippy::unwrap_used)]
use super::*;
use crate::format::chunk::{ChunkId, PackId};

fn chunk(number: u32, plain_len: u32) -> ChunkRef {
    let id = ChunkId([number as u8; 32]);
    ChunkRef { pack: PackId([1; 16]), offset: 32 + number, stored_len: 20, plain_len, id }
}

fn file(path: &str, size: u64, place: Place) -> Entry {
    let identity = size.is_multiple_of(2).then_some(size + 3);
    Entry { path: path.into(), mode: 0o600, mtime: -5, identity, node: Node::File(File { size, crc: 77, place }) }
}

fn sample() -> Vec<Entry> {
    let directory =
        |path: &str| Entry { path: path.into(), mode: 0o700, mtime: 1, identity: None, node: Node::Directory };
    let leaf = LeafRef { map: chunk(5, 9), changes: chunk(6, 9) };
    let mut entries = vec![directory(""), directory("base"), directory("base/1")];
    for number in 0..6000u32 {
        let extents = vec![Extent { len: 100, chunk: chunk(number / 100, 20_000), offset: number % 100 * 100 }];
        let place = Place::Inline { extents, changes: Some((chunk(900, 40_000), number * 12)) };
        entries.push(file(&format!("base/1/{number:05}"), 100, place));
    }
    entries.push(file("base/1-empty", 0, Place::Inline { extents: vec![], changes: None }));
    entries.push(file("base/big", 2 * LEAF_BYTES + 1, Place::Leaves(vec![leaf; 3])));
    entries.push(file("base/huge", 3 * INDEX_BYTES, Place::Index(vec![chunk(7, 8); 3])));
    let link = Node::Symlink(b"/elsewhere".to_vec());
    entries.push(Entry { path: b"pg_tblspc/1".to_vec(), mode: 0o777, mtime: 0, identity: None, node: link });
    entries
}

fn blocks(entries: &[Entry]) -> Vec<Vec<u8>> {
    let mut writer = BlockWriter::default();
    let mut blocks: Vec<_> = entries.iter().filter_map(|entry| writer.push(entry)).collect();
    blocks.extend(writer.finish());
    blocks
}

fn read(blocks: &[Vec<u8>]) -> Result<Vec<Entry>> {
    let (mut reader, mut entries) = (ManifestReader::new("manifest"), Vec::new());
    blocks.iter().try_for_each(|block| reader.chunk(block, |entry| entries.push(entry)))?;
    Ok(entries)
}

#[test]
fn entries_come_back_over_several_blocks() {
    let blocks = blocks(&sample());
    assert!(blocks.len() > 1);
    assert_eq!(read(&blocks).unwrap(), sample());
}

#[test]
fn a_pack_table_comes_back_over_several_chunks() {
    let pack = |number: u32| {
        let mut id = PackId::default();
        id.0[..4].copy_from_slice(&number.to_be_bytes());
        PackUse { pack: id, size: 1 << 24, weight: u64::from(number) * 1000 }
    };
    let packs: Vec<_> = (0..40_000).map(pack).collect();
    let parts = encode_packs(&packs);
    assert!(parts.len() > 1 && parts.iter().all(|part| part.len() <= CHUNK));
    let read: Vec<_> = parts.iter().flat_map(|part| decode_packs("manifest", part).unwrap().unwrap()).collect();
    assert_eq!(read, packs);
    assert_eq!(decode_packs("manifest", &blocks(&sample())[0]).unwrap(), None);
    assert!(decode_packs("manifest", &parts[0][..100]).is_err());
}

#[test]
fn paths_that_lead_out_are_refused() {
    for path in ["../x", "/etc/passwd", "base/../../x", "base//x", "base/.", "a\0b"] {
        let place = Place::Inline { extents: vec![], changes: None };
        let error = read(&blocks(&[file(path, 0, place)])).unwrap_err();
        assert!(error.what.contains("leads out of the backup"), "{path}: {error}");
    }
}

#[test]
fn links_other_than_those_to_tablespaces_are_refused() {
    let link = |path: &str| {
        let node = Node::Symlink(b"/etc".to_vec());
        Entry { path: path.into(), mode: 0o777, mtime: 0, identity: None, node }
    };
    let paths = ["base", "pg_wal", "postgresql.conf", "pg_tblspc/0", "pg_tblspc/01", "pg_tblspc/+1", "pg_tblspc/1/x"];
    for path in paths.into_iter().chain(["pg_tblspc/4294967296", "pg_tblspc/x", "xpg_tblspc/1"]) {
        let error = read(&blocks(&[link(path)])).unwrap_err();
        assert!(error.what.contains("is a link"), "{path}: {error}");
    }
    read(&blocks(&[link("pg_tblspc/16384")])).unwrap();
}

#[test]
fn entries_out_of_order_or_twice_are_refused() {
    let mut entries = sample();
    entries.swap(3, 4);
    assert!(read(&blocks(&entries)).unwrap_err().what.contains("out of order"));
    let twice = [sample()[1].clone(), sample()[1].clone()];
    assert!(read(&blocks(&twice)).is_err());
}

#[test]
fn a_directory_is_followed_by_all_it_contains() {
    let mut paths = vec!["b", "a/b", "a", "a-b", "a/b/c", "", "a.b"];
    paths.sort_by(|a, b| path_cmp(a.as_bytes(), b.as_bytes()));
    assert_eq!(paths, ["", "a", "a/b", "a/b/c", "a-b", "a.b", "b"]);
}

#[test]
fn hostile_blocks_are_an_error_not_a_panic() {
    let block = &blocks(&sample())[0];
    for at in (0..block.len()).step_by(131) {
        let mut bytes = block.clone();
        bytes[at] ^= 0xff;
        let _ = read(&[bytes]);
        let _ = read(&[block[..at].to_vec()]);
    }
}
