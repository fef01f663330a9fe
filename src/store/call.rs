//! A call of a store as data, for the decorators that count, log or spoil calls.

use std::fmt;

/// Which method of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the names of the trait's methods")]
pub enum Operation {
    Get,
    GetRange,
    Put,
    Size,
    List,
    Names,
    Delete,
}

impl Operation {
    /// Every operation, in the trait's order.
    pub const ALL: [Operation; 7] =
        [Self::Get, Self::GetRange, Self::Put, Self::Size, Self::List, Self::Names, Self::Delete];

    /// The verb that errors use.
    pub fn verb(self) -> &'static str {
        match self {
            Self::Get | Self::GetRange | Self::Size => "read",
            Self::Put => "write",
            Self::List | Self::Names => "list",
            Self::Delete => "delete",
        }
    }

    /// Whether it changes the store.
    pub fn writes(self) -> bool {
        matches!(self, Self::Put | Self::Delete)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "get",
            Self::GetRange => "get_range",
            Self::Put => "put",
            Self::Size => "size",
            Self::List => "list",
            Self::Names => "names",
            Self::Delete => "delete",
        })
    }
}

/// One call: what, of which object, which bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// counted from 1 by the decorator that saw it
    pub number: u64,
    /// the method
    pub operation: Operation,
    /// the key or prefix; of `delete` the first key
    pub key: String,
    /// of `get_range`, else 0
    pub offset: u64,
    /// bytes asked for by `get_range` or given to `put`, keys given to `delete`, else 0
    pub len: u64,
}
