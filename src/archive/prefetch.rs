//! Archived WAL fetched ahead: a worker keeps the segments after the one last asked for in the spool, and `archive-get` takes
//! them from there.
//!
//! Nothing is ever known to be missing: what is not in the spool is asked of the archive itself, at that moment.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::spool::{Run, Spool};
use crate::error::{Error, Result};
use crate::files::{self, Outlives};
use crate::format::manifest::Database;
use crate::postgres::{SegmentName, SegmentSize};
use crate::read::wal::{TEMPORARY, deliver};
use crate::repo::Repository;
use crate::repo::asking::Asking;
use crate::store::Listed;
use crate::user::{User, as_user};

/// Holds the name of the segment that was last asked for.
const AT: &str = "at";

/// The shortest and the longest pause between two looks at what was asked for.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));

/// The pause between two looks for a segment that is just being fetched.
const WAIT_EVERY: Duration = Duration::from_millis(1);

/// Names that are looked for at once: one page of a listing serves many windows.
const LOOK_FOR: usize = 128;

/// How old the knowledge of whose stanza this is may be.
const INFO_AGE_MAX: Duration = Duration::from_secs(10);

/// What a worker needs to know.
#[derive(Clone, Debug)]
pub struct AheadOptions {
    /// bytes of segments in the spool at most; one segment always
    pub queue_bytes: u64,
    /// segments fetched at once
    pub process_max: usize,
    /// ends when nothing was asked for so long
    pub idle: Duration,
    /// the directory that segments are delivered to; without it nobody can ask
    pub wal: PathBuf,
    /// the cluster that asks; nothing of another one comes into its spool
    pub asking: Asking,
}

/// What the spool had.
#[derive(Debug, PartialEq, Eq)]
pub enum Taken {
    /// the segment is at its target now
    Delivered,
    /// it has to be asked of the archive
    NotHere,
}

fn staged(name: SegmentName, run: &str) -> String {
    format!("{name}.{run}")
}

/// Says that a segment is being fetched.
fn mark(name: SegmentName, run: &str) -> String {
    format!("{name}.{run}.coming")
}

/// Says what was found and is being delivered, so that what follows it is fetched.
pub fn follow(spool: &Spool, name: SegmentName) -> Result<()> {
    spool.write(AT, name.to_string().as_bytes())
}

/// Moves `name` from the spool to `target`, where it appears whole or not at all. Waits up to `timeout` for one that is
/// being fetched.
///
/// # Errors
/// Of the spool or of the target; the archive may still deliver.
pub fn take(spool: &Spool, name: SegmentName, target: &Path, timeout: Duration) -> Result<Taken> {
    let begun = Instant::now();
    loop {
        // a run that is gone left nothing that counts
        let Some(run) = spool.live_run()? else { return Ok(Taken::NotHere) };
        let is_coming = spool.file(&mark(name, &run)).exists();
        // after the mark: the segment is there before its mark goes
        let here = spool.file(&staged(name, &run));
        if here.exists() {
            // before it is taken, or it would be fetched again
            follow(spool, name)?;
            if move_to(&here, target)? {
                return Ok(Taken::Delivered);
            }
        }
        if !is_coming || begun.elapsed() >= timeout {
            return Ok(Taken::NotHere);
        }
        thread::sleep(WAIT_EVERY);
    }
}

/// False when there is no such file.
fn move_to(from: &Path, target: &Path) -> Result<bool> {
    let user = User::owner_of_place(target)?;
    // what is another user's is written as that user, and is that user's
    if user.is_none() {
        match fs::rename(from, target) {
            Ok(()) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
            Err(error) => return Err(Error::io("rename to", target, error)),
        }
    }
    let temporary = target.with_extension(TEMPORARY);
    let mut source = match files::open_regular(from) {
        Ok(source) => source,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("open", from, error)),
    };
    as_user(user.as_ref(), || {
        files::place(&temporary, target, Outlives::Process, |to| {
            let copied = fs::File::create(to).and_then(|mut file| io::copy(&mut source, &mut file));
            copied.map(drop).map_err(|error| Error::io("copy to", to, error))
        })
    })?;
    _ = fs::remove_file(from);
    Ok(true)
}

/// Fetches ahead until nothing was asked for a while; returns at once where another worker is alive.
pub fn fetch_ahead(spool: &Spool, options: &AheadOptions, open: &dyn Fn() -> Result<Repository>) -> Result<()> {
    // the call that started this worker has said what it wants
    let Some(run) = spool.begin(AT)? else { return Ok(()) };
    let repository = open()?;
    let database = database(&repository, &options.asking)?;
    let size = SegmentSize::new(database.wal_segment_size).map_err(|error| Error::new("archive.info").source(error))?;
    let depth = (options.queue_bytes / u64::from(size.bytes())).clamp(1, LOOK_FOR as u64) as usize;
    let (jobs, take_jobs) = bounded::<Job>(depth);
    let (done, hear) = unbounded();
    let fetched = thread::scope(|scope| {
        for _ in 0..options.process_max.min(depth) {
            let (jobs, done) = (take_jobs.clone(), done.clone());
            let (repository, database, run) = (&repository, &database, &run.id);
            scope.spawn(move || fetch_all(spool, run, repository, database, &jobs, &done));
        }
        let mut window = Window {
            spool,
            run: &run,
            repository: &repository,
            database: &database,
            asking: &options.asking,
            size,
            depth,
            at: None,
            known: BTreeMap::new(),
            busy: HashSet::new(),
            failed: HashSet::new(),
            looked_up: Instant::now(),
        };
        let followed = window.follow(options, &jobs, &hear);
        drop(jobs);
        followed
    });
    // a spool that is another's by now is none of our business
    if spool.check(&run).is_ok() {
        spool.names()?.iter().try_for_each(|name| spool.remove(name))?;
    }
    fetched
}

