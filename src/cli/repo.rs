use clap::{Args, Subcommand};

use super::cipher::NewCipher;
use super::options::Common;
use super::output;
use crate::error::{Error, Result};
use crate::repo::Repository;
use crate::repo::passwd::change_passphrase;
use crate::verify::repair::repair;

/// Work on the repository itself
#[derive(Debug, Args)]
pub(super) struct Repo {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make backup.info, archive.info and the latest pointers again from manifests and archive
    Repair,
    /// Change the passphrase of an encrypted stanza; what is stored in it stays as it is
    Passwd {
        #[command(flatten)]
        new: NewCipher,
    },
}

impl Repo {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        match self.verb {
            Verb::Repair => repair(&common.repository()?)?.iter().for_each(|line| output::line(line)),
            Verb::Passwd { new } => {
                let old = common.cipher.passphrase()?.ok_or_else(|| {
                    Error::new("repo passwd needs the present passphrase, too").hint(
                        "give --repo-cipher-pass-file or --repo-cipher-pass-command, or set PGCAIRN_REPO_CIPHER_PASS",
                    )
                })?;
                let repository = Repository::new(common.store(false)?, common.stanza()?)?;
                change_passphrase(&repository, &old, &new.passphrase()?)?;
                output::line(&format!("stanza {} is opened by the new passphrase, and by no other", repository.stanza));
            }
        }
        Ok(())
    }
}
