use std::path::PathBuf;

use clap::Args;

use super::mount::mount_error;
use super::{daemon, output};
use crate::error::Result;

/// Unmount what "pgcairn mount" mounted, also when its daemon died
#[derive(Debug, Args)]
pub(super) struct Umount {
    /// The mountpoint
    mountpoint: PathBuf,
}

impl Umount {
    pub(super) fn run(self) -> Result<()> {
        pgcairn_mount::mountpoint::unmount_hurried(&self.mountpoint, daemon::hurry).map_err(mount_error)?;
        output::line(&format!("unmounted {}", self.mountpoint.display()));
        Ok(())
    }
}
