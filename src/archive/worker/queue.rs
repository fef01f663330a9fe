//! What is to be done, what is being done, and what was said about it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use super::{AheadOptions, STATUS};
use crate::archive::protocol::{Answer, Outcome};
use crate::archive::spool::{Run, Spool};
use crate::error::{Error, Result};
use crate::postgres::WalName;

/// The shortest and the longest pause between two looks for new work.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(100));

/// The shortest and the longest pause before what failed is tried again unasked.
const AGAIN_AFTER: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// A worker whose server is gone waits this long for another.
const ORPHAN_IDLE: Duration = Duration::from_secs(1);

/// Files that are told of one failure at once. More than the queue, and a call asks for the oldest.
const FAIL_MAX: usize = 64;

/// The same trouble is logged this often.
const TROUBLE_EVERY: Duration = Duration::from_secs(60);

/// What a thread says of a file; no outcome where the server has no use for one any more.
pub(super) struct Told {
    pub(super) name: String,
    pub(super) outcome: Option<Outcome>,
}

pub(super) struct Desk<'a> {
    spool: &'a Spool,
    run: &'a Run,
    options: &'a AheadOptions,
    busy: HashSet<String>,
    /// those of them that may find the archive with other content: nothing later is begun meanwhile
    judged: HashSet<String>,
    failed: HashMap<String, Failed>,
    /// those that were told that they wait for a conflict
    held: HashSet<String>,
    /// when there was last something to do
    active: Instant,
    trouble: Option<Trouble>,
    /// files marked ready when that was last looked at
    waiting: usize,
}

struct Failed {
    again: Instant,
    pause: Duration,
    /// the error and the hint of a file that the archive holds with other content
    conflict: Option<(String, Option<String>)>,
}

/// The order in which the server asks for files: histories first.
pub(super) fn turn(name: &str) -> (bool, &str) {
    (!name.ends_with(".history"), name)
}

struct Trouble {
    since: Instant,
    logged: Instant,
    error: String,
}

impl<'a> Desk<'a> {
    pub(super) fn new(spool: &'a Spool, run: &'a Run, options: &'a AheadOptions) -> Self {
        let active = Instant::now();
        Self {
            spool,
            run,
            options,
            busy: HashSet::new(),
            judged: HashSet::new(),
            failed: HashMap::new(),
            held: HashSet::new(),
            active,
            trouble: None,
            waiting: 0,
        }
    }

    /// Waits until there is something to do; `None` when there was nothing for long enough.
    pub(super) fn next(&mut self) -> Result<Option<Vec<String>>> {
        loop {
            let todo = self.todo()?;
            if !todo.is_empty() {
                return Ok(Some(todo));
            }
            if self.is_done() {
                return Ok(None);
            }
            std::thread::sleep(self.pause());
        }
    }

    /// Names that wait, in the order in which the server asks for them. Takes answers away that nobody needs any more.
    pub(super) fn todo(&mut self) -> Result<Vec<String>> {
        self.spool.check(self.run)?;
        // answers first: what is answered now was ready before
        let files = self.spool.names()?;
        let answered: HashSet<&str> = files.iter().filter_map(|file| Answer::name(file)).collect();
        let ready = self.ready()?;
        self.waiting = ready.len();
        for name in answered.iter().filter(|name| !ready.contains(**name)) {
            self.spool.remove(&Answer::file(name))?;
        }
        self.failed.retain(|name, _| ready.contains(name));
        let now = Instant::now();
        let mut todo: Vec<String> = ready.into_iter().filter(|name| !self.busy.contains(name)).collect();
        todo.sort_unstable_by(|a, b| turn(a).cmp(&turn(b)));
        let conflict = self.conflict();
        let behind = conflict.as_ref().map_or(todo.len(), |at| todo.partition_point(|name| turn(name) <= turn(at)));
        let blocked = todo.split_off(behind);
        self.hold(conflict.as_deref(), &blocked, &answered)?;
        let is_behind = |name: &String| conflict.as_ref().is_some_and(|at| turn(name) > turn(at));
        let released: HashSet<String> = self.held.extract_if(|name| !is_behind(name)).collect();
        released.iter().try_for_each(|name| self.spool.remove(&Answer::file(name)))?;
        todo.retain(|name| match self.failed.get(name) {
            // a call took the answer away: it wants another
            Some(failed) => failed.again <= now || !answered.contains(name.as_str()),
            None => !answered.contains(name.as_str()) || released.contains(name),
        });
        if let Some(judged) = self.judged.iter().map(|name| turn(name)).min() {
            todo.retain(|name| turn(name) < judged);
        }
        if !todo.is_empty() {
            self.active = now;
        }
        Ok(todo)
    }

    /// The first file that the archive holds with other content. What is behind it stays, as it does where the server pushes file
    /// by file: else the archive would weave the WAL of two servers.
    pub(super) fn conflict(&self) -> Option<String> {
        let conflicts = self.failed.iter().filter(|(_, failed)| failed.conflict.is_some()).map(|(name, _)| name);
        conflicts.min_by(|a, b| turn(a).cmp(&turn(b))).cloned()
    }

