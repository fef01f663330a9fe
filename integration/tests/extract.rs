//! What `extract` brings, and that it says what it brought.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use pgcairn_integration::{Client, Cluster, Stanza, install};

/// A partitioned table with partitions of partitions, in another schema, with odd names and elsewhere; and what else there is.
const OBJECTS: &str = r#"
CREATE SCHEMA "Old Parts";
CREATE TABLE orders (id int GENERATED ALWAYS AS IDENTITY, d date) PARTITION BY RANGE (d);
CREATE TABLE orders_25 PARTITION OF orders FOR VALUES FROM ('2025-01-01') TO ('2026-01-01') PARTITION BY LIST (d);
CREATE TABLE "Old Parts"."a ""b"".c" PARTITION OF orders_25 DEFAULT;
CREATE TABLE orders_26 PARTITION OF orders FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
CREATE INDEX ON orders (d);
INSERT INTO orders (d) SELECT date '2025-06-01' + g FROM generate_series(1, 300) AS g;
CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER nowhere FOREIGN DATA WRAPPER nowhere;
CREATE FOREIGN TABLE orders_27 PARTITION OF orders FOR VALUES FROM ('2027-01-01') TO ('2028-01-01') SERVER nowhere;
CREATE TABLE parent (i int); CREATE TABLE child (j int) INHERITS (parent); CREATE TABLE grandchild () INHERITS (child);
INSERT INTO parent VALUES (1); INSERT INTO child VALUES (2, 2); INSERT INTO grandchild VALUES (3, 3), (4, 4);
CREATE UNLOGGED TABLE fleeting AS SELECT 1 AS i;
CREATE VIEW seen AS SELECT * FROM parent;
CREATE MATERIALIZED VIEW kept AS SELECT count(*) AS n FROM parent;
CREATE TYPE mood AS ENUM ('good'); CREATE TABLE moods AS SELECT 'good'::mood AS m;
"#;

