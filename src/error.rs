//! The error of everything above the store and the formats: what went wrong, of which thing, and what to do next.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::format::FormatError;
use crate::store::{ErrorKind, StoreError};

/// Shorthand of the crate.
pub type Result<T> = std::result::Result<T, Error>;

type Source = Box<dyn std::error::Error + Send + Sync>;

/// A failure as a person reads it: one line, a chain of causes, a hint.
#[derive(Debug)]
pub struct Error {
    what: String,
    hint: Option<String>,
    source: Option<Source>,
    conflict: bool,
}

impl Error {
    /// `what` names the thing and the values, lower case, without a full stop.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), hint: None, source: None, conflict: false }
    }

    /// What to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The cause.
    #[must_use]
    pub fn source(mut self, source: impl Into<Source>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The archive holds another content under a name.
    #[must_use]
    pub fn conflict(mut self) -> Self {
        self.conflict = true;
        self
    }

    /// A failed call on a local file: `cannot read /path`.
    pub fn io(verb: &str, path: &Path, source: io::Error) -> Self {
        Self::new(format!("cannot {verb} {}", path.display())).source(source)
    }

    /// The nearest hint in the chain.
    pub fn hint_text(&self) -> Option<&str> {
        if let Some(hint) = &self.hint {
            return Some(hint);
        }
        let mut cause = self.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static));
        while let Some(error) = cause {
            // several readers may share one failed fetch
            let shared = error.downcast_ref::<Arc<Self>>().map(Arc::as_ref);
            let ours = error.downcast_ref::<Self>().or(shared);
            if let Some(hint) = ours.and_then(|error| error.hint.as_deref()) {
                return Some(hint);
            }
            if let Some(hint) = error.downcast_ref::<StoreError>().and_then(StoreError::hint) {
                return Some(hint);
            }
            if let Some(hint) = error.downcast_ref::<io::Error>().and_then(io_hint) {
                return Some(hint);
            }
            cause = error.source();
        }
        None
    }

    /// The error and its causes in one line.
    pub fn told(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(next) = cause {
            let more = next.to_string();
            if !text.ends_with(&more) {
                text = format!("{text}: {more}");
            }
            cause = next.source();
        }
        text
    }

    /// True when the cause is that stored bytes are not what they should be.
    pub fn is_damage(&self) -> bool {
        self.find::<FormatError>().is_some()
    }

    /// True when the archive holds another content under a name: nothing that comes later may be archived before that is settled.
    pub fn is_conflict(&self) -> bool {
        self.conflict || self.find::<Self>().is_some_and(Self::is_conflict)
    }

    /// True when the cause is that the store has no such object.
    pub fn is_not_found(&self) -> bool {
        self.find::<StoreError>().is_some_and(|error| error.kind == ErrorKind::NotFound)
    }

    /// True when the cause is that the store could not be reached, however often it was tried.
    pub fn is_unreachable(&self) -> bool {
        self.find::<StoreError>().is_some_and(|error| error.kind == ErrorKind::Transient)
    }

    /// True when the cause is that an object is shorter than what was to be read of it.
    pub fn is_truncated(&self) -> bool {
        self.find::<StoreError>().is_some_and(|error| error.kind == ErrorKind::Truncated)
    }

    /// The nearest cause of this type.
    pub fn find<T: std::error::Error + 'static>(&self) -> Option<&T> {
        let mut cause = self.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static));
        while let Some(error) = cause {
            if let Some(found) = error.downcast_ref::<T>() {
                return Some(found);
            }
            // several readers may share one failed fetch
            cause = error.downcast_ref::<Arc<Self>>().map_or_else(|| error.source(), |shared| Some(&**shared));
        }
        None
    }
}

/// What helps against a failed call on a file, whichever it was.
fn io_hint(error: &io::Error) -> Option<&'static str> {
    Some(match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => "check the path",
        io::ErrorKind::PermissionDenied => "check its owner and mode, or run as its owner or as root",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free space there, then run the command again",
        io::ErrorKind::ReadOnlyFilesystem => "its file system is read-only; choose another place",
        _ => return None,
    })
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static))
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let what = match error.kind {
            ErrorKind::NotFound => "an object is missing from the repository",
            ErrorKind::Truncated => "an object of the repository is cut",
            _ => "the repository failed",
        };
        Self::new(what).source(error)
    }
}

impl From<FormatError> for Error {
    fn from(error: FormatError) -> Self {
        Self::new("the repository is damaged")
            .hint("other backups may be whole; run \"pgcairn info\" to see them")
            .source(error)
    }
}

impl From<serde_json::Error> for Error {
    fn from(error: serde_json::Error) -> Self {
        Self::new("cannot write JSON").source(error)
    }
}

/// Adds what was being done to an error of any kind.
pub trait Context<T> {
    /// `what` names the thing that failed.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<Source>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| Error::new(what()).source(error))
    }
}
