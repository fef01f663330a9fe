//! Who works on a stanza: locks that need nothing of a store but that it lists what it has confirmed.
//!
//! A lock is an object of its own under a random name. Who wants one writes it, then lists all: whoever wrote later is sure
//! to see who wrote earlier. It is held only by one who saw no rival; so of two at the same time at most one holds it, and
//! mostly one does. The holder rewrites its object again and again. One that was not rewritten for long is dead: it is told
//! of, and not obeyed. How long ago that was is read off the store's clock alone, by comparing with an object just written.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;

use super::{Repository, layout};
use crate::error::{Context, Error, Result};
use crate::format::info::{LockInfo, LockKind};
use crate::interrupt;
use crate::store::{Body, Listed};

mod process;

/// How often a holder writes, and how long it may fail to.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// between two writes of the holder
    pub heartbeat: Duration,
    /// without a write for this long, the holder no longer counts itself as one; what it does between a check and its end
    /// must take less than `stale - lost`
    pub lost: Duration,
    /// without a write for this long, others no longer count it
    pub stale: Duration,
    /// how long a backup waits for work that is short
    pub patience: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(30),
            lost: Duration::from_secs(6 * 60),
            // one call of the store may take four minutes with all its tries
            stale: Duration::from_secs(12 * 60),
            patience: Duration::from_secs(15 * 60),
        }
    }
}

/// A lock of somebody else, as found.
#[derive(Clone, Debug)]
pub struct Other {
    /// its object
    pub key: String,
    /// when it was last written, by the store's clock
    pub modified: i64,
    /// seconds from that to now, by the store's clock
    pub age: i64,
    /// what it says; `None` when it cannot be read
    pub info: Option<LockInfo>,
    /// its holder is gone
    pub dead: bool,
}

/// A lock that is held. Dropping it gives it back.
#[derive(Debug)]
pub struct Lock {
    held: Arc<Held>,
    stop: Option<Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
    /// its object stays when it is dropped
    stays: bool,
}

/// What came of the wish for a lock.
#[derive(Debug)]
pub enum Attempt {
    /// it is ours
    Held(Lock),
    /// somebody else has it
    Busy(Box<Other>),
}

#[derive(Debug)]
struct Held {
    repository: Repository,
    key: String,
    timing: Timing,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    info: LockInfo,
    /// when the last write that succeeded began, by a clock that runs on while the machine sleeps
    renewed: Duration,
    lost: bool,
}

impl LockKind {
    /// Whether one of each cannot be held at the same time.
    pub fn excludes(self, other: Self) -> bool {
        use LockKind::{Backup, Expire, History, Stanza, Sweep};
        match (self, other) {
            (History, History) => true,
            (History, _) | (_, History) => false,
            (Stanza, _) | (_, Stanza) => true,
            (Backup, Expire) | (Expire, Backup) | (Expire, Sweep) | (Sweep, Expire) => false,
            (Backup | Sweep, Backup | Sweep) | (Expire, Expire) => true,
        }
    }

    /// Whether it is held for moments only, so that a backup had better wait for it.
    fn is_short(self) -> bool {
        matches!(self, Self::Sweep | Self::Stanza | Self::History)
    }
}

impl Repository {
    /// Takes a lock, or fails saying who has it; `note` says what for. A backup waits for work that is short.
    pub fn lock(&self, kind: LockKind, note: &str) -> Result<Lock> {
        self.lock_with(kind, note, Timing::default())
    }

    /// The same, with other times.
    pub fn lock_with(&self, kind: LockKind, note: &str, timing: Timing) -> Result<Lock> {
        let started = std::time::Instant::now();
        let mut told = false;
        loop {
            interrupt::check()?;
            let other = match self.try_lock(kind, note, timing)? {
                Attempt::Held(lock) => return Ok(lock),
                Attempt::Busy(other) => other,
            };
            let is_short = other.info.as_ref().is_some_and(|info| info.kind.is_short());
            if kind != LockKind::Backup || !is_short || started.elapsed() >= timing.patience {
                return Err(other.error(&self.stanza, timing));
            }
            if !std::mem::replace(&mut told, true) {
                tracing::warn!("{}; waiting for it", other.describe());
            }
            std::thread::sleep(pause(Duration::from_secs(2)).min(timing.heartbeat));
        }
    }

