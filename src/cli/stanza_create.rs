use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use clap::Args;

use super::options::Common;
use super::output;
use crate::error::{Error, Result};
use crate::write::check::identify;
use crate::write::server::Server;

/// Create a stanza for a running cluster: enters its system identifier and version into the repository
#[derive(Debug, Args)]
pub(super) struct StanzaCreate {
    #[command(flatten)]
    server: super::pg::ServerOptions,
}

impl StanzaCreate {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let server = Server::connect_primary(&self.server.pg, "--pg")?;
        let database = identify(&server)?;
        let is_new = common.repository_directory().is_some_and(|directory| !directory.exists());
        let repository = common.repository(true)?;
        if let (true, Some(directory)) = (is_new, common.repository_directory()) {
            give_to_owner_of(&server.data_directory, &directory)?;
        }
        let repository = if is_new { common.repository(false)? } else { repository };
        let text = format!(
            "stanza {} (PostgreSQL {}, system identifier {}) in {}",
            repository.stanza,
            database.version,
            database.system_id,
            repository.store.url()
        );
        match repository.create_stanza(database)? {
            true => output::line(&format!("created {text}")),
            false => output::line(&format!("{text} exists already")),
        }
        Ok(())
    }
}

/// A directory repository that root makes belongs to the cluster's user: its archive_command writes there.
fn give_to_owner_of(data_directory: &Path, repository: &Path) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    let owner = data_directory.metadata().map_err(|error| Error::io("look at", data_directory, error))?;
    chown(repository, Some(owner.uid()), Some(owner.gid()))
        .map_err(|error| Error::io("change the owner of", repository, error))
}
