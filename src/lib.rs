//! pgcairn keeps a PostgreSQL cluster as content-addressed chunks, and mounts any backup of it.

pub mod cli;
pub mod error;
pub mod format;
pub mod postgres;
pub mod progress;
pub mod read;
pub mod repo;
pub mod store;
pub mod write;
