use clap::Args;

use super::options::Common;
use super::output;
use crate::error::Result;
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
        let repository = common.repository(true)?;
        let server = Server::connect(&self.server.pg)?;
        let database = identify(&server)?;
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
