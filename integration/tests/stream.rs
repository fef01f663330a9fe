//! Backups over the replication protocol: the server sends its files, and none of them is read here.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Cluster, Data, Stanza, StopMode, install, wait_until};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(120);

/// Takes a backup and gives what it says of itself.
fn backup(stanza: &Stanza, conninfo: &str, arguments: &[&str]) -> Value {
    let told = stanza.run([&["backup", "--output=json", "--pg", conninfo][..], arguments].concat()).ok();
    serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"))
}

fn stored(backup: &Value) -> u64 {
    backup["sizes"]["stored-new"].as_u64().unwrap()
}

/// The backup as a mount and as a restored copy, judged by PostgreSQL's own programs; gives what its tables hold.
fn judged(stanza: &Stanza, major: u32, backup: &Value, name: &str) -> BTreeMap<String, String> {
    let label = backup["label"].as_str().unwrap();
    assert_eq!(backup["page-errors"].as_array().unwrap().len(), 0, "{backup}");
    let mount = stanza.mount(&format!("mount-{name}"), &["--backup", label]);
    if major < 17 {
        run_ok(install::client("pg_verifybackup").arg("-n").arg(mount.path()), &[], LONG);
    }
    drop(mount);
    let (copy, spaces) = (stanza.place().join(&format!("copy-{name}")), stanza.place().join(&format!("spaces-{name}")));
    let map = format!("--tablespace-map-all={}", spaces.display());
    stanza.run(["restore", "--set", label, "--type=immediate", &map, copy.to_str().unwrap()]).ok();
    let mut opened = Cluster::open(major, &copy, &[]);
    let promoted = "SELECT pg_is_in_recovery();";
    wait_until(LONG, "the end of recovery", || {
        opened.psql("SELECT CASE WHEN pg_is_in_recovery() THEN pg_wal_replay_resume() END;");
        opened.psql(promoted) == "f"
    });
    let fingerprint = opened.fingerprint();
    opened.stop(StopMode::Fast);
    // only 15 is installed with this program
    let checksums = install::server(major).join("pg_checksums");
    if checksums.exists() {
        run_ok(install::as_server_user(checksums).arg("-c").arg("-D").arg(&copy), &[], LONG);
    }
    fingerprint
}

