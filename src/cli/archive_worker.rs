//! The archive's workers in the background, and where they leave what they have for the calls that come later.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};

use super::options::{Common, refuse_in_data_directory, state_directory};
use super::{backup, daemon};
use crate::archive::client::{Fate, Place, Watch};
use crate::archive::prefetch;
use crate::archive::spool::Spool;
use crate::archive::worker::{AheadOptions, push_ahead};
use crate::error::Result;
use crate::repo::asking::Asking;

/// Seconds without work after which a worker ends.
const IDLE_S: u64 = 30;

/// Options of verbs that have workers.
#[derive(Clone, Debug, Args)]
pub(super) struct Staging {
    /// Directory in which workers leave answers and files for the next calls
    #[arg(long, env = "PGCAIRN_SPOOL_PATH", value_name = "DIR")]
    spool_path: Option<PathBuf>,
    /// Files that the worker compresses, or fetches, at once; the CPUs by default
    #[arg(long, env = "PGCAIRN_PROCESS_MAX", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    process_max: Option<u16>,
}

impl Staging {
    /// The spool of what this server archives into this stanza.
    pub(super) fn push_spool(&self, common: &Common, place: &Place) -> Result<Spool> {
        let system_id = place.system_id.to_string();
        self.spool(common, "push", &[place.wal.as_os_str().as_encoded_bytes(), system_id.as_bytes()])
    }

    /// The spool of what this stanza's archive delivers to this cluster in this directory.
    pub(super) fn get_spool(&self, common: &Common, wal: &Path, asking: &Asking) -> Result<Spool> {
        let cluster = format!("{} {}", asking.system_id, asking.version.unwrap_or_default());
        self.spool(common, "get", &[wal.as_os_str().as_encoded_bytes(), cluster.as_bytes()])
    }

    fn spool(&self, common: &Common, direction: &str, parts: &[&[u8]]) -> Result<Spool> {
        let root = "/var/spool/pgcairn";
        let default = || state_directory(root, "XDG_STATE_HOME", ".local/state", "pgcairn/spool", "--spool-path");
        let base = self.spool_path.clone().map_or_else(default, Ok)?;
        refuse_in_data_directory("the spool", &base, "--spool-path")?;
        let repository = common.identity();
        let repository: Vec<&[u8]> = repository.iter().map(String::as_bytes).collect();
        let stanza = common.stanza.as_deref().unwrap_or_default();
        Spool::open(&base, &format!("{stanza}-{direction}"), &[&repository[..], parts].concat())
    }

    fn process_max(&self) -> usize {
        self.process_max.map_or_else(backup::default_process_max, usize::from)
    }
}

/// Work for the archive in the background; started by archive-push and archive-get
#[derive(Debug, Args)]
pub(super) struct ArchiveWorker {
    #[command(subcommand)]
    work: Work,
}

#[derive(Debug, Subcommand)]
enum Work {
    Push(Push),
    Get(Get),
}

/// Push all that is ready
#[derive(Debug, Args)]
pub(super) struct Push {
    #[arg(long)]
    spool: PathBuf,
    #[arg(long)]
    wal: PathBuf,
    #[arg(long, allow_hyphen_values = true)]
    level: i32,
    #[arg(long)]
    threads: usize,
    #[arg(long)]
    timeout: u64,
    #[arg(long, default_value_t = IDLE_S)]
    idle: u64,
}

impl Push {
    pub(super) fn new(place: &Place, spool: &Spool, level: i32, timeout: u64, staging: &Staging) -> Self {
        let (spool, wal) = (spool.path().to_owned(), place.wal.clone());
        Self { spool, wal, level, threads: staging.process_max(), timeout, idle: IDLE_S }
    }

    pub(super) fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["push".to_owned()];
        let path = |path: &PathBuf| path.display().to_string();
        for (name, value) in [
            ("spool", path(&self.spool)),
            ("wal", path(&self.wal)),
            ("level", self.level.to_string()),
            ("threads", self.threads.to_string()),
            ("timeout", self.timeout.to_string()),
        ] {
            arguments.push(format!("--{name}={value}"));
        }
        arguments
    }

    fn run(self, common: &Common) -> Result<()> {
        let spool = Spool::at(&self.spool)?;
        let options = AheadOptions {
            wal: self.wal,
            level: self.level,
            process_max: self.threads.max(1),
            idle: Duration::from_secs(self.idle),
        };
        // the store's error should be told before the call that waits for it gives up
        let patience = Duration::from_secs(self.timeout / 2).max(Duration::from_secs(1));
        push_ahead(&spool, &options, &|| common.repository_within(patience))
    }
}

/// Fetch ahead
#[derive(Debug, Args)]
pub(super) struct Get {
    #[arg(long)]
    spool: PathBuf,
    #[arg(long)]
    wal: PathBuf,
    #[arg(long)]
    queue: u64,
    #[arg(long)]
    system_id: u64,
    #[arg(long)]
    major: Option<u32>,
    #[arg(long)]
    threads: usize,
    #[arg(long, default_value_t = IDLE_S)]
    idle: u64,
}

impl Get {
    pub(super) fn new(wal: &Path, spool: &Spool, queue: u64, asking: &Asking, staging: &Staging) -> Self {
        let (spool, wal) = (spool.path().to_owned(), wal.to_owned());
        let Asking { system_id, version: major } = *asking;
        Self { spool, wal, queue, system_id, major, threads: staging.process_max(), idle: IDLE_S }
    }

    pub(super) fn arguments(&self) -> Vec<String> {
        [
            "get".to_owned(),
            format!("--spool={}", self.spool.display()),
            format!("--wal={}", self.wal.display()),
            format!("--queue={}", self.queue),
            format!("--threads={}", self.threads),
            format!("--system-id={}", self.system_id),
        ]
        .into_iter()
        .chain(self.major.map(|major| format!("--major={major}")))
        .collect()
    }

    fn run(self, common: &Common) -> Result<()> {
        let spool = Spool::at(&self.spool)?;
        let options = prefetch::AheadOptions {
            queue_bytes: self.queue,
            process_max: self.threads.max(1),
            idle: Duration::from_secs(self.idle),
            wal: self.wal,
            asking: Asking { system_id: self.system_id, version: self.major },
        };
        prefetch::fetch_ahead(&spool, &options, &|| common.repository())
    }
}

impl ArchiveWorker {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        daemon::detach();
        daemon::let_go();
        match self.work {
            Work::Push(push) => push.run(common),
            Work::Get(get) => get.run(common),
        }
    }
}

/// Starts a worker, which goes on without us.
pub(super) fn start(common: &Common, work: &[String]) -> Result<Watch> {
    let mut arguments = common.arguments();
    arguments.push("archive-worker".into());
    arguments.extend_from_slice(work);
    let stanza = common.stanza.as_deref().unwrap_or_default();
    let log = daemon::log_path(&format!("archive-{stanza}")).unwrap_or_else(|_| PathBuf::from("/dev/null"));
    let mut child = daemon::launch(&arguments, &common.secrets(), &log)?;
    Ok(Box::new(move || match child.try_wait() {
        Ok(None) => Fate::Alive,
        Ok(Some(status)) if status.success() => Fate::Ended,
        Ok(Some(_)) | Err(_) => Fate::Failed,
    }))
}
