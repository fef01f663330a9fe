//! Proofs that are asked for before something is removed: a backup that its WAL does not prove, or whose packs are missing or
//! damaged, stands for no other.

use std::collections::BTreeMap;

use super::policy::{Decision, Known, Retention, decide};
use crate::error::{Error, Result};
use crate::postgres::{BackupKind, Label};
use crate::repo::Repository;
use crate::repo::damage::PacksKnown;
use crate::repo::proof::Doubt;

/// Backups that are found wanting before a run gives up: it removes no backup then, and asks no further.
const DOUBTS_MAX: usize = 8;

/// What was asked in one run. Each proof costs a few requests, and is asked for once.
pub(super) struct Proofs<'a> {
    repository: &'a Repository,
    asked: BTreeMap<Label, Option<Doubt>>,
    /// one listing of all packs, for whatever is asked
    packs: Option<PacksKnown>,
}

impl<'a> Proofs<'a> {
    pub(super) fn new(repository: &'a Repository) -> Self {
        Self { repository, asked: BTreeMap::new(), packs: None }
    }

    /// Whether nothing speaks against a backup.
    pub(super) fn is_proved(&mut self, label: Label) -> Result<bool> {
        if let Some(doubt) = self.asked.get(&label) {
            return Ok(doubt.is_none());
        }
        let doubt = self.doubt(&label.to_string())?;
        if let Some(Doubt { what, .. }) = &doubt {
            tracing::warn!("backup {label} does not count for the retention: {what}");
        }
        Ok(self.asked.entry(label).or_insert(doubt).is_none())
    }

    /// What speaks against a backup: its WAL, or else its packs.
    fn doubt(&mut self, label: &str) -> Result<Option<Doubt>> {
        if let Some(doubt) = self.repository.doubt(label)? {
            return Ok(Some(doubt));
        }
        let packs = match self.packs.take() {
            Some(packs) => packs,
            None => self.repository.packs_known()?,
        };
        self.repository.packs_doubt(label, self.packs.insert(packs))
    }

    /// The backups that are found wanting, and why.
    pub(super) fn doubts(&self) -> impl Iterator<Item = (Label, &Doubt)> {
        self.asked.iter().filter_map(|(label, doubt)| Some((*label, doubt.as_ref()?)))
    }

    /// What a retention makes of the backups that count. Those are asked on which it rests that others go, and asked anew when
    /// one of them does not count.
    pub(super) fn decide(
        &mut self,
        mut known: Vec<Known>,
        retention: &Retention,
        clusters: &[u32],
        now: i64,
    ) -> Result<Decision> {
        loop {
            let decision = decide(&known, retention, clusters, now);
            let mut all_proved = true;
            for label in &decision.rests {
                all_proved &= self.is_proved(*label)?;
            }
            if all_proved {
                return Ok(decision);
            }
            let gives_up = self.doubts().count() >= DOUBTS_MAX;
            for backup in &mut known {
                backup.counts = !gives_up && self.asked.get(&backup.label).is_none_or(Option::is_none);
            }
        }
    }

    /// Fails if a person would remove the last full backup that is proved.
    pub(super) fn refuse_last(&mut self, known: &[Known], named: Label) -> Result<()> {
        let mut others: Vec<Label> = known.iter().map(|backup| backup.label).collect();
        others.retain(|label| label.kind() == BackupKind::Full && *label != named);
        others.sort_unstable();
        for label in others.iter().rev().take(DOUBTS_MAX) {
            if self.is_proved(*label)? {
                return Ok(());
            }
        }
        match named.kind() == BackupKind::Full && !others.is_empty() && self.is_proved(named)? {
            true => Err(Error::new(format!("backup {named} is not removed: no other full backup is proved"))
                .hint("look with \"pgcairn verify\", and take a new full backup first")),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
