//! A data directory that changes, a store whose clock the story sets, and who reads.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;

use super::super::{Clocked, START, database, segment, wal_bytes};
use super::Random;
use super::model::{Files, Model};
use crate::archive::push::push;
use crate::backup::copy::tests::data_directory;
use crate::backup::copy::tests::model::{NAMES, Op, World as Data};
use crate::backup::run::tests::{Directory, backup_directory};
use crate::format::info::LockInfo;
use crate::postgres::{BackupKind, SegmentName};
use crate::read::view::View;
use crate::repo::Repository;
use crate::store::{Body, Effect, ErrorKind, Fault, FaultPlan, MemoryStore, Page, Result, Store};

/// Longer than a lock counts that nobody renews.
const STALE_S: i64 = 12 * 60;

/// A view that was opened some time ago.
pub(super) struct Mount {
    pub(super) label: String,
    pub(super) view: Arc<View>,
    pub(super) files: Arc<Files>,
    /// when its backup was removed
    pub(super) gone: Option<i64>,
    /// packs may have been deleted a grace period after that: it may fail, but not lie
    pub(super) doubtful: bool,
}

/// A backup that was removed within the grace period.
pub(super) struct Leaving {
    pub(super) label: String,
    pub(super) gone: i64,
    pub(super) packs: BTreeSet<String>,
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) repository: Repository,
    pub(super) plan: Arc<FaultPlan>,
    pub(super) data: Data,
    pub(super) wal: Arc<Wal>,
    pub(super) model: Model,
    pub(super) mounts: Vec<Mount>,
    pub(super) leaving: Vec<Leaving>,
    /// until then a lock of a dead process on another machine may be obeyed
    pub(super) foreign_until: i64,
    /// store calls of the last backup and of the last expire
    pub(super) calls: (u64, u64),
    seed: u64,
    story: Vec<String>,
    now: Arc<AtomicI64>,
}

