//! Points in time: what a server holds that was brought to a moment is what the history says.
#![allow(clippy::unwrap_used)]

mod history;

use std::time::Duration;

use history::{History, Mark, archive_all, marks, object, strs, up_to};
use pgcairn::postgres::wal::records::{CutRecord, Event, Stop, walk};
use pgcairn::postgres::{ControlFile, Lsn, WalIdentity};
use pgcairn_integration::wait::wait_until;
use pgcairn_integration::{Cluster, StopMode, install};

#[test]
fn a_clone_is_at_its_target() {
    let history = History::new(15);
    for id in [2, 4, 5] {
        for target in history.targets(id) {
            let clone = history.stanza.start("point", &strs(&target));
            assert_eq!(marks(&clone), up_to(id), "{target:?}: {}", clone.told());
            clone.psql("INSERT INTO marks VALUES (1000);");
            clone.stop(&[]);
        }
    }
    history.stanza.assert_nothing_left();
}

#[test]
fn a_reader_waits_at_its_target_and_copies_recover_there() {
    let history = History::new(15);
    let stanza = &history.stanza;
    let reader =
        stanza.start("reader", &["--read-only", "--type=time", &format!("--target={}", history.mark(5).after)]);
    assert_eq!(marks(&reader), up_to(5));
    assert_eq!(reader.psql("SELECT count(*), pg_is_in_recovery() FROM victim;"), "5000|t");
    assert!(reader.try_psql("INSERT INTO marks VALUES (1000);").is_err());
    reader.stop(&["--keep"]);
    let reader = stanza.start("reader", &[]);
    assert_eq!(marks(&reader), up_to(5), "a clone that is started again stays where it was");
    reader.stop(&[]);
    // a backup alone, open for reading
    let reader = stanza.start("reader", &["--read-only", &history.backups[1]]);
    assert_eq!(marks(&reader), up_to(3));
    reader.stop(&[]);

    // written, kept, and gone on with
    let clone = stanza.start("kept", &["mark 2"]);
    clone.psql("INSERT INTO marks VALUES (1000);");
    clone.stop(&["--keep"]);
    let clone = stanza.start("kept", &[]);
    assert_eq!(marks(&clone), "1,2,1000");
    clone.stop(&[]);

    for (number, target) in history.targets(4).into_iter().enumerate() {
        let copy = stanza.place().join(&format!("copy{number}"));
        let action = if number == 0 { "--target-action=pause" } else { "--target-action=promote" };
        stanza.run([&["restore", action], &strs(&target)[..], &[copy.to_str().unwrap()]].concat()).ok();
        let mut server = Cluster::open(15, &copy, &[]);
        if number == 0 {
            wait_until(Duration::from_secs(60), "the pause", || {
                server.psql("SELECT pg_is_wal_replay_paused();") == "t"
            });
        } else {
            wait_until(Duration::from_secs(60), "the end of recovery", || {
                server.psql("SELECT pg_is_in_recovery();") == "f"
            });
            assert_eq!(server.psql("SHOW archive_mode;"), "off");
        }
        assert_eq!(marks(&server), up_to(4), "{target:?}");
        server.stop(StopMode::Fast);
    }
    stanza.assert_nothing_left();
}

