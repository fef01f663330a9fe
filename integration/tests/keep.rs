//! Keeping on a real cluster: what expire removes, what it leaves, and whether that is whole.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Cluster, Data, Stanza, files, install};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(120);

fn json(told: &str) -> Value {
    serde_json::from_str(told).unwrap_or_else(|error| panic!("{error} in {told}"))
}

fn labels(stanza: &Stanza) -> Vec<String> {
    let info = json(&stanza.run(["info", "--output", "json"]).ok());
    let backups = info[0]["backup"].as_array().unwrap();
    backups.iter().map(|backup| backup["label"].as_str().unwrap().to_owned()).collect()
}

/// All objects, for comparing.
fn objects(stanza: &Stanza) -> Vec<std::path::PathBuf> {
    files::files(stanza.repo().as_ref()).into_iter().filter(|path| !path.starts_with(".tmp")).collect()
}

fn modified(stanza: &Stanza, path: &std::path::Path) -> i64 {
    std::os::unix::fs::MetadataExt::mtime(&fs::metadata(std::path::Path::new(stanza.repo()).join(path)).unwrap())
}

fn now_s() -> i64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64
}

#[test]
fn what_expire_leaves_is_whole() {
    let stanza = Stanza::in_directory();
    let mut cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    Data::tiny().load(&cluster);
    // most of what the first backup stores; full backups share what is the same, but no other one needs this
    cluster.psql(
        "CREATE TABLE gone AS SELECT decode(string_agg(md5(random()::text), ''), 'hex') AS noise
         FROM generate_series(1, 640000) AS i GROUP BY i % 10000;",
    );
    stanza.create(&cluster);
    let first = stanza.backup(&cluster);
    cluster.psql("DROP TABLE gone; CHECKPOINT;");
    let second = stanza.backup(&cluster);
    cluster.psql("CREATE TABLE third AS SELECT generate_series(1, 20000) AS i; CHECKPOINT;");
    let third = stanza.backup(&cluster);
    let expected = cluster.fingerprint();
    assert_eq!(labels(&stanza), [first.clone(), second.clone(), third.clone()]);

    let retention = ["--repo-retention-full=1", "--grace=0", "--force"];
    let run = |more: &[&str]| stanza.run([&["expire"][..], &retention, more].concat());
    let before = objects(&stanza);
    let told = run(&["--dry-run"]).ok();
    assert!(told.contains(&format!("backup {first}: would be removed: older than the last 1 full")), "{told}");
    assert!(told.contains(&format!("backup {third}: kept: the last full backup")), "{told}");
    assert_eq!(objects(&stanza), before);

    let mount = stanza.mount("before", &[]);
    // what was written in this very second could belong to a backup that has just begun
    let newest = objects(&stanza).iter().map(|path| modified(&stanza, path)).max().unwrap();
    pgcairn_integration::wait_until(LONG, "the next second", || now_s() > newest);
    let report = json(&run(&["--output", "json"]).ok());
    assert!(report["packs"]["deleted"].as_u64().unwrap() > 0, "{report}");
    assert!(report["archives"][0]["removed"].as_u64().unwrap() > 0, "{report}");
    assert_eq!(labels(&stanza), std::slice::from_ref(&third));
    // a reader that was there before gets errors or right bytes; what is kept it reads on
    let kept = mount.path().join("backups").join(&third);
    run_ok(install::client("pg_verifybackup").arg(&kept), &[], LONG);
    drop(mount);
    let again = json(&run(&["--output", "json"]).ok());
    assert_eq!((&again["packs"]["unneeded"], &again["packs"]["deleted"]), (&0.into(), &0.into()), "{again}");

    let copy = stanza.place().join("copy");
    stanza.run(["restore", "--type=none", copy.to_str().unwrap()]).ok();
    assert_eq!(Cluster::open(15, &copy, &[]).fingerprint(), expected);
    stanza.run(["expire", "--set", &third]).fails(1, "last full backup");

    // after a backup it runs by itself; never with a grace period that needs --force
    stanza.run(["backup", "--pg", cluster.conninfo(), retention[0], retention[1]]).fails(1, "shorter than 3600 s");
    let mut backup = stanza.command();
    backup.args(["backup", "--type=full", "--pg", cluster.conninfo(), retention[0]]);
    run_ok(&mut backup, &[], LONG);
    assert_eq!(labels(&stanza).len(), 1);
    assert_ne!(labels(&stanza), [third]);
    assert!(
        !fs::exists(format!("{}/lock/main", stanza.repo())).unwrap() || {
            fs::read_dir(format!("{}/lock/main", stanza.repo())).unwrap().next().is_none()
        }
    );
    cluster.stop(pgcairn_integration::StopMode::Fast);
}