/// Runs pgcairn where the server's data directory is hidden behind an empty one, if this user can do that.
fn without_files(stanza: &Stanza, cluster: &Cluster, arguments: &[&str]) -> (bool, String, String) {
    let pgcairn = stanza.command();
    let mut command = match install::server_user() {
        Some(_) => {
            let mut command = Command::new("unshare");
            command.args(["--mount", "sh", "-c", r#"mount -t tmpfs none "$1" && shift && exec "$@""#, "sh"]);
            command.arg(cluster.data_directory()).arg(pgcairn.get_program());
            command
        }
        None => Command::new(pgcairn.get_program()),
    };
    command.args(pgcairn.get_args()).args(arguments);
    let output = command.output().unwrap();
    let [told, complained] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    (output.status.success(), told, complained)
}

fn the_whole_way(major: u32, archiving: bool) {
    let stanza = Stanza::in_directory();
    let builder = Cluster::builder().major(major).wal_segsize_mb(1).checksums(true);
    let cluster = if archiving { stanza.archiving(builder) } else { builder }.start();
    cluster.create_tablespace("elsewhere");
    Data::default().load(&cluster);
    cluster.psql("CREATE TABLE moved TABLESPACE elsewhere AS SELECT i, repeat(md5(i::text), 20) AS t FROM generate_series(1, 20000) AS i;");
    cluster.psql("CREATE UNLOGGED TABLE forgotten AS SELECT generate_series(1, 1000) AS i; CHECKPOINT;");
    cluster.psql("VACUUM FREEZE ANALYZE;");
    stanza.create(&cluster);
    stanza.run(["check", "--source=stream", "--pg", cluster.conninfo()]).ok();
    let pg = cluster.conninfo();
    cluster.psql("DELETE FROM forgotten;");
    let expected = cluster.fingerprint();
    let full = backup(&stanza, pg, &["--source=stream", "--type=full"]);
    assert_eq!(full["wal-stored"], !archiving);
    assert_eq!(judged(&stanza, major, &full, "full"), expected);

    // the files are the same as those that a backup finds that reads them
    let files = backup(&stanza, pg, &["--type=incr"]);
    assert!(stored(&files) * 20 < stored(&full), "{} of {}", stored(&files), stored(&full));
    assert_eq!(paths(&stanza, &full, "full"), paths(&stanza, &files, "files"));
    assert_eq!(full["tablespaces"], files["tablespaces"]);
    assert_eq!((&full["database"], &full["timeline"]), (&files["database"], &files["timeline"]));

    cluster
        .psql("UPDATE moved SET i = -i WHERE i % 1000 = 0; CREATE TABLE made AS SELECT generate_series(1, 100) AS i;");
    let expected = cluster.fingerprint();
    let incr = backup(&stanza, pg, &["--source=stream"]);
    assert_eq!(incr["type"], "incr");
    assert!(stored(&incr) * 20 < stored(&full), "{} of {}", stored(&incr), stored(&full));
    assert_eq!(judged(&stanza, major, &incr, "incr"), expected);
    cluster.psql("UPDATE moved SET i = 7 WHERE i = 17;");
    let expected = cluster.fingerprint();
    let mixed = backup(&stanza, pg, &["--type=incr"]);
    // no time of the stream is trusted
    assert!(mixed["sizes"]["read"].as_u64().unwrap() * 10 > full["sizes"]["read"].as_u64().unwrap() * 9, "{mixed}");
    assert_eq!(judged(&stanza, major, &mixed, "mixed"), expected);
    assert_eq!(cluster.psql("SELECT count(*) FROM pg_replication_slots;"), "0");
    stanza.run(["verify"]).ok();
}

/// Every path of a backup but those of WAL, with what it is.
fn paths(stanza: &Stanza, backup: &Value, name: &str) -> Vec<String> {
    let mount = stanza.mount(&format!("paths-{name}"), &["--backup", backup["label"].as_str().unwrap()]);
    let mut find = std::process::Command::new("find");
    find.arg("-L").arg(mount.path()).args(["-not", "-path", "*/pg_wal/*", "-printf", "%P %y %m %u\n"]);
    let told = String::from_utf8(find.output().unwrap().stdout).unwrap();
    let mut paths: Vec<_> = told.lines().map(str::to_owned).collect();
    paths.sort();
    assert!(paths.len() > 500);
    paths
}

#[test]
fn postgresql_13() {
    the_whole_way(13, true);
}

#[test]
fn postgresql_15() {
    the_whole_way(15, true);
}

#[test]
fn postgresql_18() {
    the_whole_way(18, true);
}

#[test]
fn wal_comes_in_the_stream_on_13() {
    the_whole_way(13, false);
}

#[test]
fn wal_comes_in_the_stream_on_18() {
    the_whole_way(18, false);
}

#[test]
fn nothing_of_a_busy_server_is_read_here() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1).checksums(true)).start();
    Data::default().load(&cluster);
    stanza.create(&cluster);
    cluster.psql(
        "CREATE ROLE far LOGIN REPLICATION PASSWORD 'secret'; GRANT pg_monitor TO far;
         GRANT EXECUTE ON FUNCTION pg_create_restore_point, pg_switch_wal TO far;",
    );
    let far = cluster.conninfo().replace("user=postgres", "user=far password=secret");
    let hba = cluster.data_directory().join("pg_hba.conf");
    let trusting = fs::read_to_string(&hba).unwrap();
    fs::write(&hba, format!("local all far scram-sha-256\n{trusting}")).unwrap();
    cluster.psql("SELECT pg_reload_conf();");
    if install::server_user().is_some() {
        let (good, _, told) = without_files(&stanza, &cluster, &["backup", "--pg", &far]);
        assert!(!good && told.contains("--source=stream"), "{told}");
    }

    let busy = cluster.pgbench_beside(&["-c", "2", "-n", "-T", "600"]);
    let count = || -> u64 { cluster.psql("SELECT count(*) FROM pgbench_history;").parse().unwrap() };
    wait_until(LONG, "transactions", || count() > 200);
    let before = count();
    for (number, kind) in ["--type=full", "--type=incr", "--type=incr"].into_iter().enumerate() {
        let arguments = ["backup", "--output=json", "--pg", &far, "--source=stream", kind, "--process-max=2"];
        let (good, told, complained) = without_files(&stanza, &cluster, &arguments);
        assert!(good, "{complained}");
        let taken: Value = serde_json::from_str(&told).unwrap();
        judged(&stanza, 15, &taken, &number.to_string());
        let copy = stanza.place().join(&format!("copy-{number}"));
        let opened = Cluster::open(15, &copy, &[]);
        assert_eq!(
            opened.psql("SELECT sum(abalance) FROM pgbench_accounts;"),
            opened.psql("SELECT sum(delta) FROM pgbench_history;")
        );
        assert!(opened.psql("SELECT count(*) FROM pgbench_history;").parse::<u64>().unwrap() >= before);
        let amcheck = ["--all", "--install-missing", "--heapallindexed", "--maintenance-db", opened.conninfo()];
        run_ok(install::client("pg_amcheck").args(amcheck), &[], LONG);
    }
    drop(busy);
}

