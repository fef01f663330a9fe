//! The worker that pushes ahead: it finds what PostgreSQL has marked ready in `archive_status`, pushes it in parallel, and
//! answers in the spool for the calls that come later. One call of `archive_command` after the other then finds its answer.
//!
//! ```text
//! archive_status/*.ready ──> listed (one LIST for many) ──> read, check, compress, PUT (in parallel)
//!                                       ──> listed again (one LIST for many) ──> answers
//! ```
//!
//! The rules are those of [`super::push`]: other content under a name is refused before anything is written, and found out
//! afterwards if it came at the same moment. Only what the second listing shows is called archived. Behind a file that the archive
//! holds with other content nothing is pushed but what was under way when that was found out.
mod queue;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use parking_lot::Mutex;

use super::client::ready;
use super::protocol::{About, Outcome, Stamp};
use super::push::{WalFile, changed, not_listed, push, put};
use super::spool::Spool;
use crate::error::{Error, Result};
use crate::format::manifest::Database;
use crate::postgres::SegmentName;
use crate::repo::Repository;
use crate::repo::wal::twice;
use crate::store::Listed;
use queue::{Desk, Told, turn};

/// Where PostgreSQL says what is to be archived, in `pg_wal`.
pub(super) const STATUS: &str = "archive_status";

/// Files that wait for a thread; their names were looked for together.
const QUEUE_MAX: usize = 32;

/// How old the knowledge of whose stanza this is may be.
const INFO_AGE_MAX: Duration = Duration::from_secs(10);

/// Bytes of segments that may be in memory, plain and compressed.
const MEMORY_BYTES: u64 = 512 << 20;

/// What a worker needs to know.
#[derive(Clone, Debug)]
pub struct AheadOptions {
    /// the directory `pg_wal`
    pub wal: PathBuf,
    /// zstd level
    pub level: i32,
    /// files compressed at once; twice as many are under way
    pub process_max: usize,
    /// ends when there was nothing to do for this long
    pub idle: Duration,
}

/// Pushes ahead until there is nothing to do for a while; returns at once where another worker is alive.
///
/// `open` opens the repository, and does it again when that failed.
///
/// # Errors
/// Of the spool. Those of the store are answers.
pub fn push_ahead(spool: &Spool, options: &AheadOptions, open: &dyn Fn() -> Result<Repository>) -> Result<()> {
    let Some(run) = spool.begin("")? else { return Ok(()) };
    let mut desk = Desk::new(spool, &run, options);
    while let Some(todo) = desk.next()? {
        match open().and_then(|repository| Ok((current(&repository)?, repository))) {
            Ok((database, repository)) => {
                let conflict = Mutex::new(desk.conflict());
                Session { repository, database, options, conflict }.work(&mut desk)?;
            }
            Err(error) => desk.fail(&todo, &error)?,
        }
    }
    Ok(())
}

fn current(repository: &Repository) -> Result<Database> {
    Ok(repository.archive_info()?.current()?.clone())
}

/// Work for one stanza that was found in a store.
struct Session<'a> {
    repository: Repository,
    database: Database,
    options: &'a AheadOptions,
    /// the file behind which nothing is pushed
    conflict: Mutex<Option<String>>,
}

/// A file for a thread, and what the archive had under its name when it was last looked for.
struct Job {
    name: String,
    there: Vec<Listed>,
}

/// A segment that was put, and must be listed before it counts.
struct Put {
    segment: SegmentName,
    about: About,
    key: String,
}

/// What threads take and give.
struct Lines {
    jobs: Receiver<Job>,
    puts: Sender<Put>,
    told: Sender<Told>,
    /// one token for each file that may be compressed at once
    tokens: (Sender<()>, Receiver<()>),
}

