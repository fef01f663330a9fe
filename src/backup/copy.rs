//! A data directory through the workers into the manifest: a supply hands out jobs, results come back in any order. A scanned
//! directory is one supply, in path order; a stream from the server is the other ([`super::stream`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;

use super::assemble::{Assembler, Done, Later};
use super::chunker::{Cut, Cutting, Worker};
use super::parent::{Known, ParentFiles};
use super::scan::{Scanned, ScannedKind};
use super::source::Origin;
use crate::error::{Error, Result};
use crate::format::manifest::File;
use crate::format::{INLINE_BYTES, LEAF_BYTES};
use crate::interrupt;
use crate::progress::Monitor;

/// Files and bytes one batch of small files holds at most.
const BATCH_FILES: usize = 256;
const BATCH_BYTES: u64 = 4 * 1024 * 1024;
/// How often the server is asked whether it still runs.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// Jobs handed out beyond the first that is not complete: bounds what waits for its turn in the manifest.
const JOBS_AHEAD: usize = 64;

/// One piece of work for a worker.
#[derive(Debug)]
enum Job {
    Batch(Vec<Small>),
    Leaf(Arc<Scanned>, u64, Option<Arc<File>>, Origin),
    Same(Scanned, Arc<File>),
    Later(Later),
}

/// A small file, a directory or a link of a batch.
#[derive(Debug)]
struct Small {
    found: Scanned,
    known: Known,
    origin: Origin,
}

impl Small {
    fn is_read(&self) -> bool {
        self.found.is_file() && !matches!(self.known, Known::Same(_))
    }
}

/// Where jobs come from.
pub trait Supply: Send {
    /// What it knows when all was handed out.
    type End: Send;

    /// Hands out everything, in the order of the manifest unless that sorts. `None` when nobody takes jobs any more, because a
    /// worker failed.
    fn hand_out(self, jobs: &mut Jobs) -> Result<Option<Self::End>>;
}

/// A scanned directory, in path order. Its end is pg_control as it was found.
pub struct Files {
    /// what was found
    pub found: Vec<Scanned>,
    /// the parent's files, to compare with
    pub parent: Option<ParentFiles>,
}

/// Has the workers read all that `supply` hands out; returns what that knows at its end. `alive` is asked again and again
/// whether the backup can still succeed.
pub fn copy<S: Supply>(
    cutting: &Cutting<'_>,
    supply: S,
    workers: usize,
    assembler: &mut Assembler,
    monitor: &dyn Monitor,
    alive: &mut dyn FnMut() -> Result<()>,
) -> Result<S::End> {
    let (job_queue, jobs) = bounded::<(usize, Job)>(workers);
    let (results_queue, results) = bounded::<Result<(usize, Done)>>(workers);
    let (ticket_queue, tickets) = bounded::<()>(JOBS_AHEAD);
    let total = AtomicUsize::new(usize::MAX);
    let handed = Mutex::new(None);
    let index_worker = Mutex::new(Worker::new(cutting)?);
    let index = |plain: &[u8]| index_worker.lock().index(plain);
    let copied = std::thread::scope(|scope| {
        // moved in, so that every exit from here closes the queues and lets the threads end
        let (results, tickets) = (results, tickets);
        for _ in 0..workers {
            let (jobs, results_queue) = (jobs.clone(), results_queue.clone());
            scope.spawn(move || work(cutting, &jobs, &results_queue, monitor));
        }
        drop((jobs, results_queue));
        let (total, handed) = (&total, &handed);
        scope.spawn(move || {
            let mut jobs = Jobs { number: 0, batch: Vec::new(), bytes: 0, tickets: ticket_queue, queue: job_queue };
            *handed.lock() = Some(supply.hand_out(&mut jobs));
            total.store(jobs.number, Ordering::Release);
        });
        let (mut complete, mut asked) = (0, Instant::now());
        loop {
            if asked.elapsed() >= ALIVE_EVERY {
                // a worker in the middle of a large file must not store the rest of it
                alive().inspect_err(|_| cutting.uploads.give_up())?;
                asked = Instant::now();
            }
            let (number, done) = match results.recv_timeout(ALIVE_EVERY) {
                Ok(result) => result?,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            let now = assembler.take(number, done, &index)?;
            (complete..now).for_each(|_| _ = tickets.recv());
            complete = now;
        }
        match complete == total.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(Error::new("a worker died")),
        }
    });
    // a supply that breaks off fails the workers that wait for it: what it says is the reason
    let end = handed.lock().take().transpose()?.flatten();
    copied?;
    end.ok_or_else(|| Error::new("not everything was handed out"))
}

/// Numbers jobs and hands them to the workers. False means that nobody takes jobs any more.
#[derive(Debug)]
pub struct Jobs {
    number: usize,
    batch: Vec<Small>,
    /// to be read for the batch
    bytes: u64,
    tickets: Sender<()>,
    queue: Sender<(usize, Job)>,
}

