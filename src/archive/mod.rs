//! The WAL archive, both ways: push, get, and the workers that do either ahead, with the spool between them and the calls.

pub mod client;
pub mod prefetch;
pub mod protocol;
pub mod push;
pub mod spool;
pub mod worker;
