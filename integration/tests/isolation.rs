//! A clone, an extract, a recovered mount or a restored copy touches nothing but itself.
#![allow(clippy::unwrap_used, clippy::unwrap_in_result)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn_integration::cluster::StopMode;
use pgcairn_integration::install::give_to_server_user;
use pgcairn_integration::{Client, Cluster, Stanza, install, wait_until, walls};

const LONG: Duration = Duration::from_secs(60);

/// Lines of a dump that are a number alone.
fn numbers(dump: &str) -> usize {
    dump.lines().filter(|line| !line.is_empty() && line.bytes().all(|byte| byte.is_ascii_digit())).count()
}

#[test]
fn a_clone_of_a_subscriber_leaves_the_publisher_alone() {
    let publisher = Cluster::builder().conf("wal_level", "logical").start();
    let stanza = Stanza::in_directory();
    let mut subscriber = stanza.archiving(Cluster::builder()).start();
    publisher.psql("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE t;");
    subscriber.psql("CREATE TABLE t (id int PRIMARY KEY);");
    subscriber.psql(&format!("CREATE SUBSCRIPTION s CONNECTION '{}' PUBLICATION p;", publisher.conninfo()));
    publisher.psql("INSERT INTO t SELECT generate_series(1, 10);");
    let rows = |server: &Client| server.psql("SELECT count(*) FROM t;");
    wait_until(LONG, "the subscriber to follow", || rows(&subscriber) == "10");
    stanza.create(&subscriber);
    stanza.backup(&subscriber);
    subscriber.stop(StopMode::Fast);
    publisher.psql("INSERT INTO t SELECT generate_series(11, 20);");
    let slot = || publisher.psql("SELECT active, confirmed_flush_lsn FROM pg_replication_slots;");
    wait_until(LONG, "the slot to be free", || slot().starts_with("f|"));
    let before = slot();

    let clone = stanza.start("subscriber", &[]);
    assert_eq!(clone.psql("SHOW max_logical_replication_workers; SHOW max_worker_processes;"), "0\n0");
    let workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'logical%';";
    assert_eq!(clone.psql(workers), "0");
    let dump = stanza.run(["extract", "latest", "--table", "postgres.public.t"]).ok();
    assert_eq!((rows(&clone).as_str(), numbers(&dump)), ("10", 10));
    assert_eq!(slot(), before, "a clone moved the slot");
    clone.stop(&[]);
    let copy = stanza.place().join("copy");
    let told = stanza.run(["restore", &copy.display().to_string()]).ok();
    assert!(told.contains("it is a copy: no archiving, no subscriptions"), "{told}");
    let restored = Cluster::open(15, &copy, &[]);
    assert_eq!(restored.psql(&format!("SHOW max_logical_replication_workers; {workers}")), "0\n0");
    assert_eq!((rows(&restored).as_str(), slot()), ("10", before), "a restored copy moved the slot");
    drop(restored);
    let replacement = stanza.place().join("replacement");
    stanza.run(["restore", "--archive-mode=preserve", &replacement.display().to_string()]).ok();
    let conf = fs::read_to_string(replacement.join("postgresql.auto.conf")).unwrap();
    assert!(!conf.contains("max_logical_replication_workers"), "{conf}");

    subscriber.start();
    publisher.psql("INSERT INTO t VALUES (21);");
    wait_until(LONG, "the subscriber to have every row", || rows(&subscriber) == "21");
    stanza.assert_nothing_left();
}

