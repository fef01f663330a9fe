use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::backup::default_process_max;
use super::options::{Cache, Common, Output};
use super::output::{self, Progress, bytes};
use super::point::{self, PointOptions, WalFor};
use crate::error::{Error, Result};
use crate::files;
use crate::format::manifest::{Description, Tablespace};
use crate::postgres::{AUTO_CONF, conf};
use crate::read::completion::Prepared;
use crate::read::tree::Owner;
use crate::read::view::{View, ViewOptions};
use crate::recovery::plan::{Bound, Course, Recovery};
use crate::recovery::target::{Action, Point, Target};
use crate::repo::Repository;
use crate::restore::{Databases, RestoreOptions, Restored, restore};

/// Copy a backup out into an empty directory, or make a data directory equal to it
///
/// Every byte is checked. Until all of it is durable the directory has no pg_control, so that nothing starts on a half of it;
/// --delta goes on where a restore was interrupted.
/// The copy's server recovers to the end of the archive, unless --type or --target say otherwise; --type=none is the backup alone.
/// The copy does not archive WAL unless --archive-mode=preserve: it is on its source's timeline.
#[derive(Debug, Args)]
pub(super) struct Restore {
    /// Directory to write to: empty, or not there yet; with --delta also this cluster's
    directory: PathBuf,
    /// Which backup to begin with: a label, or latest [default: with a target the last one before it, else the latest]
    #[arg(long = "set", env = "PGCAIRN_SET", value_name = "LABEL")]
    set: Option<String>,
    #[command(flatten)]
    point: PointOptions,
    /// Make the directory equal: write what differs, remove what does not belong. Nothing that is equal is fetched
    #[arg(long)]
    delta: bool,
    /// Where a tablespace goes, by its name or oid; without it, where the source had it (which must be empty). May be repeated
    #[arg(long, value_name = "NAME=DIR", value_parser = tablespace)]
    tablespace_map: Vec<(String, PathBuf)>,
    /// Where all other tablespaces go, each in a directory named as it is
    #[arg(long, value_name = "DIR")]
    tablespace_map_all: Option<PathBuf>,
    /// Restore this database, by its name or oid, and of those that are not listed only template0, template1 and postgres: the
    /// others become files of zeros, to be dropped. May be repeated
    #[arg(long, value_name = "NAME")]
    db_include: Vec<String>,
    /// Restore this database, by its name or oid, as files of zeros, to be dropped; with --db-include only template0, template1
    /// and postgres need it. May be repeated
    #[arg(long, value_name = "NAME")]
    db_exclude: Vec<String>,
    /// off: it is a copy beside its source: it archives nothing, and its subscriptions and jobs of pg_cron do not run; preserve: it
    /// takes its source's place, with all settings as they were
    #[arg(long, env = "PGCAIRN_ARCHIVE_MODE", value_name = "MODE", default_value = "off")]
    archive_mode: ArchiveMode,
    /// Threads that fetch, check and write [default: number of CPUs, at most 8]
    #[arg(long, env = "PGCAIRN_PROCESS_MAX", value_name = "N")]
    process_max: Option<usize>,
    /// Whose files these will be [default: as root the owner of the backed up cluster]
    #[arg(long, env = "PGCAIRN_OWNER", value_name = "USER")]
    owner: Option<String>,
    /// Output for people or programs
    #[arg(long, default_value = "text")]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ArchiveMode {
    Off,
    Preserve,
}

impl Restore {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let point = self.point.point_or_end(self.set.as_deref())?;
        let repository = common.repository()?;
        let course = self.course(&repository, &point)?;
        if self.archive_mode == ArchiveMode::Preserve {
            refuse_same_timeline(&course, &point)?;
        }
        let copy = self.archive_mode == ArchiveMode::Off;
        let wal_for = if copy { WalFor::Copy } else { WalFor::Replacement };
        let prepared = match &course.recovery {
            Some(recovery) => Some(Prepared {
                settings: recovery
                    .settings_with(point.action.unwrap_or(Action::Pause), &point::restore_command(common, wal_for)?),
                recovery: recovery.clone(),
                presents_wal: false,
            }),
            None => None,
        };
        let label = course.label;
        let fetcher = no_cache().fetcher(repository)?;
        let options = ViewOptions { copy, ..ViewOptions::default() };
        let recovery = prepared.as_ref().map(|prepared| prepared.recovery.clone());
        let view = View::load(fetcher, &label, &ViewOptions { changes: self.delta, ..options.prepared(prepared) })?;
        let root = nix::unistd::geteuid().is_root();
        let owner = match root || self.owner.is_some() {
            true => Some(super::mount::owner(self.owner.as_deref(), &view.description.owner)?),
            false => None,
        };
        let tablespaces = places(&view.description, &self.tablespace_map, self.tablespace_map_all.as_deref())?;
        let process_max = self.process_max.unwrap_or_else(default_process_max);
        let directory = absolute(&self.directory)?;
        let progress = Progress::new(false);
        let started = Instant::now();
        if let Some(owner) = owner.filter(|_| root && recovery.is_some()) {
            warn_of_program(owner);
        }
        let databases = Databases { include: self.db_include, exclude: self.db_exclude };
        let options = RestoreOptions { process_max, owner, tablespaces, delta: self.delta, databases, copy };
        let restored = restore(&view, &directory, &options, &progress)?;
        progress.clear();
        let reaches = if copy { outside(&directory) } else { Vec::new() };
        let seconds = started.elapsed().as_secs_f64();
        let told = Told { label, directory, restored, seconds, recovery, delta: self.delta, copy, reaches };
        match self.output {
            Output::Json => output::line(&serde_json::to_string_pretty(&told.json())?),
            Output::Text => told.lines().iter().for_each(|line| output::line(line)),
        }
        Ok(())
    }
}

