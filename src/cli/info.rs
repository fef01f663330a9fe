use clap::Args;
use serde_json::{Value, json};

use super::options::{Cache, Common, Output};
use super::output::{self, bytes, time};
use crate::error::Result;
use crate::format::info::{ArchiveInfo, BackupInfo, BackupSummary, LockKind};
use crate::format::manifest::Database;
use crate::postgres::{Lsn, SegmentName, Timeline, TimelineHistory};
use crate::recovery::window::{Horizon, Range};
use crate::repo::Repository;
use crate::repo::catalog::stanzas;
use crate::repo::lock::Other;

/// Show what backups there are, what they weigh, which WAL is archived, and which moments can be reached
///
/// The structure of --output json is pgBackRest's where the meaning is the same.
#[derive(Debug, Args)]
pub(super) struct Info {
    /// Only this backup
    #[arg(long, value_name = "LABEL")]
    set: Option<String>,
    /// Output for people or programs
    #[arg(long, env = "PGCAIRN_OUTPUT", default_value = "text")]
    output: Output,
    #[command(flatten)]
    cache: Cache,
}

/// Everything known of one stanza.
struct Stanza {
    name: String,
    is_encrypted: bool,
    /// it is encrypted, and no passphrase is given: nothing else is known
    is_locked: bool,
    archive: ArchiveInfo,
    backups: BackupInfo,
    /// oldest and newest segment, for each cluster of the stanza
    wal: Vec<Option<(String, String)>>,
    /// who works on it
    locks: Vec<Other>,
    /// what can be reached, by timeline of the current cluster
    reach: Vec<Reach>,
}

/// What can be reached along one timeline, and what is missing in its WAL.
struct Reach {
    timeline: Timeline,
    history: TimelineHistory,
    ranges: Vec<Range>,
    gaps: Vec<(SegmentName, SegmentName)>,
}

impl Info {
    pub(super) fn run(self, common: &Common) -> Result<()> {
        let store = common.store(false)?;
        let passphrase = common.cipher.passphrase()?;
        let mut found = Vec::new();
        match &common.stanza {
            Some(name) => found.push(self.stanza(&Repository::open(store.clone(), name, passphrase.as_ref())?)?),
            None => {
                for name in stanzas(&store)? {
                    let open = Repository::new(store.clone(), &name)?;
                    found.push(match (open.has_secret()?, &passphrase) {
                        (true, None) => Stanza::locked(name),
                        (true, Some(passphrase)) => {
                            self.stanza(&Repository::open(open.store, &name, Some(passphrase))?)?
                        }
                        (false, _) => self.stanza(&open)?,
                    });
                }
            }
        }
        match self.output {
            Output::Json => {
                let all: Vec<Value> = found.iter().map(to_json).collect();
                output::line(&serde_json::to_string(&all)?);
            }
            Output::Text if found.is_empty() => output::line(&format!("no stanza in {}", store.url())),
            Output::Text => found.iter().for_each(to_text),
        }
        Ok(())
    }

    fn stanza(&self, repository: &Repository) -> Result<Stanza> {
        let archive = repository.archive_info()?;
        let mut backups = repository.backup_info()?;
        if let Some(label) = &self.set {
            repository.resolve(label)?;
            backups.backups.retain(|known, _| known == label);
        }
        // without a cache it only takes longer
        let cache = self.cache.directory().unwrap_or_else(|error| {
            tracing::warn!(%error, "the cache cannot be used");
            None
        });
        let horizon = Horizon::load(repository, None, cache.as_deref())?;
        let range = |database: &Database| match database.id == horizon.times().database().id {
            // all of it is known
            true => Ok(horizon.coverage().range().map(|(first, last)| (first.to_string(), last.to_string()))),
            false => repository.archive(database).range(),
        };
        let wal = archive.history.iter().map(range).collect::<Result<_>>()?;
        let mut locks = repository.locks()?;
        locks.retain(|lock| !lock.dead);
        let reach = reach(&horizon)?;
        let (name, is_encrypted) = (repository.stanza.clone(), repository.keys.is_secret());
        Ok(Stanza { name, is_encrypted, is_locked: false, archive, backups, wal, locks, reach })
    }
}

fn reach(horizon: &Horizon) -> Result<Vec<Reach>> {
    let reach = |timeline| {
        let history = horizon.coverage().history(timeline);
        let (ranges, gaps) = (horizon.ranges(&history)?, horizon.coverage().gaps(timeline));
        Ok(Reach { timeline, history, ranges, gaps })
    };
    horizon.timelines().into_iter().map(reach).collect()
}

impl Stanza {
    fn locked(name: String) -> Self {
        let (archive, backups) = (ArchiveInfo::default(), BackupInfo::default());
        let (wal, locks, reach) = (Vec::new(), Vec::new(), Vec::new());
        Self { name, is_encrypted: true, is_locked: true, archive, backups, wal, locks, reach }
    }

    fn backup_runs(&self) -> bool {
        self.locks.iter().any(|lock| lock.kind() == Some(LockKind::Backup))
    }
}

