//! The harness of the end-to-end tests: throwaway servers, mounts and commands that clean up after themselves.
//!
//! | module | gives |
//! |---|---|
//! | [`cluster`] | a PostgreSQL server in a temporary directory, of any installed major |
//! | [`client`] | psql, pgbench, dumps and fingerprints over any connection string |
//! | [`data`] | realistic contents for a database |
//! | [`bin`] | the `pgcairn` under test, and what its runs must say |
//! | [`stanza`] | a stanza of a throwaway repository, its mounts and clones |
//! | [`patroni`] | etcd, and Patroni nodes with their servers |
//! | [`place`] | the directory all of a test's things are in, and their end |
//! | [`disk`] | a disk that loses power, and other mount namespaces |
//! | [`files`] | comparing trees of files |
//! | [`mounts`] | the end of a mount and of its daemon |
//! | [`clock`] | a clock that can be set for single programs |
//! | [`walls`] | a machine on which programs get no namespaces |
//! | [`wait`] | waiting for what happens elsewhere |
//! | [`install`] | where servers, clients and users are found on this machine |
//! | [`watchdog`] | cleaning up when the test itself is killed |
//!
//! A failure inside the harness panics with what was tried and what came back: there is no test to go on with.
//! Everything it starts ends with the value that stands for it, also when the test panics or is killed.

pub mod bin;
pub mod client;
pub mod clock;
pub mod cluster;
pub mod data;
pub mod disk;
pub mod files;
pub mod install;
pub mod mounts;
pub mod patroni;
pub mod place;
pub mod process;
pub mod stanza;
pub mod wait;
pub mod walls;
pub mod watchdog;

pub use bin::{Output, pgcairn};
pub use client::Client;
pub use clock::WrongClock;
pub use cluster::{Cluster, StopMode};
pub use data::Data;
pub use mounts::MountGuard;
pub use place::Place;
pub use stanza::Stanza;
pub use wait::wait_until;
