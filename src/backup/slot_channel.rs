//! Bytes on their way from one thread that reads a stream to the workers: a bounded number of slots, whichever files they are of.

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use crate::error::{Error, Result};

/// Slots on their way at once, 64 MiB: a whole leaf that a worker is busy with, and the next for another. More than one batch of
/// small files has, or it could never be handed out.
pub(super) const PIECES_MAX: usize = 512;

/// Gives out places for slots.
#[derive(Debug)]
pub(super) struct Budget {
    take: Sender<()>,
    give_back: Receiver<()>,
}

/// The bytes of a small file, or of a leaf of a large one, one piece for each slot.
#[derive(Debug)]
pub struct Pieces(Receiver<Piece>);

/// Where these pieces are put.
pub(super) struct Filler<'a> {
    budget: &'a Budget,
    pieces: Sender<Piece>,
}

#[derive(Debug)]
struct Piece {
    bytes: Vec<u8>,
    _place: Place,
}

/// Gives a place back when what is in it was read, or will never be.
#[derive(Debug)]
struct Place(Receiver<()>);

impl Drop for Place {
    fn drop(&mut self) {
        _ = self.0.try_recv();
    }
}

impl Budget {
    /// So many slots at once.
    pub(super) fn new(slots: usize) -> Self {
        let (take, give_back) = bounded(slots);
        Self { take, give_back }
    }

    /// A way for the bytes of one file or leaf.
    pub(super) fn pieces(&self) -> (Filler<'_>, Pieces) {
        let (pieces, taken) = unbounded();
        (Filler { budget: self, pieces }, Pieces(taken))
    }
}

impl Filler<'_> {
    /// Waits for a place and puts the next `len` bytes there, which `fill` gets. False when nobody reads them any more.
    pub(super) fn put(&self, len: usize, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<bool> {
        if self.budget.take.send(()).is_err() {
            return Ok(false);
        }
        let place = Place(self.budget.give_back.clone());
        let mut bytes = vec![0; len];
        fill(&mut bytes)?;
        Ok(self.pieces.send(Piece { bytes, _place: place }).is_ok())
    }
}

impl Pieces {
    /// Waits for the next slot and fills `buf`, which is as long.
    pub(super) fn next(&self, buf: &mut [u8]) -> Result<()> {
        let piece = self.0.recv().map_err(|_| Error::new("the stream from the server broke off"))?;
        match piece.bytes.len() == buf.len() {
            true => buf.copy_from_slice(&piece.bytes),
            false => return Err(Error::new(format!("{} bytes came instead of {}", piece.bytes.len(), buf.len()))),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn byte(buf: &mut [u8]) -> Result<()> {
        buf.fill(7);
        Ok(())
    }

    #[test]
    fn a_place_is_free_again_when_its_bytes_were_read_or_forgotten() {
        let budget = Budget::new(2);
        let (filler, pieces) = budget.pieces();
        assert!(filler.put(1, byte).unwrap() && filler.put(1, byte).unwrap());
        assert!(budget.take.is_full());
        let mut buf = [0];
        pieces.next(&mut buf).unwrap();
        assert_eq!((buf, budget.take.len()), ([7], 1));
        drop(pieces);
        assert!(budget.take.is_empty());
        assert!(!filler.put(1, byte).unwrap());
        assert!(budget.take.is_empty());
    }

    #[test]
    fn a_filler_that_breaks_off_is_an_error() {
        let budget = Budget::new(2);
        let (filler, pieces) = budget.pieces();
        filler.put(3, byte).unwrap();
        drop(filler);
        pieces.next(&mut [0; 3]).unwrap();
        assert!(pieces.next(&mut [0; 3]).is_err());
    }
}
