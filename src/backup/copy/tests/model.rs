//! A data directory under random changes against random kinds of backups: every backup reads back exactly its moment, also
//! after the others are gone.

use super::*;

#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// one grain of a file gets other bytes
    WriteGrain(usize, usize, u8),
    /// the file gets another length
    Resize(usize, usize),
    /// truncated, then filled with other bytes to the same length
    Refill(usize, u8),
    /// another file under the same name
    Replace(usize, usize, u8),
    Remove(usize),
    /// the file is there in the other database too, with its time
    Copy(usize),
    /// the file goes to the other database, with its time
    Move(usize),
    /// a backup, compared with the newest or with the first
    Backup(Kind),
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Full,
    Diff,
    Incr,
}

/// Files in each of two databases, in which they have the same names.
pub(crate) const NAMES: usize = 5;
const FILES: usize = 2 * NAMES;

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let size = || prop_oneof![0..3 * GRAIN, 0..10 * SLOT, Just(INLINE_BYTES as usize + 1), Just(4 << 20)];
    let op = prop_oneof![
        6 => (0..FILES, 0..600usize, any::<u8>()).prop_map(|(file, grain, byte)| Op::WriteGrain(file, grain, byte)),
        2 => (0..FILES, size()).prop_map(|(file, size)| Op::Resize(file, size)),
        1 => (0..FILES, any::<u8>()).prop_map(|(file, byte)| Op::Refill(file, byte)),
        1 => (0..FILES, size(), any::<u8>()).prop_map(|(file, size, byte)| Op::Replace(file, size, byte)),
        1 => (0..FILES).prop_map(Op::Remove),
        2 => (0..FILES).prop_map(Op::Copy),
        2 => (0..FILES).prop_map(Op::Move),
        3 => prop_oneof![Just(Kind::Full), Just(Kind::Diff), Just(Kind::Incr)].prop_map(Op::Backup),
    ];
    prop::collection::vec(op, 10..40)
}

/// Clocks stand still in a test: each change gets a second of its own, each backup comes long after.
pub(crate) struct World {
    pub(crate) root: tempfile::TempDir,
    pub(crate) clock: i64,
}

impl World {
    fn path(&self, file: usize) -> std::path::PathBuf {
        self.root.path().join(name(file))
    }

    fn change(&mut self, file: usize, change: impl FnOnce(&Path)) {
        let path = self.path(file);
        change(&path);
        self.clock += 1;
        if let Ok(file) = fs::File::options().write(true).open(&path) {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(self.clock as u64);
            file.set_modified(time).unwrap();
        }
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        match *op {
            Op::WriteGrain(file, grain, byte) => self.change(file, |path| {
                let Ok(open) = fs::File::options().write(true).open(path) else { return };
                let len = open.metadata().unwrap().len();
                let at = (grain * GRAIN) as u64 % len.max(1);
                let run = (len - at).min(GRAIN as u64) as usize;
                open.write_all_at(&content(u64::from(byte) + 2, run), at).unwrap();
            }),
            Op::Resize(file, size) => self.change(file, |path| {
                if let Ok(open) = fs::File::options().write(true).open(path) {
                    open.set_len(size as u64).unwrap();
                }
            }),
            Op::Refill(file, byte) => self.change(file, |path| {
                if let Ok(old) = fs::metadata(path) {
                    fs::write(path, content(u64::from(byte) + 2, old.len() as usize)).unwrap();
                }
            }),
            Op::Replace(file, size, byte) => self.change(file, |path| {
                _ = fs::remove_file(path);
                fs::write(path, content(u64::from(byte) + 2, size)).unwrap();
            }),
            Op::Remove(file) => self.change(file, |path| _ = fs::remove_file(path)),
            Op::Copy(file) => self.copy(file),
            Op::Move(file) => {
                self.copy(file);
                _ = fs::remove_file(self.path(file));
            }
            Op::Backup(_) => self.clock += 60,
        }
    }

    fn copy(&self, file: usize) {
        let (from, to) = (self.path(file), self.path((file + NAMES) % FILES));
        if fs::copy(&from, &to).is_ok() {
            let time = fs::metadata(&from).unwrap().modified().unwrap();
            fs::File::options().write(true).open(&to).unwrap().set_modified(time).unwrap();
        }
    }

    pub(crate) fn files(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let read = |file| Some((name(file).into_bytes(), fs::read(self.path(file)).ok()?));
        (0..FILES).filter_map(read).collect()
    }
}