#[test]
fn a_stanza_goes_on_with_an_upgraded_cluster() {
    let stanza = Stanza::in_directory();
    let old = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    Data::tiny().load(&old);
    stanza.create(&old);
    let told = stanza.run(["stanza-upgrade", "--pg", old.conninfo()]).ok();
    assert!(told.contains("nothing to do"), "{told}");
    let before = stanza.backup(&old);
    let expected = old.fingerprint();
    drop(old);

    // what pg_upgrade makes is a new cluster with another identifier
    let new = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    new.psql("CREATE TABLE upgraded AS SELECT 1 AS one;");
    let refused = stanza.run(["backup", "--pg", new.conninfo()]).fails(1, "but the server is PostgreSQL 15");
    assert!(refused.stderr.contains("stanza-upgrade"), "{refused:?}");
    let told = stanza.run(["stanza-upgrade", "--pg", new.conninfo()]).ok();
    assert!(told.contains("archive 15-2"), "{told}");
    stanza.run(["check", "--pg", new.conninfo()]).ok();
    let after = stanza.backup(&new);
    assert_eq!(labels(&stanza), [before.clone(), after.clone()]);
    let info = json(&stanza.run(["info", "--output", "json"]).ok());
    assert_eq!(info[0]["backup"][0]["database"]["id"], 1);
    assert_eq!(info[0]["backup"][1]["database"]["id"], 2);
    assert!(fs::exists(format!("{}/archive/main/15-2", stanza.repo())).unwrap());
    for (label, table) in [(&before, None), (&after, Some("upgraded"))] {
        let copy = stanza.place().join(label);
        stanza.run(["restore", "--type=none", "--set", label, copy.to_str().unwrap()]).ok();
        let cluster = Cluster::open(15, &copy, &[]);
        match table {
            None => assert_eq!(cluster.fingerprint(), expected),
            Some(table) => assert_eq!(cluster.psql(&format!("SELECT count(*) FROM {table};")), "1"),
        }
    }
    // the old one's backups and WAL go by the same retention
    stanza.run(["expire", "--repo-retention-full=1", "--grace=0", "--force"]).ok();
    assert_eq!(labels(&stanza), [after]);
    assert_eq!(files::files(format!("{}/archive/main/15-1", stanza.repo()).as_ref()).len(), 0);
}

#[test]
fn a_killed_backup_does_not_lock_the_next_one_out() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    Data::tiny().random_mb(2).load(&cluster);
    stanza.create(&cluster);
    let mut command: Command = stanza.command();
    let mut child = command.args(["backup", "--pg", cluster.conninfo()]).spawn().unwrap();
    let locks = std::path::Path::new(stanza.repo()).join("lock/main");
    let held = || fs::read_dir(&locks).is_ok_and(|mut locks| locks.next().is_some());
    let since = |entry: fs::DirEntry| fs::read_to_string(entry.path()).is_ok_and(|text| text.contains("\"since\""));
    let taken = || fs::read_dir(&locks).is_ok_and(|locks| locks.flatten().any(since));
    pgcairn_integration::wait_until(LONG, "the lock", taken);
    // it must not come to its end
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), Signal::SIGSTOP).unwrap();
    let info = json(&stanza.run(["info", "--output", "json"]).ok());
    assert_eq!(info[0]["status"]["lock"]["backup"]["held"], true, "{info}");
    assert!(stanza.run(["info"]).ok().contains("a backup"));
    stanza.run(["stanza-upgrade", "--pg", cluster.conninfo()]).fails(1, "stanza main is locked: a backup");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(held());
    cluster.wait_for_backup_sessions_to_end();
    stanza.backup(&cluster);
    assert!(!held());
}

/// What `verify --output json` says, whatever its exit status.
fn verify(stanza: &Stanza, more: &[&str]) -> Value {
    let output = stanza.run([&["verify", "--output", "json"][..], more].concat());
    let report = json(&output.stdout);
    assert_eq!(output.code, Some(if report["sound"] == true { 0 } else { 1 }), "{output:?}");
    report
}

