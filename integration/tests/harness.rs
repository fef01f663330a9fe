//! The harness keeps its promises: servers of old and new majors start, answer, and leave nothing behind.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pgcairn_integration::client::Client;
use pgcairn_integration::process::is_running;
use pgcairn_integration::{Cluster, Data, StopMode, bin, wait_until};

/// What a cluster has on the machine while it lives.
struct Traces {
    home: PathBuf,
    data: PathBuf,
    pid: i32,
}

impl Traces {
    fn of(cluster: &Cluster) -> Self {
        let pid = cluster.pid().expect("the server runs");
        Self { home: cluster.home().to_owned(), data: cluster.data_directory().to_owned(), pid }
    }

    fn assert_gone(&self) {
        assert!(!is_running(self.pid), "postmaster {} still runs", self.pid);
        assert!(!self.home.exists(), "{} is still there", self.home.display());
        let working_there = processes_in(&self.data);
        assert!(working_there.is_empty(), "{working_there:?} still work in {}", self.data.display());
    }
}

fn processes_in(directory: &Path) -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let works_there = |path: &Path| fs::read_link(path.join("cwd")).is_ok_and(|cwd| cwd.starts_with(directory));
    let found = processes.map(|entry| entry.path()).filter(|path| works_there(path));
    found.map(|path| path.display().to_string()).collect()
}

fn starts_answers_and_leaves_nothing(major: u32, wal_segsize_mb: u32) {
    let mut cluster = Cluster::builder().major(major).checksums(true).wal_segsize_mb(wal_segsize_mb).start();
    let traces = Traces::of(&cluster);
    let version = cluster.psql("SHOW server_version_num;");
    assert_eq!(version.parse::<u32>().unwrap() / 10_000, major);
    assert_eq!(cluster.psql("SHOW data_checksums; SHOW wal_segment_size;"), format!("on\n{wal_segsize_mb}MB"));
    cluster.create_tablespace("elsewhere");
    cluster.psql("CREATE TABLE t TABLESPACE elsewhere AS SELECT 1 AS one; CHECKPOINT;");
    let before = cluster.fingerprint();
    cluster.restart();
    assert_eq!(cluster.fingerprint(), before);
    cluster.stop(StopMode::Immediate);
    assert_eq!(cluster.pid(), None);
    cluster.start();
    assert_eq!(cluster.psql("SELECT * FROM t;"), "1");
    drop(cluster);
    traces.assert_gone();
}

#[test]
fn a_cluster_of_13() {
    starts_answers_and_leaves_nothing(13, 1);
}

#[test]
fn a_cluster_of_15() {
    starts_answers_and_leaves_nothing(15, 16);
}

#[test]
fn a_cluster_of_18() {
    starts_answers_and_leaves_nothing(18, 64);
}

#[test]
fn checksums_are_off_unless_asked_for() {
    for major in [15, 18] {
        let cluster = Cluster::builder().major(major).conf("work_mem", "5MB").start();
        assert_eq!(cluster.psql("SHOW data_checksums; SHOW work_mem;"), "off\n5MB");
    }
}

#[test]
fn a_panic_leaves_nothing() {
    let mut traces = None;
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let cluster = Cluster::builder().start();
        traces = Some(Traces::of(&cluster));
        cluster.psql("SELECT nothing;");
    }));
    let message = *panicked.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("column \"nothing\" does not exist"), "{message}");
    traces.unwrap().assert_gone();
}

