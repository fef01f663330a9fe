//! Recovery that meets trouble: killed halfway, damaged WAL, a full disk; and with the smallest and the largest things.
#![allow(clippy::unwrap_used)]

mod history;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use history::{History, archive_all, marks, object, strs, up_to};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn_integration::process::is_running;
use pgcairn_integration::{Client, Cluster, Stanza, StopMode, install, stanza, wait_until};

const LONG: Duration = Duration::from_secs(60);
/// Only the name of a socket, in a directory that nobody else has.
const PORT: &str = "54999";

/// A stanza whose WAL has one long transaction between the backup and the restore point `there`, with a checkpoint at `position`
/// in its middle; and a row after that.
struct LongWay {
    stanza: Stanza,
    position: String,
}

/// What is in the table at the restore point.
const AT_THE_TARGET: &str = "12000|72006000";
const GROWN: &str = "SELECT count(*), sum(i) FROM grown;";

impl LongWay {
    fn new() -> Self {
        let stanza = Stanza::in_directory();
        // no transaction but ours, of which each ends where we say
        let builder = Cluster::builder().wal_segsize_mb(1).conf("autovacuum", "off");
        let cluster = stanza.archiving(builder).start();
        stanza.create(&cluster);
        cluster.psql("CREATE TABLE grown (i int, filler text);");
        stanza.backup(&cluster);
        let mut session = cluster.session();
        let insert = "INSERT INTO grown SELECT i, repeat('x', 500) FROM generate_series";
        session.run(&format!("BEGIN; {insert}(1, 8000) AS i;"));
        cluster.psql("CHECKPOINT;");
        let position = cluster.psql("SELECT checkpoint_lsn FROM pg_control_checkpoint();");
        session.run(&format!("{insert}(8001, 12000) AS i; COMMIT;"));
        cluster.psql("SELECT pg_create_restore_point('there'); INSERT INTO grown VALUES (1000000);");
        archive_all(&cluster);
        Self { stanza, position }
    }

    fn directory(&self) -> PathBuf {
        self.stanza.clone_directory("held")
    }

    /// `start`, which waits for a server that waits in front of the end of the long transaction.
    fn held(&self, arguments: &[&str]) -> Held {
        let mut command = self.stanza.command();
        command.args(["start", "there", "--name=held", "--port", PORT, "--option=recovery_min_apply_delay=1d"]);
        let start = command.args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let socket = self.directory().join("run");
        let client = Client::new(format!("host={} port={PORT} user=postgres dbname=postgres", socket.display()));
        let mut held = Held { start, client };
        let passed = format!("SELECT pg_last_wal_replay_lsn() > '{}';", self.position);
        wait_until(LONG, "replay past the checkpoint", || {
            if held.start.try_wait().unwrap().is_some() {
                let told = std::io::read_to_string(held.start.stderr.take().unwrap()).unwrap();
                panic!("start ended: {told}");
            }
            held.client.try_psql(&passed).is_ok_and(|passed| passed == "t")
        });
        // from here on a recovery that goes on begins in the middle
        held.client.psql("CHECKPOINT;");
        let position = held.client.psql("SELECT checkpoint_lsn FROM pg_control_checkpoint();");
        assert_eq!(position, self.position);
        assert_eq!(held.client.psql("SELECT count(*) FROM grown;"), "0");
        held
    }

    fn server(&self) -> i32 {
        let text = fs::read_to_string(self.directory().join("run/postmaster.pid")).unwrap();
        text.trim().parse().unwrap()
    }

    fn daemon(&self) -> i32 {
        stanza::number(&stanza::status(&self.directory().join("data")), "pid") as i32
    }
}

/// A `start` that has not come back.
struct Held {
    start: Child,
    client: Client,
}

impl Drop for Held {
    fn drop(&mut self) {
        _ = self.start.kill();
        _ = self.start.wait();
    }
}

fn wait_for_promotion(server: &Client) {
    let promoted = || server.try_psql("SELECT pg_is_in_recovery();").is_ok_and(|recovering| recovering == "f");
    wait_until(LONG, "the end of recovery", promoted);
}

fn end(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    wait_until(LONG, "the process to die", || !is_running(pid));
}

#[test]
fn a_recovery_that_is_killed_goes_on_where_it_was() {
    let way = LongWay::new();
    let stanza = &way.stanza;
    // the command and the server, then the command and the mount
    let open: &[&str] = &["--option=hot_standby=on", "--option=max_worker_processes=8"];
    for (arguments, of_mount) in [(&["--read-only"][..], false), (open, true)] {
        let held = way.held(arguments);
        let (server, daemon) = (way.server(), way.daemon());
        drop(held);
        end(if of_mount { daemon } else { server });
        let clone = stanza.start("held", &[]);
        assert!(!is_running(server));
        let log = fs::read_to_string(way.directory().join("run/postgresql.log")).unwrap();
        assert!(log.contains("redo starts at"), "{log}");
        assert_eq!(clone.psql(GROWN), AT_THE_TARGET);
        assert_eq!(clone.psql("SELECT pg_is_in_recovery();"), if of_mount { "f" } else { "t" });
        clone.stop(&[]);
        stanza.assert_nothing_left();
    }
    // the server alone: the command says so, and nothing is in the way of another try
    let mut held = way.held(&["--read-only"]);
    end(way.server());
    let mut stderr = held.start.stderr.take().unwrap();
    let told = std::io::read_to_string(&mut stderr).unwrap();
    assert!(!held.start.wait().unwrap().success());
    assert!(told.contains("ended before its target"), "{told}");
    stanza.assert_nothing_left();
    let clone = stanza.start("held", &["there"]);
    assert_eq!(clone.psql(GROWN), AT_THE_TARGET);
    clone.stop(&[]);
    stanza.assert_nothing_left();
}

