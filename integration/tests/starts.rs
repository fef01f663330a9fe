//! A clone starts, or says why within seconds, whatever its cluster and this machine are like.
#![allow(clippy::unwrap_used)]

mod history;

use std::fs;
use std::process::Stdio;

use history::archive_all;
use pgcairn_integration::bin::run_command;
use pgcairn_integration::{Client, Cluster, Stanza, install};

/// A moment of the server, after which something else was committed.
fn moment(cluster: &Cluster) -> String {
    let now = cluster.psql("SELECT clock_timestamp();");
    cluster.psql("CREATE TABLE later (i int); DROP TABLE later;");
    archive_all(cluster);
    now
}

/// Settings that were raised between the backup and the moment are met, whether the clone is open at its target or goes on from it.
#[test]
fn raised_settings_are_met() {
    for major in [13, 15] {
        let stanza = Stanza::in_directory();
        let mut cluster = stanza.archiving(Cluster::builder().major(major).wal_segsize_mb(1)).start();
        stanza.create(&cluster);
        cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 10) AS i;");
        stanza.backup(&cluster);
        cluster.psql("INSERT INTO t SELECT generate_series(11, 20);");
        cluster.psql("ALTER SYSTEM SET max_connections = 150;");
        cluster.restart();
        cluster.psql("ALTER SYSTEM SET max_connections = 300;");
        cluster.psql("ALTER SYSTEM SET max_prepared_transactions = 5;");
        cluster.restart();
        cluster.psql("BEGIN; CREATE TABLE held (i int); PREPARE TRANSACTION 'held';");
        cluster.psql("INSERT INTO t SELECT generate_series(21, 30);");
        let time = moment(&cluster);
        let programs = format!("--pg-bin={}", install::server(major).display());
        let reader = stanza.start("reader", &[&programs, &time, "--read-only"]);
        assert_eq!(reader.psql("SELECT count(*), pg_is_in_recovery() FROM t;"), "30|t", "{major}");
        assert!(reader.told().contains("recovered to LSN "), "{}", reader.told());
        reader.stop(&[]);
        let clone = stanza.start("clone", &[&programs, &time]);
        assert_eq!(clone.psql("SELECT count(*), pg_is_in_recovery() FROM t;"), "30|f", "{major}");
        assert_eq!(clone.psql("SELECT gid FROM pg_prepared_xacts;"), "held", "{major}");
        clone.stop(&[]);
        cluster.psql("ROLLBACK PREPARED 'held';");
        stanza.assert_nothing_left();
    }
}

/// With its settings outside the data directory a cluster still has the room that its prepared transactions need.
#[test]
fn prepared_transactions_survive_settings_that_are_elsewhere() {
    let stanza = Stanza::in_directory();
    let builder = Cluster::builder().wal_segsize_mb(1).conf("max_prepared_transactions", "20");
    let cluster = stanza.archiving(builder.conf("max_connections", "12").conf("max_wal_senders", "4")).start();
    // as where Debian keeps it
    std::fs::remove_file(cluster.data_directory().join("postgresql.conf")).unwrap();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t (i int); BEGIN; INSERT INTO t VALUES (1); PREPARE TRANSACTION 'held';");
    let label = stanza.backup(&cluster);
    let time = moment(&cluster);
    for target in [&label, &time] {
        let clone = stanza.start("clone", &[target]);
        assert_eq!(clone.psql("SELECT gid FROM pg_prepared_xacts;"), "held");
        clone.psql("COMMIT PREPARED 'held';");
        assert_eq!(clone.psql("SELECT i FROM t;"), "1");
        clone.stop(&[]);
    }
    cluster.psql("ROLLBACK PREPARED 'held';");
    stanza.assert_nothing_left();
}

/// A server that is paused before it can be open for reading goes on instead: that is no clone to read at a moment.
#[test]
fn a_reader_that_cannot_be_open_at_its_target_says_so() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t (i int);");
    let mut session = cluster.session();
    session.run("BEGIN;");
    for i in 0..70 {
        session.run(&format!("SAVEPOINT s; INSERT INTO t VALUES ({i});"));
    }
    stanza.backup(&cluster);
    cluster.psql("CREATE TABLE seen AS SELECT 1 AS i;");
    let time = moment(&cluster);
    let refused = stanza.run(["start", &time, "--read-only"]).fails(1, "more than 64 subtransactions");
    assert!(refused.stderr.contains("hint: leave --read-only out"), "{}", refused.stderr);
    let clone = stanza.start("clone", &[&time]);
    assert_eq!(clone.psql("SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM seen);"), "0|1");
    clone.stop(&[]);
    session.run("COMMIT;");
    // the next list of running transactions is complete, and a moment ends with the last commit before it
    cluster.psql("CHECKPOINT;");
    cluster.psql("INSERT INTO seen VALUES (2);");
    let time = moment(&cluster);
    let reader = stanza.start("reader", &[&time, "--read-only"]);
    assert_eq!(reader.psql("SELECT count(*) FROM t;"), "70");
    reader.stop(&[]);
    stanza.assert_nothing_left();
}