    /// Takes a lock if nobody has it.
    pub fn try_lock(&self, kind: LockKind, note: &str, timing: Timing) -> Result<Attempt> {
        let held = Held::new(self, kind, note, timing)?;
        process::holds(&held.key);
        // from here on, dropping it takes the object away
        let mut lock = Lock { held: Arc::new(held), stop: None, thread: None, stays: false };
        lock.held.renew()?;
        let since = match lock.held.win()? {
            Ok(since) => since,
            Err(rival) => return Ok(Attempt::Busy(Box::new(rival))),
        };
        lock.held.state.lock().info.since = Some(since);
        lock.held.renew()?;
        // a listing may miss an object that is rewritten meanwhile: two listings hardly both
        let (_, others) = lock.held.others()?;
        let holds = |other: &Other| other.rivals(kind) && other.since().is_some();
        if let Some(rival) = others.into_iter().find(holds) {
            return Ok(Attempt::Busy(Box::new(rival)));
        }
        let (stop, stopped) = bounded::<()>(0);
        let held = lock.held.clone();
        let beat = move || {
            while stopped.recv_timeout(held.timing.heartbeat) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = held.renew() {
                    tracing::warn!(%error, "the lock could not be renewed; trying again");
                }
            }
        };
        let thread = std::thread::Builder::new().name("lock".into()).spawn(beat);
        lock.thread = Some(thread.context(|| "cannot start a thread".into())?);
        lock.stop = Some(stop);
        Ok(Attempt::Held(lock))
    }

    /// Everybody's locks, with ages by this host's clock: for people.
    pub fn locks(&self) -> Result<Vec<Other>> {
        list(self, &Timing::default(), None).map(|(_, others)| others)
    }
}

impl Lock {
    /// Fails when the lock may no longer be ours: nothing that it protects may be committed or deleted then.
    pub fn check(&self) -> Result<()> {
        self.held.check()
    }

    /// Says what it is held for, from the next heartbeat on: the label of the backup.
    pub fn set_note(&self, note: &str) {
        note.clone_into(&mut self.held.state.lock().info.note);
    }

    /// Since when it is held, by the store's clock.
    pub fn since(&self) -> i64 {
        self.held.state.lock().info.since.unwrap_or_default()
    }

    /// The store's clock, and the locks of all others.
    pub fn others(&self) -> Result<(i64, Vec<Other>)> {
        self.held.renew()?;
        self.held.others()
    }

    /// Locks of backups that died, oldest first: what they stored since [`Other::since`] may be used again.
    pub fn dead_backups(&self) -> Result<Vec<Other>> {
        let (_, mut others) = self.others()?;
        others.retain(|other| other.dead && other.kind() == Some(LockKind::Backup));
        others.sort_by_key(Other::since);
        Ok(others)
    }

    /// Gives the lock back, but leaves its object, which says that its holder failed: what a backup stored until then may be
    /// used again. It stands for the `dead` ones too, which go, so that a backup that fails every hour leaves one object.
    pub fn leave(mut self, dead: &[Other]) {
        self.end_heartbeat();
        self.stays = true;
        let since = dead.iter().filter_map(Other::since).min();
        {
            let info = &mut self.held.state.lock().info;
            info.failed = true;
            info.since = info.since.into_iter().chain(since).min();
        }
        if let Err(error) = self.held.renew().and_then(|()| self.remove(dead)) {
            tracing::warn!(%error, key = self.held.key, "a lock could not be given back; it counts as dead before long");
        }
    }

    /// Ends the thread that renews the lock, whose last write would otherwise come after the end.
    fn end_heartbeat(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }

    /// Takes away what dead holders left.
    pub fn remove(&self, dead: &[Other]) -> Result<()> {
        let keys: Vec<String> = dead.iter().filter(|other| other.dead).map(|other| other.key.clone()).collect();
        if keys.is_empty() { Ok(()) } else { Ok(self.held.repository.store.delete(&keys)?) }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.end_heartbeat();
        let key = std::slice::from_ref(&self.held.key);
        if !self.stays
            && let Err(error) = self.held.repository.store.delete(key)
        {
            tracing::warn!(%error, key = self.held.key, "a lock could not be removed; it counts as dead before long");
        }
        process::holds_no_more(&self.held.key);
    }
}

impl Held {
    /// A lock that nobody has written yet.
    fn new(repository: &Repository, kind: LockKind, note: &str, timing: Timing) -> Result<Self> {
        let mut id = [0; 16];
        getrandom::fill(&mut id).context(|| "cannot get random bytes".into())?;
        let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        let info = LockInfo {
            kind,
            since: None,
            heartbeat: 0,
            host: process::host(),
            pid: std::process::id(),
            user: process::user(),
            process: process::identity(std::process::id()),
            note: note.to_owned(),
            failed: false,
            pgcairn: env!("CARGO_PKG_VERSION").into(),
        };
        Ok(Self {
            repository: repository.clone(),
            key: format!("{}{id}", layout::locks(&repository.stanza)),
            timing,
            state: Mutex::new(State { info, renewed: process::uptime(), lost: false }),
        })
    }

    /// Looks at all others until it is clear who holds the lock. We do: since when. Another does: who.
    fn win(&self) -> Result<std::result::Result<i64, Other>> {
        let kind = self.state.lock().info.kind;
        let started = process::uptime();
        loop {
            let (own, others) = self.others()?;
            let rivals: Vec<Other> = others.into_iter().filter(|other| other.rivals(kind)).collect();
            let Some(first) = rivals.first() else { return Ok(Ok(own)) };
            let holder = rivals.iter().find(|rival| rival.since().is_some());
            // of those who only want it the earlier may stay; who came later, and sees that, goes
            let earlier = rivals.iter().find(|rival| (rival.modified, &rival.key) < (own, &self.key));
            if let Some(rival) = holder.or(earlier) {
                return Ok(Err(rival.clone()));
            }
            if process::uptime().saturating_sub(started) > self.timing.lost / 6 {
                return Ok(Err(first.clone()));
            }
            std::thread::sleep(pause(Duration::from_millis(200)));
        }
    }

