//! Power cuts: what was made durable through a mount is there afterwards, and nothing is ever garbage.
//!
//! The scratch lies on an ext4 file system of its own, in a loop device. A cut is that file system's shutdown without a
//! flush of its log, then the death of the daemon; what the disk has by then is mounted again, after another boot.
//! Needs root, /dev/fuse and loop devices. `PGCAIRN_POWER_CUTS` says for how many minutes to go on (usually seconds),
//! `PGCAIRN_POWER_CUT_SEED` with which seed to begin.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and tells how far it is")]

#[allow(dead_code, reason = "shared with other tests")]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pgcairn_mount::{Writes, mountpoint};
use support::tree::{noise, sample};
use support::{ALL_WRITES, Daemon, Random};

#[test]
fn serve_for_another_test() {
    support::serve();
}

/// Set in the environment of the test in its own mount namespace.
const INSIDE: &str = "PGCAIRN_TEST_INSIDE";
/// How long the test goes on when nobody says.
const SECONDS: u64 = 9;
const PAGE: usize = 4096;
/// Files of the tree, and names that are free in it.
const PLACES: [&str; 9] = ["b", "c", "d/x", "d/e/y", "a", "n", "m", "d/n", "d/e/o"];
const DIRECTORIES: [&str; 3] = ["", "d", "d/e"];

/// In a mount namespace of its own: a copy of the disk's mount that others take with them would keep its file system
/// from ending.
#[test]
fn nothing_that_was_synced_is_lost_to_a_power_cut() {
    if std::env::var_os(INSIDE).is_some() {
        return cut_again_and_again();
    }
    let mut again = Command::new("unshare");
    again.args(["--mount", "--propagation", "private"]).arg(std::env::current_exe().unwrap());
    again.args(["--exact", "nothing_that_was_synced_is_lost_to_a_power_cut", "--nocapture"]);
    assert!(again.env(INSIDE, "1").status().unwrap().success());
}

fn cut_again_and_again() {
    let minutes: Option<u64> = std::env::var("PGCAIRN_POWER_CUTS").ok().map(|minutes| minutes.parse().unwrap());
    let first: Option<u64> = std::env::var("PGCAIRN_POWER_CUT_SEED").ok().map(|seed| seed.parse().unwrap());
    let allowed = Duration::from_secs(minutes.map_or(SECONDS, |minutes| minutes * 60));
    let began = Instant::now();
    // each ordinary run tries others
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() * 1000;
    let mut cuts = 0;
    for seed in first.unwrap_or(now).. {
        if cuts > 0 && began.elapsed() > allowed {
            break;
        }
        let mut trial = Trial::new(seed);
        for _ in 0..3 {
            trial.round();
            cuts += 1;
        }
        trial.daemon.unmount();
        if cuts % 300 == 0 {
            println!("{cuts} power cuts, {} s, next seed {}", began.elapsed().as_secs(), seed + 1);
        }
    }
    println!("{cuts} power cuts in {} s lost nothing", began.elapsed().as_secs());
}

/// One seed: a scratch, and a model of what must be in it.
struct Trial {
    seed: u64,
    random: Random,
    model: Model,
    /// open files with the model's number of theirs
    held: Vec<(File, usize)>,
    daemon: Daemon,
    disk: Disk,
    writes: Writes,
    boots: u32,
    /// what was done, for a failure's message
    story: Vec<String>,
}

