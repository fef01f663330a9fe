//! The server of a clone: what it is told and what it gets to see, so that it touches nothing but itself.
//!
//! Two walls, since each alone misses something: [`settings`] on the server's command line for everything in PostgreSQL that
//! reaches outside, with a cleaned [`environment`]; and a [`sandbox`] of namespaces, in which the source is not to be found.
//! What this machine does not have of the source's [`configuration`] is left out.

pub mod configuration;
pub mod environment;
pub mod sandbox;
pub mod settings;
