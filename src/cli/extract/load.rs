//! Loads a dump into another server, with psql: its connection strings, passwords and TLS are those that people know.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::clone::environment;
use crate::error::{Error, Result};
use crate::interrupt;

/// The names of the settings that a server knows, which also proves that it can be reached; none where no psql is at hand.
pub(super) fn settings(conninfo: &str) -> Result<HashSet<String>> {
    let directories = (13..=18).rev().map(|major| PathBuf::from(format!("/usr/lib/postgresql/{major}/bin")));
    let on_path: Vec<PathBuf> = std::env::var_os("PATH").iter().flat_map(std::env::split_paths).collect();
    let mut programs = on_path.into_iter().chain(directories).map(|directory| directory.join("psql"));
    let psql = programs.find(|psql| psql.exists());
    let psql = psql.ok_or_else(|| {
        Error::new("there is no psql on this machine, which loads the dump").hint("install it, or use --output")
    })?;
    let mut ask = Command::new(&psql);
    environment::without_secrets(&mut ask);
    ask.args(["-X", "-A", "-t", "-q", "-c", "SELECT name FROM pg_catalog.pg_settings", "-d"]).arg(conninfo);
    ask.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = ask.spawn().map_err(|error| Error::io("run", &psql, error))?;
    let _waited_for = interrupt::Guard::child(child.id());
    let done = child.wait_with_output().map_err(|error| Error::io("wait for", &psql, error))?;
    match done.status.success() {
        true => Ok(String::from_utf8_lossy(&done.stdout).lines().map(str::to_owned).collect()),
        false => Err(Error::new(format!("cannot connect to where --into leads: {}", super::last_line(&done.stderr)))
            .hint("--into is a libpq conninfo string or URI, such as \"host=/var/run/postgresql user=postgres dbname=shop\"")),
    }
}

/// Runs the dump in one transaction.
pub(super) fn load(psql: &Path, dump: File, conninfo: &str) -> Result<()> {
    let mut load = Command::new(psql);
    environment::without_secrets(&mut load);
    load.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-v", "VERBOSITY=verbose", "--single-transaction"]);
    load.args(["-o", "/dev/null", "-d"]).arg(conninfo);
    load.stdin(dump).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = load.spawn().map_err(|error| Error::io("run", psql, error))?;
    let _waited_for = interrupt::Guard::child(child.id());
    let done = child.wait_with_output().map_err(|error| Error::io("wait for", psql, error))?;
    if done.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&done.stderr);
    let (code, what) = complaint(&stderr).unwrap_or_else(|| ("", super::last_line(&done.stderr)));
    let what = format!("the table cannot be loaded: {what}");
    Err(Error::new(what).hint(format!("nothing was changed there; {}", remedy(code))))
}

/// SQLSTATE and text of the first error in what psql wrote: `psql:<stdin>:20: ERROR:  42P07: relation "t" already exists`. The
/// word before them is in the server's language.
fn complaint(stderr: &str) -> Option<(&str, String)> {
    stderr.lines().find_map(|line| {
        let (_, rest) = line.split_once(":  ")?;
        let (code, text) = rest.split_once(": ")?;
        let is_code = code.len() == 5 && code.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
        // successes and warnings
        let is_error = is_code && !["00", "01", "02"].contains(&&code[..2]);
        is_error.then(|| (code, text.to_owned()))
    })
}

fn remedy(code: &str) -> &'static str {
    match code {
        "42P07" | "42710" | "42723" => "a table of that name must not exist: rename it, or use --output",
        "3F000" => "create the schema there first",
        "42704" => {
            "create the role, type, extension or server that it names there first, or use --output and change the file"
        }
        "42P01" => "what it refers to must be there: the parent of a partition, a sequence, the tables of a view",
        "42883" => "create the function that it calls there first",
        "42501" => "give the role of --into the privilege, or name another role in it",
        "53100" => "its disk is full",
        _ => "--output writes the dump to a file, which can be changed before it is loaded",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_told() {
        let stderr = "psql:<stdin>:19: NOTICE:  00000: x\nLOCATION:  a, b.c:1\n\
                      psql:<stdin>:20: FEHLER:  42P07: Relation \u{bb}t\u{ab} existiert bereits\nLOCATION:  heap_create, heap.c:1150\n";
        assert_eq!(complaint(stderr), Some(("42P07", "Relation \u{bb}t\u{ab} existiert bereits".to_owned())));
        assert_eq!(complaint("psql: error: connection to server failed"), None);
    }
}
