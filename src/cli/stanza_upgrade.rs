use clap::Args;

use super::options::Common;
use super::output;
use crate::backup::preflight::identify;
use crate::backup::server::Server;
use crate::error::Result;
use crate::format::info::LockKind;

/// Continue a stanza with the cluster that pg_upgrade made of its own
///
/// From then on backups and WAL are the new cluster's, under its own number. Those of the old one stay readable.
#[derive(Debug, Args)]
pub(super) struct StanzaUpgrade {
    #[command(flatten)]
    server: super::pg::ServerOptions,
    /// Accept another cluster of the same version, which is mostly an unrelated one
    #[arg(long)]
    force: bool,
}

impl StanzaUpgrade {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let mut server = Server::connect_primary(&self.server.pg, "--pg")?;
        let database = identify(&mut server)?;
        let repository = common.repository()?;
        let (version, system_id) = (database.version, database.system_id);
        let lock = repository.lock(LockKind::Stanza, "stanza-upgrade")?;
        lock.check()?;
        let cluster = format!("PostgreSQL {version}, system identifier {system_id}");
        output::line(&match repository.upgrade_stanza(database, self.force)? {
            Some(id) => {
                format!("stanza {} is now {cluster}; its WAL goes to archive {version}-{id}", repository.stanza)
            }
            None => format!("stanza {} is {cluster} already: nothing to do", repository.stanza),
        });
        Ok(())
    }
}