#[test]
fn recovery_goes_along_the_timeline_that_is_asked_for() {
    let history = History::new(15);
    let stanza = &history.stanza;
    let copy = stanza.place().join("branch");
    let restore = ["restore", "--target=mark 4", "--target-action=promote", "--archive-mode=preserve"];
    stanza.run(restore.into_iter().chain([copy.to_str().unwrap()])).ok();
    let branch = Cluster::open(15, &copy, &[]);
    wait_until(Duration::from_secs(60), "the promotion", || branch.psql("SELECT pg_is_in_recovery();") == "f");
    let on_branch = [Mark::write(&branch, 101), Mark::write(&branch, 102)];
    archive_all(&branch);
    let backup = stanza.backup(&branch);
    let last = Mark::write(&branch, 103);
    archive_all(&branch);

    let time = |mark: &Mark| format!("--target={}", mark.after);
    let (fifth, branched, after_backup) = (time(history.mark(5)), time(&on_branch[0]), time(&last));
    for (arguments, expected) in [
        (vec!["--type=default"], "1,2,3,4,101,102,103"),
        (vec!["--type=default", "--target-timeline=1"], "1,2,3,4,5,6"),
        (vec!["--type=default", "--target-timeline=current", &history.backups[1]], "1,2,3,4,5,6"),
        (vec!["--type=default", &history.backups[0]], "1,2,3,4,101,102,103"),
        (vec!["--type=time", &branched], "1,2,3,4,101"),
        (vec!["--type=time", &branched, "--target-timeline=2"], "1,2,3,4,101"),
        (vec!["--type=time", &fifth], "1,2,3,4"),
        (vec!["--type=time", &fifth, "--target-timeline=1"], "1,2,3,4,5"),
        (vec!["--type=time", &after_backup], "1,2,3,4,101,102,103"),
        (vec!["mark 3"], "1,2,3"),
        (vec!["mark 101"], "1,2,3,4,101"),
        (vec!["--type=immediate"], "1,2,3,4,101,102"),
        (vec!["--type=immediate", &history.backups[1]], "1,2,3"),
        (vec!["--read-only", "--type=default", "--target-timeline=1"], "1,2,3,4,5,6"),
        (vec![&backup[..]], "1,2,3,4,101,102"),
    ] {
        let clone = stanza.start("point", &arguments);
        assert_eq!(marks(&clone), expected, "{arguments:?}: {}", clone.told());
        clone.stop(&[]);
    }
    // a transaction of the branch that was left is none of the other's
    let refused = stanza.run(["start", "--target-timeline=1", "mark 101"]).fails(1, "there is no restore point");
    assert!(refused.stderr.contains("hint: "), "{}", refused.stderr);
    let refused = stanza.run(["start", "--target-timeline=2", &backup, "mark 3"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
    stanza.run(["start", "--target-timeline=1", &backup, "--type=default"]).fails(1, "not on the timeline");
    drop(branch);
    stanza.assert_nothing_left();
}

#[test]
fn what_cannot_be_reached_is_refused_with_what_can() {
    let history = History::new(15);
    let (stanza, cluster) = (&history.stanza, &history.cluster);
    let refused = |arguments: &[&str], why: &str, hint: &str| {
        let start = stanza.run([&["start"], arguments].concat()).fails(1, why);
        assert!(start.stderr.contains(hint) && start.stderr.contains("hint: "), "{arguments:?}: {}", start.stderr);
        let target = stanza.place().join("refused");
        let restore = ["restore", target.to_str().unwrap()];
        let arguments: Vec<&str> =
            arguments.iter().copied().filter(|argument| !argument.starts_with("--read")).collect();
        let set = if arguments[0].starts_with("--") { vec![] } else { vec!["--set"] };
        stanza.run([&restore, &set[..], &arguments].concat()).fails(1, why);
        assert!(!target.exists(), "{arguments:?} made {}", target.display());
    };
    refused(&["2020-01-01 00:00Z"], "is before the first backup", "can be reached from");
    refused(&["2100-01-01 00:00Z"], "is not in the archive", "pg_switch_wal");
    refused(&["FF/0"], "is not in the archive", "can be reached from");
    refused(&["0/1"], "is before the first backup", "can be reached from");
    refused(&["--type=xid", "--target=4000000000"], "does not end in the WAL", "can be reached from");
    refused(&["nowhere"], "there is no restore point \"nowhere\"", "\"mark 6\"");
    refused(&["14:99"], "is not a time", "times read like");
    refused(&["--type=lsn", "--target=zero"], "is not an LSN", "16/B374D848");
    refused(&["mark 1", "--target-timeline=9"], "no timeline 9", "its timelines: 1");
    refused(&["mark 1", "--target-exclusive"], "--target-exclusive goes with", "leave the option out");

    // a name that is there twice
    cluster.psql("SELECT pg_create_restore_point('twice'); SELECT pg_create_restore_point('twice');");
    archive_all(cluster);
    refused(&["twice"], "there are 2 restore points \"twice\"", "--type lsn");

    // a segment that is gone: no recovery goes past it
    let segment = cluster.psql(&format!("SELECT pg_walfile_name('{}');", history.mark(5).lsn));
    let archived = object(&history, &segment);
    let aside = stanza.place().join("aside");
    std::fs::rename(&archived, &aside).unwrap();
    refused(&["mark 5"], "there is no restore point", "hint: ");
    refused(
        &["--type=time", &format!("--target={}", history.mark(6).after)],
        &format!("segment {segment} is missing"),
        "can be reached",
    );
    let info = stanza.run(["info"]).ok();
    assert!(info.contains(&format!("WAL {segment} is missing")), "{info}");
    assert!(info.matches("timeline 1: can be reached from").count() == 1, "{info}");
    let clone = stanza.start("before", &["mark 4"]);
    assert_eq!(marks(&clone), up_to(4));
    clone.stop(&[]);

    // a segment that is damaged: recovery stops there, and says so
    let mut bytes = std::fs::read(&aside).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xFF;
    std::fs::write(&archived, &bytes).unwrap();
    let failed = stanza.run(["start", "--type=default", "--name=damaged"]);
    assert_eq!(failed.code, Some(1), "{failed:?}");
    assert!(failed.stderr.contains(&segment), "{}", failed.stderr);
    std::fs::rename(&aside, &archived).unwrap();
    stanza.assert_nothing_left();
}

#[test]
fn a_mount_has_a_directory_for_every_moment() {
    let history = History::new(15);
    let stanza = &history.stanza;
    let mount = stanza.mount("mount", &[]);
    let pitr = mount.path().join("pitr");
    assert_eq!(std::fs::read_dir(&pitr).unwrap().count(), 0);
    let mark = history.mark(4);
    let names = [
        mark.after.replace(' ', "T"),
        mark.lsn.replace('/', "-"),
        format!("lsn:{}", mark.lsn.replace('/', "-")),
        format!("xid:{}", mark.xid),
        "mark 4".to_owned(),
        "name:mark 4".to_owned(),
    ];
    for (number, name) in names.iter().enumerate() {
        let directory = pitr.join(name);
        assert!(directory.join("recovery.signal").exists(), "{name}");
        let conf = std::fs::read_to_string(directory.join("postgresql.auto.conf")).unwrap();
        assert!(conf.contains("recovery_target_") && conf.contains("archive_mode = 'off'"), "{name}: {conf}");
        // the same target, however it is written: one copy of each kind is enough
        if number == 2 || number == 5 {
            continue;
        }
        let copy = stanza.place().join(&format!("copy{number}"));
        let status = std::process::Command::new("cp").arg("-a").arg(&directory).arg(&copy).status().unwrap();
        assert!(status.success());
        let mut server = Cluster::open(15, &copy, &[]);
        let promoted = || server.psql("SELECT pg_is_in_recovery();") == "f";
        wait_until(Duration::from_secs(60), "the end of recovery", promoted);
        assert_eq!(marks(&server), up_to(4), "{name}");
        server.stop(StopMode::Fast);
    }
    for absent in ["2100-01-01T00:00Z", "2020-01-01T00:00Z", "yesterday 14:30", "nowhere", "FF-0", ".git"] {
        assert!(!pitr.join(absent).exists(), "{absent}");
    }
    assert_eq!(std::fs::read_dir(&pitr).unwrap().count(), names.len());
    // a moment that comes later is there later
    let later = Mark::write(&history.cluster, 7);
    assert!(!pitr.join("mark 7").exists());
    archive_all(&history.cluster);
    assert!(pitr.join("mark 7").join("recovery.signal").exists(), "{later:?}");
    drop(mount);

    // recovered before it is shown
    let target = format!("--target={}", mark.after);
    let mount = stanza.mount("recovered", &["--recovered", "--type=time", &target]);
    assert!(!mount.path().join("recovery.signal").exists() && !mount.path().join("backup_label").exists());
    assert!(std::fs::write(mount.path().join("new"), "x").is_err(), "it can be written to");
    let state =
        install::as_server_user(history.cluster.bin_directory().join("pg_controldata")).arg(mount.path()).output();
    let state = String::from_utf8(state.unwrap().stdout).unwrap();
    assert!(state.contains("cluster state:               shut down\n"), "{state}");
    let copy = stanza.place().join("copy-recovered");
    assert!(std::process::Command::new("cp").arg("-a").arg(mount.path()).arg(&copy).status().unwrap().success());
    drop(mount);
    let mut server = Cluster::open(15, &copy, &[]);
    assert_eq!(marks(&server), up_to(4));
    assert_eq!(server.psql("SELECT count(*) FROM victim;"), "5000");
    server.stop(StopMode::Fast);
    let clones = stanza.place().join("clones");
    let is_empty = || std::fs::read_dir(&clones).unwrap().count() == 0;
    wait_until(Duration::from_secs(30), "the private scratch to go", is_empty);

    // the mountpoint itself, writable
    let scratch = stanza.place().join("scratch");
    let mount = stanza.mount("moment", &["--type=time", &target, "--scratch", scratch.to_str().unwrap()]);
    let mut server = Cluster::open(15, mount.path(), &[]);
    wait_until(Duration::from_secs(60), "the end of recovery", || server.psql("SELECT pg_is_in_recovery();") == "f");
    assert_eq!(marks(&server), up_to(4));
    server.stop(StopMode::Fast);
    drop(server);
    drop(mount);
    stanza.assert_nothing_left();
}

#[test]
fn one_table_comes_back() {
    let history = History::new(15);
    let (stanza, cluster) = (&history.stanza, &history.cluster);
    assert!(cluster.try_psql("SELECT count(*) FROM victim;").is_err());
    let time = format!("--target={}", history.mark(5).after);
    let table = "--table=postgres.public.victim";
    let into = format!("--into={}", cluster.conninfo());
    stanza.run(["extract", "--type=time", &time, table, &into]).ok();
    assert_eq!(cluster.psql("SELECT count(*), sum(i) FROM victim;"), "5000|12502500");
    // nothing is half done where it is there already
    let twice = stanza.run(["extract", &time, table, &into]).fails(1, "already exists");
    assert!(twice.stderr.contains("hint: "), "{}", twice.stderr);
    assert_eq!(cluster.psql("SELECT count(*) FROM victim;"), "5000");

    let file = stanza.place().join("victim.sql");
    let output = format!("--output={}", file.display());
    stanza.run(["extract", "mark 5", table, &output]).ok();
    let dump = std::fs::read_to_string(&file).unwrap();
    assert!(dump.contains("COPY public.victim") && dump.contains("PostgreSQL database dump complete"));
    stanza.run(["extract", "mark 5", table, &output]).fails(1, "exists already");
    let shown = stanza.run(["extract", &history.backups[0], table]).ok();
    assert!(shown.contains("COPY public.victim"));

    stanza.run(["extract", "mark 6", table]).fails(1, "no table matches public.victim").fails(1, "hint: ");
    stanza.run(["extract", "mark 5", "--table=victim"]).fails(1, "names no table of a database");
    stanza.run(["extract", "mark 5", "--table=nowhere.public.victim"]).fails(1, "hint: its databases: postgres");

    let info: serde_json::Value = serde_json::from_str(&stanza.run(["info", "--output=json"]).ok()).unwrap();
    let timeline = &info[0]["archive"][0]["timeline"][0];
    assert_eq!((&timeline["id"], &timeline["gap"]), (&1.into(), &serde_json::json!([])), "{timeline}");
    assert_eq!(timeline["range"][0]["backup"], history.backups[0][..], "{timeline}");
    let last = cluster.psql(&format!("SELECT extract(epoch FROM '{}'::timestamptz);", history.mark(6).committed));
    assert!(timeline["range"][0]["to"]["time"].as_f64().unwrap() >= last.parse::<f64>().unwrap(), "{timeline}");
    stanza.assert_nothing_left();
}

/// The oldest and the newest server.
#[test]
fn other_majors_reach_their_targets() {
    for major in [13, 18] {
        let history = History::new(major);
        let bin = install::server(major);
        let programs = format!("--pg-bin={}", bin.display());
        let mut targets = history.targets(4);
        targets.push(vec!["--read-only".to_owned(), "mark 4".to_owned()]);
        for target in targets {
            let clone = history.stanza.start("point", &[&[&programs[..]], &strs(&target)[..]].concat());
            assert_eq!(marks(&clone), up_to(4), "{major}: {target:?}: {}", clone.told());
            clone.stop(&[]);
        }
        history.stanza.assert_nothing_left();
    }
}

/// pg_waldump is the judge: the same ends of transactions and restore points, at the same positions.
#[test]
fn records_are_read_as_pg_waldump_reads_them() {
    let settings = [("max_prepared_transactions", "5"), ("wal_keep_size", "100MB")];
    let builder = Cluster::builder().wal_segsize_mb(1);
    let cluster = settings.into_iter().fold(builder, |builder, (name, value)| builder.conf(name, value)).start();
    cluster.psql("CREATE TABLE t (i int PRIMARY KEY, x text);");
    let first: String = cluster.psql("SELECT pg_walfile_name(pg_switch_wal());");
    // many small transactions, so that some lie across pages and segments; subtransactions, large ones, prepared ones
    cluster.pgbench(&["-i", "-q", "-s", "1"]);
    cluster.pgbench(&["-c", "2", "-t", "1500", "-n"]);
    cluster.psql(
        "BEGIN; INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(1, 4000) AS i; COMMIT;
         DO $$ BEGIN FOR i IN 1..100 LOOP BEGIN INSERT INTO t VALUES (-i); EXCEPTION WHEN OTHERS THEN NULL; END; END LOOP; END $$;
         BEGIN; DELETE FROM t WHERE i < 0; ROLLBACK;
         BEGIN; CREATE TABLE u (i int); SAVEPOINT s; INSERT INTO u VALUES (1); PREPARE TRANSACTION 'kept';
         BEGIN; INSERT INTO t VALUES (-1000); PREPARE TRANSACTION 'lost';
         COMMIT PREPARED 'kept'; ROLLBACK PREPARED 'lost';
         SELECT pg_create_restore_point('a name with spaces'); CHECKPOINT; DROP TABLE u;",
    );
    let last = cluster.psql("SELECT pg_walfile_name(pg_switch_wal());");
    let directory = cluster.data_directory().join("pg_wal");
    let mut names: Vec<String> = std::fs::read_dir(&directory)
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| name.len() == 24 && *name > first && *name <= last)
        .collect();
    names.sort();
    assert!(names.len() >= 5, "{names:?}");
    let control = std::fs::read(cluster.data_directory().join("global/pg_control")).unwrap();
    let control = ControlFile::parse(&control).unwrap();
    let identity = WalIdentity {
        major: control.major().unwrap(),
        system_identifier: control.system_identifier,
        segment_size: control.wal_segment_size,
        page_bytes: control.wal_page_bytes,
    };
    let (mut ours, mut cut): (Vec<String>, Option<CutRecord>) = (Vec::new(), None);
    let mut crossed = 0;
    for name in &names {
        let bytes = std::fs::read(directory.join(name)).unwrap();
        let mut events = Vec::new();
        let walked =
            walk(&identity, name.parse().unwrap(), &bytes, |lsn, _, event| events.extend(told(lsn, &event))).unwrap();
        if let Some(event) = cut.as_ref().and_then(|cut| cut.joined(&walked.rest, identity.major)) {
            crossed += 1;
            ours.extend(told(cut.as_ref().unwrap().lsn, &event));
        }
        ours.append(&mut events);
        assert!(walked.stop != Stop::Unsound, "{name}");
        cut = match walked.stop {
            Stop::Cut(cut) => Some(cut),
            _ => None,
        };
    }
    let mut waldump = install::client("pg_waldump");
    waldump.env("TZ", "UTC").arg("-p").arg(&directory).args(["--rmgr=Transaction", "--rmgr=XLOG", &names[0], &last]);
    let dumped = pgcairn_integration::process::run_ok(&mut waldump, &[], Duration::from_secs(60));
    let theirs: Vec<String> = dumped.lines().filter_map(dumped_line).collect();
    assert!(theirs.len() > 3000, "{}", theirs.len());
    assert_eq!(ours.len(), theirs.len(), "{crossed} records lie across segments");
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs);
    }
}

