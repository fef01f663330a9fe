//! Archiving through a worker: its yes is the store's yes, whatever dies, is swapped or is away meanwhile.
#![allow(clippy::unwrap_used)]

mod library;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use library::{memory, objects};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn::archive::push::push;
use pgcairn::archive::spool::Spool;
use pgcairn::archive::worker::{AheadOptions, push_ahead};
use pgcairn::read::wal::{GetError, get};
use pgcairn::repo::Repository;
use pgcairn::store::{Body, Effect, ErrorKind, Fault, MemoryStore, Store};
use pgcairn_integration::stanza::NAME;
use pgcairn_integration::{Cluster, Place, Stanza, StopMode, install, wait_until};

const LONG: Duration = Duration::from_secs(60);

struct Setup {
    cluster: Cluster,
    stanza: Stanza,
}

impl Setup {
    /// A server that archives in the background; nothing is recycled, so that everything can be compared at the end.
    fn new() -> Self {
        let stanza = Stanza::in_directory().asynchronous();
        let builder = Cluster::builder().wal_segsize_mb(1).conf("wal_keep_size", "1000MB");
        let cluster = stanza.archiving(builder).start();
        stanza.create(&cluster);
        Self { cluster, stanza }
    }

    fn wal(&self) -> PathBuf {
        self.cluster.data_directory().join("pg_wal")
    }

    /// Makes about this many segments.
    fn load(&self, segments: u32) {
        let rows = segments * 12_000;
        self.cluster
            .psql(&format!("CREATE TABLE IF NOT EXISTS t (i int); INSERT INTO t SELECT generate_series(1, {rows});"));
    }

    fn archiver(&self, what: &str) -> String {
        self.cluster.psql(&format!("SELECT {what} FROM pg_stat_archiver;"))
    }

    /// Ends the segment and waits until all before it are archived, as the server sees it.
    fn settle(&self) {
        let last = self.cluster.psql("SELECT pg_walfile_name(pg_switch_wal());");
        wait_until(LONG, "the archiver", || self.archiver("last_archived_wal") >= last);
    }

