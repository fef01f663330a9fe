//! A scanned data directory through the workers into the manifest: jobs out in path order, results back in any.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::assemble::{Assembler, Done, Later};
use super::cut::{Cutting, Worker};
use super::scan::{Scanned, ScannedKind};
use crate::error::{Error, Result};
use crate::format::{INLINE_BYTES, LEAF_BYTES};
use crate::progress::Monitor;

/// Files and bytes one batch of small files holds at most.
const BATCH_FILES: usize = 256;
const BATCH_BYTES: u64 = 4 * 1024 * 1024;
/// Jobs handed out beyond the first that is not complete: bounds what waits for its turn in the manifest.
const JOBS_AHEAD: usize = 64;

/// One piece of work for a worker.
enum Job {
    Batch(Vec<Scanned>),
    Leaf(Arc<Scanned>, u64),
    Later(Later),
}

/// Reads everything but pg_control; returns pg_control as it was found.
pub fn copy(
    cutting: &Cutting<'_>,
    found: Vec<Scanned>,
    workers: usize,
    assembler: &mut Assembler,
    monitor: &dyn Monitor,
) -> Result<Scanned> {
    let (job_queue, jobs) = bounded::<(usize, Job)>(workers);
    let (results_queue, results) = bounded::<Result<(usize, Done)>>(workers);
    let (ticket_queue, tickets) = bounded::<()>(JOBS_AHEAD);
    let total = AtomicUsize::new(usize::MAX);
    let control = Mutex::new(None);
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
        let (total, control) = (&total, &control);
        scope.spawn(move || {
            let count = hand_out(found, control, |number, job| {
                ticket_queue.send(()).is_ok() && job_queue.send((number, job)).is_ok()
            });
            total.store(count, Ordering::Release);
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
    let control = control.lock().take();
    control.ok_or_else(|| Error::new("global/pg_control vanished"))
}

/// Cuts the files into jobs; returns how many.
fn hand_out(found: Vec<Scanned>, control: &Mutex<Option<Scanned>>, send: impl Fn(usize, Job) -> bool) -> usize {
    let mut number = 0;
    let mut send = |job| {
        number += 1;
        send(number - 1, job)
    };
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for file in found {
        let large = file.is_file() && file.size > INLINE_BYTES;
        let is_control = file.kind == ScannedKind::Control;
        let full = batch.len() >= BATCH_FILES || bytes + file.size > BATCH_BYTES;
        if (large || is_control || full) && !batch.is_empty() {
            bytes = 0;
            if !send(Job::Batch(std::mem::take(&mut batch))) {
                return number;
            }
        }
        if large {
            let leaves = file.size.div_ceil(LEAF_BYTES);
            let file = Arc::new(file);
            if !(0..leaves).all(|leaf| send(Job::Leaf(file.clone(), leaf))) {
                return number;
            }
        } else if is_control {
            *control.lock() = Some(file);
            if !send(Job::Later(Later::Control)) {
                return number;
            }
        } else {
            let is_wal = &*file.path == b"pg_wal";
            bytes += file.size;
            batch.push(file);
            if is_wal && !(send(Job::Batch(std::mem::take(&mut batch))) && send(Job::Later(Later::Wal))) {
                return number;
            }
        }
    }
    if !batch.is_empty() {
        send(Job::Batch(batch));
    }
    number
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
        Job::Leaf(file, number) => {
            let bytes = file.size.min((number + 1) * LEAF_BYTES) - number * LEAF_BYTES;
            let part = worker.leaf(&file, number)?;
            Ok((Done::Leaf { file, number, part }, bytes))
        }
        Job::Batch(batch) => {
            let files: Vec<&Scanned> = batch.iter().filter(|found| found.is_file()).collect();
            let bytes = files.iter().map(|file| file.size).sum();
            let mut cuts = worker.small(&files)?.into_iter();
            let with_cut = |found: Scanned| match found.is_file() {
                true => (found, cuts.next()),
                false => (found, None),
            };
            Ok((Done::Small(batch.into_iter().map(with_cut).collect()), bytes))
        }
    }
}

#[cfg(test)]
mod tests;
