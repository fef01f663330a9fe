//! A backup that began before an expire and is committed in the middle of it, when its parent is gone already.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::steps::{Trouble, told};
use super::world::World;
use crate::postgres::BackupKind::{Diff, Full, Incr};
use crate::progress::Silent;
use crate::retention::expire::{ExpireOptions, expire};
use crate::store::{Call, Effect, Operation};

/// How far the two have come.
#[derive(Debug, Default)]
struct Crossing {
    stage: Mutex<Stage>,
    wake: Condvar,
    /// calls of the expire since it removed the first manifest
    calls: AtomicU64,
}

/// When the backup goes on.
#[derive(Clone, Copy, Debug)]
enum When {
    /// the expire has come so many calls further than to the first manifest it removes
    Calls(u64),
    /// it has seen which packs nobody needs, and is about to mark them
    Marks,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    #[default]
    Copying,
    /// the backup is about to be committed
    Waits,
    GoesOn,
    Ended,
}

impl Crossing {
    fn reach(&self, stage: Stage) {
        let mut now = self.stage.lock();
        *now = stage.max(*now);
        self.wake.notify_all();
    }

    fn wait(&self, least: Stage) {
        let mut now = self.stage.lock();
        while *now < least {
            self.wake.wait(&mut now);
        }
    }

    /// Sees every call before it is made: of the two only one makes any while the other waits. Nobody waits for a lock.
    fn sees(&self, call: &Call, when: When) {
        let stage = *self.stage.lock();
        let is_manifest = call.key.ends_with("backup.manifest");
        match (stage, call.operation) {
            (Stage::Copying, Operation::Put) if is_manifest => {
                self.reach(Stage::Waits);
                self.wait(Stage::GoesOn);
            }
            (Stage::Waits, operation) if !call.key.starts_with("lock/") => {
                let is_time = match when {
                    When::Marks => operation == Operation::Put && call.key.starts_with("mark/"),
                    When::Calls(number) => {
                        let began =
                            self.calls.load(Ordering::SeqCst) > 0 || operation == Operation::Delete && is_manifest;
                        began && self.calls.fetch_add(1, Ordering::SeqCst) == number
                    }
                };
                if is_time {
                    self.reach(Stage::GoesOn);
                    self.wait(Stage::Ended);
                }
            }
            _ => {}
        }
    }
}

impl World {
    pub(super) fn overlap(&mut self) {
        self.change();
        let kind = self.random.pick(&[Full, Diff, Incr, Incr]);
        let options = self.options_against(kind);
        let files = Arc::new(self.files());
        let when = if self.random.once_in(2) { When::Marks } else { When::Calls(1 + self.random.below(40)) };
        let (take, crossing) = (self.backup_to_be(kind), Arc::new(Crossing::default()));
        let watching = crossing.clone();
        let watch = move |call: &Call| {
            watching.sees(call, when);
            false
        };
        self.plan.add(watch, Effect::Delay(Duration::ZERO));
        let (backup, outcome) = thread::scope(|scope| {
            let backup = scope.spawn(|| {
                let taken = take();
                crossing.reach(Stage::Ended);
                taken
            });
            crossing.wait(Stage::Waits);
            let outcome = expire(&self.repository, &options, &Silent);
            crossing.reach(Stage::GoesOn);
            (backup.join().unwrap(), outcome)
        });
        self.plan.clear();
        self.say(format!("{kind:?} backup: {}, across {when:?} of {options:?}: {}", told(&backup), told(&outcome)));
        let taken = self.model.expired(&options, self.now());
        assert!(backup.is_ok() || self.is_locked_out(&backup), "{backup:?}");
        assert!(outcome.is_ok() || taken.is_none() || self.is_locked_out(&outcome), "{outcome:?}");
        assert_eq!(self.settle_backup(files), backup.ok());
        self.settle_expire(&options, &[taken], &outcome);
        self.after(&Trouble::None);
    }

    /// An expire that is likely to take what a backup is compared with.
    fn options_against(&mut self, kind: crate::postgres::BackupKind) -> ExpireOptions {
        let last = self.model.backups.iter().next_back().filter(|(_, of)| of.kind != Full && kind != Diff);
        let set = last.map(|(label, _)| label.clone());
        let set = set.filter(|_| !self.random.once_in(3));
        let grace = if self.random.once_in(2) { Duration::ZERO } else { Duration::from_secs(24 * 3600) };
        ExpireOptions { set, grace, dry_run: false, brief: false, ..self.expire_options() }
    }
}
