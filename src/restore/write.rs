//! Files of a view written out in parallel, each proved by the checksum that the backup computed.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::fcntl::OFlag;
use parking_lot::Mutex;

use super::RestoreOptions;
use super::delta::Delta;
use super::plan::Target;
use super::small::{Batch, Piece, add_pieces, in_batches, is_small};
use crate::error::{Error, Result};
use crate::format::LEAF_BYTES;
use crate::format::chunk::ChunkRef;
use crate::interrupt;
use crate::progress::Monitor;
use crate::read::fetch::Stored;
use crate::read::tree::Owner;
use crate::read::view::{NodeIndex, View};
use crate::user::{User, as_user};

/// What one worker does at a time.
enum Work<'a> {
    /// one part of a large file
    Part(&'a Target, u64),
    /// several files, by their numbers, each written or compared for itself
    Files(Vec<usize>),
    /// pieces of small files whose chunks were fetched
    Pieces(Pieces, Stored),
}

/// Pieces of small files whose chunks one request fetches.
struct Pieces {
    batch: Arc<Batch>,
    range: Range<usize>,
}

/// Writes `files`; those that are there are made equal by `delta`.
pub(super) fn write_files(
    view: &View,
    files: &[&Target],
    delta: Option<&Delta<'_>>,
    options: &RestoreOptions,
    monitor: &dyn Monitor,
) -> Result<()> {
    let writing = Writing {
        view,
        files,
        owner: options.owner,
        user: options.owner.and_then(|owner| User::other(owner.uid, owner.gid)),
        monitor,
        delta,
        workers: options.process_max.max(1),
        parts: Mutex::default(),
        differing: Mutex::default(),
        unfinished: Mutex::default(),
        failure: Mutex::default(),
    };
    // small files that are not there need no look at them
    let is_absent = |file: &&Target| delta.is_none() && is_small(view, file);
    writing.run(|queue, _| writing.cut(|file| !is_absent(&file), |work| queue.send(work).is_ok()))?;
    let differing = std::mem::take(&mut *writing.differing.lock());
    let absent = files.iter().enumerate().filter(|(_, file)| is_absent(file)).flat_map(|(number, file)| {
        let mut pieces = Vec::new();
        add_pieces(view, file, number as u32, &[(0, file.size)], &mut pieces);
        pieces
    });
    let wanted = differing.into_iter().chain(absent);
    writing.run(|_, requests| {
        in_batches(view, wanted, |batch| {
            let batch = Arc::new(batch);
            let send = |range| requests.send(Pieces { batch: batch.clone(), range }).is_ok();
            batch.requests(view).into_iter().all(send)
        });
    })?;
    if let Some(number) = writing.unfinished.lock().keys().next() {
        return Err(Error::new(format!("{} was not written whole", files[*number as usize].path.display())));
    }
    files.iter().filter(|file| file.size > LEAF_BYTES).try_for_each(|file| writing.finish_large(file))
}

/// Ranges from this size on are on their way to the disk while the next are made; the end of a restore waits for the rest.
const EARLY_BYTES: u64 = 1 << 20;

/// What the threads that write share.
struct Writing<'a> {
    view: &'a View,
    files: &'a [&'a Target],
    owner: Option<Owner>,
    /// as whom files are made
    user: Option<User>,
    monitor: &'a dyn Monitor,
    /// compares what is there
    delta: Option<&'a Delta<'a>>,
    workers: usize,
    /// what was written of large files, whose parts end in any order
    parts: Mutex<HashMap<NodeIndex, Vec<Part>>>,
    /// what of small files is not as in the backup
    differing: Mutex<Vec<Piece>>,
    /// small files of more than one piece, by their numbers: bytes that are still to be written, and what is there
    unfinished: Mutex<HashMap<u32, (u64, Vec<Part>)>>,
    /// the first error, which stops everything
    failure: Mutex<Option<Error>>,
}

/// A run of bytes that was written: where in the file it begins, its length and its CRC32C.
pub(super) type Part = (u64, usize, u32);

