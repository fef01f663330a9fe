//! A scanned data directory through the workers into the manifest: jobs out in path order, results back in any.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::assemble::{Assembler, Done, Later};
use super::cut::{Cut, Cutting, Worker};
use super::parent::{Known, ParentFiles};
use super::scan::{Scanned, ScannedKind};
use crate::error::{Error, Result};
use crate::format::manifest::File;
use crate::format::{INLINE_BYTES, LEAF_BYTES};
use crate::progress::Monitor;

/// Files and bytes one batch of small files holds at most.
const BATCH_FILES: usize = 256;
const BATCH_BYTES: u64 = 4 * 1024 * 1024;
/// Jobs handed out beyond the first that is not complete: bounds what waits for its turn in the manifest.
const JOBS_AHEAD: usize = 64;

/// One piece of work for a worker.
enum Job {
    Batch(Vec<(Scanned, Known)>),
    Leaf(Arc<Scanned>, u64, Option<Arc<File>>),
    Same(Scanned, Arc<File>),
    Later(Later),
}

/// What is to be copied, in path order.
pub struct Files {
    /// what was found
    pub found: Vec<Scanned>,
    /// the parent's files, to compare with
    pub parent: Option<ParentFiles>,
    /// the second in which looking for files began
    pub now: i64,
}

/// Reads everything but pg_control; returns pg_control as it was found.
pub fn copy(
    cutting: &Cutting<'_>,
    files: Files,
    workers: usize,
    assembler: &mut Assembler,
    monitor: &dyn Monitor,
) -> Result<Scanned> {
    let (job_queue, jobs) = bounded::<(usize, Job)>(workers);
    let (results_queue, results) = bounded::<Result<(usize, Done)>>(workers);
    let (ticket_queue, tickets) = bounded::<()>(JOBS_AHEAD);
    let total = AtomicUsize::new(usize::MAX);
    let handed = Mutex::new(None);
    let index_worker = Mutex::new(Worker::new(cutting)?);
    let index = |plain: &[u8]| index_worker.lock().index(plain);
    std::thread::scope(|scope| {
        // moved in, so that every exit from here closes the queues and lets the threads end
        let (results, tickets) = (results, tickets);
        for _ in 0..workers {
            let (jobs, results_queue) = (jobs.clone(), results_queue.clone());
            scope.spawn(move || work(cutting, &jobs, &results_queue, monitor));
        }
        drop((jobs, results_queue));
        let (total, handed) = (&total, &handed);
        scope.spawn(move || {
            let mut jobs = Jobs {
                number: 0,
                send: |number, job| ticket_queue.send(()).is_ok() && job_queue.send((number, job)).is_ok(),
            };
            *handed.lock() = Some(jobs.hand_out(files));
            total.store(jobs.number, Ordering::Release);
        });
        let mut complete = 0;
        while let Ok(result) = results.recv() {
            let (number, done) = result?;
            let now = assembler.take(number, done, &index)?;
            (complete..now).for_each(|_| _ = tickets.recv());
            complete = now;
        }
        match complete == total.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(Error::new("a worker died")),
        }
    })?;
    let control = handed.lock().take().transpose()?.flatten();
    control.ok_or_else(|| Error::new("global/pg_control vanished"))
}

/// Numbers jobs and hands them to the workers.
struct Jobs<F> {
    number: usize,
    send: F,
}

impl<F: Fn(usize, Job) -> bool> Jobs<F> {
    /// False when nobody takes jobs any more.
    fn send(&mut self, job: Job) -> bool {
        self.number += 1;
        (self.send)(self.number - 1, job)
    }

    /// Cuts the files into jobs; returns pg_control.
    fn hand_out(&mut self, mut files: Files) -> Result<Option<Scanned>> {
        let (mut batch, mut bytes, mut control) = (Vec::new(), 0, None);
        for file in files.found {
            let known = match &mut files.parent {
                Some(parent) if file.is_file() => parent.find(&file, files.now)?,
                _ => Known::New,
            };
            let large = file.is_file() && file.size > INLINE_BYTES;
            let is_control = file.kind == ScannedKind::Control;
            let to_read = if matches!(known, Known::Same(_)) { 0 } else { file.size };
            let full = batch.len() >= BATCH_FILES || bytes + to_read > BATCH_BYTES;
            if (large || is_control || full) && !batch.is_empty() {
                bytes = 0;
                if !self.send(Job::Batch(std::mem::take(&mut batch))) {
                    break;
                }
            }
            let is_wal = &*file.path == b"pg_wal";
            let sent = if large {
                self.large(file, known)
            } else if is_control {
                control = Some(file);
                self.send(Job::Later(Later::Control))
            } else {
                bytes += to_read;
                batch.push((file, known));
                !is_wal || self.send(Job::Batch(std::mem::take(&mut batch))) && self.send(Job::Later(Later::Wal))
            };
            if !sent {
                break;
            }
        }
        if !batch.is_empty() {
            self.send(Job::Batch(batch));
        }
        Ok(control)
    }

    fn large(&mut self, file: Scanned, known: Known) -> bool {
        let old = match known {
            Known::Same(old) => return self.send(Job::Same(file, old)),
            Known::Changed(old) => Some(old),
            Known::New => None,
        };
        let leaves = file.size.div_ceil(LEAF_BYTES);
        let file = Arc::new(file);
        (0..leaves).all(|leaf| self.send(Job::Leaf(file.clone(), leaf, old.clone())))
    }
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
        Job::Leaf(file, number, old) => {
            let bytes = file.size.min((number + 1) * LEAF_BYTES) - number * LEAF_BYTES;
            let part = worker.leaf(&file, number, old.as_deref())?;
            Ok((Done::Leaf { file, number, part }, bytes))
        }
        Job::Same(found, file) => {
            let (weights, bytes) = (worker.weights(&file)?, found.size);
            Ok((Done::Same(found, file, weights), bytes))
        }
        Job::Batch(batch) => {
            let to_read = |(file, known): &&(Scanned, Known)| file.is_file() && !matches!(known, Known::Same(_));
            let files: Vec<_> = batch.iter().filter(to_read).map(|(file, known)| (file, known.changed())).collect();
            let bytes = batch.iter().map(|(file, _)| file.size).sum();
            let mut cuts = worker.small(&files)?.into_iter();
            let with_cut = |(found, known): (Scanned, Known)| match (found.is_file(), known) {
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