#[test]
fn a_linked_configuration_leads_no_copy_to_its_source() {
    let stanza = Stanza::in_directory();
    let mut cluster = stanza.archiving(Cluster::builder()).start();
    let data = cluster.data_directory().to_owned();
    let outside = stanza.place().directory("etc");
    let logs = stanza.place().directory("logs");
    cluster.stop(StopMode::Fast);
    let (linked, conf) = (data.join("postgresql.conf"), outside.join("postgresql.conf"));
    let ended = outside.join("recovery-ended");
    let text = fs::read_to_string(&linked).unwrap();
    let more = format!(
        "data_directory = '{}'\nlog_directory = '{}'\nlogging_collector = on\nexternal_pid_file = '{}'\n\
         recovery_end_command = 'touch {}'\n",
        data.display(),
        logs.display(),
        outside.join("pid").display(),
        ended.display()
    );
    fs::write(&conf, text + &more).unwrap();
    give_to_server_user(&conf);
    fs::remove_file(&linked).unwrap();
    symlink(&conf, &linked).unwrap();
    cluster.start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 10) AS id;");
    stanza.backup(&cluster);
    cluster.psql("INSERT INTO t SELECT generate_series(11, 20);");
    cluster.stop(StopMode::Immediate);
    let control = || fs::read(data.join("global/pg_control")).unwrap();
    let before = control();

    let clone = stanza.start("linked", &[]);
    let own = clone.data_directory().display().to_string();
    assert_eq!(clone.psql("SHOW data_directory; SELECT count(*) FROM t;"), format!("{own}\n10"));
    assert_eq!(clone.psql("SHOW log_directory; SHOW logging_collector;"), "log\noff");
    clone.stop(&[]);
    assert!(control() == before, "the clone ran on its source");
    let copy = stanza.place().join("copy");
    stanza.run(["restore", &copy.display().to_string()]).ok();
    let restored = Cluster::open(15, &copy, &[("logging_collector", "on")]);
    assert_eq!(restored.psql("SHOW data_directory; SELECT count(*) FROM t;"), format!("{}\n10", copy.display()));
    drop(restored);
    assert!(control() == before, "the restored copy ran on its source");
    assert_eq!(fs::read_dir(&logs).unwrap().count(), 0, "a copy wrote into its source's logs");
    assert!(!ended.exists(), "a copy ran its source's command");
    stanza.assert_nothing_left();
}

#[test]
fn a_clone_is_told_nothing_of_its_starter() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    stanza.backup(&cluster);
    let secrets = [("PGCAIRN_REPO_S3_KEY_SECRET", "told-to-nobody-1"), ("AWS_SECRET_ACCESS_KEY", "told-to-nobody-2")];
    let start = |arguments: &[&str]| {
        let mut command = stanza.command();
        command.args(["start", "--name", "quiet"]).args(arguments).envs(secrets);
        pgcairn_integration::bin::run_command(&mut command)
    };
    for (option, says) in [
        ("archive_mode=on", "--option archive_mode cannot be set"),
        ("Data_Directory=/", "--option data_directory cannot be set"),
        ("recovery_target=immediate", "--option recovery_target cannot be set"),
        ("work_mem; touch /tmp/x =1", "does not name a setting"),
    ] {
        start(&["--option", option]).fails(1, says).fails(1, "hint:");
    }
    let started = start(&["--option", "max_worker_processes=4", "--option", "application_name=it's; false"]);
    assert!(started.stderr.contains("--option max_worker_processes overrides"), "{}", started.stderr);
    let told = started.ok();
    let clone = Client::new(told.split('"').nth(1).unwrap());
    assert_eq!(clone.psql("SHOW max_worker_processes; SHOW archive_mode;"), "4\noff");
    let environment = "CREATE TEMP TABLE e (line text);
        COPY e FROM PROGRAM 'env; cat /proc/[0-9]*/environ 2>/dev/null | tr ''\\0'' ''\\n''; true' (DELIMITER E'\\x01');";
    let seen =
        clone.psql(&format!("{environment} SELECT count(*), count(*) FILTER (WHERE line LIKE 'HOME=%') > 0 FROM e;"));
    assert!(seen.ends_with("|t") && !seen.starts_with("0|"), "{seen}");
    let secret = "SELECT string_agg(line, ' ') FROM e WHERE line LIKE '%told-to-nobody%';";
    assert_eq!(clone.psql(&format!("{environment} {secret}")), "", "the server knows its starter's secrets");
    stanza.run(["stop", "quiet"]).ok();
    stanza.assert_nothing_left();
}

