//! What the journal's frames say. A record states what is so from now on, never a step relative to what was:
//! replaying it is applying it.
//!
//! Integers are little-endian; a byte string is its length (u32) and its bytes; times are nanoseconds since 1970.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::bitmap::Run;
use crate::fs::Inode;
use crate::tree::Kind;

/// Attributes of a node the scratch knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeRecord {
    pub(crate) inode: Inode,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// 0: unlinked, but open
    pub(crate) links: u32,
    pub(crate) atime: i64,
    pub(crate) mtime: i64,
    pub(crate) ctime: i64,
    /// of a symbolic link born in the scratch
    pub(crate) target: OsString,
}

/// Where the content of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileRecord {
    pub(crate) inode: Inode,
    /// which backing file: `data/<inode>-<generation>`
    pub(crate) generation: u32,
    /// the backing file is all of the content, and its length the file's
    pub(crate) own: bool,
    /// the backing file was made durable under its name: it must be there
    pub(crate) durable: bool,
    /// of a file that is not own: its length in bytes
    pub(crate) size: u64,
    /// of a file that is not own: bytes of the tree's file that still count
    pub(crate) base_size: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// a daemon begins, on a machine booted as this
    Boot {
        id: String,
    },
    /// no inode from here on was given out yet
    NextInode {
        inode: Inode,
    },
    Node(NodeRecord),
    File(FileRecord),
    /// `name` is this inode (`None`: hides the tree's name)
    Name {
        directory: Inode,
        name: OsString,
        inode: Option<Inode>,
    },
    /// the scratch knows nothing about this name any more
    Unname {
        directory: Inode,
        name: OsString,
    },
    /// the node and its content are gone
    Gone {
        inode: Inode,
    },
    /// These pages are in the backing file, and the file is this long. Without `durable`, only as long as the machine
    /// has not been restarted since, for they were never forced to disk.
    Pages {
        inode: Inode,
        durable: bool,
        size: u64,
        mtime: i64,
        runs: Vec<Run>,
    },
    /// says nothing; carries the journal's durable offset
    Mark,
}

/// The bytes are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// The largest payload of one frame; a longer one is damage, or a bug.
pub(crate) const FRAME_MAX: usize = 16 << 20;

pub(crate) fn encode(records: &[Record], out: &mut Vec<u8>) {
    for record in records {
        record.encode(out);
    }
}

pub(crate) fn decode(mut bytes: &[u8]) -> Result<Vec<Record>, Malformed> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        records.push(Record::decode(&mut bytes)?);
    }
    Ok(records)
}

impl Record {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Boot { id } => {
                out.push(1);
                put_bytes(out, id.as_bytes());
            }
            Self::NextInode { inode } => {
                out.push(2);
                put_u64(out, *inode);
            }
            Self::Node(node) => {
                out.push(3);
                put_u64(out, node.inode);
                out.push(kind_code(node.kind));
                for value in [node.mode, node.uid, node.gid, node.links] {
                    put_u32(out, value);
                }
                for value in [node.atime, node.mtime, node.ctime] {
                    put_u64(out, value as u64);
                }
                put_bytes(out, node.target.as_bytes());
            }
            Self::File(file) => {
                out.push(4);
                put_u64(out, file.inode);
                put_u32(out, file.generation);
                out.push(u8::from(file.own) | u8::from(file.durable) << 1);
                put_u64(out, file.size);
                put_u64(out, file.base_size);
            }
            Self::Name { directory, name, inode } => {
                out.push(5);
                put_u64(out, *directory);
                put_bytes(out, name.as_bytes());
                put_u64(out, inode.unwrap_or(0));
            }
            Self::Unname { directory, name } => {
                out.push(6);
                put_u64(out, *directory);
                put_bytes(out, name.as_bytes());
            }
            Self::Gone { inode } => {
                out.push(7);
                put_u64(out, *inode);
            }
            Self::Pages { inode, durable, size, mtime, runs } => {
                out.push(8);
                put_u64(out, *inode);
                out.push(u8::from(*durable));
                put_u64(out, *size);
                put_u64(out, *mtime as u64);
                put_u32(out, runs.len() as u32);
                for run in runs {
                    put_u64(out, run.first);
                    put_u64(out, run.count);
                }
            }
            Self::Mark => out.push(9),
        }
    }

    fn decode(bytes: &mut &[u8]) -> Result<Self, Malformed> {
        Ok(match take_u8(bytes)? {
            1 => Self::Boot { id: String::from_utf8(take_bytes(bytes)?.to_vec()).map_err(|_| Malformed)? },
            2 => Self::NextInode { inode: take_u64(bytes)? },
            3 => Self::Node(NodeRecord {
                inode: take_u64(bytes)?,
                kind: kind_of(take_u8(bytes)?)?,
                mode: take_u32(bytes)?,
                uid: take_u32(bytes)?,
                gid: take_u32(bytes)?,
                links: take_u32(bytes)?,
                atime: take_u64(bytes)? as i64,
                mtime: take_u64(bytes)? as i64,
                ctime: take_u64(bytes)? as i64,
                target: OsString::from_vec(take_bytes(bytes)?.to_vec()),
            }),
            4 => {
                let (inode, generation, flags) = (take_u64(bytes)?, take_u32(bytes)?, take_u8(bytes)?);
                let (size, base_size) = (take_u64(bytes)?, take_u64(bytes)?);
                if flags > 3 || base_size > size {
                    return Err(Malformed);
                }
                Self::File(FileRecord {
                    inode,
                    generation,
                    own: flags & 1 != 0,
                    durable: flags & 2 != 0,
                    size,
                    base_size,
                })
            }
            5 => {
                let (directory, name) = (take_u64(bytes)?, take_name(bytes)?);
                let inode = take_u64(bytes)?;
                Self::Name { directory, name, inode: (inode != 0).then_some(inode) }
            }
            6 => Self::Unname { directory: take_u64(bytes)?, name: take_name(bytes)? },
            7 => Self::Gone { inode: take_u64(bytes)? },
            8 => {
                let (inode, durable) = (take_u64(bytes)?, take_u8(bytes)?);
                let (size, mtime) = (take_u64(bytes)?, take_u64(bytes)? as i64);
                if durable > 1 {
                    return Err(Malformed);
                }
                let runs = take_runs(bytes, size)?;
                Self::Pages { inode, durable: durable == 1, size, mtime, runs }
            }
            9 => Self::Mark,
            _ => return Err(Malformed),
        })
    }
}

