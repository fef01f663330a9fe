//! What was written in a clone outlives power losses, daemons and servers that die, and copies of its mount elsewhere.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn_integration::bin::run_command;
use pgcairn_integration::disk::{Disk, OtherBoot};
use pgcairn_integration::mounts::is_mounted;
use pgcairn_integration::process::is_running;
use pgcairn_integration::{Client, Cluster, MountGuard, Stanza, wait_until};

const LONG: Duration = Duration::from_secs(120);

/// Reads so much else that no page of a small table stays in a server's little memory.
const PUSH_OUT: &str = "SELECT count(pg_get_functiondef(oid)) FROM pg_proc WHERE prokind = 'f';";

/// A backup of a cluster with a table of 1000 rows, with room for another version of each on the same page, and two
/// empty ones.
fn with_a_backup() -> (Stanza, Cluster) {
    let stanza = Stanza::in_directory();
    let cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    cluster.psql(
        "CREATE TABLE t (i int, v int, filler text) WITH (fillfactor = 40);
         INSERT INTO t SELECT i, 0, repeat('x', 100) FROM generate_series(1, 1000) i;
         CREATE TABLE empty (i int, filler text); CREATE TABLE last (i int);",
    );
    stanza.create(&cluster);
    stanza.backup(&cluster);
    (stanza, cluster)
}

fn kill_and_wait(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    wait_until(LONG, "the process to die", || !is_running(pid));
}

fn conninfo(told: &str) -> String {
    told.split('"').nth(1).unwrap_or_else(|| panic!("no connection string in: {told}")).to_owned()
}

/// Rows that a server said were committed are there after the power was cut, also where it had crashed before: crash
/// recovery takes what it finds in its files for durable.
#[test]
fn committed_rows_survive_a_power_cut() {
    let (stanza, cluster) = with_a_backup();
    drop(cluster);
    let mut disk = Disk::new(stanza.place(), 300);
    let clones = disk.path().join("clones");
    let clones_option = format!("--clone-path={}", clones.display());
    // The source does without fsync. Little memory, so that pages are written before anything syncs them, and never a
    // second time as a whole; nobody but those who read and write a table has it open.
    let settings = ["fsync=on", "shared_buffers=400kB", "full_page_writes=off", "bgwriter_lru_maxpages=0"];
    let settings: Vec<String> = settings.iter().map(|setting| format!("--option={setting}")).collect();
    let start: Vec<&str> =
        ["start", "--name", "cut", &clones_option].into_iter().chain(settings.iter().map(|s| &**s)).collect();
    let client = Client::new(conninfo(&stanza.run(&start).ok()));
    let data = clones.join("cut/data");
    let mut guard = MountGuard::new(&data);

    // beyond the end that the table has in the backup: written by a session that ends, synced by the checkpoint alone
    client.psql("INSERT INTO empty SELECT i, repeat('y', 100) FROM generate_series(1, 20000) i;");
    client.psql(PUSH_OUT);
    client.psql("CHECKPOINT;");
    // then into every page of another, all of them written and none synced when the server crashes
    client.psql("UPDATE t SET v = 1;");
    client.psql(PUSH_OUT);
    let mut session = client.session();
    kill_and_wait(session.run("SELECT pg_backend_pid();").parse().unwrap());
    wait_until(LONG, "crash recovery", || client.try_psql("SELECT 1;").is_ok());
    client.psql("INSERT INTO last VALUES (1);");
    disk.cut();

    let server: i32 = fs::read_to_string(clones.join("cut/run/postmaster.pid")).map_or_else(
        // the disk may be past reading
        |_| server_of(&data),
        |text| text.trim().parse().unwrap(),
    );
    kill_and_wait(server);
    guard.serving().into_iter().for_each(kill_and_wait);
    run_command(Command::new("umount").arg("-l").arg(&data)).ok();
    disk.come_back();

    let other = OtherBoot::new(stanza.place(), "another");
    let told = run_command(stanza.prepared(other.command()).args(&start)).ok();
    guard.serving().into_iter().for_each(|pid| guard.daemon(pid));
    let count = "SELECT (SELECT count(*) FROM empty), (SELECT sum(v) FROM t), (SELECT count(*) FROM last);";
    let rows = Client::new(conninfo(&told)).psql(count);
    let stopped = run_command(stanza.prepared(other.command()).args(["stop", "cut", &clones_option]));
    assert_eq!(rows, "20000|1000|1");
    stopped.ok();
}

/// The postmaster whose command line names this data directory.
fn server_of(data: &Path) -> i32 {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let found = pids.find(|pid| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("postgres\0-D") && line.contains(data.to_str().unwrap())
    });
    found.expect("the server runs")
}

