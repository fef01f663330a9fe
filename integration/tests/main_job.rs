//! The main job on PostgreSQL 15: back up a live cluster, mount the backup, start a server on it, copy it out.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn_integration::client::{Client, Session};
use pgcairn_integration::files::{assert_same_bytes, contents, files, tree};
use pgcairn_integration::process::{is_running, run_ok};
use pgcairn_integration::{Cluster, Data, Stanza, StopMode, install, wait_until};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(120);

/// A cluster with a bit of everything, which stays as it was when the backup was taken.
struct Source {
    cluster: Cluster,
    stanza: Stanza,
    label: String,
    dump: String,
    fingerprint: std::collections::BTreeMap<String, String>,
    _temporary: std::sync::Mutex<Session>,
}

/// All tests read the same one; the watchdogs remove it when the process ends.
static SOURCE: LazyLock<Source> = LazyLock::new(|| {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().checksums(true).conf("max_prepared_transactions", "5")).start();
    cluster.create_tablespace("elsewhere");
    Data::default().load(&cluster);
    cluster.psql(
        "CREATE TABLE moved TABLESPACE elsewhere AS SELECT i, md5(i::text) AS note FROM generate_series(1, 20000) AS i;
         CREATE INDEX ON moved (i) TABLESPACE elsewhere;
         CREATE UNLOGGED TABLE moved_unlogged (i int) TABLESPACE elsewhere;
         INSERT INTO moved_unlogged SELECT generate_series(1, 1000);
         CREATE DATABASE second; CREATE ROLE reader; ALTER SYSTEM SET work_mem = '5MB';",
    );
    cluster.database("second").psql("CREATE TABLE there AS SELECT generate_series(1, 10) AS n;");
    let mut temporary = cluster.session();
    temporary.run("CREATE TEMPORARY TABLE mine AS SELECT generate_series(1, 10000) AS i;");
    for (name, bytes) in [("odd \"name\"\té", "kept"), ("empty", "")] {
        fs::write(cluster.data_directory().join(name), bytes).unwrap();
        install::give_to_server_user(&cluster.data_directory().join(name));
    }
    stanza.create(&cluster);
    let again = stanza.run(["stanza-create", "--pg", cluster.conninfo()]).ok();
    assert!(again.contains("exists already"), "{again}");
    let checked = stanza.run(["check", "--pg", cluster.conninfo()]).ok();
    assert!(checked.contains("was archived"), "{checked}");
    let (dump, fingerprint) = (cluster.dumpall(), cluster.fingerprint());
    let label = stanza.backup(&cluster);
    let _temporary = std::sync::Mutex::new(temporary);
    Source { cluster, stanza, label, dump, fingerprint, _temporary }
});

fn server_program(name: &str) -> Command {
    install::as_server_user(install::server(15).join(name))
}

#[test]
fn info_says_what_there_is() {
    let Source { stanza, label, cluster, .. } = &*SOURCE;
    let text = stanza.run(["info"]).ok();
    for part in ["stanza: main", &format!("full backup: {label}"), "WAL archive: 0000000100000000", "stored in all"] {
        assert!(text.contains(part), "no \"{part}\" in: {text}");
    }
    let json: Value = serde_json::from_str(&stanza.run(["info", "--output", "json"]).ok()).unwrap();
    let [main] = json.as_array().unwrap().as_slice() else { panic!("one stanza: {json}") };
    assert_eq!((&main["name"], &main["status"]["code"]), (&"main".into(), &0.into()));
    let system_id = cluster.psql("SELECT system_identifier FROM pg_control_system();");
    assert_eq!(main["db"][0]["system-id"].as_u64().unwrap().to_string(), system_id);
    assert_eq!((&main["db"][0]["version"], &main["archive"][0]["id"]), (&"15".into(), &"15-1".into()));
    let backup = &main["backup"][0];
    assert_eq!((&backup["label"], &backup["type"]), (&label.as_str().into(), &"full".into()));
    let (start, stop) = (&backup["archive"]["start"], &backup["archive"]["stop"]);
    assert!(start.as_str().unwrap() <= stop.as_str().unwrap());
    assert!(main["archive"][0]["min"].as_str().unwrap() <= start.as_str().unwrap());
    assert!(main["archive"][0]["max"].as_str().unwrap() >= stop.as_str().unwrap());
    let (size, stored) = (&backup["info"]["size"], &backup["info"]["repository"]["delta"]);
    assert!(stored.as_u64().unwrap() > 1 << 20 && stored.as_u64() < size.as_u64(), "{backup}");
    assert!(backup["timestamp"]["stop"].as_i64() >= backup["timestamp"]["start"].as_i64());
}

