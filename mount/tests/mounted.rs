//! Through the kernel: what programs see on a mount. Needs root and /dev/fuse.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[allow(dead_code, reason = "shared with other tests")]
mod support;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pgcairn_mount::{Error, Tree, Writes, mountpoint};
use support::tree::{HARMED, MANY, noise};
use support::{ALL_WRITES, Daemon, Random};

#[test]
fn serve_for_another_test() {
    support::serve();
}

fn code<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn a_tree_is_read() {
    let mut daemon = Daemon::read_only();
    assert_eq!(fs::read(daemon.path("c")).unwrap(), noise(300_001, 300_000));
    assert_eq!(fs::read(daemon.path("d/e/y")).unwrap(), noise(8, 8192));
    assert_eq!(fs::read_link(daemon.path("link")).unwrap(), Path::new("a"));
    assert_eq!(fs::read(daemon.path("now")).unwrap(), b"volatile");
    let metadata = fs::metadata(daemon.path("b")).unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o7777, metadata.mtime()), (10_000, 0o644, 1_700_000_002));
    let names: BTreeSet<_> = fs::read_dir(daemon.path("many")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), MANY);
    assert_eq!(fs::metadata(daemon.path("many/00006")).unwrap().len(), 6);
    let listed = fs::read_dir(&daemon.mountpoint).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
    assert!(!listed.iter().any(|name| name == ".hidden"));
    assert_eq!(fs::read(daemon.path(".hidden/inside")).unwrap(), b"found");
    assert_eq!(code(fs::read(daemon.path("absent"))), libc::ENOENT);
    assert_eq!(code(File::create(daemon.path("new"))), libc::EROFS);
    assert_eq!(code(OpenOptions::new().write(true).open(daemon.path("b"))), libc::EROFS);
    File::open(daemon.path("b")).unwrap().sync_all().unwrap();
    daemon.unmount();
}

#[test]
fn a_harmed_range_is_eio_and_the_rest_is_read() {
    let mut daemon = Daemon::writable(Writes::Through);
    let file = File::open(daemon.path("harmed")).unwrap();
    let whole = noise(1_000_001, 1_000_000);
    let mut page = [0; 4096];
    for index in 0..1_000_000 / 4096u64 {
        let at = index * 4096;
        let harmed = at < HARMED.end && at + 4096 > HARMED.start;
        match file.read_exact_at(&mut page, at) {
            Ok(()) => assert_eq!((harmed, &page[..]), (false, &whole[at as usize..][..4096]), "at {at}"),
            Err(error) => assert_eq!((harmed, error.raw_os_error()), (true, Some(libc::EIO)), "at {at}"),
        }
    }
    drop(file);
    daemon.unmount();
}

#[test]
fn mountpoints_are_guarded() {
    let mut daemon = Daemon::read_only();
    assert!(matches!(mountpoint::check(&daemon.mountpoint), Err(Error::AlreadyMounted { .. })));
    let open = File::open(daemon.path("b")).unwrap();
    match mountpoint::unmount(&daemon.mountpoint) {
        Err(Error::Busy { path, users }) => {
            assert_eq!((path, users), (daemon.mountpoint.canonicalize().unwrap(), vec![std::process::id()]));
        }
        other => panic!("{other:?}"),
    }
    daemon.kill();
    assert!(matches!(mountpoint::check(&daemon.mountpoint), Err(Error::DeadMount { .. })));
    // also while a file of it is still open
    mountpoint::unmount(&daemon.mountpoint).unwrap();
    drop(open);
    assert!(mountpoint::check(&daemon.mountpoint).is_ok());
    assert!(matches!(mountpoint::unmount(&daemon.mountpoint), Err(Error::NotMounted { .. })));
}

/// A process with a mount namespace of its own, and in it a copy of every mount there is.
struct Namespace(std::process::Child);

impl Namespace {
    fn new(directory: &Path) -> Self {
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c"]);
        command.arg("cd \"$0\" && echo here && read end").arg(directory);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut told = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut told).unwrap();
        assert_eq!(told, "here\n");
        Self(child)
    }

    /// How this process sees a path.
    fn view(&self, path: &Path) -> std::path::PathBuf {
        Path::new("/proc").join(self.0.id().to_string()).join("root").join(path.strip_prefix("/").unwrap())
    }

    fn end(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.end();
    }
}

