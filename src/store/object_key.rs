//! The one rule for keys, held by every store, so that a key that works on one works on all.

use super::{ErrorKind, Result, StoreError};

/// Where the directory store keeps what is being written; no key may lie there.
pub(super) const RESERVED: &str = ".tmp";

/// Bytes of a whole key. S3 allows 1024, of which the repository's prefix takes a part.
const KEY_LEN_MAX: usize = 768;

/// Bytes of one part of a key: a file name's limit.
const PART_LEN_MAX: usize = 255;

/// Why a key, prefix or bucket was refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadKey {
    #[error("the key {0:?} is empty or longer than {KEY_LEN_MAX} bytes")]
    Length(String),
    #[error("the key {0:?} has a character outside of A-Z a-z 0-9 . _ = + : - /")]
    Character(String),
    #[error("the key {0:?} has an empty, \".\", \"..\" or overlong part")]
    Part(String),
    #[error("the key {0:?} lies in \"{RESERVED}/\", which is reserved")]
    Reserved(String),
    #[error("the prefix {0:?} does not end in \"/\"")]
    OpenPrefix(String),
}

fn allowed(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._=+:-".contains(&byte)
}

fn valid_part(part: &str) -> bool {
    !part.is_empty() && part != "." && part != ".." && part.len() <= PART_LEN_MAX
}

/// Whether `key` may name an object.
pub(super) fn check(key: &str) -> std::result::Result<(), BadKey> {
    if key.is_empty() || key.len() > KEY_LEN_MAX {
        return Err(BadKey::Length(key.chars().take(80).collect()));
    }
    if !key.bytes().all(|b| allowed(b) || b == b'/') {
        return Err(BadKey::Character(key.to_owned()));
    }
    if !key.split('/').all(valid_part) {
        return Err(BadKey::Part(key.to_owned()));
    }
    if key.split('/').next() == Some(RESERVED) {
        return Err(BadKey::Reserved(key.to_owned()));
    }
    Ok(())
}

/// Whether `prefix` may be listed: empty, or the beginning of a key.
pub(super) fn check_prefix(prefix: &str) -> std::result::Result<(), BadKey> {
    if prefix.len() > KEY_LEN_MAX {
        return Err(BadKey::Length(prefix.chars().take(80).collect()));
    }
    if !prefix.bytes().all(|b| allowed(b) || b == b'/') {
        return Err(BadKey::Character(prefix.to_owned()));
    }
    let (whole, _last) = split_prefix(prefix);
    if !whole.is_empty() { check(whole.trim_end_matches('/')).and_then(|()| no_empty_end(whole)) } else { Ok(()) }
}

fn no_empty_end(whole: &str) -> std::result::Result<(), BadKey> {
    if whole.ends_with("//") { Err(BadKey::Part(whole.to_owned())) } else { Ok(()) }
}

/// `a/b/cd` is the directory `a/b/` and the beginning of a name `cd`.
pub(super) fn split_prefix(prefix: &str) -> (&str, &str) {
    prefix.split_at(prefix.rfind('/').map_or(0, |slash| slash + 1))
}

/// Refuses a bad key as an error of this call.
pub(super) fn require(operation: &'static str, url: &str, key: &str) -> Result<()> {
    check(key).map_err(|e| StoreError::new(ErrorKind::Other, operation, url, key, e))
}

/// Refuses a prefix that no key could begin with.
pub(super) fn require_prefix(url: &str, prefix: &str) -> Result<()> {
    check_prefix(prefix).map_err(|e| StoreError::new(ErrorKind::Other, "list", url, prefix, e))
}

/// Refuses a prefix that is not a whole directory.
pub(super) fn require_directory(url: &str, prefix: &str) -> Result<()> {
    require_prefix(url, prefix)?;
    if prefix.is_empty() || prefix.ends_with('/') {
        return Ok(());
    }
    Err(StoreError::new(ErrorKind::Other, "list", url, prefix, BadKey::OpenPrefix(prefix.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        for good in ["a", "a/b", "a.b/c-d_e=f+g:h", "..a/b..", ".x/y", "a/.tmp"] {
            assert!(check(good).is_ok(), "{good}");
        }
        let long = "x/".repeat(400) + "x";
        let bad = [
            "", "/", "a/", "/a", "a//b", ".", "..", "a/../b", "a/./b", "a b", "ä", "a\\b", "a\0", "a%2f", ".tmp/x",
            ".tmp", &long,
        ];
        for bad in bad {
            assert!(check(bad).is_err(), "{bad}");
        }
        assert!(check(&"x".repeat(256)).is_err());
    }

    #[test]
    fn prefixes() {
        for good in ["", "a", "a/", "a/b", "a/.", ".", "a/b/"] {
            assert!(check_prefix(good).is_ok(), "{good}");
        }
        for bad in ["/", "a//", "a//b", "../", "a/../", "a b", ".tmp/"] {
            assert!(check_prefix(bad).is_err(), "{bad}");
        }
    }
}