fn name(file: usize) -> String {
    format!("base/{}/{}", if file < NAMES { 5 } else { 1 }, 20_000 + file % NAMES)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_backup_is_its_moment(ops in ops(), encrypted: bool) {
        let mut world = World { root: data_directory(), clock: 1_700_000_000 };
        let mut repository = repository();
        if encrypted {
            repository.keys = crate::format::chunk::Keys::new(b"a secret");
        }
        let mut moments = Vec::new();
        for op in [Op::Replace(0, 5 << 20, 1), Op::Replace(1, 3 * GRAIN, 2), Op::Backup(Kind::Full)].iter().chain(&ops) {
            world.apply(op);
            let Op::Backup(kind) = op else { continue };
            let label = format!("20240107-{:06}F", moments.len());
            let parent = match kind {
                Kind::Diff => moments.first(),
                Kind::Full | Kind::Incr => moments.last(),
            };
            let full = matches!(kind, Kind::Full);
            let reuse = Reuse { unread: !full, chunks_max: if full { 2 } else { 4 }, leave_thin: full };
            let parent = parent.map(|(label, _, _): &(String, _, _)| (label.as_str(), reuse));
            let (_, packs) = copy_since(&repository, world.root.path(), &label, parent, world.clock).unwrap();
            moments.push((label, world.files(), packs));
        }
        // only what the last backup lists is needed to read it
        let (label, files, packs) = moments.pop().unwrap();
        for (label, files, _) in &moments {
            check(&repository, label, files)?;
        }
        let needed: Vec<_> = packs.iter().map(|pack| pack.pack).collect();
        let all = repository.packs().unwrap();
        let garbage = all.keys().filter(|pack| !needed.contains(pack));
        let garbage: Vec<_> = garbage.map(|pack| crate::repo::layout::pack("main", *pack)).collect();
        repository.store.delete(&garbage).unwrap();
        check(&repository, &label, &files)?;
    }
}

fn check(
    repository: &Repository,
    label: &str,
    files: &BTreeMap<Vec<u8>, Vec<u8>>,
) -> std::result::Result<(), TestCaseError> {
    let mut found = read_back(repository, label);
    prop_assert!(found.remove(&b"global/pg_control"[..]).is_some());
    prop_assert_eq!(found.len(), files.len());
    for (path, (bytes, crc)) in &found {
        prop_assert!(Some(bytes) == files.get(path), "{} of {}", path.escape_ascii(), label);
        prop_assert_eq!(*crc, crc32c::crc32c(bytes));
    }
    Ok(())
}

#[test]
fn an_incremental_stores_what_changed_and_a_full_after_it_next_to_nothing() {
    let mut world = World { root: data_directory(), clock: 1_700_000_000 };
    world.change(0, |path| fs::write(path, content(7, 40 << 20)).unwrap());
    world.change(1, |path| fs::write(path, content(8, 50 * GRAIN)).unwrap());
    let repository = repository();
    let incr = Reuse { unread: true, chunks_max: 4, leave_thin: false };
    let full = Reuse { unread: false, chunks_max: 2, leave_thin: true };
    world.clock += 60;
    let (whole, _) = copy_since(&repository, world.root.path(), "20240107-000000F", None, world.clock).unwrap();
    world.clock += 60;
    let parent = Some(("20240107-000000F", incr));
    let (nothing, _) = copy_since(&repository, world.root.path(), "20240107-000001F", parent, world.clock).unwrap();
    assert_eq!(nothing, 0, "nothing changed: no pack is written");
    for grain in [1, 700, 701, 4000] {
        world.apply(&Op::WriteGrain(0, grain, grain as u8));
    }
    world.clock += 60;
    let parent = Some(("20240107-000001F", incr));
    let (few, _) = copy_since(&repository, world.root.path(), "20240107-000002F", parent, world.clock).unwrap();
    assert!(few < 60_000, "{few} bytes for 4 grains, {whole} for all");
    world.clock += 60;
    let parent = Some(("20240107-000002F", full));
    let (again, _) = copy_since(&repository, world.root.path(), "20240107-000003F", parent, world.clock).unwrap();
    assert!(again < whole / 20, "{again} bytes for a full after {whole}");
    let files = world.files();
    check(&repository, "20240107-000003F", &files).unwrap();
}
