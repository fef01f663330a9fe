//! The settings of a clone's server, on its command line, where they beat every file and ALTER SYSTEM.

use std::fs;

use super::super::clones::{Clone, Place};
use super::Start;
use crate::error::{Error, Result};
use crate::format::manifest::Description;
use crate::postgres::{CONTROL_FILE, ControlFile};

/// The least and the most `shared_buffers` of a clone.
const SHARED_BUFFERS_MB: (u64, u64) = (128, 1024);

impl Start {
    /// Settings on the server's command line, which beat every file and ALTER SYSTEM.
    pub(super) fn server_options(&self, place: &Place, clone: &Clone, of: &Description) -> Result<String> {
        let run = place.run().display().to_string();
        let version = of.database.version;
        let mut settings: Vec<(String, String)> = [
            ("port", clone.port.to_string()),
            ("listen_addresses", String::new()),
            ("unix_socket_directories", run.clone()),
            ("hba_file", format!("{run}/pg_hba.conf")),
            ("ident_file", format!("{run}/pg_ident.conf")),
            ("external_pid_file", place.pid_file().display().to_string()),
            ("cluster_name", format!("pgcairn-{}", clone.name)),
            ("archive_mode", "off".into()),
            ("wal_recycle", "off".into()),
            ("wal_init_zero", "off".into()),
            ("primary_conninfo", String::new()),
            ("primary_slot_name", String::new()),
            ("archive_cleanup_command", String::new()),
            ("recovery_end_command", String::new()),
            ("recovery_min_apply_delay", "0".into()),
            // a server that goes on at its target is not open before it
            ("hot_standby", if clone.read_only { "on" } else { "off" }.into()),
            ("synchronous_standby_names", String::new()),
            ("logging_collector", "off".into()),
            ("log_destination", "stderr".into()),
            ("autovacuum", "off".into()),
            ("shared_buffers", format!("{}MB", shared_buffers_mb(clone, memory_available()))),
            ("huge_pages", "off".into()),
            ("ssl", "off".into()),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
        if clone.read_only {
            settings.extend(source_limits(place)?);
        }
        if version >= 14 {
            settings.push(("recovery_init_sync_method".into(), "syncfs".into()));
        }
        if version >= 15 {
            // it asks for pages that replay then overwrites with the images in the WAL, and each would be fetched
            settings.push(("recovery_prefetch".into(), "off".into()));
        }
        if version >= 18 {
            settings.push(("io_method".into(), "worker".into()));
        }
        for option in &self.options {
            let (name, value) = option.split_once('=').ok_or_else(|| {
                Error::new(format!("--option {option} is no setting")).hint("it reads like --option work_mem=64MB")
            })?;
            settings.push((name.trim().to_owned(), value.to_owned()));
        }
        Ok(settings
            .iter()
            .map(|(name, value)| format!("-c {name}={}", shell_quote(value)))
            .collect::<Vec<_>>()
            .join(" "))
    }
}

/// pg_ctl hands its options to a shell.
fn shell_quote(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

/// Replay reads and writes the same pages again and again: what stays in the server's own memory costs nothing. Up to an eighth of
/// what the machine has to give.
fn shared_buffers_mb(clone: &Clone, available: u64) -> u64 {
    match clone.recovery {
        Some(_) => (available / 8 / 1024 / 1024).clamp(SHARED_BUFFERS_MB.0, SHARED_BUFFERS_MB.1),
        None => SHARED_BUFFERS_MB.0,
    }
}

/// Bytes of memory that could be had without swapping; none where the kernel does not say.
fn memory_available() -> u64 {
    let told = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = told.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_default() * 1024
}

/// A server that is open during recovery must have room for all that its source had.
fn source_limits(place: &Place) -> Result<Vec<(String, String)>> {
    let path = place.mount().join(CONTROL_FILE);
    let bytes = fs::read(&path).map_err(|error| Error::io("read", &path, error))?;
    let control =
        ControlFile::parse(&bytes).map_err(|error| Error::new("the backup's pg_control is damaged").source(error))?;
    let limits = [
        ("max_connections", control.max_connections),
        ("max_worker_processes", control.max_worker_processes),
        ("max_wal_senders", control.max_wal_senders),
        ("max_prepared_transactions", control.max_prepared_transactions),
        ("max_locks_per_transaction", control.max_locks_per_transaction),
    ];
    Ok(limits.into_iter().map(|(name, value)| (name.to_owned(), value.to_string())).collect())
}
