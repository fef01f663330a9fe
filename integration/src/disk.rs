//! A disk that can lose power, and another start of the machine. Needs root and loop devices.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::bin;
use crate::place::Place;
use crate::process::run_ok;

nix::ioctl_read!(
    /// The kernel reads the flags, though the number says otherwise.
    ext4_shutdown,
    b'X',
    125,
    u32
);

/// `EXT4_GOING_FLAGS_NOLOGFLUSH`
const NO_LOG_FLUSH: u32 = 2;

/// An ext4 file system in a file of a [`Place`], which unmounts it at the end.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    mountpoint: PathBuf,
    cuts: u32,
}

impl Disk {
    /// Makes one of so many MiB, mounted in `place`.
    ///
    /// # Panics
    /// When that fails.
    pub fn new(place: &Place, mib: u64) -> Self {
        let (image, mountpoint) = (place.join("disk.0"), place.join("disk"));
        File::create(&image).and_then(|file| file.set_len(mib << 20)).expect("a file can be made");
        fs::create_dir(&mountpoint).expect("a directory can be made");
        run_command(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image));
        let disk = Self { image, mountpoint, cuts: 0 };
        disk.mount();
        disk
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    fn mount(&self) {
        run_command(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.mountpoint));
    }

    /// Cuts its power: from here on nothing reaches it any more, and nothing can be read.
    ///
    /// # Panics
    /// When that fails.
    #[allow(unsafe_code, reason = "an ioctl")]
    pub fn cut(&self) {
        let root = File::open(&self.mountpoint).expect("the disk is mounted");
        let mut flags = NO_LOG_FLUSH;
        // SAFETY: the kernel reads one u32 behind the pointer.
        unsafe { ext4_shutdown(root.as_raw_fd(), &mut flags) }.expect("ext4 can be shut down");
    }

    /// Mounts what reached it. A copy of the file, so that whoever still holds the dead file system does no harm.
    ///
    /// # Panics
    /// When that fails.
    pub fn come_back(&mut self) {
        self.cuts += 1;
        let image = self.image.with_extension(self.cuts.to_string());
        run_command(Command::new("umount").arg("-l").arg(&self.mountpoint));
        run_command(Command::new("cp").arg("--sparse=always").args([&self.image, &image]));
        self.image = image;
        self.mount();
    }
}

/// A mount namespace in which the machine seems to have been started another time.
#[derive(Debug)]
pub struct OtherBoot(Child);

impl OtherBoot {
    /// Makes one; `name` is that start's, and lies in a file of `place`.
    ///
    /// # Panics
    /// When that fails.
    pub fn new(place: &Place, name: &str) -> Self {
        let file = place.join("boot_id");
        fs::write(&file, name).expect("a file can be written");
        let script = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && echo here && read end";
        Self::run(script, &file)
    }

    /// A mount namespace that has copies of today's mounts, and nothing else of its own.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn same() -> Self {
        Self::run("cd \"$0\" && echo here && read end", Path::new("/"))
    }

    fn run(script: &str, argument: &Path) -> Self {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script]).arg(argument);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("unshare runs");
        let mut told = String::new();
        let stdout = child.stdout.as_mut().expect("piped");
        BufReader::new(stdout).read_line(&mut told).expect("it says so");
        assert_eq!(told, "here\n", "no mount namespace");
        Self(child)
    }

    /// The binary under test, to be run in it.
    pub fn command(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--target", &self.0.id().to_string(), "--"]).arg(bin::path());
        command
    }
}

impl Drop for OtherBoot {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn run_command(command: &mut Command) {
    run_ok(command.env("PATH", path()), &[], std::time::Duration::from_secs(60));
}

/// With the directories of the administrator's programs.
fn path() -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(OsStr::new(":/usr/sbin:/sbin"));
    path
}
