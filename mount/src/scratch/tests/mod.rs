//! Random operations against a plain reference, with crashes in between.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use self::model::{Model, Op, Outcome, PLACES};
use super::bitmap::PAGE;
use super::record::Record;
use super::*;
use crate::Error;
use crate::fs::{Caller, Change, Fs};
use crate::tree::ROOT;

mod model;
#[path = "../../../tests/support/tree.rs"]
#[allow(dead_code, reason = "shared with the tests through the kernel")]
mod tree;

fn op() -> impl Strategy<Value = Op> {
    let place = || 0..PLACES.len();
    let offset = || prop_oneof![0u64..20_000, 280_000u64..320_000, (0u64..80).prop_map(|page| page * PAGE)];
    prop_oneof![
        3 => place().prop_map(Op::Create),
        8 => (place(), offset(), 1usize..20_000, any::<u64>()).prop_map(|(p, o, l, s)| Op::Write(p, o, l, s)),
        3 => (place(), prop_oneof![Just(0), offset()]).prop_map(|(p, o)| Op::Truncate(p, o)),
        1 => (place(), offset(), 1u64..20_000).prop_map(|(p, o, l)| Op::Allocate(p, o, l)),
        3 => place().prop_map(Op::Unlink),
        2 => place().prop_map(Op::Mkdir),
        2 => place().prop_map(Op::Rmdir),
        1 => place().prop_map(Op::Symlink),
        2 => (place(), place()).prop_map(|(a, b)| Op::Link(a, b)),
        4 => (place(), place(), any::<bool>()).prop_map(|(a, b, r)| Op::Rename(a, b, r)),
        1 => (place(), 0u32..0o1000).prop_map(|(p, m)| Op::Chmod(p, m)),
        3 => place().prop_map(Op::Sync),
        2 => place().prop_map(Op::Hold),
        1 => Just(Op::LetGo),
        1 => Just(Op::Crash),
        1 => Just(Op::Remount),
        1 => Just(Op::Rewrite),
    ]
}

/// The filesystem under test, addressed by path.
struct Subject {
    fs: Option<Fs>,
    dir: tempfile::TempDir,
    boot: String,
    /// files held open, with the reference's node
    held: Vec<(OpenFile, u64)>,
}

fn tree_of_sample() -> Arc<dyn Tree> {
    Arc::new(tree::sample())
}

impl Subject {
    fn new() -> Self {
        let mut subject =
            Self { fs: None, dir: tempfile::tempdir().unwrap(), boot: "first".to_owned(), held: Vec::new() };
        subject.open().unwrap();
        subject
    }

    fn open(&mut self) -> crate::Result<()> {
        self.held.clear();
        self.fs = None;
        let scratch = open::open(self.dir.path(), "sample", &self.boot)?;
        self.fs = Some(Fs::new(tree_of_sample(), Some(scratch)));
        Ok(())
    }

    fn fs(&self) -> &Fs {
        self.fs.as_ref().unwrap()
    }

    fn scratch(&self) -> &Scratch {
        self.fs().scratch_for_tests()
    }

