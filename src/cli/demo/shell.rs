//! Running commands as a user at a terminal would: shown, checked, timed, and ended when the demo is.

use std::io::{BufRead, BufReader, IsTerminal, PipeReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, User};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::cluster::Programs;
use super::home::Home;
use crate::cli::options::Common;
use crate::cli::output;
use crate::error::{Error, Result};

/// How often a running command is looked at.
const POLL: Duration = Duration::from_millis(3);
/// How long a command that was asked to end may take to.
const GRACE: Duration = Duration::from_secs(5);

/// Who runs a command. PostgreSQL and what writes to the repository for it are one user; mounting is root's where the demo
/// runs as root. Without root both are the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum As {
    /// the user of the server
    Server,
    /// whoever runs the demo
    Caller,
}

/// Where a command's standard error goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Errors {
    /// straight to the terminal, with progress bars
    Passed,
    /// in with its output
    Taken,
}

/// What a command came to.
#[derive(Debug)]
pub(super) struct Ran {
    /// what it wrote to standard output
    pub(super) stdout: String,
    /// from its start to its end
    pub(super) took: Duration,
}

/// The terminal session that the demo plays.
#[derive(Debug)]
pub(super) struct Shell {
    directory: PathBuf,
    user: Option<User>,
    environment: Vec<(String, String)>,
    interrupted: Arc<AtomicBool>,
    background: Option<Child>,
    colors: bool,
    chapters: u32,
}

/// Sets a flag on the signals that end a program, instead of ending this one before it has cleaned up.
pub(super) fn watch_for_signals() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&flag))
            .map_err(|error| Error::new("cannot wait for signals").source(error))?;
    }
    Ok(flag)
}

impl Shell {
    /// A session in the demo's directory, with `pgcairn` and PostgreSQL's programs in its PATH.
    pub(super) fn new(
        home: &Home,
        programs: &Programs,
        user: Option<User>,
        interrupted: Arc<AtomicBool>,
        repository: Option<&Common>,
    ) -> Self {
        let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/bin:/bin".into());
        let path = format!("{}:{}:{path}", home.path("bin").display(), programs.path());
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let mut environment = vec![
            pair("PATH", &path),
            pair("LC_ALL", "C"),
            pair("PSQLRC", "/dev/null"),
            pair("PGCONNECT_TIMEOUT", "30"),
        ];
        environment.extend(repository.and_then(Common::s3_secret).map(|(name, value)| pair(name, value)));
        let colors = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let directory = home.root().to_owned();
        Self { directory, user, environment, interrupted, background: None, colors, chapters: 0 }
    }

    /// True once the demo was asked to end.
    pub(super) fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// An error once the demo was asked to end.
    pub(super) fn go_on(&self) -> Result<()> {
        if self.interrupted() { Err(Error::new("interrupted")) } else { Ok(()) }
    }

    /// Begins a chapter: its title, and what is being shown.
    pub(super) fn chapter(&mut self, title: &str, text: &[&str]) -> Result<()> {
        self.go_on()?;
        self.chapters += 1;
        output::line("");
        output::line(&self.styled("1", &format!("{}. {title}", self.chapters)));
        for line in text {
            output::line(&format!("   {line}"));
        }
        Ok(())
    }

    /// One line of explanation between commands.
    pub(super) fn say(&self, text: &str) {
        output::line("");
        output::line(&format!("   {text}"));
    }

    /// Demands what must be true, and shows that it is.
    pub(super) fn check(&self, holds: bool, what: &str) -> Result<()> {
        if !holds {
            return Err(Error::new(format!("this does not hold: {what}")));
        }
        output::line(&format!("   {} {what}", self.styled("32", "[ok]")));
        Ok(())
    }