impl<'a> Writing<'a> {
    /// Runs as many threads that fetch, and as many that write, while `feed` gives them work.
    fn run(&self, feed: impl FnOnce(&Sender<Work<'a>>, &Sender<Pieces>)) -> Result<()> {
        std::thread::scope(|scope| {
            let (queue, work) = bounded::<Work<'a>>(self.workers);
            let (requests, to_fetch) = bounded::<Pieces>(self.workers);
            for _ in 0..self.workers {
                let (queue, work, to_fetch) = (queue.clone(), work.clone(), to_fetch.clone());
                scope.spawn(move || self.note(self.fetch(&to_fetch, &queue)));
                scope.spawn(move || self.note(self.work(&work)));
            }
            drop((work, to_fetch));
            feed(&queue, &requests);
        });
        self.failure.lock().take().map_or(Ok(()), Err)
    }

    fn note(&self, done: Result<()>) {
        if let Err(error) = done {
            self.failure.lock().get_or_insert(error);
        }
    }

    fn has_failed(&self) -> bool {
        self.failure.lock().is_some()
    }

    /// Sends the files that `wanted` names, large ones in parts, until `send` says that nobody takes them any more.
    fn cut(&self, wanted: impl Fn(&'a Target) -> bool, send: impl Fn(Work<'a>) -> bool) {
        let is_large = |file: &Target| file.size > LEAF_BYTES;
        // parts of different files in turns: the kernel lets one thread at a time write to a file
        let mut waiting = self.files.iter().copied().filter(|file| is_large(file));
        let mut begun: Vec<(&Target, u64)> = Vec::new();
        loop {
            begun.extend(waiting.by_ref().take(self.workers - begun.len()).map(|file| (file, 0)));
            if begun.is_empty() {
                break;
            }
            for (file, part) in &mut begun {
                if !send(Work::Part(file, *part)) {
                    return;
                }
                *part += 1;
            }
            begun.retain(|(file, part)| part * LEAF_BYTES < file.size);
        }
        let (mut some, mut bytes) = (Vec::new(), 0);
        for (number, file) in self.files.iter().enumerate().filter(|(_, file)| !is_large(file) && wanted(file)) {
            bytes += file.size;
            some.push(number);
            if bytes >= LEAF_BYTES / 4 || some.len() >= 256 {
                bytes = 0;
                if !send(Work::Files(std::mem::take(&mut some))) {
                    return;
                }
            }
        }
        send(Work::Files(some));
    }

    /// Fetches what `requests` name and hands it to those who write.
    fn fetch(&self, requests: &Receiver<Pieces>, queue: &Sender<Work<'a>>) -> Result<()> {
        let mut chunks: Vec<ChunkRef> = Vec::new();
        while let Ok(pieces) = requests.recv() {
            interrupt::check()?;
            if self.has_failed() {
                break;
            }
            chunks.clear();
            chunks.extend(pieces.each().map(|piece| *self.view.chunk(piece.chunk)));
            chunks.dedup();
            let stored = self.view.fetcher().stored(&chunks)?;
            if queue.send(Work::Pieces(pieces, stored)).is_err() {
                break;
            }
        }
        Ok(())
    }

    fn work(&self, work: &Receiver<Work<'a>>) -> Result<()> {
        let mut plain = Vec::new();
        while let Ok(work) = work.recv() {
            interrupt::check()?;
            if self.has_failed() {
                break;
            }
            match work {
                Work::Part(target, part) => {
                    let from = part * LEAF_BYTES;
                    let (_, crc, len) = self.range(target, from, target.size.min(from + LEAF_BYTES))?;
                    self.parts.lock().entry(target.node).or_default().push((from, len, crc));
                }
                Work::Files(numbers) => numbers.into_iter().try_for_each(|number| self.file(number))?,
                Work::Pieces(pieces, stored) => self.pieces(&pieces, &stored, &mut plain)?,
            }
        }
        Ok(())
    }

    /// Writes a file of one part, or finds out what of a small one differs.
    fn file(&self, number: usize) -> Result<()> {
        let target = self.files[number];
        match self.delta.filter(|_| is_small(self.view, target)) {
            Some(delta) => {
                let (file, compared) = delta.small(target)?;
                self.monitor.advance(compared.equal);
                if compared.differing.is_empty() {
                    self.prove(target, whole_crc(compared.parts))?;
                    return self.finish(&file, target);
                }
                let mut pieces = Vec::new();
                add_pieces(self.view, target, number as u32, &compared.differing, &mut pieces);
                self.unfinished.lock().insert(number as u32, (target.size - compared.equal, compared.parts));
                self.differing.lock().append(&mut pieces);
                Ok(())
            }
            None => {
                let (file, crc, _) = self.range(target, 0, target.size)?;
                self.prove(target, crc)?;
                self.finish(&file, target)
            }
        }
    }

    /// Decodes each chunk once and writes every piece of it.
    fn pieces(&self, pieces: &Pieces, stored: &Stored, plain: &mut Vec<u8>) -> Result<()> {
        let mut chunk = None;
        for piece in pieces.each() {
            if chunk != Some(piece.chunk) {
                self.view.fetcher().unseal(stored, self.view.chunk(piece.chunk), plain)?;
                chunk = Some(piece.chunk);
            }
            let from = piece.offset as usize;
            self.piece(piece, &plain[from..from + piece.len as usize])?;
        }
        Ok(())
    }

    fn piece(&self, piece: &Piece, bytes: &[u8]) -> Result<()> {
        let target = self.files[piece.file as usize];
        let file = self.open(target)?;
        file.write_all_at(bytes, u64::from(piece.at)).map_err(|error| Error::io("write", &target.path, error))?;
        self.monitor.advance(bytes.len() as u64);
        let crc = crc32c::crc32c(bytes);
        if bytes.len() as u64 == target.size {
            self.unfinished.lock().remove(&piece.file);
            self.prove(target, crc)?;
            return self.finish(&file, target);
        }
        let whole = {
            let mut unfinished = self.unfinished.lock();
            let (left, parts) = unfinished.entry(piece.file).or_insert((target.size, Vec::new()));
            parts.push((u64::from(piece.at), bytes.len(), crc));
            *left -= bytes.len() as u64;
            (*left == 0).then(|| unfinished.remove(&piece.file)).flatten()
        };
        match whole {
            Some((_, parts)) => self.prove(target, whole_crc(parts)).and_then(|()| self.finish(&file, target)),
            None => Ok(()),
        }
    }

    /// Opens a file to write to it; without a delta restore it may have to be made.
    fn open(&self, target: &Target) -> Result<File> {
        as_user(self.user.as_ref(), || {
            let mut options = OpenOptions::new();
            options.write(true).create(self.delta.is_none()).truncate(false).mode(0o600);
            options.custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits());
            options.open(&target.path).map_err(|error| Error::io("write", &target.path, error))
        })
    }

