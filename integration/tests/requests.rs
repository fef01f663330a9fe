//! What each command asks of a store: `docs/requests.md` says how often at most, and is held to it.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Cluster, Data, Place, Stanza, StopMode, install};
use pgcairn_s3_server::{ACCESS_KEY, S3Server, SECRET_KEY};

const LONG: Duration = Duration::from_secs(120);

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
    objects: Place,
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
        Self { server, stanza, measured: Vec::new(), objects }
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

/// Of a large archive as much is listed as lies behind the backup that a command begins with. What names everything
/// that is missing lists all.
#[test]
fn a_moment_costs_no_listing_of_what_lies_before_its_backup() {
    const OLD: [&str; 3] = ["0000000100000001", "0000000100000002", "0000000100000003"];
    let Counted { server, stanza, objects, .. } = Counted::new();
    let mut cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    cluster.stop(StopMode::Fast);
    let resetwal = cluster.bin_directory().join("pg_resetwal");
    let mut command = install::as_server_user(resetwal);
    run_ok(command.args(["-l", "000000010000000500000000", "-D"]).arg(cluster.data_directory()), &[], LONG);
    cluster.start();
    Data::tiny().load(&cluster);
    stanza.create(&cluster);
    for directory in OLD {
        let path = objects.join("backups/prefix/archive/main/15-1").join(directory);
        std::fs::create_dir_all(&path).unwrap();
        for number in 0..1000 {
            let name = format!("{directory}{number:08X}-{}", "0123456789abcdef".repeat(2));
            std::fs::write(path.join(name), "not looked at").unwrap();
        }
    }
    stanza.backup(&cluster);
    let moment = cluster.psql("CREATE TABLE before (); SELECT now();");
    cluster.psql("SELECT pg_sleep(0.1); CREATE TABLE after (); SELECT pg_switch_wal();");
    let lsn = cluster.psql("SELECT pg_current_wal_lsn() - 100000::numeric;");
    stanza.run(["check", "--pg", cluster.conninfo()]).ok();

    let old_pages = |arguments: &[&str]| {
        server.take_log();
        let output = stanza.run(arguments);
        output.ok();
        let log = server.take_log();
        let is_old = |line: &&String| line.contains("start-after") && OLD[1..].iter().any(|old| line.contains(old));
        log.iter().filter(|line| line.contains("list-type=2")).filter(is_old).count()
    };
    let copy = stanza.place().join("copy");
    let restore = |kind: &str, target: Option<&str>| {
        let target = target.map(|target| format!("--target={target}"));
        let kind = format!("--type={kind}");
        let words = ["restore", &kind].into_iter().chain(target.as_deref()).chain(copy.to_str());
        let pages = old_pages(&words.collect::<Vec<_>>());
        std::fs::remove_dir_all(&copy).unwrap();
        pages
    };
    assert_eq!(restore("time", Some(&moment)), 0);
    assert_eq!(restore("lsn", Some(&lsn)), 0);
    assert_eq!(restore("immediate", None), 0);
    assert_eq!(restore("default", None), 0);
    assert_eq!(old_pages(&["check", "--pg", cluster.conninfo()]), 0);
    let clone = stanza.start("clone", &["--type=time", &format!("--target={moment}")]);
    assert_eq!(clone.psql("SELECT count(*) FROM pg_class WHERE relname IN ('before', 'after');"), "1");
    clone.stop(&[]);

    assert!(old_pages(&["info"]) > 0, "what is missing between old segments is not told");
    // what cannot be reached is told with all that can
    let early = stanza.run(["start", "--type=time", "--target=2001-02-03 04:05:06+00"]);
    early.fails(1, "before the first backup").fails(1, "can be reached from");
}
