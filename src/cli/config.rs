//! The configuration file: every key is the long name of an option and gives its default.
//!
//! ```toml
//! repo = "/backups"            # for all; `[global]` may stand before it
//! [global.backup]              # for one command
//! process-max = 4
//! [main]                       # for one stanza
//! pg = "host=/var/run/postgresql user=postgres"
//! [main.backup]                # for one command of one stanza
//! type = "auto"
//! ```
//!
//! The narrower section wins: stanza and command, stanza, command, all.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Command;

use crate::error::{Context, Error, Result};

/// Read when no other file is named, and only if it exists.
const DEFAULT_PATH: &str = "/etc/pgcairn.toml";

/// The section for every stanza; no stanza with a configuration can have this name.
const GLOBAL: &str = "global";

/// Options that say what one run does: as a default they would act on every run, and on every command that has one.
const OF_ONE_RUN: [&str; 20] = [
    "backup",
    "config",
    "delta",
    "discard",
    "dry-run",
    "encrypt",
    "force",
    "foreground",
    "into",
    "keep",
    "name",
    "quick",
    "read-only",
    "recovered",
    "recovery",
    "set",
    "table",
    "target",
    "target-exclusive",
    "target-timeline",
];

/// Options that mean different things to different commands, and the command for which the key is most likely meant.
const OF_ONE_COMMAND: [(&str, &str); 1] = [("type", "backup")];

/// Commands whose option of this name is another one: `output` is a file for them, not a form.
const NOT_FOR: [(&str, &str); 1] = [("output", "extract")];

/// What a configuration file says, for one stanza.
pub(super) struct Configuration {
    /// in ascending precedence
    values: Vec<Setting>,
    path: PathBuf,
}

/// One key with its value.
#[derive(Debug, PartialEq, Eq)]
struct Setting {
    /// the command that it is for; all, if there is none
    command: Option<String>,
    key: String,
    value: String,
}

impl Configuration {
    /// Reads the file that the command line or the environment names, or the default one; `None` where there is none.
    pub(super) fn read(arguments: &[OsString]) -> Result<Option<Self>> {
        let named = named(arguments, "--config").or_else(|| std::env::var_os("PGCAIRN_CONFIG"));
        let path = named.clone().map_or_else(|| PathBuf::from(DEFAULT_PATH), PathBuf::from);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read the configuration file", &path, error)),
        };
        let values = parse(&text, &path, named_stanza(arguments).as_deref())?;
        Ok(Some(Self { values, path }))
    }

    /// The command with these values as defaults: what stands on the command line or in the environment wins.
    pub(super) fn defaults_of(self, command: Command) -> Result<Command> {
        apply(command, self.values, &self.path)
    }
}

/// The value an option has on the command line, before it is parsed for good.
fn named(arguments: &[OsString], option: &str) -> Option<OsString> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        if argument == option {
            return arguments.next().cloned();
        }
        if let Some(value) = argument.to_str().and_then(|text| text.strip_prefix(option)?.strip_prefix('=')) {
            return Some(value.into());
        }
    }
    None
}

fn named_stanza(arguments: &[OsString]) -> Option<String> {
    named(arguments, "--stanza").or_else(|| std::env::var_os("PGCAIRN_STANZA"))?.into_string().ok()
}

/// The settings for `stanza`, in ascending precedence.
fn parse(text: &str, path: &Path, stanza: Option<&str>) -> Result<Vec<Setting>> {
    let table: toml::Table = text.parse().context(|| format!("cannot read {}", path.display()))?;
    let mut settings = Vec::new();
    keys_of(&table, None, path, &mut settings)?;
    let section = |name: &str| table.get(name).and_then(toml::Value::as_table);
    section_of(section(GLOBAL), path, &mut settings)?;
    let of_file = settings.iter().rfind(|setting| setting.key == "stanza").map(|setting| setting.value.clone());
    if let Some(name) = stanza.map(str::to_owned).or(of_file).filter(|name| name != GLOBAL) {
        section_of(section(&name), path, &mut settings)?;
    }
    Ok(settings)
}

/// The keys of a section: those for one command precede, so that for that command they are replaced only by narrower ones.
fn section_of(section: Option<&toml::Table>, path: &Path, settings: &mut Vec<Setting>) -> Result<()> {
    let Some(section) = section else { return Ok(()) };
    keys_of(section, None, path, settings)?;
    for (command, table) in section {
        if let Some(table) = table.as_table() {
            keys_of(table, Some(command), path, settings)?;
        }
    }
    Ok(())
}

fn keys_of(table: &toml::Table, command: Option<&str>, path: &Path, settings: &mut Vec<Setting>) -> Result<()> {
    for (key, value) in table.iter().filter(|(_, value)| !value.is_table()) {
        check_key(key, command, path)?;
        let value = scalar(key, value, path)?;
        settings.push(Setting { command: command.map(str::to_owned), key: key.clone(), value });
    }
    Ok(())
}

/// Refuses a key that would change what commands do for which it is not meant.
fn check_key(key: &str, command: Option<&str>, path: &Path) -> Result<()> {
    let path = path.display();
    if OF_ONE_RUN.contains(&key) {
        return Err(Error::new(format!("{path}: {key} cannot be set in a configuration file"))
            .hint(format!("it says what one run does: give --{key} on the command line")));
    }
    match OF_ONE_COMMAND.iter().find(|(name, _)| *name == key) {
        Some((_, likely)) if command.is_none() => Err(Error::new(format!(
            "{path}: {key} means different things to different commands"
        ))
        .hint(format!("put it into the section of one command, such as [{GLOBAL}.{likely}] or [STANZA.{likely}]"))),
        _ => Ok(()),
    }
}

