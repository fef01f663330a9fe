//! A backup is that of the server whose WAL the archive holds, and no copy of it is taken for it.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use pgcairn::backup::preflight::{await_told, identify, prove_archiving};
use pgcairn::backup::server::Server;
use pgcairn::format::manifest::Database;
use pgcairn::repo::Repository;
use pgcairn::store::{self, StoreOptions};
use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Cluster, Output, Stanza, StopMode, install, stanza, wait_until};

const LONG: Duration = Duration::from_secs(120);

/// A server that archives into a new stanza.
fn archiving() -> (Stanza, Cluster) {
    let stanza = Stanza::in_directory();
    let builder = Cluster::builder().wal_segsize_mb(1).conf("wal_keep_size", "100MB");
    let cluster = stanza.archiving(builder).start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t (i int);");
    (stanza, cluster)
}

/// Writes rows and ends a segment with each.
fn write(cluster: &Cluster, rows: std::ops::Range<u32>) {
    for row in rows {
        cluster.psql(&format!("INSERT INTO t VALUES ({row});"));
        cluster.psql("SELECT pg_switch_wal();");
    }
}

/// Waits until the server's last finished segment is in the archive.
fn settle(cluster: &Cluster) {
    let last = "SELECT pg_walfile_name(pg_switch_wal());";
    cluster.psql("SELECT pg_logical_emit_message(false, 'x', 'y');");
    let last = cluster.psql(last);
    wait_until(LONG, "the archiver", || cluster.psql("SELECT last_archived_wal FROM pg_stat_archiver;") >= last);
}

/// Copies a directory as an administrator would.
fn copy(from: &Path, to: &Path) {
    run_ok(std::process::Command::new("cp").arg("-a").arg(from).arg(to), &[], LONG);
}

fn backup(stanza: &Stanza, of: &Cluster, options: &[&str]) -> Output {
    stanza.run([&["backup", "--type=full", "--archive-timeout=10", "--pg", of.conninfo()][..], options].concat())
}

fn check(stanza: &Stanza, of: &Cluster) -> Output {
    stanza.run(["check", "--archive-timeout=10", "--pg", of.conninfo()])
}

fn labels(stanza: &Stanza) -> Vec<PathBuf> {
    let directory = Path::new(stanza.repo()).join("backup").join(stanza::NAME);
    let mut labels: Vec<PathBuf> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    labels.retain(|path| path.join("backup.manifest").exists());
    labels.sort();
    labels
}

/// The repository and a session with the server, for what a race would show.
fn session(stanza: &Stanza, of: &Cluster) -> (Repository, Server, Database) {
    let opened = store::open(stanza.repo(), &StoreOptions::default(), false).unwrap();
    let repository = Repository::new(opened, stanza::NAME).unwrap();
    let mut server = Server::connect(of.conninfo()).unwrap();
    let database = identify(&mut server).unwrap();
    (repository, server, database)
}

#[test]
fn a_machine_that_went_back_to_a_snapshot_is_refused() {
    let (stanza, mut cluster) = archiving();
    let first = stanza.backup(&cluster);
    write(&cluster, 0..2);
    cluster.stop(StopMode::Fast);
    let snapshot = stanza.place().join("snapshot");
    copy(cluster.data_directory(), &snapshot);
    cluster.start();
    write(&cluster, 2..8);
    settle(&cluster);
    cluster.stop(StopMode::Fast);
    std::fs::remove_dir_all(cluster.data_directory()).unwrap();
    copy(&snapshot, cluster.data_directory());
    cluster.start();
    cluster.psql("INSERT INTO t VALUES (1000);");
    check(&stanza, &cluster).fails(1, "which the server, at").fails(1, "snapshot");
    for wal in ["auto", "stored"] {
        backup(&stanza, &cluster, &["--repo-retention-full=1", "--wal", wal]).fails(1, "which the server, at");
    }
    assert_eq!(labels(&stanza).len(), 1);
    assert!(labels(&stanza)[0].ends_with(&first));
    let clone = stanza.start("clone", &["--type=default"]);
    assert_eq!(clone.psql("SELECT count(*) FROM t;"), "8");
    clone.stop(&[]);
}