/// An event as one line.
fn told(lsn: Lsn, event: &Event) -> Option<String> {
    match event {
        Event::End { xid, time, committed } => {
            Some(format!("{lsn} {} {xid} {time}", if *committed { "COMMIT" } else { "ABORT" }))
        }
        Event::RestorePoint { name, .. } => Some(format!("{lsn} RESTORE_POINT {name}")),
        _ => None,
    }
}

/// The same of a line of pg_waldump: `rmgr: Transaction len (rec/tot): .., tx: 731, lsn: 0/015, prev .., desc: COMMIT <time> UTC; ..`
fn dumped_line(line: &str) -> Option<String> {
    let field = |name: &str| line.split_once(name)?.1.split([',', ' ']).find(|word| !word.is_empty());
    let lsn: Lsn = field("lsn:")?.parse().unwrap();
    let (_, desc) = line.split_once("desc: ")?;
    let (what, rest) = desc.split_once(' ')?;
    if what == "RESTORE_POINT" {
        return Some(format!("{lsn} RESTORE_POINT {rest}"));
    }
    let kind = what.strip_suffix("_PREPARED").unwrap_or(what);
    if !matches!(kind, "COMMIT" | "ABORT") {
        return None;
    }
    let (xid, time) = match kind == what {
        true => (field("tx:")?, rest),
        false => rest.split_once(": ")?,
    };
    let (time, _) = time.split_once(" UTC")?;
    let time = time.strip_suffix(".000000").unwrap_or(time);
    Some(format!("{lsn} {kind} {xid} {time}+00"))
}