/// A clone whose daemon or server died goes on under its name with what was written; a damaged record is told, and does
/// not stand in the way of its removal.
#[test]
fn a_clone_that_died_goes_on_and_one_without_a_record_goes_away() {
    let (stanza, cluster) = with_a_backup();
    drop(cluster);
    let clone = stanza.start("dies", &["--port", "5999"]);
    clone.psql("UPDATE t SET v = 1;");
    stanza.run(["start", "--name", "dies"]).fails(1, "clone dies runs already").fails(1, "stop dies --keep");
    kill_and_wait(clone.daemon());

    // its server still runs, on a dead mount, and what it leaves beside its socket names a process that lives
    let run = stanza.clone_directory("dies").join("run");
    let clone = stanza.start("dies", &["--port", "5999"]);
    assert_eq!(clone.psql("SELECT sum(v) FROM t;"), "1000");
    kill_and_wait(clone.pid());
    fs::write(run.join(".s.PGSQL.5999.lock"), format!("{}\n", std::process::id())).unwrap();
    let clone = stanza.start("dies", &["--port", "5999"]);
    assert_eq!(clone.psql("SELECT sum(v) FROM t;"), "1000");

    kill_and_wait(clone.daemon());
    clone.stop(&["--keep"]);
    let clone = stanza.start("dies", &[]);
    assert_eq!(clone.psql("SELECT sum(v) FROM t;"), "1000");

    let record = stanza.clone_directory("dies").join("clone.json");
    for content in ["", "{\"name\": \"di"] {
        fs::write(&record, content).unwrap();
        let what = if content.is_empty() { "is empty" } else { "is damaged" };
        stanza.run(["start", "--name", "dies"]).fails(1, what).fails(1, "pgcairn stop dies");
        stanza.run(["stop", "dies", "--keep"]).fails(1, what);
    }
    assert_eq!(clone.psql("SELECT sum(v) FROM t;"), "1000");
    let told = stanza.run(["stop", "dies"]).ok();
    assert!(told.contains("what was written is removed"), "{told}");
    stanza.assert_nothing_left();
    // one that was kept, too
    stanza.start("kept", &[]).stop(&["--keep"]);
    fs::write(stanza.clone_directory("kept").join("clone.json"), "[]").unwrap();
    stanza.run(["start", "--name", "kept"]).fails(1, "is damaged");
    stanza.run(["stop", "kept"]).ok();
    stanza.assert_nothing_left();

    // what is no clone is not removed
    let other = stanza.clone_directory("other");
    fs::create_dir_all(other.join("run")).unwrap();
    fs::write(other.join("precious"), "").unwrap();
    stanza.run(["stop", "other"]).fails(1, "there is no clone other");
    fs::remove_file(other.join("precious")).unwrap();
    stanza.run(["stop", "other"]).ok();
    stanza.assert_nothing_left();
}

/// An idle copy of a mount in another mount namespace holds neither `stop`, nor `umount`, nor a daemon that gets SIGTERM.
#[test]
fn a_copy_in_another_mount_namespace_holds_nothing() {
    let (stanza, cluster) = with_a_backup();
    drop(cluster);
    let clone = stanza.start("seen", &[]);
    clone.psql("UPDATE t SET v = 1;");
    let copies = OtherBoot::same();
    clone.stop(&["--keep"]);
    let clone = stanza.start("seen", &[]);
    assert_eq!(clone.psql("SELECT sum(v) FROM t;"), "1000");
    let more_copies = OtherBoot::same();
    clone.stop(&[]);

    let scratch = stanza.place().join("scratch").display().to_string();
    let arguments = ["--backup", "latest", "--scratch", &scratch];
    for round in 0..3 {
        let mount = stanza.mount(&format!("mnt{round}"), &arguments);
        let written = fs::read_to_string(mount.path().join("note")).unwrap_or_default();
        assert_eq!(written, ["", "0", "1"][round]);
        fs::write(mount.path().join("note"), round.to_string()).unwrap();
        let _copies = OtherBoot::same();
        let daemons = mount.serving();
        match round {
            0 => drop(stanza.run(["umount", mount.path().to_str().unwrap()]).ok()),
            1 => daemons.iter().for_each(|&daemon| kill(Pid::from_raw(daemon), Signal::SIGTERM).unwrap()),
            _ => drop(run_command(Command::new("umount").arg(mount.path())).ok()),
        }
        wait_until(LONG, "the daemon to end", || !daemons.iter().any(|&daemon| is_running(daemon)));
        assert!(!is_mounted(mount.path()));
    }
    drop((copies, more_copies));
    stanza.assert_nothing_left();
}
