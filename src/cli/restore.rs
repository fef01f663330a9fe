use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::backup::default_process_max;
use super::options::{Cache, Common};
use super::output::{self, Progress, bytes};
use super::point::{self, PointOptions};
use crate::error::Result;
use crate::read::course::Bound;
use crate::read::point::Action;
use crate::read::recovery::Prepared;
use crate::read::restore::{RestoreOptions, restore};
use crate::read::view::{View, ViewOptions};

/// Copy a backup out into an empty directory
///
/// Every byte is checked. Until all of it is durable the directory has no pg_control, so that nothing starts on a half of it.
/// The copy does not archive WAL unless --archive-mode=preserve: it is on its source's timeline.
#[derive(Debug, Args)]
pub(super) struct Restore {
    /// Directory to write to: empty, or not there yet
    directory: PathBuf,
    /// Which backup: a label, or latest [default: with a target the last one before it, else the latest]
    #[arg(long = "set", env = "PGCAIRN_SET", value_name = "LABEL")]
    set: Option<String>,
    #[command(flatten)]
    point: PointOptions,
    /// Where a tablespace goes; without it, where the source had it (which must be empty). May be repeated
    #[arg(long, value_name = "OID=DIR", value_parser = tablespace)]
    tablespace_map: Vec<(u32, PathBuf)>,
    /// Where all other tablespaces go, each in a directory named by its oid
    #[arg(long, value_name = "DIR")]
    tablespace_map_all: Option<PathBuf>,
    /// Whether the copy archives its WAL
    #[arg(long, env = "PGCAIRN_ARCHIVE_MODE", value_name = "MODE", default_value = "off")]
    archive_mode: ArchiveMode,
    /// Threads that fetch, check and write [default: number of CPUs, at most 8]
    #[arg(long, env = "PGCAIRN_PROCESS_MAX", value_name = "N")]
    process_max: Option<usize>,
    /// Whose files these will be [default: as root the owner of the backed up cluster]
    #[arg(long, env = "PGCAIRN_OWNER", value_name = "USER")]
    owner: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ArchiveMode {
    Off,
    Preserve,
}

impl Restore {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let point = self.point.point(self.set.as_deref())?;
        let repository = common.repository()?;
        let course = point::find(&repository, &point, Bound::Open, &no_cache())?;
        let prepared = match &course.recovery {
            Some(recovery) => Some(Prepared {
                settings: recovery
                    .settings_with(point.action.unwrap_or(Action::Pause), &point::restore_command(common, false)?),
                recovery: recovery.clone(),
                presents_wal: false,
            }),
            None => None,
        };
        let label = course.label;
        let fetcher = no_cache().fetcher(repository)?;
        let options = match self.archive_mode {
            ArchiveMode::Off => ViewOptions::copy(),
            ArchiveMode::Preserve => ViewOptions::default(),
        };
        let to = prepared.as_ref().map(|prepared| prepared.recovery.to.clone());
        let view = View::load(fetcher, &label, &options.prepared(prepared))?;
        let root = nix::unistd::geteuid().is_root();
        let owner = match root || self.owner.is_some() {
            true => Some(super::mount::owner(self.owner.as_deref(), &view.description.owner)?),
            false => None,
        };
        let mut tablespaces: BTreeMap<u32, PathBuf> = self.tablespace_map.iter().cloned().collect();
        if let Some(all) = &self.tablespace_map_all {
            for tablespace in &view.description.tablespaces {
                tablespaces.entry(tablespace.oid).or_insert_with(|| all.join(tablespace.oid.to_string()));
            }
        }
        let process_max = self.process_max.unwrap_or_else(default_process_max);
        let directory = absolute(&self.directory)?;
        let progress = Progress::new(false);
        let started = Instant::now();
        let options = RestoreOptions { process_max, owner, tablespaces };
        let restored = restore(&view, &directory, &options, &progress)?;
        progress.clear();
        output::line(&format!(
            "backup {label} restored to {}: {} in {} files, {:.1} s",
            directory.display(),
            bytes(restored.bytes),
            restored.files,
            started.elapsed().as_secs_f64()
        ));
        if let Some(to) = to {
            output::line(&format!("its server recovers to {to} when it is started"));
        }
        Ok(())
    }
}

/// A copy reads each chunk once: the disk cache would only be in its way.
fn no_cache() -> Cache {
    Cache { cache_path: None, cache_size: 0, cache_memory: 64 << 20 }
}

fn absolute(path: &std::path::Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| crate::error::Error::io("find", path, error))
}

fn tablespace(text: &str) -> std::result::Result<(u32, PathBuf), String> {
    let (oid, directory) = text.split_once('=').ok_or("it reads like 16400=/new/place")?;
    let oid = oid.parse().map_err(|_| format!("\"{oid}\" is no oid of a tablespace"))?;
    match directory.starts_with('/') {
        true => Ok((oid, PathBuf::from(directory))),
        false => Err(format!("\"{directory}\" is not an absolute path")),
    }
}
