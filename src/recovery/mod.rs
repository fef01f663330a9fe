//! From a recovery target to a plan: which backup, along which timeline, what PostgreSQL is told, which WAL it needs.

pub mod crossing;
pub mod datetime;
pub mod outline;
pub mod plan;
pub mod settings;
pub mod tablespaces;
pub mod target;
pub mod wal_times;
pub mod window;