impl Trial {
    fn new(seed: u64) -> Self {
        let disk = Disk::new();
        let writes = ALL_WRITES[(seed % 3) as usize];
        let mut daemon = Daemon::on(disk.mountpoint.join("scratch"), writes);
        daemon.boot = Some(format!("{seed}.0"));
        daemon.start();
        let (random, model) = (Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)), Model::new());
        Self { seed, random, model, held: vec![], daemon, disk, writes, boots: 0, story: vec![] }
    }

    fn round(&mut self) {
        for _ in 0..5 + self.random.below(40) {
            self.step();
        }
        self.cut();
        self.check();
    }

    fn step(&mut self) {
        let place = PLACES[self.random.below(PLACES.len() as u64) as usize];
        match self.random.below(40) {
            0..=6 => self.write(place, Where::End),
            7..=9 => self.write(place, Where::Gap),
            10..=15 => self.write(place, Where::Inside),
            16..=18 => self.truncate(place),
            19..=20 => self.hold(place),
            21..=22 => {
                self.held.pop();
                self.story.push("close one".to_owned());
            }
            23..=29 => self.sync(place),
            30 => self.sync_directory(),
            31..=33 => self.create(place),
            34..=35 => self.rename(place),
            36 => self.unlink(place),
            37 => self.sync_all(),
            38 => self.allocate(place),
            _ if self.random.below(2) == 0 => self.remount(),
            _ => self.kill(),
        }
    }

    /// The file at a place: as it is held open, or opened now.
    fn file(&mut self, place: &str) -> Option<(File, usize)> {
        let id = *self.model.names().get(place)?;
        if self.random.below(2) == 0
            && let Some((file, _)) = self.held.iter().find(|(_, held)| *held == id)
        {
            return Some((file.try_clone().unwrap(), id));
        }
        let opened = OpenOptions::new().read(true).write(true).open(self.daemon.path(place));
        Some((opened.unwrap_or_else(|error| panic!("{place}: {error}\n{}", self.told())), id))
    }

    fn write(&mut self, place: &str, position: Where) {
        let Some((file, id)) = self.file(place) else { return };
        let size = self.model.files[id].last().unwrap().len() as u64;
        let offset = match position {
            Where::End => size,
            Where::Gap => size.next_multiple_of(PAGE as u64) + self.random.below(5) * PAGE as u64,
            Where::Inside if self.random.below(2) == 0 => self.random.below(size.max(1)) / PAGE as u64 * PAGE as u64,
            Where::Inside => self.random.below(size.max(1)),
        };
        let len = match self.random.below(3) {
            0 => 1 + self.random.below(300),
            1 => 8192,
            _ => 1 + self.random.below(30_000),
        } as usize;
        let data = noise(self.random.next(), len);
        file.write_all_at(&data, offset).unwrap();
        self.story.push(format!("write {len} at {offset} of {place} ({id}, {size} bytes)"));
        self.model.change(id, |content| {
            content.resize(content.len().max(offset as usize + len), 0);
            content[offset as usize..offset as usize + len].copy_from_slice(&data);
        });
    }

    fn truncate(&mut self, place: &str) {
        let Some((file, id)) = self.file(place) else { return };
        let size = self.model.files[id].last().unwrap().len() as u64;
        let to = match self.random.below(4) {
            0 => 0,
            1 => size + self.random.below(20_000),
            _ => self.random.below(size + 1),
        };
        file.set_len(to).unwrap();
        self.story.push(format!("truncate {place} ({id}) from {size} to {to}"));
        self.model.resize(id, to as usize);
    }

    fn allocate(&mut self, place: &str) {
        let Some((file, id)) = self.file(place) else { return };
        let size = self.model.files[id].last().unwrap().len() as u64;
        let (offset, len) = (self.random.below(size + 1), 1 + self.random.below(30_000));
        nix::fcntl::posix_fallocate(&file, offset as i64, len as i64).unwrap();
        self.story.push(format!("allocate {len} at {offset} of {place} ({id}, {size} bytes)"));
        self.model.resize(id, size.max(offset + len) as usize);
    }

    fn hold(&mut self, place: &str) {
        if let Some(opened) = self.file(place) {
            self.story.push(format!("hold {place} ({})", opened.1));
            self.held.push(opened);
        }
    }

    fn sync(&mut self, place: &str) {
        let Some((file, id)) = self.file(place) else { return };
        if self.random.below(2) == 0 { file.sync_all() } else { file.sync_data() }.unwrap();
        self.story.push(format!("fsync {place} ({id})"));
        self.model.synced(id);
    }

    fn sync_directory(&mut self) {
        let directory = DIRECTORIES[self.random.below(3) as usize];
        File::open(self.daemon.path(directory)).unwrap().sync_all().unwrap();
        self.story.push(format!("fsync directory \"{directory}\""));
        self.model.synced_directory(directory);
    }

    /// The whole mount, as PostgreSQL does it before crash recovery, when nothing is open.
    fn sync_all(&mut self) {
        self.held.clear();
        // without O_DIRECTORY, as PostgreSQL and sync(1) open it
        nix::unistd::syncfs(File::open(&self.daemon.mountpoint).unwrap()).unwrap();
        self.story.push("syncfs".to_owned());
        self.model.synced_all();
    }

    fn create(&mut self, place: &str) {
        if self.model.names().contains_key(place) {
            return;
        }
        let file = File::create_new(self.daemon.path(place)).unwrap();
        let id = self.model.create(place);
        self.story.push(format!("create {place} ({id})"));
        let data = noise(self.random.next(), self.random.below(20_000) as usize);
        file.write_all_at(&data, 0).unwrap();
        self.story.push(format!("write {} at 0 of {place} ({id}, 0 bytes)", data.len()));
        self.model.change(id, |content| *content = data);
        if self.random.below(3) == 0 {
            file.sync_all().unwrap();
            self.story.push(format!("fsync {place} ({id})"));
            self.model.synced(id);
        }
    }

    fn rename(&mut self, from: &str) {
        let to = PLACES[self.random.below(PLACES.len() as u64) as usize];
        if from == to || !self.model.names().contains_key(from) {
            return;
        }
        fs::rename(self.daemon.path(from), self.daemon.path(to)).unwrap();
        self.story.push(format!("rename {from} to {to}"));
        self.model.rename(from, to);
    }

    fn unlink(&mut self, place: &str) {
        if self.model.names().contains_key(place) {
            fs::remove_file(self.daemon.path(place)).unwrap();
            self.story.push(format!("unlink {place}"));
            self.model.unlink(place);
        }
    }

    /// A clean end makes everything durable.
    fn remount(&mut self) {
        self.held.clear();
        self.daemon.remount();
        self.story.push("unmount and mount".to_owned());
        self.model.synced_all();
    }

    /// A daemon that dies loses nothing that it was given, and the next one makes what it finds durable.
    fn kill(&mut self) {
        if self.writes == Writes::Back {
            // what the kernel had collected goes with the daemon
            self.held.clear();
        }
        self.daemon.kill();
        self.held.clear();
        mountpoint::unmount(&self.daemon.mountpoint).unwrap();
        self.daemon.start();
        self.story.push("kill and mount".to_owned());
        self.model.synced_all();
        self.check();
    }

    fn cut(&mut self) {
        self.disk.cut();
        self.daemon.kill();
        self.held.clear();
        mountpoint::unmount(&self.daemon.mountpoint).unwrap();
        self.disk.remount();
        self.boots += 1;
        self.daemon.boot = Some(format!("{}.{}", self.seed, self.boots));
        self.daemon.start();
        self.story.push("power cut".to_owned());
    }

    fn told(&self) -> String {
        format!("seed {}, {:?}:\n  {}", self.seed, self.writes, self.story.join("\n  "))
    }

    /// Compares the mount with the model; what is there now is durable.
    fn check(&mut self) {
        let found: BTreeMap<&'static str, Vec<u8>> = PLACES
            .into_iter()
            .filter_map(|place| match fs::read(self.daemon.path(place)) {
                Ok(content) => Some((place, content)),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
                Err(error) => panic!("{place}: {error}\n{}", self.told()),
            })
            .collect();
        if let Err(what) = self.model.settle(&found) {
            panic!("{what}\n{}", self.told());
        }
    }
}