    /// Tells files that wait for a conflict, the first of them, that they do.
    fn hold(&mut self, conflict: Option<&str>, blocked: &[String], answered: &HashSet<&str>) -> Result<()> {
        let Some(at) = conflict else { return Ok(()) };
        let Some((error, hint)) = self.failed.get(at).and_then(|failed| failed.conflict.clone()) else { return Ok(()) };
        for name in blocked.iter().take(FAIL_MAX).filter(|name| !answered.contains(name.as_str())) {
            let error = format!("{name} waits for {at}: {error}");
            let outcome = Outcome::Failed { error, hint: hint.clone(), conflict: false };
            Answer { run: self.run.id.clone(), outcome }.write(self.spool, name)?;
            self.held.insert(name.clone());
        }
        Ok(())
    }

    fn ready(&self) -> Result<HashSet<String>> {
        let path = self.options.wal.join(STATUS);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            // the server's directory is gone, and the server with it
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(HashSet::new()),
            Err(error) => return Err(Error::io("list", &path, error)),
        };
        let mut ready = HashSet::new();
        for entry in entries {
            let name = entry.map_err(|error| Error::io("list", &path, error))?.file_name();
            let name = name.to_str().and_then(|name| name.strip_suffix(".ready"));
            ready.extend(name.filter(|name| WalName::parse(name).is_ok()).map(str::to_owned));
        }
        Ok(ready)
    }

    /// `judged`: the archive may hold it with other content.
    pub(super) fn begin(&mut self, name: &str, judged: bool) {
        self.busy.insert(name.to_owned());
        if judged {
            self.judged.insert(name.to_owned());
        }
        self.active = Instant::now();
    }

    /// After all threads have ended.
    pub(super) fn forget_busy(&mut self) {
        self.busy.clear();
        self.judged.clear();
    }

    /// Writes an answer.
    pub(super) fn hear(&mut self, told: Told) -> Result<()> {
        self.active = Instant::now();
        match &told.outcome {
            Some(Outcome::Archived { .. }) => {
                tracing::info!(file = told.name, "archived");
                self.failed.remove(&told.name);
                if let Some(trouble) = self.trouble.take() {
                    tracing::warn!("archiving works again after {} s", trouble.since.elapsed().as_secs());
                }
            }
            Some(Outcome::Failed { error, hint, conflict }) => {
                let conflict = conflict.then(|| (error.clone(), hint.clone()));
                self.note_failure(&told.name, error, conflict);
            }
            None => {}
        }
        if let Some(outcome) = told.outcome {
            Answer { run: self.run.id.clone(), outcome }.write(self.spool, &told.name)?;
        }
        self.busy.remove(&told.name);
        self.judged.remove(&told.name);
        Ok(())
    }

    /// All of these failed for one reason.
    pub(super) fn fail(&mut self, names: &[String], error: &Error) -> Result<()> {
        let outcome = Outcome::failed(error);
        names
            .iter()
            .take(FAIL_MAX)
            .try_for_each(|name| self.hear(Told { name: name.clone(), outcome: Some(outcome.clone()) }))
    }

    fn note_failure(&mut self, name: &str, error: &str, conflict: Option<(String, Option<String>)>) {
        let now = Instant::now();
        let first = Failed { again: now, pause: AGAIN_AFTER.0 / 2, conflict: None };
        let failed = self.failed.entry(name.to_owned()).or_insert(first);
        // a store that fails settles no conflict
        failed.conflict = conflict.or(failed.conflict.take());
        failed.pause = (failed.pause * 2).min(AGAIN_AFTER.1);
        failed.again = now + failed.pause;
        let trouble = self.trouble.get_or_insert_with(|| Trouble { since: now, logged: now, error: String::new() });
        if trouble.error != error || trouble.logged.elapsed() >= TROUBLE_EVERY {
            trouble.logged = now;
            trouble.error = error.to_owned();
            let since = trouble.since.elapsed().as_secs();
            let waiting = self.waiting;
            tracing::warn!(file = name, "archiving fails since {since} s, {waiting} files wait in pg_wal: {error}");
        }
    }

    /// Whether the worker may end.
    pub(super) fn is_done(&self) -> bool {
        if !self.busy.is_empty() {
            return false;
        }
        let idle = self.active.elapsed();
        let data = self.options.wal.parent().unwrap_or(&self.options.wal);
        if !data.join("postmaster.pid").exists() {
            return idle >= ORPHAN_IDLE.min(self.options.idle);
        }
        // while a store is away, the server's calls come rarely; what they wait for is tried meanwhile
        idle >= self.options.idle && self.failed.is_empty()
    }

    pub(super) fn pause(&self) -> Duration {
        (self.active.elapsed() / 20).clamp(LOOK_EVERY.0, LOOK_EVERY.1)
    }
}