    /// Writes a range of a file; gives the file, and CRC32C and length of what was written.
    fn range(&self, target: &Target, from: u64, to: u64) -> Result<(File, u32, usize)> {
        if let Some(delta) = self.delta {
            let made = delta.range(target, from, to)?;
            self.monitor.advance(to - from);
            return Ok(made);
        }
        let file = self.open(target)?;
        let mut parts = Vec::new();
        self.view.each_range(target.node, from, to, &mut |at, bytes| {
            add_part(&mut parts, at, bytes);
            file.write_all_at(bytes, at).map_err(|error| Error::io("write", &target.path, error))
        })?;
        if to - from >= EARLY_BYTES {
            write_out(&file, from, to - from);
        }
        self.monitor.advance(to - from);
        Ok((file, whole_crc(parts), (to - from) as usize))
    }

    /// A large file of which every part was written.
    fn finish_large(&self, target: &Target) -> Result<()> {
        self.prove(target, whole_crc(self.parts.lock().remove(&target.node).unwrap_or_default()))?;
        let file = as_user(self.user.as_ref(), || {
            let file = OpenOptions::new()
                .write(true)
                .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
                .open(&target.path);
            file.map_err(|error| Error::io("open", &target.path, error))
        })?;
        self.finish(&file, target)
    }

