//! What the worker that pushes ahead says of one WAL file, and for which bytes it says so.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::spool::Spool;

const SUFFIX: &str = ".answer";

/// The hash of a file's content, as answers carry it: of all its bytes, so of the system identifier in its header, too.
pub(super) type Content = blake3::Hash;

/// An answer in the spool. It counts while the run that gave it lives; see [`crate::spool`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    /// the run that gave it
    pub(super) run: String,
    /// what came of it
    pub(super) outcome: Outcome,
}

/// What came of pushing one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Outcome {
    /// the store has confirmed a file of this name with this content
    Archived {
        /// the [`Content`], in hexadecimal
        content: String,
    },
    /// it was not archived this time
    Failed {
        /// the error with its causes
        error: String,
        /// what to do
        hint: Option<String>,
    },
}

impl Outcome {
    pub(super) fn archived(content: Content) -> Self {
        Self::Archived { content: content.to_hex().to_string() }
    }

    pub(super) fn failed(error: &Error) -> Self {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(next) = cause {
            let more = next.to_string();
            if !text.ends_with(&more) {
                text = format!("{text}: {more}");
            }
            cause = next.source();
        }
        Self::Failed { error: text, hint: error.hint_text().map(str::to_owned) }
    }
}

impl Answer {
    pub(super) fn file(name: &str) -> String {
        format!("{name}{SUFFIX}")
    }

    /// The name of the WAL file that a file of the spool answers for.
    pub(super) fn name(file: &str) -> Option<&str> {
        file.strip_suffix(SUFFIX)
    }

    pub(super) fn write(&self, spool: &Spool, name: &str) -> Result<()> {
        spool.write(&Self::file(name), &serde_json::to_vec(self)?)
    }

    /// The answer for `name`, unless there is none or it cannot be understood.
    pub(super) fn read(spool: &Spool, name: &str) -> Result<Option<Self>> {
        let bytes = spool.read(&Self::file(name))?;
        Ok(bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }
}