enum Where {
    End,
    Gap,
    Inside,
}

/// What must be there, and what may be.
struct Model {
    /// of every file the contents since it was last synced, that one first
    files: Vec<Vec<Vec<u8>>>,
    /// Files whose length was set since they were last synced. As on the disk below, their new length may become durable
    /// without what was written before, which then reads as zeros.
    resized: BTreeSet<usize>,
    /// the names after every change of them; changes become durable in their order
    history: Vec<BTreeMap<&'static str, usize>>,
    /// the first of them that a power cut may lead back to
    required: usize,
    /// the last change of names that each file, or directory, had a part in
    file_changes: BTreeMap<usize, usize>,
    directory_changes: BTreeMap<&'static str, usize>,
}

impl Model {
    fn new() -> Self {
        let tree = sample();
        let (mut files, mut names) = (Vec::new(), BTreeMap::new());
        for place in PLACES {
            if let Some(content) = tree.content_at(place) {
                names.insert(place, files.len());
                files.push(vec![content]);
            }
        }
        let (resized, file_changes, directory_changes) = Default::default();
        Self { files, resized, history: vec![names], required: 0, file_changes, directory_changes }
    }

    fn names(&self) -> &BTreeMap<&'static str, usize> {
        self.history.last().unwrap()
    }

    fn change(&mut self, id: usize, work: impl FnOnce(&mut Vec<u8>)) {
        let mut next = self.files[id].last().unwrap().clone();
        work(&mut next);
        self.files[id].push(next);
    }

    fn resize(&mut self, id: usize, size: usize) {
        self.change(id, |content| content.resize(size, 0));
        self.resized.insert(id);
    }

    fn named(&mut self, names: BTreeMap<&'static str, usize>, files: &[usize], places: &[&'static str]) {
        self.history.push(names);
        let change = self.history.len() - 1;
        self.file_changes.extend(files.iter().map(|&id| (id, change)));
        self.directory_changes.extend(places.iter().map(|place| (directory(place), change)));
    }

    fn create(&mut self, place: &str) -> usize {
        let place = PLACES.into_iter().find(|known| *known == place).unwrap();
        let (id, mut names) = (self.files.len(), self.names().clone());
        self.files.push(vec![Vec::new()]);
        names.insert(place, id);
        self.named(names, &[id], &[place]);
        id
    }

    fn rename(&mut self, from: &str, to: &'static str) {
        let from = PLACES.into_iter().find(|known| *known == from).unwrap();
        let mut names = self.names().clone();
        let id = names.remove(from).unwrap();
        names.insert(to, id);
        self.named(names, &[id], &[from, to]);
    }

    fn unlink(&mut self, place: &str) {
        let place = PLACES.into_iter().find(|known| *known == place).unwrap();
        let mut names = self.names().clone();
        let id = names.remove(place).unwrap();
        self.named(names, &[id], &[place]);
    }

    fn synced(&mut self, id: usize) {
        let last = self.files[id].len() - 1;
        self.files[id].drain(..last);
        self.resized.remove(&id);
        self.required = self.required.max(self.file_changes.get(&id).copied().unwrap_or(0));
    }

    fn synced_directory(&mut self, directory: &str) {
        self.required = self.required.max(self.directory_changes.get(directory).copied().unwrap_or(0));
    }

    fn synced_all(&mut self) {
        (0..self.files.len()).for_each(|id| self.synced(id));
        self.required = self.history.len() - 1;
    }

    /// Finds the state that was found among those allowed, and goes on from it.
    fn settle(&mut self, found: &BTreeMap<&'static str, Vec<u8>>) -> Result<(), String> {
        let mut why = Vec::new();
        for (number, names) in self.history.iter().enumerate().skip(self.required) {
            match self.fits(names, found) {
                Ok(()) => {
                    let names = names.clone();
                    names.iter().for_each(|(place, &id)| self.files[id] = vec![found[place].clone()]);
                    (self.history, self.required) = (vec![names], 0);
                    self.resized.clear();
                    self.file_changes.clear();
                    self.directory_changes.clear();
                    return Ok(());
                }
                Err(what) => why.push(format!("names after change {number}: {what}")),
            }
        }
        Err(why.join("\n"))
    }

    fn fits(
        &self,
        names: &BTreeMap<&'static str, usize>,
        found: &BTreeMap<&'static str, Vec<u8>>,
    ) -> Result<(), String> {
        if !names.keys().eq(found.keys()) {
            return Err(format!("expected {:?}, found {:?}", names.keys(), found.keys()));
        }
        names.iter().try_for_each(|(place, &id)| {
            one_of(&self.files[id], &found[place], self.resized.contains(&id))
                .map_err(|what| format!("{place} ({id}): {what}"))
        })
    }
}

