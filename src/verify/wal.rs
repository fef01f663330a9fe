//! The archive of one cluster: whether backups have the WAL they need, and from where to where recovery can go.

use std::collections::{BTreeMap, BTreeSet};

use parking_lot::Mutex;

use super::{Checked, Findings, Gap, VerifyOptions, each, finding};
use crate::error::{Context, Result};
use crate::format::FormatError;
use crate::format::chunk::Decoder;
use crate::format::manifest::{Database, Description};
use crate::format::pack::{Pack, PackKind};
use crate::postgres::wal::landmarks::Landmarks;
use crate::postgres::{SegmentName, SegmentSize, Timeline, TimelineHistory, WalName};
use crate::progress::Monitor;
use crate::repo::proof::{Claims, Contradiction, wal_of};
use crate::repo::wal::{check_first_bytes, wal_identity};
use crate::repo::{Repository, reread};
use crate::store::Listed;

/// Missing segments of one backup that are named one by one.
const MISSING_MAX: usize = 20;

/// An archive as it was found.
struct Archive<'a> {
    repository: &'a Repository,
    database: &'a Database,
    size: SegmentSize,
    /// its files by name in `pg_wal`
    files: Vec<(WalName, Listed)>,
    /// those segments that can be used, and when they were archived
    usable: BTreeMap<SegmentName, i64>,
    /// keys of segments that are there and cannot
    bad: BTreeMap<SegmentName, String>,
    histories: BTreeMap<Timeline, TimelineHistory>,
    /// segments into which backups are compared with the WAL
    claimed: BTreeSet<SegmentName>,
    /// what those tell of whose WAL they are; nothing in a quick run
    landmarks: BTreeMap<SegmentName, Landmarks>,
}

/// Looks at the archive of `database`, of which `backups` are.
pub(super) fn check(
    repository: &Repository,
    database: &Database,
    backups: &[&Description],
    findings: &Findings,
    options: &VerifyOptions,
    monitor: &dyn Monitor,
    checked: &mut Checked,
) -> Result<Vec<Gap>> {
    let size = SegmentSize::new(database.wal_segment_size).context(|| "archive.info".into())?;
    let mut archive = Archive {
        repository,
        database,
        size,
        files: Vec::new(),
        usable: BTreeMap::new(),
        bad: BTreeMap::new(),
        histories: BTreeMap::new(),
        claimed: BTreeSet::new(),
        landmarks: BTreeMap::new(),
    };
    archive.list(findings)?;
    let backups: Vec<Needs> = backups.iter().map(|of| Needs::of(of)).collect::<Result<_>>()?;
    let claims = backups.iter().filter_map(|needs| needs.claims.as_ref().ok());
    archive.claimed = claims.flat_map(|claims| claims.segments(size)).collect();
    archive.read(findings, options, monitor, checked)?;
    backups.iter().for_each(|needs| archive.check_backup(needs, findings));
    let mut gaps = archive.holes(&backups);
    gaps.extend(archive.forks(&backups, findings));
    Ok(gaps)
}

/// What a backup needs of the archive.
struct Needs<'a> {
    of: &'a Description,
    start: SegmentName,
    stop: SegmentName,
    claims: Result<Claims>,
}

impl<'a> Needs<'a> {
    fn of(of: &'a Description) -> Result<Self> {
        let (start, stop) = wal_of(of)?;
        Ok(Self { of, start, stop, claims: Claims::of(of) })
    }
}

