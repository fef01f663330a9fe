//! A clone, an extract, a recovered mount or a restored copy touches nothing but itself.
#![allow(clippy::unwrap_used, clippy::unwrap_in_result)]

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use pgcairn_integration::cluster::StopMode;
use pgcairn_integration::install::give_to_server_user;
use pgcairn_integration::{Client, Cluster, Stanza, wait_until};

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
    assert_eq!(fs::read_dir(&logs).unwrap().count(), 0, "the clone wrote into its source's logs");
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
