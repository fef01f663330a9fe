//! The newcomer's path: every verb on a throwaway cluster, as a user would type it.

mod cluster;
mod data;
mod home;
mod shell;
mod steps;
mod table;

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::options::Common;
use super::output;
use crate::error::{Error, Result};
use cluster::Programs;
use home::Home;
use shell::Shell;

/// Show everything on a throwaway cluster: back it up, mount the backup, start PostgreSQL on it, copy it out
///
/// Makes a PostgreSQL cluster with some data in a temporary directory, runs each verb on it, checks what comes out and
/// prints what it costs. Everything is removed at the end, also after Ctrl-C; no other cluster is touched.
#[derive(Debug, Args)]
pub(super) struct Demo {
    /// Megabytes of data in the cluster
    #[arg(long, value_name = "MB", default_value_t = 300, value_parser = clap::value_parser!(u32).range(20..))]
    size: u32,
    /// Directory of PostgreSQL's programs [default: the newest version found]
    #[arg(long, env = "PGCAIRN_PG_BIN", value_name = "DIR")]
    pg_bin: Option<PathBuf>,
    /// Leave everything as it is at the end: servers, mounts, repository
    #[arg(long)]
    keep: bool,
}

impl Demo {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let programs = Programs::find(self.pg_bin.as_deref())?;
        let user = cluster::server_user()?;
        // before anything is there to be left behind
        let interrupted = shell::watch_for_signals()?;
        // a repository from the environment or from /etc holds somebody's real backups: only one that was typed is meant
        let given = repository_is_typed().then_some(common);
        let home = Home::create(self.size, user.as_ref(), given)?;
        if !self.keep {
            home.end_when(Arc::clone(&interrupted));
        }
        let mut shell = Shell::new(&home, &programs, user, interrupted, given);
        let result = steps::all(&mut shell, &home, &programs, self.size);
        if self.keep {
            home.keep(&programs);
            return result;
        }
        shell.stop_background();
        let interrupted = shell.interrupted();
        if result.is_err() && !interrupted {
            home.show_log();
        }
        let removed = home.remove();
        match (interrupted, removed) {
            (_, Err(error)) => {
                // what failed first is what matters, but what is left must be said too
                if let Err(first) = result {
                    output::error(&first);
                }
                Err(error)
            }
            (true, Ok(())) => Err(Error::new("interrupted; everything the demo made is removed")),
            (false, Ok(())) => result,
        }
    }
}

fn repository_is_typed() -> bool {
    let is_repo = |argument: &str| argument == "--repo" || argument.starts_with("--repo=");
    std::env::args_os().any(|argument| argument.to_str().is_some_and(is_repo))
}
