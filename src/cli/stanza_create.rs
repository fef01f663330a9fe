use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::sync::Arc;

use clap::Args;

use super::options::Common;
use super::output;
use crate::backup::preflight::identify;
use crate::backup::server::Server;
use crate::error::{Error, Result};
use crate::format::manifest::Database;
use crate::repo::Repository;
use crate::store::Store;

/// Create a stanza for a running cluster: enters its system identifier and version into the repository
#[derive(Debug, Args)]
pub(super) struct StanzaCreate {
    /// Encrypt all that is stored in it, from the beginning on; needs a passphrase
    #[arg(long)]
    encrypt: bool,
    #[command(flatten)]
    server: super::pg::ServerOptions,
}

impl StanzaCreate {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let mut server = Server::connect_primary(&self.server.pg, "--pg")?;
        let database = identify(&mut server)?;
        common.refuse_repository_in_data_directory(Some(&server.data_directory))?;
        let is_new = common.repository_directory().is_some_and(|directory| !directory.exists());
        let mut store = common.store(true)?;
        if let (true, Some(directory)) = (is_new, common.repository_directory()) {
            give_to_owner_of(&server.data_directory, &directory)?;
            store = common.store(false)?;
        }
        let cluster = format!("PostgreSQL {}, system identifier {}", database.version, database.system_id);
        let (repository, is_created) = self.create(common, store, database)?;
        let text = format!(
            "{}stanza {} ({cluster}) in {}",
            if repository.keys.is_secret() { "encrypted " } else { "" },
            repository.stanza,
            repository.store.url()
        );
        common.repository()?.archive_info()?;
        match is_created {
            true => output::line(&format!("created {text}")),
            false => output::line(&format!("{text} exists already")),
        }
        Ok(())
    }

    fn create(&self, common: &Common, store: Arc<dyn Store>, database: Database) -> Result<(Repository, bool)> {
        let open = Repository::new(store, common.stanza()?)?;
        let passphrase = common.cipher.passphrase()?;
        if self.encrypt {
            let passphrase = passphrase.ok_or_else(|| Error::new("--encrypt needs a passphrase").hint(
                "give --repo-cipher-pass-file or --repo-cipher-pass-command, or set PGCAIRN_REPO_CIPHER_PASS in the environment",
            ))?;
            return open.create_encrypted_stanza(&passphrase, database);
        }
        if passphrase.is_some() && !open.has_secret()? {
            return Err(Error::new(format!("a passphrase is given, but stanza {} is not encrypted", open.stanza))
                .hint("give --encrypt too, or leave the passphrase out"));
        }
        let repository = Repository::open(open.store, &open.stanza, passphrase.as_ref())?;
        let is_created = repository.create_stanza(database)?;
        Ok((repository, is_created))
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
