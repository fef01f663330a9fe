//! A standby as the source, what makes it useless, and a failover between two backups.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use pgcairn::backup::run::{BackupOptions, WalChoice, Wanted, Way, backup};
use pgcairn::postgres::BackupKind;
use pgcairn::progress::{Monitor, Silent};
use pgcairn::repo::Repository;
use pgcairn::store::{self, StoreOptions};
use pgcairn_integration::client::Client;
use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Cluster, Data, Stanza, StopMode, install, stanza, wait_until};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(120);

/// A primary that archives into the stanza, with pgbench's tables.
fn primary(stanza: &Stanza, scale: &str) -> Cluster {
    let builder = Cluster::builder().checksums(true).wal_segsize_mb(1).conf("wal_keep_size", "512MB");
    let primary = stanza.archiving(builder).start();
    primary.pgbench(&["-i", "-q", "-s", scale]);
    stanza.create(&primary);
    primary
}

/// A standby that streams from `primary`.
fn standby(stanza: &Stanza, primary: &Cluster, name: &str) -> Cluster {
    let data = stanza.place().directory(name);
    let mut basebackup = install::as_server_user(primary.bin_directory().join("pg_basebackup"));
    run_ok(basebackup.args(["-c", "fast", "-d", primary.conninfo(), "-D"]).arg(&data), &[], LONG);
    let signal = data.join("standby.signal");
    File::create(&signal).unwrap();
    install::give_to_server_user(&signal);
    let cluster = Cluster::open(15, &data, &[("primary_conninfo", primary.conninfo())]);
    catch_up(primary, &cluster);
    cluster
}

fn catch_up(primary: &Cluster, standby: &Cluster) {
    // the position of the next record is behind a page's header sometimes, where an idle primary does not come
    let lsn = primary.psql("SELECT pg_current_wal_flush_lsn();");
    let passed = format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}';");
    wait_until(LONG, "the standby", || standby.psql(&passed) == "t");
}

/// A backup as it says in JSON.
fn take(stanza: &Stanza, of: &Cluster, options: &[&str]) -> Value {
    let arguments = [&["backup", "--output=json", "--pg", of.conninfo()][..], options].concat();
    serde_json::from_str(&stanza.run(arguments).ok()).unwrap()
}

/// True when the backup read every file.
fn read_all(backup: &Value) -> bool {
    backup["sizes"]["read"] == backup["sizes"]["database"]
}

/// Restores a backup and starts it.
fn restored(stanza: &Stanza, backup: &Value, name: &str) -> Cluster {
    let copy = stanza.place().join(name);
    stanza.run(["restore", "--type=none", "--set", backup["label"].as_str().unwrap(), copy.to_str().unwrap()]).ok();
    Cluster::open(15, &copy, &[])
}

/// Every row and every page is what it should be. The server is down afterwards.
fn assert_sound(mut cluster: Cluster) {
    let balanced =
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
        AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(tbalance) FROM pgbench_tellers);";
    assert_eq!(cluster.psql(balanced), "t");
    let mut amcheck = install::client("pg_amcheck");
    amcheck.args(["--all", "--install-missing", "--heapallindexed", "--maintenance-db", cluster.conninfo()]);
    run_ok(&mut amcheck, &[], LONG);
    cluster.stop(StopMode::Fast);
    let mut checksums = install::as_server_user(cluster.bin_directory().join("pg_checksums"));
    run_ok(checksums.args(["--check", "-D"]).arg(cluster.data_directory()), &[], LONG);
}

/// Files that nothing writes any more, in both directories of the same length and time: as if both had been written an hour ago.
fn settle(clusters: &[&Cluster]) {
    let hour_ago = SystemTime::now() - Duration::from_secs(3600);
    for cluster in clusters {
        let template = cluster.psql("SELECT oid FROM pg_database WHERE datname = 'template0';");
        for entry in std::fs::read_dir(cluster.data_directory().join("base").join(template)).unwrap() {
            File::options().write(true).open(entry.unwrap().path()).unwrap().set_modified(hour_ago).unwrap();
        }
    }
}

fn background_load(of: &Client) -> pgcairn_integration::client::Beside {
    of.pgbench_beside(&["-c", "2", "-n", "-T", "600"])
}

