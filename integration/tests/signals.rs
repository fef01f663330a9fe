//! A signal ends every verb that takes long; nothing that it brought up stays.
#![allow(clippy::unwrap_used)]

mod history;

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use history::archive_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn_integration::wait::wait_until;
use pgcairn_integration::{Cluster, Stanza};

/// A run beside the test.
fn beside(stanza: &Stanza, arguments: &[&str]) -> Child {
    let mut command: Command = stanza.command();
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Signals it, and gives its status and what it complained about.
fn interrupt(child: Child, signal: Signal) -> (Option<i32>, String) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    let done = child.wait_with_output().unwrap();
    (done.status.code(), String::from_utf8_lossy(&done.stderr).into_owned())
}

#[test]
fn an_interrupted_start_leaves_nothing() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    stanza.backup(&cluster);
    // some seconds of replay
    cluster.psql("CREATE TABLE t (i int PRIMARY KEY, x text);");
    cluster.psql("INSERT INTO t SELECT i, repeat('x', 100) FROM generate_series(1, 300000) AS i;");
    cluster.psql("UPDATE t SET x = 'y'; UPDATE t SET x = 'z';");
    archive_all(&cluster);
    let directory = stanza.clone_directory("clone");
    let is_mounted = || directory.join("data/PG_VERSION").exists();
    let runs = || directory.join("data/postmaster.pid").exists();
    let never = stanza.place().join("never");
    let output = format!("--output={}", never.display());
    let extract = ["extract", "--type=default", "--table=postgres.public.t", &output];
    let start = ["start", "--type=default", "--name=clone"];
    let read = ["start", "--type=default", "--name=clone", "--read-only"];
    for (arguments, signal, code) in
        [(&start[..], Signal::SIGINT, 130), (&start, Signal::SIGTERM, 143), (&read, Signal::SIGHUP, 129)]
    {
        let child = beside(&stanza, arguments);
        match signal {
            Signal::SIGINT => wait_until(Duration::from_secs(60), "the mount", is_mounted),
            _ => wait_until(Duration::from_secs(60), "the server", runs),
        }
        let (ended, told) = interrupt(child, signal);
        assert_eq!(ended, Some(code), "{told}");
        assert!(told.contains(&format!("error: interrupted by {signal}")), "{told}");
        assert!(told.contains("hint: no clone is left"), "{told}");
        stanza.assert_nothing_left();
    }
    let child = beside(&stanza, &extract);
    let clones = stanza.place().join("clones");
    let runs = || {
        let mut names = std::fs::read_dir(&clones).into_iter().flatten().flatten();
        names.any(|clone| clone.path().join("data/postmaster.pid").exists())
    };
    wait_until(Duration::from_secs(60), "the server", runs);
    let (ended, told) = interrupt(child, Signal::SIGTERM);
    assert_eq!(ended, Some(143), "{told}");
    assert!(!never.exists(), "half of a table");
    stanza.assert_nothing_left();

    // verbs that leave nothing to take down
    let copy = stanza.place().join("copy");
    let child = beside(&stanza, &["restore", copy.to_str().unwrap()]);
    wait_until(Duration::from_secs(60), "the copy", || copy.join("base").exists());
    let (ended, told) = interrupt(child, Signal::SIGINT);
    // it may have been too late
    assert!(ended == Some(130) && told.contains("--delta") || ended == Some(0), "{ended:?}: {told}");
    stanza.run(["restore", "--delta", copy.to_str().unwrap()]).ok();
}

/// The checkpoint at a backup's begin is waited for in a query: nobody waits with it.
#[test]
fn an_interrupted_backup_is_taken_up_by_the_next() {
    let stanza = Stanza::in_directory();
    let builder = Cluster::builder().conf("checkpoint_timeout", "1h").conf("checkpoint_completion_target", "0.9");
    let cluster = stanza.archiving(builder.conf("max_wal_size", "10GB")).start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t AS SELECT i, repeat('x', 100) AS x FROM generate_series(1, 100000) AS i;");
    let child = beside(&stanza, &["backup", "--start-fast=n", "--pg", cluster.conninfo()]);
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_backup_start(''pgcairn%' AND pid <> pg_backend_pid();";
    wait_until(Duration::from_secs(60), "the checkpoint", || cluster.psql(waits) == "1");
    let (ended, told) = interrupt(child, Signal::SIGTERM);
    assert_eq!(ended, Some(143), "{told}");
    assert!(told.contains("hint: there is no new backup"), "{told}");
    stanza.backup(&cluster);
}
