//! Restores that could harm a live cluster or remove the only trace of a transaction.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt, lchown, symlink};
use std::path::Path;
use std::time::Duration;

use pgcairn_integration::bin::run_command;
use pgcairn_integration::wait::wait_until;
use pgcairn_integration::{Cluster, Stanza, StopMode};

const LONG: Duration = Duration::from_secs(60);

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn opened(data: &Path) -> Cluster {
    let server = Cluster::open(15, data, &[]);
    wait_until(LONG, "the end of recovery", || server.psql("SELECT pg_is_in_recovery();") == "f");
    server
}

/// A link such as `cp -a` from a mount makes: it counts from where it lies, not from where somebody works.
#[test]
fn a_tablespace_behind_a_relative_link() {
    let stanza = Stanza::in_directory();
    let mut cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    let space = cluster.create_tablespace("space");
    cluster.psql("CREATE TABLE t TABLESPACE space AS SELECT generate_series(1, 10) AS i;");
    let oid = cluster.psql("SELECT oid FROM pg_tablespace WHERE spcname = 'space';");
    cluster.stop(StopMode::Fast);
    let link = cluster.data_directory().join("pg_tblspc").join(&oid);
    let owner = fs::symlink_metadata(&link).unwrap();
    fs::remove_file(&link).unwrap();
    symlink("../../tablespace-space", &link).unwrap();
    lchown(&link, Some(owner.uid()), Some(owner.gid())).unwrap();
    cluster.start();
    stanza.create(&cluster);
    stanza.backup(&cluster);
    // where the link would lead into other people's things
    let working = stanza.place().directory("1").join("2/3");
    fs::create_dir_all(&working).unwrap();
    let run = |arguments: &[&str]| run_command(stanza.command().current_dir(&working).args(arguments));

    let plain = stanza.place().join("plain");
    let refused = run(&["restore", text(&plain)]).fails(1, "is the place of tablespace");
    assert!(refused.stderr.contains("--tablespace-map") && !refused.stderr.contains("--delta"), "{}", refused.stderr);
    assert!(!plain.exists());
    let copy = stanza.place().join("copy");
    run(&["restore", text(&copy), "--type=none", "--tablespace-map-all=spaces"]).ok();
    assert!(working.join("spaces/space").is_dir());
    assert_eq!(
        fs::read_dir(stanza.place().join("1")).unwrap().count(),
        1,
        "something was put where nobody asked for it"
    );
    let mut server = opened(&copy);
    assert_eq!(server.psql("SELECT count(*) FROM t;"), "10");
    server.stop(StopMode::Fast);

    // over itself: the live tablespace is made equal, not removed
    cluster.psql("DELETE FROM t WHERE i > 5;");
    cluster.stop(StopMode::Fast);
    run(&["restore", text(cluster.data_directory()), "--type=none", "--delta"]).ok();
    assert!(fs::read_link(&link).unwrap().canonicalize().unwrap() == space);
    cluster.start();
    assert_eq!(cluster.psql("SELECT count(*) FROM t;"), "10");
}

/// The segment that a server was writing when it crashed has no mark, and holds what was committed last.
#[test]
fn what_only_the_crashed_server_has_is_not_removed() {
    let stanza = Stanza::in_directory();
    let mut cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t (i int);");
    stanza.backup(&cluster);
    cluster.psql("INSERT INTO t VALUES (1);");
    let segment = cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn());");
    cluster.stop(StopMode::Immediate);
    let data = cluster.data_directory().to_owned();
    let delta = |kind: &str| stanza.run(["restore", text(&data), "--delta", kind]);
    for kind in ["--type=none", "--type=default"] {
        let refused = delta(kind).fails(1, &format!("there is WAL segment {segment} in"));
        assert!(refused.stderr.contains("archive-push"), "{}", refused.stderr);
    }
    assert!(data.join("global/pg_control").exists() && data.join("pg_wal").join(&segment).exists());

    // archived by hand, it is recovered; and nothing is left to lose
    stanza.run_as_server_user(["archive-push", text(&data.join("pg_wal").join(&segment))]).ok();
    delta("--type=default").ok();
    let mut server = opened(&data);
    assert_eq!(server.psql("SELECT count(*) FROM t;"), "1");
    // this one does not archive: nothing it has was ever to be kept, but it is told
    server.psql("INSERT INTO t VALUES (2);");
    server.stop(StopMode::Immediate);
    drop(server);
    let told = delta("--type=default").ok();
    assert!(told.contains("transactions that the archive does not have"), "{told}");
    assert!(told.contains("did not archive"), "{told}");
}

/// After a clean end everything that matters is archived, and nothing is in the way.
#[test]
fn what_is_archived_is_no_obstacle() {
    let stanza = Stanza::in_directory();
    let mut cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t (i int);");
    stanza.backup(&cluster);
    cluster.psql("INSERT INTO t VALUES (1);");
    cluster.stop(StopMode::Fast);
    stanza.run(["restore", text(cluster.data_directory()), "--delta", "--type=none"]).ok();
    cluster.start();
    assert_eq!(cluster.psql("SELECT count(*) FROM t;"), "0");
}
