//! PGDATA to packs: how a backup is taken, and how WAL gets into the archive.
//!
//! ```text
//! session ── pg_backup_start ──> scan ──> cut (slots, hashes, checksums) ──> packer ──> store
//!    └────── pg_backup_stop  ──> WAL proved ──> manifest ──> catalog                 (commit)
//! ```
//!
//! Instead of the scan, the server can send its files (`stream`): they are cut in the order in which they arrive.

pub mod assemble;
pub mod chunker;
pub mod copy;
mod datadir;
pub mod dedup;
mod extents;
mod moved_files;
mod orphan_packs;
pub mod pack_usage;
pub mod packer;
pub mod parent;
mod parent_choice;
mod peer;
pub mod preflight;
pub mod rival;
pub mod run;
pub mod scan;
pub mod schedule;
pub mod server;
pub mod slot_channel;
mod sorter;
pub mod source;
pub mod standby;
mod stream;