#[test]
fn what_cannot_be_streamed_is_said_and_leaves_nothing() {
    let stanza = Stanza::in_directory();
    let mut cluster = Cluster::builder().checksums(true).conf("max_wal_senders", "1").start();
    Data::default().load(&cluster);
    cluster.psql("CREATE TABLE wide AS SELECT i, repeat(md5(i::text), 30) FROM generate_series(1, 200000) AS i;");
    stanza.create(&cluster);
    let take = |pg: &str| stanza.run(["backup", "--source=stream", "--pg", pg]);

    cluster.psql("CREATE ROLE weak LOGIN; GRANT pg_monitor TO weak;");
    let weak = cluster.conninfo().replace("user=postgres", "user=weak");
    take(&weak).fails(1, "refuses a connection for replication").fails(1, "REPLICATION");

    let other = Cluster::builder().start();
    take(other.conninfo()).fails(1, "system identifier");
    drop(other);

    // the server dies while it sends
    let mut command = stanza.command();
    command.args(["backup", "--source=stream", "--pg", cluster.conninfo()]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let sending = "SELECT pid FROM pg_stat_progress_basebackup WHERE backup_streamed > 1000000;";
    let mut told = String::new();
    wait_until(LONG, "the server to send", || {
        told = cluster.psql(sending);
        assert!(child.try_wait().unwrap().is_none(), "the backup was too quick");
        !told.is_empty()
    });
    let sender = Pid::from_raw(told.parse().unwrap());
    // what it does not send any more cannot make the backup complete meanwhile
    kill(sender, Signal::SIGSTOP).unwrap();
    // no second sender is free
    let refused = take(cluster.conninfo());
    assert!(refused.stderr.contains("max_wal_senders") || refused.stderr.contains("is running"), "{}", refused.stderr);
    kill(sender, Signal::SIGKILL).unwrap();
    let ended = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success() && told.contains("did not arrive"), "{told}");
    wait_until(LONG, "recovery", || cluster.try_psql("SELECT 1;").is_ok());
    let told = stanza.run(["info", "--output", "json"]).ok();
    let json: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(json[0]["backup"].as_array().map_or(0, Vec::len), 0, "{told}");

    cluster.psql("ALTER SYSTEM SET max_wal_senders = 0;");
    cluster.restart();
    take(cluster.conninfo()).fails(1, "refuses a connection for replication").fails(1, "max_wal_senders");
    cluster.psql("ALTER SYSTEM RESET max_wal_senders;");
    cluster.restart();
    let taken = backup(&stanza, cluster.conninfo(), &["--source=stream"]);
    judged(&stanza, 15, &taken, "after");
}