/// An idle copy of the mount in another namespace keeps neither the daemon nor the scratch, however it was unmounted.
#[test]
fn an_idle_copy_in_another_namespace_does_not_hold_the_mount() {
    for writes in ALL_WRITES {
        let mut daemon = Daemon::writable(writes);
        let other = Namespace::new(Path::new("/"));
        fs::write(daemon.path("kept"), b"written").unwrap();
        if writes == Writes::Passthrough {
            // as umount(8) and systemd do it
            nix::mount::umount(&daemon.mountpoint).unwrap();
            daemon.wait();
        } else {
            daemon.unmount();
        }
        assert_eq!(code(fs::read(other.view(&daemon.path("kept")))), libc::ENOTCONN);
        daemon.start();
        assert_eq!(fs::read(daemon.path("kept")).unwrap(), b"written");
        daemon.unmount();
    }
}

/// Who works in a copy is not cut off: "busy" by name, and after an unmount by force of habit served until the end.
#[test]
fn a_copy_in_use_is_served_until_its_last_user_is_gone() {
    let mut daemon = Daemon::writable(Writes::Passthrough);
    let mut other = Namespace::new(&daemon.mountpoint);
    match mountpoint::unmount(&daemon.mountpoint) {
        Err(Error::Busy { users, .. }) => assert_eq!(users, [other.0.id()]),
        done => panic!("{done:?}"),
    }
    nix::mount::umount(&daemon.mountpoint).unwrap();
    std::thread::sleep(Duration::from_millis(700));
    fs::write(other.view(&daemon.path("late")), b"written").unwrap();
    other.end();
    daemon.wait();
    daemon.start();
    assert_eq!(fs::read(daemon.path("late")).unwrap(), b"written");
    daemon.unmount();
}

/// What programs do to files, whichever way writes go.
#[test]
fn files_behave() {
    for writes in ALL_WRITES {
        let mut daemon = Daemon::writable(writes);
        exclusive_creation(&daemon);
        unlinked_but_open(&daemon);
        shared_mapping(&daemon);
        sizes(&daemon);
        daemon.remount();
        assert_eq!(fs::read(daemon.path("c")).unwrap()[..9], *b"by a page");
        assert_eq!(fs::metadata(daemon.path("sized")).unwrap().len(), 20_000);
        assert_eq!(fs::read(daemon.path("sized")).unwrap()[..3], *b"123");
        daemon.unmount();
    }
}

fn exclusive_creation(daemon: &Daemon) {
    let path = daemon.path("lockfile");
    let mut first = OpenOptions::new().write(true).create_new(true).open(&path).unwrap();
    assert_eq!(code(OpenOptions::new().write(true).create_new(true).open(&path)), libc::EEXIST);
    first.write_all(b"1").unwrap();
    first.sync_all().unwrap();
    fs::remove_file(&path).unwrap();
    OpenOptions::new().write(true).create_new(true).open(&path).unwrap();
}

fn unlinked_but_open(daemon: &Daemon) {
    for name in ["fresh", "d/x"] {
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).open(daemon.path(name)).unwrap();
        file.write_all(b"still").unwrap();
        fs::remove_file(daemon.path(name)).unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 0);
        file.write_all(b" here").unwrap();
        file.sync_all().unwrap();
        let mut content = [0; 10];
        file.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"still here");
        assert_eq!(code(File::open(daemon.path(name))), libc::ENOENT);
        drop(file);
    }
}