/// Not a test: what [`a_kill_leaves_nothing`] runs in a process of its own, and kills.
#[test]
#[ignore = "hangs; another test runs and kills it"]
fn hang_with_a_cluster() {
    let cluster = Cluster::builder().start();
    let traces = Traces::of(&cluster);
    // past the test runner, which keeps what is printed to itself
    writeln!(std::io::stdout().lock(), "{}\n{}\n{}", traces.home.display(), traces.data.display(), traces.pid).unwrap();
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn a_kill_leaves_nothing() {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "--nocapture", "hang_with_a_cluster"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    // what the test runner itself says comes first
    let mut told = lines.skip_while(|line| !line.starts_with('/'));
    let (home, data) = (PathBuf::from(told.next().unwrap()), PathBuf::from(told.next().unwrap()));
    let traces = Traces { home, data, pid: told.next().unwrap().parse().unwrap() };
    assert!(is_running(traces.pid));
    child.kill().unwrap();
    child.wait().unwrap();
    wait_until(Duration::from_secs(20), "the watchdog", || !traces.home.exists());
    traces.assert_gone();
}

#[test]
fn a_copy_of_a_data_directory_starts_and_stays() {
    let mut source = Cluster::builder().start();
    source.psql("CREATE TABLE t AS SELECT 7 AS n;");
    source.stop(StopMode::Fast);
    let copy = source.home().join("copy");
    assert!(Command::new("cp").arg("-a").args([source.data_directory(), &copy]).status().unwrap().success());
    let opened = Cluster::open(15, &copy, &[("work_mem", "6MB"), ("application_name", "it's ours")]);
    assert_eq!(opened.psql("SELECT n FROM t; SHOW work_mem;"), "7\n6MB");
    drop(opened);
    assert!(copy.join("PG_VERSION").exists());
    let log = Cluster::try_open(15, &copy, &[("wal_level", "nonsense")]).unwrap_err();
    assert!(log.contains("nonsense"), "{log}");
    fs::remove_file(copy.join("global/pg_control")).unwrap();
    let log = Cluster::try_open(15, &copy, &[]).unwrap_err();
    assert!(log.contains("could not find the database system"), "{log}");
}

#[test]
fn data_is_of_every_kind() {
    let cluster = Cluster::builder().start();
    Data::default().load(&cluster);
    let sizes = "SELECT pg_relation_size('text_lines') > 4000000, pg_relation_size('random_bytes') > 4000000,
        (SELECT count(*) FROM pgbench_accounts), (SELECT count(*) FROM large_values WHERE compressed = external),
        (SELECT pg_relation_size(reltoastrelid) > 0 FROM pg_class WHERE relname = 'large_values'),
        (SELECT relpersistence FROM pg_class WHERE relname = 'unlogged_rows');";
    assert_eq!(cluster.psql(sizes), "t|t|100000|5|t|u");
    let before = cluster.fingerprint();
    assert!(before["postgres.public.pgbench_accounts"].starts_with("100000 rows, sum "));
    assert!(!before.contains_key("postgres.public.unlogged_rows"));
    cluster.psql("UPDATE pgbench_accounts SET abalance = 1 WHERE aid = 99;");
    let changed: Vec<_> = cluster.fingerprint().into_iter().filter(|(name, value)| before[name] != *value).collect();
    assert_eq!(changed.len(), 1, "{changed:?}");
    let dump = cluster.dumpall();
    assert!(dump.contains("COPY public.pgbench_accounts") && dump == cluster.dumpall());
}

#[test]
fn a_session_stays_open_and_a_load_runs_beside() {
    let cluster = Cluster::builder().start();
    Data::tiny().pgbench_scale(1).load(&cluster);
    let mut session = cluster.session();
    session.run("CREATE TEMP TABLE mine AS SELECT generate_series(1, 3) AS i;");
    let load = cluster.pgbench_beside(&["-T", "1", "-c", "2"]);
    assert_eq!(session.run("SELECT i FROM mine ORDER BY i;"), "1\n2\n3");
    assert_eq!(session.run(""), "");
    load.finish();
    assert!(cluster.psql("SELECT count(*) > 0 FROM pgbench_history;") == "t");
    assert!(cluster.try_psql("SELECT * FROM mine;").unwrap_err().contains("does not exist"));
}

#[test]
fn the_runner_judges_exit_statuses_and_messages() {
    let run = |script| bin::run_command(Command::new("sh").args(["-c", script]));
    assert_eq!(run("echo out; echo err >&2").ok(), "out\n");
    run("echo no such stanza >&2; exit 2").fails(2, "such stanza");
    for wrong in ["exit 1", "echo other >&2; exit 2", "kill -9 $$"] {
        assert!(catch_unwind(|| run(wrong).fails(2, "such stanza")).is_err(), "{wrong}");
    }
    assert!(catch_unwind(|| run("exit 1").ok()).is_err());
}

#[test]
fn a_client_needs_no_cluster_of_ours() {
    let nobody = Client::new("host=/nonexistent port=1 user=postgres");
    assert!(nobody.try_psql("SELECT 1;").unwrap_err().contains("/nonexistent"));
}
