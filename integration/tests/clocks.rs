//! Moments whatever the clocks show; what holds a table at a moment; gaps; what an earlier recovery left.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use pgcairn_integration::bin::run_command;
use pgcairn_integration::wait::wait_until;
use pgcairn_integration::{Client, Cluster, Stanza, WrongClock, install};

const LONG: Duration = Duration::from_secs(60);
const DAY: i64 = 86_400;

fn archive_all(client: &Client) {
    let segment = client.psql("SELECT pg_walfile_name(pg_switch_wal());");
    let archived = || client.psql("SELECT last_archived_wal FROM pg_stat_archiver;") >= segment;
    wait_until(LONG, "the last segment to be archived", archived);
}

fn rows(client: &Client) -> String {
    client.psql("SELECT string_agg(i::text, ',' ORDER BY i) FROM t;")
}

fn add(client: &Client, row: u32) -> String {
    client.psql(&format!("INSERT INTO t VALUES ({row});"));
    client.psql("SELECT clock_timestamp();")
}

struct Clocks {
    stanza: Stanza,
    cluster: Cluster,
    clock: WrongClock,
}

impl Clocks {
    fn new() -> Self {
        Self::at(0)
    }

    /// Of a server whose clock is ahead from the start.
    fn at(seconds: i64) -> Self {
        let stanza = Stanza::in_directory();
        let clock = WrongClock::new(&stanza.place().directory("clock"));
        clock.set(seconds);
        let builder = Cluster::builder().wal_segsize_mb(1).conf("autovacuum", "off").clock(&clock);
        let cluster = stanza.archiving(builder).start();
        stanza.create(&cluster);
        cluster.psql("CREATE TABLE t (i int); CREATE TABLE victim (i int);");
        stanza.backup(&cluster);
        Self { stanza, cluster, clock }
    }

    #[track_caller]
    fn is_at(&self, target: &str, expected: &str, warns: bool) {
        let target = format!("--target={target}");
        let output = self.stanza.run(["start", "--name=at", "--type=time", &target]);
        assert_eq!(output.stderr.contains("was set back from"), warns, "{target}: {}", output.stderr);
        let conninfo = output.clone().ok().split('"').nth(1).unwrap().to_owned();
        assert_eq!(rows(&Client::new(conninfo)), expected, "{target}");
        self.stanza.run(["stop", "at"]).ok();
    }
}

#[test]
fn a_clock_that_is_set() {
    let clocks = Clocks::new();
    let Clocks { cluster, clock, .. } = &clocks;
    // a day ahead for a while: what came after that can be reached, and what came before
    let first = add(cluster, 1);
    clock.set(DAY);
    let ahead = add(cluster, 2);
    archive_all(cluster);
    clock.set(0);
    let third = add(cluster, 3);
    cluster.psql("SELECT pg_sleep(0.01);");
    add(cluster, 4);
    archive_all(cluster);
    clocks.is_at(&third, "1,2,3", true);
    // at a moment that only the wrong clock showed, everything else had ended, too
    clock.set(2 * DAY);
    add(cluster, 5);
    archive_all(cluster);
    clocks.is_at(&ahead, "1,2,3,4", false);
    clocks.is_at(&first, "1", false);
}

#[test]
fn a_clock_that_is_set_back() {
    let clocks = Clocks::new();
    let Clocks { cluster, clock, .. } = &clocks;
    // no proof which of the two was right: the first, for it is never past the target
    clock.set(90);
    let early = add(cluster, 1);
    clock.set(180);
    add(cluster, 2);
    clock.set(60);
    add(cluster, 3);
    clock.set(200);
    add(cluster, 4);
    archive_all(cluster);
    let target = cluster.psql(&format!("SELECT '{early}'::timestamptz + '30 s';"));
    clocks.is_at(&target, "1", true);
    // no transaction ended between
    let target = cluster.psql(&format!("SELECT '{early}'::timestamptz + '100 s';"));
    clocks.is_at(&target, "1,2,3", false);
}

