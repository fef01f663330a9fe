#![allow(clippy::unwrap_used)]
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;

use super::*;
use crate::store::{Effect, ErrorKind, Fault, MemoryStore, Page, Result as StoreResult, Store};

/// A store that says of every object but one that it is older than it is.
#[derive(Debug)]
struct Aged {
    inner: MemoryStore,
    seconds: i64,
    young: Mutex<String>,
}

impl Store for Aged {
    fn get(&self, key: &str) -> StoreResult<Bytes> {
        self.inner.get(key)
    }
    fn get_range(&self, key: &str, offset: u64, len: u64) -> StoreResult<Bytes> {
        self.inner.get_range(key, offset, len)
    }
    fn put(&self, key: &str, body: Body) -> StoreResult<()> {
        key.clone_into(&mut self.young.lock());
        self.inner.put(key, body)
    }
    fn size(&self, key: &str) -> StoreResult<Option<u64>> {
        self.inner.size(key)
    }
    fn list(&self, prefix: &str, after: Option<&str>) -> StoreResult<Page> {
        let mut page = self.inner.list(prefix, after)?;
        let young = self.young.lock();
        page.objects
            .iter_mut()
            .filter(|object| object.key != *young)
            .for_each(|object| object.modified -= self.seconds);
        Ok(page)
    }
    fn names(&self, prefix: &str) -> StoreResult<Vec<String>> {
        self.inner.names(prefix)
    }
    fn delete(&self, keys: &[String]) -> StoreResult<()> {
        self.inner.delete(keys)
    }
    fn url(&self) -> &str {
        self.inner.url()
    }
}

fn repository(store: impl Store + 'static) -> Repository {
    Repository::new(Arc::new(store), "main").unwrap()
}

fn quick() -> Timing {
    Timing {
        heartbeat: Duration::from_millis(5),
        lost: Duration::from_millis(150),
        patience: Duration::from_millis(300),
        ..Timing::default()
    }
}

fn write(repository: &Repository, name: &str, info: &LockInfo) {
    let key = format!("lock/main/{name}");
    repository.store.put(&key, Body::Bytes(repository.encode_info(&key, info).unwrap())).unwrap();
}

/// What the lock's object says.
fn read(lock: &Lock) -> LockInfo {
    let Held { repository, key, .. } = &*lock.held;
    repository.decode_info(key, &repository.store.get(key).unwrap()).unwrap()
}

/// A lock of another host.
fn foreign(kind: LockKind) -> LockInfo {
    LockInfo {
        kind,
        since: Some(1_700_000_000),
        heartbeat: 1_700_000_100,
        host: "db7".into(),
        pid: 4711,
        user: "postgres".into(),
        process: Some("another-boot pid:[1] 77".into()),
        note: "20240107-120000F".into(),
        failed: false,
        pgcairn: "0.1.0".into(),
    }
}

