//! What the demo shows, step by step, and what must be true after each.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::cluster::{Fingerprint, Programs, Server, ask, fingerprint, fingerprint_of};
use super::data;
use super::home::Home;
use super::shell::{As, Ran, Shell};
use super::table::Costs;
use crate::cli::output;
use crate::error::{Error, Result};

/// The table that is lost and comes back.
const LOST: &str = "packages";
/// The small table whose file is watched while a clone changes it.
const CHANGED: &str = "pgbench_branches";

/// The whole demo; an error at the first thing that is not as it should be.
pub(super) fn all(shell: &mut Shell, home: &Home, programs: &Programs, size_mb: u32) -> Result<()> {
    let started = Instant::now();
    let mut costs = Costs::default();
    let source = Server::new(home, programs, "data", "server.log", 5432);
    make_cluster(shell, home, programs, &source, size_mb)?;
    let before = take_backup(shell, &source, &mut costs)?;
    look_at_mount(shell, programs, &mut costs)?;
    let backed_up = start_clone(shell, &source, &before, &mut costs)?;
    write_to_clone(shell, &source, &backed_up, &mut costs)?;
    rescue_table(shell, &source, &before)?;
    stop_clones(shell, home, &mut costs)?;
    restore(shell, home, programs, &backed_up, &mut costs)?;
    unmount(shell, home)?;
    source.stop(shell)?;
    shell.chapter("What it cost", &[])?;
    costs.print();
    output::line("");
    output::line(&format!("   Everything held. The demo took {:.0} s.", started.elapsed().as_secs_f64()));
    Ok(())
}

fn make_cluster(shell: &mut Shell, home: &Home, programs: &Programs, source: &Server, size_mb: u32) -> Result<()> {
    let version = shell.read(As::Caller, &programs.server.join("postgres"), &["--version"])?;
    let version = version.trim().replace("postgres (PostgreSQL)", "PostgreSQL");
    let title = format!("A throwaway cluster in {}", home.root().display());
    shell.chapter(&title, &[&format!("{version}, with data of the kinds people have:")])?;
    source.create(shell, programs)?;
    source.start(shell)?;
    data::load(shell, &source.conninfo(), size_mb, |text| output::line(&format!("     {text}")))?;
    home.configure(&source.conninfo(), programs)?;
    let config = home.path("pgcairn.toml");
    let archive = format!("{} --config {} archive-push %p", home.path("bin/pgcairn").display(), config.display());
    source.configure(&format!(
        "wal_level = replica\nmax_wal_senders = 4\narchive_mode = on\narchive_command = '{archive}'\n"
    ))?;
    source.stop(shell)?;
    source.start(shell)?;
    shell.say("Its configuration, and pgcairn's, from which every command below takes its options:");
    shell.run(As::Server, "grep ^archive_ data/postgresql.conf")?;
    shell.export("PGCAIRN_CONFIG", &config.display().to_string());
    shell.run(As::Caller, "cat $PGCAIRN_CONFIG")?;
    Ok(())
}

/// Gives what the tables held that did not change during the backup.
fn take_backup(shell: &mut Shell, source: &Server, costs: &mut Costs) -> Result<Fingerprint> {
    shell.chapter(
        "A stanza and a check",
        &[
            "A stanza is the cluster as the repository knows it. The check forces a WAL segment through",
            "archive_command and waits until the repository has it.",
        ],
    )?;
    shell.run(As::Server, "pgcairn stanza-create")?;
    shell.run(As::Server, "pgcairn check")?;
    let before = fingerprint_of(shell, &source.conninfo(), |name| !name.starts_with("pgbench_"))?;
    shell.chapter("A full backup", &["The server goes on working: pgbench changes accounts all the while."])?;
    shell.run_in_background(As::Caller, &format!("pgbench -n -R 100 -T 3600 \"{}\"", source.conninfo()))?;
    costs.backup = shell.run(As::Server, "pgcairn backup --type full")?.took;
    shell.stop_background();
    shell.run(As::Server, "pgcairn info")?;
    costs.sizes(&shell.read(As::Server, Path::new("pgcairn"), &["info", "--output", "json"])?)?;
    Ok(before)
}

