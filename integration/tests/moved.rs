//! Databases and tables that go elsewhere, or are there a second time: what of it is stored again.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Client, Cluster, Data, Stanza, StopMode, install, wait_until};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(120);
const PAGE: usize = 8192;
/// `pd_lsn` and `pd_checksum`, at the beginning of a page.
const PAGE_STAMP: usize = 10;

fn backup(stanza: &Stanza, cluster: &Cluster, arguments: &[&str]) -> Value {
    let told = stanza.run([&["backup", "--output=json", "--pg", cluster.conninfo()][..], arguments].concat()).ok();
    let backup: Value = serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error}: {told}"));
    assert_eq!(backup["page-errors"].as_array().unwrap().len(), 0, "{backup}");
    backup
}

fn size(backup: &Value, name: &str) -> u64 {
    backup["sizes"][name].as_u64().unwrap()
}

/// A cluster with a database `shop` of some 30 MB, nearly all of which does not compress, and a tablespace `elsewhere`.
fn shop(stanza: &Stanza, create: &[&str]) -> (Cluster, Client) {
    let cluster = stanza.archiving(Cluster::builder().checksums(true).wal_segsize_mb(1)).start();
    stanza.run([&["stanza-create", "--pg", cluster.conninfo()][..], create].concat()).ok();
    cluster.create_tablespace("elsewhere");
    cluster.psql("CREATE DATABASE shop;");
    let shop = cluster.database("shop");
    Data::default().random_mb(20).load(&shop);
    // what a first reader would change
    shop.psql("VACUUM (FREEZE, ANALYZE);");
    (cluster, shop)
}

/// Restores a backup, has its pages judged, and compares what it holds with the cluster.
fn prove(stanza: &Stanza, cluster: &Cluster, backup: &Value) {
    let label = backup["label"].as_str().unwrap();
    let (copy, spaces) =
        (stanza.place().join(&format!("copy-{label}")), stanza.place().join(&format!("spaces-{label}")));
    let map = format!("--tablespace-map-all={}", spaces.display());
    stanza.run(["restore", "--type=none", copy.to_str().unwrap(), "--set", label, &map]).ok();
    let mut opened = Cluster::open(15, &copy, &[]);
    assert_eq!(opened.fingerprint(), cluster.fingerprint());
    let dump = |of: &Cluster| of.dumpall().lines().filter(|line| !line.contains("LOCATION")).collect::<String>();
    assert!(dump(&opened) == dump(cluster), "the dumps differ");
    opened.stop(StopMode::Fast);
    run_ok(install::client("pg_checksums").args(["--check", "-D"]).arg(&copy), &[], LONG);
}

/// Nothing but this backup is left.
fn expire_all_but(stanza: &Stanza, backup: &Value) {
    let stop = backup["stop-time"].as_i64().unwrap();
    let now_s = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
    wait_until(LONG, "the next second", || now_s() > stop + 1);
    stanza.run(["expire", "--repo-retention-full=1", "--grace=0", "--force"]).ok();
    let told: Value = serde_json::from_str(&stanza.run(["info", "--output", "json"]).ok()).unwrap();
    let labels: Vec<_> = told[0]["backup"].as_array().unwrap().iter().map(|of| of["label"].clone()).collect();
    assert_eq!(labels, [backup["label"].clone()]);
    stanza.run(["verify"]).ok();
}

#[test]
fn a_database_that_moves_is_not_stored_again() {
    let stanza = Stanza::in_directory().with_passphrase("correct horse");
    let (cluster, _) = shop(&stanza, &["--encrypt"]);
    let first = backup(&stanza, &cluster, &["--type=full"]);
    cluster.psql("ALTER DATABASE shop SET TABLESPACE elsewhere;");
    let moved = backup(&stanza, &cluster, &["--type=incr"]);
    // all of it was read, whatever its size and time
    assert!(size(&moved, "read") > 30 << 20, "{moved}");
    assert!(size(&moved, "stored-new") < 400_000, "{moved}");
    prove(&stanza, &cluster, &moved);
    cluster.psql("ALTER DATABASE shop SET TABLESPACE pg_default;");
    let back = backup(&stanza, &cluster, &["--type=full"]);
    assert!(size(&back, "stored-new") * 20 < size(&first, "stored-new"), "{back}");
    expire_all_but(&stanza, &back);
    prove(&stanza, &cluster, &back);
}

#[test]
fn a_database_copied_by_files_is_not_stored_again() {
    let stanza = Stanza::in_directory();
    let (cluster, _) = shop(&stanza, &[]);
    let first = backup(&stanza, &cluster, &["--type=full"]);
    cluster.psql("CREATE DATABASE second TEMPLATE shop STRATEGY file_copy;");
    let copied = backup(&stanza, &cluster, &["--type=incr"]);
    assert!(size(&copied, "read") > 30 << 20, "{copied}");
    assert!(size(&copied, "stored-new") < 400_000, "{copied}");
    prove(&stanza, &cluster, &copied);

    // a copy that goes its own way shares the rest; here its files arrive in no order
    cluster.psql("CREATE DATABASE third TEMPLATE shop STRATEGY file_copy;");
    let third = cluster.database("third");
    third.psql("UPDATE pgbench_accounts SET abalance = 7 WHERE aid % 5000 = 1; CREATE TABLE new AS SELECT 1 AS i;");
    let streamed = backup(&stanza, &cluster, &["--type=full", "--source=stream"]);
    assert!(size(&streamed, "stored-new") * 10 < size(&first, "stored-new"), "{streamed}");
    expire_all_but(&stanza, &streamed);
    prove(&stanza, &cluster, &streamed);
}

/// The pages of a table's file, written to disk.
fn pages(cluster: &Cluster, client: &Client, table: &str) -> Vec<u8> {
    client.psql("CHECKPOINT;");
    let path = client.psql(&format!("SELECT pg_relation_filepath('{table}');"));
    std::fs::read(cluster.data_directory().join(path)).unwrap()
}

/// Why no twin is looked for under another name: PostgreSQL logs every page that it copies, and each gets the position of its
/// own record, and so another checksum. Nothing is equal grain by grain, and all of it but ten bytes a page is.
#[test]
fn a_table_that_moves_and_a_database_copied_through_wal_are_other_pages() {
    let stanza = Stanza::in_directory();
    let (cluster, shop) = shop(&stanza, &[]);
    let first = backup(&stanza, &cluster, &["--type=full"]);
    let before = pages(&cluster, &shop, "random_bytes");
    let number = shop.psql("SELECT relfilenode FROM pg_class WHERE relname = 'random_bytes';");
    cluster.psql("CREATE DATABASE second TEMPLATE shop STRATEGY wal_log;");
    shop.psql("ALTER TABLE random_bytes SET TABLESPACE elsewhere;");
    assert_ne!(shop.psql("SELECT relfilenode FROM pg_class WHERE relname = 'random_bytes';"), number);
    for after in [pages(&cluster, &shop, "random_bytes"), pages(&cluster, &cluster.database("second"), "random_bytes")]
    {
        assert_eq!(before.len(), after.len());
        for (old, new) in before.chunks(PAGE).zip(after.chunks(PAGE)) {
            assert_ne!(old[..PAGE_STAMP], new[..PAGE_STAMP]);
            assert!(old[PAGE_STAMP..] == new[PAGE_STAMP..]);
        }
    }
    let moved = backup(&stanza, &cluster, &["--type=incr"]);
    assert!(size(&moved, "stored-new") > 2 * before.len() as u64 / 3, "{moved}");
    assert_ne!(first["label"], moved["label"]);
    prove(&stanza, &cluster, &moved);
}
