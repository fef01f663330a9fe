//! What a mount asks of the store, and what waits for what.
#![allow(clippy::unwrap_used)]

use std::sync::mpsc;
use std::thread;

use super::*;
use crate::backup::copy::tests::{LABEL, content, copy_directory, copy_since, now_s};
use crate::backup::parent::Reuse;
use crate::read::fetch::{FetchOptions, Fetcher};
use crate::repo::Repository;
use crate::store::{Effect, Fault, FaultPlan, MemoryStore, Operation, Record, Recording};

const CONTROL: &[u8] = include_bytes!("../../postgres/fixtures/pg_control_15");
const SECOND: &str = "20240107-120000F_20240108-180000I";

struct Fixture {
    tree: StanzaTree,
    recording: Arc<Recording>,
    faults: Arc<FaultPlan>,
}

/// A stanza of two backups, as it is mounted.
fn fixture() -> Fixture {
    let place = tempfile::tempdir().unwrap();
    for directory in ["global", "base/5", "pg_wal"] {
        std::fs::create_dir_all(place.path().join(directory)).unwrap();
    }
    std::fs::write(place.path().join("global/pg_control"), CONTROL).unwrap();
    std::fs::write(place.path().join("PG_VERSION"), "15\n").unwrap();
    std::fs::write(place.path().join("base/5/20000"), content(1, 8192)).unwrap();
    let fault = Fault::new(MemoryStore::new());
    let faults = fault.plan();
    let record = Record::new(fault);
    let recording = record.recording();
    let repository = Repository::new(Arc::new(record), "main").unwrap();
    copy_directory(&repository, place.path()).unwrap();
    let reuse = Reuse { unread: false, chunks_max: 4, leave_thin: false };
    copy_since(&repository, place.path(), SECOND, Some((LABEL, reuse)), now_s()).unwrap();
    let fetcher = Arc::new(Fetcher::new(repository, FetchOptions { memory_bytes: 64 << 20, disk: None }));
    let moments = Moments { restore_command: String::new(), cache: None, found: Mutex::default() };
    let owner = |_: Option<&str>, _: &str| Ok(Owner { uid: 0, gid: 0 });
    let tree = StanzaTree::new(fetcher, None, owner, Arc::new(Prefetcher::start(1, Duration::from_secs(180))), moments)
        .unwrap();
    Fixture { tree, recording, faults }
}

impl Fixture {
    fn backup(&self, label: &str) -> NodeId {
        self.tree.lookup(BACKUPS, OsStr::new(label)).unwrap().unwrap()
    }
}

#[test]
fn a_name_that_is_no_moment_costs_nothing() {
    let Fixture { tree, recording, .. } = fixture();
    recording.reset();
    for name in [".git", ".", ".hidden"] {
        assert_eq!(tree.lookup(PITR, OsStr::new(name)).unwrap(), None, "{name}");
    }
    assert_eq!(recording.total().calls, 0);
}

#[test]
fn a_backup_that_loads_slowly_keeps_nobody_from_the_others() {
    let fixture = fixture();
    let (first, second) = (fixture.backup(LABEL), fixture.backup(SECOND));
    fixture.tree.attributes(first).unwrap();
    let is_second = |call: &crate::store::Call| call.operation == Operation::Get && call.key.contains(SECOND);
    fixture.faults.add(is_second, Effect::Delay(Duration::from_secs(3)));
    fixture.recording.reset();
    let (done, ended) = mpsc::channel();
    thread::scope(|scope| {
        for (number, node) in [(2, second), (2, second)] {
            let (done, tree) = (done.clone(), &fixture.tree);
            scope.spawn(move || {
                tree.attributes(node).unwrap();
                done.send(number).unwrap();
            });
        }
        while fixture.recording.count(Operation::Get).calls == 0 {
            thread::yield_now();
        }
        fixture.tree.attributes(first).unwrap();
        done.send(1).unwrap();
    });
    assert_eq!(ended.try_iter().collect::<Vec<_>>(), [1, 2, 2]);
    assert_eq!(fixture.recording.count(Operation::Get).calls, 1, "it is loaded once");
}
