//! The headers of the archives in which a server sends a base backup: POSIX tar as `src/port/tar.c` writes it, one block per
//! entry, without extensions.

/// Entries and their contents begin at multiples of this many bytes.
pub const TAR_BLOCK: usize = 512;

/// One entry of an archive; a file's contents follow, padded to a whole block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TarEntry {
    /// relative to the archive's directory, without `./` before and `/` behind
    pub path: Vec<u8>,
    /// permission bits
    pub mode: u32,
    /// seconds since 1970
    pub mtime: i64,
    /// what it is
    pub kind: TarKind,
    /// name of its owner
    pub user: String,
    /// name of its group
    pub group: String,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TarKind {
    /// a regular file of so many bytes
    File(u64),
    /// a directory
    Directory,
    /// a symbolic link and its target
    Link(Vec<u8>),
}

/// A block that is no header of such an archive.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// the sum of its bytes is not the one it carries
    #[error("the checksum of a header is {found}, its bytes add up to {expected}")]
    Checksum {
        /// what it carries
        found: u64,
        /// what its bytes add up to
        expected: u64,
    },
    /// a field is no number
    #[error("the field {field} of {path} is no number")]
    Number {
        /// the field
        field: &'static str,
        /// whose
        path: String,
    },
    /// neither file nor directory nor link
    #[error("{path} is of the unknown type {kind:?}")]
    Kind {
        /// what
        path: String,
        /// its type
        kind: char,
    },
    /// it leads out of the archive's directory
    #[error("the path \"{0}\" leads out of the archive")]
    Path(String),
}

impl TarEntry {
    /// Reads a header; `None` for the block of zeros that ends an archive.
    ///
    /// # Errors
    /// Says what is wrong with the block.
    pub fn parse(block: &[u8; TAR_BLOCK]) -> Result<Option<Self>, TarError> {
        if block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let field = |from: usize, len: usize| &block[from..from + len];
        let path = clean(&[text(field(345, 155)), text(field(0, 100))]);
        let shown = path.escape_ascii().to_string();
        let get =
            |name, from, len| number(field(from, len)).ok_or(TarError::Number { field: name, path: shown.clone() });
        let (found, expected) = (get("checksum", 148, 8)?, sum(block));
        if found != expected {
            return Err(TarError::Checksum { found, expected });
        }
        if path.split(|byte| *byte == b'/').any(|part| matches!(part, b"" | b"." | b"..")) {
            return Err(TarError::Path(shown));
        }
        let kind = match block[156] {
            b'0' | 0 => TarKind::File(get("size", 124, 12)?),
            b'2' => TarKind::Link(text(field(157, 100)).to_vec()),
            b'5' => TarKind::Directory,
            other => return Err(TarError::Kind { path: shown, kind: other.into() }),
        };
        Ok(Some(Self {
            mode: get("mode", 100, 8)? as u32 & 0o7777,
            mtime: i64::try_from(get("mtime", 136, 12)?).unwrap_or(i64::MAX),
            kind,
            user: String::from_utf8_lossy(text(field(265, 32))).into_owned(),
            group: String::from_utf8_lossy(text(field(297, 32))).into_owned(),
            path,
        }))
    }
}

/// Bytes that fill the last block of `size` bytes of contents.
pub fn tar_padding(size: u64) -> usize {
    (size.next_multiple_of(TAR_BLOCK as u64) - size) as usize
}

/// A field's bytes before the first zero.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The server writes some names with `./` before, and directories with `/` behind.
fn clean(parts: &[&[u8]; 2]) -> Vec<u8> {
    let joined = match parts[0].is_empty() {
        true => parts[1].to_vec(),
        false => parts.join(&b'/'),
    };
    let path = joined.strip_prefix(b"./").unwrap_or(&joined);
    path.strip_suffix(b"/").unwrap_or(path).to_vec()
}

/// Octal digits, or, where these are not enough, big-endian binary behind a byte of 0x80.
fn number(field: &[u8]) -> Option<u64> {
    if let [0x80, rest @ ..] = field {
        return rest.iter().try_fold(0u64, |number, byte| Some(number.checked_mul(256)? | u64::from(*byte)));
    }
    let digits = text(field).trim_ascii();
    let digit = |number: u64, byte: &u8| match byte {
        b'0'..=b'7' => Some(number.checked_mul(8)? | u64::from(byte - b'0')),
        _ => None,
    };
    digits.iter().try_fold(0, digit)
}

/// The sum of all bytes, those of the sum itself taken as spaces.
fn sum(block: &[u8; TAR_BLOCK]) -> u64 {
    let byte = |(at, byte): (usize, &u8)| if (148..156).contains(&at) { u64::from(b' ') } else { u64::from(*byte) };
    block.iter().enumerate().map(byte).sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A header as the server writes it.
    fn header(path: &str, size: u64, kind: u8, target: &str) -> [u8; TAR_BLOCK] {
        let mut block = [0; TAR_BLOCK];
        let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, path.as_bytes());
        put(100, b"0100600 ");
        put(108, b"0000145 ");
        match size < 1 << 33 {
            true => put(124, format!("{size:011o} ").as_bytes()),
            false => put(124, &[&[0x80, 0, 0, 0][..], &size.to_be_bytes()].concat()),
        }
        put(136, b"14611563377 ");
        put(156, &[kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000postgres");
        put(297, b"staff");
        let sum = format!("{:06o} ", sum(&block));
        block[148..155].copy_from_slice(sum.as_bytes());
        block
    }

    fn parse(block: [u8; TAR_BLOCK]) -> TarEntry {
        TarEntry::parse(&block).unwrap().unwrap()
    }

    #[test]
    fn headers_are_read() {
        let entry = parse(header("base/5/1259", 8192, b'0', ""));
        assert_eq!((&*entry.path, entry.mode, entry.mtime), (&b"base/5/1259"[..], 0o600, 0o14611563377));
        assert_eq!((&*entry.user, &*entry.group, entry.kind), ("postgres", "staff", TarKind::File(8192)));
        let entry = parse(header("./pg_wal/archive_status/", 0, b'5', ""));
        assert_eq!((&*entry.path, entry.kind), (&b"pg_wal/archive_status"[..], TarKind::Directory));
        let entry = parse(header("pg_tblspc/16384", 0, b'2', "/elsewhere"));
        assert_eq!(entry.kind, TarKind::Link(b"/elsewhere".to_vec()));
        assert_eq!(parse(header("x", 1 << 40, b'0', "")).kind, TarKind::File(1 << 40));
        assert_eq!(TarEntry::parse(&[0; TAR_BLOCK]).unwrap(), None);
    }

    #[test]
    fn what_is_no_header_is_refused() {
        for path in ["../x", "/etc/passwd", "a//b", "a/../b", "", "."] {
            assert!(matches!(TarEntry::parse(&header(path, 0, b'0', "")), Err(TarError::Path(_))), "{path}");
        }
        assert!(matches!(TarEntry::parse(&header("x", 0, b'L', "")), Err(TarError::Kind { kind: 'L', .. })));
        let good = header("x", 8, b'0', "");
        for at in 0..TAR_BLOCK {
            let mut block = good;
            block[at] ^= 0x15;
            assert!(TarEntry::parse(&block).is_err(), "byte {at}");
        }
    }

    #[test]
    fn contents_are_padded() {
        assert_eq!([0, 1, 511, 512, 513].map(tar_padding), [0, 511, 1, 0, 511]);
    }
}
