//! Processes that die at any moment, stores that fail at any call: what was committed is there, and the next try works.
#![allow(clippy::unwrap_used)]

mod library;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use library::{assert_whole, memory, objects, repository, view};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn::backup::run::{BackupOptions, WalChoice, Wanted, Way, backup};
use pgcairn::postgres::BackupKind;
use pgcairn::progress::Silent;
use pgcairn::repo::Repository;
use pgcairn::store::{Effect, ErrorKind, Fault, MemoryStore};
use pgcairn_integration::process::{is_running, run_ok};
use pgcairn_integration::{Cluster, Data, Stanza, install, wait_until};

const LONG: Duration = Duration::from_secs(120);

fn labels(stanza: &Stanza) -> Vec<String> {
    let json: serde_json::Value = serde_json::from_str(&stanza.run(["info", "--output", "json"]).ok()).unwrap();
    let backups = json[0]["backup"].as_array().unwrap();
    backups.iter().map(|backup| backup["label"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_killed_backup_is_none() {
    const KILLS: u32 = 6;
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    Data::default().load(&cluster);
    stanza.create(&cluster);
    let started = Instant::now();
    let mut committed = vec![stanza.backup(&cluster)];
    let whole = started.elapsed();
    for number in 1..=KILLS {
        let mut command = stanza.command();
        command.args(["backup", "--pg", cluster.conninfo()]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        // the last ones die while they commit, or have just done so
        std::thread::sleep(whole * number / KILLS);
        child.kill().unwrap();
        let status = child.wait().unwrap();
        let now = labels(&stanza);
        assert!(now.starts_with(&committed), "{now:?} lacks some of {committed:?}");
        assert!(now.len() <= committed.len() + 1, "{now:?}");
        assert!(!status.success() || now.len() == committed.len() + 1, "it said yes, but there is no backup");
        committed = now;
        // what the killed one held of the server goes with its session
        cluster.wait_for_backup_sessions_to_end();
        if number % 3 == 0 {
            committed.push(stanza.backup(&cluster));
            assert_eq!(labels(&stanza), committed);
        }
    }
    let repository = repository(memory(&objects(Path::new(stanza.repo()))));
    for label in &committed {
        assert_whole(&repository, label);
    }
    let expected = cluster.fingerprint();
    stanza.backup(&cluster);
    let copy = stanza.place().join("copy");
    stanza.run(["restore", "--type=none", copy.to_str().unwrap()]).ok();
    assert_eq!(Cluster::open(15, &copy, &[]).fingerprint(), expected);
}

#[test]
fn a_killed_mount_loses_nothing_that_was_committed() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    Data::default().load(&cluster);
    cluster.psql("CREATE TABLE acknowledged (i bigint PRIMARY KEY, filler text);");
    stanza.create(&cluster);
    stanza.backup(&cluster);
    let options: &[&str] = &["--option", "fsync=on", "--option", "max_wal_size=32MB"];
    let last = Arc::new(AtomicU64::new(0));
    let mut clone = stanza.start("victim", options);
    for round in 1..=2 {
        let busy = clone.pgbench_beside(&["-c", "2", "-n", "-T", "600"]);
        let mut session = clone.session();
        let (writer, goal) = (Arc::clone(&last), last.load(Ordering::SeqCst) + 60 * round);
        let inserts = std::thread::spawn(move || {
            // ends with the server
            let _ = catch_unwind(AssertUnwindSafe(|| {
                loop {
                    let next = writer.load(Ordering::SeqCst) + 1;
                    session.run(&format!("INSERT INTO acknowledged VALUES ({next}, repeat('x', {}));", next % 900));
                    writer.store(next, Ordering::SeqCst);
                }
            }));
        });
        wait_until(LONG, "acknowledged transactions", || last.load(Ordering::SeqCst) >= goal);
        let daemon = clone.daemon();
        kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
        wait_until(LONG, "the daemon to die", || !is_running(daemon));
        clone.stop(&["--keep"]);
        inserts.join().unwrap();
        drop(busy);
        assert_eq!(stanza.place().leftovers(), Vec::<String>::new());

        clone = stanza.start("victim", options);
        let acknowledged = last.load(Ordering::SeqCst);
        let there: u64 = clone.psql("SELECT count(*) FROM acknowledged;").parse().unwrap();
        assert!(there == acknowledged || there == acknowledged + 1, "{acknowledged} acknowledged, {there} are there");
        last.store(there, Ordering::SeqCst);
        let balanced = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)
            AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history);";
        assert_eq!(clone.psql(balanced), "t");
        let mut amcheck = install::client("pg_amcheck");
        amcheck.args(["--all", "--install-missing", "--heapallindexed", "--maintenance-db", clone.conninfo()]);
        run_ok(&mut amcheck, &[], LONG);
    }
    clone.stop(&[]);
    stanza.assert_nothing_left();
}

fn options(cluster: &Cluster) -> BackupOptions {
    BackupOptions {
        kind: Wanted::Kind(BackupKind::Full),
        checksum: false,
        conninfo: cluster.conninfo().to_owned(),
        primary: None,
        process_max: 2,
        buffer_bytes: 128 << 20,
        level: 1,
        start_fast: true,
        wal: WalChoice::Stored,
        archive_timeout: Duration::from_secs(10),
        page_errors_fail: false,
        checks: pgcairn::backup::rival::Checks { archive_mode: true, timeline: true },
        way: Way::Files,
    }
}

#[test]
fn a_store_that_fails_at_any_call_leaves_whole_backups_or_none() {
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    stanza.create(&cluster);
    let before = objects(Path::new(stanza.repo()));
    let options = options(&cluster);

    // how many calls a backup makes; which call is which varies with the threads
    let counting = Fault::new(memory(&before));
    let plan = counting.plan();
    let first = backup(&repository(counting), &options, &Silent).unwrap();
    let calls = plan.calls();
    assert!(calls > 8, "{calls} calls");

    let (mut failed, mut succeeded) = (0, 0);
    // once, or from then on; and whether the store did its part or not
    let troubles = [
        (Effect::Fail(ErrorKind::NoSpace), false),
        (Effect::FailAfter(ErrorKind::Transient), false),
        (Effect::Fail(ErrorKind::Transient), true),
    ];
    // the last calls are the commit
    let sampled: BTreeSet<u64> =
        [1, 2, 3, calls / 2].into_iter().chain(calls.saturating_sub(6)..=calls).chain([calls + 8]).collect();
    for (effect, gone) in troubles {
        for &n in &sampled {
            let store: Arc<MemoryStore> = Arc::new(memory(&before));
            let faulty = Fault::new(Arc::clone(&store));
            let plan = faulty.plan();
            match gone {
                true => plan.from_nth(n, effect),
                false => plan.nth(n, effect),
            }
            let result = backup(&repository(faulty), &options, &Silent);
            let sound = repository(Arc::clone(&store));
            let what = format!("{effect:?} at call {n} of {calls}, gone for good: {gone}");
            judge(&what, &sound, result.as_ref().map(|of| of.label.as_str()).map_err(ToString::to_string));
            match result {
                Ok(_) => succeeded += 1,
                Err(error) => {
                    assert!(error.hint_text().is_some(), "{what}: no hint for {error:?}");
                    failed += 1;
                }
            }
        }
    }
    assert!(failed > 12 && succeeded >= 3, "{failed} failed, {succeeded} succeeded");
    let sound = Arc::new(memory(&before));
    let again = backup(&repository(Arc::clone(&sound)), &options, &Silent).unwrap();
    assert_eq!(again.sizes.files, first.sizes.files);
}

/// Success means a whole backup in the catalog. Failure means none there, unless it came after the commit.
fn judge(what: &str, sound: &Repository, result: Result<&str, String>) {
    let catalog: Vec<String> = sound.backup_info().unwrap().backups.into_keys().collect();
    match result {
        Ok(label) => assert_eq!(catalog, [label], "{what}"),
        Err(_) => assert!(catalog.len() <= 1, "{what}: {catalog:?}"),
    }
    for label in catalog {
        let shown = assert_whole(sound, &label);
        assert!(shown.keys().any(|path| path.starts_with(b"pg_wal/0000")), "{what}: no WAL");
        assert_eq!(view(sound, &label).unwrap().description.label, label);
    }
}