#[test]
fn replay_ends_at_a_damaged_segment_and_goes_on_when_it_is_whole() {
    let history = History::new(15);
    let stanza = &history.stanza;
    let copy = stanza.place().join("copy");
    let restore = ["restore", "--set", &history.backups[0], "--target=mark 6", "--target-action=promote"];
    stanza.run(restore.into_iter().chain([copy.to_str().unwrap()])).ok();
    let segment = history.cluster.psql(&format!("SELECT pg_walfile_name('{}');", history.mark(4).lsn));
    let archived = object(&history, &segment);
    let whole = fs::read(&archived).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 0xFF;
    fs::write(&archived, &damaged).unwrap();
    // pg_ctl may be content with a server that still recovers
    let log = match Cluster::try_open(15, &copy, &[]) {
        Err(log) => log,
        Ok(server) => {
            wait_until(LONG, "the server to end", || server.pid().is_none());
            server.log()
        }
    };
    assert!(log.contains(&segment) && log.contains("is damaged at byte"), "{log}");
    assert!(!log.contains("archive recovery complete"), "{log}");

    fs::write(&archived, &whole).unwrap();
    let mut server = Cluster::open(15, &copy, &[]);
    wait_for_promotion(&server);
    assert_eq!(marks(&server), up_to(6));
    server.stop(StopMode::Fast);
}

/// A server of this major with large segments, at targets of every type, started and restored.
fn large_segments(major: u32) {
    let history = History::of(Cluster::builder().major(major).wal_segsize_mb(64));
    let stanza = &history.stanza;
    let programs = format!("--pg-bin={}", install::server(major).display());
    // the exclusive ones last: they say the same as the next mark's
    for (number, target) in history.targets(4).iter().enumerate().take(5) {
        let target = strs(target);
        if number != 1 {
            let clone = stanza.start("point", &[&[&programs[..]], &target[..]].concat());
            assert_eq!(marks(&clone), up_to(4), "{major}: {target:?}: {}", clone.told());
            clone.stop(&[]);
        }
        if number != 0 {
            let copy = stanza.place().join(&format!("copy{number}"));
            let restore = ["restore", "--target-action=promote", copy.to_str().unwrap()];
            stanza.run([&restore, &target[..]].concat()).ok();
            let mut server = Cluster::open(major, &copy, &[]);
            wait_for_promotion(&server);
            assert_eq!(marks(&server), up_to(4), "{major}: {target:?}");
            server.stop(StopMode::Fast);
            fs::remove_dir_all(&copy).unwrap();
        }
    }
    stanza.assert_nothing_left();
}

#[test]
fn large_segments_of_13() {
    large_segments(13);
}

#[test]
fn large_segments_of_18() {
    large_segments(18);
}

#[test]
fn a_full_scratch_is_a_full_disk_to_postgresql() {
    let way = LongWay::new();
    let stanza = &way.stanza;
    let Some(small) = stanza.place().file_system("small", 48) else { return };
    let scratch = small.join("scratch");
    let mount = stanza.mount("full", &["--target=there", "--scratch", scratch.to_str().unwrap()]);
    let mut server = Cluster::open(15, mount.path(), &[("wal_recycle", "off"), ("fsync", "on")]);
    wait_for_promotion(&server);
    server.psql("CREATE TABLE kept AS SELECT i FROM generate_series(1, 1000) AS i;");
    // without WAL it is the table that finds no room, and the statement that fails
    let fill = "CREATE UNLOGGED TABLE full_up AS SELECT i, repeat('x', 1000) FROM generate_series(1, 100000) AS i;";
    let full = server.try_psql(fill).expect_err("100 MB found room in 48");
    assert!(full.contains("Check free disk space"), "{full}");
    assert_eq!(server.psql(GROWN), AT_THE_TARGET);
    // what failed gave its room back
    server.psql("INSERT INTO kept SELECT i FROM generate_series(1001, 2000) AS i;");
    // with WAL the server itself may end; what it promised stays
    let logged = fill.replace("UNLOGGED", "");
    server.try_psql(&logged).expect_err("200 MB found room in 48");
    assert!(fs::read_to_string(mount.path().join("PG_VERSION")).is_ok(), "the mount is gone");
    stanza.place().resize(&small, 400);
    if server.pid().is_some() {
        server.stop(StopMode::Immediate);
    }
    server.start();
    assert_eq!(server.psql("SELECT count(*), sum(i) FROM kept;"), "2000|2001000");
    assert_eq!(server.psql(GROWN), AT_THE_TARGET);
    server.psql(&logged);
    server.stop(StopMode::Fast);
    drop((server, mount));
}