/// Before the backup a table is dropped; this machine's clock is a minute behind the server's, or ahead of it.
#[test]
fn clocks_of_two_machines() {
    for seconds in [60, -60] {
        let clocks = Clocks::at(seconds);
        let Clocks { stanza, cluster, .. } = &clocks;
        add(cluster, 1);
        let before = cluster.psql("SELECT clock_timestamp();");
        cluster.psql("DROP TABLE victim;");
        let backup = stanza.run(["backup", "--pg", cluster.conninfo()]);
        assert!(format!("{backup:?}").contains("the server's clock and this machine's are"), "{backup:?}");
        archive_all(cluster);
        let info: serde_json::Value = serde_json::from_str(&stanza.run(["info", "--output=json"]).ok()).unwrap();
        let stop = info[0]["backup"].as_array().unwrap().last().unwrap()["timestamp"]["stop"].as_i64().unwrap();
        let now: i64 = cluster.psql("SELECT floor(extract(epoch FROM now()));").parse().unwrap();
        assert!((now - 40..=now).contains(&stop), "{stop} is not by the server's clock, which is at {now}");
        let clone = stanza.start("before", &["--read-only", "--type=time", &format!("--target={before}")]);
        // it waits before the table's end, and nothing holds it
        assert_eq!(clone.psql("SET lock_timeout = '10s'; SELECT count(*) FROM victim;"), "0");
        clone.stop(&[]);
    }
}

/// The end of a transaction whose record begins in one segment and ends in the next.
#[test]
fn a_commit_across_two_segments() {
    let clocks = Clocks::new();
    let Clocks { cluster, .. } = &clocks;
    add(cluster, 1);
    let target = cluster.psql("SELECT clock_timestamp();");
    let mut session = cluster.session();
    let mut crossed = false;
    for _ in 0..20 {
        session.run("SELECT pg_switch_wal();");
        session.run("BEGIN; INSERT INTO t VALUES (2);");
        let at: u64 = session.run("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn;").parse().unwrap();
        let end = (at / (1 << 20) + 1) * (1 << 20);
        let pages = end / 8192 - at / 8192 - 1;
        // header of the record (24) and of its data (5), the message's own (24), its prefix
        let message = end - 16 - at - pages * 24 - 24 - 5 - 24 - 2;
        session.run(&format!("SELECT count(*) FROM pg_logical_emit_message(false, 'x', repeat('y', {message}));"));
        let lsn: u64 = session.run("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn;").parse().unwrap();
        crossed = lsn == end - 16;
        session.run(if crossed { "COMMIT;" } else { "ROLLBACK;" });
        if crossed {
            break;
        }
    }
    assert!(crossed, "no record was laid across the end of a segment");
    // nothing else ends after it
    archive_all(cluster);
    let before = cluster.psql("SELECT clock_timestamp();");
    cluster.psql("SELECT pg_create_restore_point('later');");
    archive_all(cluster);
    clocks.is_at(&target, "1", false);
    clocks.is_at(&before, "1,2", false);
}

