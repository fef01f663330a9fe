//! Cleaning up when the test itself is killed.
//!
//! A value's `drop` does not run when the process dies by a signal. So each guard keeps a shell waiting at the end of a
//! pipe whose other end only this process holds: when the pipe closes, for whatever reason, the shell cleans up.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// A shell that runs a script when this process is gone.
#[derive(Debug)]
pub struct Watchdog {
    shell: Child,
}

impl Watchdog {
    /// `script` must do no harm when there is nothing left to clean; it finds `arguments` as `$1`, `$2`, ...
    ///
    /// # Panics
    /// When no shell can be started.
    pub fn start(script: &str, arguments: &[&OsStr]) -> Self {
        let shell = Command::new("/bin/sh")
            .args(["-c", &format!("cat > /dev/null; {script}"), "watchdog"])
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // out of the terminal's group: Ctrl-C ends the test, not what cleans up after it
            .process_group(0)
            .spawn()
            .expect("a shell can be started");
        Self { shell }
    }
}

impl Drop for Watchdog {
    /// Closes the pipe and waits until the script is done.
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}
