//! The configuration file: every key is the long name of an option, globally or in a section
//! named as a stanza, and gives its default.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Command;

use crate::error::{Context, Error, Result};

/// Read when no other file is named, and only if it exists.
const DEFAULT_PATH: &str = "/etc/pgcairn.toml";

/// What a configuration file says, for one stanza.
pub(super) struct Configuration {
    values: HashMap<String, String>,
    path: PathBuf,
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

fn parse(text: &str, path: &Path, stanza: Option<&str>) -> Result<HashMap<String, String>> {
    let table: toml::Table = text.parse().context(|| format!("cannot read {}", path.display()))?;
    let mut values = HashMap::new();
    for (key, value) in table.iter().filter(|(_, value)| !value.is_table()) {
        values.insert(key.clone(), scalar(key, value, path)?);
    }
    let of_stanza = stanza.map(str::to_owned).or_else(|| values.get("stanza").cloned());
    let section = of_stanza.and_then(|name| table.get(&name)?.as_table());
    for (key, value) in section.into_iter().flatten() {
        values.insert(key.clone(), scalar(key, value, path)?);
    }
    Ok(values)
}

fn scalar(key: &str, value: &toml::Value, path: &Path) -> Result<String> {
    match value {
        toml::Value::String(text) => Ok(text.clone()),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Boolean(flag) => Ok(flag.to_string()),
        _ => Err(Error::new(format!("{}: the value of {key} must be a text, a number or a boolean", path.display()))),
    }
}

fn apply(mut command: Command, values: HashMap<String, String>, path: &Path) -> Result<Command> {
    for (key, value) in values {
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
        command = set(command, &mut known);
        command = command.mut_subcommands(|verb| set(verb, &mut known));
        if !known {
            return Err(Error::new(format!("{}: there is no option {key}", path.display()))
                .hint("keys are the names of options without \"--\"; see \"pgcairn help\""));
        }
    }
    Ok(command)
}
