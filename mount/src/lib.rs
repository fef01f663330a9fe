//! A FUSE filesystem over any [`Tree`], with a copy-on-write scratch.

// so that unit tests share the tests' tree, which names this crate
#[cfg(test)]
extern crate self as pgcairn_mount;

mod error;
pub mod fs;
mod mount;
pub mod mountpoint;
mod scratch;
mod serve;
pub mod tree;

pub use error::{Error, Result};
pub use mount::{Mount, Options, Unmounter};
pub use mountpoint::unmount;
pub use scratch::Scratch;
pub use tree::{Attributes, Entry, Kind, NodeId, ROOT, Tree};