    /// Sets a variable for all later commands.
    pub(super) fn export(&mut self, name: &str, value: &str) {
        self.prompt(As::Caller, &format!("export {name}=\"{value}\""));
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Runs a command line, shown with what it writes.
    ///
    /// # Errors
    /// When it cannot be run, fails, or the demo is asked to end.
    pub(super) fn run(&self, who: As, line: &str) -> Result<Ran> {
        self.prompt(who, line);
        self.finish(self.line(who, line), line, Errors::Passed, |text| output::line(&format!("     {text}")))
    }

    /// Runs a program without a word, unless it fails.
    pub(super) fn quietly(&self, who: As, program: &Path, arguments: &[&str]) -> Result<()> {
        let mut command = self.command(who, program);
        command.args(arguments);
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        let mut said = Vec::new();
        let ran = self.finish(command, &name, Errors::Taken, |text| said.push(text.to_owned()));
        if ran.is_err() && !self.interrupted() {
            said.iter().for_each(|text| output::line(&format!("     {text}")));
        }
        ran.map(drop)
    }

    /// Runs a program for its output alone.
    pub(super) fn read(&self, who: As, program: &Path, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(who, program);
        command.args(arguments);
        Ok(self.finish(command, &program.display().to_string(), Errors::Passed, |_| ())?.stdout)
    }

    /// Starts a command line that goes on until [`Self::stop_background`].
    pub(super) fn run_in_background(&mut self, who: As, line: &str) -> Result<()> {
        self.go_on()?;
        self.prompt(who, &format!("{line} &"));
        let mut command = self.line(who, line);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.background = Some(child.map_err(|error| Error::new(format!("cannot run \"{line}\"")).source(error))?);
        Ok(())
    }

    /// Ends what runs in the background, if anything.
    pub(super) fn stop_background(&mut self) {
        if let Some(mut child) = self.background.take() {
            end(&mut child);
        }
    }

    fn styled(&self, code: &str, text: &str) -> String {
        if self.colors { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn prompt(&self, who: As, line: &str) {
        let prompt = match (&self.user, who) {
            (Some(user), As::Server) => format!("{}$", user.name),
            (Some(_), As::Caller) => "root#".to_owned(),
            (None, _) => "$".to_owned(),
        };
        output::line(&format!("   {prompt} {}", self.styled("36", line)));
    }

    fn line(&self, who: As, line: &str) -> Command {
        let mut command = self.command(who, Path::new("/bin/sh"));
        command.arg("-c").arg(line);
        command
    }

    fn command(&self, who: As, program: &Path) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            // the caller's own servers and repositories are not meant; this goes for PGCAIRN_... too
            if name.to_string_lossy().starts_with("PG") {
                command.env_remove(name);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let (Some(user), As::Server) = (&self.user, who) {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).env("HOME", &user.dir);
        }
        // a group of its own: Ctrl-C comes to the demo alone, which ends its children in order
        command.current_dir(&self.directory).process_group(0).stdin(Stdio::null());
        command
    }

    /// Waits for a command's end while passing on what it writes.
    fn finish(&self, mut command: Command, name: &str, errors: Errors, mut show: impl FnMut(&str)) -> Result<Ran> {
        self.go_on()?;
        let cannot = |error| Error::new(format!("cannot run \"{name}\"")).source(error);
        let (reader, writer) = std::io::pipe().map_err(cannot)?;
        if errors == Errors::Taken {
            command.stderr(writer.try_clone().map_err(cannot)?);
        }
        let started = Instant::now();
        let mut child = command.stdout(writer).spawn().map_err(cannot)?;
        // with it goes our end of the pipe
        drop(command);
        let lines = lines_of(reader);
        let mut stdout = String::new();
        let mut take = |line: String| {
            show(&line);
            stdout.push_str(&line);
            stdout.push('\n');
        };
        let (status, took) = loop {
            match lines.recv_timeout(POLL) {
                Ok(line) => take(line),
                Err(RecvTimeoutError::Disconnected) => std::thread::sleep(POLL),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if self.interrupted() {
                end(&mut child);
                return Err(Error::new("interrupted"));
            }
            if let Some(status) = child.try_wait().map_err(cannot)? {
                break (status, started.elapsed());
            }
        };
        // what it left in the background may hold the pipe: then no more is waited for
        while let Ok(line) = lines.recv_timeout(Duration::from_secs(1)) {
            take(line);
        }
        succeeded(status, name)?;
        Ok(Ran { stdout, took })
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        self.stop_background();
    }
}

fn succeeded(status: ExitStatus, name: &str) -> Result<()> {
    match status.success() {
        true => Ok(()),
        false => Err(Error::new(format!("\"{name}\" failed: {status}"))
            .hint("run \"pgcairn demo --keep\" to look at everything as the failure left it")),
    }
}

fn lines_of(pipe: PipeReader) -> Receiver<String> {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || {
        let lines = BufReader::new(pipe).lines().map_while(std::result::Result::ok);
        // fails when nobody listens any more
        lines.map(|line| send.send(line)).take_while(std::result::Result::is_ok).for_each(drop);
    });
    receive
}

/// Ends a child and all of its group.
fn end(child: &mut Child) {
    let group = Pid::from_raw(child.id() as i32);
    _ = killpg(group, Signal::SIGTERM);
    let asked = Instant::now();
    while asked.elapsed() < GRACE {
        if !matches!(child.try_wait(), Ok(None)) {
            break;
        }
        std::thread::sleep(POLL);
    }
    _ = killpg(group, Signal::SIGKILL);
    _ = child.wait();
}