#[allow(unsafe_code, reason = "mmap")]
fn shared_mapping(daemon: &Daemon) {
    for name in ["c", "mapped"] {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(daemon.path(name)).unwrap();
        if name == "mapped" {
            file.set_len(100_000).unwrap();
        }
        let (length, protection) = (100_000, libc::PROT_READ | libc::PROT_WRITE);
        let descriptor = std::os::fd::AsRawFd::as_raw_fd(&file);
        // SAFETY: the mapping lies within the file, and nobody shortens it while it is mapped.
        unsafe {
            let map = libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, descriptor, 0);
            assert_ne!(map, libc::MAP_FAILED);
            std::ptr::copy_nonoverlapping(b"by a page".as_ptr(), map.cast(), 9);
            std::ptr::copy_nonoverlapping(b"x".as_ptr(), map.cast::<u8>().add(50_000), 1);
            assert_eq!(libc::msync(map, length, libc::MS_SYNC), 0);
            assert_eq!(libc::munmap(map, length), 0);
        }
        let content = fs::read(daemon.path(name)).unwrap();
        assert_eq!((&content[..9], content[50_000]), (&b"by a page"[..], b'x'));
    }
}

fn sizes(daemon: &Daemon) {
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(daemon.path("sized")).unwrap();
    let mut other = OpenOptions::new().append(true).open(daemon.path("sized")).unwrap();
    file.write_all(b"123").unwrap();
    assert_eq!(other.seek(SeekFrom::End(0)).unwrap(), 3);
    other.write_all(b"456").unwrap();
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 6);
    file.set_len(4).unwrap();
    assert_eq!(other.metadata().unwrap().len(), 4);
    nix::fcntl::posix_fallocate(&file, 0, 20_000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 20_000);
    let mut content = Vec::new();
    File::open(daemon.path("sized")).unwrap().read_to_end(&mut content).unwrap();
    assert_eq!((&content[..5], content.len()), (&b"1234\0"[..], 20_000));
}

/// The same random operations on a mount and on the local disk.
#[test]
fn random_operations_do_what_a_local_disk_does() {
    for (writes, seed) in ALL_WRITES.into_iter().zip(1..) {
        let mut daemon = Daemon::writable(writes);
        let local = daemon.local("local");
        copy(&daemon.mountpoint, &local);
        let mut random = Random(seed);
        for round in 0..4 {
            for step in 0..120 {
                let choice = random.0;
                let (there, here) = (act(&daemon.mountpoint, choice), act(&local, choice));
                assert_eq!(there, here, "seed {seed}, round {round}, step {step}");
                random.next();
            }
            compare(&daemon.mountpoint, &local);
            if round % 2 == 0 {
                daemon.remount();
            } else {
                daemon.kill();
                mountpoint::unmount(&daemon.mountpoint).unwrap();
                daemon.start();
            }
            compare(&daemon.mountpoint, &local);
        }
        daemon.unmount();
    }
}

const PLACES: [&str; 12] = ["a", "b", "c", "n", "d", "d/x", "d/e", "d/e/y", "d/n", "empty", "empty/n", "m"];

fn act(root: &Path, choice: u64) -> Result<u64, i32> {
    let mut random = Random(choice);
    let mut place = || root.join(PLACES[random.below(PLACES.len() as u64) as usize]);
    let (one, two) = (place(), place());
    let (offset, len) = (random.below(310_000), 1 + random.below(20_000) as usize);
    let open = || OpenOptions::new().read(true).write(true).open(&one);
    let done = match random.below(15) {
        0..=3 => open().and_then(|file| file.write_all_at(&noise(choice, len), offset)),
        4 => open().and_then(|file| file.set_len(offset)),
        5 => File::create(&one).and_then(|mut file| file.write_all(&noise(choice, len))),
        6 => fs::remove_file(&one),
        7 => fs::create_dir(&one),
        8 => fs::remove_dir(&one),
        9..=10 => fs::rename(&one, &two),
        11 => fs::hard_link(&one, &two),
        12 => symlink("elsewhere", &one),
        13 => fs::set_permissions(&one, fs::Permissions::from_mode(0o600 | (offset as u32 & 0o77))),
        _ => open().and_then(|file| {
            file.set_times(fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH + Duration::from_secs(offset)))?;
            file.sync_all()
        }),
    };
    done.map(|()| 0).map_err(|error| error.raw_os_error().unwrap())
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy(&from, &to),
            kind if kind.is_symlink() => symlink(fs::read_link(&from).unwrap(), &to).unwrap(),
            _ if entry.file_name() == "harmed" => {}
            _ => drop(fs::copy(&from, &to).unwrap()),
        }
    }
}

