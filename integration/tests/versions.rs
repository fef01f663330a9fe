//! The whole way on the oldest and the newest PostgreSQL.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use pgcairn::clone::settings::{ServerOf, Settings};
use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Cluster, Data, Stanza, StopMode, install};

fn the_whole_way(major: u32, wal_segsize_mb: u32) {
    let stanza = Stanza::in_directory();
    let builder = Cluster::builder().major(major).wal_segsize_mb(wal_segsize_mb).checksums(true);
    let cluster = stanza.archiving(builder).start();
    cluster.create_tablespace("elsewhere");
    Data::tiny().pgbench_scale(1).load(&cluster);
    cluster.psql("CREATE TABLE moved TABLESPACE elsewhere AS SELECT generate_series(1, 10000) AS i;");
    stanza.create(&cluster);
    stanza.run(["check", "--pg", cluster.conninfo()]).ok();
    let expected = cluster.fingerprint();
    let label = stanza.backup(&cluster);
    cluster.psql("UPDATE moved SET i = -i;");

    let mount = stanza.mount("mount", &["--backup", &label]);
    // clients of 15 judge; from 17 on the manifest is one that they do not know
    if major < 17 {
        run_ok(install::client("pg_verifybackup").arg("-n").arg(mount.path()), &[], Duration::from_secs(120));
    }
    drop(mount);

    let (copy, tablespaces) = (stanza.place().join("copy"), stanza.place().join("tablespaces"));
    let map = format!("--tablespace-map-all={}", tablespaces.display());
    stanza.run(["restore", "--type=none", &map, copy.to_str().unwrap()]).ok();
    let mut opened = Cluster::open(major, &copy, &[]);
    assert_eq!(opened.fingerprint(), expected);
    opened.stop(StopMode::Fast);
    drop(opened);

    let bin = install::server(major);
    let arguments: &[&str] = &["--pg-bin", bin.to_str().unwrap()];
    let clone = stanza.start("clone", arguments);
    assert_eq!(clone.fingerprint(), expected);
    clone.psql("UPDATE moved SET i = 0; CREATE TABLE made AS SELECT generate_series(1, 10000) AS i; CHECKPOINT;");
    let written = clone.fingerprint();
    clone.stop(&["--keep"]);
    let clone = stanza.start("clone", arguments);
    assert_eq!(clone.fingerprint(), written);
    clone.stop(&[]);
    let clone = stanza.start("again", arguments);
    assert_eq!(clone.fingerprint(), expected, "a clone sees what another wrote");
    clone.stop(&[]);
    stanza.assert_nothing_left();

    // the programs of another major are not taken
    let wrong = install::server(15);
    let refused = stanza.run(["start", "--pg-bin", wrong.to_str().unwrap()]).fails(1, "has PostgreSQL 15");
    assert!(refused.stderr.contains(&format!("the backup needs {major}")), "{}", refused.stderr);
    stanza.run(["start"]).fails(1, &format!("PostgreSQL {major} is not installed")).fails(1, "hint:");
    stanza.assert_nothing_left();
}

#[test]
fn postgresql_13() {
    the_whole_way(13, 1);
}

#[test]
fn postgresql_18() {
    the_whole_way(18, 64);
}

/// What names of settings hold that can lead outside of the data directory, or load code.
const OUTSIDE: [&str; 18] = [
    "file",
    "director",
    "command",
    "librar",
    "_path",
    "conninfo",
    "address",
    "socket",
    "provider",
    "slot_name",
    "names",
    "bonjour",
    "krb",
    "syslog",
    "archive",
    "destination",
    "tablespace",
    "host",
];

/// Settings of the kind that are not on a clone's command line, and why.
const NO_WAY_OUT: &[(&str, &str)] = &[
    ("archive_timeout", "of archiving, which is off"),
    ("bonjour_name", "of bonjour, which is off"),
    ("dynamic_library_path", "libraries of this machine"),
    ("extension_control_path", "libraries of this machine"),
    ("jit_provider", "a library of this machine"),
    ("local_preload_libraries", "libraries of this machine"),
    ("session_preload_libraries", "libraries of this machine"),
    ("output_plugin_libraries", "libraries of this machine"),
    ("shared_preload_libraries", "libraries of this machine, without workers"),
    ("krb_caseins_users", "of a login that the access rules do not have"),
    ("krb_server_keyfile", "of a login that the access rules do not have"),
    ("oauth_validator_libraries", "of a login that the access rules do not have"),
    ("log_file_mode", "of the logging collector, which is off"),
    ("log_filename", "of the logging collector, which is off"),
    ("syslog_facility", "of syslog, which is off"),
    ("syslog_ident", "of syslog, which is off"),
    ("syslog_sequence_numbers", "of syslog, which is off"),
    ("syslog_split_messages", "of syslog, which is off"),
    ("log_hostname", "of TCP, which is off"),
    ("log_replication_commands", "a switch"),
    ("ssl_ca_file", "of ssl, which is off"),
    ("ssl_cert_file", "of ssl, which is off"),
    ("ssl_crl_file", "of ssl, which is off"),
    ("ssl_crl_dir", "of ssl, which is off"),
    ("ssl_dh_params_file", "of ssl, which is off"),
    ("ssl_key_file", "of ssl, which is off"),
    ("ssl_passphrase_command_supports_reload", "a switch"),
    ("hot_standby_feedback", "of a connection that it does not make"),
    ("restore_command", "the clone's own, in postgresql.auto.conf"),
    ("default_tablespace", "tablespaces are the clone's own"),
    ("temp_tablespaces", "tablespaces are the clone's own"),
    ("max_files_per_process", "a number"),
    ("max_standby_archive_delay", "a number"),
    ("temp_file_limit", "a number"),
    ("log_temp_files", "a number"),
    ("search_path", "schemas"),
    ("file_copy_method", "a way to work"),
    ("file_extend_method", "a way to work"),
];

/// No version has a setting that leads outside, or loads code, of which nobody has thought
/// (docs/isolation.md).
#[test]
fn every_setting_that_leads_outside_is_known() {
    for major in (13..=18).filter(|major| install::find_server(*major).is_some()) {
        let clone = ServerOf {
            name: "c",
            data: Path::new("/c/data"),
            config_file: Path::new("/c/data/postgresql.conf"),
            libraries: None,
            run: Path::new("/c/run"),
            pid_file: Path::new("/c/run/pid"),
            port: 1,
            version: major,
            recovers: true,
            read_only: false,
            limits: &[("max_worker_processes", 8)],
            memory_available: 0,
        };
        let line = Settings::of(&clone).shell_words();
        let mut postgres = install::as_server_user(install::server(major).join("postgres"));
        let described = run_ok(postgres.arg("--describe-config"), &[], Duration::from_secs(60));
        let mut unseen = Vec::new();
        for setting in described.lines().map(|line| line.split('\t').collect::<Vec<_>>()) {
            let name = setting[0];
            let known = line.contains(&format!("-c {name}=")) || NO_WAY_OUT.iter().any(|(known, _)| *known == name);
            if !known && OUTSIDE.iter().any(|word| name.contains(word)) {
                unseen.push(format!("{name}: {}", setting[7..].join(" ")));
            }
        }
        assert!(unseen.is_empty(), "{major}: {unseen:#?}");
    }
}
