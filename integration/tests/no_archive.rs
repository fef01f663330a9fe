//! A cluster that archives nothing: the WAL that consistency needs is stored with the backup.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::Duration;

use pgcairn_integration::client::Client;
use pgcairn_integration::files::files;
use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Cluster, Data, Stanza, install, wait_until};

/// What every transaction of pgbench leaves equal, however it is cut.
const BALANCED: &str =
    "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(bbalance) FROM pgbench_branches)
    AND (SELECT sum(tbalance) FROM pgbench_tellers) = (SELECT sum(delta) FROM pgbench_history)
    AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history);";

/// A server that is only consistent after its WAL was replayed; judged, then thrown away.
fn assert_consistent(client: &Client, at_least: u64) {
    assert_eq!(client.psql(BALANCED), "t");
    let history: u64 = client.psql("SELECT count(*) FROM pgbench_history;").parse().unwrap();
    assert!(history >= at_least, "{history} transactions, {at_least} had ended before the backup began");
    run_ok(
        install::client("pg_amcheck")
            .args(["--all", "--install-missing", "--heapallindexed"])
            .args(["--maintenance-db", client.conninfo()]),
        &[],
        Duration::from_secs(120),
    );
}

#[test]
fn a_busy_cluster_without_an_archive() {
    let stanza = Stanza::in_directory();
    let builder = Cluster::builder().wal_segsize_mb(1).checksums(true);
    // as little WAL as the server may keep: only the backup's own slot holds what it needs
    let builder = builder.conf("max_wal_size", "2MB").conf("min_wal_size", "2MB").conf("checkpoint_timeout", "30s");
    let cluster = builder.start();
    Data::default().load(&cluster);
    stanza.create(&cluster);
    let checked = stanza.run(["check", "--pg", cluster.conninfo()]).ok();
    assert!(checked.contains("archive_mode is off"), "{checked}");
    let refused = stanza.run(["backup", "--wal", "archive", "--pg", cluster.conninfo()]);
    refused.fails(1, "error: archive_mode is off").fails(1, "hint:");

    let busy = cluster.pgbench_beside(&["-c", "2", "-n", "-T", "600"]);
    let count = || -> u64 { cluster.psql("SELECT count(*) FROM pgbench_history;").parse().unwrap() };
    wait_until(Duration::from_secs(60), "transactions", || count() > 200);
    let before = count();
    let label = stanza.backup(&cluster);
    drop(busy);
    assert!(count() > before);
    assert_eq!(cluster.psql("SELECT count(*) FROM pg_replication_slots;"), "0", "a slot is left and holds WAL");

    let info = stanza.run(["info"]).ok();
    assert!(info.contains("WAL archive: empty") && info.contains(&label), "{info}");
    let mount = stanza.mount("mount", &[]);
    let backup = mount.path().join("latest");
    let wal = files(&backup.join("pg_wal"));
    assert!(!wal.is_empty());
    assert!(fs::read_dir(mount.path().join("wal")).unwrap().next().is_none());
    run_ok(install::client("pg_verifybackup").arg(&backup), &[], Duration::from_secs(120));
    drop(mount);

    let copy = stanza.place().join("copy");
    stanza.run(["restore", copy.to_str().unwrap()]).ok();
    assert!(wal.iter().all(|segment| copy.join("pg_wal").join(segment).exists()));
    assert_consistent(&Cluster::open(15, &copy, &[]), before);
    let clone = stanza.start("clone", &[]);
    assert_consistent(&clone, before);
    clone.stop(&[]);
    stanza.assert_nothing_left();
}

/// WAL can be stored with the backup of a cluster that archives, too.
#[test]
fn wal_is_stored_when_asked() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i;");
    stanza.create(&cluster);
    stanza.run(["backup", "--wal", "stored", "--pg", cluster.conninfo()]).ok();
    // the archive is not needed then
    fs::remove_dir_all(std::path::Path::new(stanza.repo()).join("archive/main/15-1")).unwrap_or_default();
    let copy = stanza.place().join("copy");
    stanza.run(["restore", copy.to_str().unwrap()]).ok();
    assert_eq!(Cluster::open(15, &copy, &[]).psql("SELECT count(*) FROM t;"), "1000");
}
