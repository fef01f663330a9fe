//! What is particular to a store in a directory.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::SystemTime;

use super::*;

fn new() -> (TempDir, DirectoryStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = DirectoryStore::open(directory.path(), false).unwrap();
    (directory, store)
}

#[test]
fn modes_are_private() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    let store = DirectoryStore::open(&root, true).unwrap();
    put(&store, "a/b", "x");
    let mode = |path: &str| fs::metadata(root.join(path)).unwrap().mode() & 0o777;
    assert_eq!(mode("a/b") & !0o640, 0);
    assert_eq!(mode("a") & !0o750, 0);
    assert_eq!(mode("") & !0o750, 0);
}

/// Names of temporary files.
const OLD: &str = "4711-0123456789abcdef";
const NEW: &str = "4712-0123456789abcdef";

#[test]
fn what_a_dead_writer_left_is_no_object_and_goes_after_a_day() {
    let (directory, store) = new();
    put(&store, "a", "x");
    let temp = directory.path().join(".tmp");
    assert_eq!(fs::read_dir(&temp).unwrap().count(), 0, "a writer that lives leaves nothing");
    for (name, hours) in [(OLD, 25), (NEW, 23), ("old", 25), ("1-123456789abcdefg", 25)] {
        let file = fs::File::create(temp.join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
    }
    assert_eq!(store.list("", None).unwrap().objects.len(), 1);
    assert_eq!(store.list(".", None).unwrap().objects.len(), 0);
    assert_eq!(store.names("").unwrap(), ["a"]);
    DirectoryStore::open(directory.path(), false).unwrap();
    assert!(!temp.join(OLD).exists());
    assert!(temp.join(NEW).exists());
    assert!(temp.join("old").exists() && temp.join("1-123456789abcdefg").exists(), "they have no name of ours");
}

#[test]
fn a_link_in_place_of_the_temporary_directory_deletes_and_writes_nothing_elsewhere() {
    let (directory, store) = new();
    put(&store, "a/b", "x");
    let victims = tempfile::tempdir().unwrap();
    let old = |path: &Path| {
        let file = fs::File::create(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(72 * 3600)).unwrap();
    };
    old(&victims.path().join("file"));
    old(&victims.path().join(OLD));
    let temp = directory.path().join(".tmp");
    fs::remove_dir(&temp).unwrap();
    symlink(victims.path(), &temp).unwrap();
    let opened = DirectoryStore::open(directory.path(), false).unwrap();
    for store in [&store, &opened] {
        let error = store.put("a/c", Body::Bytes(Bytes::new())).unwrap_err();
        assert!(format!("{error:?}").contains("symbolic link"), "{error:?}");
    }
    assert_eq!(opened.get("a/b").unwrap(), "x", "what is there can be read");
    assert_eq!(fs::read_dir(victims.path()).unwrap().count(), 2);

    // nor what a link in the true directory leads to
    fs::remove_file(&temp).unwrap();
    fs::create_dir(&temp).unwrap();
    symlink(victims.path().join(OLD), temp.join(OLD)).unwrap();
    fs::create_dir(temp.join(NEW)).unwrap();
    DirectoryStore::open(directory.path(), false).unwrap();
    assert_eq!(fs::read_dir(victims.path()).unwrap().count(), 2);
    assert_eq!(fs::read_dir(&temp).unwrap().count(), 2);
}

#[test]
fn symbolic_links_below_the_root_are_not_followed() {
    let (outside, _) = new();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let (directory, store) = new();
    symlink(outside.path(), directory.path().join("link")).unwrap();
    symlink(outside.path().join("secret"), directory.path().join("file")).unwrap();
    assert_eq!(kind(store.get("link/secret")), ErrorKind::Other);
    assert_eq!(kind(store.get("file")), ErrorKind::Other);
    assert_eq!(kind(store.put("link/new", Body::Bytes(Bytes::new()))), ErrorKind::Other);
    assert_eq!(kind(store.put("link/new/er", Body::Bytes(Bytes::new()))), ErrorKind::Other);
    assert_eq!(kind(store.delete(&["link/secret".into()])), ErrorKind::Other);
    // a listing without what lies behind them would be taken for whole
    assert_eq!(kind(store.list("", None)), ErrorKind::Other);
    assert_eq!(kind(store.list("link/", None)), ErrorKind::Other);
    assert_eq!(kind(store.names("")), ErrorKind::Other);
    assert_eq!(kind(store.names("link/")), ErrorKind::Other);
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1, "nothing came, nothing went");

    fs::remove_file(directory.path().join("link")).unwrap();
    fs::remove_file(directory.path().join("file")).unwrap();
    let root = outside.path().join("root");
    symlink(directory.path(), &root).unwrap();
    put(&DirectoryStore::open(&root, true).unwrap(), "a", "the root itself may be one");
    assert_eq!(store.size("a").unwrap(), Some(26));
}