/// The cluster of the stanza whose WAL is fetched.
fn database(repository: &Repository, asking: &Asking) -> Result<Database> {
    let info = repository.archive_info()?;
    let newest = info.asked_for(&repository.stanza, Some(asking))?.into_iter().next();
    newest.cloned().ok_or_else(|| Error::new("archive.info names no cluster"))
}

fn fetch_all(
    spool: &Spool,
    run: &str,
    repository: &Repository,
    database: &Database,
    jobs: &Receiver<Job>,
    done: &Sender<(SegmentName, bool)>,
) {
    for job in jobs {
        let name = job.name;
        let target = spool.file(&staged(name, run));
        let fetched = deliver(repository, database, &name.to_string(), &job.key, &target, 1);
        let unmarked = spool.remove(&mark(name, run));
        let fetched = fetched.and(unmarked);
        if let Err(error) = &fetched {
            tracing::warn!(segment = %name, %error, "cannot be fetched ahead");
        }
        _ = done.send((name, fetched.is_ok()));
    }
}

struct Job {
    name: SegmentName,
    key: String,
}

/// The segments after the one last asked for.
struct Window<'a> {
    spool: &'a Spool,
    run: &'a Run,
    repository: &'a Repository,
    database: &'a Database,
    asking: &'a Asking,
    size: SegmentSize,
    depth: usize,
    at: Option<SegmentName>,
    /// what the archive has, as far as it was looked at: an archived object stays as it is
    known: BTreeMap<SegmentName, String>,
    busy: HashSet<SegmentName>,
    /// not tried again before something else is asked for
    failed: HashSet<SegmentName>,
    looked_up: Instant,
}

impl Window<'_> {
    /// Keeps the window filled until nobody asks any more, or the stanza is another cluster's.
    fn follow(
        &mut self,
        options: &AheadOptions,
        jobs: &Sender<Job>,
        hear: &Receiver<(SegmentName, bool)>,
    ) -> Result<()> {
        let mut active = Instant::now();
        let mut heard = None;
        loop {
            for (name, fetched) in heard.take().into_iter().chain(hear.try_iter()) {
                self.busy.remove(&name);
                if !fetched {
                    self.failed.insert(name);
                }
            }
            let asked = self.asked()?;
            if asked != self.at {
                self.at = asked;
                active = Instant::now();
                self.failed.clear();
                if !self.look()? {
                    return Ok(());
                }
            }
            self.spool.check(self.run)?;
            self.fill(jobs)?;
            if active.elapsed() >= options.idle || !options.wal.exists() {
                return Ok(());
            }
            let pause = (active.elapsed() / 20).clamp(LOOK_EVERY.0, LOOK_EVERY.1);
            heard = hear.recv_timeout(pause).ok();
        }
    }

    fn asked(&self) -> Result<Option<SegmentName>> {
        let text = self.spool.read(AT)?.unwrap_or_default();
        Ok(String::from_utf8(text).ok().and_then(|text| text.parse().ok()))
    }

    fn following(&self, count: usize) -> Vec<SegmentName> {
        let next = |name: &SegmentName| name.next(self.size);
        self.at.into_iter().flat_map(|at| std::iter::successors(next(&at), next).take(count)).collect()
    }

    /// Looks for the window's segments in the archive, where that is not known. False when the stanza has changed.
    fn look(&mut self) -> Result<bool> {
        if self.following(self.depth).iter().all(|name| self.known.contains_key(name)) {
            return Ok(true);
        }
        let names = self.following(LOOK_FOR.max(self.depth));
        let found = || -> Result<Option<_>> {
            if self.looked_up.elapsed() > INFO_AGE_MAX && database(self.repository, self.asking)? != *self.database {
                return Ok(None);
            }
            self.repository.archive(self.database).stored(&names).map(Some)
        };
        match found() {
            Ok(Some(stored)) => {
                self.looked_up = Instant::now();
                // of two contents under one name, the call itself will complain
                let one = |(name, mut stored): (SegmentName, Vec<Listed>)| match stored.len() {
                    1 => stored.pop().map(|object| (name, object.key)),
                    _ => None,
                };
                self.known = names.into_iter().zip(stored).filter_map(one).collect();
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(error) => {
                tracing::warn!(%error, "the archive cannot be listed");
                Ok(true)
            }
        }
    }

    /// Has fetched what is missing in the window, and takes away what is outside.
    fn fill(&mut self, jobs: &Sender<Job>) -> Result<()> {
        let window = self.following(self.depth);
        let mut here = HashSet::new();
        for file in self.spool.names()? {
            let Some(name) = file.strip_suffix(&self.run.id).and_then(|name| name.strip_suffix('.')?.parse().ok())
            else {
                continue;
            };
            // the one asked for is about to be taken
            if window.contains(&name) || self.at == Some(name) {
                here.insert(name);
            } else {
                self.spool.remove(&file)?;
            }
        }
        for name in window {
            if here.contains(&name) || self.busy.contains(&name) || self.failed.contains(&name) {
                continue;
            }
            let Some(key) = self.known.get(&name) else { continue };
            if self.busy.len() == self.depth {
                break;
            }
            if let Err(error) = self.spool.write(&mark(name, &self.run.id), b"") {
                tracing::warn!(%error, "the spool takes nothing");
                self.failed.insert(name);
                continue;
            }
            self.busy.insert(name);
            // there is room for as many as may be busy
            _ = jobs.send(Job { name, key: key.clone() });
        }
        Ok(())
    }
}
