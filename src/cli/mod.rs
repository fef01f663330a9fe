//! One file per verb; what they share about options, the repository and output is in [`options`], [`config`] and [`output`].

mod archive_get;
mod archive_push;
mod archive_worker;
mod backup;
mod check;
mod cipher;
pub mod clones;
mod config;
mod daemon;
mod demo;
mod expire;
mod extract;
mod info;
mod mount;
mod options;
mod output;
mod pg;
mod point;
mod repo;
mod restore;
mod retention;
mod signals;
mod stanza_create;
mod stanza_upgrade;
mod start;
mod stop;
mod umount;
mod verify;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Args, Command, CommandFactory, FromArgMatches, Parser, Subcommand};

use self::signals::Ending;
use crate::clone::sandbox;
use crate::error::{Error, Result};

/// PostgreSQL backups you can mount: back up a running cluster into content-addressed chunks, on S3 or in a directory;
/// mount any backup as a data directory; start PostgreSQL on it in seconds, without a restore.
#[derive(Debug, Parser)]
#[command(name = "pgcairn", version, max_term_width = 110, propagate_version = true)]
#[command(after_help = "Begin with:\n  \
    pgcairn --repo /backups --stanza main stanza-create --pg \"host=/var/run/postgresql user=postgres\"\n  \
    pgcairn --repo /backups --stanza main backup\n  \
    pgcairn --repo /backups --stanza main start latest\n\n\
    The long name of any option can be a key of /etc/pgcairn.toml; those with an [env: ...] can come from there.")]
struct Cli {
    #[command(flatten)]
    common: options::Common,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    StanzaCreate(stanza_create::StanzaCreate),
    StanzaUpgrade(stanza_upgrade::StanzaUpgrade),
    Check(check::Check),
    Backup(backup::Backup),
    Info(info::Info),
    Expire(expire::Expire),
    Verify(verify::Verify),
    Repo(repo::Repo),
    Mount(mount::Mount),
    Umount(umount::Umount),
    Start(start::Start),
    Stop(stop::Stop),
    Restore(restore::Restore),
    Extract(extract::Extract),
    ArchivePush(archive_push::ArchivePush),
    ArchiveGet(archive_get::ArchiveGet),
    #[command(hide = true)]
    ArchiveWorker(archive_worker::ArchiveWorker),
    Demo(demo::Demo),
}

/// Runs the program; the exit status is 0 done, 1 failed, 2 bad usage (and see `archive-get`).
pub fn main() -> ExitCode {
    refuse_writing_by_others();
    let arguments: Vec<_> = std::env::args_os().collect();
    // before anything of the options is built: a clone's server waits for it
    if arguments.get(1).is_some_and(|argument| argument == sandbox::FLAG) {
        let error = sandbox::run(&arguments[2..]);
        output::note(&error.told());
        return ExitCode::from(sandbox::UNAVAILABLE);
    }
    // to PostgreSQL, whatever goes wrong in a restore_command must look different from the end of WAL
    let is_archive_get = arguments.iter().any(|argument| argument == "archive-get");
    let code = |code| if is_archive_get { archive_get::FAILED } else { code };
    let read = cipher::refuse_secrets(&arguments).and_then(|()| config::Configuration::read(&arguments));
    let cli = match read.map_err(Misuse::Configuration).and_then(|configuration| Cli::of(&arguments, configuration)) {
        Ok(cli) => cli,
        Err(Misuse::Configuration(error)) => return fail(&error, code(2)),
        Err(Misuse::Arguments(error)) => {
            _ = error.print();
            return ExitCode::from(if error.use_stderr() { code(2) } else { 0 });
        }
    };
    output::start_log(&cli.common);
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| cli.run())) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => fail(&error, code(1)),
        Err(_) => ExitCode::from(code(101)),
    }
}

/// What is written here is believed later, by root too: whatever the umask that was inherited, as one of 0 in a container,
/// nobody but the owner may write it. A umask that grants less stays.
fn refuse_writing_by_others() {
    use nix::sys::stat::{Mode, umask};
    let others = Mode::S_IWGRP | Mode::S_IWOTH;
    umask(umask(others) | others);
}

/// What is wrong with a command line.
enum Misuse {
    Configuration(Error),
    Arguments(clap::Error),
}

/// Adds a verb's options.
type WithOptions = fn(Command) -> Command;

/// Verbs that a server calls for each file of WAL. A call that finds its file archived ahead would spend a fifth of its time on
/// learning the options of all the others.
const SHORT: [(&str, WithOptions); 2] =
    [("archive-push", archive_push::ArchivePush::augment_args), ("archive-get", archive_get::ArchiveGet::augment_args)];

