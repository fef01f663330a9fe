//! Backups that store what changed: each is its own moment, whatever becomes of the others.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Client, Cluster, Data, Stanza, StopMode, files, install, wait_until};

const LONG: Duration = Duration::from_secs(120);

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

/// Takes a backup of this type; gives what it says of itself.
fn backup(stanza: &Stanza, cluster: &Cluster, kind: &str) -> serde_json::Value {
    json(&stanza.run(["backup", "--type", kind, "--output", "json", "--pg", cluster.conninfo()]).ok())
}

fn label(backup: &serde_json::Value) -> String {
    backup["label"].as_str().unwrap().to_owned()
}

fn stored_new(backup: &serde_json::Value) -> u64 {
    backup["sizes"]["stored-new"].as_u64().unwrap()
}

/// Restores a backup, has its pages judged, and gives the server on it.
fn restored(stanza: &Stanza, label: &str) -> Cluster {
    let copy = stanza.place().join(&format!("copy-{label}"));
    stanza.run(["restore", "--type=none", copy.to_str().unwrap(), "--set", label]).ok();
    let mut cluster = Cluster::open(15, &copy, &[]);
    cluster.stop(StopMode::Fast);
    run_ok(install::client("pg_checksums").args(["--check", "-D"]).arg(&copy), &[], LONG);
    cluster.start();
    cluster
}

fn balanced(client: &Client) -> String {
    client.psql(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)
            AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(delta) FROM pgbench_history);",
    )
}

#[test]
fn each_backup_is_its_moment_also_when_the_others_are_gone() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().checksums(true).wal_segsize_mb(1)).start();
    Data::default().load(&cluster);
    stanza.create(&cluster);
    // without anything to build on, an incremental is a full
    let full = backup(&stanza, &cluster, "incr");
    assert_eq!(full["type"], "full");

    cluster.psql(
        "UPDATE pgbench_accounts SET filler = 'changed' WHERE aid % 997 = 0; CREATE TABLE first AS SELECT 1 AS i;",
    );
    let first = backup(&stanza, &cluster, "incr");
    let at_first = cluster.fingerprint();
    assert_eq!((&first["type"], &first["prior"]), (&"incr".into(), &full["label"]));
    assert!(stored_new(&first) * 5 < stored_new(&full), "{first}");

    // one under load, whose moment is known by its sums alone
    let load = cluster.pgbench_beside(&["-c", "2", "-n", "-T", "600"]);
    let busy = backup(&stanza, &cluster, "incr");
    drop(load);
    assert_eq!(busy["prior"], first["label"]);

    cluster.psql("DROP TABLE first; TRUNCATE pgbench_history; UPDATE pgbench_accounts SET abalance = 0; UPDATE pgbench_branches SET bbalance = 0; UPDATE pgbench_tellers SET tbalance = 0; VACUUM FULL pgbench_accounts;");
    let second = backup(&stanza, &cluster, "diff");
    let at_second = cluster.fingerprint();
    assert_eq!((&second["type"], &second["prior"]), (&"diff".into(), &full["label"]));

    let told = json(&stanza.run(["info", "--output", "json"]).ok());
    let shown: Vec<_> = told[0]["backup"].as_array().unwrap().iter().map(|of| of["type"].as_str().unwrap()).collect();
    assert_eq!(shown, ["full", "incr", "incr", "diff"]);
    assert_eq!(restored(&stanza, &label(&first)).fingerprint(), at_first);
    let at_busy = restored(&stanza, &label(&busy));
    assert_eq!(balanced(&at_busy), "t");
    let mut amcheck = install::client("pg_amcheck");
    amcheck.args(["--all", "--install-missing", "--heapallindexed", "--maintenance-db", at_busy.conninfo()]);
    run_ok(&mut amcheck, &[], LONG);
    drop(at_busy);

    // a full after it stores next to nothing, and outlives everything it shares with
    let again = backup(&stanza, &cluster, "full");
    assert!(stored_new(&again) * 10 < stored_new(&full), "{again}");
    let newest = files::files(Path::new(stanza.repo()));
    assert!(newest.len() > 10);
    wait_until(LONG, "the next second", {
        let last = again["stop-time"].as_i64().unwrap();
        move || now_s() > last + 1
    });
    stanza.run(["expire", "--repo-retention-full=1", "--grace=0", "--force"]).ok();
    let told = json(&stanza.run(["info", "--output", "json"]).ok());
    assert_eq!(told[0]["backup"].as_array().unwrap().len(), 1, "{told}");
    stanza.run(["verify"]).ok();
    assert_eq!(restored(&stanza, &label(&again)).fingerprint(), at_second);
    let clone = stanza.start("clone", &[]);
    assert_eq!(clone.fingerprint(), at_second);
    clone.stop(&[]);
    let mount = stanza.mount("mount", &[]);
    run_ok(install::client("pg_verifybackup").arg(mount.path().join("latest")), &[], LONG);
}

fn now_s() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64
}

#[test]
fn a_killed_backup_is_taken_up_and_nothing_of_it_stays() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().checksums(true).wal_segsize_mb(1)).start();
    Data::default().random_mb(200).load(&cluster);
    stanza.create(&cluster);
    let packs = || {
        let all = files::tree(Path::new(stanza.repo()));
        let packs = all.iter().filter(|(path, metadata)| path.starts_with("chunk") && metadata.is_file());
        packs.map(|(_, metadata)| metadata.len()).sum::<u64>()
    };
    let mut command = stanza.command();
    command.args(["backup", "--process-max=1", "--pg", cluster.conninfo()]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    wait_until(LONG, "some packs", || packs() > 60 << 20);
    child.kill().unwrap();
    child.wait().unwrap();
    let left = packs();
    wait_until(LONG, "the session to end", || {
        cluster.psql("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgcairn backup';") == "0"
    });
    // its lock is that of a dead process on this host: nobody waits for it
    let second = json(&stanza.run(["backup", "--process-max=1", "--output", "json", "--pg", cluster.conninfo()]).ok());
    let whole = second["sizes"]["stored-all"].as_u64().unwrap();
    assert!(
        stored_new(&second) < whole - left * 8 / 10,
        "{} of {whole} stored again after {left}",
        stored_new(&second)
    );
    stanza.run(["verify"]).ok();
    let stop = second["stop-time"].as_i64().unwrap();
    wait_until(LONG, "the next second", || now_s() > stop + 1);
    stanza.run(["expire", "--repo-retention-full=1", "--grace=0", "--force"]).ok();
    let verified = json(&stanza.run(["verify", "--output", "json"]).ok());
    assert_eq!(verified["harms"].as_array().unwrap().len(), 0, "{verified}");
    assert!(packs() < whole + whole / 50 + (1 << 20), "{} bytes of packs, {whole} are needed", packs());
    assert_eq!(restored(&stanza, &label(&second)).fingerprint(), cluster.fingerprint());
}
