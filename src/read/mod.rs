//! Packs to bytes: the one read path. mount, restore and archive-get all go through it.
//!
//! ```text
//! point ──> manifest ──> view ──> file map ──> extents ──> fetch ──> memory | disk cache | store
//! ```

pub mod ahead;
pub mod bounded;
pub mod builder;
pub mod cache;
pub mod course;
pub mod crossing;
pub mod fetch;
pub mod horizon;
pub mod moment;
pub mod outline;
pub mod pgmanifest;
pub mod point;
pub mod prefetch;
pub mod recovery;
pub mod restore;
pub mod settings;
pub mod stanza;
pub mod tablespaces;
pub mod times;
pub mod tree;
pub mod view;
pub mod wal;
