//! What can happen next.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::check::chunks_of;
use super::model::{Files, Moment, Taken, WalLeft};
use super::world::{Death, Leaving, Mount, World};
use crate::error::Result;
use crate::postgres::BackupKind::{Diff, Full, Incr};
use crate::postgres::{SegmentName, SegmentSize};
use crate::progress::Silent;
use crate::read::fetch::{FetchOptions, Fetcher};
use crate::read::view::{View, ViewOptions};
use crate::repo::layout;
use crate::retention::expire::{ExpireOptions, Report, expire};
use crate::retention::policy::{FullType, Retention};
use crate::store::{Effect, Operation};

const HOUR: i64 = 3600;

/// Where an expire that runs in the middle of something leaves what it did.
type Left = Arc<Mutex<Option<(ExpireOptions, Result<Report>)>>>;

/// What comes in between.
pub(super) enum Trouble {
    None,
    /// it dies at this call
    Dies(u64, Death),
    /// the other one runs in the middle, at this call or a later one
    Meanwhile(u64),
}

impl World {
    pub(super) fn step(&mut self) {
        let pause = self.random.below(15) as i64;
        self.pass(pause);
        let mut thorough = self.random.once_in(6);
        match self.random.below(21) {
            0..3 => self.change(),
            3..6 => self.backup(&Trouble::None),
            6..9 => {
                let death = self.death(self.calls.0);
                self.backup(&death);
                thorough = true;
            }
            9 => {
                let number = 1 + self.random.below(self.calls.0);
                self.backup(&Trouble::Meanwhile(number));
            }
            10..13 => self.expire(&Trouble::None),
            13..15 => {
                let death = self.death(self.calls.1);
                self.expire(&death);
                thorough = true;
            }
            15 => {
                let number = 1 + self.random.below(self.calls.1);
                self.expire(&Trouble::Meanwhile(number));
            }
            16 => self.overlap(),
            17 => self.mount(),
            18 => self.damage(),
            _ => {
                let seconds = self.random.pick(&[60, 700, HOUR, 12 * HOUR, 25 * HOUR]);
                self.pass(seconds);
            }
        }
        self.check(thorough);
    }

    fn death(&mut self, calls: u64) -> Trouble {
        let deaths = [Death::Before, Death::Before, Death::After, Death::After, Death::Fails, Death::Unanswered];
        Trouble::Dies(1 + self.random.below(calls + 2), self.random.pick(&deaths))
    }

    /// Whether an error says no more than that somebody seems to work who died elsewhere.
    pub(super) fn is_locked_out<T>(&self, outcome: &Result<T>) -> bool {
        self.now() <= self.foreign_until && outcome.as_ref().is_err_and(|error| error.to_string().contains("is locked"))
    }

    fn backup(&mut self, trouble: &Trouble) {
        if !self.random.once_in(4) {
            self.change();
        }
        let kind = self.random.pick(&[Full, Full, Diff, Incr, Incr]);
        let files = Arc::new(self.files());
        let take = self.backup_to_be(kind);
        let before = self.plan.calls();
        let meanwhile = self.prepare(trouble);
        let outcome = take();
        self.plan.clear();
        self.say(format!("{kind:?} backup, {}: {}", tell(trouble), told(&outcome)));
        if let Some((options, report)) = meanwhile.and_then(|expired| expired.lock().take()) {
            let taken = self.model.expired(&options, self.now());
            self.settle_expire(&options, &[taken], &report);
        }
        let fresh = self.settle_backup(files);
        match (&outcome, trouble) {
            (Ok(label), _) => {
                assert_eq!(fresh.as_ref(), Some(label));
                self.calls.0 = self.plan.calls() - before;
            }
            (Err(_), Trouble::Dies(..)) => {}
            (Err(error), _) => assert!(self.is_locked_out(&outcome), "{error:?}"),
        }
        self.after(trouble);
        if self.random.once_in(3) {
            self.mount();
        }
    }

    /// Makes what comes in between happen; an expire that comes leaves what it did.
    fn prepare(&mut self, trouble: &Trouble) -> Option<Left> {
        match trouble {
            Trouble::None => None,
            Trouble::Dies(number, death) => {
                self.doom(*number, *death);
                None
            }
            Trouble::Meanwhile(number) => {
                // a backup that is taken on top of one that a person removes is of a set that is no more
                let options = ExpireOptions { dry_run: false, set: None, ..self.expire_options() };
                let (repository, left) = (self.repository.clone(), Arc::new(Mutex::new(None)));
                let leave = left.clone();
                self.between(*number, move || {
                    *leave.lock() = Some((options.clone(), expire(&repository, &options, &Silent)));
                });
                Some(left)
            }
        }
    }