/// A moment after the last transaction in the archive, of which nothing there says that it was
/// reached: who looks at a clone gets the end of the archive and is told; what is taken for the
/// moment is refused.
#[test]
fn a_moment_that_nothing_in_the_archive_proves() {
    let stanza = Stanza::in_directory();
    let builder = Cluster::builder().wal_segsize_mb(1).conf("autovacuum", "off");
    let cluster = stanza.archiving(builder).start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t (i int);");
    stanza.backup(&cluster);
    add(&cluster, 1);
    archive_all(&cluster);
    // this one is in a segment that is not archived
    let time = add(&cluster, 2);

    let started = stanza.run(["start", "--name=near", &time, "--output=json"]);
    let said = "nothing in the archive says that ";
    assert!(started.stderr.contains(said) && started.stderr.contains("pgcairn check"), "{}", started.stderr);
    assert!(started.stderr.contains("the newest transaction in it ended 20"), "{}", started.stderr);
    let json: serde_json::Value = serde_json::from_str(&started.ok()).unwrap();
    assert!(json["reached"]["wanted"].as_str().unwrap().starts_with("20"), "{json}");
    assert!(json["reached"]["lsn"].is_string() && json["reached"]["time"].is_string(), "{json}");
    assert_eq!(rows(&Client::new(json["conninfo"].as_str().unwrap().to_owned())), "1");
    stanza.run(["stop", "near", "--keep"]).ok();
    let clone = stanza.start("near", &[]);
    assert!(clone.told().contains("it is the end of the archive, and nothing there says that "), "{}", clone.told());
    assert_eq!(rows(&clone), "1");
    clone.stop(&[]);

    let refused = |arguments: &[&str]| {
        let refused = stanza.run(arguments).fails(1, "is not in the archive, which ends at ");
        assert!(refused.stderr.contains("pgcairn check"), "{}", refused.stderr);
    };
    refused(&["start", &time, "--read-only"]);
    refused(&["extract", &time, "--table=postgres.public.t"]);
    let (target, at) = (format!("--target={time}"), stanza.place().directory("recovered").display().to_string());
    refused(&["mount", "--recovered", "--type=time", &target, &at]);
    let copy = stanza.place().join("copy").display().to_string();
    refused(&["restore", "--type=time", &target, &copy]);

    stanza.run(["check", "--pg", cluster.conninfo()]).ok();
    let started = stanza.run(["start", "--name=at", &time]);
    assert!(!started.stderr.contains(said), "{}", started.stderr);
    let conninfo = started.ok().split('"').nth(1).unwrap().to_owned();
    assert_eq!(rows(&Client::new(conninfo)), "1,2");
    stanza.run(["stop", "at"]).ok();
    stanza.assert_nothing_left();
}

/// What proves a moment is no transaction: the last one before it counts, however far back it is,
/// and one that was prepared after it does not.
#[test]
fn a_moment_that_a_checkpoint_proves() {
    let stanza = Stanza::in_directory();
    let builder = Cluster::builder().wal_segsize_mb(1).conf("autovacuum", "off");
    let cluster = stanza.archiving(builder.conf("max_prepared_transactions", "5")).start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t (i int);");
    stanza.backup(&cluster);
    let time = add(&cluster, 1);
    cluster.psql(
        "DO $$ BEGIN FOR i IN 1..66 LOOP
             PERFORM pg_logical_emit_message(false, 'x', 'y'); PERFORM pg_switch_wal();
         END LOOP; END $$; SELECT pg_sleep(1.1); CHECKPOINT;",
    );
    archive_all(&cluster);
    let clone = stanza.start("at", &[&time]);
    assert_eq!(rows(&clone), "1", "{}", clone.told());
    clone.stop(&[]);
    cluster.psql("BEGIN; INSERT INTO t VALUES (2); PREPARE TRANSACTION 'later';");
    archive_all(&cluster);
    let clone = stanza.start("at", &[&time]);
    assert_eq!(rows(&clone), "1", "{}", clone.told());
    assert_eq!(clone.psql("SELECT count(*) FROM pg_prepared_xacts;"), "0");
    clone.stop(&[]);
    // nor does it where a transaction that ended later proves the moment
    cluster.psql("ROLLBACK PREPARED 'later'; INSERT INTO t VALUES (3);");
    archive_all(&cluster);
    let clone = stanza.start("at", &[&time]);
    assert_eq!(rows(&clone), "1", "{}", clone.told());
    assert_eq!(clone.psql("SELECT count(*) FROM pg_prepared_xacts;"), "0");
    clone.stop(&[]);
    stanza.assert_nothing_left();
}