fn to_text(stanza: &Stanza) {
    output::line(&format!("stanza: {}{}", stanza.name, if stanza.is_encrypted { " (encrypted)" } else { "" }));
    if stanza.is_locked {
        return output::line("    nothing can be read without its passphrase");
    }
    for (database, wal) in stanza.archive.history.iter().zip(&stanza.wal) {
        output::line(&format!("    PostgreSQL {}, system identifier {}", database.version, database.system_id));
        output::line(&match wal {
            Some((first, last)) => format!("    WAL archive: {first} to {last}"),
            None => "    WAL archive: empty".to_owned(),
        });
    }
    for lock in &stanza.locks {
        output::line(&format!("    {}", lock.describe()));
    }
    for reach in &stanza.reach {
        let from = reach.history.ancestors.last();
        let from = from.map(|left| format!(", from {} at {}", left.timeline, left.end)).unwrap_or_default();
        for range in &reach.ranges {
            output::line(&format!("    timeline {}{from}: can be reached {range}", reach.timeline));
        }
        for (first, last) in &reach.gaps {
            let to = if first == last { String::new() } else { format!(" to {last}") };
            output::line(&format!("    timeline {}{from}: WAL {first}{to} is missing", reach.timeline));
        }
    }
    if stanza.backups.backups.is_empty() {
        output::line("    no backup yet");
    }
    for (label, of) in &stanza.backups.backups {
        let sizes = of.sizes;
        output::line(&format!("\n    {} backup: {label}", of.kind));
        output::line(&format!("        taken: {} to {}", time(of.start_time), time(of.stop_time)));
        output::line(&format!("        WAL: {} to {}", of.wal_start, of.wal_stop));
        output::line(&format!(
            "        database: {} in {} files; newly stored: {}; stored in all: {}",
            bytes(sizes.database),
            sizes.files,
            bytes(sizes.stored_new),
            bytes(sizes.stored_all)
        ));
        if of.page_errors {
            output::line("        some pages failed their checksum; see the manifest's page-errors");
        }
    }
}

fn to_json(stanza: &Stanza) -> Value {
    let current = stanza.archive.history.last().map_or(0, |database| database.id);
    let archive: Vec<Value> = stanza
        .archive
        .history
        .iter()
        .zip(&stanza.wal)
        .map(|(database, wal)| {
            let (min, max) = wal.clone().unzip();
            json!({
                "database": {"id": database.id, "repo-key": 1},
                "id": format!("{}-{}", database.version, database.id),
                "min": min,
                "max": max,
                "timeline": if database.id == current { stanza.reach.iter().map(reach_json).collect() } else { vec![] },
            })
        })
        .collect();
    let db: Vec<Value> = stanza
        .archive
        .history
        .iter()
        .map(|database| {
            json!({
                "id": database.id, "repo-key": 1, "system-id": database.system_id,
                "version": database.version.to_string(),
            })
        })
        .collect();
    let backup: Vec<Value> = stanza.backups.backups.iter().map(|(label, of)| backup_json(stanza, label, of)).collect();
    let (code, message) = match (stanza.is_locked, backup.is_empty()) {
        (true, _) => (99, "encrypted, and no passphrase is given"),
        (false, true) => (2, "no valid backups"),
        (false, false) => (0, "ok"),
    };
    let cipher = if stanza.is_encrypted { "xchacha20-poly1305" } else { "none" };
    json!({
        "archive": archive,
        "backup": backup,
        "cipher": cipher,
        "db": db,
        "name": stanza.name,
        "repo": [{"cipher": cipher, "key": 1, "status": {"code": code, "message": message}}],
        "status": {"code": code, "lock": {"backup": {"held": stanza.backup_runs()}}, "message": message},
    })
}

/// Times are seconds since 1970, with the parts that PostgreSQL knows.
fn reach_json(reach: &Reach) -> Value {
    let range = |range: &Range| {
        json!({
            "backup": range.from.label,
            "from": {"lsn": range.from.stop.to_string(), "time": range.from.stop_s},
            "to": {"lsn": range.to_lsn.to_string(), "time": range.to.map(|to| to.unix_us() as f64 / 1e6)},
        })
    };
    let gap = |(first, last): &(SegmentName, SegmentName)| json!({"min": first.to_string(), "max": last.to_string()});
    let parent = reach.history.ancestors.last();
    json!({
        "id": reach.timeline.0,
        "parent": parent.map(|left| json!({"id": left.timeline.0, "lsn": left.end.to_string()})),
        "range": reach.ranges.iter().map(range).collect::<Vec<_>>(),
        "gap": reach.gaps.iter().map(gap).collect::<Vec<_>>(),
    })
}

fn backup_json(stanza: &Stanza, label: &str, of: &BackupSummary) -> Value {
    let version =
        stanza.archive.history.iter().find(|database| database.id == of.database_id).map(|found| found.version);
    let lsn = |text: &str| text.parse::<Lsn>().map_or_else(|_| text.to_owned(), |lsn| lsn.to_string());
    json!({
        "annotation": null,
        "archive": {"start": of.wal_start, "stop": of.wal_stop},
        "backrest": {"format": 0, "version": format!("pgcairn {}", of.pgcairn)},
        "database": {"id": of.database_id, "repo-key": 1, "version": version.map(|number| number.to_string())},
        "error": of.page_errors,
        "info": {
            "delta": of.sizes.read,
            "repository": {"delta": of.sizes.stored_new, "size": of.sizes.stored_all},
            "size": of.sizes.database,
        },
        "label": label,
        "lsn": {"start": lsn(&of.start_lsn), "stop": lsn(&of.stop_lsn)},
        "prior": of.prior,
        "reference": null,
        "timestamp": {"start": of.start_time, "stop": of.stop_time},
        "type": of.kind,
    })
}
