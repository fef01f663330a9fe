//! How long work tells what it does: the library reports, the program decides how it looks.

/// Receives reports from several threads at once.
pub trait Monitor: Send + Sync {
    /// A new stage with a name and the bytes it will pass, 0 where unknown.
    fn stage(&self, _name: &str, _bytes_total: u64) {}
    /// That many more bytes of the stage are done.
    fn advance(&self, _bytes: u64) {}
    /// Something a person should read, worth a line of its own.
    fn note(&self, _text: &str) {}
}

/// Says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Monitor for Silent {}
