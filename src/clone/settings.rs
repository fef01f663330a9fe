//! The settings of a clone's server, on its command line, where they beat every file and ALTER SYSTEM.

use std::path::Path;

use crate::error::{Error, Result};
use crate::postgres::{conf, conninfo};

/// The least and the most `shared_buffers` of a clone.
const SHARED_BUFFERS_MB: (u64, u64) = (128, 1024);
/// What else `--option` must not set: where recovery gets its WAL and ends is said by the clone's target.
const OF_RECOVERY: [&str; 2] = ["restore_command", "recovery_"];

/// What only a server that is open during recovery needs.
const MAX_WORKER_PROCESSES: &str = "max_worker_processes";

/// A clone, as far as its server's settings depend on it.
#[derive(Debug)]
pub struct ServerOf<'a> {
    /// the clone's name
    pub name: &'a str,
    /// the data directory
    pub data: &'a Path,
    /// its main configuration file
    pub config_file: &'a Path,
    /// the libraries to load, if not all that the configuration names
    pub libraries: Option<&'a str>,
    /// directory of the socket and of the access rules
    pub run: &'a Path,
    /// where the server notes its process id
    pub pid_file: &'a Path,
    /// the port, which names the socket
    pub port: u16,
    /// its major version
    pub version: u32,
    /// it replays WAL beyond the backup's
    pub recovers: bool,
    /// the server waits at its target, open for reading
    pub read_only: bool,
    /// settings of which replay needs at least what its source had, as pg_control has them
    pub limits: &'a [(&'static str, i32)],
    /// bytes of memory that could be had without swapping; 0 if that is unknown
    pub memory_available: u64,
}

/// Who may set a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rank {
    /// this program alone
    Fixed,
    /// the user, who is told what that gives up
    Wall,
    /// the user
    Preference,
}

use Rank::{Fixed, Preference, Wall};

/// The settings of one server.
#[derive(Debug, Default)]
pub struct Settings {
    settings: Vec<(Rank, String, String)>,
}

impl Settings {
    /// What the server of this clone needs so that it reaches nothing but itself.
    pub fn of(clone: &ServerOf<'_>) -> Self {
        let mut settings = Self::default();
        settings.places(clone);
        settings.walls(clone);
        settings.preferences(clone);
        settings
    }

    /// Files and directories: those of the source's configuration are the source's.
    fn places(&mut self, clone: &ServerOf<'_>) {
        let path = |path: &Path| path.display().to_string();
        self.add(Fixed, "data_directory", path(clone.data));
        self.add(Fixed, "config_file", path(clone.config_file));
        self.add(Fixed, "hba_file", path(&clone.run.join("pg_hba.conf")));
        self.add(Fixed, "ident_file", path(&clone.run.join("pg_ident.conf")));
        self.add(Fixed, "external_pid_file", path(clone.pid_file));
        let run = clone.run.display().to_string();
        self.add(Fixed, "unix_socket_directories", conninfo::list_element(&run));
        self.add(Fixed, "port", clone.port.to_string());
        // the source's group may not be known here; the socket's directory lets in its user and
        // root alone
        self.add(Preference, "unix_socket_group", "");
        self.add(Preference, "unix_socket_permissions", "0700");
        self.add(Wall, "log_directory", "log");
        if clone.version < 15 {
            self.add(Wall, "stats_temp_directory", "pg_stat_tmp");
        }
    }