#[test]
fn judges_accept_a_mounted_backup() {
    let Source { stanza, label, cluster, .. } = &*SOURCE;
    let mount = stanza.mount("judged", &[]);
    let top = mount.path();
    let mut names: Vec<_> = fs::read_dir(top).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["backups", "latest", "latest-full", "pitr", "wal"]);
    assert_eq!(fs::read_link(top.join("latest")).unwrap(), Path::new("backups").join(label));
    let backup = top.join("backups").join(label);
    let verified = run_ok(install::client("pg_verifybackup").arg("-n").arg(&backup), &[], LONG);
    assert!(verified.contains("successfully verified"), "{verified}");
    // and with the WAL that consistency needs, which lies in pg_wal
    run_ok(install::client("pg_verifybackup").arg(&backup), &[], LONG);

    let segments = files(&top.join("wal"));
    let segment = segments.iter().find(|path| path.as_os_str().len() == 24).expect("a segment is archived");
    let dumped = run_ok(install::client("pg_waldump").args(["-n", "5"]).arg(top.join("wal").join(segment)), &[], LONG);
    assert_eq!(dumped.lines().count(), 5, "{dumped}");
    for segment in &segments {
        let original = cluster.data_directory().join("pg_wal").join(segment);
        if original.exists() {
            assert_same_bytes(&top.join("wal").join(segment), &original);
        }
    }
    stanza.run(["umount", &top.display().to_string()]).ok();
    wait_until(LONG, "the daemon to end", || mount.serving().is_empty());
    assert!(fs::read_dir(top).unwrap().next().is_none());
}

#[test]
fn a_backup_holds_what_belongs_into_it() {
    let Source { stanza, label, cluster, .. } = &*SOURCE;
    let mount = stanza.mount("whole", &["--backup", label]);
    let shown = tree(mount.path());
    let original = tree(cluster.data_directory());
    let user = fs::metadata(cluster.data_directory()).unwrap().uid();
    assert_eq!(fs::metadata(mount.path()).unwrap().permissions().mode() & 0o7777, 0o700);
    for (path, metadata) in &shown {
        assert_eq!(metadata.uid(), user, "{}", path.display());
        let Some(there) = original.get(path) else { continue };
        assert_eq!(metadata.mode(), there.mode(), "{}", path.display());
    }
    let name = |path: &Path| path.file_name().unwrap().to_string_lossy().into_owned();
    // temporary relations are t<backend>_<filenode>
    let temporary =
        |path: &&PathBuf| name(path).starts_with('t') && name(path).contains('_') && path.starts_with("base");
    assert_ne!(original.keys().filter(temporary).count(), 0);
    assert_eq!(shown.keys().find(temporary), None);
    for path in ["postmaster.pid", "postmaster.opts", ".pgcairn", "tablespace_map"] {
        assert!(!shown.contains_key(Path::new(path)), "{path}");
    }
    for path in ["odd \"name\"\té", "empty", "pg_wal/archive_status", "pg_notify", "backup_label", "backup_manifest"] {
        assert!(shown.contains_key(Path::new(path)), "{path}");
    }
    let unlogged = cluster.psql("SELECT pg_relation_filepath('unlogged_rows');");
    assert!(!shown.contains_key(Path::new(&unlogged)));
    assert!(shown.contains_key(Path::new(&format!("{unlogged}_init"))));
    let oid = cluster.psql("SELECT oid FROM pg_tablespace WHERE spcname = 'elsewhere';");
    let link = fs::read_link(mount.path().join("pg_tblspc").join(&oid)).unwrap();
    assert!(link.is_relative(), "{}", link.display());
    // nothing changed since, so what was not written by a running server is the same
    for relation in ["text_lines", "random_bytes", "moved", "pgbench_accounts_pkey"] {
        let path = cluster.psql(&format!("SELECT pg_relation_filepath('{relation}');"));
        assert_same_bytes(&mount.path().join(&path), &cluster.data_directory().join(&path));
    }
    let write = fs::write(mount.path().join("PG_VERSION"), "16").unwrap_err();
    assert_eq!(write.raw_os_error(), Some(nix::libc::EROFS));
}

