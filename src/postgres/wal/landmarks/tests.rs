#![allow(clippy::unwrap_used)]
use super::*;
use crate::postgres::lsn::Timeline;
use crate::postgres::wal::records::tests::{SIZE, Writer, identity};

fn size() -> SegmentSize {
    SegmentSize::new(SIZE.into()).unwrap()
}

/// What is found at a place in what a server wrote from segment `number` on.
fn found(wal: &Writer, number: u64, place: Place) -> Option<Event> {
    let segments = wal.segments();
    let read = |holder: u64| -> Option<Landmarks> {
        let name = SegmentName::of_number(Timeline(1), holder, size());
        let bytes = segments.get(usize::try_from(holder.checked_sub(number)?).unwrap())?;
        Some(Landmarks::read(&identity(), name, bytes).unwrap())
    };
    let read: Vec<_> = holders(size(), place).into_iter().map(read).collect();
    let read: Vec<_> = read.iter().map(Option::as_ref).collect();
    record_at(place, identity().major, &read)
}

#[test]
fn records_are_found_wherever_a_segment_ends() {
    let name = mark_name([0xa7; 16]);
    assert!(is_own_restore_point(&name) && is_own_restore_point("pgcairn"));
    assert!(!is_own_restore_point("pgcairn mark") && !is_own_restore_point("before pgcairn mark 1"));
    // how many bytes of the segment are left when the first of them is written
    for left in (0..400).step_by(8) {
        let mut wal = Writer::new(3);
        wal.fill(left);
        let redo = wal.end();
        let checkpoint = wal.checkpoint(redo);
        wal.restore_point(&name, 5);
        let mark = wal.end();
        let stop = wal.backup_end(redo);
        wal.commit(7, 1);
        let at = |place| found(&wal, 3, place);
        match at(Place::Begins(checkpoint)) {
            Some(Event::Checkpoint { redo: of, .. }) => assert_eq!(of, redo),
            other => panic!("{left} bytes left: {other:?}"),
        }
        match at(Place::Ends(mark)) {
            Some(Event::RestorePoint { name: of, .. }) => assert_eq!(of, name),
            other => panic!("{left} bytes left: {other:?}"),
        }
        assert_eq!(at(Place::Ends(stop)), Some(Event::BackupEnd { start: redo }), "{left} bytes left");
        assert_eq!(at(Place::Begins(stop)), None, "{left} bytes left: a commit is no landmark");
        assert_eq!(at(Place::Ends(checkpoint)), None, "{left} bytes left");
    }
}

/// The same names and positions, but another server's records.
#[test]
fn other_content_is_not_taken_for_it() {
    let write = |filler: u8| {
        let mut wal = Writer::new(3);
        wal.record(10, 0, 700, &[9; 2000]);
        match filler {
            0 => wal.checkpoint(Lsn(77)),
            _ => wal.record(10, 0, 700, &[filler; 88]),
        };
        wal.record(10, 0, 700, &[9; 200]);
        wal
    };
    let (ours, theirs) = (write(0), write(1));
    assert_eq!(ours.end(), theirs.end());
    let segments = ours.segments();
    let name = SegmentName::of_number(Timeline(1), 3, size());
    let landmarks = Landmarks::read(&identity(), name, &segments[0]).unwrap();
    let place = Place::Begins(landmarks.found[0].0);
    assert!(found(&ours, 3, place).is_some());
    assert_eq!(found(&theirs, 3, place), None);
    assert!(landmarks.reaches(ours.end()) && !landmarks.reaches(Lsn(ours.end().0 + 8)));
    // WAL that is damaged before the record proves nothing
    let mut broken = segments[0].clone();
    broken[600] ^= 1;
    let landmarks = Landmarks::read(&identity(), name, &broken).unwrap();
    assert_eq!(record_at(place, identity().major, &[Some(&landmarks)]), None);
}