/// Where the archive is not ahead, names say nothing: the content does.
#[test]
fn other_wal_under_the_same_names_proves_nothing() {
    let (stanza, mut cluster) = archiving();
    write(&cluster, 0..2);
    settle(&cluster);
    cluster.stop(StopMode::Fast);
    let copied = stanza.place().join("copied");
    copy(cluster.data_directory(), &copied);
    // the copy archives first; the first server is told that all is well whatever it archives
    let twin = Cluster::open(15, &copied, &[]);
    write(&twin, 0..6);
    settle(&twin);
    cluster.start();
    cluster.psql("ALTER SYSTEM SET archive_command = 'true';");
    cluster.psql("SELECT pg_reload_conf();");
    let (repository, mut server, database) = session(&stanza, &cluster);
    let error = prove_archiving(&mut server, &repository, &database, LONG).unwrap_err();
    assert!(error.to_string().contains("the archive holds other WAL as"), "{error}");
    // of the other one it is the WAL
    let (repository, mut server, database) = session(&stanza, &twin);
    let segment = prove_archiving(&mut server, &repository, &database, LONG).unwrap();
    await_told(&mut server, segment, segment, LONG).unwrap();
    backup(&stanza, &cluster, &[]).fails(1, "which the server, at");
    stanza.backup(&twin);
}

#[test]
fn a_copy_a_mount_and_a_clone_are_not_backed_up_as_the_cluster() {
    let (stanza, cluster) = archiving();
    let first = stanza.backup(&cluster);
    write(&cluster, 0..2);
    settle(&cluster);
    let target = stanza.place().join("copy");
    stanza.run(["restore", "--type=none", target.to_str().unwrap()]).ok();
    let copy = Cluster::open(15, &target, &[]);
    write(&copy, 100..104);
    for wal in ["auto", "stored"] {
        let refused = backup(&stanza, &copy, &["--repo-retention-full=1", "--wal", wal]);
        refused.fails(1, "archive_mode is off on this server").fails(1, "--archive-mode-check=n");
    }
    check(&stanza, &copy).fails(1, "archive_mode is off on this server");
    let clone = stanza.start("clone", &[]);
    for options in [&[][..], &["--archive-mode-check=n"], &["--source=stream"]] {
        let arguments = [&["backup", "--pg", clone.conninfo()][..], options].concat();
        stanza.run(arguments).fails(1, "is a mount or a clone of a backup");
    }
    clone.stop(&[]);
    assert!(labels(&stanza).len() == 1 && labels(&stanza)[0].ends_with(&first));
    // a server that no longer archives is backed up if that is said
    drop(copy);
    let mut cluster = cluster;
    cluster.psql("ALTER SYSTEM SET archive_mode = off;");
    cluster.restart();
    backup(&stanza, &cluster, &[]).fails(1, "archive_mode is off on this server");
    backup(&stanza, &cluster, &["--archive-mode-check=n"]).ok();
}

/// A copy of a cluster that has no archive either is behind the backups of the cluster.
#[test]
fn a_copy_that_is_behind_the_backups_is_refused() {
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t (i int);");
    stanza.backup(&cluster);
    let target = stanza.place().join("copy");
    stanza.run(["restore", target.to_str().unwrap()]).ok();
    write(&cluster, 0..5);
    let second = stanza.backup(&cluster);
    let copy = Cluster::open(15, &target, &[]);
    backup(&stanza, &copy, &[]).fails(1, &format!("backup {second} ended at")).fails(1, "standby.signal");
    check(&stanza, &copy).fails(1, &format!("backup {second} ended at"));
    stanza.backup(&cluster);
}