fn compare(there: &Path, here: &Path) {
    let names = |path: &Path| -> BTreeSet<_> {
        let names = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name != "harmed").collect()
    };
    assert_eq!(names(there), names(here), "{}", there.display());
    for name in names(here) {
        let (there, here) = (there.join(&name), here.join(&name));
        let (a, b) = (fs::symlink_metadata(&there).unwrap(), fs::symlink_metadata(&here).unwrap());
        let shown = there.display();
        assert_eq!((a.file_type(), a.mode(), a.uid(), a.gid()), (b.file_type(), b.mode(), b.uid(), b.gid()), "{shown}");
        match a.file_type() {
            kind if kind.is_dir() => {
                if name != "many" {
                    compare(&there, &here);
                }
            }
            kind if kind.is_symlink() => assert_eq!(fs::read_link(&there).unwrap(), fs::read_link(&here).unwrap()),
            _ => {
                assert_eq!((a.len(), a.nlink()), (b.len(), b.nlink()), "{shown}");
                assert!(fs::read(&there).unwrap() == fs::read(&here).unwrap(), "{shown}");
            }
        }
    }
}

/// Writes that fsync acknowledged are there after kill -9, whenever it comes.
#[test]
fn acknowledged_writes_survive_a_killed_daemon() {
    for writes in [Writes::Passthrough, Writes::Back] {
        acknowledged_writes_survive(Daemon::writable(writes));
    }
}

fn acknowledged_writes_survive(mut daemon: Daemon) {
    let tree = support::tree::sample();
    let node = tree.lookup(pgcairn_mount::ROOT, "c".as_ref()).unwrap().unwrap();
    let mut expected = tree.content(node);
    for round in 0..5u64 {
        let count = Arc::new(AtomicU64::new(0));
        let writer = std::thread::spawn({
            let (old, new) = (daemon.path("c"), daemon.path(&format!("new{round}")));
            let count = Arc::clone(&count);
            move || acknowledged(&old, &new, round, &count)
        });
        while count.load(Ordering::Relaxed) < 1 + round * 5 {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_micros(700 * round));
        daemon.kill();
        let pages = writer.join().unwrap();
        mountpoint::unmount(&daemon.mountpoint).unwrap();
        daemon.start();
        assert!(!pages.is_empty(), "nothing was acknowledged");
        for &(page, seed) in &pages {
            expected[page * 8192..][..8192].copy_from_slice(&noise(seed, 8192));
        }
        let content = fs::read(daemon.path("c")).unwrap();
        let fresh = fs::read(daemon.path(&format!("new{round}"))).unwrap();
        // the last write may be there without having been acknowledged
        let last = pages.last().unwrap().0 + 1;
        for page in (0..300_000 / 8192).filter(|&page| page != last) {
            assert!(content[page * 8192..][..8192] == expected[page * 8192..][..8192], "page {page}, round {round}");
        }
        for &(page, seed) in &pages {
            assert!(fresh[page * 8192..][..8192] == noise(seed, 8192), "new page {page}, round {round}");
        }
        expected = content;
    }
    daemon.unmount();
}

/// Pages written and fsynced in both files before the daemon died.
fn acknowledged(old: &Path, new: &Path, round: u64, count: &AtomicU64) -> Vec<(usize, u64)> {
    let mut done = Vec::new();
    let old = OpenOptions::new().write(true).open(old).unwrap();
    let Ok(new) = File::create(new) else { return done };
    for page in 0..36 {
        let seed = round * 1000 + page as u64;
        let write = |file: &File| {
            file.write_all_at(&noise(seed, 8192), page as u64 * 8192)?;
            file.sync_data()
        };
        if write(&new).is_err() || write(&old).is_err() {
            break;
        }
        done.push((page, seed));
        count.fetch_add(1, Ordering::Relaxed);
    }
    done
}