    /// Runs something once, before the `number`th call from now or a later one, at the latest before the manifest is written.
    /// Never within the calls by which a lock is taken: who takes one waits for others who do.
    fn between(&self, number: u64, run: impl Fn() + Send + Sync + 'static) {
        let (first, ran) = (self.plan.calls() + number, AtomicBool::new(false));
        let comes = move |call: &crate::store::Call| {
            let commits = call.operation == Operation::Put && call.key.ends_with("backup.manifest");
            let is_time = (call.number >= first || commits) && !call.key.starts_with("lock/");
            if is_time && !ran.swap(true, Ordering::SeqCst) {
                run();
            }
            false
        };
        self.plan.add(comes, Effect::Delay(Duration::ZERO));
    }

    pub(super) fn after(&mut self, trouble: &Trouble) {
        self.sync_wal();
        if let Trouble::Dies(..) = trouble
            && self.random.once_in(3)
        {
            self.abroad();
        }
        // what the server could not archive then it archives now
        let archived = self.wal.archive(&self.repository);
        assert!(archived.is_ok(), "{archived:?}");
        self.sync_wal();
    }

    fn sync_wal(&mut self) {
        let from = self.model.wal.last().map_or(1, |last| last + 1);
        self.model.wal.extend(from..self.wal.next());
    }

    /// Notes the backup that is there and was not, whatever became of who took it.
    pub(super) fn settle_backup(&mut self, files: Arc<Files>) -> Option<String> {
        self.sync_wal();
        let mut labels = self.repository.labels().unwrap();
        labels.retain(|label| !self.model.backups.contains_key(label));
        assert!(labels.len() <= 1, "{labels:?}");
        let label = labels.pop()?;
        let description = self.repository.description(&label).unwrap();
        let size = SegmentSize::new(description.database.wal_segment_size).unwrap();
        let number = |name: &str| name.parse::<SegmentName>().unwrap().number(size).unwrap();
        let moment = Moment {
            kind: description.kind,
            prior: description.prior.clone(),
            time: description.stop_time,
            wal: (number(&description.wal_start), number(&description.wal_stop)),
            files,
            chunks: chunks_of(&self.repository, &label),
        };
        self.model.backups.insert(label.clone(), moment);
        Some(label)
    }

    pub(super) fn expire_options(&mut self) -> ExpireOptions {
        let full = self.random.pick(&[None, Some(1), Some(1), Some(2), Some(3)]);
        let full_type = self.random.pick(&[FullType::Count, FullType::Count, FullType::Time]);
        let diff = self.random.pick(&[None, Some(1), Some(2)]);
        let archive = self.random.pick(&[None, None, Some(1), Some(2)]);
        let archive_type = self.random.pick(&[Full, Diff, Incr]);
        let labels: Vec<String> = self.model.backups.keys().cloned().collect();
        let set = (!labels.is_empty() && self.random.once_in(8)).then(|| self.random.pick(&labels));
        let grace = self.random.pick(&[0, HOUR, 24 * HOUR, 24 * HOUR, 24 * HOUR]);
        ExpireOptions {
            retention: Retention { full, full_type, diff, archive, archive_type },
            grace: Duration::from_secs(grace as u64),
            force: true,
            set,
            brief: self.random.once_in(3),
            dry_run: self.random.once_in(10),
        }
    }

    fn expire(&mut self, trouble: &Trouble) {
        let mut options = self.expire_options();
        let kind = self.random.pick(&[Full, Diff, Incr]);
        let (files, committed) = (Arc::new(self.files()), Arc::new(Mutex::new(None)));
        if let Trouble::Meanwhile(_) = trouble {
            // it would go with the one that it was taken on, or would not
            options.set = None;
        }
        let (keys, before) = (self.keys(""), self.plan.calls());
        match trouble {
            Trouble::None => {}
            Trouble::Dies(number, death) => self.doom(*number, *death),
            Trouble::Meanwhile(number) => {
                let (take, leave) = (self.backup_to_be(kind), committed.clone());
                self.between(*number, move || *leave.lock() = Some(take()));
            }
        }
        let outcome = expire(&self.repository, &options, &Silent);
        self.plan.clear();
        self.say(format!("expire {options:?}, {}: {}", tell(trouble), told(&outcome)));
        let mut taken = vec![self.model.expired(&options, self.now())];
        if let Some(backup) = committed.lock().take() {
            self.say(format!("meanwhile a {kind:?} backup: {}", told(&backup)));
            let fresh = self.settle_backup(files);
            assert_eq!(fresh, backup.ok());
            // it counts, or does not
            taken.push(self.model.expired(&options, self.now()));
        }
        if options.dry_run && !matches!(trouble, Trouble::Meanwhile(_)) {
            assert_eq!(self.keys(""), keys);
        }
        if outcome.is_ok() {
            self.calls.1 = self.plan.calls() - before;
        }
        let lenient = !matches!(trouble, Trouble::None);
        assert!(outcome.is_ok() || lenient || taken[0].is_none() || self.is_locked_out(&outcome), "{outcome:?}");
        self.settle_expire(&options, &taken, &outcome);
        self.after(trouble);
    }

