#![allow(clippy::unwrap_used)]
use super::*;
use crate::format::chunk::ChunkId;

const ALL: usize = 16;

fn chunk(number: u8) -> ChunkRef {
    let pack = PackId([number; 16]);
    ChunkRef { pack, offset: 32, stored_len: 100, plain_len: 8 * SLOT as u32, id: ChunkId([number; 32]) }
}

/// An old slot of `len` bytes in one chunk, whose grains hash to their numbers.
fn old_change(len: usize) -> SlotChange {
    SlotChange { crc: 0, grains: (0..len.div_ceil(GRAIN) as u64).collect() }
}

fn compared(extents: &[Extent], old_len: usize, changed: &[usize], len: usize, chunks_max: usize) -> Vec<Part> {
    let change = old_change(old_len);
    let mut grains = old_change(len).grains;
    changed.iter().for_each(|at| grains[*at] = 99);
    let parts = compare(OldSlot { extents, change: &change, len: old_len }, &grains, len, chunks_max);
    let covered: usize = parts
        .iter()
        .map(|part| match part {
            Part::Known(extent) => extent.len as usize,
            Part::Fresh(_, len) => *len,
        })
        .sum();
    assert_eq!(covered, len, "{parts:?}");
    parts
}

fn whole(len: usize) -> [Extent; 1] {
    [Extent { len: len as u32, chunk: chunk(1), offset: 0 }]
}

#[test]
fn an_unchanged_slot_is_taken_over_and_a_changed_grain_is_stored() {
    assert_eq!(compared(&whole(SLOT), SLOT, &[], SLOT, 4), [Part::Known(whole(SLOT)[0])]);
    let grain = GRAIN as u32;
    let expected = [
        Part::Known(Extent { len: 3 * grain, chunk: chunk(1), offset: 0 }),
        Part::Fresh(3 * GRAIN, 2 * GRAIN),
        Part::Known(Extent { len: 11 * grain, chunk: chunk(1), offset: 5 * grain }),
    ];
    assert_eq!(compared(&whole(SLOT), SLOT, &[3, 4], SLOT, 4), expected);
}

#[test]
fn a_slot_that_changed_mostly_or_lies_in_too_many_chunks_is_stored_whole() {
    let most: Vec<usize> = (0..13).collect();
    assert_eq!(compared(&whole(SLOT), SLOT, &most, SLOT, 4), [Part::Fresh(0, SLOT)]);
    let spread: Vec<Extent> =
        (1..=4).map(|number| Extent { len: (SLOT / 4) as u32, chunk: chunk(number), offset: 0 }).collect();
    assert_eq!(compared(&spread, SLOT, &[], SLOT, 4).len(), 4, "nothing changed: nothing is stored");
    assert_eq!(compared(&spread, SLOT, &[0], SLOT, 4), [Part::Fresh(0, SLOT)]);
    assert_eq!(compared(&spread, SLOT, &[], SLOT, 2), [Part::Fresh(0, SLOT)], "a full backup gathers it");
}

#[test]
fn a_slot_that_grew_or_shrank_keeps_its_whole_grains() {
    // the last grain was partial: it is another one now, though its hash is the same here
    let old_len = 4 * GRAIN + 100;
    let grown = compared(&whole(old_len), old_len, &[], SLOT, 4);
    assert_eq!(grown[0], Part::Known(Extent { len: 4 * GRAIN as u32, chunk: chunk(1), offset: 0 }));
    assert_eq!(grown[1], Part::Fresh(4 * GRAIN, SLOT - 4 * GRAIN));
    let shrunk = compared(&whole(SLOT), SLOT, &[], old_len, 4);
    assert_eq!(shrunk[1], Part::Fresh(4 * GRAIN, 100));
    assert_eq!(compared(&whole(ALL), ALL, &[], ALL, 4).len(), 1);
}