    /// Demands that the archive holds what the server holds, without a gap.
    #[track_caller]
    fn assert_archived(&self) {
        let current = self.cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn());");
        let target = self.stanza.place().join("target");
        let mut names: Vec<String> =
            fs::read_dir(self.wal()).unwrap().map(|entry| name(&entry.unwrap().path())).collect();
        names.retain(|name| name.len() == 24 && *name < current);
        assert!(!names.is_empty());
        for name in names {
            self.stanza.run(["archive-get", "--archive-async=n", &name, target.to_str().unwrap()]).ok();
            assert!(fs::read(&target).unwrap() == fs::read(self.wal().join(&name)).unwrap(), "{name} is another");
        }
    }

    fn spools(&self) -> Vec<PathBuf> {
        let spools = fs::read_dir(self.stanza.place().join("spool")).unwrap();
        spools.map(|entry| entry.unwrap().path()).filter(|path| name(path).contains("push")).collect()
    }

    /// The files that are answered for.
    fn answers(&self) -> Vec<String> {
        let files = self.spools().into_iter().flat_map(|spool| fs::read_dir(spool).unwrap());
        files.filter_map(|entry| Some(name(&entry.unwrap().path()).strip_suffix(".answer")?.to_owned())).collect()
    }

    /// The worker's process, if one lives.
    fn worker(&self) -> Option<Pid> {
        let wal = format!("--wal={}", self.wal().canonicalize().unwrap().display());
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let worker = |pid: &i32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).any(|word| word == wal.as_bytes())
        };
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(worker).map(Pid::from_raw)
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn a_server_under_load_is_archived_whole() {
    let mut setup = Setup::new();
    for _ in 0..4 {
        setup.load(8);
    }
    setup.settle();
    assert_eq!(setup.archiver("failed_count"), "0", "{}", setup.cluster.log());
    setup.assert_archived();
    let worker = setup.worker().expect("a worker lives while its server does");
    // it keeps nothing of its server open
    let open: Vec<PathBuf> = fs::read_dir(format!("/proc/{worker}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .collect();
    let data = setup.cluster.data_directory().canonicalize().unwrap();
    assert!(!open.iter().any(|file| file.starts_with(&data) || name(file).starts_with("log")), "{open:?}");
    let log = open.iter().filter(|file| file.starts_with(setup.stanza.place().join("state"))).count();
    assert!(log > 0, "no log among {open:?}");
    // and goes when the server has gone
    setup.cluster.stop(StopMode::Fast);
    wait_until(LONG, "the end of the worker", || setup.worker().is_none());
}

/// The archiver goes on calling while its worker dies again and again.
#[test]
fn a_worker_that_is_killed_loses_nothing() {
    let setup = Setup::new();
    let (mut kills, mut moment) = (0, 1);
    std::thread::scope(|scope| {
        let loading = scope.spawn(|| (0..5).for_each(|_| setup.load(8)));
        while !loading.is_finished() || kills < 8 {
            if loading.is_finished() {
                setup.load(4);
            }
            if let Some(worker) = setup.worker() {
                // at another moment of its life each time
                moment = moment * 5 % 103;
                std::thread::sleep(Duration::from_millis(moment));
                kills += i32::from(kill(worker, Signal::SIGKILL).is_ok());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    setup.settle();
    setup.assert_archived();
}

#[test]
fn a_store_that_is_away_is_waited_for() {
    let setup = Setup::new();
    setup.load(2);
    setup.settle();
    let repo = PathBuf::from(setup.stanza.repo());
    let aside = repo.with_extension("aside");
    fs::rename(&repo, &aside).unwrap();
    setup.load(6);
    let before: u64 = setup.archiver("archived_count").parse().unwrap();
    wait_until(LONG, "a failure", || setup.archiver("failed_count") != "0");
    assert!(setup.cluster.log().contains("error: "), "{}", setup.cluster.log());
    let told = setup.stanza.run(["check", "--archive-timeout", "1", "--pg", setup.cluster.conninfo()]);
    assert!(told.stdout.contains("WAL files wait to be archived, the oldest since 20"), "{told:?}");
    assert!(told.stdout.contains("archiving has failed"), "{told:?}");
    told.fails(1, "No such file");
    let worker = setup.worker().expect("a worker stays while files wait");
    fs::rename(&aside, &repo).unwrap();
    // the same worker goes on by itself
    setup.settle();
    let archived: u64 = setup.archiver("archived_count").parse().unwrap();
    assert!(archived >= before + 4, "{before} and then {archived}");
    assert_eq!(setup.worker(), Some(worker));
    setup.assert_archived();
}

/// A directory with the segments of a server that is gone, which asks for all of them.
struct Left {
    place: Place,
    wal: PathBuf,
    segments: Vec<(String, Vec<u8>)>,
    store: Arc<MemoryStore>,
}

impl Left {
    fn new() -> Self {
        let stanza = Stanza::in_directory();
        let builder = Cluster::builder().wal_segsize_mb(1).conf("wal_keep_size", "100MB");
        let builder = builder.conf("archive_mode", "on").conf("archive_command", "false");
        let mut cluster = builder.start();
        stanza.create(&cluster);
        for _ in 0..4 {
            cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 1000); SELECT pg_switch_wal(); DROP TABLE t;");
        }
        cluster.stop(StopMode::Immediate);
        let place = Place::new();
        let wal = place.join("data/pg_wal");
        fs::create_dir_all(wal.join("archive_status")).unwrap();
        let (from, global) = (cluster.data_directory(), place.join("data/global"));
        fs::create_dir(&global).unwrap();
        fs::copy(from.join("global/pg_control"), global.join("pg_control")).unwrap();
        let mut segments = Vec::new();
        for entry in fs::read_dir(from.join("pg_wal/archive_status")).unwrap() {
            let ready = name(&entry.unwrap().path());
            let segment = ready.strip_suffix(".ready").unwrap().to_owned();
            let bytes = fs::read(from.join("pg_wal").join(&segment)).unwrap();
            fs::write(wal.join(&segment), &bytes).unwrap();
            fs::write(wal.join("archive_status").join(ready), b"").unwrap();
            segments.push((segment, bytes));
        }
        segments.sort();
        assert!(segments.len() >= 4);
        let store = Arc::new(memory(&objects(Path::new(stanza.repo()))));
        Self { place, wal, segments, store }
    }

    /// A store of its own that holds nothing but the stanza.
    fn fresh(&self) -> Arc<MemoryStore> {
        let store = MemoryStore::new();
        for object in self.store.list("", None).unwrap().objects {
            store.put(&object.key, Body::Bytes(self.store.get(&object.key).unwrap())).unwrap();
        }
        Arc::new(store)
    }

    /// A store that has another content under this segment's name, of the same cluster; and the key of that.
    fn conflict(&self, (name, bytes): &(String, Vec<u8>)) -> (Arc<MemoryStore>, String) {
        let path = self.place.join(name);
        let mut bytes = bytes.clone();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        let store = self.fresh();
        push(&Repository::new(Arc::clone(&store) as Arc<dyn Store>, NAME).unwrap(), &path, 1).unwrap();
        let mut objects = store.list("archive/", None).unwrap().objects;
        objects.retain(|object| object.key.contains(name));
        (store, objects.remove(0).key)
    }

    fn spool(&self) -> Spool {
        Spool::open(&self.place.join("spool"), "main", &[]).unwrap()
    }

    fn push_ahead(&self, store: impl Store + Clone + 'static) -> pgcairn::error::Result<()> {
        let options = AheadOptions { wal: self.wal.clone(), level: 1, process_max: 2, idle: Duration::ZERO };
        push_ahead(&self.spool(), &options, &|| Repository::new(Arc::new(store.clone()), NAME))
    }

    /// What the worker said of a file, if anything.
    fn answer(&self, name: &str) -> Option<String> {
        self.spool().read(&format!("{name}.answer")).unwrap().map(|bytes| String::from_utf8(bytes).unwrap())
    }

    /// Whether the archive has these bytes under this name; another content is never right.
    #[track_caller]
    fn has(&self, store: &Arc<MemoryStore>, (name, bytes): &(String, Vec<u8>)) -> bool {
        let target = self.place.join("target");
        let repository = Repository::new(Arc::clone(store) as Arc<dyn Store>, NAME).unwrap();
        match get(&repository, name, &target) {
            Ok(()) => fs::read(&target).unwrap() == *bytes || panic!("other bytes as {name}"),
            Err(GetError::NotThere) => false,
            Err(GetError::Failed(error)) => panic!("{error:?}"),
        }
    }
}

/// Whatever call fails, before or after the store did its part: what is called archived is there, and the next run does the rest.
#[test]
fn no_failing_call_makes_the_worker_lie() {
    let left = Left::new();
    let said_yes = |name: &str| left.answer(name).is_some_and(|answer| answer.contains("archived"));
    for effect in [
        Effect::Fail(ErrorKind::Transient),
        Effect::FailAfter(ErrorKind::Transient),
        Effect::Fail(ErrorKind::NotFound),
        Effect::Cut(10),
        Effect::Flip(20),
    ] {
        for n in 1.. {
            let store = left.fresh();
            let faulty = Arc::new(Fault::new(Arc::clone(&store)));
            let plan = faulty.plan();
            plan.nth(n, effect);
            left.push_ahead(Arc::clone(&faulty)).unwrap();
            let met = plan.calls() >= n;
            for segment in &left.segments {
                assert!(!said_yes(&segment.0) || left.has(&store, segment), "{effect:?} at call {n}: {}", segment.0);
            }
            plan.clear();
            left.push_ahead(faulty).unwrap();
            for segment in &left.segments {
                assert!(said_yes(&segment.0) && left.has(&store, segment), "{effect:?} at call {n}: {}", segment.0);
            }
            if !met {
                assert!(n > 4, "{n} calls archive nothing");
                break;
            }
        }
    }
}

/// Two LISTs and one PUT for each: what is asked of the store for many segments is bounded.
#[test]
fn many_segments_share_their_listings() {
    let left = Left::new();
    let faulty = Arc::new(Fault::new(left.fresh()));
    let plan = faulty.plan();
    left.push_ahead(Arc::clone(&faulty)).unwrap();
    let segments = left.segments.len() as u64;
    // archive.info; before; after, at worst after each
    assert!(plan.calls() <= 2 + 2 * segments, "{} calls for {segments} segments", plan.calls());
}

/// What is behind it would be another server's history: it waits, as it does where the server pushes file by file.
#[test]
fn nothing_is_pushed_behind_a_file_that_the_archive_holds_with_other_content() {
    let left = Left::new();
    let (first, behind) = (&left.segments[1], &left.segments[2..]);
    let (store, wrong) = left.conflict(first);
    for _ in 0..2 {
        left.push_ahead(Arc::clone(&store)).unwrap();
        assert!(left.has(&store, &left.segments[0]));
        let told = left.answer(&first.0).unwrap();
        assert!(told.contains("already holds"), "{told}");
        for segment in behind {
            let told = left.answer(&segment.0).unwrap();
            assert!(told.contains(&format!("{} waits for {}", segment.0, first.0)), "{told}");
            assert!(!left.has(&store, segment), "{} was pushed", segment.0);
        }
    }
    // a person has found out which one is right
    store.delete(&[wrong]).unwrap();
    left.push_ahead(Arc::clone(&store)).unwrap();
    assert!(left.segments.iter().all(|segment| left.has(&store, segment)));
}

/// A server that lives, for all that a worker sees, until this is dropped.
struct Postmaster(PathBuf);

impl Postmaster {
    fn of(left: &Left) -> Self {
        let path = left.place.join("data/postmaster.pid");
        fs::write(&path, b"a server lives").unwrap();
        Self(path)
    }
}

impl Drop for Postmaster {
    fn drop(&mut self) {
        _ = fs::remove_file(&self.0);
    }
}

/// The worker lives on while a conflict is settled, and tells what waited for it then.
#[test]
fn what_waited_for_a_conflict_is_pushed_when_it_is_settled() {
    let left = Left::new();
    let first = &left.segments[1];
    let (store, wrong) = left.conflict(first);
    let last = &left.segments[left.segments.len() - 1].0;
    std::thread::scope(|scope| {
        let server = Postmaster::of(&left);
        let worker = scope.spawn(|| left.push_ahead(Arc::clone(&store)).unwrap());
        let says = |name: &str, what: &str| left.answer(name).is_some_and(|answer| answer.contains(what));
        wait_until(LONG, "the conflict", || says(last, "waits for"));
        store.delete(std::slice::from_ref(&wrong)).unwrap();
        wait_until(LONG, "the last one", || says(last, "archived"));
        drop(server);
        worker.join().unwrap();
    });
    assert!(left.segments.iter().all(|segment| left.has(&store, segment)));
}

/// A file that the archive holds with other content is refused through the worker, too; the answer for one content is none for
/// another.
#[test]
fn other_content_is_refused_and_no_answer_is_taken_for_another() {
    let setup = Setup::new();
    setup.load(3);
    setup.settle();
    // as if restored to an earlier point: a file of this name, of this cluster, that says something else
    let archived = setup.archiver("last_archived_wal");
    let path = setup.wal().join(&archived);
    let mut bytes = fs::read(&path).unwrap();
    let status = setup.wal().join("archive_status");
    let push = |path: &Path| setup.stanza.run_as_server_user(["archive-push", path.to_str().unwrap()]);
    let done = status.join(format!("{archived}.done"));
    wait_until(LONG, "the archiver", || done.exists());
    let ready = status.join(format!("{archived}.ready"));
    // the server's archiver must not come between
    setup.cluster.psql("ALTER SYSTEM SET archive_command = 'sleep 1; false';");
    setup.cluster.psql("SELECT pg_reload_conf();");
    fs::rename(&done, &ready).unwrap();
    push(&path).ok();
    wait_until(LONG, "an answer", || setup.answers().contains(&archived));
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, &bytes).unwrap();
    for _ in 0..2 {
        push(&path).fails(1, "already holds");
    }
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, &bytes).unwrap();
    push(&path).ok();
    // what a worker that died has left counts for nothing, even if it says the right thing
    let worker = setup.worker().unwrap();
    kill(worker, Signal::SIGKILL).unwrap();
    wait_until(LONG, "its end", || setup.worker().is_none());
    let answer = setup.spools()[0].join(format!("{archived}.answer"));
    assert!(answer.exists());
    let repo = PathBuf::from(setup.stanza.repo());
    fs::rename(&repo, repo.with_extension("aside")).unwrap();
    let away = setup.stanza.run_as_server_user(["archive-push", "--archive-timeout=2", path.to_str().unwrap()]);
    away.fails(1, "error: ");
}

/// Somebody tidies up: the spool goes, with a worker in it, and another takes its place.
#[test]
fn a_spool_that_is_removed_under_its_worker_holds_nothing_up() {
    let setup = Setup::new();
    setup.load(2);
    setup.settle();
    let worker = setup.worker().unwrap();
    let spool = setup.spools().remove(0);
    fs::rename(&spool, spool.with_extension("aside")).unwrap();
    fs::create_dir(&spool).unwrap();
    install::give_to_server_user(&spool);
    fs::set_permissions(&spool, fs::Permissions::from_mode(0o700)).unwrap();
    setup.load(2);
    let last = setup.cluster.psql("SELECT pg_walfile_name(pg_switch_wal());");
    // long before the old worker would end for want of work
    wait_until(LONG / 4, "the archiver", || setup.archiver("last_archived_wal") >= last);
    // a process that nobody has waited for yet has no words
    let words = || fs::read(format!("/proc/{worker}/cmdline")).unwrap_or_default();
    wait_until(LONG / 4, "the end of the old worker", || words().is_empty());
    assert!(setup.worker().is_some());
    assert_eq!(setup.archiver("failed_count"), "0", "{}", setup.cluster.log());
    setup.assert_archived();
}

#[test]
fn without_a_spool_files_are_pushed_alone() {
    let setup = Setup::new();
    let spool = setup.stanza.place().join("spool");
    fs::remove_dir_all(&spool).unwrap();
    fs::write(&spool, b"no directory").unwrap();
    setup.load(2);
    setup.settle();
    assert_eq!(setup.archiver("failed_count"), "0", "{}", setup.cluster.log());
    assert!(setup.cluster.log().contains("pushed alone"), "{}", setup.cluster.log());
    assert!(setup.worker().is_none());
    setup.assert_archived();
}

/// Recovery of a copy takes its WAL from what was fetched ahead, ends where WAL ends, and nothing is left.
#[test]
fn recovery_takes_what_was_fetched_ahead() {
    let setup = Setup::new();
    setup.cluster.psql("CREATE TABLE kept (i int);");
    setup.stanza.backup(&setup.cluster);
    for round in 0..3 {
        setup.cluster.psql(&format!("INSERT INTO kept VALUES ({round});"));
        setup.load(6);
    }
    setup.settle();
    let copy = setup.stanza.place().join("copy");
    setup.stanza.run(["restore", "--type=none", copy.to_str().unwrap()]).ok();
    let command = setup.stanza.archive_command().replace("archive-push %p", "--log-level=info archive-get %f %p");
    fs::write(copy.join("recovery.signal"), b"").unwrap();
    install::give_to_server_user(&copy.join("recovery.signal"));
    let recovered = Cluster::open(15, &copy, &[("restore_command", &command)]);
    wait_until(LONG, "the end of recovery", || recovered.psql("SELECT pg_is_in_recovery();") == "f");
    assert_eq!(recovered.psql("SELECT count(*) FROM kept;"), "3");
    assert_eq!(recovered.psql("SELECT sum(i) FROM t;"), setup.cluster.psql("SELECT sum(i) FROM t;"));
    let ahead = recovered.log().matches("taken from the spool").count();
    assert!(ahead >= 5, "{ahead} segments were fetched ahead:\n{}", recovered.log());
}