impl Restore {
    /// The way to the point. Where nothing is asked for and no WAL is archived after the backup, that is the backup.
    fn course(&self, repository: &Repository, point: &Point) -> Result<Course> {
        let course = point::find(repository, point, Bound::Open, &no_cache());
        if self.point.is_explicit() || point.target != Target::End {
            return course;
        }
        let course = course.map_err(|error| match error.hint_text() {
            Some(_) => error,
            None => error.hint("\"--type=none\" restores a backup without what was archived after it"),
        })?;
        let has_wal = course.recovery.as_ref().is_some_and(|recovery| !recovery.wal.is_empty());
        match !has_wal && repository.description(&course.label)?.wal_stored {
            true => Ok(Course { recovery: None, ..course }),
            false => Ok(course),
        }
    }
}

/// A server that archives must end its recovery on a timeline of its own. One that shut down at its
/// target has not ended it: PostgreSQL goes on from there when `recovery.signal` is removed, and
/// then on its source's timeline.
fn refuse_same_timeline(course: &Course, point: &Point) -> Result<()> {
    let Some(recovery) = &course.recovery else {
        return Err(Error::new(
            "--archive-mode=preserve without a recovery target makes a copy that archives on its source's timeline",
        )
        .hint(
            "recover to a timeline of its own: --type=default (the end of the archive), --type=immediate, or a target",
        ));
    };
    match recovery.has_target && point.action == Some(Action::Shutdown) {
        true => Err(Error::new(
            "--archive-mode=preserve with --target-action=shutdown makes a copy that archives on its source's timeline, should \
             its recovery.signal be removed to start it",
        )
        .hint("--target-action=promote ends recovery on a timeline of its own; pause waits at the target until it is promoted")),
        false => Ok(()),
    }
}

/// Says so when the user that the server will run as cannot run this program, which its restore_command names.
fn warn_of_program(owner: Owner) {
    let Ok(program) = std::env::current_exe() else { return };
    let mut run = Command::new(&program);
    run.arg("--version").current_dir("/").uid(owner.uid).gid(owner.gid);
    run.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if !run.status().is_ok_and(|status| status.success()) {
        output::note(&format!(
            "note: user {} cannot run {}, which the copy's restore_command names: its server will not start; \
             install pgcairn where that user can run it",
            owner.uid,
            program.display()
        ));
    }
}

/// What is told of a restore.
struct Told {
    label: String,
    directory: PathBuf,
    restored: Restored,
    seconds: f64,
    recovery: Option<Recovery>,
    delta: bool,
    copy: bool,
    reaches: Vec<String>,
}

impl Told {
    fn lines(&self) -> Vec<String> {
        let of = &self.restored;
        let mut lines = vec![format!(
            "backup {} restored to {}: {} in {} files, {:.1} s",
            self.label,
            self.directory.display(),
            bytes(of.bytes),
            of.files,
            self.seconds
        )];
        if self.delta {
            lines.push(format!(
                "{} written, {} were equal; {} files that did not belong were removed",
                bytes(of.bytes - of.equal),
                bytes(of.equal),
                of.removed
            ));
        }
        lines.extend(of.note.clone());
        if !of.zeroed.is_empty() {
            let names: Vec<String> = of.zeroed.iter().map(ToString::to_string).collect();
            lines.push(format!("restored as zeros: {}; drop these databases", names.join(", ")));
        }
        lines.push(match &self.recovery {
            Some(recovery) => {
                let reaches = recovery.reaches.as_ref().map(|reached| format!("; {reached}")).unwrap_or_default();
                format!("its server recovers to {} when it is started{reaches}", recovery.to)
            }
            None => {
                "its server will be at the end of the backup, and replays nothing that was archived after it".to_owned()
            }
        });
        if self.copy {
            lines.push(
                "it is a copy: no archiving, no subscriptions, no jobs of pg_cron (see the end of its postgresql.auto.conf; \
                 --archive-mode=preserve restores a replacement)"
                    .to_owned(),
            );
        }
        lines.extend(self.reaches.iter().map(|what| format!("when it is started it reaches outside: {what}")));
        lines
    }