/// Plain `restore` goes to the end of the archive, whatever targets lie about; a gap before that is said.
#[test]
fn restore_goes_to_the_end_and_says_where_that_is() {
    let stanza = Stanza::in_directory();
    for major in [15, 13, 18] {
        let stanza = if major == 15 { &stanza } else { &Stanza::in_directory() };
        let cluster = stanza.archiving(Cluster::builder().major(major).wal_segsize_mb(1)).start();
        let data = cluster.data_directory().to_owned();
        let included = cluster.home().join("included.conf");
        let trigger = if major < 16 { "promote_trigger_file = '/etc/hostname'\n" } else { "" };
        fs::write(
            &included,
            format!(
                "recovery_target_time = '2020-01-01 00:00:00+00'\nrecovery_target_inclusive = off\n\
                 recovery_target_timeline = '7'\nrecovery_target_action = 'shutdown'\nrecovery_min_apply_delay = '1d'\n\
                 restore_command = 'false'\narchive_cleanup_command = 'false'\nrecovery_end_command = 'touch {}/ran'\n{trigger}",
                stanza.repo()
            ),
        )
        .unwrap();
        install::give_to_server_user(&included);
        let conf = data.join("postgresql.conf");
        let text = fs::read_to_string(&conf).unwrap();
        fs::write(&conf, format!("{text}include '{}'\n", included.display())).unwrap();
        stanza.create(&cluster);
        cluster.psql("CREATE TABLE t (i int);");
        stanza.backup(&cluster);
        add(&cluster, 1);
        archive_all(&cluster);
        let first = cluster.psql("SELECT last_archived_wal FROM pg_stat_archiver;");
        add(&cluster, 2);
        let lsn = cluster.psql("SELECT pg_current_wal_insert_lsn();");
        archive_all(&cluster);
        let second = cluster.psql("SELECT last_archived_wal FROM pg_stat_archiver;");
        add(&cluster, 3);
        archive_all(&cluster);

        let recovered = |name: &str, arguments: &[&str], expected: &str| {
            let copy = stanza.place().join(name);
            let output = stanza.run([&["restore", copy.to_str().unwrap()], arguments].concat());
            let server = Cluster::open(major, &copy, &[]);
            wait_until(LONG, "the end of recovery", || server.psql("SELECT pg_is_in_recovery();") == "f");
            assert_eq!(rows(&server), expected, "{major}: {arguments:?}");
            drop(server);
            fs::remove_dir_all(&copy).unwrap();
            output
        };
        let told = recovered("end", &[], "1,2,3").ok();
        assert!(
            told.contains("recovers to the end of the archive") && told.contains("the last transaction ended 20"),
            "{told}"
        );
        recovered(
            "lsn",
            &["--type=lsn", &format!("--target={lsn}"), "--target-exclusive", "--target-action=promote"],
            "1,2",
        )
        .ok();
        assert!(!Path::new(stanza.repo()).join("ran").exists(), "a command of the source's ran");
        if major != 15 {
            continue;
        }
        let told = recovered("none", &["--type=none"], "").ok();
        assert!(told.contains("replays nothing"), "{told}");
        // the second segment is gone: recovery ends before it, and that is said
        let archive = Path::new(stanza.repo()).join("archive/main/15-1").join(&second[..16]);
        let objects = fs::read_dir(archive).unwrap().flatten().map(|entry| entry.path());
        let missing: Vec<_> = objects.filter(|path| path.display().to_string().contains(&second)).collect();
        assert!(first < second && missing.len() == 1);
        fs::remove_file(&missing[0]).unwrap();
        let output = recovered("gap", &[], "1");
        assert!(output.stderr.contains(&format!("WAL segment {second} is missing")), "{}", output.stderr);
    }
}

/// A full backup of the far future puts nothing off, and makes nothing old.
#[test]
fn a_backup_of_the_future() {
    let clocks = Clocks::new();
    let Clocks { stanza, cluster, clock } = &clocks;
    clock.set(400 * DAY);
    let mut wrong = stanza.command();
    wrong.envs(clock.environment()).args(["backup", "--type=full", "--pg", cluster.conninfo()]);
    run_command(&mut wrong).ok();
    clock.set(0);
    stanza.backup(cluster);
    let kept = stanza.run(["expire", "--repo-retention-full=30", "--repo-retention-full-type=time"]).ok();
    assert!(kept.contains("does not fit the others"), "{kept}");
    let info: serde_json::Value = serde_json::from_str(&stanza.run(["info", "--output=json"]).ok()).unwrap();
    assert_eq!(info[0]["backup"].as_array().unwrap().len(), 3);
}