fn look_at_mount(shell: &mut Shell, programs: &Programs, costs: &mut Costs) -> Result<()> {
    shell.chapter(
        "The backup as a directory",
        &["Every backup is there as a data directory; what is not read is not fetched."],
    )?;
    costs.mount = shell.run(As::Caller, "pgcairn mount mnt")?.took;
    shell.run(As::Caller, "ls mnt mnt/backups mnt/wal")?;
    shell.run(As::Caller, "ls -C -T 0 -w 80 mnt/latest/")?;
    shell.run(As::Caller, "cat mnt/latest/backup_label")?;
    shell.say("Fetched from the repository so far:");
    shell.run(As::Caller, "grep -E 'requests|bytes' mnt/.pgcairn/status")?;
    if programs.has("pg_verifybackup") && programs.has("pg_waldump") {
        shell.say("PostgreSQL's own judge reads every byte, and the WAL the backup needs:");
        let ran = shell.run(As::Server, "pg_verifybackup mnt/latest/")?;
        costs.verify = Some(ran.took);
        shell.check(ran.stdout.contains("successfully verified"), "the mounted backup is what PostgreSQL backed up")?;
    }
    Ok(())
}

/// Gives what all tables hold in the backup.
fn start_clone(shell: &mut Shell, source: &Server, before: &Fingerprint, costs: &mut Costs) -> Result<Fingerprint> {
    shell.chapter("An accident", &["On the source, somebody empties the wrong table."])?;
    shell.export("SOURCE", &source.conninfo());
    shell.run(As::Caller, &format!("psql \"$SOURCE\" -c 'TRUNCATE {LOST}'"))?;
    shell.chapter(
        "PostgreSQL on the backup",
        &["No restore: the server starts on the mount and fetches only the pages it touches."],
    )?;
    let ran = shell.run(As::Caller, "pgcairn start latest --name one")?;
    costs.start = ran.took;
    shell.export("CLONE", conninfo(&ran)?);
    shell.run(
        As::Caller,
        &format!("psql \"$CLONE\" -c \"SELECT section, count(*) FROM {LOST} GROUP BY 1 ORDER BY 2 DESC LIMIT 3\""),
    )?;
    let backed_up = fingerprint(shell, conninfo(&ran)?)?;
    let rows = |of: &Fingerprint| of.values().map(|contents| contents.rows).sum::<u64>();
    let same = before.iter().all(|(name, contents)| backed_up.get(name) == Some(contents));
    shell.check(same, &format!("{} rows of text and images are as they were before the backup", rows(before)))?;
    let sums = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(tbalance) FROM pgbench_tellers)
        AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT coalesce(sum(delta), 0) FROM pgbench_history)
        AND (SELECT sum(bbalance) FROM pgbench_branches) = (SELECT sum(tbalance) FROM pgbench_tellers)";
    let balanced = ask(conninfo(&ran)?, sums)? == "t";
    let history = backed_up.get("pgbench_history").map_or(0, |contents| contents.rows);
    shell.check(balanced, &format!("the accounts balance, {history} transactions ran before and during the backup"))?;
    Ok(backed_up)
}

