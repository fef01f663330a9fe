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
}

impl StanzaUpgrade {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let mut server = Server::connect_primary(&self.server.pg, "--pg")?;
        let database = identify(&mut server)?;
        let repository = common.repository()?;
        let (version, system_id) = (database.version, database.system_id);
        let lock = repository.lock(LockKind::Stanza, "stanza-upgrade")?;
        lock.check()?;
        let before = repository.archive_info()?.current()?.clone();
        if before.version == version && before.system_id != system_id {
            output::note(&format!(
                "warning: the cluster before was PostgreSQL {version} too, with system identifier {}: make sure that --pg \
                 does not lead to an unrelated cluster, which needs a stanza of its own",
                before.system_id
            ));
        }
        let cluster = format!("PostgreSQL {version}, system identifier {system_id}");
        output::line(&match repository.upgrade_stanza(database)? {
            Some(id) => {
                format!("stanza {} is now {cluster}; its WAL goes to archive {version}-{id}", repository.stanza)
            }
            None => format!("stanza {} is {cluster} already: nothing to do", repository.stanza),
        });
        Ok(())
    }
}
