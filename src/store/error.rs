use std::fmt;

/// What kind of failure it was; decides whether to try again and which hint to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// there is no such object
    NotFound,
    /// the object is shorter than the range asked for
    Truncated,
    /// the store refused: credentials or permissions
    Denied,
    /// the store is full
    NoSpace,
    /// worth trying again: 5xx, throttling, time-outs, cut connections
    Transient,
    /// anything else: bad bucket, bad configuration, local I/O error
    Other,
}

/// A failed call: what was asked, of which object, and why it failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {url}{}{key}", if key.is_empty() { "" } else { "/" })]
pub struct StoreError {
    /// what kind of failure
    pub kind: ErrorKind,
    /// the call, as a verb: "open", "read", "write", "list", "delete"
    pub operation: &'static str,
    /// the store's URL
    pub url: String,
    /// the object's key, or the prefix listed; empty for the store itself
    pub key: String,
    /// what to do next, if that is more than the kind says
    pub hint: Option<&'static str>,
    /// the cause
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Shorthand of this module.
pub type Result<T> = std::result::Result<T, StoreError>;

impl StoreError {
    /// A failure of `kind` with its cause.
    pub fn new(
        kind: ErrorKind,
        operation: &'static str,
        url: &str,
        key: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, operation, url: url.to_owned(), key: key.to_owned(), hint: None, source: source.into() }
    }

    /// A read past the end of an object whose size is known, or not.
    pub(super) fn truncated(url: &str, key: &str, offset: u64, len: u64, size: Option<u64>) -> Self {
        let source = match size {
            Some(size) => format!("bytes {offset}+{len} asked for, but the object has {size} bytes"),
            None => format!("bytes {offset}+{len} asked for, but the object is shorter"),
        };
        Self::new(ErrorKind::Truncated, "read", url, key, source)
    }

    /// What to do next.
    pub fn hint(&self) -> Option<&'static str> {
        self.hint.or(match self.kind {
            ErrorKind::NotFound => None,
            ErrorKind::Truncated => Some("the object is damaged; other backups may be whole"),
            ErrorKind::Denied => Some("check the credentials and the permissions of the repository"),
            ErrorKind::NoSpace => Some("free space in the repository, then run the command again"),
            ErrorKind::Transient => Some("check that the repository can be reached, then run the command again"),
            ErrorKind::Other => None,
        })
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}