/// How a process, or its store, dies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Death {
    /// the call does not arrive, nor does any after it
    Before,
    /// the call arrives, its answer does not, nor does any call after it
    After,
    /// only this call does not arrive
    Fails,
    /// only this call's answer does not arrive
    Unanswered,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let now = Arc::new(AtomicI64::new(START));
        let clocked = Clocked { inner: MemoryStore::new(), now: now.clone(), modified: Mutex::default() };
        let fault = Fault::new(clocked);
        let plan = fault.plan();
        let repository = Repository::new(Arc::new(OneByOne(fault)), "main").unwrap();
        repository.create_stanza(database()).unwrap();
        let mut world = Self {
            random: Random(seed),
            repository,
            plan,
            data: Data { root: data_directory(), clock: START },
            wal: Arc::new(Wal { directory: tempfile::tempdir().unwrap(), next: Mutex::new(1) }),
            model: Model::default(),
            mounts: Vec::new(),
            leaving: Vec::new(),
            foreign_until: 0,
            calls: (40, 40),
            seed,
            story: Vec::new(),
            now,
        };
        world.data.apply(&Op::Replace(0, 3 << 20, 1));
        world.data.apply(&Op::Replace(1, 100_000, 2));
        world
    }

    pub(super) fn say(&mut self, what: String) {
        let now = self.now() - START;
        self.story.push(format!("{now:>8} s  {what}"));
    }

    pub(super) fn now(&self) -> i64 {
        self.now.load(Ordering::SeqCst)
    }

    pub(super) fn pass(&self, seconds: i64) {
        self.now.fetch_add(seconds, Ordering::SeqCst);
    }

    /// What the server writes. Several changes may fall into one second.
    pub(super) fn change(&mut self) {
        for _ in 0..=self.random.below(4) {
            let (file, byte) = (self.random.below(NAMES as u64) as usize, self.random.next() as u8);
            let limit = self.random.pick(&[20_000, 20_000, 300_000, 2_500_000]);
            let size = self.random.below(limit) as usize;
            let op = match self.random.below(10) {
                0..5 => Op::WriteGrain(file, self.random.below(400) as usize, byte),
                5 => Op::Resize(file, size),
                6 => Op::Refill(file, byte),
                7 | 8 => Op::Replace(file, size, byte),
                _ => Op::Remove(file),
            };
            self.say(format!("{op:?}"));
            // its clock goes on by a second
            self.data.clock = self.now() - 1;
            self.data.apply(&op);
            if self.random.once_in(2) {
                self.pass(1);
            }
        }
        // it changes with every checkpoint
        let control = vec![self.random.next() as u8; 8192];
        std::fs::write(self.data.root.path().join("global/pg_control"), control).unwrap();
    }

    /// What a backup would hold now.
    pub(super) fn files(&self) -> Files {
        let mut files = self.data.files();
        let control = std::fs::read(self.data.root.path().join("global/pg_control")).unwrap();
        files.insert(b"global/pg_control".to_vec(), control);
        files
    }

    /// A backup of what there is now, to be taken now or in the middle of something else.
    pub(super) fn backup_to_be(
        &self,
        kind: BackupKind,
    ) -> impl Fn() -> crate::error::Result<String> + Send + Sync + 'static {
        let (repository, wal, now) = (self.repository.clone(), self.wal.clone(), self.now());
        let root: PathBuf = self.data.root.path().into();
        move || {
            let mut archive = || wal.archive(&repository);
            let mut directory = Directory { root: &root, kind, now, archive: &mut archive };
            backup_directory(&repository, &mut directory).map(|description| description.label)
        }
    }

    /// From its `number`th call on, what works next dies.
    pub(super) fn doom(&self, number: u64, death: Death) {
        let kind = ErrorKind::Other;
        match death {
            Death::Before => self.plan.from_nth(number, Effect::Fail(kind)),
            Death::After => {
                self.plan.nth(number, Effect::FailAfter(kind));
                self.plan.from_nth(number + 1, Effect::Fail(kind));
            }
            Death::Fails => self.plan.nth(number, Effect::Fail(kind)),
            Death::Unanswered => self.plan.nth(number, Effect::FailAfter(kind)),
        }
    }

    /// The locks that the dead left are those of another machine: nobody sees that their holders are gone.
    pub(super) fn abroad(&mut self) {
        for key in self.keys("lock/") {
            let bytes = self.repository.store.get(&key).unwrap();
            let mut info: LockInfo = self.repository.decode_info(&key, &bytes).unwrap();
            (info.process, info.host) = (None, "elsewhere".into());
            let bytes = self.repository.encode_info(&key, &info).unwrap();
            self.repository.store.put(&key, Body::Bytes(bytes)).unwrap();
            self.foreign_until = self.now() + STALE_S;
            self.say(format!("a lock of {:?} is left, of another machine", info.kind));
        }
        self.pass(1);
    }

    pub(super) fn keys(&self, prefix: &str) -> Vec<String> {
        let mut keys = Vec::new();
        let each = |object: &crate::store::Listed| {
            keys.push(object.key.clone());
            Ok(())
        };
        crate::retention::mark::each_object(&self.repository, prefix, each).unwrap();
        keys
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the story of seed {}:\n{}", self.seed, self.story.join("\n"));
        }
    }
}

/// The server's WAL.
pub(super) struct Wal {
    directory: tempfile::TempDir,
    next: Mutex<u64>,
}

impl Wal {
    /// Archives the next segment; one that fails is the next one again, as with a server.
    pub(super) fn archive(&self, repository: &Repository) -> crate::error::Result<SegmentName> {
        let mut next = self.next.lock();
        let name = segment(1, *next);
        let path = self.directory.path().join(name.to_string());
        std::fs::write(&path, wal_bytes(name)).unwrap();
        push(repository, &path, 1)?;
        *next += 1;
        Ok(name)
    }

    /// The number of the segment that is written now.
    pub(super) fn next(&self) -> u64 {
        *self.next.lock()
    }
}

/// Deletes one object after the other, as a directory does: a process can die in between.
#[derive(Debug)]
struct OneByOne<S>(S);

impl<S: Store> Store for OneByOne<S> {
    fn get(&self, key: &str) -> Result<Bytes> {
        self.0.get(key)
    }
    fn get_range(&self, key: &str, offset: u64, len: u64) -> Result<Bytes> {
        self.0.get_range(key, offset, len)
    }
    fn put(&self, key: &str, body: Body) -> Result<()> {
        self.0.put(key, body)
    }
    fn size(&self, key: &str) -> Result<Option<u64>> {
        self.0.size(key)
    }
    fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        self.0.list(prefix, after)
    }
    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        self.0.names(prefix)
    }
    fn delete(&self, keys: &[String]) -> Result<()> {
        keys.chunks(1).try_for_each(|key| self.0.delete(key))
    }
    fn url(&self) -> &str {
        self.0.url()
    }
}
