//! A FUSE filesystem over any [`Tree`], with a copy-on-write scratch.

pub mod tree;

pub use tree::{Attributes, Entry, Kind, NodeId, ROOT, Tree};
