//! An old and damaged copy made equal to a backup; databases left out of a copy.
#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pgcairn_integration::files::{assert_same_bytes, tree};
use pgcairn_integration::wait::wait_until;
use pgcairn_integration::{Cluster, Data, Stanza, StopMode};

const MAJOR: u32 = 15;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Demands that two trees have the same files, links, modes, owners, times and bytes; links to tablespaces lead elsewhere.
#[track_caller]
fn assert_same_tree(found: &Path, expected: &Path) {
    let (ours, theirs) = (tree(found), tree(expected));
    let paths = |of: &std::collections::BTreeMap<PathBuf, fs::Metadata>| of.keys().cloned().collect::<Vec<_>>();
    assert_eq!(paths(&ours), paths(&theirs));
    for (path, metadata) in &theirs {
        let of = |metadata: &fs::Metadata| (metadata.mode(), metadata.uid(), metadata.gid());
        assert_eq!(of(&ours[path]), of(metadata), "{}", path.display());
        if metadata.is_file() {
            assert_eq!(ours[path].mtime(), metadata.mtime(), "{}", path.display());
            assert_same_bytes(&found.join(path), &expected.join(path));
        }
    }
}

/// A relation's file in a data directory.
fn relation(cluster: &Cluster, root: &Path, table: &str) -> PathBuf {
    root.join(cluster.psql(&format!("SELECT pg_relation_filepath('{table}');")))
}

/// Overwrites a page in the middle of a file.
fn spoil(path: &Path, block: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[0x5A; 8192], block * 8192).unwrap();
}