    /// Connections that the server would make by itself, and programs that it would run.
    fn walls(&mut self, clone: &ServerOf<'_>) {
        self.add(Fixed, "archive_mode", "off");
        self.add(Fixed, "archive_command", "");
        if clone.version >= 15 {
            self.add(Fixed, "archive_library", "");
        }
        for name in ["primary_conninfo", "primary_slot_name", "archive_cleanup_command", "recovery_end_command"] {
            self.add(Fixed, name, "");
        }
        if clone.version < 16 {
            // a file of the source's would end recovery
            self.add(Fixed, "promote_trigger_file", "");
        }
        // its subscriptions are its source's: their workers would take over the slots at the publisher
        self.add(Wall, "max_logical_replication_workers", "0");
        if clone.version >= 17 {
            self.add(Wall, "sync_replication_slots", "off");
        }
        for (name, value) in clone.limits {
            match (*name, clone.read_only) {
                // no library can start a worker: jobs of pg_cron, apply workers of pglogical
                (MAX_WORKER_PROCESSES, false) => self.add(Wall, name, "0"),
                // an open standby must have room for all that its source had
                (MAX_WORKER_PROCESSES, true) => self.add(Wall, name, value.to_string()),
                // prepared transactions and their locks need their room in any replay
                _ => self.add(Preference, name, value.to_string()),
            }
        }
        for (name, value) in conf::NO_JOBS {
            self.add(Wall, name, value);
        }
        // it would fetch all that its source had in memory
        self.add(Wall, "pg_prewarm.autoprewarm", "off");
        self.add(Wall, "synchronous_standby_names", "");
        self.add(Wall, "listen_addresses", "");
        self.add(Wall, "ssl", "off");
        // a command of the source's, should ssl be on after all
        self.add(Wall, "ssl_passphrase_command", "");
        self.add(Wall, "bonjour", "off");
        self.add(Wall, "logging_collector", "off");
        self.add(Wall, "log_destination", "stderr");
    }

    /// What makes a server on a mount quick.
    fn preferences(&mut self, clone: &ServerOf<'_>) {
        // what the server says of its recovery is read in its log and in the title of its process
        self.add(Fixed, "lc_messages", "C");
        self.add(Preference, "update_process_title", "on");
        self.add(Preference, "log_error_verbosity", "default");
        self.add(Preference, "log_min_messages", "warning");
        self.add(Preference, "cluster_name", format!("pgcairn-{}", clone.name));
        self.add(Preference, "wal_recycle", "off");
        self.add(Preference, "wal_init_zero", "off");
        self.add(Preference, "recovery_min_apply_delay", "0");
        // a server that goes on at its target is not open before it
        self.add(Preference, "hot_standby", if clone.read_only { "on" } else { "off" });
        self.add(Preference, "autovacuum", "off");
        self.add(Preference, "shared_buffers", format!("{}MB", shared_buffers_mb(clone)));
        self.add(Preference, "huge_pages", "off");
        self.add(Preference, "wal_buffers", "-1");
        self.add(Preference, "dynamic_shared_memory_type", "posix");
        if clone.version >= 14 {
            self.add(Preference, "min_dynamic_shared_memory", "0");
        }
        if clone.version < 17 {
            // logins are without the database's name
            self.add(Preference, "db_user_namespace", "off");
        }
        if let Some(libraries) = clone.libraries {
            self.add(Preference, "shared_preload_libraries", libraries);
        }
        if clone.version >= 14 {
            self.add(Preference, "recovery_init_sync_method", "syncfs");
        }
        if clone.version >= 15 {
            // it asks for pages that replay then overwrites with the images in the WAL, and each would be fetched
            self.add(Preference, "recovery_prefetch", "off");
        }
        if clone.version >= 17 {
            self.add(Preference, "summarize_wal", "off");
        }
        if clone.version >= 18 {
            self.add(Preference, "io_method", "worker");
        }
    }

    /// Adds a setting of the user's; returns the name of the wall that it breaches, if it does.
    ///
    /// # Errors
    /// When it is no setting, or one that only this program may make.
    pub fn option(&mut self, option: &str) -> Result<Option<String>> {
        let (name, value) = option.split_once('=').ok_or_else(|| {
            Error::new(format!("--option {option} is no setting")).hint("it reads like --option work_mem=64MB")
        })?;
        // the server takes a name in any case
        let name = name.trim().to_ascii_lowercase();
        if !conf::is_name(&name) || value.contains('\0') {
            return Err(Error::new(format!("--option \"{}\" does not name a setting", option.escape_default())).hint(
                "a name is of letters, digits and \"_\", with a dot in those of extensions: --option work_mem=64MB",
            ));
        }
        if OF_RECOVERY.iter().any(|prefix| name.starts_with(prefix)) && !self.sets(&name, Preference) {
            return Err(Error::new(format!(
                "--option {name} cannot be set: a clone recovers to the point it is given"
            ))
            .hint("see the point options: --type, --target"));
        }
        if self.sets(&name, Fixed) {
            return Err(Error::new(format!("--option {name} cannot be set: it keeps the clone apart from its source"))
                .hint("leave it out; the port is --port"));
        }
        let breached = self.sets(&name, Wall).then(|| name.clone());
        self.add(Preference, &name, value);
        Ok(breached)
    }