fn take_runs(bytes: &mut &[u8], size: u64) -> Result<Vec<Run>, Malformed> {
    let count = take_u32(bytes)? as usize;
    if count > bytes.len() / 16 {
        return Err(Malformed);
    }
    let mut runs = Vec::with_capacity(count);
    let pages = super::bitmap::pages_in(size);
    for _ in 0..count {
        let run = Run { first: take_u64(bytes)?, count: take_u64(bytes)? };
        if run.first.checked_add(run.count).is_none_or(|end| end > pages) {
            return Err(Malformed);
        }
        runs.push(run);
    }
    Ok(runs)
}

fn kind_code(kind: Kind) -> u8 {
    match kind {
        Kind::File => 0,
        Kind::Directory => 1,
        Kind::Symlink => 2,
    }
}

fn kind_of(code: u8) -> Result<Kind, Malformed> {
    Ok(match code {
        0 => Kind::File,
        1 => Kind::Directory,
        2 => Kind::Symlink,
        _ => return Err(Malformed),
    })
}

fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_u32(out, bytes.len() as u32);
    out.extend_from_slice(bytes);
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Result<&'a [u8], Malformed> {
    let (head, tail) = bytes.split_at_checked(count).ok_or(Malformed)?;
    *bytes = tail;
    Ok(head)
}

fn take_array<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], Malformed> {
    let (head, tail) = bytes.split_first_chunk::<N>().ok_or(Malformed)?;
    *bytes = tail;
    Ok(*head)
}

fn take_u8(bytes: &mut &[u8]) -> Result<u8, Malformed> {
    take_array::<1>(bytes).map(|[byte]| byte)
}

fn take_u32(bytes: &mut &[u8]) -> Result<u32, Malformed> {
    take_array(bytes).map(u32::from_le_bytes)
}

fn take_u64(bytes: &mut &[u8]) -> Result<u64, Malformed> {
    take_array(bytes).map(u64::from_le_bytes)
}

fn take_bytes<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], Malformed> {
    let count = take_u32(bytes)? as usize;
    take(bytes, count)
}

fn take_name(bytes: &mut &[u8]) -> Result<OsString, Malformed> {
    let name = take_bytes(bytes)?;
    if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
        return Err(Malformed);
    }
    Ok(OsStr::from_bytes(name).to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples() -> Vec<Record> {
        vec![
            Record::Boot { id: "b".into() },
            Record::NextInode { inode: 9 },
            Record::Node(NodeRecord {
                inode: 1,
                kind: Kind::Symlink,
                mode: 0o644,
                uid: 1,
                gid: 2,
                links: 1,
                atime: -1,
                mtime: 5,
                ctime: 7,
                target: "to".into(),
            }),
            Record::File(FileRecord { inode: 1, generation: 3, own: true, durable: false, size: 9, base_size: 8 }),
            Record::Name { directory: 1, name: "n".into(), inode: None },
            Record::Name { directory: 1, name: "n".into(), inode: Some(4) },
            Record::Unname { directory: 1, name: "n".into() },
            Record::Gone { inode: 4 },
            Record::Pages { inode: 4, durable: true, size: 9000, mtime: 3, runs: vec![Run { first: 1, count: 2 }] },
            Record::Mark,
        ]
    }

    #[test]
    fn records_survive_encoding() {
        let mut bytes = Vec::new();
        encode(&samples(), &mut bytes);
        assert_eq!(decode(&bytes), Ok(samples()));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
        }

        #[test]
        fn damaged_records_never_panic(at in 0usize..200, value in any::<u8>(), cut in 0usize..300) {
            let mut bytes = Vec::new();
            encode(&samples(), &mut bytes);
            let at = at % bytes.len();
            bytes[at] = value;
            bytes.truncate(cut);
            let _ = decode(&bytes);
        }
    }
}