#[test]
fn a_clone_leaves_the_processes_of_its_source_alone() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    stanza.backup(&cluster);
    let server = cluster.pid().unwrap();
    let clone = stanza.start("apart", &[]);
    // its own processes obey, and can be looked at
    assert_eq!(clone.psql("SELECT pg_reload_conf(), length(pg_read_binary_file('/proc/self/environ')) > 0;"), "t|t");
    for statement in [
        format!("COPY (SELECT 1) TO '/proc/{server}/cwd/planted';"),
        format!("SELECT pg_read_binary_file('/proc/{server}/environ');"),
        format!("COPY (SELECT 1) TO PROGRAM 'kill -HUP {server}';"),
    ] {
        let outcome = clone.try_psql(&statement);
        // what refuses it came with Linux 6.12
        assert!(outcome.is_err() || !linux_is_at_least(6, 12), "{statement}: {outcome:?}");
    }
    assert!(!cluster.data_directory().join("planted").exists() || !linux_is_at_least(6, 12));
    clone.stop(&[]);
    stanza.assert_nothing_left();
}

fn linux_is_at_least(major: u32, minor: u32) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let numbers: Vec<u32> = release.split(['.', '-']).map_while(|number| number.parse().ok()).collect();
    (numbers[0], numbers[1]) >= (major, minor)
}

#[test]
fn a_clone_in_memory_has_its_walls() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    stanza.backup(&cluster);
    // the sandbox has a /dev/shm of its own
    let memory = tempfile::Builder::new().prefix("pgcairn-test-").tempdir_in("/dev/shm").unwrap();
    fs::set_permissions(memory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let place = format!("--clone-path={}", memory.path().join("clones").display());
    let mut command = stanza.command();
    command.args(["start", "--name", "memory", &place]);
    let started = pgcairn_integration::bin::run_command(&mut command);
    assert!(!started.stderr.contains("without namespaces"), "{}", started.stderr);
    let clone = Client::new(started.ok().split('"').nth(1).unwrap());
    assert_eq!(clone.psql("SELECT 1;"), "1");
    stanza.run(["stop", "memory", &place]).ok();
    stanza.assert_nothing_left();
}

/// Files below a directory, with their content.
fn contents(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => open.push(path),
                false => found.push((path.clone(), fs::read(path).unwrap())),
            }
        }
    }
    found.sort();
    found
}

/// The server's time, with moments before and after in which nothing is committed.
fn moment(cluster: &Cluster) -> String {
    cluster.psql("SELECT pg_sleep(1.2);");
    let now = cluster.psql("SELECT now();");
    cluster.psql("SELECT pg_sleep(1.2);");
    now
}

/// `cp -a`; fails with what it said.
fn cp(from: &Path, to: &Path) -> Result<(), String> {
    let done = Command::new("cp").arg("-a").args([from, to]).output().unwrap();
    done.status.success().then_some(()).ok_or_else(|| String::from_utf8_lossy(&done.stderr).into_owned())
}