fn scalar(key: &str, value: &toml::Value, path: &Path) -> Result<String> {
    match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Boolean(flag) => Ok(flag.to_string()),
        _ => Err(Error::new(format!("{}: the value of {key} must be a text, a number or a boolean", path.display()))),
    }
}

fn apply(mut command: Command, settings: Vec<Setting>, path: &Path) -> Result<Command> {
    for Setting { command: of, key, value } in settings {
        if let Some(of) = &of
            && command.find_subcommand(of).is_none()
        {
            return Err(Error::new(format!("{}: there is no command {of}", path.display()))
                .hint("a section within a section is named as a command, such as [main.backup]"));
        }
        let mut known = false;
        let set = |command: Command, known: &mut bool| {
            let id = command.get_arguments().find(|arg| arg.get_long() == Some(&key)).map(|arg| arg.get_id().clone());
            match id {
                Some(id) => {
                    *known = true;
                    command.mut_arg(id, |arg| arg.default_value(value.clone()))
                }
                None => command,
            }
        };
        let is_meant = |name: &str| match &of {
            Some(of) => of == name,
            None => !NOT_FOR.contains(&(key.as_str(), name)),
        };
        match &of {
            // a global option is an argument of the program, and a default of one command cannot be given there
            Some(of) if command.get_arguments().any(|arg| arg.get_long() == Some(&key)) => {
                return Err(Error::new(format!("{}: {key} is not an option of {of} alone", path.display()))
                    .hint("put it before all sections, or into that of a stanza"));
            }
            Some(_) => {}
            None => command = set(command, &mut known),
        }
        command = command.mut_subcommands(|verb| if is_meant(verb.get_name()) { set(verb, &mut known) } else { verb });
        if !known {
            let of = of.map(|of| format!(" of {of}")).unwrap_or_default();
            return Err(Error::new(format!("{}: there is no option {key}{of}", path.display()))
                .hint("keys are the names of options without \"--\"; see \"pgcairn help\""));
        }
    }
    Ok(command)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    fn default_of(text: &str, verb: &str, key: &str) -> Option<String> {
        let path = Path::new("pgcairn.toml");
        let settings = parse(text, path, Some("main")).unwrap();
        let command = apply(Cli::command(), settings, path).unwrap();
        let verb = command.find_subcommand(verb).unwrap();
        let option = verb.get_arguments().find(|arg| arg.get_long() == Some(key)).unwrap();
        option.get_default_values().first().map(|value| value.to_str().unwrap().to_owned())
    }

    fn refused(text: &str) -> String {
        let path = Path::new("pgcairn.toml");
        let applied = parse(text, path, Some("main")).and_then(|settings| apply(Cli::command(), settings, path));
        applied.map(drop).unwrap_err().to_string()
    }

    #[test]
    fn the_narrower_section_wins() {
        let text = "process-max = 1\n[global.restore]\nprocess-max = 2\n[main]\nprocess-max = 3\n\
                    [main.backup]\nprocess-max = 4\n[other.verify]\nprocess-max = 5\n";
        for (verb, value) in [("backup", "4"), ("restore", "3"), ("verify", "3")] {
            assert_eq!(default_of(text, verb, "process-max").as_deref(), Some(value), "{verb}");
        }
        let text = "[global]\nprocess-max = 1\n[global.restore]\nprocess-max = 2\n";
        for (verb, value) in [("backup", "1"), ("restore", "2")] {
            assert_eq!(default_of(text, verb, "process-max").as_deref(), Some(value), "{verb}");
        }
    }

    #[test]
    fn a_key_acts_on_the_commands_that_it_is_meant_for() {
        let output = "output = \"json\"\n";
        assert_eq!(default_of(output, "info", "output").as_deref(), Some("json"));
        assert_eq!(default_of(output, "extract", "output"), None);
        let kind = "[main.backup]\ntype = \"auto\"\n";
        assert_eq!(default_of(kind, "backup", "type").as_deref(), Some("auto"));
        for verb in ["restore", "start"] {
            assert_eq!(default_of(kind, verb, "type"), None, "{verb}");
        }
    }

    #[test]
    fn what_one_run_does_is_no_default() {
        for (text, what) in [
            ("set = \"20240107-120000F\"", "set cannot be set in a configuration file"),
            ("[main]\ndelta = true", "delta cannot be set"),
            ("[main.restore]\ntarget = \"2024-01-07\"", "target cannot be set"),
            ("type = \"auto\"", "type means different things"),
            ("[main]\ntype = \"auto\"", "type means different things"),
            ("[main.back]\nprocess-max = 2", "there is no command back"),
            ("[main.info]\nprocess-max = 2", "there is no option process-max of info"),
            ("[main.backup]\nrepo = \"/r\"", "repo is not an option of backup alone"),
            ("no-such-option = 1", "there is no option no-such-option"),
        ] {
            assert!(refused(text).contains(what), "{text}: {}", refused(text));
        }
        assert!(OF_ONE_RUN.is_sorted());
    }
}