#[test]
fn backups_go_from_the_primary_to_a_standby_and_over_a_failover() {
    let stanza = Stanza::in_directory();
    let mut primary = primary(&stanza, "3");
    let standby = standby(&stanza, &primary, "standby");
    let by_primary = ["--pg-primary", primary.conninfo()];
    settle(&[&primary, &standby]);
    let checked = stanza.run([&["check", "--pg", standby.conninfo()][..], &by_primary].concat()).ok();
    assert!(checked.contains("the server is a standby") && checked.contains("was archived"), "{checked}");

    // a file that has just been written is not known again by its times
    let written = || fs::metadata(standby.data_directory().join("PG_VERSION")).unwrap().modified().unwrap();
    wait_until(LONG, "the standby's files to be old enough", || written().elapsed().unwrap() > Duration::from_secs(6));
    let of_primary = take(&stanza, &primary, &[]);
    assert_eq!((&of_primary["type"], &of_primary["source"]["standby"]), (&"full".into(), &false.into()));
    let load = background_load(&primary);
    let first = take(&stanza, &standby, &by_primary);
    assert_eq!((&first["type"], &first["prior"]), (&"incr".into(), &of_primary["label"]));
    assert!(first["backup-label"].as_str().unwrap().contains("BACKUP FROM: standby"), "{first}");
    assert_eq!(first["source"]["standby"], true);
    // the same cluster, so most is stored; another machine, so every file is read
    assert!(read_all(&first), "{}", first["sizes"]);
    let (new, all) =
        (first["sizes"]["stored-new"].as_u64().unwrap(), of_primary["sizes"]["stored-new"].as_u64().unwrap());
    assert!(new < all, "{new} of {all}");

    // the load ends segments, so the primary need not be known
    let second = take(&stanza, &standby, &[]);
    assert_eq!(second["prior"], first["label"]);
    assert!(!read_all(&second), "{}", second["sizes"]);
    let back = take(&stanza, &primary, &[]);
    assert!(read_all(&back), "{}", back["sizes"]);
    drop(load);
    for (backup, name) in [(&first, "first"), (&second, "second"), (&back, "back")] {
        assert_sound(restored(&stanza, backup, name));
    }

    // failover
    catch_up(&primary, &standby);
    primary.stop(StopMode::Immediate);
    standby.psql("SELECT pg_promote();");
    standby.pgbench(&["-c", "2", "-n", "-t", "300"]);
    standby.psql("CHECKPOINT;");
    let expected = standby.fingerprint();
    let after = take(&stanza, &standby, &[]);
    assert_eq!((&after["timeline"], &after["type"]), (&2.into(), &"incr".into()));
    assert!(read_all(&after), "{}", after["sizes"]);
    let copy = restored(&stanza, &after, "after");
    assert_eq!(copy.fingerprint(), expected);
    assert_sound(copy);
    // on the new timeline times count again
    standby.psql("UPDATE pgbench_branches SET filler = 'later'; CHECKPOINT;");
    let expected = standby.fingerprint();
    let last = take(&stanza, &standby, &[]);
    assert!(!read_all(&last), "{}", last["sizes"]);
    assert_eq!(restored(&stanza, &last, "last").fingerprint(), expected);
    stanza.run(["verify"]).ok();
}