    /// Mode, owner and time of a file whose bytes are right.
    fn finish(&self, file: &File, target: &Target) -> Result<()> {
        match self.delta.is_some() && is_finished(file, target, self.owner)? {
            true => Ok(()),
            // the owner's already: it was made, or opened, as that user
            false if self.user.as_ref().is_some_and(|user| is_of(file, user)) => finish_file(file, target, None),
            false => as_user(self.user.as_ref(), || finish_file(file, target, self.owner)),
        }
    }

    /// Fails unless what was written has the checksum that the backup computed when it read the file.
    fn prove(&self, target: &Target, crc: u32) -> Result<()> {
        match self.view.crc(target.node)? {
            Some(expected) if expected != crc => Err(Error::new(format!(
                "{} came out with checksum {crc:08x}, the backup read it with {expected:08x}",
                target.path.display()
            ))
            .hint(
                "the memory of this machine or of the one that made the backup may be faulty; choose another backup",
            )),
            _ => Ok(()),
        }
    }
}

impl Pieces {
    fn each(&self) -> std::slice::Iter<'_, Piece> {
        self.batch.pieces[self.range.clone()].iter()
    }
}

/// Has the kernel begin to write a range to the disk, without waiting. What it cannot write fails the sync at the end.
#[expect(unsafe_code, reason = "nix has no sync_file_range")]
fn write_out(file: &File, from: u64, len: u64) {
    // SAFETY: a call with numbers alone, for a file that is open
    _ = unsafe { libc::sync_file_range(file.as_raw_fd(), from as i64, len as i64, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Adds a run of bytes; most come in order, and appending costs less than combining.
pub(super) fn add_part(parts: &mut Vec<Part>, at: u64, bytes: &[u8]) {
    match parts.last_mut() {
        Some((from, len, crc)) if *from + *len as u64 == at => {
            *crc = crc32c::crc32c_append(*crc, bytes);
            *len += bytes.len();
        }
        _ => parts.push((at, bytes.len(), crc32c::crc32c(bytes))),
    }
}

/// The checksum of a run from those of its parts, which may come in any order.
pub(super) fn whole_crc(mut parts: Vec<Part>) -> u32 {
    parts.sort_unstable();
    // to combine two costs as much as summing a thousand pages, and most runs are one part
    let whole = parts
        .into_iter()
        .reduce(|(at, len, crc), (_, more, part)| (at, len + more, crc32c::crc32c_combine(crc, part, more)));
    whole.map_or(0, |(_, _, crc)| crc)
}

fn is_finished(file: &File, target: &Target, owner: Option<Owner>) -> Result<bool> {
    let found = file.metadata().map_err(|error| Error::io("look at", &target.path, error))?;
    let is_owned = owner.is_none_or(|owner| (owner.uid, owner.gid) == (found.uid(), found.gid()));
    Ok(is_owned
        && found.mode() & 0o7777 == target.mode
        && (found.mtime(), found.mtime_nsec()) == (target.mtime.max(0), 0))
}

/// Writes a file of zeros that takes no space, where none is.
pub(super) fn write_zeros(target: &Target, owner: Option<Owner>) -> Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&target.path);
    let file = file.map_err(|error| Error::io("create", &target.path, error))?;
    file.set_len(target.size).map_err(|error| Error::io("set the length of", &target.path, error))?;
    finish_file(&file, target, owner)
}

fn is_of(file: &File, user: &User) -> bool {
    file.metadata().is_ok_and(|found| found.uid() == user.uid() && found.nlink() == 1)
}

fn finish_file(file: &File, target: &Target, owner: Option<Owner>) -> Result<()> {
    let fail = |error| Error::io("set mode and time of", &target.path, error);
    file.set_permissions(fs::Permissions::from_mode(target.mode)).map_err(fail)?;
    if let Some(owner) = owner {
        fchown(file, Some(owner.uid), Some(owner.gid))
            .map_err(|error| Error::io("change the owner of", &target.path, error))?;
    }
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(target.mtime.max(0) as u64);
    file.set_modified(modified).map_err(fail)
}