    fn sets(&self, name: &str, rank: Rank) -> bool {
        self.settings.iter().any(|(of, set, _)| set == name && *of == rank)
    }

    fn add(&mut self, rank: Rank, name: &str, value: impl Into<String>) {
        self.settings.push((rank, name.to_owned(), value.into()));
    }

    /// As options of the server, for pg_ctl, which hands them to a shell.
    pub fn shell_words(&self) -> String {
        let word = |(_, name, value): &(Rank, String, String)| format!("-c {name}={}", shell_quote(value));
        self.settings.iter().map(word).collect::<Vec<_>>().join(" ")
    }
}

fn shell_quote(value: &str) -> String {
    format!("'{}'", value.replace('\'', r"'\''"))
}

/// Replay reads and writes the same pages again and again: what stays in the server's own memory costs nothing. Up to an eighth
/// of what the machine has to give.
fn shared_buffers_mb(clone: &ServerOf<'_>) -> u64 {
    match clone.recovers {
        true => (clone.memory_available / 8 / 1024 / 1024).clamp(SHARED_BUFFERS_MB.0, SHARED_BUFFERS_MB.1),
        false => SHARED_BUFFERS_MB.0,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn settings(version: u32) -> Settings {
        Settings::of(&ServerOf {
            name: "c",
            data: Path::new("/clones/c/data"),
            config_file: Path::new("/clones/c/data/postgresql.conf"),
            libraries: None,
            run: Path::new("/clones/c/run"),
            pid_file: Path::new("/clones/c/run/postmaster.pid"),
            port: 5433,
            version,
            recovers: false,
            read_only: false,
            limits: &[("max_worker_processes", 8), ("max_connections", 100)],
            memory_available: 0,
        })
    }

    #[test]
    fn each_version_gets_the_settings_it_knows() {
        for (name, first, last) in [
            ("stats_temp_directory", 13, 14),
            ("promote_trigger_file", 13, 15),
            ("db_user_namespace", 13, 16),
            ("min_dynamic_shared_memory", 14, 18),
            ("archive_library", 15, 18),
            ("sync_replication_slots", 17, 18),
            ("max_logical_replication_workers", 13, 18),
            ("max_worker_processes", 13, 18),
        ] {
            let has = |version: &u32| settings(*version).shell_words().contains(&format!("-c {name}="));
            let expected: Vec<u32> = (first..=last).collect();
            assert_eq!((13..=18).filter(has).collect::<Vec<_>>(), expected, "{name}");
        }
    }

    #[test]
    fn no_option_gets_past_a_fixed_setting() {
        for option in [
            "archive_mode=on",
            "ARCHIVE_MODE = on",
            " archive_mode=always",
            "data_directory=/var/lib/postgresql/15/main",
            "primary_conninfo=host=db1",
            "restore_command=cp /x %p",
            "recovery_target_time=2026-01-01",
            "recovery_end_command=reboot",
            "archive-mode=on",
            "work_mem",
            "=1",
            "work_mem; reboot=1",
            "work_mem 'x'=1",
            "$(reboot)=1",
            "a\nb=1",
        ] {
            assert!(settings(15).option(option).is_err(), "{option}");
        }
    }

    #[test]
    fn an_option_that_breaches_a_wall_is_named() {
        let mut of = settings(15);
        assert_eq!(of.option("Max_Worker_Processes=8").unwrap().as_deref(), Some("max_worker_processes"));
        assert_eq!(of.option("work_mem=64MB").unwrap(), None);
        assert_eq!(of.option("recovery_prefetch=on").unwrap(), None);
        assert_eq!(of.option("pg_hint_plan.enable_hint=it's").unwrap(), None);
        assert!(of.shell_words().ends_with(r"-c pg_hint_plan.enable_hint='it'\''s'"));
    }
}