    fn split<'a>(&self, path: &'a str) -> Outcome<(Inode, &'a OsStr)> {
        let (parents, name) = path.rsplit_once('/').map_or(("", path), |(parents, name)| (parents, name));
        let mut at = ROOT.0;
        for step in parents.split('/').filter(|step| !step.is_empty()) {
            let attr = self.fs().lookup(at, OsStr::new(step)).map_err(code)?.ok_or(libc::ENOENT)?;
            if attr.kind != Kind::Directory {
                return Err(libc::ENOTDIR);
            }
            at = attr.inode;
        }
        Ok((at, OsStr::new(name)))
    }

    fn find(&self, path: &str) -> Outcome<Inode> {
        let (parent, name) = self.split(path)?;
        Ok(self.fs().lookup(parent, name).map_err(code)?.ok_or(libc::ENOENT)?.inode)
    }

    fn opened<T>(&self, path: &str, work: impl FnOnce(&OpenFile) -> io::Result<T>) -> Outcome<T> {
        let inode = self.find(path)?;
        let file = self.fs().open(inode, true).map_err(code)?;
        let done = work(&file).map_err(code);
        self.fs().release(&file);
        done
    }

    fn apply(&mut self, op: &Op, model: &Model) -> Outcome<()> {
        let owner = Caller { uid: 0, gid: 0 };
        let change = |path, change: Change| self.fs().change(self.find(path)?, &change).map(drop).map_err(code);
        match *op {
            Op::Create(p) => {
                let (_, file) = self.fs().create(self.split(PLACES[p])?, 0o600, owner).map_err(code)?;
                self.fs().release(&file);
                Ok(())
            }
            Op::Mkdir(p) => self.fs().make_directory(self.split(PLACES[p])?, 0o700, owner).map(drop).map_err(code),
            Op::Symlink(p) => {
                let made = self.fs().make_link(self.split(PLACES[p])?, OsStr::new("elsewhere"), owner);
                made.map(drop).map_err(code)
            }
            Op::Write(p, offset, len, seed) => {
                self.opened(PLACES[p], |file| self.fs().write(file, offset, &tree::noise(seed, len)))
            }
            Op::Truncate(p, size) => {
                self.opened(PLACES[p], |_| Ok(()))?;
                change(PLACES[p], Change { size: Some(size), ..Change::default() })
            }
            Op::Allocate(p, offset, len) => self.opened(PLACES[p], |file| self.fs().allocate(file, offset, len, false)),
            Op::Unlink(p) => self.fs().unlink(self.split(PLACES[p])?).map_err(code),
            Op::Rmdir(p) => self.fs().remove_directory(self.split(PLACES[p])?).map_err(code),
            Op::Link(from, to) => {
                let inode = self.find(PLACES[from])?;
                self.fs().link(inode, self.split(PLACES[to])?).map(drop).map_err(code)
            }
            Op::Rename(from, to, replace) => {
                self.find(PLACES[from])?;
                self.fs().rename(self.split(PLACES[from])?, self.split(PLACES[to])?, replace).map_err(code)
            }
            Op::Chmod(p, mode) => change(PLACES[p], Change { mode: Some(mode), ..Change::default() }),
            Op::Sync(p) => self.fs().sync(self.find(PLACES[p])?).map_err(code),
            Op::Hold(p) => {
                let file = self.fs().open(self.find(PLACES[p])?, true).map_err(code)?;
                self.held.push((file, model.find(PLACES[p])?));
                Ok(())
            }
            Op::LetGo => {
                self.held.drain(..).for_each(|(file, _)| self.fs.as_ref().unwrap().release(&file));
                Ok(())
            }
            Op::Crash => {
                self.open().unwrap();
                Ok(())
            }
            Op::Remount => {
                self.fs().close().unwrap();
                self.open().unwrap();
                Ok(())
            }
            Op::Rewrite => self.scratch().inner.rewrite(Ending::Open).map_err(code),
        }
    }

    fn content(&self, file: &OpenFile) -> Vec<u8> {
        let mut content = vec![0; self.fs().attributes(file.inode).unwrap().size as usize];
        assert_eq!(self.fs().read(file, 0, &mut content).unwrap(), content.len());
        assert_eq!(self.fs().read(file, content.len() as u64, &mut [0; 10]).unwrap(), 0);
        content
    }
}

