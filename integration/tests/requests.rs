//! What each command asks of a store: `docs/requests.md` says how often at most, and is held to it.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use pgcairn_integration::{Cluster, Data, Place, Stanza};
use pgcairn_s3_server::{ACCESS_KEY, S3Server, SECRET_KEY};

/// The limits of the table, by what its first column says.
fn documented() -> Vec<(String, u64)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/requests.md");
    let text = std::fs::read_to_string(path).unwrap();
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split('|').map(str::trim);
        let (name, limit) = (cells.next()?, cells.next()?);
        Some((name.replace('`', ""), limit.split_whitespace().next()?.parse().ok()?))
    };
    text.lines().filter_map(row).collect()
}

struct Counted {
    server: S3Server,
    stanza: Stanza,
    measured: Vec<(&'static str, u64)>,
    _objects: Place,
}

impl Counted {
    fn new() -> Self {
        let objects = Place::new();
        let server = S3Server::start(objects.path(), Duration::ZERO).unwrap();
        server.make_bucket("backups").unwrap();
        let environment = [
            ("PGCAIRN_REPO_S3_ENDPOINT", server.endpoint.as_str()),
            ("PGCAIRN_REPO_S3_REGION", "us-east-1"),
            ("PGCAIRN_REPO_S3_KEY", ACCESS_KEY),
            ("PGCAIRN_REPO_S3_KEY_SECRET", SECRET_KEY),
        ];
        let stanza = Stanza::at("s3://backups/prefix", &environment);
        Self { server, stanza, measured: Vec::new(), _objects: objects }
    }

    fn run(&mut self, name: &'static str, arguments: &[&str]) {
        let before = self.server.requests();
        self.stanza.run(arguments).ok();
        self.measured.push((name, self.server.requests() - before));
    }
}

/// A segment that is complete; a checkpoint would remove it, since nothing archives.
fn segment(cluster: &Cluster) -> PathBuf {
    let name = cluster.psql("SELECT pg_walfile_name(pg_create_restore_point('here'));");
    cluster.psql("SELECT pg_switch_wal();");
    cluster.data_directory().join("pg_wal").join(name)
}

#[test]
fn no_command_asks_more_often_than_documented() {
    let mut counted = Counted::new();
    // nothing is archived behind our back
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    Data::tiny().load(&cluster);
    let server = cluster.conninfo().to_owned();
    counted.run("stanza-create", &["stanza-create", "--pg", &server]);
    counted.run("backup, full", &["backup", "--pg", &server]);
    cluster.psql("UPDATE text_lines SET id = id;");
    counted.run("backup, incremental", &["backup", "--type=incr", "--pg", &server]);
    let wal = segment(&cluster);
    let name = wal.file_name().unwrap().to_str().unwrap().to_owned();
    let target = counted.stanza.place().join("target");
    counted.run("archive-push", &["archive-push", wal.to_str().unwrap()]);
    counted.run("archive-push, already there", &["archive-push", wal.to_str().unwrap()]);
    counted.run("archive-get", &["archive-get", &name, target.to_str().unwrap()]);
    counted.run("info", &["info"]);
    counted.run("verify", &["verify"]);
    counted.run("expire", &["expire", "--repo-retention-full=5"]);
    let whole = ["backup", "--type=full", "--archive-mode-check=n", "--pg", &server];
    counted.stanza.run(whole).ok();
    counted.run("expire, a full backup goes", &["expire", "--repo-retention-full=1"]);
    let copy = counted.stanza.place().join("copy");
    counted.run("restore", &["restore", copy.to_str().unwrap()]);
    counted.run("restore --delta", &["restore", "--delta", copy.to_str().unwrap()]);

    let limits = documented();
    let limit = |name: &str| limits.iter().find(|(of, _)| of == name).map(|(_, limit)| *limit);
    let told: Vec<String> =
        counted.measured.iter().map(|(name, count)| format!("{name}: {count}, documented {:?}", limit(name))).collect();
    let is_held = |(name, count): &(&str, u64)| limit(name).is_some_and(|limit| *count <= limit);
    assert!(counted.measured.iter().all(is_held), "{}", told.join("\n"));
    let is_measured = |(name, _): &(String, u64)| counted.measured.iter().any(|(measured, _)| measured == name);
    let unmeasured: Vec<_> = limits.iter().filter(|of| !is_measured(of)).collect();
    assert!(unmeasured.is_empty(), "not measured: {unmeasured:?}");
}