#[test]
fn what_inherits_from_a_table_comes_with_it() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    cluster.psql(OBJECTS);
    cluster.psql("CREATE DATABASE target;");
    stanza.backup(&cluster);
    let target = cluster.database("target");
    let into = format!("--into={} dbname=target", cluster.conninfo());
    let extract = |table: &str| stanza.run(["extract", &format!("--table=postgres.public.{table}"), &into]);

    let lacking = extract("orders").fails(1, "schema \"Old Parts\" does not exist");
    assert!(lacking.stderr.contains("hint: nothing was changed there; create the schema"), "{}", lacking.stderr);
    target.psql(r#"CREATE SCHEMA "Old Parts"; CREATE FOREIGN DATA WRAPPER nowhere;"#);
    target.psql("CREATE SERVER nowhere FOREIGN DATA WRAPPER nowhere;");
    let told = extract("orders");
    assert!(told.stderr.contains("public.orders_27 is a foreign table"), "{}", told.stderr);
    let told = told.ok();
    assert!(told.contains("postgres.public.orders is back: 300 rows of 4 tables"), "{told}");
    assert_eq!(
        target.psql(r#"SELECT (SELECT count(*) FROM ONLY "Old Parts"."a ""b"".c"), (SELECT count(*) FROM orders_26);"#),
        "213|87"
    );
    assert_eq!(target.psql("INSERT INTO orders (d) VALUES ('2026-01-01') RETURNING id;"), "301");

    assert!(extract("parent").ok().contains("is back: 4 rows of 3 tables"));
    assert_eq!(target.psql("SELECT count(*), (SELECT count(*) FROM ONLY parent) FROM parent;"), "4|1");
    let told = extract("fleeting");
    assert!(told.stderr.contains("public.fleeting is unlogged: no backup has its rows"), "{}", told.stderr);
    assert!(told.ok().contains("0 rows of 1 table"));
    let told = extract("seen");
    assert!(told.stderr.contains("public.seen is a view"), "{}", told.stderr);
    told.ok();
    let told = extract("kept");
    assert!(told.stderr.contains("computed anew"), "{}", told.stderr);
    told.ok();
    extract("moods").fails(1, "type \"public.mood\" does not exist").fails(1, "create the role, type, extension");
    extract("mood*").fails(1, "type \"public.mood\" does not exist");

    // a partition alone needs its parent
    target.psql("DROP TABLE orders;");
    extract("orders_26").fails(1, "relation \"public.orders\" does not exist").fails(1, "the parent of a partition");
    let nowhere = format!("--into={} dbname=nowhere", cluster.conninfo());
    stanza
        .run(["extract", "--table=postgres.public.parent", &nowhere])
        .fails(1, "cannot connect to where --into leads");
    let file = stanza.place().join("out.sql");
    let output = format!("--output={}", file.display());
    let told = stanza.run(["extract", "--table=postgres.public.{child,parent}", &output]);
    assert_eq!(told.code, Some(1), "{told:?}");
    assert!(
        stanza.run(["extract", "--table=postgres.public.(child|parent)", &output]).ok().contains("4 rows of 3 tables")
    );
    stanza.assert_nothing_left();
}

/// What a newer pg_dump sets and an older server does not know stays out.
#[test]
fn a_newer_pg_dump_serves_an_older_server() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder()).start();
    stanza.create(&cluster);
    cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 10) AS i;");
    cluster.psql("CREATE DATABASE target;");
    stanza.backup(&cluster);
    // this machine has no newer one: its own, and the line that 17 and later write
    let programs = stanza.place().directory("bin");
    let own = cluster.bin_directory();
    for name in ["pg_ctl", "postgres", "psql"] {
        symlink(own.join(name), programs.join(name)).unwrap();
    }
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && exec {0} --version\n{0} \"$@\" | sed 's/^SET row_security/SET transaction_timeout = 0;\\n&/'\n",
        install::client("pg_dump").get_program().display()
    );
    let pg_dump = programs.join("pg_dump");
    fs::write(&pg_dump, script).unwrap();
    fs::set_permissions(&pg_dump, fs::Permissions::from_mode(0o755)).unwrap();
    let extract = |to: &str| {
        stanza.run(["extract", "--table=postgres.public.t", &format!("--pg-bin={}", programs.display()), to]).ok()
    };
    let file = stanza.place().join("t.sql");
    extract(&format!("--output={}", file.display()));
    assert!(fs::read_to_string(&file).unwrap().contains("\nSET transaction_timeout = 0;\n"));
    let told = extract(&format!("--into={} dbname=target", cluster.conninfo()));
    assert!(told.contains("is back: 10 rows of 1 table"), "{told}");
    assert_eq!(cluster.database("target").psql("SELECT count(*) FROM t;"), "10");
    stanza.assert_nothing_left();
}

/// A lock that nobody will ever release, settings of the role that dumps, and what a killed run left.
#[test]
fn nothing_keeps_a_dump_waiting() {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().conf("max_prepared_transactions", "10")).start();
    stanza.create(&cluster);
    cluster.psql("CREATE ROLE other SUPERUSER LOGIN; CREATE ROLE low;");
    let other = Client::new(cluster.conninfo().replace("user=postgres", "user=other"));
    other.psql("CREATE TABLE t AS SELECT 1 AS i; CREATE TABLE u AS SELECT generate_series(1, 10) AS i;");
    other.psql("BEGIN; ALTER TABLE t ADD COLUMN c int; PREPARE TRANSACTION 'it''s';");
    other.psql("BEGIN; INSERT INTO u VALUES (11); PREPARE TRANSACTION 'of u';");
    other.psql("ALTER ROLE postgres SET role = low; ALTER ROLE postgres SET statement_timeout = '1ms';");
    other.psql("ALTER ROLE postgres SET idle_session_timeout = '1ms';");
    stanza.run(["backup", "--type=full", "--pg", other.conninfo()]).ok();

    let refused = stanza.run(["extract", "--table=postgres.public.t"]);
    let refused = refused.fails(1, "public.t is locked by the prepared transaction 'it''s' at that point");
    assert!(refused.stderr.contains("ROLLBACK PREPARED 'it''s'"), "{}", refused.stderr);
    let file = stanza.place().join("u.sql");
    let left = stanza.place().join("u.sql.pgcairn-tmp");
    fs::write(&left, "half of a dump").unwrap();
    let told = stanza.run(["extract", "--table=postgres.public.u", &format!("--output={}", file.display())]).ok();
    assert!(told.contains("10 rows of 1 table"), "{told}");
    assert!(!left.exists());
    stanza.assert_nothing_left();
}
