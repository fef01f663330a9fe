//! archive

pub mod client;
pub mod prefetch;
pub mod protocol;
pub mod push;
pub mod spool;
pub mod worker;