fn write_to_clone(shell: &mut Shell, source: &Server, backed_up: &Fingerprint, costs: &mut Costs) -> Result<()> {
    shell.chapter(
        "The clone is writable, the backup is not",
        &["What a clone writes goes to its own scratch layer. The file below is the table's, in the backup."],
    )?;
    let file = ask(&source.conninfo(), &format!("SELECT pg_relation_filepath('{CHANGED}')"))?;
    let hash = |shell: &Shell| shell.run(As::Caller, &format!("sha256sum mnt/latest/{file}"));
    let hash_before = hash(shell)?.stdout;
    shell.run(As::Caller, &format!("psql \"$CLONE\" -c 'UPDATE {CHANGED} SET bbalance = 0'"))?;
    shell.run(As::Caller, "psql \"$CLONE\" -c 'CREATE TABLE notes AS SELECT now() AS written' -c CHECKPOINT")?;
    shell.check(hash(shell)?.stdout == hash_before, "the file in the backup is the same")?;
    shell.say("A second clone, of the same backup:");
    let ran = shell.run(As::Caller, "pgcairn start latest --name two")?;
    costs.start_again = ran.took;
    let second = fingerprint(shell, conninfo(&ran)?)?;
    shell.check(!second.contains_key("notes"), "it has no table \"notes\"")?;
    shell.check(second == *backed_up, &format!("all its {} tables are as in the backup, row by row", second.len()))
}

fn rescue_table(shell: &mut Shell, source: &Server, before: &Fingerprint) -> Result<()> {
    shell.chapter("One table comes back", &["Copied from the clone to the source, while both run."])?;
    let line = format!("psql \"$CLONE\" -c 'COPY {LOST} TO STDOUT' | psql \"$SOURCE\" -c 'COPY {LOST} FROM STDIN'");
    shell.run(As::Caller, &line)?;
    let now = fingerprint_of(shell, &source.conninfo(), |name| name == LOST)?;
    shell.check(now.get(LOST) == before.get(LOST), &format!("the source has all of {LOST} again"))
}

fn stop_clones(shell: &mut Shell, home: &Home, costs: &mut Costs) -> Result<()> {
    shell.chapter("The clones go, and leave nothing", &[])?;
    costs.stop = shell.run(As::Caller, "pgcairn stop one")?.took;
    shell.run(As::Caller, "pgcairn stop two")?;
    let clones = home.path("clones");
    let left = fs::read_dir(&clones).map_err(|error| Error::io("list", &clones, error))?.count();
    let mounted = home.mounts()?.iter().any(|path| path.starts_with(&clones));
    shell.check(left == 0 && !mounted, "no file, no mount and no server of a clone is left")
}

fn restore(
    shell: &mut Shell,
    home: &Home,
    programs: &Programs,
    backed_up: &Fingerprint,
    costs: &mut Costs,
) -> Result<()> {
    shell.chapter(
        "A copy of the whole cluster",
        &["The classic restore: a plain data directory, every chunk and every file checked."],
    )?;
    costs.restore = shell.run(As::Caller, "pgcairn restore copy")?.took;
    let copy = Server::new(home, programs, "copy", "copy.log", 5433);
    let started = shell.run(As::Server, "pg_ctl -D copy -l run/copy.log -o '-p 5433' -s -w start")?;
    costs.restored_start = started.took;
    let restored = fingerprint(shell, &copy.conninfo())?;
    let rows: u64 = restored.values().map(|contents| contents.rows).sum();
    shell.check(restored == *backed_up, &format!("{rows} rows in {} tables are as in the backup", restored.len()))?;
    shell.run(As::Server, "pg_ctl -D copy -s -w stop")?;
    Ok(())
}

fn unmount(shell: &mut Shell, home: &Home) -> Result<()> {
    shell.chapter("The mount goes too", &[])?;
    shell.run(As::Caller, "pgcairn umount mnt")?;
    // the daemon has answered its last request before it is gone
    std::thread::sleep(Duration::from_millis(50));
    shell.check(home.mounts()?.is_empty(), "nothing of the demo is mounted any more")
}

/// The connection string that `pgcairn start` printed.
fn conninfo(started: &Ran) -> Result<&str> {
    let found = started.stdout.lines().find_map(|line| line.trim().strip_prefix("psql \"")?.strip_suffix('"'));
    found.ok_or_else(|| Error::new("pgcairn start prints no connection string"))
}
