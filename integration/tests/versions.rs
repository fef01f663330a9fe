//! The whole way on the oldest and the newest PostgreSQL.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Cluster, Data, Stanza, StopMode, install};

fn the_whole_way(major: u32, wal_segsize_mb: u32) {
    let stanza = Stanza::in_directory();
    let builder = Cluster::builder().major(major).wal_segsize_mb(wal_segsize_mb).checksums(true);
    let cluster = stanza.archiving(builder).start();
    cluster.create_tablespace("elsewhere");
    Data::tiny().pgbench_scale(1).load(&cluster);
    cluster.psql("CREATE TABLE moved TABLESPACE elsewhere AS SELECT generate_series(1, 10000) AS i;");
    stanza.create(&cluster);
    stanza.run(["check", "--pg", cluster.conninfo()]).ok();
    let expected = cluster.fingerprint();
    let label = stanza.backup(&cluster);
    cluster.psql("UPDATE moved SET i = -i;");

    let mount = stanza.mount("mount", &["--backup", &label]);
    // clients of 15 judge; from 17 on the manifest is one that they do not know
    if major < 17 {
        run_ok(install::client("pg_verifybackup").arg("-n").arg(mount.path()), &[], Duration::from_secs(120));
    }
    drop(mount);

    let (copy, tablespaces) = (stanza.place().join("copy"), stanza.place().join("tablespaces"));
    let map = format!("--tablespace-map-all={}", tablespaces.display());
    stanza.run(["restore", "--type=none", &map, copy.to_str().unwrap()]).ok();
    let mut opened = Cluster::open(major, &copy, &[]);
    assert_eq!(opened.fingerprint(), expected);
    opened.stop(StopMode::Fast);
    drop(opened);

    let bin = install::server(major);
    let arguments: &[&str] = &["--pg-bin", bin.to_str().unwrap()];
    let clone = stanza.start("clone", arguments);
    assert_eq!(clone.fingerprint(), expected);
    clone.psql("UPDATE moved SET i = 0; CREATE TABLE made AS SELECT generate_series(1, 10000) AS i; CHECKPOINT;");
    let written = clone.fingerprint();
    clone.stop(&["--keep"]);
    let clone = stanza.start("clone", arguments);
    assert_eq!(clone.fingerprint(), written);
    clone.stop(&[]);
    let clone = stanza.start("again", arguments);
    assert_eq!(clone.fingerprint(), expected, "a clone sees what another wrote");
    clone.stop(&[]);
    stanza.assert_nothing_left();

    // the programs of another major are not taken
    let wrong = install::server(15);
    let refused = stanza.run(["start", "--pg-bin", wrong.to_str().unwrap()]).fails(1, "has PostgreSQL 15");
    assert!(refused.stderr.contains(&format!("the backup needs {major}")), "{}", refused.stderr);
    stanza.run(["start"]).fails(1, &format!("PostgreSQL {major} is not installed")).fails(1, "hint:");
    stanza.assert_nothing_left();
}

#[test]
fn postgresql_13() {
    the_whole_way(13, 1);
}

#[test]
fn postgresql_18() {
    the_whole_way(18, 64);
}