#[test]
fn a_root_that_went_away_is_not_an_empty_one() {
    let (directory, store) = new();
    put(&store, "a/b", "x");
    fs::rename(directory.path(), directory.path().with_extension("away")).unwrap();
    assert_eq!(kind(store.get("a/b")), ErrorKind::Other);
    assert_eq!(kind(store.size("a/b")), ErrorKind::Other);
    assert_eq!(kind(store.list("", None)), ErrorKind::Other);
    assert_eq!(kind(store.names("")), ErrorKind::Other);
    assert_eq!(kind(store.put("a/b", Body::Bytes(Bytes::new()))), ErrorKind::Other);
    fs::rename(directory.path().with_extension("away"), directory.path()).unwrap();
    assert_eq!(store.get("a/b").unwrap(), "x");
}

#[test]
fn a_root_that_cannot_be() {
    let (directory, _) = new();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    assert_eq!(kind(DirectoryStore::open(&file, true)), ErrorKind::Other);
    assert_eq!(kind(DirectoryStore::open(&file.join("below"), true)), ErrorKind::Other);
    assert_eq!(kind(DirectoryStore::open(&directory.path().join("missing"), false)), ErrorKind::NotFound);
}

#[test]
fn an_object_below_an_object_is_refused() {
    let (_directory, store) = new();
    put(&store, "a", "x");
    assert_eq!(kind(store.put("a/b", Body::Bytes(Bytes::new()))), ErrorKind::Other);
    assert_eq!(store.get("a").unwrap(), "x");
}

#[test]
fn a_put_makes_a_directory_that_vanished_again() {
    let (directory, store) = new();
    put(&store, "a/b/c", "x");
    store.delete(&["a/b/c".into()]).unwrap();
    fs::remove_dir_all(directory.path().join("a")).unwrap();
    put(&store, "a/b/c", "y");
    assert_eq!(store.get("a/b/c").unwrap(), "y");
}

#[test]
fn a_directory_larger_than_the_names_held_in_memory() {
    let (directory, store) = new();
    fs::create_dir(directory.path().join("d")).unwrap();
    // directories without objects before the only ones that have some
    for n in 0..2500 {
        fs::create_dir(directory.path().join(format!("d/{n:05}"))).unwrap();
    }
    fs::write(directory.path().join("d/02400/x"), "").unwrap();
    fs::write(directory.path().join("d/9"), "").unwrap();
    let page = store.list("", None).unwrap();
    let keys: Vec<&str> = page.objects.iter().map(|object| object.key.as_str()).collect();
    assert_eq!(keys, ["d/02400/x", "d/9"]);
    assert_eq!(store.names("d/").unwrap(), ["02400", "9"]);
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn a_read_only_directory_is_denied() {
    if is_root() {
        return; // modes do not stop root; the mount below does
    }
    let (directory, store) = new();
    put(&store, "a/b", "x");
    fs::set_permissions(directory.path().join("a"), fs::Permissions::from_mode(0o550)).unwrap();
    assert_eq!(kind(store.put("a/c", Body::Bytes(Bytes::new()))), ErrorKind::Denied);
    fs::set_permissions(directory.path().join("a"), fs::Permissions::from_mode(0o750)).unwrap();
}

/// A file system of one megabyte; `None` where mounting is not allowed.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let flags = nix::mount::MsFlags::empty();
        let mounted = nix::mount::mount(Some("tmpfs"), directory.path(), Some("tmpfs"), flags, Some("size=1m"));
        mounted.ok().map(|()| Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn make_read_only(&self) {
        let flags = nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY;
        nix::mount::mount(None::<&str>, self.path(), None::<&str>, flags, None::<&str>).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_and_a_read_only_one() {
    let Some(disk) = SmallDisk::mount() else { return };
    let store = DirectoryStore::open(disk.path(), true).unwrap();
    put(&store, "a/fits", vec![1; 500_000]);
    assert_eq!(kind(store.put("a/more", Body::Bytes(vec![2; 900_000].into()))), ErrorKind::NoSpace);
    let source = tempfile::NamedTempFile::new().unwrap();
    fs::write(source.path(), vec![2; 900_000]).unwrap();
    assert_eq!(kind(store.put("a/fits", Body::File(source.path().into()))), ErrorKind::NoSpace);
    assert_eq!(store.list("", None).unwrap().objects.len(), 1);
    assert_eq!(store.get("a/fits").unwrap(), vec![1; 500_000], "the old object stays");
    assert_eq!(fs::read_dir(disk.path().join(".tmp")).unwrap().count(), 0, "nothing takes up what space is left");

    disk.make_read_only();
    let store = DirectoryStore::open(disk.path(), false).unwrap();
    assert_eq!(kind(store.put("a/b", Body::Bytes(Bytes::new()))), ErrorKind::Denied);
    assert_eq!(kind(store.delete(&["a/fits".into()])), ErrorKind::Denied);
    assert_eq!(store.size("a/fits").unwrap(), Some(500_000));
}