impl Jobs {
    fn send(&mut self, job: Job) -> bool {
        self.number += 1;
        self.tickets.send(()).is_ok() && self.queue.send((self.number - 1, job)).is_ok()
    }

    /// A small file, a directory or a link.
    pub fn small(&mut self, found: Scanned, known: Known, origin: Origin) -> bool {
        let small = Small { found, known, origin };
        let to_read = if small.is_read() { small.found.size } else { 0 };
        let is_full = self.batch.len() >= BATCH_FILES || self.bytes + to_read > BATCH_BYTES;
        if is_full && !self.flush() {
            return false;
        }
        self.bytes += to_read;
        self.batch.push(small);
        true
    }

    /// Hands out the small files that wait for their batch to be full.
    pub fn flush(&mut self) -> bool {
        self.bytes = 0;
        self.batch.is_empty() || {
            let batch = std::mem::take(&mut self.batch);
            self.send(Job::Batch(batch))
        }
    }

    /// The next leaf of a large file, and the parent's state of the file. Leaves of one file follow each other.
    pub fn leaf(&mut self, file: &Arc<Scanned>, number: u64, old: Option<&Arc<File>>, origin: Origin) -> bool {
        self.flush() && self.send(Job::Leaf(file.clone(), number, old.cloned(), origin))
    }

    /// A large file as the parent has it.
    fn same(&mut self, found: Scanned, file: Arc<File>) -> bool {
        self.flush() && self.send(Job::Same(found, file))
    }

    /// The place of what is read later.
    fn later(&mut self, later: Later) -> bool {
        self.flush() && self.send(Job::Later(later))
    }
}

impl Supply for Files {
    type End = Scanned;

    fn hand_out(mut self, jobs: &mut Jobs) -> Result<Option<Scanned>> {
        let mut control = None;
        for file in self.found {
            let known = match &mut self.parent {
                Some(parent) if file.is_file() => parent.find(&file)?,
                _ => Known::New,
            };
            let is_wal = &*file.path == b"pg_wal";
            let sent = if file.kind == ScannedKind::Control {
                control = Some(file);
                jobs.later(Later::Control)
            } else if file.is_file() && file.size > INLINE_BYTES {
                large(jobs, file, known)
            } else {
                jobs.small(file, known, Origin::Disk) && (!is_wal || jobs.later(Later::Wal))
            };
            if !sent {
                return Ok(None);
            }
        }
        let control = control.ok_or_else(|| Error::new("global/pg_control vanished"))?;
        Ok(jobs.flush().then_some(control))
    }
}

fn large(jobs: &mut Jobs, file: Scanned, known: Known) -> bool {
    let old = match known {
        Known::Same(old) => return jobs.same(file, old),
        Known::Changed(old) => Some(old),
        Known::New => None,
    };
    let leaves = file.size.div_ceil(LEAF_BYTES);
    let file = Arc::new(file);
    (0..leaves).all(|leaf| jobs.leaf(&file, leaf, old.as_ref(), Origin::Disk))
}

fn work(
    cutting: &Cutting<'_>,
    jobs: &Receiver<(usize, Job)>,
    results: &Sender<Result<(usize, Done)>>,
    monitor: &dyn Monitor,
) {
    let run = || -> Result<()> {
        let mut worker = Worker::new(cutting)?;
        while let Ok((number, job)) = jobs.recv() {
            interrupt::check()?;
            let (done, bytes) = one(&mut worker, job)?;
            monitor.advance(bytes);
            if results.send(Ok((number, done))).is_err() {
                return Ok(());
            }
        }
        worker.finish()
    };
    if let Err(error) = run() {
        _ = results.send(Err(error));
    }
}

fn one(worker: &mut Worker<'_>, job: Job) -> Result<(Done, u64)> {
    match job {
        Job::Later(later) => Ok((Done::Later(later), 0)),
        Job::Leaf(file, number, old, origin) => {
            let bytes = file.size.min((number + 1) * LEAF_BYTES) - number * LEAF_BYTES;
            let part = worker.leaf(&file, number, old.as_deref(), &origin)?;
            Ok((Done::Leaf { file, number, part }, bytes))
        }
        Job::Same(found, file) => {
            let (weights, bytes) = (worker.weights(&file)?, found.size);
            Ok((Done::Same(found, file, weights), bytes))
        }
        Job::Batch(batch) => {
            let read = batch.iter().filter(|small| small.is_read());
            let files: Vec<_> = read.map(|small| (&small.found, small.known.changed(), &small.origin)).collect();
            let bytes = batch.iter().map(|small| small.found.size).sum();
            let mut cuts = worker.small(&files)?.into_iter();
            let with_cut = |Small { found, known, .. }| match (found.is_file(), known) {
                (true, Known::Same(file)) => (found, Some(Cut::Same(file))),
                (true, _) => (found, cuts.next()),
                (false, _) => (found, None),
            };
            Ok((Done::Small(batch.into_iter().map(with_cut).collect()), bytes))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
