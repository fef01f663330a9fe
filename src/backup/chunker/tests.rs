#![allow(clippy::unwrap_used)]
use super::*;
use crate::backup::scan::ScannedKind;
use crate::format::chunk::Decoder;
use crate::repo::{Repository, layout};
use crate::store::MemoryStore;

fn scanned(path: &str, size: usize) -> Scanned {
    let kind = ScannedKind::File;
    Scanned {
        path: path.as_bytes().into(),
        mode: 0o600,
        mtime: 0,
        size: size as u64,
        kind,
        first_block: None,
        identity: None,
        is_settled: false,
    }
}

#[test]
fn a_piece_that_another_worker_stores_meanwhile_is_found_where_it_lies() {
    let root = tempfile::tempdir().unwrap();
    let (first, second) = (vec![b'a'; 3 * GRAIN], vec![b'b'; 2 * GRAIN]);
    std::fs::write(root.path().join("first"), &first).unwrap();
    std::fs::write(root.path().join("second"), &second).unwrap();
    let repository = Repository::new(Arc::new(MemoryStore::new()), "main").unwrap();
    let uploads = Uploads::start(&repository, 1);
    let cutting = Cutting {
        root: root.path().to_owned(),
        user: None,
        repository: None,
        keys: &repository.keys,
        level: 1,
        uploads: &uploads,
        dedup: Dedup::default(),
        lanes: Lanes::new(&repository.keys),
        pages: None,
        parent: None,
    };
    let (first_file, second_file) = (scanned("first", first.len()), scanned("second", second.len()));
    // one worker has read the second file, and not stored it yet
    let (mut slow, mut group) = (Worker::new(&cutting).unwrap(), Group::default());
    let source = Source::open(root.path(), None, &second_file, &Origin::Disk).unwrap().unwrap();
    let placing = slow.place_small(&source, &second_file, 0, None, &mut group).unwrap();
    // another stores it behind the first
    Worker::new(&cutting)
        .unwrap()
        .small(&[(&first_file, None, &Origin::Disk), (&second_file, None, &Origin::Disk)])
        .unwrap();
    slow.close_group(&mut group).unwrap();
    let mut placing = [Some(placing)];
    slow.store_small(group, &mut placing).unwrap();
    cutting.lanes.flush(&uploads).unwrap();
    let [extent] = placing[0].as_ref().unwrap().extents()[..] else { panic!("one extent") };
    drop(cutting);
    uploads.finish().unwrap();
    let (key, at) = (layout::pack("main", extent.chunk.pack), extent.chunk);
    let stored = repository.store.get_range(&key, at.offset.into(), at.stored_len.into()).unwrap();
    let plain = Decoder::new().unwrap().decode(&repository.keys, &key, &at, &stored).unwrap().plain;
    assert!(plain[extent.offset as usize..(extent.offset + extent.len) as usize] == second);
}
