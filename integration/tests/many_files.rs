//! 200,000 small files: memory stays inside its bounds, and the mount is ready at once.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pgcairn_integration::{Cluster, Place, Stanza};

const FILES: u32 = 200_000;
const FILES_A_DIRECTORY: u32 = 5_000;
const BACKUP_KIB_MAX: u64 = 300 * 1024;
/// the default limit of the memory cache, and what may come on top
const MOUNT_KIB_MAX: u64 = (64 + 150) * 1024;

/// The most memory a process ever had, in KiB.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

fn watch(child: &mut Child) -> u64 {
    let mut peak = 0;
    loop {
        peak = peak_kib(child.id()).unwrap_or_default().max(peak);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "the backup ended with {status}");
            return peak;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn content(number: u32) -> Vec<u8> {
    let mut state = u64::from(number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..128).flat_map(|_| next()).collect()
}

fn path(number: u32) -> String {
    format!("many/{:03}/file-{number:06}", number / FILES_A_DIRECTORY)
}

/// Behind a link, which a backup follows as if there were none.
fn make_files(data: &Path, place: &Place) {
    symlink(place.directory("many"), data.join("many")).unwrap();
    for number in 0..FILES {
        let path = data.join(path(number));
        if number % FILES_A_DIRECTORY == 0 {
            fs::create_dir(path.parent().unwrap()).unwrap();
        }
        fs::write(path, content(number)).unwrap();
    }
}

#[test]
fn two_hundred_thousand_small_files() {
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    let place = Place::in_memory();
    make_files(cluster.data_directory(), &place);
    stanza.create(&cluster);
    let started = Instant::now();
    let mut backup = stanza.command();
    backup.args(["backup", "--pg", cluster.conninfo()]).stdout(Stdio::null());
    let peak = watch(&mut backup.spawn().unwrap());
    let took = started.elapsed();
    drop((cluster, place));

    let started = Instant::now();
    let mount = stanza.mount("mount", &["--backup", "latest"]);
    let ready = started.elapsed();
    let [daemon] = mount.serving()[..] else { panic!("one daemon serves {:?}", mount.serving()) };
    for number in (0..FILES).step_by(97).chain([FILES - 1]) {
        assert!(fs::read(mount.path().join(path(number))).unwrap() == content(number), "file {number}");
    }
    let listed = pgcairn_integration::files::files(&mount.path().join("many")).len();
    assert_eq!(listed, FILES as usize);
    let mount_peak = peak_kib(daemon as u32).unwrap();
    // past the test runner, which keeps what is printed to itself
    let told = format!(
        "{FILES} files: backup {:.1} s, {} MiB; mount ready after {:.2} s, {} MiB\n",
        took.as_secs_f64(),
        peak / 1024,
        ready.as_secs_f64(),
        mount_peak / 1024
    );
    std::io::Write::write_all(&mut std::io::stdout().lock(), told.as_bytes()).unwrap();
    assert!(peak > 0 && peak < BACKUP_KIB_MAX, "the backup took {peak} KiB");
    assert!(mount_peak < MOUNT_KIB_MAX, "the mount took {mount_peak} KiB");
    assert!(ready < Duration::from_secs(2) || cfg!(debug_assertions), "the mount was ready after {ready:?}");
}