#[test]
fn a_tablespace_made_after_the_backup_stays_the_sources() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    stanza.backup(&cluster);
    let first = cluster.create_tablespace("first");
    let second = cluster.create_tablespace("second");
    cluster.psql(
        "CREATE TABLE t (id int, n int) WITH (fillfactor = 40) TABLESPACE first;
         INSERT INTO t SELECT g, 0 FROM generate_series(1, 1000) g;
         CREATE TABLE u TABLESPACE second AS SELECT 7 AS id;",
    );
    let then = moment(&cluster);
    cluster.psql("UPDATE t SET n = 1; DROP TABLE u;");
    cluster.psql(
        "VACUUM t; CHECKPOINT; SELECT pg_switch_wal(); SELECT pg_logical_emit_message(true, 'x', 'y'); CHECKPOINT;",
    );
    wait_until(LONG, "the WAL to be archived", || {
        cluster.psql(
            "SELECT last_archived_wal >= pg_walfile_name(pg_current_wal_lsn() - 1024 * 1024) FROM pg_stat_archiver;",
        ) == "t"
    });
    cluster.psql("SELECT pg_switch_wal();");
    let files = || (contents(&first), contents(&second));
    let before = files();

    let dump = stanza.run(["extract", &then, "--table", "postgres.public.t"]).ok();
    assert_eq!(dump.lines().filter(|line| line.ends_with("\t0")).count(), 1000);
    assert!(files() == before, "extract wrote into the source's tablespace");

    let rows = "SELECT n, count(*) FROM t GROUP BY 1 ORDER BY 1; SELECT id FROM u;";
    let clone = stanza.start("then", &[&then]);
    assert_eq!(clone.psql(rows), "0|1000\n7");
    clone.psql("UPDATE t SET n = 2; CHECKPOINT;");
    let links = |data: &Path| -> Vec<PathBuf> {
        let links = fs::read_dir(data.join("pg_tblspc")).unwrap().map(|entry| entry.unwrap().path());
        links.map(|link| link.canonicalize().unwrap()).collect()
    };
    let data = clone.data_directory();
    assert!(links(&data).len() == 2 && links(&data).iter().all(|link| link.starts_with(&data)), "{:?}", links(&data));
    // its own crash recovery replays what it wrote, and what it writes to elsewhere is refused
    let elsewhere = stanza.place().directory("elsewhere");
    let refused = clone.try_psql(&format!("CREATE TABLESPACE mine LOCATION '{}';", elsewhere.display())).unwrap_err();
    assert!(refused.contains("does not exist") || refused.contains("Read-only"), "{refused}");
    clone.stop(&["--keep"]);
    assert!(files() == before, "a clone wrote into its source's tablespace");
    let clone = stanza.start("then", &[]);
    assert_eq!(clone.psql(rows), "2|1000\n7");
    kill(Pid::from_raw(clone.pid()), Signal::SIGKILL).unwrap();
    clone.stop(&["--keep"]);
    let clone = stanza.start("then", &[]);
    assert_eq!(clone.psql(rows), "2|1000\n7");
    clone.stop(&[]);

    let clone = stanza.start("reader", &[&then, "--read-only"]);
    assert_eq!(clone.psql(rows), "0|1000\n7");
    clone.stop(&[]);
    assert!(files() == before, "a reader wrote into its source's tablespace");

    let mount = stanza.mount("recovered", &["--recovered", "--type=time", "--target", &then]);
    let led = links(mount.path());
    assert!(led.len() == 2 && led.iter().all(|link| link.starts_with(mount.path())), "{led:?}");
    assert!(led.iter().all(|link| fs::read_dir(link).unwrap().count() == 1), "{led:?}");
    let copied = stanza.place().join("copied");
    cp(mount.path(), &copied).unwrap();
    drop(mount);
    assert!(files() == before, "a recovered mount wrote into the source's tablespace");

    let scratch = stanza.place().join("scratch");
    let arguments = ["--type=time", "--target", &then, "--scratch", scratch.to_str().unwrap()];
    let mount = stanza.mount("moment", &arguments);
    let log = Cluster::try_open(15, mount.path(), &[]).unwrap_err();
    assert!(log.contains("PANIC") && log.contains("Input/output error"), "{log}");
    drop(mount);
    assert!(files() == before, "a server on a mount wrote into the source's tablespace");

    let mount = stanza.mount("all", &[]);
    let pitr = mount.path().join("pitr").join(then.replace(' ', "T").replace("+00", "Z"));
    assert!(fs::read_dir(pitr.join("pg_wal")).unwrap().count() > 1);
    let copied = stanza.place().join("copied-moment");
    let refused = cp(&pitr, &copied).unwrap_err();
    assert!(refused.contains("pg_wal") && refused.contains("Input/output error"), "{refused}");
    cp(&mount.path().join("latest/."), &stanza.place().join("copied-latest")).unwrap();
    drop(mount);
    give_to_server_user(&copied);
    let log = Cluster::try_open(15, &copied, &[]).unwrap_err();
    assert!(log.contains("where another server has its files: the copy would write to them"), "{log}");
    assert!(files() == before, "a copied moment wrote into the source's tablespace");

    let copy = stanza.place().join("copy");
    let target = ["--type=time", "--target", &then, "--target-action=promote"];
    stanza.run([&["restore", &copy.display().to_string()][..], &target].concat()).ok();
    let log = Cluster::try_open(15, &copy, &[]).unwrap_err();
    assert!(log.contains("where another server has its files: the copy would write to them"), "{log}");
    assert!(files() == before, "a restored copy wrote into the source's tablespace");
    stanza.assert_nothing_left();
    assert_eq!(cluster.psql("SELECT n, count(*) FROM t GROUP BY 1;"), "1|1000");
}