#[test]
fn who_has_it_is_in_the_error() {
    let repository = repository(MemoryStore::new());
    write(&repository, "a", &foreign(LockKind::Backup));
    let error = repository.lock(LockKind::Backup, "").unwrap_err();
    let text = error.to_string();
    for part in ["stanza main is locked", "a backup (20240107-120000F)", "postgres@db7", "4711", "2023-11-14T22:13:20Z"]
    {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    assert!(error.hint_text().unwrap().contains("12 minutes"));
    // the wish left nothing
    assert_eq!(repository.store.list("lock/", None).unwrap().objects.len(), 1);
}

#[test]
fn a_lock_excludes_its_rivals_until_it_is_dropped() {
    use LockKind::{Backup, Expire, Stanza, Sweep};
    let repository = repository(MemoryStore::new());
    let free = |kind| matches!(repository.try_lock(kind, "", quick()).unwrap(), Attempt::Held(_));
    for (held, excluded) in [
        (Backup, vec![Backup, Sweep, Stanza]),
        (Expire, vec![Expire, Stanza]),
        (Sweep, vec![Backup, Sweep, Stanza]),
        (Stanza, vec![Backup, Expire, Sweep, Stanza]),
    ] {
        let lock = repository.lock_with(held, "", quick()).unwrap();
        for kind in [Backup, Expire, Sweep, Stanza] {
            assert_eq!(free(kind), !excluded.contains(&kind), "{kind} while {held}");
        }
        drop(lock);
        assert!(free(held));
    }
    assert!(repository.store.list("lock/", None).unwrap().objects.is_empty());
}

#[test]
fn one_that_was_not_renewed_for_long_is_told_of_and_not_obeyed() {
    for (seconds, obeyed) in [(60, true), (719, true), (730, false)] {
        let repository = repository(Aged { inner: MemoryStore::new(), seconds, young: Mutex::default() });
        write(&repository, "a", &foreign(LockKind::Backup));
        match repository.try_lock(LockKind::Backup, "", Timing::default()).unwrap() {
            Attempt::Busy(_) => assert!(obeyed, "{seconds}"),
            Attempt::Held(lock) => {
                assert!(!obeyed, "{seconds}");
                let dead = lock.dead_backups().unwrap();
                assert_eq!(dead.len(), 1);
                assert_eq!(dead[0].since(), Some(1_700_000_000));
                lock.remove(&dead).unwrap();
                assert!(lock.dead_backups().unwrap().is_empty());
            }
        }
    }
}

#[test]
fn one_that_cannot_be_read_is_obeyed_until_it_is_old() {
    for (seconds, obeyed) in [(60, true), (730, false)] {
        let repository = repository(Aged { inner: MemoryStore::new(), seconds, young: Mutex::default() });
        repository.store.put("lock/main/a", Body::Bytes(Bytes::from_static(b"rubbish"))).unwrap();
        let attempt = repository.try_lock(LockKind::Expire, "", Timing::default()).unwrap();
        assert_eq!(matches!(attempt, Attempt::Busy(_)), obeyed, "{seconds}");
    }
}

#[test]
fn a_process_of_this_host_that_is_gone_is_dead_at_once() {
    let repository = repository(MemoryStore::new());
    let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
    let mut info = foreign(LockKind::Backup);
    (info.pid, info.process) = (child.id(), process::identity(child.id()));
    assert!(info.process.is_some());
    write(&repository, "a", &info);
    let free = || matches!(repository.try_lock(LockKind::Backup, "", quick()).unwrap(), Attempt::Held(_));
    assert!(!free());
    child.kill().unwrap();
    let killed = Instant::now();
    while !free() {
        assert!(killed.elapsed() < Duration::from_secs(10), "a killed child is a zombie, which is as good as gone");
        std::thread::yield_now();
    }
    child.wait().unwrap();
    assert!(free());
    // the same number, another process
    info.pid = std::process::id();
    info.process = process::identity(info.pid).map(|process| format!("{process}0"));
    write(&repository, "a", &info);
    assert!(free());
}

#[test]
fn the_holder_writes_again_and_again_and_knows_when_it_cannot() {
    let store = Fault::new(MemoryStore::new());
    let plan = store.plan();
    let repository = repository(store);
    let lock = repository.lock_with(LockKind::Backup, "", quick()).unwrap();
    assert!(lock.since() > 0);
    lock.set_note("20240107-120000F");
    let started = Instant::now();
    while read(&lock).note.is_empty() {
        assert!(started.elapsed() < Duration::from_secs(10), "no heartbeat");
    }
    lock.check().unwrap();
    plan.add(|call| call.operation.writes(), Effect::Fail(ErrorKind::Transient));
    let error = loop {
        assert!(started.elapsed() < Duration::from_secs(20), "a dead store went unseen");
        if let Err(error) = lock.check() {
            break error;
        }
    };
    assert!(error.to_string().contains("could not be renewed"), "{error}");
    plan.clear();
    lock.held.renew().unwrap();
    assert!(lock.check().is_err(), "others may have been at work meanwhile");
    // one that could not be taken away counts no more
    plan.add(|call| call.operation.writes(), Effect::Fail(ErrorKind::Transient));
    drop(lock);
    plan.clear();
    assert_eq!(repository.store.list("lock/", None).unwrap().objects.len(), 1);
    let next = repository.lock_with(LockKind::Backup, "", quick()).unwrap();
    assert_eq!(next.dead_backups().unwrap().len(), 1);
}

#[test]
fn a_backup_waits_for_a_sweep_and_a_sweep_does_not_wait() {
    let repository = repository(MemoryStore::new());
    let sweep = repository.lock_with(LockKind::Sweep, "", quick()).unwrap();
    assert!(repository.lock_with(LockKind::Backup, "", quick()).is_err(), "patience ends");
    let patient = Timing { patience: Duration::from_secs(60), ..quick() };
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| repository.lock_with(LockKind::Backup, "", patient).unwrap());
        drop(sweep);
        let _backup = waiting.join().unwrap();
        assert!(repository.lock_with(LockKind::Sweep, "", patient).is_err());
    });
}

#[test]
fn of_many_who_want_it_at_most_one_has_it() {
    let random = AtomicU64::new(7);
    let store = Fault::new(MemoryStore::new());
    for millis in [1, 2, 3] {
        // any order of the calls of all threads
        store.plan().add(move |call| call.number.wrapping_mul(0x9e37_79b9) % 5 == millis, {
            Effect::Delay(Duration::from_millis(millis))
        });
    }
    let repository = repository(store);
    let (holders, times) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..25 {
                    let kind = [LockKind::Backup, LockKind::Sweep][random.fetch_add(1, Ordering::Relaxed) as usize % 2];
                    let Attempt::Held(lock) = repository.try_lock(kind, "", quick()).unwrap() else { continue };
                    assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two hold it");
                    times.fetch_add(1, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(1));
                    holders.fetch_sub(1, Ordering::SeqCst);
                    drop(lock);
                }
            });
        }
    });
    assert!(times.load(Ordering::SeqCst) > 0, "nobody ever had it");
    assert!(repository.store.list("lock/", None).unwrap().objects.is_empty());
}