/// What no patience mends ends a start at once, and says what does. (Were it tried again until the time-out, these runs would
/// not end in time.)
#[test]
fn nobody_waits_for_a_login_that_is_refused() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    cluster.psql("CREATE ROLE other SUPERUSER LOGIN;");
    let other = Client::new(cluster.conninfo().replace("user=postgres dbname=postgres", "user=other dbname=template1"));
    let backup = || stanza.run(["backup", "--type=full", "--pg", other.conninfo()]).ok();

    // neither the usual database, nor a library of every session of the superuser's
    other.psql("CREATE TABLE here AS SELECT 1 AS i; DROP DATABASE postgres;");
    other.psql("ALTER ROLE postgres SET session_preload_libraries = 'no_such_library';");
    backup();
    let clone = stanza.start("clone", &["latest"]);
    assert!(clone.told().contains("dbname=template1"), "{}", clone.told());
    assert_eq!(clone.psql("SELECT i FROM here;"), "1");
    clone.stop(&[]);
    let refused = stanza.run(["start", "--pg-database=nowhere"]).fails(1, "database \"nowhere\" does not exist");
    assert!(refused.stderr.contains("hint: name a database of the cluster with --pg-database"), "{}", refused.stderr);

    other.psql("ALTER ROLE postgres NOLOGIN;");
    backup();
    let refused = stanza.run(["start"]).fails(1, "role \"postgres\" is not permitted to log in");
    assert!(refused.stderr.contains("hint: name a role that may log in with --pg-user"), "{}", refused.stderr);
    let clone = stanza.start("clone", &["--pg-user=other"]);
    assert_eq!(clone.psql("SELECT current_user, (SELECT i FROM here);"), "other|1");
    clone.stop(&[]);
    let mut command = stanza.command();
    command.env("PGCAIRN_PG_USER", "other").args(["extract", "--table=template1.public.here"]);
    assert!(run_command(&mut command).ok().contains("COPY public.here"));
    // nobody has to log in where the server only recovers
    let mount = stanza.mount("recovered", &["--recovered", "--backup=latest", "--type=immediate"]);
    assert!(!mount.path().join("recovery.signal").exists());
    drop(mount);
    stanza.assert_nothing_left();
}

#[test]
fn a_clone_path_may_hold_any_character_or_is_refused() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    stanza.backup(&cluster);
    let odd = |name: &str| format!("--clone-path={}", stanza.place().join(name).display());
    let clones = odd("cl o'nes {ä}");
    stanza.run(["start", "--name=odd", &clones]).ok();
    stanza.run(["extract", "--table=postgres.public.*", &clones]).fails(1, "no table matches");
    stanza.run(["stop", "odd", &clones]).ok();
    for bad in ["a,b", "a\"b", "a$b", "a\nb"] {
        stanza.run(["start", "--name=odd", &odd(bad)]).fails(1, "in its name").fails(1, "hint: ");
    }
    stanza.run(["start", "--name=odd", &odd(&"long".repeat(30))]).fails(1, "socket would be too long");
    stanza.assert_nothing_left();
}

/// Lines that this machine's server does not take, after which the others count.
const NOT_HERE: &str = "
include '/etc/pgcairn-missing.conf'
include_dir '/etc/pgcairn-missing.d'
include 'below.conf'
lc_messages = 'xx_XX.UTF-8'
timezone = 'Mars/Olympus'
no_such_parameter = 1
this is no line
";
/// Lines that a clone's server must not follow.
const ELSEWHERE: &str = "
no_such.parameter = 2
ssl = on
ssl_cert_file = '/nowhere/server.crt'
shared_buffers = '4000GB'
huge_pages = on
wal_buffers = '2000MB'
data_directory = '/nowhere/data'
hba_file = '/nowhere/pg_hba.conf'
ident_file = '/nowhere/pg_ident.conf'
external_pid_file = '/nowhere/pid'
log_destination = 'syslog'
logging_collector = on
log_directory = '/nowhere/log'
listen_addresses = '203.0.113.1'
unix_socket_directories = '/nowhere/socket'
unix_socket_group = 'no_such_group'
dynamic_library_path = '/nowhere/lib:$libdir'
";