#[test]
fn a_clone_reaches_no_server_unless_it_is_told_to() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().conf("listen_addresses", "127.0.0.1")).start();
    let tablespace = cluster.create_tablespace("space");
    cluster.psql("CREATE EXTENSION dblink; CREATE TABLE t (id int) TABLESPACE space;");
    stanza.create(&cluster);
    stanza.backup(&cluster);
    let port = cluster.port();
    let directory = cluster.home().join("run");
    let reach = |clone: &Client, host: &str| {
        let conninfo = format!("host={host} port={port} user=postgres dbname=postgres connect_timeout=5");
        clone.try_psql(&format!("SELECT * FROM dblink('{conninfo}', 'SELECT 1') AS t (one int);"))
    };
    let socket = directory.display().to_string();
    let clone = stanza.start("alone", &[]);
    for host in ["127.0.0.1", &socket] {
        let refused = reach(&clone, host).unwrap_err();
        assert!(refused.contains("could not establish connection"), "{refused}");
    }
    // in the source's places it sees its own
    let seen = clone.psql(&format!(
        "SELECT count(*) FROM pg_ls_dir('{}') AS name WHERE name = 'postmaster.pid'; SELECT pg_read_file('{}/postmaster.pid', 0, 1) <> '';",
        cluster.data_directory().display(),
        cluster.data_directory().display()
    ));
    assert_eq!(seen, "1\nt");
    let pid = clone.psql(&format!(
        "SELECT split_part(pg_read_file('{}/postmaster.pid'), E'\\n', 1);",
        cluster.data_directory().display()
    ));
    assert_eq!(pid, clone.pid().to_string());
    let target = tablespace.join("written");
    for target in
        [&target, &cluster.home().join("written"), Path::new("/tmp/pgcairn-written"), Path::new("/var/written")]
    {
        let written = clone.try_psql(&format!("COPY (SELECT 1) TO PROGRAM 'echo 1 > {}';", target.display()));
        assert!(!target.exists(), "the clone wrote {}: {written:?}", target.display());
    }
    let own = stanza.clone_directory("alone").join("run/copied");
    clone.psql(&format!("COPY (SELECT 1) TO '{}';", own.display()));
    assert!(own.exists());
    // another clone of the machine, and its end, do not depend on this one
    let other = stanza.start("other", &[]);
    clone.stop(&[]);
    other.stop(&[]);

    let clone = stanza.start("told", &["--network"]);
    for host in ["127.0.0.1", &socket] {
        assert_eq!(reach(&clone, host).as_deref(), Ok("1"));
    }
    let written = clone.try_psql(&format!("COPY (SELECT 1) TO '{}';", cluster.home().join("written").display()));
    assert!(written.unwrap_err().contains("Read-only file system"));
    clone.stop(&[]);
    stanza.assert_nothing_left();
}

