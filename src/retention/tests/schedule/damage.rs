//! A pack is lost, or a byte of it, and comes back.

use std::sync::Arc;

use super::check::check_files;
use super::model::Moment;
use super::steps::open;
use super::world::World;
use crate::backup::copy::tests::model::Op;
use crate::format::chunk::{Decoder, PackId};
use crate::format::map::changes_base;
use crate::postgres::BackupKind::{Diff, Full, Incr};
use crate::repo::layout;
use crate::store::Body;
use crate::verify::Report;

/// What happened to a pack.
#[derive(Clone, Copy, Debug)]
struct Damage {
    pack: PackId,
    /// the byte that was flipped; else it is gone
    byte: Option<u64>,
}

impl Damage {
    fn harms(&self, of: &Moment) -> bool {
        of.chunks.iter().any(|chunk| {
            let (from, end) = (u64::from(chunk.offset), chunk.end());
            chunk.pack == self.pack && self.byte.is_none_or(|byte| (from..end).contains(&byte))
        })
    }
}

impl World {
    /// Does harm, sees it named, takes a backup that must not suffer by it, and heals.
    pub(super) fn damage(&mut self) {
        let with_packs = self.model.backups.iter().filter(|(_, of)| !of.chunks.is_empty());
        let labels: Vec<String> = with_packs.map(|(label, _)| label.clone()).collect();
        if labels.is_empty() {
            return;
        }
        let label = self.random.pick(&labels);
        let chunk = self.random.pick(&self.model.backups[&label].chunks);
        let key = layout::pack("main", chunk.pack);
        let whole = self.repository.store.get(&key).unwrap();
        let byte = match self.random.below(4) {
            0 => None,
            1 => Some(self.random.below(whole.len() as u64)),
            _ => Some(u64::from(chunk.offset) + self.random.below(u64::from(chunk.stored_len))),
        };
        let damage = Damage { pack: chunk.pack, byte };
        self.say(format!("{damage:?}"));
        match byte {
            None => self.repository.store.delete(std::slice::from_ref(&key)).unwrap(),
            Some(byte) => {
                let mut spoilt = whole.to_vec();
                spoilt[byte as usize] ^= 1 << self.random.below(8);
                self.repository.store.put(&key, Body::Bytes(spoilt.into())).unwrap();
            }
        }
        self.see(damage, &key);
        self.build_on(damage);
        self.repository.store.put(&key, Body::Bytes(whole)).unwrap();
        self.check(true);
        assert!(self.keys("harm/").is_empty());
    }

    fn see(&self, damage: Damage, key: &str) {
        let harmed: Vec<&String> =
            self.model.backups.iter().filter(|(_, of)| damage.harms(of)).map(|(label, _)| label).collect();
        for quick in if damage.byte.is_none() { vec![true, false] } else { vec![false] } {
            let report = self.verify(quick);
            assert_eq!(unsound(&report), harmed, "{report:#?}");
            let [harm] = report.harms.as_slice() else { panic!("{report:#?}") };
            assert_eq!((harm.object.as_str(), harm.backups.iter().collect::<Vec<_>>()), (key, harmed.clone()));
        }
        for (label, of) in &self.model.backups {
            match harmed.contains(&label) {
                false => self.check_backup(label),
                // an error or the truth
                true => _ = check_files(&open(&self.repository, label), &of.files, label),
            }
        }
    }

    /// The next backup needs nothing of what verify found harmed.
    fn build_on(&mut self, damage: Damage) {
        if self.now() <= self.foreign_until {
            return;
        }
        self.change();
        let files = Arc::new(self.files());
        let kind = self.random.pick(&[Full, Diff, Incr]);
        let label = self.backup_to_be(kind)().unwrap();
        self.say(format!("{label} in spite of it"));
        assert_eq!(self.settle_backup(files).as_ref(), Some(&label));
        let of = &self.model.backups[&label];
        assert!(!damage.harms(of), "{label} is harmed, too");
        let report = self.verify(false);
        assert!(!unsound(&report).contains(&&label), "{report:#?}");
        self.check_backup(&label);
    }
}

/// An incremental's changes of a large file may say only what is different from those of the backup before it.
#[test]
fn changes_that_others_are_derived_from_are_missed_where_they_are_needed() {
    let mut world = World::new(1);
    for _ in 0..2 {
        let files = Arc::new(world.files());
        world.backup_to_be(Incr)().unwrap();
        world.settle_backup(files);
        world.pass(60);
        world.data.clock = world.now();
        world.data.apply(&Op::WriteGrain(0, 7, 9));
    }
    let labels: Vec<&String> = world.model.backups.keys().collect();
    let bases = |label: &String| {
        let (mut decoder, mut bases) = (Decoder::new().unwrap(), Vec::new());
        for chunk in &world.model.backups[label].chunks {
            let plain = world.repository.fetch_chunk(&mut decoder, chunk).unwrap();
            bases.extend(changes_base("changes", &plain).ok().flatten());
        }
        bases
    };
    let base = bases(labels[1]).pop().unwrap();
    let key = layout::pack("main", base.pack);
    let mut spoilt = world.repository.store.get(&key).unwrap().to_vec();
    spoilt[base.offset as usize + 5] ^= 1;
    world.repository.store.put(&key, Body::Bytes(spoilt.into())).unwrap();
    assert_eq!(unsound(&world.verify(false)), labels);
    world.repository.store.delete(&[key]).unwrap();
    for quick in [true, false] {
        assert_eq!(unsound(&world.verify(quick)), labels);
    }
}

/// Labels of the backups that are harmed.
fn unsound(report: &Report) -> Vec<&String> {
    report.backups.iter().filter(|of| !of.sound).map(|of| &of.label).collect()
}