impl Archive<'_> {
    fn list(&mut self, findings: &Findings) -> Result<()> {
        let archive = self.repository.archive(self.database);
        let (files, usable, bad) = (&mut self.files, &mut self.usable, &mut self.bad);
        archive.files(|name, object| {
            let Ok(parsed) = WalName::parse(name) else { return };
            if let WalName::Segment(segment) = parsed
                && usable.insert(segment, object.modified).is_some()
            {
                findings.harm(&object.key, format!("the archive holds another content as {name} too"));
                bad.insert(segment, object.key.clone());
            }
            files.push((parsed, object.clone()));
        })?;
        bad.keys().for_each(|segment| _ = usable.remove(segment));
        Ok(())
    }

    /// Reads what there is: in a quick run only the histories, which are small.
    fn read(
        &mut self,
        findings: &Findings,
        options: &VerifyOptions,
        monitor: &dyn Monitor,
        checked: &mut Checked,
    ) -> Result<()> {
        let is_history = |name: &WalName| matches!(name, WalName::History(_));
        let wanted: Vec<&(WalName, Listed)> =
            self.files.iter().filter(|(name, _)| !options.quick || is_history(name)).collect();
        if !options.quick {
            monitor.stage("reading WAL", wanted.iter().map(|(_, object)| object.size).sum());
        }
        let (bad, histories) = (Mutex::new(BTreeMap::new()), Mutex::new(BTreeMap::new()));
        // one is in memory whole at a time
        let landmarks = Mutex::new(BTreeMap::new());
        each(&wanted, options.process_max, |(name, object)| {
            let segment = if let WalName::Segment(segment) = name { Some(segment) } else { None };
            let read = match segment.filter(|segment| self.claimed.contains(segment)) {
                Some(segment) => {
                    let mut landmarks = landmarks.lock();
                    self.read_file(*name, object).and_then(|content| {
                        let read = Landmarks::read(&wal_identity(self.database)?, *segment, &content);
                        landmarks.extend(read.ok().map(|read| (*segment, read)));
                        Ok(None)
                    })
                }
                None => self.read_file(*name, object).and_then(|content| history(*name, object, &content)),
            };
            match read {
                Ok(Some(history)) => _ = histories.lock().insert(history.timeline, history),
                Ok(None) => {}
                Err(error) => {
                    let (_, what) = finding(error, &object.key)?;
                    findings.harm(&object.key, what);
                    if let WalName::Segment(segment) = name {
                        bad.lock().insert(*segment, object.key.clone());
                    }
                }
            }
            monitor.advance(object.size);
            Ok(())
        })?;
        checked.wal_files += wanted.len() as u64;
        checked.wal_bytes += wanted.iter().map(|(_, object)| object.size).sum::<u64>();
        self.bad.extend(bad.into_inner());
        self.bad.keys().for_each(|segment| _ = self.usable.remove(segment));
        self.histories = histories.into_inner();
        self.landmarks = landmarks.into_inner();
        Ok(())
    }

    /// Proves one file: its chunks, its name, its length, and that it is this cluster's. Returns its content if that is looked into.
    fn read_file(&self, name: WalName, object: &Listed) -> Result<Vec<u8>> {
        reread::checked(&*self.repository.store, |reads| self.prove(name, &object.key, &reads.get(&object.key)?))
    }

    fn prove(&self, name: WalName, key: &str, bytes: &[u8]) -> Result<Vec<u8>> {
        let keys = &self.repository.keys;
        let pack = Pack::parse(key, bytes)?;
        pack.header.expect(key, PackKind::Wal, keys.seal_kind())?;
        let wrong = |what: String| FormatError::new(key, 0, what);
        keys.check_wal_content(key, Some(self.database.system_id), pack.header.id, &pack.chunks)?;
        let mut decoder = Decoder::new().context(|| "cannot set up zstd".into())?;
        let (mut len, mut content) = (0u64, Vec::new());
        let is_looked_into = match name {
            WalName::History(_) => true,
            WalName::Segment(segment) => self.claimed.contains(&segment),
            _ => false,
        };
        for chunk in &pack.chunks {
            let stored = &bytes[chunk.offset as usize..chunk.end() as usize];
            let plain = decoder.prove(keys, key, chunk, stored)?.plain;
            if let (0, WalName::Segment(_) | WalName::Partial(_)) = (len, name) {
                // that it is another cluster's is damage too, whatever its checksums say
                let first = check_first_bytes(self.database, &name.to_string(), &plain);
                first.map_err(|error| {
                    let cause = std::error::Error::source(&error).map(ToString::to_string);
                    wrong(cause.unwrap_or_else(|| error.to_string()))
                })?;
            }
            len += plain.len() as u64;
            if is_looked_into {
                content.extend_from_slice(&plain);
            }
        }
        match name {
            WalName::Segment(_) | WalName::Partial(_) if len != self.database.wal_segment_size => {
                Err(wrong(format!("{len} bytes of WAL, a segment has {}", self.database.wal_segment_size)).into())
            }
            _ => Ok(content),
        }
    }

    fn id(&self) -> String {
        format!("{}-{}", self.database.version, self.database.id)
    }

    /// The key of a segment, or what it would begin with.
    fn key(&self, segment: SegmentName) -> String {
        let (directory, stanza) = (segment.directory(), &self.repository.stanza);
        let expected = || format!("archive/{stanza}/{}/{directory}/{segment}", self.id());
        self.bad.get(&segment).cloned().unwrap_or_else(expected)
    }

    fn check_backup(&self, needs: &Needs<'_>, findings: &Findings) {
        if needs.of.wal_stored {
            return;
        }
        self.compare_backup(needs, findings);
        let needed = needs.start.up_to(needs.stop, self.size);
        for missing in needed.filter(|segment| !self.usable.contains_key(segment)).take(MISSING_MAX) {
            findings.suffers(&needs.of.label, &self.key(missing), "is missing", None);
        }
    }

    /// Names prove nothing: the archive must hold the checkpoint from which the backup starts, and its end.
    fn compare_backup(&self, needs: &Needs<'_>, findings: &Findings) {
        let label = &needs.of.label;
        let claims = match &needs.claims {
            Ok(claims) => claims,
            Err(error) => {
                let what = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
                let key = crate::repo::layout::manifest(&self.repository.stanza, label);
                return findings.suffers(label, &key, &format!("its backup_label cannot be read: {what}"), None);
            }
        };
        // nothing was read in a quick run; what is missing or damaged is told of for itself
        let read = |segment: &SegmentName| self.landmarks.contains_key(segment);
        let Ok(identity) = wal_identity(self.database) else { return };
        let Some(Contradiction { segment, what: Some(what) }) = claims.judge(&identity, &self.landmarks) else {
            return;
        };
        if claims.segments(self.size).iter().all(|segment| read(segment) || !self.usable.contains_key(segment)) {
            let key = self.files.iter().find(|(name, _)| *name == WalName::Segment(segment));
            let key = key.map_or_else(|| self.key(segment), |(_, object)| object.key.clone());
            findings.suffers(label, &key, &format!("is not the WAL of backup {label}: it {what}"), None);
        }
    }

    /// Segments that are missing between others of the same timeline.
    fn holes(&self, backups: &[Needs<'_>]) -> Vec<Gap> {
        let starts: BTreeSet<SegmentName> = backups.iter().map(|needs| needs.start).collect();
        let mut gaps = Vec::new();
        let segments: Vec<SegmentName> = self.usable.keys().copied().collect();
        for pair in segments.windows(2) {
            let (before, behind) = (pair[0], pair[1]);
            let Some(first) = before.next(self.size).filter(|next| *next < behind) else { continue };
            if first.timeline() != behind.timeline() {
                continue;
            }
            let damaged = self.bad.range(first..behind).next().is_some();
            // WAL that expired ends where a kept backup begins
            if damaged || !starts.contains(&behind) {
                gaps.extend(self.gap(first, Some(behind), Some(before), backups));
            }
        }
        // damaged ones at the end of a timeline
        let same = |a: &SegmentName, b: &SegmentName| a.timeline() == b.timeline();
        for first in self.bad.keys() {
            let goes_on = self.usable.range(first..).next().is_some_and(|(behind, _)| same(behind, first));
            if !goes_on {
                let before = self.usable.range(..first).next_back().map(|(before, _)| *before);
                gaps.extend(self.gap(*first, None, before.filter(|before| same(before, first)), backups));
            }
        }
        gaps
    }

    /// Whether recovery can come from each timeline to those that branched off it.
    fn forks(&self, backups: &[Needs<'_>], findings: &Findings) -> Vec<Gap> {
        let mut gaps = Vec::new();
        let timelines: BTreeSet<Timeline> = self.usable.keys().map(|segment| segment.timeline()).collect();
        for timeline in timelines.iter().copied().filter(|timeline| timeline.0 > 1) {
            let earlier = backups.iter().any(|needs| needs.start.timeline() < timeline);
            let Some(history) = self.histories.get(&timeline) else {
                if earlier {
                    let key = format!("archive/{}/{}/{:08X}.history", self.repository.stanza, self.id(), timeline.0);
                    findings.harm(&key, "is missing: recovery cannot follow this timeline from backups before it");
                }
                continue;
            };
            let Some(parent) = history.ancestors.last() else { continue };
            let fork = self.size.segment_of(parent.end);
            let of = |timeline, number| SegmentName::of_number(timeline, number, self.size);
            let on = |timeline| {
                let all = self.usable.range(of(timeline, 0)..).map(|(segment, _)| *segment);
                all.take_while(move |segment| segment.timeline() == timeline)
            };
            // the segment of the fork itself is the child's
            let last = on(parent.timeline).last();
            if let Some(next) =
                last.and_then(|last| last.next(self.size)).filter(|next| *next < of(parent.timeline, fork))
            {
                gaps.extend(self.gap(next, Some(of(parent.timeline, fork)), last, backups));
            }
            let first = on(timeline).next();
            if let Some(first) = first.filter(|first| *first > of(timeline, fork))
                && !backups.iter().any(|needs| needs.start == first)
            {
                gaps.extend(self.gap(of(timeline, fork), Some(first), last, backups));
            }
        }
        gaps
    }

    /// The gap from `first` up to `behind`, if there is a backup before it from which one would go through it.
    fn gap(
        &self,
        first: SegmentName,
        behind: Option<SegmentName>,
        before: Option<SegmentName>,
        backups: &[Needs<'_>],
    ) -> Option<Gap> {
        let after = backups.iter().filter(|needs| needs.start <= first).max_by_key(|needs| &needs.of.label)?;
        let until = backups
            .iter()
            .filter(|needs| behind.is_some_and(|behind| needs.start >= behind))
            .min_by_key(|needs| &needs.of.label);
        let last = match behind {
            None => first,
            Some(behind) => behind
                .number(self.size)
                .and_then(|number| number.checked_sub(1))
                .map_or(first, |number| SegmentName::of_number(behind.timeline(), number, self.size)),
        };
        Some(Gap {
            archive: self.id(),
            first: first.to_string(),
            last: last.to_string(),
            after: Some(after.of.label.clone()),
            from_time: before.and_then(|before| self.usable.get(&before)).copied(),
            until: until.map(|needs| needs.of.label.clone()),
            until_time: until.map(|needs| needs.of.stop_time),
        })
    }
}

/// The history that a history file tells.
fn history(name: WalName, object: &Listed, content: &[u8]) -> Result<Option<TimelineHistory>> {
    let WalName::History(timeline) = name else { return Ok(None) };
    let parsed = TimelineHistory::parse(timeline, content);
    parsed.map(Some).map_err(|error| FormatError::new(&object.key, 0, error.to_string()).into())
}