/// A daemon whose scratch is on a disk of 4 MB.
fn on_a_small_disk(writes: Writes, dir: &Path) -> (Daemon, Disk) {
    let mut daemon = Daemon::writable(writes);
    daemon.unmount();
    let disk = Disk(dir.to_owned());
    let flags = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("none"), &disk.0, Some("tmpfs"), flags, Some("size=4m")).unwrap();
    daemon.scratch = Some(disk.0.join("scratch"));
    daemon.start();
    (daemon, disk)
}

/// Where the kernel collects writes, a full disk is reported by the fsync, and what was synced before stays.
#[test]
fn a_full_disk_fails_the_fsync_of_collected_writes() {
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, _disk) = on_a_small_disk(Writes::Back, dir.path());
    let old = OpenOptions::new().write(true).open(daemon.path("c")).unwrap();
    old.write_all_at(&noise(2, 8192), 8192).unwrap();
    old.sync_data().unwrap();
    let mut big = File::create(daemon.path("big")).unwrap();
    big.write_all(&noise(1, 8_000_000)).unwrap();
    assert_eq!(code(big.sync_data()), libc::ENOSPC);
    drop((big, old));
    fs::remove_file(daemon.path("big")).unwrap();
    daemon.remount();
    let mut expected = noise(300_001, 300_000);
    expected[8192..16384].copy_from_slice(&noise(2, 8192));
    assert_eq!(fs::read(daemon.path("c")).unwrap(), expected);
    daemon.unmount();
}

/// A full disk is reported, survived, and over when something was deleted.
#[test]
fn a_full_disk_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, _disk) = on_a_small_disk(Writes::Through, dir.path());
    fs::write(daemon.path("small"), b"before").unwrap();
    let mut big = File::create(daemon.path("big")).unwrap();
    let full = loop {
        match big.write_all(&noise(1, 100_000)) {
            Ok(()) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    let old = OpenOptions::new().write(true).open(daemon.path("c")).unwrap();
    assert_eq!(code(old.write_all_at(&noise(2, 8192), 8192)), libc::ENOSPC);
    assert_eq!(fs::read(daemon.path("c")).unwrap(), noise(300_001, 300_000));
    drop((big, old));
    fs::remove_file(daemon.path("big")).unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    fs::write(daemon.path("after"), noise(3, 1_000_000)).unwrap();
    daemon.remount();
    assert_eq!(fs::read(daemon.path("small")).unwrap(), b"before");
    assert_eq!(fs::read(daemon.path("after")).unwrap(), noise(3, 1_000_000));
    daemon.unmount();
}

/// What a failed write left past the end of a file does not come back when the file grows; and where only a length grew, a
/// full disk is no reason not to read.
#[test]
fn a_write_that_failed_leaves_nothing_behind_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (mut daemon, _disk) = on_a_small_disk(Writes::Through, dir.path());
    let old = OpenOptions::new().read(true).write(true).open(daemon.path("c")).unwrap();
    let mut big = File::create(daemon.path("big")).unwrap();
    while big.write_all(&noise(1, 100_000)).is_ok() {}
    let grown = OpenOptions::new().write(true).open(daemon.path("b")).unwrap();
    grown.set_len(50_000).unwrap();
    assert_eq!(fs::read(daemon.path("b")).unwrap()[10_000..], [0; 40_000]);
    big.set_len(big.metadata().unwrap().len() - 30_000).unwrap();
    assert_eq!(code(old.write_all_at(&[0xee; 256_000], 300_000)), libc::ENOSPC);
    // the kernel asks for it in parts, and some succeeded
    let end = old.metadata().unwrap().len();
    old.set_len(end + 100_000).unwrap();
    let mut behind = vec![1; 100_000];
    old.read_exact_at(&mut behind, end).unwrap();
    assert!(behind.iter().all(|&byte| byte == 0), "bytes of a write that failed");
    drop((big, old, grown));
    // the end of a mount needs room for its journal
    fs::remove_file(daemon.path("big")).unwrap();
    let begun = std::time::Instant::now();
    while fs::write(daemon.path("after"), noise(3, 200_000)).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(30), "the disk stays full");
        std::thread::sleep(Duration::from_millis(50));
    }
    daemon.unmount();
}

struct Disk(std::path::PathBuf);

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}