fn code(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

fn same(model: &Model, subject: &Subject) -> std::result::Result<(), TestCaseError> {
    let mut todo = vec![(ROOT.0, ROOT.0, String::new())];
    while let Some((plain, inode, path)) = todo.pop() {
        let expected = &model.nodes[&plain];
        let attr = subject.fs().attributes(inode).unwrap();
        prop_assert_eq!((attr.kind, attr.mode), (expected.kind, expected.mode), "{}", &path);
        match attr.kind {
            Kind::File if path != "/harmed" => {
                prop_assert_eq!(attr.links, expected.links, "links of {}", &path);
                let file = subject.fs().open(inode, false).unwrap();
                let content = subject.content(&file);
                subject.fs().release(&file);
                let differs = content.iter().zip(&expected.content).position(|(a, b)| a != b);
                prop_assert_eq!((content.len(), differs), (expected.content.len(), None), "{}", &path);
            }
            Kind::File => {}
            Kind::Symlink => {
                let target = subject.fs().read_link(inode).unwrap().into_encoded_bytes();
                prop_assert_eq!((&target, attr.size), (&expected.content, target.len() as u64), "{}", &path);
            }
            Kind::Directory if path == "/many" => {}
            Kind::Directory => {
                let entries = subject.fs().list(inode).unwrap();
                let names: BTreeSet<_> = entries.iter().map(|entry| entry.name.to_str().unwrap()).collect();
                prop_assert_eq!(names.len(), entries.len(), "a name twice in {}", &path);
                prop_assert_eq!(names, expected.children.keys().map(String::as_str).collect(), "{}", &path);
                for entry in &entries {
                    let name = entry.name.to_str().unwrap();
                    let child = expected.children[name];
                    let found = subject.fs().lookup(inode, &entry.name).unwrap().unwrap();
                    prop_assert_eq!((found.inode, found.kind), (entry.node.0, entry.kind));
                    todo.push((child, entry.node.0, format!("{path}/{name}")));
                }
            }
        }
    }
    for (file, plain) in &subject.held {
        prop_assert_eq!(subject.content(file) == model.nodes[plain].content, true, "a held file");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// A killed daemon loses nothing at all: what was written is in the kernel's cache.
    #[test]
    fn behaves_like_a_plain_file_system(ops in prop::collection::vec(op(), 1..60)) {
        let (mut model, mut subject) = (Model::of(&tree::sample()), Subject::new());
        for op in &ops {
            let actual = subject.apply(op, &model);
            let expected = model.apply(op);
            prop_assert_eq!(actual, expected, "{:?}", op);
        }
        same(&model, &subject)?;
        subject.apply(&Op::Crash, &model).unwrap();
        same(&model, &subject)?;
        subject.apply(&Op::Remount, &model).unwrap();
        same(&model, &subject)?;
    }

    #[test]
    fn a_cut_journal_never_shows_holes(
        ops in prop::collection::vec(op(), 1..40),
        cut in 0.0f64..1.0,
    ) {
        let (mut model, mut subject) = (Model::of(&tree::sample()), Subject::new());
        for op in ops.iter().filter(|op| !matches!(op, Op::Crash | Op::Remount | Op::Rewrite)) {
            let _ = (subject.apply(op, &model), model.apply(op));
        }
        subject.held.clear();
        subject.fs = None;
        let journal = subject.dir.path().join("journal");
        let length = std::fs::metadata(&journal).unwrap().len();
        OpenOptions::new().write(true).open(&journal).unwrap().set_len((length as f64 * cut) as u64).unwrap();
        match subject.open() {
            // cut into what was durable from the start, or into what a deleted file needed
            Err(Error::ScratchDamaged { .. }) => {}
            Err(other) => prop_assert!(false, "{}", other),
            Ok(()) => {
                let root = subject.fs().list(ROOT.0).unwrap();
                for entry in root.iter().filter(|entry| entry.kind == Kind::File && entry.name != "harmed") {
                    let file = subject.fs().open(entry.node.0, false).unwrap();
                    subject.content(&file);
                }
            }
        }
    }
}

/// All versions of one file since it was last fsynced, that one first.
struct History {
    path: &'static str,
    versions: Vec<Vec<u8>>,
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, u64, usize, u64),
    Truncate(usize, u64),
    Sync(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let offset = || prop_oneof![0u64..30_000, (0u64..75).prop_map(|page| page * PAGE)];
    prop_oneof![
        5 => (0usize..3, offset(), 1usize..20_000, any::<u64>()).prop_map(|(p, o, l, s)| Step::Write(p, o, l, s)),
        1 => (0usize..3, 1u64..300_000).prop_map(|(p, o)| Step::Truncate(p, o)),
        2 => (0usize..3).prop_map(Step::Sync),
    ]
}

/// Takes away what was never forced to disk: unsynced pages, and the journal behind a point that was synced.
fn lose_power(subject: &mut Subject, keep: f64) {
    let scratch = subject.scratch();
    let mut lost = Vec::new();
    for node in scratch.inner.namespace.read().nodes.values() {
        let Body::File(body) = &node.body else { continue };
        let mut records = Vec::new();
        body.records(&body.freeze(), &mut records);
        for record in records {
            if let Record::Pages { durable: false, runs, .. } = record {
                lost.push((scratch.inner.store.data.join(body.backing_needed().0), runs));
            }
        }
    }
    let durable = scratch.inner.store.journal.durable();
    let journal = subject.dir.path().join("journal");
    subject.held.clear();
    subject.fs = None;
    for (path, runs) in lost.into_iter().filter(|(path, _)| path.exists()) {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        for run in runs {
            file.write_all_at(&vec![0; (run.count * PAGE) as usize], run.first * PAGE).unwrap();
        }
    }
    let length = std::fs::metadata(&journal).unwrap().len();
    let kept = durable + ((length.saturating_sub(durable)) as f64 * keep) as u64;
    OpenOptions::new().write(true).open(&journal).unwrap().set_len(kept.min(length)).unwrap();
    subject.boot.push('+');
}

fn page(version: &[u8], index: usize, limit: usize) -> Vec<u8> {
    let mut page: Vec<u8> = version.iter().copied().skip(index * PAGE as usize).take(PAGE as usize).collect();
    page.resize(PAGE as usize, 0);
    page.truncate(limit.saturating_sub(index * PAGE as usize));
    page
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// After a power loss every page is one that was there at the last fsync or since, never a hole.
    #[test]
    fn fsynced_data_survives_a_power_loss(
        steps in prop::collection::vec(step(), 1..40),
        keep in 0.0f64..=1.0,
        again in prop::collection::vec(step(), 0..10),
    ) {
        let mut subject = Subject::new();
        let tree = tree::sample();
        let mut histories: Vec<History> = ["b", "c", "d/x"].into_iter().map(|path| {
            let content = tree.content(NodeId(subject.find(path).unwrap()));
            History { path, versions: vec![content] }
        }).collect();
        for steps in [steps, again] {
            for step in steps {
                play(&subject, &mut histories, &step);
            }
            lose_power(&mut subject, keep);
            subject.open().unwrap();
            for history in &mut histories {
                let content = subject.opened(history.path, |file| Ok(subject.content(file))).unwrap();
                let sizes: Vec<_> = history.versions.iter().map(Vec::len).collect();
                prop_assert!(sizes.contains(&content.len()), "{} has {} bytes", history.path, content.len());
                for index in 0..content.len().div_ceil(PAGE as usize) {
                    let found = page(&content, index, content.len());
                    // a version too short to have the page says nothing of it: else zeros would always be right
                    let known = history.versions.iter().any(|version| {
                        version.len() > index * PAGE as usize && page(version, index, content.len()) == found
                    });
                    prop_assert!(known, "page {} of {}", index, history.path);
                }
                history.versions = vec![content];
            }
        }
    }
}

fn play(subject: &Subject, histories: &mut [History], step: &Step) {
    match *step {
        Step::Write(p, offset, len, seed) => {
            let data = tree::noise(seed, len);
            subject.opened(histories[p].path, |file| subject.fs().write(file, offset, &data)).unwrap();
            let mut next = histories[p].versions.last().unwrap().clone();
            next.resize(next.len().max(offset as usize + len), 0);
            next[offset as usize..offset as usize + len].copy_from_slice(&data);
            histories[p].versions.push(next);
        }
        Step::Truncate(p, size) => {
            let inode = subject.find(histories[p].path).unwrap();
            subject.fs().change(inode, &Change { size: Some(size), ..Change::default() }).unwrap();
            let mut next = histories[p].versions.last().unwrap().clone();
            next.resize(size as usize, 0);
            histories[p].versions.push(next);
        }
        Step::Sync(p) => {
            subject.fs().sync(subject.find(histories[p].path).unwrap()).unwrap();
            histories[p].versions.drain(..histories[p].versions.len() - 1);
        }
    }
}

#[test]
fn a_name_is_durable_with_its_file() {
    let mut subject = Subject::new();
    let model = Model::of(&tree::sample());
    for op in [Op::Mkdir(3), Op::Rename(2, 8, true), Op::Write(8, 0, 9000, 1), Op::Unlink(1), Op::Sync(8)] {
        subject.apply(&op, &model).unwrap();
    }
    subject.apply(&Op::Create(1), &model).unwrap();
    lose_power(&mut subject, 0.0);
    subject.open().unwrap();
    assert!(subject.find("n").is_ok() && subject.find("b") == Err(libc::ENOENT));
    assert_eq!(subject.find("c"), Err(libc::ENOENT));
    let content = subject.opened("d/n", |file| Ok(subject.content(file))).unwrap();
    assert_eq!((&content[..9000], content.len()), (&tree::noise(1, 9000)[..], 300_000));
}

#[test]
fn opening_checks_who_and_what() {
    let dir = tempfile::tempdir().unwrap();
    let first = Scratch::open(dir.path(), "one", "boot").unwrap();
    assert!(matches!(Scratch::open(dir.path(), "one", "boot"), Err(Error::ScratchInUse { .. })));
    drop(first);
    match Scratch::open(dir.path(), "two", "boot") {
        Err(Error::ScratchOfOtherBase { found, expected, .. }) => assert_eq!((&*found, &*expected), ("one", "two")),
        _ => panic!("another base was accepted"),
    }
    std::fs::write(dir.path().join("stray"), b"").unwrap();
    assert!(matches!(Scratch::open(dir.path(), "one", "boot"), Err(Error::NotAScratch { .. })));
}

#[test]
fn a_missing_backing_file_is_damage_not_zeros() {
    let mut subject = Subject::new();
    let model = Model::of(&tree::sample());
    subject.apply(&Op::Write(2, 0, 5000, 1), &model).unwrap();
    subject.apply(&Op::Sync(2), &model).unwrap();
    subject.fs = None;
    let data = subject.dir.path().join("data");
    std::fs::read_dir(&data).unwrap().for_each(|entry| std::fs::remove_file(entry.unwrap().path()).unwrap());
    match subject.open() {
        Err(Error::ScratchDamaged { path, .. }) => assert!(path.starts_with(Path::new(&data))),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_harmed_base_page_stops_a_partial_write_only() {
    let subject = Subject::new();
    let half = subject.opened("harmed", |file| subject.fs().write(file, tree::HARMED.start + 10, b"half"));
    assert_eq!(half, Err(libc::EIO));
    // whole pages need nothing of the base, and heal the range
    let start = tree::HARMED.start / PAGE * PAGE;
    let len = (tree::HARMED.end.div_ceil(PAGE) * PAGE - start) as usize;
    let healed = tree::noise(5, len);
    subject.opened("harmed", |file| subject.fs().write(file, start, &healed)).unwrap();
    let content = subject.opened("harmed", |file| Ok(subject.content(file))).unwrap();
    assert_eq!(content[start as usize..][..len], healed);
}

#[test]
fn a_record_of_older_length_makes_no_file_shorter() {
    let mut subject = Subject::new();
    let model = Model::of(&tree::sample());
    subject.apply(&Op::Write(1, 20_000, 5000, 1), &model).unwrap();
    let change = Change { mtime: Some(UNIX_EPOCH), ..Change::default() };
    subject.fs().change(subject.find("b").unwrap(), &change).unwrap();
    subject.apply(&Op::Crash, &model).unwrap();
    let attr = subject.fs().attributes(subject.find("b").unwrap()).unwrap();
    assert_eq!((attr.size, attr.mtime), (25_000, UNIX_EPOCH));
}

#[test]
fn no_link_in_a_scratch_is_followed_and_none_of_others_is_taken() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let place = tempfile::tempdir().unwrap();
    let elsewhere = place.path().join("elsewhere");
    std::fs::write(&elsewhere, "secret").unwrap();
    let dir = place.path().join("scratch");
    let open = || Scratch::open(&dir, "one", "boot");
    drop(open().unwrap());
    for name in ["lock", "journal", "journal.new", "data"] {
        let (path, kept) = (dir.join(name), place.path().join("kept"));
        let was = std::fs::rename(&path, &kept);
        symlink(if name == "data" { place.path() } else { &elsewhere }, &path).unwrap();
        assert!(open().is_err(), "{name}");
        assert_eq!(std::fs::read(&elsewhere).unwrap(), b"secret", "{name}");
        std::fs::remove_file(&path).unwrap();
        was.map_or(Ok(()), |()| std::fs::rename(&kept, &path)).unwrap();
    }
    let mode = |mode| std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o777);
    assert!(matches!(open(), Err(Error::ScratchOfOthers { .. })));
    mode(0o700);
    drop(open().unwrap());
}

#[test]
fn the_content_of_a_file_is_not_read_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (secret, path) = (dir.path().join("secret"), dir.path().join("0-0"));
    std::fs::write(&secret, "secret").unwrap();
    std::os::unix::fs::symlink(&secret, &path).unwrap();
    super::content::open_backing(&path, true).unwrap_err();
}