/// A restored copy archives on a timeline of its own, or not at all; and a stanza is not begun again over what it holds.
#[test]
fn what_is_missing_is_named_and_nothing_begins_again_over_it() {
    let (stanza, cluster) = archiving();
    let first = stanza.backup(&cluster);
    let target = stanza.place().join("copy");
    let preserve = ["restore", "--archive-mode=preserve", "--type=none", target.to_str().unwrap()];
    stanza.run(preserve).fails(1, "--archive-mode=preserve without a recovery target").fails(1, "--type=immediate");
    let shutdown = ["restore", "--archive-mode=preserve", "--type=immediate", "--target-action=shutdown"];
    let refused = stanza.run(shutdown.into_iter().chain([target.to_str().unwrap()]));
    refused.fails(1, "archives on its source's timeline").fails(1, "--target-action=promote");
    assert!(!target.exists());

    write(&cluster, 0..4);
    settle(&cluster);
    let repo = Path::new(stanza.repo());
    let of_archive = |path: &PathBuf| path.components().any(|part| part.as_os_str() == "0000000100000000");
    let mut segments: Vec<PathBuf> = pgcairn_integration::files::files(repo).into_iter().filter(of_archive).collect();
    segments.retain(|path| path.file_name().unwrap().to_str().unwrap().as_bytes()[24] == b'-');
    segments.sort();
    let lost = repo.join(&segments[segments.len() - 3]);
    std::fs::rename(&lost, stanza.place().join("lost")).unwrap();
    let told = check(&stanza, &cluster);
    assert!(told.stderr.contains("is missing in the archive") && told.stderr.contains(&first), "{told:?}");
    told.ok();
    let strict = stanza.run(["check", "--strict", "--pg", cluster.conninfo()]);
    strict.fails(1, "is missing in the archive").fails(1, "take a backup now");
    std::fs::rename(stanza.place().join("lost"), &lost).unwrap();
    stanza.run(["check", "--strict", "--pg", cluster.conninfo()]).ok();

    for name in ["archive.info", "archive.info.copy"] {
        std::fs::remove_file(repo.join("archive/main").join(name)).unwrap();
    }
    let create = ["stanza-create", "--pg", cluster.conninfo()];
    stanza.run(create).fails(1, "but other objects").fails(1, "repo repair");
    stanza.run(["repo", "repair"]).ok();
    stanza.run(create).ok();
    stanza.run(["verify"]).ok();
    stanza.run(["check", "--strict", "--pg", cluster.conninfo()]).ok();
}

/// Whatever a replacement recovers to, it archives nothing on the timeline of its source, which
/// goes on.
#[test]
fn a_replacement_archives_on_a_timeline_of_its_own() {
    let (stanza, cluster) = archiving();
    stanza.backup(&cluster);
    write(&cluster, 0..2);
    let (time, lsn) = (cluster.psql("SELECT clock_timestamp();"), cluster.psql("SELECT pg_current_wal_insert_lsn();"));
    write(&cluster, 2..4);
    settle(&cluster);
    let segments = || {
        let mut found = pgcairn_integration::files::files(Path::new(stanza.repo()));
        found.retain(|path| path.components().any(|part| part.as_os_str() == "0000000100000000"));
        found.len()
    };
    let (time, lsn) = (format!("--target={time}"), format!("--target={lsn}"));
    let targets: [&[&str]; 5] = [
        &["--type=immediate"],
        &["--type=default", "--target-timeline=1"],
        &["--type=time", &time, "--target-timeline=1"],
        &["--type=lsn", &lsn, "--target-timeline=1"],
        &["--type=standby", "--target-timeline=1"],
    ];
    for (number, target) in targets.into_iter().enumerate() {
        let before = segments();
        let copy = stanza.place().join(&format!("copy{number}"));
        let restore = ["restore", "--archive-mode=preserve", copy.to_str().unwrap()];
        stanza.run([&restore[..], target].concat()).ok();
        let replacement = Cluster::open(15, &copy, &[]);
        wait_until(LONG, "the replacement to be open", || replacement.try_psql("SELECT 1;").is_ok());
        wait_until(LONG, "the end of recovery", || {
            replacement.psql("SELECT pg_is_in_recovery();") == "f"
                || replacement.try_psql("SELECT pg_promote();").is_err()
        });
        let segment = replacement.psql("CREATE TABLE own (); SELECT pg_walfile_name(pg_current_wal_lsn());");
        settle(&replacement);
        assert!(!segment.starts_with("00000001"), "{target:?}: {segment}");
        assert_eq!(segments(), before, "{target:?}");
    }
    stanza.run(["verify"]).ok();
}

