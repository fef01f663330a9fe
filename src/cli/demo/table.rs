//! The closing table: what it all cost.

use std::time::Duration;

use serde_json::Value;

use crate::cli::output::{self, bytes};
use crate::error::{Error, Result};

/// What is measured on the way.
#[derive(Debug, Default)]
pub(super) struct Costs {
    /// bytes of the database, and how many the backup stored
    pub(super) database: u64,
    pub(super) stored: u64,
    pub(super) backup: Duration,
    pub(super) mount: Duration,
    /// `None` where PostgreSQL came without pg_verifybackup
    pub(super) verify: Option<Duration>,
    pub(super) start: Duration,
    pub(super) start_again: Duration,
    pub(super) stop: Duration,
    pub(super) restore: Duration,
    pub(super) restored_start: Duration,
}

impl Costs {
    /// Takes the sizes from `pgcairn info --output json`.
    pub(super) fn sizes(&mut self, info: &str) -> Result<()> {
        let all: Value = serde_json::from_str(info)?;
        let of = &all[0]["backup"][0]["info"];
        let sizes = of["size"].as_u64().zip(of["repository"]["size"].as_u64());
        (self.database, self.stored) = sizes.ok_or_else(|| Error::new("pgcairn info tells no sizes of the backup"))?;
        Ok(())
    }

    /// Prints the table.
    pub(super) fn print(&self) {
        let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
        let rate =
            |time: Duration| format!("{}/s", bytes((self.database as f64 / time.as_secs_f64().max(0.001)) as u64));
        let share = format!("{:.0} % of the database", 100.0 * self.stored as f64 / self.database.max(1) as f64);
        row("database", &bytes(self.database), "");
        row("stored by the backup", &bytes(self.stored), &share);
        row("backup", &seconds(self.backup), &rate(self.backup));
        row("mount", &seconds(self.mount), "whatever the size");
        if let Some(verify) = self.verify {
            row("pg_verifybackup on the mount", &seconds(verify), &rate(verify));
        }
        row("start: from nothing to a first answer", &seconds(self.start), "whatever the size");
        row("start of a second clone", &seconds(self.start_again), "");
        row("stop", &seconds(self.stop), "");
        row("restore", &seconds(self.restore), &rate(self.restore));
        row("start of the restored copy", &seconds(self.restored_start), "");
    }
}

fn row(what: &str, value: &str, remark: &str) {
    output::line(format!("   {what:<38} {value:>12}   {remark}").trim_end());
}