    /// Notes what went, which must be no more than what may by one of `taken`, and as much as the report says.
    pub(super) fn settle_expire(&mut self, options: &ExpireOptions, taken: &[Option<Taken>], outcome: &Result<Report>) {
        self.sync_wal();
        if options.dry_run {
            return;
        }
        if taken.iter().any(Option::is_none) {
            assert!(outcome.is_err(), "{outcome:?}");
            return;
        }
        let there: BTreeSet<String> = self.repository.labels().unwrap().into_iter().collect();
        let gone: BTreeSet<String> =
            self.model.backups.keys().filter(|label| !there.contains(*label)).cloned().collect();
        let may_go = |label: &String| taken.iter().flatten().any(|taken| taken.backups.contains(label));
        assert!(gone.iter().all(may_go), "{gone:?} went, of {taken:?}");
        if let Ok(report) = outcome {
            let named: BTreeSet<String> =
                report.backups.iter().filter(|of| !of.keep).map(|of| of.label.clone()).collect();
            assert_eq!(gone, named);
            assert!(taken.iter().flatten().any(|taken| taken.backups == named), "{named:?} went, not {taken:?}");
        }
        self.model.wal.retain(|number| taken.iter().flatten().all(|taken| taken.wal.has(*number)));
        let (now, grace) = (self.now(), options.grace.as_secs() as i64);
        for (label, of) in self.model.backups.extract_if(.., |label, _| gone.contains(label)) {
            let packs = of.chunks.iter().map(|chunk| layout::pack("main", chunk.pack)).collect();
            self.leaving.push(Leaving { label, gone: now, packs });
        }
        self.leaving.retain(|leaving| now - leaving.gone < grace);
        for mount in &mut self.mounts {
            if gone.contains(&mount.label) {
                mount.gone = Some(now);
            }
            mount.doubtful |= mount.gone.is_some_and(|gone| now - gone >= grace);
        }
    }

    fn mount(&mut self) {
        let labels: Vec<String> = self.model.backups.keys().cloned().collect();
        if labels.is_empty() {
            return;
        }
        let label = self.random.pick(&labels);
        self.say(format!("mount of {label}"));
        let view = open(&self.repository, &label);
        let files = self.model.backups[&label].files.clone();
        if self.mounts.len() >= 4 {
            self.mounts.remove(0);
        }
        self.mounts.push(Mount { label, view: Arc::new(view), files, gone: None, doubtful: false });
    }

    /// Time passes and one expire follows the other until nothing can be left over.
    pub(super) fn end(&mut self) {
        let grace = Duration::from_secs(24 * 3600);
        let options = ExpireOptions { grace, brief: false, dry_run: false, set: None, ..self.expire_options() };
        // the first marks, the second sweeps
        self.expire_long_after(&options);
        // by age, another one may go only now
        let options =
            ExpireOptions { retention: Retention { full_type: FullType::Count, ..options.retention }, ..options };
        self.expire_long_after(&options);
        let wal = self.expire_long_after(&options);
        self.check_nothing_is_left_over(&wal);
    }

    fn expire_long_after(&mut self, options: &ExpireOptions) -> WalLeft {
        self.pass(49 * HOUR);
        let taken = self.model.expired(options, self.now());
        let wal = taken.as_ref().map_or(WalLeft::All, |taken| taken.wal.clone());
        let outcome = expire(&self.repository, options, &Silent);
        self.say(format!("the end: expire {options:?}: {}", told(&outcome)));
        assert!(outcome.is_ok(), "{outcome:?}");
        self.settle_expire(options, &[taken], &outcome);
        self.check(true);
        wal
    }
}

/// A view with next to no memory, so that it asks the store again.
pub(super) fn open(repository: &crate::repo::Repository, label: &str) -> View {
    let fetcher = Fetcher::new(repository.clone(), FetchOptions { memory_bytes: 1 << 18, disk: None });
    View::load(Arc::new(fetcher), label, &ViewOptions::default()).unwrap()
}

fn tell(trouble: &Trouble) -> String {
    match trouble {
        Trouble::None => "undisturbed".into(),
        Trouble::Dies(number, death) => format!("dying {death:?} call {number}"),
        Trouble::Meanwhile(number) => format!("with the other one at call {number}"),
    }
}

pub(super) fn told<T: std::fmt::Debug>(outcome: &Result<T>) -> String {
    match outcome {
        Ok(done) => format!("{done:?}"),
        Err(error) => format!("failed: {error}"),
    }
}
