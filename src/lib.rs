//! pgcairn keeps a PostgreSQL cluster as content-addressed chunks, and mounts any backup of it.

pub mod format;
pub mod postgres;
pub mod store;