/// Before 15 statistics are in files, also in a directory of the source's choice.
#[test]
fn statistics_and_logs_of_an_old_source_are_left_alone() {
    for major in [13, 14] {
        if pgcairn_integration::install::find_server(major).is_none() {
            // setup.sh brings 13
            assert_eq!(major, 14, "PostgreSQL 13 is not installed; run \"scripts/setup.sh\"");
            continue;
        }
        let stanza = Stanza::in_directory();
        let (statistics, logs) = (stanza.place().directory("statistics"), stanza.place().directory("logs"));
        let builder = Cluster::builder().major(major).conf("log_directory", &logs.display().to_string());
        let builder = builder.conf("stats_temp_directory", &statistics.display().to_string());
        let mut cluster = stanza.archiving(builder).start();
        stanza.create(&cluster);
        stanza.backup(&cluster);
        assert!(!contents(&statistics).is_empty(), "the source keeps its statistics elsewhere");
        cluster.stop(StopMode::Fast);
        let state = || {
            let changed = |directory: &Path| fs::metadata(directory).unwrap().modified().unwrap();
            (contents(&statistics), contents(&logs), changed(&statistics), changed(&logs))
        };
        let before = state();

        let programs = format!("--pg-bin={}", pgcairn_integration::install::server(major).display());
        let at_work = |server: &Client| {
            server.psql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS i; SELECT pg_sleep(0.6);");
            assert_ne!(server.psql("SELECT count(*) FROM pg_stat_database WHERE xact_commit > 0;"), "0");
            server.psql("SELECT pg_rotate_logfile(), pg_sleep(0.2);");
            assert_eq!(server.psql("SHOW stats_temp_directory; SHOW log_directory;"), "pg_stat_tmp\nlog");
        };
        let start = ["start", "--name=old", &programs, "--option=logging_collector=on"];
        for walled in [true, false] {
            let command = if walled {
                pgcairn_integration::bin::command()
            } else {
                walls::command(&stanza.place().directory("walls"))
            };
            let started = pgcairn_integration::bin::run_command(stanza.prepared(command).args(start));
            assert_eq!(started.stderr.contains("without namespaces of its own"), !walled, "{}", started.stderr);
            let clone = Client::new(started.ok().split('"').nth(1).unwrap());
            at_work(&clone);
            stanza.run(["stop", "old"]).ok();
            assert!(state() == before, "a clone of {major} wrote into its source's directories, walled: {walled}");
        }
        let copy = stanza.place().join("copy");
        stanza.run(["restore", &copy.display().to_string()]).ok();
        let mut restored = Cluster::open(major, &copy, &[("logging_collector", "on")]);
        wait_until(LONG, "the end of recovery", || restored.psql("SELECT pg_is_in_recovery();") == "f");
        at_work(&restored);
        restored.stop(StopMode::Fast);
        assert!(state() == before, "a restored copy of {major} wrote into its source's directories");
        stanza.assert_nothing_left();
    }
}

/// A job of pg_cron that runs whenever its server starts.
#[test]
fn jobs_of_the_source_do_not_run_in_a_copy() {
    let stanza = Stanza::in_directory();
    let libraries =
        Cluster::builder().conf("shared_preload_libraries", "pg_cron").conf("cron.use_background_workers", "on");
    let mut cluster = stanza.archiving(libraries).start();
    cluster.psql("CREATE EXTENSION pg_cron; SELECT cron.schedule('@reboot', 'CREATE TABLE ran ()');");
    cluster.restart();
    let has_run = |server: &Client| server.psql("SELECT to_regclass('ran') IS NOT NULL;") == "t";
    wait_until(LONG, "the source's job to run", || has_run(&cluster));
    cluster.psql("DROP TABLE ran; TRUNCATE cron.job_run_details;");
    stanza.create(&cluster);
    stanza.backup(&cluster);
    let workers =
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pg_cron%' OR backend_type LIKE 'pg_cron%';";
    // before 1.5 the job is tried, and fails to connect
    let tried = |server: &Client| {
        let tried = server.psql("SELECT coalesce(string_agg(DISTINCT status, ' '), '') FROM cron.job_run_details;");
        let done = !tried.is_empty() && tried != "starting";
        let has_switch = server
            .psql("SELECT count(*) FROM pg_settings WHERE name = 'cron.launch_active_jobs' AND context <> 'user';");
        done || has_switch == "1"
    };

    let clone = stanza.start("jobs", &[]);
    assert_eq!((clone.psql(workers).as_str(), clone.psql("SELECT count(*) FROM cron.job;").as_str()), ("0", "1"));
    clone.stop(&[]);

    let clone = stanza.start("reader", &["--read-only"]);
    assert_eq!(clone.psql(workers), "0");
    clone.psql("SELECT pg_wal_replay_resume();");
    wait_until(LONG, "the reader to be a server", || clone.psql("SELECT pg_is_in_recovery();") == "f");
    wait_until(LONG, "the job to be tried", || tried(&clone));
    assert!(!has_run(&clone), "a job ran in a clone");
    clone.stop(&[]);

    let copy = stanza.place().join("copy");
    let told = stanza.run(["restore", &copy.display().to_string()]).ok();
    assert!(told.contains("loads pg_cron, which may run workers"), "{told}");
    let restored = Cluster::open(15, &copy, &[]);
    wait_until(LONG, "the job to be tried", || tried(&restored));
    assert!(!has_run(&restored), "a job ran in a restored copy");
    drop(restored);
    stanza.assert_nothing_left();
}