/// Does something when a stage begins.
struct When<F>(&'static str, F);

impl<F: Fn() + Send + Sync> Monitor for When<F> {
    fn stage(&self, name: &str, _: u64) {
        if name == self.0 {
            (self.1)();
        }
    }
}

fn options(of: &Cluster, primary: Option<&Cluster>) -> BackupOptions {
    BackupOptions {
        kind: Wanted::Kind(BackupKind::Full),
        checksum: false,
        conninfo: of.conninfo().to_owned(),
        primary: primary.map(|primary| primary.conninfo().to_owned()),
        process_max: 2,
        buffer_bytes: 128 << 20,
        level: 1,
        start_fast: true,
        wal: WalChoice::Auto,
        archive_timeout: Duration::from_secs(2),
        page_errors_fail: true,
        checks: pgcairn::backup::rival::Checks { archive_mode: true, timeline: true },
        way: Way::Files,
    }
}

/// Runs `pgcairn` where `shown` is seen at the place of `path`.
fn with_another_directory(stanza: &Stanza, path: &Path, shown: &Path, arguments: &[&str]) -> (bool, String) {
    let pgcairn = stanza.command();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", r#"mount --bind "$1" "$2" && shift 2 && exec "$@""#, "sh"]);
    command.args([shown, path]).arg(pgcairn.get_program()).args(pgcairn.get_args()).args(arguments);
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_standby_that_cannot_be_a_source_is_refused() {
    let stanza = Stanza::in_directory();
    let primary = primary(&stanza, "1");
    let standby = standby(&stanza, &primary, "standby");
    let opened = store::open(stanza.repo(), &StoreOptions::default(), false).unwrap();
    let repository = Repository::new(opened, stanza::NAME).unwrap();
    let fails = |options: &BackupOptions, monitor: &dyn Monitor| -> String {
        let error = backup(&repository, options, monitor).unwrap_err();
        format!("{error}; {}", error.hint_text().unwrap_or_default())
    };
    stanza.run(["stanza-create", "--pg", standby.conninfo()]).fails(1, "names is a standby").fails(1, "hint:");
    let told = fails(&options(&standby, Some(&standby)), &Silent);
    assert!(told.contains("asked to end a segment"), "{told}");
    let other = Cluster::builder().wal_segsize_mb(1).start();
    let told = fails(&options(&standby, Some(&other)), &Silent);
    assert!(told.contains("names has system identifier"), "{told}");
    let told = fails(&BackupOptions { wal: WalChoice::Stored, ..options(&standby, None) }, &Silent);
    assert!(told.contains("cannot end the WAL segment"), "{told}");
    // nobody ends the segment
    primary.psql("CREATE TABLE in_the_next_segment (i int);");
    catch_up(&primary, &standby);
    let told = fails(&options(&standby, None), &Silent);
    assert!(told.contains("did not reach the archive") && told.contains("--pg-primary"), "{told}");

    // the same system identifier, but the files of another server
    let second = self::standby(&stanza, &primary, "second");
    if install::server_user().is_some() {
        for (server, shown) in [(&standby, &primary), (&standby, &second)] {
            let arguments = ["backup", "--pg", server.conninfo(), "--archive-timeout=2"];
            let (good, told) =
                with_another_directory(&stanza, server.data_directory(), shown.data_directory(), &arguments);
            assert!(!good && told.contains("is not the data directory of this server"), "{told}");
        }
    }

    primary.psql("ALTER SYSTEM SET full_page_writes = off; SELECT pg_reload_conf();");
    wait_until(LONG, "the setting", || primary.psql("SHOW full_page_writes;") == "off");
    primary.psql("CHECKPOINT;");
    catch_up(&primary, &standby);
    let told = fails(&options(&standby, Some(&primary)), &Silent);
    assert!(told.contains("pg_backup_start") && told.contains("full_page_writes = on"), "{told}");
    primary.psql("ALTER SYSTEM RESET full_page_writes; SELECT pg_reload_conf();");
    wait_until(LONG, "the setting", || primary.psql("SHOW full_page_writes;") == "on");
    primary.psql("CHECKPOINT;");
    catch_up(&primary, &standby);
    backup(&repository, &options(&standby, Some(&primary)), &Silent).unwrap();

    let toggle = When("copying", || {
        primary.psql("ALTER SYSTEM SET full_page_writes = off; SELECT pg_reload_conf();");
        wait_until(LONG, "the setting", || primary.psql("SHOW full_page_writes;") == "off");
        primary.psql("CHECKPOINT;");
        catch_up(&primary, &standby);
    });
    let told = fails(&options(&standby, Some(&primary)), &toggle);
    assert!(told.contains("pg_backup_stop") && told.contains("full_page_writes = off"), "{told}");
    primary.psql("ALTER SYSTEM RESET full_page_writes; SELECT pg_reload_conf();");
    wait_until(LONG, "the setting", || primary.psql("SHOW full_page_writes;") == "on");
    primary.psql("CHECKPOINT;");
    catch_up(&primary, &standby);

    for stage in ["copying", "stopping"] {
        let source = if stage == "copying" { &standby } else { &second };
        catch_up(&primary, source);
        let promote = When(stage, || drop(source.psql("SELECT pg_promote();")));
        let told = fails(&options(source, Some(&primary)), &promote);
        assert!(told.contains("promoted"), "{stage}: {told}");
    }
    let told = stanza.run(["info", "--output", "json"]).ok();
    let json: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(json[0]["backup"].as_array().unwrap().len(), 1, "{told}");
}

/// A standby that sends its files, while it replays what a busy primary writes.
#[test]
fn a_standby_sends_its_files() {
    let stanza = Stanza::in_directory();
    let primary = primary(&stanza, "3");
    let standby = standby(&stanza, &primary, "standby");
    let by_primary = ["--pg-primary", primary.conninfo(), "--source=stream"];
    stanza.run([&["check", "--pg", standby.conninfo()][..], &by_primary].concat()).ok();
    let load = background_load(&primary);
    let full = take(&stanza, &standby, &by_primary);
    assert!(full["backup-label"].as_str().unwrap().contains("BACKUP FROM: standby"), "{full}");
    assert_eq!((&full["type"], &full["source"]["standby"]), (&"full".into(), &true.into()));
    let second = take(&stanza, &standby, &["--source=stream"]);
    let (new, all) = (second["sizes"]["stored-new"].as_u64().unwrap(), full["sizes"]["stored-new"].as_u64().unwrap());
    assert_eq!(second["prior"], full["label"]);
    assert!(new < all, "{new} of {all}");
    let back = take(&stanza, &primary, &[]);
    assert!(read_all(&back), "{}", back["sizes"]);
    drop(load);
    for (backup, name) in [(&full, "full"), (&second, "second"), (&back, "back")] {
        assert_sound(restored(&stanza, backup, name));
    }
    let stored = ["backup", "--source=stream", "--wal=stored", "--pg", standby.conninfo()];
    stanza.run(stored).fails(1, "standby");
}

/// A standby that pgcairn made itself; its backup at a point, and on a mount.
fn made_from_a_backup(major: u32) {
    let stanza = Stanza::in_directory();
    let builder = Cluster::builder().major(major).checksums(true).wal_segsize_mb(1);
    let primary = stanza.archiving(builder).start();
    Data::tiny().load(&primary);
    stanza.create(&primary);
    stanza.backup(&primary);
    let data = stanza.place().join("standby");
    stanza.run(["restore", "--type=standby", data.to_str().unwrap()]).ok();
    let standby = Cluster::open(major, &data, &[("primary_conninfo", primary.conninfo())]);
    primary.psql("CREATE TABLE later AS SELECT generate_series(1, 10000) AS i; CHECKPOINT;");
    catch_up(&primary, &standby);
    let backup = take(&stanza, &standby, &["--pg-primary", primary.conninfo()]);
    assert!(read_all(&backup), "{}", backup["sizes"]);
    assert_eq!(backup["source"]["standby"], true);
    let label = backup["label"].as_str().unwrap();
    primary.psql("UPDATE later SET i = -i; SELECT pg_create_restore_point('here');");
    let here = primary.fingerprint();
    primary.psql("DROP TABLE later; SELECT pg_switch_wal();");
    wait_until(LONG, "the archive", || {
        primary.psql("SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready';") == "0"
    });

    let copy = stanza.place().join("copy");
    let to_here = ["restore", "--set", label, "--type=name", "--target=here", "--target-action=promote"];
    stanza.run([&to_here[..], &[copy.to_str().unwrap()]].concat()).ok();
    let copy = Cluster::open(major, &copy, &[]);
    wait_until(LONG, "recovery", || copy.psql("SELECT pg_is_in_recovery();") == "f");
    assert_eq!(copy.fingerprint(), here);

    let bin = install::server(major);
    let clone = stanza.start("clone", &["--pg-bin", bin.to_str().unwrap(), label]);
    assert_eq!(clone.psql("SELECT count(*), sum(i) FROM later;"), "10000|50005000");
    clone.stop(&[]);
}

#[test]
fn a_standby_of_postgresql_13() {
    made_from_a_backup(13);
}

#[test]
fn a_standby_of_postgresql_18() {
    made_from_a_backup(18);
}