#[test]
fn verify_names_what_is_harmed_and_by_what() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    Data::tiny().random_mb(2).load(&cluster);
    stanza.create(&cluster);
    let first = stanza.backup(&cluster);
    cluster.psql("CREATE TABLE second AS SELECT i, md5(i::text) FROM generate_series(1, 20000) AS i;");
    let second = stanza.backup(&cluster);
    for more in [&[][..], &["--quick"]] {
        let report = verify(&stanza, more);
        assert!(report["sound"] == true && report["notes"].as_array().unwrap().is_empty(), "{report}");
    }
    let text = stanza.run(["verify"]).ok();
    assert!(text.contains(&format!("backup {second}: sound")), "{text}");

    // one byte in the middle of the largest pack
    let repo = std::path::Path::new(stanza.repo());
    let packs = files::files(&repo.join("chunk"));
    let size = |path: &&std::path::PathBuf| fs::metadata(repo.join("chunk").join(path)).unwrap().len();
    let pack = repo.join("chunk").join(packs.iter().max_by_key(size).unwrap());
    let whole = fs::read(&pack).unwrap();
    let mut spoilt = whole.clone();
    spoilt[whole.len() / 3] ^= 1;
    fs::write(&pack, &spoilt).unwrap();
    let report = verify(&stanza, &[]);
    let harms = report["harms"].as_array().unwrap();
    assert_eq!(harms.len(), 1, "{report}");
    assert!(pack.ends_with(harms[0]["object"].as_str().unwrap()), "{report}");
    let harmed = harms[0]["backups"].as_array().unwrap();
    assert!(!harmed.is_empty() && harmed.iter().all(|label| [&first, &second].iter().any(|known| label == *known)));
    let output = stanza.run(["verify"]).fails(1, "stanza main is harmed: 1 objects, 0 gaps");
    assert!(output.stdout.contains("harmed in 1 files"), "{output:?}");
    // what lies in a harmed pack is stored anew, whatever kind of backup it is
    for kind in ["incr", "full"] {
        stanza.run(["backup", "--type", kind, "--pg", cluster.conninfo()]).ok();
    }
    let report = verify(&stanza, &[]);
    let sound: Vec<bool> = report["backups"].as_array().unwrap().iter().map(|backup| backup["sound"] == true).collect();
    assert!(sound.len() == 4 && sound[2..] == [true, true] && sound[..2].contains(&false), "{report}");
    fs::write(&pack, &whole).unwrap();
    assert!(verify(&stanza, &[])["sound"] == true);
    assert!(files::files(&repo.join("harm")).is_empty());

    // a segment that no backup needs, but points in time do
    let segment = {
        let info = json(&stanza.run(["info", "--output", "json"]).ok());
        let stop = info[0]["backup"][0]["archive"]["stop"].as_str().unwrap().to_owned();
        let start = info[0]["backup"][1]["archive"]["start"].as_str().unwrap().to_owned();
        let between = |path: &&std::path::PathBuf| {
            let name = path.file_name().unwrap().to_str().unwrap();
            name.as_bytes()[24] == b'-' && name[..24] > *stop && name[..24] < *start
        };
        let all = files::files(&repo.join("archive/main/15-1"));
        repo.join("archive/main/15-1").join(all.iter().find(between).expect("WAL between the backups"))
    };
    fs::remove_file(&segment).unwrap();
    let report = verify(&stanza, &["--quick"]);
    assert!(report["harms"].as_array().unwrap().is_empty(), "{report}");
    assert_eq!((&report["gaps"][0]["after"], &report["gaps"][0]["until"]), (&first.into(), &second.into()), "{report}");
    assert_eq!(report["gaps"].as_array().unwrap().len(), 1);

    // the summaries can be made again
    for key in ["archive/main/archive.info", "archive/main/archive.info.copy", "backup/main/backup.info"] {
        fs::remove_file(repo.join(key)).unwrap();
    }
    stanza.run(["info"]).fails(1, "does not exist");
    stanza.run(["repo", "repair"]).ok();
    assert_eq!(labels(&stanza).len(), 4);
    stanza.run(["check", "--pg", cluster.conninfo()]).ok();
}

/// Retention removes a backup for newer ones. One whose WAL is gone is none.
#[test]
fn a_backup_whose_wal_is_gone_stands_for_no_other() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    stanza.create(&cluster);
    let (first, second) = (stanza.backup(&cluster), stanza.backup(&cluster));
    let info = json(&stanza.run(["info", "--output", "json"]).ok());
    let segment = info[0]["backup"][1]["archive"]["start"].as_str().unwrap().to_owned();
    let object = objects(&stanza).into_iter().find(|path| path.to_str().unwrap().contains(&format!("/{segment}-")));
    let object = std::path::Path::new(stanza.repo()).join(object.unwrap());
    let aside = stanza.place().join("aside");
    fs::rename(&object, &aside).unwrap();

    let expire = ["expire", "--repo-retention-full=1"];
    let told = stanza.run(expire).fails(1, &format!("backups that are not proved: {second}"));
    assert!(
        told.stdout.contains(&format!("backup {second} does not count: WAL segment {segment} is missing")),
        "{told:?}"
    );
    assert!(told.stdout.contains("pgcairn verify") && told.stderr.contains("hint:"), "{told:?}");
    assert_eq!(labels(&stanza), [first.clone(), second.clone()]);
    stanza.run(["expire", &format!("--set={first}")]).fails(1, "no other full backup is proved");
    // a backup that ends well warns
    let third = stanza.run(["backup", "--type=full", "--repo-retention-full=2", "--pg", cluster.conninfo()]);
    assert!(third.stderr.contains(&format!("backup {second} does not count")), "{third:?}");
    third.ok();
    assert_eq!(labels(&stanza)[..2], [first.clone(), second.clone()]);

    fs::rename(&aside, &object).unwrap();
    stanza.run(["expire", "--repo-retention-full=2"]).ok();
    let left = labels(&stanza);
    assert!(left.len() == 2 && left[0] == second, "{left:?}");
}
