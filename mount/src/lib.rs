//! A FUSE filesystem over any [`Tree`], with a copy-on-write scratch.
//!
//! ```text
//! kernel ──> serve ──> fs ──┬──> tree      the port: read-only files, from wherever
//!            (fuser)        └──> scratch   what was changed: journal + pages, on a local disk
//! ```
//!
//! - [`tree`]: the port to implement.
//! - [`fs`]: the filesystem proper, which knows nothing of FUSE and is tested without it.
//! - `scratch`: copy-on-write by page, durable as a local disk is.
//! - `serve`: kernel requests to [`fs::Fs`] calls, and what the kernel may cache.
//! - `mount`: [`Options`], [`Mount`], [`Unmounter`]; `ending`: when a mount is over.
//! - [`mountpoint`]: checks, and unmounting also after the daemon died.
//!
//! Invariants:
//! - Nothing here knows PostgreSQL, object stores or an async runtime.
//! - An error of the tree is an error of the program that read; it is never zeros, and never "no such file".
//! - What was fsynced through the mount is there after the daemon was killed or the machine lost power.
//! - A mount that was unmounted ends, and frees its scratch, also while a copy that nobody uses is left in another mount
//!   namespace.
//! - No thread of the daemon touches files of its own mount.

// so that unit tests share the tests' tree, which names this crate
#[cfg(test)]
extern crate self as pgcairn_mount;

mod ending;
mod error;
pub mod fs;
mod mount;
pub mod mountpoint;
mod scratch;
mod serve;
pub mod tree;
mod users;

pub use error::{Error, Result};
pub use mount::{Mount, Options, Unmounter, Writes};
pub use mountpoint::unmount;
pub use scratch::{Scratch, boot_id};
pub use tree::{Attributes, Entry, Kind, NodeId, ROOT, Tree, asked_at};
