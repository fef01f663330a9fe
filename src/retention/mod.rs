//! What goes, and whether what stays is sound. The only place that deletes backups, packs and WAL.
//!
//! `policy` decides, and `proofs` asks whether what it keeps can be restored; `expire` removes what it decided against: manifests first, then WAL; `mark` writes down which packs
//! no manifest refers to, and after a grace period `sweep` deletes them. `verify` reads everything and says what is harmed.

pub mod expire;
pub(crate) mod mark;
pub mod policy;
mod proofs;
mod sweep;

#[cfg(test)]
pub(crate) mod tests;