impl Session<'_> {
    fn threads(&self) -> usize {
        let by_memory = MEMORY_BYTES / (2 * self.database.wal_segment_size);
        (2 * self.options.process_max).min(by_memory as usize).max(1)
    }

    /// Returns when the desk has nothing more to do, or when the stanza has to be looked up again.
    fn work(&self, desk: &mut Desk<'_>) -> Result<()> {
        let (jobs, take_jobs) = bounded(QUEUE_MAX);
        let (puts, take_puts) = unbounded();
        let (told, hear) = unbounded();
        let tokens = bounded(self.options.process_max);
        for _ in 0..self.options.process_max {
            _ = tokens.0.send(());
        }
        let lines = Lines { jobs: take_jobs, puts, told: told.clone(), tokens };
        thread::scope(|scope| {
            let worked = {
                let lines = lines;
                for _ in 0..self.threads() {
                    let lines = Lines {
                        jobs: lines.jobs.clone(),
                        puts: lines.puts.clone(),
                        told: lines.told.clone(),
                        tokens: lines.tokens.clone(),
                    };
                    scope.spawn(move || self.push_all(&lines));
                }
                scope.spawn(move || self.confirm_all(&take_puts, &told));
                let worked = self.hand_out(desk, &jobs, &hear);
                // what nobody has begun stays undone: the next session finds it again
                while lines.jobs.try_recv().is_ok() {}
                drop(jobs);
                worked
            };
            // what was under way is still heard, so that no answer is missing
            let rest = hear.iter().try_for_each(|told| desk.hear(told));
            desk.forget_busy();
            worked.and(rest)
        })
    }

    fn hand_out(&self, desk: &mut Desk<'_>, jobs: &Sender<Job>, hear: &Receiver<Told>) -> Result<()> {
        let mut looked_up = Instant::now();
        loop {
            hear.try_iter().try_for_each(|told| desk.hear(told))?;
            *self.conflict.lock() = desk.conflict();
            if jobs.len() < self.threads() {
                let mut todo = desk.todo()?;
                if !todo.is_empty() && looked_up.elapsed() > INFO_AGE_MAX {
                    match current(&self.repository) {
                        Ok(database) if database == self.database => looked_up = Instant::now(),
                        Ok(_) => return Ok(()),
                        Err(error) => desk.fail(&std::mem::take(&mut todo), &error)?,
                    }
                }
                todo.truncate(QUEUE_MAX - jobs.len());
                self.look_for(todo, desk, jobs)?;
                if desk.is_done() {
                    return Ok(());
                }
            }
            if let Ok(told) = hear.recv_timeout(desk.pause()) {
                desk.hear(told)?;
            }
        }
    }

    /// Looks for these names in the archive, all segments of a timeline at once, and hands them out.
    fn look_for(&self, todo: Vec<String>, desk: &mut Desk<'_>, jobs: &Sender<Job>) -> Result<()> {
        let mut there: BTreeMap<String, Vec<Listed>> = BTreeMap::new();
        let mut failed = Vec::new();
        let mut segments: Vec<SegmentName> = todo.iter().filter_map(|name| name.parse().ok()).collect();
        segments.sort_unstable();
        for of_timeline in segments.chunk_by(|a, b| a.timeline() == b.timeline()) {
            match self.repository.archive(&self.database).stored(of_timeline) {
                Ok(stored) => there.extend(of_timeline.iter().map(SegmentName::to_string).zip(stored)),
                Err(error) => {
                    let names: Vec<String> = of_timeline.iter().map(SegmentName::to_string).collect();
                    desk.fail(&names, &error)?;
                    failed.extend(names);
                }
            }
        }
        let mut is_judged = false;
        for name in todo.into_iter().filter(|name| !failed.contains(name)) {
            let there = there.remove(&name).unwrap_or_default();
            // what is there is compared; what is not is put, which must wait until nothing before it is a conflict
            if is_judged && there.is_empty() {
                break;
            }
            is_judged |= !there.is_empty() || name.parse::<SegmentName>().is_err();
            desk.begin(&name, is_judged);
            // room was left for it
            _ = jobs.send(Job { name, there });
        }
        Ok(())
    }

    fn push_all(&self, lines: &Lines) {
        for job in &lines.jobs {
            if self.is_held(&job.name) {
                _ = lines.told.send(Told { name: job.name, outcome: None });
                continue;
            }
            let told = match self.push_one(&job, lines) {
                Ok(Some(outcome)) => Told { name: job.name, outcome: Some(outcome) },
                Ok(None) => continue,
                Err(_) if !ready(&self.options.wal, &job.name).exists() => Told { name: job.name, outcome: None },
                Err(error) => Told { name: job.name, outcome: Some(Outcome::failed(&error)) },
            };
            _ = lines.told.send(told);
        }
    }

    fn is_held(&self, name: &str) -> bool {
        self.conflict.lock().as_deref().is_some_and(|at| turn(name) > turn(at))
    }

    /// Pushes one file; `None` when its fate is known only after it was listed.
    fn push_one(&self, job: &Job, lines: &Lines) -> Result<Option<Outcome>> {
        let path = self.options.wal.join(&job.name);
        let Ok(segment) = job.name.parse::<SegmentName>() else {
            // few and small; and a history file has a name that could be overwritten
            return self.push_alone(&path).map(Some);
        };
        let (file, about) = {
            let _token = Token::take(&lines.tokens);
            let before = Stamp::of(&path)?;
            let level = job.there.is_empty().then_some(self.options.level);
            let (file, about) = if before.is_settled(SystemTime::now()) {
                (WalFile::read_here(&self.repository, &path, level)?, About::File(before.clone()))
            } else {
                let (file, content) = WalFile::read_hashed(&self.repository, &path, level)?;
                (file, About::content(content))
            };
            // as long as it is to be archived, the server leaves it alone; after that it becomes another one under our hands
            let is_ready = ready(&self.options.wal, &job.name).exists();
            if !is_ready || before != Stamp::of(&path)? {
                return Err(changed(&path));
            }
            (file, about)
        };
        file.check(&self.database)?;
        match &job.there[..] {
            [] => {}
            [there] => {
                return file
                    .compare(&self.repository, &self.database, &there.key)
                    .map(|_| Some(Outcome::Archived { about }));
            }
            _ => return Err(twice(&job.name)),
        }
        let (key, stored) = (file.key(&self.repository, &self.database), file.pack(&self.repository, &self.database));
        drop(file);
        put(&self.repository, &key, stored)?;
        _ = lines.puts.send(Put { segment, about, key });
        Ok(None)
    }

    /// Archives what is no segment, and makes sure that what was archived is what was read here.
    fn push_alone(&self, path: &Path) -> Result<Outcome> {
        let hash = || Ok::<_, Error>(WalFile::read_hashed(&self.repository, path, None)?.1);
        let content = hash()?;
        push(&self.repository, path, self.options.level)?;
        if hash()? == content { Ok(Outcome::Archived { about: About::content(content) }) } else { Err(changed(path)) }
    }

    /// Lists what was put, as many at once as have come meanwhile, and says so.
    fn confirm_all(&self, puts: &Receiver<Put>, told: &Sender<Told>) {
        while let Ok(first) = puts.recv() {
            let mut group = vec![first];
            group.extend(puts.try_iter());
            group.sort_unstable_by_key(|put| put.segment);
            for of_timeline in group.chunk_by(|a, b| a.segment.timeline() == b.segment.timeline()) {
                let names: Vec<SegmentName> = of_timeline.iter().map(|put| put.segment).collect();
                let stored = self.repository.archive(&self.database).stored(&names);
                for (number, put) in of_timeline.iter().enumerate() {
                    let name = put.segment.to_string();
                    let outcome = match &stored {
                        Ok(stored) => confirm(put, &stored[number]),
                        Err(error) => Outcome::failed(error),
                    };
                    _ = told.send(Told { name, outcome: Some(outcome) });
                }
            }
        }
    }
}

fn confirm(put: &Put, stored: &[Listed]) -> Outcome {
    let name = put.segment.to_string();
    match stored {
        [one] if one.key == put.key => Outcome::Archived { about: put.about.clone() },
        [] => Outcome::failed(&not_listed(&name)),
        _ => Outcome::failed(&twice(&name)),
    }
}

/// Leave to use the processor.
struct Token<'a>(&'a Sender<()>);

impl<'a> Token<'a> {
    fn take(tokens: &'a (Sender<()>, Receiver<()>)) -> Self {
        _ = tokens.1.recv();
        Self(&tokens.0)
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        _ = self.0.send(());
    }
}