/// What this machine does not have of the source's configuration is left out and told; where its
/// files and addresses are does not matter.
#[test]
fn a_configuration_that_this_machine_cannot_follow() {
    for (major, of_major) in [
        (15, "archive_library = 'no_such_archiver'\nmin_dynamic_shared_memory = '100TB'\ndb_user_namespace = on\n"),
        (
            13,
            "stats_temp_directory = '/nowhere/stat'\npromote_trigger_file = '/etc/hostname'\ndb_user_namespace = on\n",
        ),
        (18, "archive_library = 'no_such_archiver'\nmin_dynamic_shared_memory = '100TB'\n"),
    ] {
        let stanza = Stanza::in_directory();
        let cluster = stanza.archiving(Cluster::builder().major(major)).start();
        stanza.create(&cluster);
        cluster.psql("CREATE TABLE t AS SELECT 1 AS i;");
        let add = |file: &str, lines: &str| {
            let path = cluster.data_directory().join(file);
            let text = fs::read_to_string(&path).unwrap_or_default();
            fs::write(&path, text + lines).unwrap();
            install::give_to_server_user(&path);
        };
        let libraries = "shared_preload_libraries = 'no_such_library, \"$libdir/neither\"'\n";
        add("postgresql.conf", &format!("{NOT_HERE}{ELSEWHERE}{of_major}{libraries}"));
        add("below.conf", "lc_time = 'yy_YY.UTF-8'\nwork_mem = '7MB'\n");
        add("postgresql.auto.conf", "lc_monetary = 'zz_ZZ.UTF-8'\n");
        stanza.backup(&cluster);
        let time = moment(&cluster);

        let programs = format!("--pg-bin={}", install::server(major).display());
        let start = |arguments: &[&str]| {
            let output = stanza.run([&["start", "--name=clone", "--output=json", &programs], arguments].concat());
            let told = output.stderr.clone();
            let json: serde_json::Value = serde_json::from_str(&output.ok()).unwrap();
            (Client::new(json["conninfo"].as_str().unwrap()), json, told)
        };
        let (clone, json, told) = start(&["latest"]);
        for left in [
            "include '/etc/pgcairn-missing.conf' (could not open configuration file \"/etc/pgcairn-missing.conf\"",
            "include_dir '/etc/pgcairn-missing.d' (could not open configuration directory",
            "lc_messages = 'xx_XX.UTF-8' (invalid value for parameter \"lc_messages\"",
            "timezone = 'Mars/Olympus' (invalid value",
            "no_such_parameter = 1 (unrecognized configuration parameter",
            "this is no line (syntax error in file",
            "below.conf line 1: lc_time = 'yy_YY.UTF-8' (invalid value",
            "postgresql.auto.conf line 3: lc_monetary = 'zz_ZZ.UTF-8' (invalid value",
            "library no_such_library (could not access file \"no_such_library\"",
            "library neither (could not access file \"$libdir/neither\"",
        ] {
            assert!(told.contains(left), "{major}: {left}: {told}");
        }
        // and ssl, of a build without it
        let left_out = json["left-out"].as_array().unwrap().len();
        assert!((10..=11).contains(&left_out), "{major}: {json}");
        assert_eq!(told.matches("does without").count(), left_out, "{major}: {told}");
        let shown = "SELECT i FROM t; SHOW work_mem; SHOW shared_preload_libraries; SHOW no_such.parameter;";
        assert_eq!(clone.psql(shown), "1\n7MB\n\n2", "{major}");
        // the generated file is read again
        assert_eq!(clone.psql("SELECT pg_reload_conf(); SELECT pg_sleep(0.2); SHOW work_mem;"), "t\n\n7MB", "{major}");
        stanza.run(["stop", "clone", "--keep"]).ok();
        assert_eq!(start(&[]).0.psql(shown), "1\n7MB\n\n2", "{major}");
        stanza.run(["stop", "clone"]).ok();
        let (reader, ..) = start(&[&time, "--read-only"]);
        assert_eq!(reader.psql("SELECT i, pg_is_in_recovery() FROM t;"), "1|t", "{major}");
        stanza.run(["stop", "clone"]).ok();

        // what the user says is not left out
        for (option, says) in [
            ("shared_preload_libraries=no_such_library", "could not access file \"no_such_library\""),
            ("no_such_parameter=1", "unrecognized configuration parameter \"no_such_parameter\""),
            ("timezone=Mars/Olympus", "invalid value for parameter \"TimeZone\""),
        ] {
            let refused = stanza.run(["start", &programs, "--option", option]).fails(1, says);
            assert!(refused.stderr.contains("--option NAME=VALUE changes a setting"), "{}", refused.stderr);
        }
        stanza.assert_nothing_left();
    }
}

#[test]
fn clones_without_a_name_started_at_once_have_one_each() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    let label = stanza.backup(&cluster);
    let start = || stanza.command().arg("start").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started: Vec<_> = (0..3).map(|_| start()).collect();
    for child in started {
        let done = child.wait_with_output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    let clones = stanza.clone_directory("x").parent().unwrap().to_owned();
    let names = fs::read_dir(clones).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    let (first, rest) = names.split_first().unwrap();
    assert!(first.ends_with(&label), "{names:?}");
    assert_eq!(rest, [format!("{first}-2"), format!("{first}-3")]);
    names.iter().for_each(|name| _ = stanza.run(["stop", name]).ok());
    stanza.assert_nothing_left();
}
