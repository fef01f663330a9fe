//! PGDATA to packs: how a backup is taken, and how WAL gets into the archive.
//!
//! ```text
//! session ── pg_backup_start ──> scan ──> cut (slots, hashes, checksums) ──> packer ──> store
//!    └────── pg_backup_stop  ──> WAL proved ──> manifest ──> catalog                 (commit)
//! ```
//!
//! Instead of the scan, the server can send its files (`stream`): they are cut in the order in which they arrive.

pub mod ahead;
pub mod answer;
pub mod ask;
pub mod assemble;
pub mod backup;
pub mod check;
mod compared;
pub mod copy;
pub mod cut;
pub mod dedup;
mod local;
pub mod packer;
pub mod parent;
mod peer;
pub mod pieces;
mod place;
pub mod push;
mod resume;
pub mod rival;
pub mod scan;
pub mod schedule;
pub mod server;
mod sorter;
pub mod source;
pub mod standby;
mod stream;
mod twin;
pub mod weights;
