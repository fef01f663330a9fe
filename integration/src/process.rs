//! Running programs to their end, with a time-out: a test that hangs tells nothing.

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What a program that ended left behind.
#[derive(Debug)]
pub struct Finished {
    /// how it ended
    pub status: ExitStatus,
    /// what it wrote
    pub stdout: Vec<u8>,
    /// what it complained about
    pub stderr: Vec<u8>,
}

/// Runs a command to its end.
///
/// # Panics
/// When it cannot be started, or does not end in time (it is killed then).
pub fn run(command: &mut Command, stdin: &[u8], timeout: Duration) -> Finished {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let (mut to_child, mut stdout, mut stderr) =
        (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let (out, err) = (read_all(move |to| stdout.read_to_end(to)), read_all(move |to| stderr.read_to_end(to)));
    let status = thread::scope(|scope| {
        // a program that ends early does not read all; what it thinks of that is in its status
        scope.spawn(move || {
            let _ = to_child.write_all(stdin);
        });
        wait(&mut child, timeout)
    });
    let Some(status) = status else {
        panic!("{command:?} did not end within {timeout:?}");
    };
    Finished { status, stdout: out.join().expect("reader"), stderr: err.join().expect("reader") }
}

fn read_all(read: impl FnOnce(&mut Vec<u8>) -> std::io::Result<usize> + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        let _ = read(&mut all);
        all
    })
}

/// Waits for the end; kills the child when that does not come in time.
fn wait(child: &mut Child, timeout: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Runs a command that must succeed, and gives what it wrote.
///
/// # Panics
/// When it fails, with all it said.
pub fn run_ok(command: &mut Command, stdin: &[u8], timeout: Duration) -> String {
    let finished = run(command, stdin, timeout);
    let stdout = String::from_utf8_lossy(&finished.stdout).into_owned();
    if !finished.status.success() {
        let stderr = String::from_utf8_lossy(&finished.stderr);
        panic!("{command:?} ended with {}\nstdout: {stdout}\nstderr: {stderr}", finished.status);
    }
    stdout
}

/// Whether a process of this id is there (a zombie is not).
pub fn is_running(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // the state follows the name, which is in parentheses and may hold anything
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with(['Z', 'X']))
}
