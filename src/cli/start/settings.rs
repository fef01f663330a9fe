//! From a clone to the command line of its server.

use std::fs;

use super::super::clones::{Clone, Place};
use super::super::output;
use super::Start;
use super::amend::Amended;
use super::limits::Limits;
use crate::clone::settings::{ServerOf, Settings};
use crate::error::Result;
use crate::format::manifest::Description;

impl Start {
    /// The server's options for pg_ctl. Says which of the user's give up something that keeps the clone to itself.
    pub(super) fn server_options(
        &self,
        (place, clone, of): (&Place, &Clone, &Description),
        limits: &Limits,
        amended: &Amended,
    ) -> Result<String> {
        let mut settings = Settings::of(&ServerOf {
            name: &clone.name,
            data: &place.mount(),
            config_file: &amended.config_file(place),
            libraries: amended.libraries(),
            run: &place.run(),
            pid_file: &place.pid_file(),
            port: clone.port,
            version: of.database.version,
            recovers: clone.recovery.is_some(),
            read_only: clone.read_only,
            limits: &limits.settings(),
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

/// Bytes of memory that could be had without swapping; none where the kernel does not say.
fn memory_available() -> u64 {
    let told = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = told.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_default() * 1024
}
