//! Trees of files: comparing them, copying them, and listing what is in them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Every file, directory and link below `root`, by path, links not followed.
///
/// # Panics
/// When it cannot be listed.
pub fn tree(root: &Path) -> BTreeMap<PathBuf, fs::Metadata> {
    let mut found = BTreeMap::new();
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        let full = root.join(&directory);
        for entry in fs::read_dir(&full).unwrap_or_else(|error| panic!("cannot list {}: {error}", full.display())) {
            let entry = entry.expect("a directory can be listed");
            let path = directory.join(entry.file_name());
            let metadata =
                entry.metadata().unwrap_or_else(|error| panic!("cannot look at {}: {error}", path.display()));
            if metadata.is_dir() {
                directories.push(path.clone());
            }
            found.insert(path, metadata);
        }
    }
    found
}

/// The regular files below `root`, links not followed.
pub fn files(root: &Path) -> Vec<PathBuf> {
    tree(root).into_iter().filter(|(_, metadata)| metadata.is_file()).map(|(path, _)| path).collect()
}

/// Demands that two files hold the same bytes.
///
/// # Panics
/// When they do not, with the first byte that differs.
#[track_caller]
pub fn assert_same_bytes(left: &Path, right: &Path) {
    const BLOCK: usize = 1 << 20;
    let open = |path: &Path| File::open(path).unwrap_or_else(|error| panic!("cannot open {}: {error}", path.display()));
    let (mut a, mut b) = (open(left), open(right));
    let mut at = 0;
    loop {
        let (one, other) = (block(&mut a, left, BLOCK), block(&mut b, right, BLOCK));
        if one != other {
            let same = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
            panic!("{} and {} differ at byte {}", left.display(), right.display(), at + same);
        }
        if one.is_empty() {
            return;
        }
        at += one.len();
    }
}

fn block(file: &mut File, path: &Path, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    let read = file.take(len as u64).read_to_end(&mut bytes);
    read.unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    bytes
}

/// The bytes of every file below `root`; without files that somebody takes away meanwhile.
pub fn contents(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let read = |path: PathBuf| match fs::read(root.join(&path)) {
        Ok(bytes) => Some((path, bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => panic!("cannot read {}: {error}", path.display()),
    };
    files(root).into_iter().filter_map(read).collect()
}