impl Cli {
    fn of(arguments: &[OsString], configuration: Option<config::Configuration>) -> std::result::Result<Self, Misuse> {
        let command = match configuration {
            // it has keys of all verbs
            Some(configuration) => configuration.defaults_of(Self::command()).map_err(Misuse::Configuration)?,
            None => match Self::short(arguments) {
                Some(cli) => return Ok(cli),
                None => Self::command(),
            },
        };
        Self::parsed(command, arguments).map_err(Misuse::Arguments)
    }

    /// A call of a verb of [`SHORT`] in which nothing is unclear: what is, the whole command line has to tell.
    fn short(arguments: &[OsString]) -> Option<Self> {
        let (verb, with_options) = SHORT.iter().find(|(verb, _)| arguments.iter().any(|argument| argument == verb))?;
        let command = options::Common::augment_args(Command::new("pgcairn"));
        Self::parsed(command.subcommand(with_options(Command::new(*verb))), arguments).ok()
    }

    fn parsed(command: Command, arguments: &[OsString]) -> std::result::Result<Self, clap::Error> {
        Self::from_arg_matches(&command.try_get_matches_from(arguments)?)
    }

    fn run(self) -> Result<ExitCode> {
        let common = &self.common;
        if let Some((ending, kept)) = self.verb.on_signal() {
            signals::watch(ending, kept)?;
        }
        match self.verb {
            Verb::StanzaCreate(verb) => verb.run(common),
            Verb::StanzaUpgrade(verb) => verb.run(common),
            Verb::Check(verb) => verb.run(common),
            Verb::Backup(verb) => verb.run(common),
            Verb::Info(verb) => verb.run(common),
            Verb::Expire(verb) => verb.run(common),
            Verb::Verify(verb) => verb.run(common),
            Verb::Repo(verb) => verb.run(common),
            Verb::Mount(verb) => verb.run(common),
            Verb::Umount(verb) => verb.run(),
            Verb::Start(verb) => verb.run(common),
            Verb::Stop(verb) => verb.run(),
            Verb::Restore(verb) => verb.run(common),
            Verb::Extract(verb) => verb.run(common),
            Verb::ArchivePush(verb) => verb.run(common),
            Verb::ArchiveGet(verb) => return Ok(verb.run(common)),
            Verb::ArchiveWorker(verb) => verb.run(common),
            Verb::Demo(verb) => verb.run(common),
        }?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Verb {
    /// How the verb ends on a signal, and what a person reads of what it leaves; none for those that are short, that wait for
    /// signals themselves, or that a server calls.
    fn on_signal(&self) -> Option<(Ending, &'static str)> {
        Some(match self {
            Self::StanzaCreate(_) => (Ending::Prompt, "run the command again: it goes on with what is there"),
            Self::StanzaUpgrade(_) => (Ending::Prompt, "run the command again"),
            Self::Check(_) | Self::Verify(_) => (Ending::Prompt, "nothing was changed"),
            Self::Backup(_) => {
                (Ending::Prompt, "there is no new backup; what was stored of it is taken up by the next one")
            }
            Self::Expire(_) => (Ending::Prompt, "what was not removed yet is removed by the next run"),
            Self::Restore(_) => (
                Ending::Prompt,
                "if the target holds a part of the backup, it cannot start; --delta goes on from there",
            ),
            // these become patient when they have something to take down
            Self::Start(_) => (Ending::Prompt, "no clone is left; one that was continued keeps what it had written"),
            Self::Extract(_) => (Ending::Prompt, "no clone is left, and nothing was loaded or written"),
            Self::Mount(_) if !daemon::is_child() => (Ending::Prompt, "nothing is mounted"),
            _ => return None,
        })
    }
}

fn fail(error: &Error, code: u8) -> ExitCode {
    if let Some((interrupted, code)) = signals::outcome() {
        tracing::info!(%error, "what the signal made fail");
        output::error(&interrupted);
        return ExitCode::from(code);
    }
    if daemon::is_child() {
        daemon::failed(error);
    }
    output::error(error);
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_short_way_understands_what_the_whole_one_does() {
        for (line, is_short) in [
            ("pgcairn --repo /r --stanza main archive-push --archive-async=y pg_wal/000000010000000000000001", true),
            ("pgcairn archive-get 00000002.history x --repo /r --stanza main --log-level INFO", true),
            ("pgcairn --stanza archive-push archive-get 00000002.history x", false),
            ("pgcairn --stanza archive-push info", false),
            ("pgcairn archive-push", false),
            ("pgcairn archive-push --no-such-option x", false),
            ("pgcairn archive-get --help", false),
            ("pgcairn help archive-push", false),
        ] {
            let arguments: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            let short = Cli::short(&arguments).map(|cli| format!("{cli:?}"));
            assert_eq!(short.is_some(), is_short, "{line}");
            let whole = Cli::parsed(Cli::command(), &arguments).ok().map(|cli| format!("{cli:?}"));
            assert!(short.is_none() || short == whole, "{line}");
        }
    }
}
