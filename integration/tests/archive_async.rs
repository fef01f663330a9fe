//! Archiving through a worker: its yes is the store's yes, whatever dies, is swapped or is away meanwhile.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn_integration::{Cluster, Stanza, wait_until};

const LONG: Duration = Duration::from_secs(60);

struct Setup {
    cluster: Cluster,
    stanza: Stanza,
}

impl Setup {
    /// A server that archives in the background; nothing is recycled, so that everything can be compared at the end.
    fn new() -> Self {
        let stanza = Stanza::in_directory().asynchronous();
        let builder = Cluster::builder().wal_segsize_mb(1).conf("wal_keep_size", "1000MB");
        let cluster = stanza.archiving(builder).start();
        stanza.create(&cluster);
        Self { cluster, stanza }
    }

    fn wal(&self) -> PathBuf {
        self.cluster.data_directory().join("pg_wal")
    }

    /// Makes about this many segments.
    fn load(&self, segments: u32) {
        let rows = segments * 12_000;
        self.cluster.psql(&format!("CREATE TABLE IF NOT EXISTS t (i int); INSERT INTO t SELECT generate_series(1, {rows});"));
    }

    fn archiver(&self, what: &str) -> String {
        self.cluster.psql(&format!("SELECT {what} FROM pg_stat_archiver;"))
    }

    /// Ends the segment and waits until all before it are archived, as the server sees it.
    fn settle(&self) {
        let last = self.cluster.psql("SELECT pg_walfile_name(pg_switch_wal());");
        wait_until(LONG, "the archiver", || self.archiver("last_archived_wal") >= last);
    }

    /// Demands that the archive holds what the server holds, without a gap.
    #[track_caller]
    fn assert_archived(&self) {
        let current = self.cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn());");
        let target = self.stanza.place().join("target");
        let mut names: Vec<String> = fs::read_dir(self.wal()).unwrap().map(|entry| name(&entry.unwrap().path())).collect();
        names.retain(|name| name.len() == 24 && *name < current);
        assert!(!names.is_empty());
        for name in names {
            self.stanza.run(["archive-get", &name, target.to_str().unwrap()]).ok();
            assert!(fs::read(&target).unwrap() == fs::read(self.wal().join(&name)).unwrap(), "{name} is another");
        }
    }

    fn spools(&self) -> Vec<PathBuf> {
        let spools = fs::read_dir(self.stanza.place().join("spool")).unwrap();
        spools.map(|entry| entry.unwrap().path()).filter(|path| name(path).contains("push")).collect()
    }

    /// The worker's process, if one lives.
    fn worker(&self) -> Option<Pid> {
        let wal = format!("--wal={}", self.wal().canonicalize().unwrap().display());
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let worker = |pid: &i32| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).any(|word| word == wal.as_bytes())
        };
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(worker).map(Pid::from_raw)
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn a_server_under_load_is_archived_whole() {
    let mut setup = Setup::new();
    for _ in 0..4 {
        setup.load(8);
    }
    setup.settle();
    assert_eq!(setup.archiver("failed_count"), "0", "{}", setup.cluster.log());
    setup.assert_archived();
    let worker = setup.worker().expect("a worker lives while its server does");
    // it keeps nothing of its server open
    let open: Vec<PathBuf> = fs::read_dir(format!("/proc/{worker}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .collect();
    let data = setup.cluster.data_directory().canonicalize().unwrap();
    assert!(!open.iter().any(|file| file.starts_with(&data) || name(file).starts_with("log")), "{open:?}");
    let log = open.iter().filter(|file| file.starts_with(setup.stanza.place().join("state"))).count();
    assert!(log > 0, "no log among {open:?}");
    // and goes when the server has gone
    setup.cluster.stop(pgcairn_integration::StopMode::Fast);
    wait_until(LONG, "the end of the worker", || setup.worker().is_none());
}