/// What the owner of a database, who is nobody else, may say of every session in it.
const HOSTILE: &str = "
CREATE SCHEMA evil; GRANT USAGE ON SCHEMA evil TO public;
CREATE FUNCTION evil.seize() RETURNS bool LANGUAGE plpgsql AS $$ BEGIN
    IF (SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) current_user) THEN
        EXECUTE 'ALTER ROLE app SUPERUSER';
    END IF;
    RETURN false;
EXCEPTION WHEN OTHERS THEN RETURN false; END $$;
CREATE FUNCTION evil.pg_is_in_recovery() RETURNS bool LANGUAGE sql AS 'SELECT evil.seize()';
CREATE FUNCTION evil.to_char(timestamptz, text) RETURNS text LANGUAGE sql AS 'SELECT evil.seize()::text';
CREATE FUNCTION evil.same(text, text) RETURNS bool LANGUAGE sql AS 'SELECT evil.seize() OR $1 OPERATOR(pg_catalog.=) $2';
CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.same);
CREATE TABLE t AS SELECT generate_series(1, 10) AS i;
ALTER DATABASE shop SET search_path = evil, pg_catalog, public;
";

#[test]
fn the_owner_of_a_database_does_not_become_superuser() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    cluster.psql("CREATE ROLE app LOGIN;");
    cluster.psql("CREATE DATABASE shop OWNER app;");
    let conninfo =
        |user: &str| cluster.conninfo().replace("user=postgres dbname=postgres", &format!("user={user} dbname=shop"));
    Client::new(conninfo("app")).psql(HOSTILE);
    let is_superuser = "SELECT rolsuper FROM pg_roles WHERE rolname = 'app';";
    let shop = conninfo("postgres");
    for arguments in [&["check"][..], &["backup", "--type=full"], &["backup", "--type=full", "--source=stream"]] {
        stanza.run([arguments, &["--pg", &shop]].concat()).ok();
        assert_eq!(cluster.psql(is_superuser), "f", "{arguments:?}");
    }
    cluster.psql("ALTER DATABASE shop SET statement_timeout = '1ms';");
    // what its user gives counts, but not before ours
    let own = format!("{shop} options='-c work_mem=8MB -c search_path=evil'");
    stanza.run(["check", "--pg", &own]).ok();
    assert_eq!(cluster.psql(is_superuser), "f");
    let clone = stanza.start("clone", &["--pg-database=shop"]);
    assert_eq!(clone.database("postgres").psql(is_superuser), "f", "in a clone");
    clone.stop(&[]);
    let dump = stanza.run(["extract", "latest", "--table", "shop.public.t"]).ok();
    assert_eq!(numbers(&dump), 10);
    stanza.assert_nothing_left();
}

/// It would change rows of the clone, or let nobody in.
#[test]
fn a_trigger_on_logins_does_not_run_for_ours_in_a_clone() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().major(18)).start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE seen (who text); CREATE ROLE low LOGIN; GRANT INSERT, SELECT ON seen TO low;");
    cluster.psql(
        "CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
             INSERT INTO public.seen VALUES (pg_catalog.current_setting('application_name')); END $$;
         CREATE EVENT TRIGGER note ON login EXECUTE FUNCTION note(); ALTER EVENT TRIGGER note ENABLE ALWAYS;",
    );
    stanza.backup(&cluster);
    let bin = format!("--pg-bin={}", install::server(18).display());
    let ours = "SELECT count(*) FILTER (WHERE who = ''), count(*) FILTER (WHERE who = 'psql') FROM seen;";
    let clone = stanza.start("clone", &[&bin]);
    assert_eq!(clone.psql(ours).split_once('|').map(|(ours, _)| ours.to_owned()).as_deref(), Some("0"));
    clone.stop(&[]);
    let clone = stanza.start("reader", &["--read-only", &bin]);
    clone.stop(&[]);
    // a role that may not turn it off logs in all the same
    let clone = stanza.start("low", &["--pg-user=low", &bin]);
    clone.stop(&[]);
    stanza.assert_nothing_left();
}
