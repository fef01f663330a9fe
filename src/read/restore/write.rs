//! Files of a view written out in parallel, each proved by the checksum that the backup computed.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, bounded};
use parking_lot::Mutex;

use super::delta::Delta;
use super::plan::Target;
use super::{RestoreOptions, give};
use crate::error::{Error, Result};
use crate::format::LEAF_BYTES;
use crate::progress::Monitor;
use crate::read::tree::Owner;
use crate::read::view::{NodeIndex, View};

/// One piece of a file, or several whole small files.
enum Piece {
    Part(Target, u64),
    Whole(Vec<Target>),
}

/// Writes `files`; those that are there are made equal by `delta`.
pub(super) fn write_files(
    view: &View,
    files: &[Target],
    delta: Option<&Delta<'_>>,
    options: &RestoreOptions,
    monitor: &dyn Monitor,
) -> Result<()> {
    let workers = options.process_max.max(1);
    let (queue, pieces) = bounded::<Piece>(workers * 2);
    let failure = Mutex::new(None);
    let writing = Writing { view, owner: options.owner, monitor, delta, parts: Mutex::default() };
    std::thread::scope(|scope| {
        let pieces = pieces;
        for _ in 0..workers {
            let (pieces, failure, writing) = (pieces.clone(), &failure, &writing);
            scope.spawn(move || {
                if let Err(error) = writing.pieces(&pieces) {
                    failure.lock().get_or_insert(error);
                }
            });
        }
        drop(pieces);
        cut(files, workers, |piece| queue.send(piece).is_ok());
        drop(queue);
    });
    match failure.into_inner() {
        Some(error) => Err(error),
        None => files.iter().filter(|file| file.size > LEAF_BYTES).try_for_each(|file| writing.finish_large(file)),
    }
}

/// Sends all pieces, until `send` says that nobody takes them any more.
fn cut(files: &[Target], workers: usize, send: impl Fn(Piece) -> bool) {
    let is_large = |file: &&Target| file.size > LEAF_BYTES;
    // parts of different files in turns: the kernel lets one thread at a time write to a file
    let mut waiting = files.iter().filter(is_large);
    let mut begun: Vec<(&Target, u64)> = Vec::new();
    loop {
        begun.extend(waiting.by_ref().take(workers - begun.len()).map(|file| (file, 0)));
        if begun.is_empty() {
            break;
        }
        for (file, part) in &mut begun {
            if !send(Piece::Part((*file).clone(), *part)) {
                return;
            }
            *part += 1;
        }
        begun.retain(|(file, part)| part * LEAF_BYTES < file.size);
    }
    let (mut small, mut bytes) = (Vec::new(), 0);
    for file in files.iter().filter(|file| !is_large(file)) {
        bytes += file.size;
        small.push(file.clone());
        if bytes >= LEAF_BYTES / 4 || small.len() >= 256 {
            bytes = 0;
            if !send(Piece::Whole(std::mem::take(&mut small))) {
                return;
            }
        }
    }
    send(Piece::Whole(small));
}

/// Ranges from this size on are on their way to the disk while the next are made; the end of a restore waits for the rest.
const EARLY_BYTES: u64 = 1 << 20;

/// What the threads that write share.
struct Writing<'a> {
    view: &'a View,
    owner: Option<Owner>,
    monitor: &'a dyn Monitor,
    /// compares what is there
    delta: Option<&'a Delta<'a>>,
    /// what was written of large files, whose parts end in any order
    parts: Mutex<HashMap<NodeIndex, Vec<Part>>>,
}

/// A run of bytes that was written: where in the file it begins, its length and its CRC32C.
pub(super) type Part = (u64, usize, u32);

impl Writing<'_> {
    fn pieces(&self, pieces: &Receiver<Piece>) -> Result<()> {
        while let Ok(piece) = pieces.recv() {
            match piece {
                Piece::Part(target, part) => {
                    let from = part * LEAF_BYTES;
                    let (_, crc, len) = self.range(&target, from, target.size.min(from + LEAF_BYTES))?;
                    self.parts.lock().entry(target.node).or_default().push((from, len, crc));
                }
                Piece::Whole(targets) => targets.iter().try_for_each(|target| {
                    let (file, crc, _) = self.range(target, 0, target.size)?;
                    self.prove(target, crc)?;
                    self.finish(&file, target)
                })?,
            }
        }
        Ok(())
    }

    /// Writes a range of a file; gives the file, and CRC32C and length of what was written.
    fn range(&self, target: &Target, from: u64, to: u64) -> Result<(File, u32, usize)> {
        if let Some(delta) = self.delta {
            let made = delta.range(target, from, to)?;
            self.monitor.advance(to - from);
            return Ok(made);
        }
        let fail = |error| Error::io("write", &target.path, error);
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&target.path).map_err(fail)?;
        let mut parts = Vec::new();
        self.view.each_range(target.node, from, to, &mut |at, bytes| {
            add_part(&mut parts, at, bytes);
            file.write_all_at(bytes, at).map_err(fail)
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
        let file = OpenOptions::new().write(true).open(&target.path);
        self.finish(&file.map_err(|error| Error::io("open", &target.path, error))?, target)
    }

    /// Mode, owner and time of a file whose bytes are right.
    fn finish(&self, file: &File, target: &Target) -> Result<()> {
        match self.delta.is_some() && is_finished(file, target, self.owner)? {
            true => Ok(()),
            false => finish_file(file, target, self.owner),
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

fn finish_file(file: &File, target: &Target, owner: Option<Owner>) -> Result<()> {
    let fail = |error| Error::io("set mode and owner of", &target.path, error);
    file.set_permissions(fs::Permissions::from_mode(target.mode)).map_err(fail)?;
    give(&target.path, owner)?;
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(target.mtime.max(0) as u64);
    file.set_modified(modified).map_err(fail)
}