    /// When our object was last written, and the locks of all others.
    fn others(&self) -> Result<(i64, Vec<Other>)> {
        let (own, others) = list(&self.repository, &self.timing, Some(&self.key))?;
        let own = own.ok_or_else(|| {
            Error::new(format!("lock {} was written, but is not listed", self.key))
                .hint("something removed it; or the store does not list what it confirmed, and cannot be a repository")
        })?;
        Ok((own, others))
    }

    /// Writes our object again.
    fn renew(&self) -> Result<()> {
        let mut state = self.state.lock();
        let began = process::uptime();
        state.info.heartbeat = process::now_s();
        let bytes = self.repository.encode_info(&self.key, &state.info)?;
        self.repository.store.put(&self.key, Body::Bytes(bytes))?;
        // until this moment others saw the write before it
        state.lost |= process::uptime().saturating_sub(state.renewed) > self.timing.lost;
        state.renewed = began;
        Ok(())
    }

    fn check(&self) -> Result<()> {
        // a heartbeat under way holds the state: it ends within the store's own bounds
        let mut state = self.state.lock();
        let silent = process::uptime().saturating_sub(state.renewed);
        state.lost |= silent > self.timing.lost;
        match state.lost {
            false => Ok(()),
            true => Err(Error::new(format!(
                "the {} lock of stanza {} could not be renewed for more than {} s",
                state.info.kind,
                self.repository.stanza,
                self.timing.lost.as_secs_f32()
            ))
            .hint("the store was away, or this machine slept: others may have gone to work; run the command again")),
        }
    }
}

impl Other {
    /// What it is for; `None` when it cannot be read.
    pub fn kind(&self) -> Option<LockKind> {
        self.info.as_ref().map(|info| info.kind)
    }

    /// Since when it is held, by the store's clock; `None` while it is only wanted.
    pub fn since(&self) -> Option<i64> {
        // what cannot be read is held, for all we know
        self.info.as_ref().map_or(Some(self.modified), |info| info.since)
    }

    /// Alive, and of a kind that excludes ours.
    fn rivals(&self, kind: LockKind) -> bool {
        !self.dead && self.kind().is_none_or(|other| other.excludes(kind))
    }

    /// Who it is, since when, last seen when.
    pub fn describe(&self) -> String {
        let Some(info) = &self.info else {
            return format!("somebody holds {}, which cannot be read; it was written {} s ago", self.key, self.age);
        };
        let what = match info.kind {
            LockKind::Backup => "a backup",
            LockKind::Expire => "an expire",
            LockKind::Sweep => "a sweep of packs",
            LockKind::Stanza => "a change of the stanza",
            LockKind::History => "a push of a history file",
        };
        let note = if info.note.is_empty() { String::new() } else { format!(" ({})", info.note) };
        let since = info.since.and_then(|since| jiff::Timestamp::from_second(since).ok());
        let since = since.map_or_else(|| "starting now".to_owned(), |since| format!("since {since}"));
        let (user, host, pid) = (&info.user, &info.host, info.pid);
        format!("{what}{note} is running: {user}@{host}, process {pid}, {since}, last heard of {} s ago", self.age)
    }

    fn error(&self, stanza: &str, timing: Timing) -> Error {
        let hint = format!(
            "wait for it; if it died, its lock counts no more {} minutes after it was last heard of",
            timing.stale.as_secs().div_ceil(60)
        );
        Error::new(format!("stanza {stanza} is locked: {}", self.describe())).hint(hint)
    }
}

/// When `own` was last written, and all other locks.
fn list(repository: &Repository, timing: &Timing, own: Option<&str>) -> Result<(Option<i64>, Vec<Other>)> {
    let store = &repository.store;
    let mut objects: Vec<Listed> = Vec::new();
    let mut after = None;
    loop {
        let page = store.list(&layout::locks(&repository.stanza), after.as_deref())?;
        objects.extend(page.objects);
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    let ours = objects.iter().find(|object| Some(object.key.as_str()) == own).map(|object| object.modified);
    let now = ours.unwrap_or_else(process::now_s);
    let mut others = Vec::new();
    for object in objects.into_iter().filter(|object| Some(object.key.as_str()) != own) {
        let info = match repository.fetch_info::<LockInfo>(&object.key) {
            Ok(info) => info.ok(),
            // given back since it was listed
            Err(error) if error.is_not_found() => continue,
            Err(error) => return Err(error),
        };
        let age = now.saturating_sub(object.modified).max(0);
        let gone = info.as_ref().is_some_and(|info| info.failed || process::is_gone(&object.key, info));
        let dead = gone || age as u64 > timing.stale.as_secs();
        others.push(Other { key: object.key, modified: object.modified, age, info, dead });
    }
    Ok((ours, others))
}

/// About as long, so that two who wait for each other do not stay in step.
fn pause(about: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or_default();
    about.mul_f64(0.5 + f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests;