    fn json(&self) -> serde_json::Value {
        let of = &self.restored;
        serde_json::json!({
            "label": self.label,
            "directory": self.directory,
            "files": of.files,
            "bytes": of.bytes,
            "bytes-written": of.bytes - of.equal,
            "bytes-equal": of.equal,
            "files-removed": of.removed,
            "databases-zeroed": of.zeroed,
            "recovers-to": self.recovery.as_ref().map(|recovery| &recovery.to),
            "reaches": self.recovery.as_ref().and_then(|recovery| recovery.reaches.as_ref()),
            "notes": self.recovery.as_ref().map(|recovery| &recovery.notes),
            "note": of.note,
            "copy": self.copy,
            "reaches-outside": self.reaches,
            "seconds": self.seconds,
        })
    }
}

/// Libraries that start nothing by themselves and connect to nothing.
const QUIET_LIBRARIES: [&str; 4] = ["", "pg_stat_statements", "auto_explain", "pg_stat_kcache"];

/// What the copy's configuration leads to outside of it.
fn outside(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for file in ["postgresql.conf", AUTO_CONF] {
        let text = files::read_regular(&directory.join(file)).unwrap_or_default();
        let values =
            |names: &[&str]| -> Vec<String> { names.iter().flat_map(|name| conf::values(&text, name)).collect() };
        for included in values(&["include", "include_if_exists", "include_dir"]) {
            if !Path::new(&included).is_absolute() {
                continue;
            }
            found.push(format!("{file} includes {included}"));
            let its = files::read_regular(Path::new(&included)).unwrap_or_default();
            found.extend(conf::values(&its, "data_directory").iter().map(|place| {
                let directory = directory.display();
                format!("{included} says that the server runs in {place}: start it with -c data_directory={directory}")
            }));
        }
        let named =
            values(&["hba_file", "ident_file", "ssl_cert_file", "ssl_key_file", "ssl_ca_file", "krb_server_keyfile"]);
        found.extend(named.iter().filter(|path| path.starts_with('/')).map(|path| format!("{file} names {path}")));
        let libraries = values(&["shared_preload_libraries"]).pop().unwrap_or_default();
        let busy = libraries.split(',').map(str::trim).filter(|library| !QUIET_LIBRARIES.contains(library));
        found.extend(busy.map(|library| format!("{file} loads {library}, which may run workers")));
    }
    found
}

/// Where tablespaces go that do not go where the source had them, by oid.
fn places(of: &Description, map: &[(String, PathBuf)], all: Option<&Path>) -> Result<BTreeMap<u32, PathBuf>> {
    let mut places = BTreeMap::new();
    for (wanted, place) in map {
        let named = |tablespace: &&Tablespace| tablespace.name.as_ref() == Some(wanted);
        let numbered = |tablespace: &&Tablespace| tablespace.oid.to_string() == *wanted;
        let found = of.tablespaces.iter().find(named).or_else(|| of.tablespaces.iter().find(numbered));
        let found = found.ok_or_else(|| {
            let name =
                |of: &Tablespace| of.name.as_ref().map_or(of.oid.to_string(), |name| format!("{name} ({})", of.oid));
            let known: Vec<String> = of.tablespaces.iter().map(name).collect();
            let hint = match known.is_empty() {
                true => "it has none: leave --tablespace-map out".to_owned(),
                false => format!("its tablespaces are {}", known.join(", ")),
            };
            Error::new(format!("backup {} has no tablespace {wanted}", of.label)).hint(hint)
        })?;
        if places.insert(found.oid, absolute(place)?).is_some() {
            return Err(Error::new(format!("tablespace {wanted} is mapped twice")).hint("say one place for each"));
        }
    }
    if let Some(all) = all {
        let all = absolute(all)?;
        for tablespace in &of.tablespaces {
            places.entry(tablespace.oid).or_insert_with(|| all.join(directory_name(tablespace)));
        }
    }
    Ok(places)
}

/// The tablespace's name where that can name a directory, else its oid.
fn directory_name(of: &Tablespace) -> String {
    let can_be = |name: &&String| !name.contains(['/', '\0']) && !name.starts_with('.');
    of.name.as_ref().filter(can_be).cloned().unwrap_or_else(|| of.oid.to_string())
}

/// A copy reads each chunk once: the disk cache would only be in its way.
fn no_cache() -> Cache {
    Cache { cache_path: None, cache_size: 0, cache_memory: 64 << 20 }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::io("find", path, error))
}

fn tablespace(text: &str) -> std::result::Result<(String, PathBuf), String> {
    // a directory begins with the first slash behind an equals sign: a name may hold one, too
    let (name, directory) = text.split_once("=/").ok_or("it reads like 16400=/new/place or NAME=/new/place")?;
    Ok((name.to_owned(), Path::new("/").join(directory)))
}
