//! Packs to bytes: the one read path. mount, restore and archive-get all go through it.
//!
//! ```text
//! point ──> manifest ──> view ──> file map ──> extents ──> fetch ──> memory | disk cache | store
//! ```

pub mod bounded;
pub mod builder;
pub mod cache;
pub mod completion;
pub mod fetch;
pub mod pgmanifest;
pub mod prefetch;
pub mod stanza;
pub mod tree;
pub mod view;
pub mod wal;