/// Recovers a copy, stops it, and checks every page.
fn prove(copy: &Path, rows: &str, settings: &[(&str, &str)]) {
    let mut server = Cluster::open(MAJOR, copy, settings);
    wait_until(Duration::from_secs(60), "the end of recovery", || server.psql("SELECT pg_is_in_recovery();") == "f");
    assert_eq!(server.psql("SELECT count(*), sum(abalance) FROM pgbench_accounts;"), rows);
    server.psql("SELECT count(*) FROM moved; SELECT count(*) FROM unlogged_rows;");
    server.stop(StopMode::Fast);
    let checked = Command::new(server.bin_directory().join("pg_checksums")).args(["--check", "-D"]).arg(copy).output();
    let checked = checked.unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

#[test]
fn a_damaged_old_copy_becomes_what_a_fresh_restore_is() {
    let stanza = Stanza::in_directory().with_passphrase("a secret of many words");
    let cluster = stanza.archiving(Cluster::builder().checksums(true).wal_segsize_mb(1)).start();
    cluster.create_tablespace("elsewhere");
    stanza.run(["stanza-create", "--encrypt", "--pg", cluster.conninfo()]).ok();
    Data::default().load(&cluster);
    cluster
        .psql("CREATE TABLE moved TABLESPACE elsewhere AS SELECT i, md5(i::text) FROM generate_series(1, 50000) AS i;");
    cluster.psql("CREATE TABLE gone AS SELECT generate_series(1, 50000) AS i;");
    stanza.backup(&cluster);

    let (copy, spaces) = (stanza.place().join("copy"), stanza.place().join("spaces"));
    let spaces_option = format!("--tablespace-map-all={}", spaces.display());
    let onto = |arguments: &[&str]| stanza.run([&["restore", text(&copy), &spaces_option], arguments].concat());
    onto(&["--type=none"]).ok();
    assert!(spaces.join("elsewhere").is_dir(), "tablespaces are found by their names");
    let mut server = Cluster::open(MAJOR, &copy, &[]);
    server.psql("UPDATE pgbench_accounts SET abalance = 7 WHERE aid % 50 = 0; CREATE TABLE strange AS SELECT 1 AS i;");
    refused(onto(&["--delta"]), "a server runs in");
    server.stop(StopMode::Fast);

    // the source goes on, too
    cluster.psql("DROP TABLE gone; UPDATE pgbench_accounts SET abalance = 3 WHERE aid % 100 = 0;");
    let before = cluster.psql("SELECT clock_timestamp();");
    cluster.psql("CREATE TABLE later AS SELECT 1 AS i; DELETE FROM moved WHERE i % 3 = 0; CHECKPOINT;");
    let label = stanza.backup(&cluster);
    let rows = cluster.psql("SELECT count(*), sum(abalance) FROM pgbench_accounts;");

    refused(onto(&[]), "not empty");
    damage(&cluster, &copy, &spaces);
    let told = onto(&["--delta"]).ok();
    assert!(told.contains("were equal") && told.contains("files that did not belong were removed"), "{told}");
    let (fresh, fresh_spaces) = (stanza.place().join("fresh"), stanza.place().join("fresh-spaces"));
    stanza.run(["restore", text(&fresh), "--set", &label, "--tablespace-map-all", text(&fresh_spaces)]).ok();
    assert_same_tree(&spaces, &fresh_spaces);
    assert_same_tree(&copy, &fresh);

    // from where it is to a moment before that backup
    let json =
        onto(&["--delta", "--type=time", &format!("--target={before}"), "--target-action=promote", "--output=json"]);
    let json = json.ok();
    let number = |name: &str| pgcairn_integration::stanza::number(&json, name);
    assert!(number("bytes-written") + number("bytes-equal") == number("bytes"), "{json}");
    prove(&copy, &rows, &[]);
    let server = Cluster::open(MAJOR, &copy, &[]);
    assert_eq!(server.psql("SELECT to_regclass('later') IS NULL, count(*) FROM moved;"), "t|50000");
    drop(server);

    // what a killed restore leaves does not start, and is continued
    spoil(&relation(&cluster, &copy, "random_bytes"), 3);
    fs::remove_file(copy.join("global/pg_control")).unwrap();
    refused(onto(&["--delta"]), "not a data directory");
    fs::write(
        copy.join("pgcairn.restore"),
        format!(
            "{{\"system-id\": {}, \"label\": \"x\", \"tablespaces\": []}}",
            cluster.psql("SELECT system_identifier FROM pg_control_system();")
        ),
    )
    .unwrap();
    assert!(Cluster::try_open(MAJOR, &copy, &[]).is_err());
    onto(&["--delta", "--type=none", "--set", &label]).ok();
    prove(&copy, &rows, &[]);
    drop(cluster);
    stanza.assert_nothing_left();
}

#[track_caller]
fn refused(output: pgcairn_integration::Output, why: &str) {
    let output = output.fails(1, why);
    assert!(output.stderr.contains("hint: "), "{output:?}");
}

/// Everything that an old copy can suffer.
fn damage(cluster: &Cluster, copy: &Path, spaces: &Path) {
    let accounts = relation(cluster, copy, "pgbench_accounts");
    (0..5).for_each(|number| spoil(&accounts, 7 * number + 3));
    let lines = relation(cluster, copy, "text_lines");
    OpenOptions::new().write(true).open(&lines).unwrap().set_len(100_000).unwrap();
    let random = relation(cluster, copy, "random_bytes");
    OpenOptions::new().write(true).open(&random).unwrap().set_len(64 << 20).unwrap();
    fs::remove_file(relation(cluster, copy, "large_values")).unwrap();
    fs::remove_dir_all(copy.join("pg_xact")).unwrap();
    fs::create_dir(copy.join("base/99999")).unwrap();
    fs::write(copy.join("base/99999/1"), "x").unwrap();
    symlink("/etc/passwd", copy.join("base/99999/2")).unwrap();
    let moved = fs::read_dir(spaces.join("elsewhere")).unwrap().next().unwrap().unwrap().path();
    fs::write(moved.join("stray"), "x").unwrap();
    let tree = tree(&moved);
    let (largest, _) = tree.iter().filter(|(_, of)| of.is_file()).max_by_key(|(_, of)| of.len()).unwrap();
    spoil(&moved.join(largest), 11);
}

#[test]
fn databases_that_are_left_out_are_zeros_and_can_be_dropped() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().checksums(true).wal_segsize_mb(1)).start();
    let space = cluster.create_tablespace("elsewhere");
    stanza.create(&cluster);
    for name in ["shop", "\"the staff\"", "logs"] {
        cluster.psql(&format!("CREATE DATABASE {name};"));
    }
    let of = |database: &str| {
        pgcairn_integration::Client::new(cluster.conninfo().replace("dbname=postgres", &format!("dbname='{database}'")))
    };
    for name in ["shop", "the staff", "logs"] {
        of(name).psql("CREATE TABLE rows AS SELECT i, md5(i::text) FROM generate_series(1, 20000) AS i;");
    }
    of("logs").psql("CREATE TABLE moved TABLESPACE elsewhere AS SELECT i FROM generate_series(1, 20000) AS i;");
    stanza.backup(&cluster);
    let oid = |name: &str| cluster.psql(&format!("SELECT oid FROM pg_database WHERE datname = '{name}';"));
    let (staff, logs) = (oid("the staff"), oid("logs"));
    // rows that recovery writes into databases that are not there
    for name in ["shop", "the staff", "logs"] {
        of(name).psql("UPDATE rows SET i = i + 1; INSERT INTO rows SELECT 1, 'x';");
    }
    let end = cluster.psql("SELECT pg_current_wal_insert_lsn();");
    cluster.psql("SELECT pg_switch_wal();");
    let segment = cluster.psql(&format!("SELECT pg_walfile_name('{end}');"));
    let archived = || cluster.psql("SELECT last_archived_wal FROM pg_stat_archiver;") >= segment;
    wait_until(Duration::from_secs(60), "the last segment to be archived", archived);

    let copy = stanza.place().join("copy");
    let spaces = format!("--tablespace-map=elsewhere={}", stanza.place().join("space").display());
    let run = |arguments: &[&str]| stanza.run([&["restore", text(&copy), &spaces], arguments].concat());
    refused(run(&["--db-include=nowhere"]), "has no database \"nowhere\"");
    refused(run(&["--db-include=shop", "--db-exclude=shop"]), "is included and excluded");
    assert!(!copy.exists());
    let told = run(&["--db-include=shop", "--type=default"]).ok();
    let said = format!("restored as zeros: the staff ({staff}), logs ({logs}); drop these databases");
    assert!(told.contains(&said), "{told}");
    let used = |path: &Path| tree(path).values().filter(|of| of.is_file()).map(|of| of.blocks() * 512).sum::<u64>();
    let directory = |oid: &str| copy.join("base").join(oid);
    assert!(used(&directory(&staff)) < 50_000, "{} bytes", used(&directory(&staff)));
    assert!(used(&directory(&oid("shop"))) > 1 << 20);

    let mut server = Cluster::open(MAJOR, &copy, &[]);
    wait_until(Duration::from_secs(60), "the end of recovery", || server.psql("SELECT pg_is_in_recovery();") == "f");
    let shop = pgcairn_integration::Client::new(server.conninfo().replace("dbname=postgres", "dbname=shop"));
    assert_eq!(shop.psql("SELECT count(*) FROM rows;"), "20001");
    let staffed = pgcairn_integration::Client::new(server.conninfo().replace("dbname=postgres", "dbname='the staff'"));
    let refused_by = staffed.try_psql("SELECT count(*) FROM rows;").unwrap_err();
    assert!(refused_by.contains("contains invalid data"), "a refusal, not the end of the server: {refused_by}");
    server.psql("DROP DATABASE \"the staff\";");
    server.psql("DROP DATABASE logs;");
    server.stop(StopMode::Fast);

    // by oid, and back again
    let told = run(&["--delta", "--db-exclude", &logs, "--output=json"]).ok();
    assert!(told.contains(&format!("\"oid\": {logs}")) && told.contains("\"name\": \"logs\""), "{told}");
    let moved = stanza.place().join("space");
    assert!(used(&moved) < 50_000, "{} bytes", used(&moved));
    let told = run(&["--delta"]).ok();
    assert!(!told.contains("zeros"), "{told}");
    let fresh = stanza.place().join("fresh");
    let elsewhere = format!("--tablespace-map=elsewhere={}", stanza.place().join("fresh-space").display());
    stanza.run(["restore", text(&fresh), &elsewhere]).ok();
    assert_same_tree(&copy, &fresh);
    assert_same_tree(&moved, &stanza.place().join("fresh-space"));
    assert!(space.exists());
    drop(cluster);
    stanza.assert_nothing_left();
}
