//! From a clone to the command line of its server.

use std::fs;

use super::super::clones::{Clone, Place};
use super::super::output;
use super::Start;
use crate::clone::settings::{ServerOf, Settings};
use crate::error::{Error, Result};
use crate::format::manifest::Description;
use crate::postgres::{CONTROL_FILE, ControlFile};

impl Start {
    /// The server's options for pg_ctl. Says which of the user's give up something that keeps the clone to itself.
    pub(super) fn server_options(&self, place: &Place, clone: &Clone, of: &Description) -> Result<String> {
        let control = clone.read_only.then(|| control_file(place)).transpose()?;
        let mut settings = Settings::of(&ServerOf {
            name: &clone.name,
            data: &place.mount(),
            run: &place.run(),
            pid_file: &place.pid_file(),
            port: clone.port,
            version: of.database.version,
            recovers: clone.recovery.is_some(),
            read_only: control.as_ref(),
            memory_available: memory_available(),
        });
        for option in &self.options {
            if let Some(breached) = settings.option(option)? {
                output::note(&format!(
                    "--option {breached} overrides a setting that keeps the clone apart from its source"
                ));
            }
        }
        Ok(settings.shell_words())
    }
}

fn control_file(place: &Place) -> Result<ControlFile> {
    let path = place.mount().join(CONTROL_FILE);
    let bytes = fs::read(&path).map_err(|error| Error::io("read", &path, error))?;
    ControlFile::parse(&bytes).map_err(|error| Error::new("the backup's pg_control is damaged").source(error))
}

/// Bytes of memory that could be had without swapping; none where the kernel does not say.
fn memory_available() -> u64 {
    let told = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = told.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_default() * 1024
}