fn tablespace_oid(cluster: &Cluster) -> String {
    cluster.psql("SELECT oid FROM pg_tablespace WHERE spcname = 'elsewhere';")
}

#[test]
fn a_restored_copy_is_the_mount_and_the_source() {
    let Source { stanza, label, cluster, dump, fingerprint, .. } = &*SOURCE;
    let (copy, tablespaces) = (stanza.place().join("restored"), stanza.place().join("tablespaces"));
    let map = format!("--tablespace-map-all={}", tablespaces.display());
    let told = stanza.run(["restore", "--type=none", &map, &copy.display().to_string()]).ok();
    assert!(told.contains(label), "{told}");
    let mount = stanza.mount("compared", &["--backup", label]);
    let (shown, written) = (tree(mount.path()), tree(&copy));
    assert_eq!(shown.keys().collect::<Vec<_>>(), written.keys().collect::<Vec<_>>());
    for (path, metadata) in &shown {
        let there = &written[path];
        assert_eq!((metadata.mode(), metadata.uid()), (there.mode(), there.uid()), "{}", path.display());
        if metadata.is_file() {
            assert_eq!(metadata.mtime(), there.mtime(), "{}", path.display());
            assert_same_bytes(&mount.path().join(path), &copy.join(path));
        }
    }
    let oid = tablespace_oid(cluster);
    let left = mount.path().join("pg_tblspc").join(&oid);
    let right = copy.join("pg_tblspc").join(&oid).canonicalize().unwrap();
    assert!(right.starts_with(&tablespaces), "{} leads elsewhere", right.display());
    assert_eq!(files(&left), files(&right));
    assert!(!files(&right).is_empty());
    files(&right).iter().for_each(|path| assert_same_bytes(&left.join(path), &right.join(path)));

    let archive = || contents(Path::new(stanza.repo())).into_keys().filter(|path| path.starts_with("archive")).count();
    let archived = archive();
    let mut opened = Cluster::open(15, &copy, &[]);
    assert_eq!(opened.fingerprint(), *fingerprint);
    assert_eq!(opened.psql("SHOW archive_mode; SHOW work_mem; SELECT count(*) FROM unlogged_rows;"), "off\n5MB\n0");
    assert_same_dump(&opened, dump, &right);
    opened.psql("UPDATE moved SET note = 'x'; SELECT pg_switch_wal(); INSERT INTO unlogged_rows VALUES (1);");
    opened.stop(StopMode::Fast);
    assert_eq!(archive(), archived, "a copy archives into its source's stanza");
    let checked = run_ok(server_program("pg_checksums").arg("--check").arg("-D").arg(&copy), &[], LONG);
    assert!(checked.contains("Bad checksums:  0"), "{checked}");
    assert_eq!(cluster.psql("SELECT count(*) FROM moved WHERE note = 'x';"), "0", "the source was written to");
}

/// The same text, but for where the tablespace is.
fn assert_same_dump(client: &Client, expected: &str, tablespace: &Path) {
    let lines = |text: &str| -> Vec<String> {
        let place = |line: &&str| !line.starts_with("CREATE TABLESPACE");
        text.lines().filter(place).map(str::to_owned).collect()
    };
    let dump = client.dumpall();
    let (ours, theirs) = (lines(&dump), lines(expected));
    let differs = ours.iter().zip(&theirs).find(|(a, b)| a != b);
    assert_eq!((differs, ours.len()), (None, theirs.len()));
    assert!(dump.contains(&tablespace.display().to_string()), "the copy uses another tablespace");
}

#[test]
fn a_copy_of_a_mount_starts() {
    let Source { stanza, label, fingerprint, .. } = &*SOURCE;
    let mount = stanza.mount("copied", &[]);
    let copy = stanza.place().join("copy");
    // -L, since the tablespace's link leads to where a listing does not go; it becomes an in-place one
    let cp = Command::new("cp").arg("-aL").arg(mount.path().join("backups").join(label)).arg(&copy).status().unwrap();
    assert!(cp.success());
    drop(mount);
    let opened = Cluster::open(15, &copy, &[("allow_in_place_tablespaces", "on")]);
    assert_eq!(opened.fingerprint(), *fingerprint);
}