fn directory(place: &'static str) -> &'static str {
    place.rsplit_once('/').map_or("", |(directory, _)| directory)
}

/// Every byte is one that some version had there, and the length lies between theirs. A page that was not synced may be torn:
/// the kernel writes it out while it is being changed.
fn one_of(versions: &[Vec<u8>], found: &[u8], resized: bool) -> Result<(), String> {
    let lengths = versions.iter().map(Vec::len);
    let (least, most) = (lengths.clone().min().unwrap(), lengths.max().unwrap());
    if found.len() < least || found.len() > most {
        return Err(format!("{} bytes, not {least} to {most}", found.len()));
    }
    for (index, page) in found.chunks(PAGE).enumerate() {
        // a version that ends before this page says nothing of it: else zeros would always be right
        let olds: Vec<&[u8]> = versions.iter().filter_map(|version| version.get(index * PAGE..)).collect();
        let had = |at: usize, byte: u8| olds.iter().any(|old| old.get(at).copied().unwrap_or(0) == byte);
        let known = olds.iter().any(|old| !old.is_empty());
        let is_theirs = known && page.iter().enumerate().all(|(at, &byte)| had(at, byte));
        let zeros = page.iter().all(|&byte| byte == 0);
        let new = zeros && resized && versions.iter().any(|version| version.len() <= index * PAGE);
        if !(new || is_theirs) {
            let kind = if zeros { "zeros" } else { "bytes that were never there" };
            return Err(format!(
                "page {index} of {} is {kind}; {} versions",
                found.len().div_ceil(PAGE),
                versions.len()
            ));
        }
    }
    Ok(())
}

/// A disk of its own that loses power.
struct Disk {
    image: PathBuf,
    mountpoint: PathBuf,
    _directory: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (image, mountpoint) = (directory.path().join("image"), directory.path().join("disk"));
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        fs::create_dir(&mountpoint).unwrap();
        // a power cut may leave some blocks of a page that was not synced and not the others: pages are one block here
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=1"]).arg(&image));
        let disk = Self { image, mountpoint, _directory: directory };
        disk.mount();
        disk
    }

    fn mount(&self) {
        run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.mountpoint));
    }

    /// From here on nothing reaches the disk any more.
    #[allow(unsafe_code, reason = "an ioctl")]
    fn cut(&self) {
        const EXT4_IOC_SHUTDOWN: libc::c_ulong = 0x8004_587d;
        const NO_LOG_FLUSH: u32 = 2;
        let root = File::open(&self.mountpoint).unwrap();
        // SAFETY: the kernel reads one u32 behind the pointer.
        let done = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_SHUTDOWN, &NO_LOG_FLUSH) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    fn remount(&self) {
        unmount(&self.mountpoint);
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.mountpoint, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn unmount(path: &Path) {
    let began = Instant::now();
    while let Err(error) = nix::mount::umount(path) {
        assert!(error == nix::errno::Errno::EBUSY && began.elapsed() < Duration::from_secs(30), "{error}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn run(command: &mut Command) {
    let done = command.output().unwrap();
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}