/// The stanza goes on with another cluster; what asks for WAL gets that of its own.
#[test]
fn an_old_backup_recovers_to_the_end_of_its_own_archive() {
    let (stanza, mut cluster) = archiving();
    let label = stanza.backup(&cluster);
    write(&cluster, 0..5);
    settle(&cluster);
    cluster.stop(StopMode::Fast);
    // its WAL has the same names
    let other = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    stanza.run(["stanza-upgrade", "--pg", other.conninfo()]).ok();
    other.psql("CREATE TABLE t AS SELECT generate_series(1, 100000) AS i;");
    write(&other, 0..20);
    settle(&other);
    stanza.backup(&other);
    for (name, asynchronous) in [("copy", "n"), ("ahead", "y")] {
        let copy = stanza.place().join(name);
        stanza.run(["restore", "--set", &label, "--type=default", copy.to_str().unwrap()]).ok();
        // the workers of both leave what they fetch in one place
        let conf = std::fs::read_to_string(copy.join("postgresql.auto.conf")).unwrap();
        let ahead = format!(
            "archive-get --archive-async={asynchronous} --spool-path={}",
            stanza.place().join("spool").display()
        );
        std::fs::write(copy.join("postgresql.auto.conf"), conf.replace("archive-get", &ahead)).unwrap();
        let recovered = Cluster::open(15, &copy, &[]);
        wait_until(LONG, "the end of recovery", || recovered.psql("SELECT pg_is_in_recovery();") == "f");
        assert_eq!(recovered.psql("SELECT count(*) FROM t;"), "5", "{name}");
    }
    // the old server no longer archives here, neither segments nor history files
    let pg_wal = cluster.data_directory().join("pg_wal");
    std::fs::write(pg_wal.join("00000002.history"), "1\t0/3000000\tx\n").unwrap();
    let push = |name: &str| stanza.run(["archive-push", pg_wal.join(name).to_str().unwrap()]);
    push("00000002.history").fails(1, "is of the cluster with system identifier");
    // and whoever is of neither gets nothing
    let stranger = Cluster::builder().start();
    let asked = stanza
        .command()
        .args(["archive-get", "000000010000000000000001", "pg_wal/RECOVERYXLOG"])
        .current_dir(stranger.data_directory())
        .output()
        .unwrap();
    assert_eq!(asked.status.code(), Some(250), "{asked:?}");
    assert!(String::from_utf8_lossy(&asked.stderr).contains("the cluster that asks is"), "{asked:?}");
}

/// pg_control names the old timeline until the first checkpoint of the new one.
#[test]
fn check_right_after_a_failover_looks_at_the_new_timeline() {
    let (stanza, mut primary) = archiving();
    stanza.backup(&primary);
    let data = stanza.place().directory("standby");
    let mut basebackup = install::as_server_user(primary.bin_directory().join("pg_basebackup"));
    run_ok(basebackup.args(["-c", "fast", "-R", "-d", primary.conninfo(), "-D"]).arg(&data), &[], LONG);
    // a checkpoint takes its time
    let slow = [("checkpoint_timeout", "1h"), ("checkpoint_completion_target", "0.9")];
    let standby = Cluster::open(15, &data, &slow);
    write(&primary, 0..3);
    let lsn = primary.psql("SELECT pg_current_wal_flush_lsn();");
    wait_until(LONG, "the standby", || standby.psql(&format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}';")) == "t");
    settle(&primary);
    primary.stop(StopMode::Immediate);
    standby.psql("SELECT pg_promote();");
    let told = check(&stanza, &standby).ok();
    assert!(told.contains("WAL segment 00000002"), "{told}");
    stanza.backup(&standby);
    check(&stanza, &standby).ok();
}