#[test]
fn a_clone_is_a_server_of_its_own() {
    let Source { stanza, cluster, fingerprint, label, .. } = &*SOURCE;
    let archive = || contents(&Path::new(stanza.repo()).join("archive"));
    let archived = archive();
    let clone = stanza.start("first", &["latest", "--option", "work_mem=7MB"]);
    assert!(clone.told().contains(&format!("clone first of backup {label}: first answer after")), "{}", clone.told());
    assert_eq!(clone.fingerprint(), *fingerprint);
    assert_eq!(clone.psql("SHOW work_mem; SHOW archive_mode; SHOW listen_addresses;"), "7MB\noff");
    clone.psql(
        "UPDATE pgbench_accounts SET abalance = 7 WHERE aid <= 1000; UPDATE moved SET note = 'changed';
         CREATE TABLE made AS SELECT generate_series(1, 50000) AS i; DROP TABLE random_bytes; CHECKPOINT;
         VACUUM FULL text_lines; INSERT INTO unlogged_rows VALUES (1); SELECT pg_switch_wal(); CHECKPOINT;",
    );
    assert_eq!(stanza.run(["start", "--name", "first"]).fails(1, "error: clone first runs already").stdout, "");
    let written = clone.fingerprint();

    let options: &[&str] = &["--port", "54777"];
    let second = stanza.start("second", options);
    assert!(second.conninfo().contains("port=54777"), "{}", second.conninfo());
    assert_eq!(second.fingerprint(), *fingerprint, "a clone sees what another wrote");
    second.stop(&[]);
    assert_eq!(clone.fingerprint(), written);

    let data = clone.data_directory();
    let log = stanza.clone_directory("first").join("run/postgresql.log");
    run_ok(server_program("pg_ctl").args(["-s", "-w", "restart", "-D"]).arg(&data).arg("-l").arg(log), &[], LONG);
    assert_eq!(clone.fingerprint(), written, "a restart lost something");
    let amcheck = ["--all", "--install-missing", "--parent-check", "--heapallindexed"];
    run_ok(install::client("pg_amcheck").args(amcheck).args(["--maintenance-db", clone.conninfo()]), &[], LONG);
    run_ok(server_program("pg_ctl").args(["-s", "-w", "-m", "fast", "stop", "-D"]).arg(&data), &[], LONG);
    let checked = run_ok(server_program("pg_checksums").arg("--check").arg("-D").arg(&data), &[], LONG);
    assert!(checked.contains("Bad checksums:  0"), "{checked}");

    let daemon = clone.daemon();
    clone.stop(&[]);
    assert!(!is_running(daemon), "the daemon outlives its mount");
    assert!(!stanza.clone_directory("first").exists());
    assert_eq!(archive(), archived, "a clone archives into its source's stanza");
    assert_eq!(cluster.psql("SELECT count(*) FROM moved WHERE note = 'changed';"), "0");
}

/// Alone with its stanza's clones, so that it can tell what is left.
#[test]
fn stop_keeps_what_it_is_told_to_keep() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i;");
    stanza.create(&cluster);
    stanza.backup(&cluster);
    // a cluster without tablespaces can be copied as it is
    let mount = stanza.mount("mount", &["--backup", "latest"]);
    let copy = stanza.place().join("copy");
    assert!(Command::new("cp").arg("-a").arg(mount.path()).arg(&copy).status().unwrap().success());
    drop(mount);
    assert_eq!(Cluster::open(15, &copy, &[]).psql("SELECT count(*) FROM t;"), "1000");

    let clone = stanza.start("kept", &[]);
    clone.psql("INSERT INTO t SELECT generate_series(1001, 1500);");
    clone.stop(&["--keep"]);
    assert_eq!(stanza.place().leftovers(), Vec::<String>::new());
    let clone = stanza.start("kept", &[]);
    assert_eq!(clone.psql("SELECT count(*) FROM t;"), "1500");
    clone.psql("INSERT INTO t SELECT generate_series(1501, 1600);");
    let (daemon, server) = (clone.daemon(), clone.pid());
    kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
    wait_until(LONG, "the daemon to die", || !is_running(daemon));
    clone.stop(&["--keep"]);
    assert!(!is_running(server), "a server outlives its mount");
    assert_eq!(stanza.place().leftovers(), Vec::<String>::new());
    let clone = stanza.start("kept", &[]);
    assert_eq!(clone.psql("SELECT count(*) FROM t;"), "1600", "what was committed is gone");
    let daemon = clone.daemon();
    kill(Pid::from_raw(daemon), Signal::SIGKILL).unwrap();
    wait_until(LONG, "the daemon to die", || !is_running(daemon));
    clone.stop(&[]);
    stanza.assert_nothing_left();
}
