//! Where a passphrase comes from: a file, a command, the environment or the configuration file; never the command line, which
//! everybody on the machine can read.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use clap::Args;
use zeroize::Zeroize;

use super::options::absolute_path;
use crate::error::{Context, Error, Result};
use crate::format::cipher_key::Passphrase;

/// The environment variable of the passphrase itself.
const VARIABLE: &str = "PGCAIRN_REPO_CIPHER_PASS";
/// Options that exist for the environment and the configuration file alone.
const NEVER_GIVEN: [(&str, &str); 3] = [
    ("--repo-cipher-pass", "--repo-cipher-pass-file, --repo-cipher-pass-command or PGCAIRN_REPO_CIPHER_PASS"),
    ("--new-pass", "--new-pass-file, --new-pass-command or PGCAIRN_REPO_CIPHER_NEW_PASS"),
    ("--repo-s3-key-secret", "PGCAIRN_REPO_S3_KEY_SECRET"),
];

/// The passphrase of an encrypted stanza.
#[derive(Clone, Args)]
#[command(next_help_heading = "Encryption options (or PGCAIRN_REPO_CIPHER_PASS, the passphrase itself)")]
pub(super) struct Cipher {
    /// File whose first line is the passphrase
    #[arg(long, global = true, env = "PGCAIRN_REPO_CIPHER_PASS_FILE", value_name = "FILE")]
    repo_cipher_pass_file: Option<PathBuf>,
    /// Shell command that writes the passphrase as its first line
    #[arg(long, global = true, env = "PGCAIRN_REPO_CIPHER_PASS_COMMAND", value_name = "COMMAND")]
    repo_cipher_pass_command: Option<String>,
    /// The passphrase: only from the environment (PGCAIRN_REPO_CIPHER_PASS) or the configuration file
    #[arg(long, global = true, env = VARIABLE, hide = true, hide_env_values = true)]
    repo_cipher_pass: Option<String>,
}

/// The passphrase that is to replace it.
#[derive(Clone, Args)]
#[command(next_help_heading = "New passphrase (or PGCAIRN_REPO_CIPHER_NEW_PASS, the passphrase itself)")]
pub(super) struct NewCipher {
    /// File whose first line is the new passphrase
    #[arg(long, value_name = "FILE")]
    new_pass_file: Option<PathBuf>,
    /// Shell command that writes the new passphrase as its first line
    #[arg(long, value_name = "COMMAND")]
    new_pass_command: Option<String>,
    /// The new passphrase: only from the environment
    #[arg(long, env = "PGCAIRN_REPO_CIPHER_NEW_PASS", hide = true, hide_env_values = true)]
    new_pass: Option<String>,
}

/// Refuses a secret that stands on the command line.
pub(super) fn refuse_secrets(arguments: &[OsString]) -> Result<()> {
    for (option, instead) in NEVER_GIVEN {
        let is_it = |argument: &&OsString| {
            let rest = argument.to_str().and_then(|text| text.strip_prefix(option));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        };
        // behind "--" are no options
        if arguments.iter().take_while(|argument| *argument != "--").any(|argument| is_it(&argument)) {
            return Err(Error::new(format!("{option} is no option for the command line, which everybody can read"))
                .hint(format!("use {instead}")));
        }
    }
    Ok(())
}

impl Cipher {
    /// The passphrase, if one is given.
    pub(super) fn passphrase(&self) -> Result<Option<Passphrase>> {
        let (file, command) = (self.repo_cipher_pass_file.as_deref(), self.repo_cipher_pass_command.as_deref());
        passphrase("passphrase", file, command, self.repo_cipher_pass.as_deref())
    }

    /// Options that a child process needs.
    pub(super) fn arguments(&self) -> [(&'static str, Option<String>); 2] {
        [
            ("--repo-cipher-pass-file", self.repo_cipher_pass_file.as_deref().map(absolute_path)),
            ("--repo-cipher-pass-command", self.repo_cipher_pass_command.clone()),
        ]
    }

    /// The passphrase itself, for a child's environment.
    pub(super) fn secret(&self) -> Option<(&'static str, &str)> {
        self.repo_cipher_pass.as_deref().map(|passphrase| (VARIABLE, passphrase))
    }
}

impl NewCipher {
    /// The new passphrase.
    pub(super) fn passphrase(&self) -> Result<Passphrase> {
        let (file, command) = (self.new_pass_file.as_deref(), self.new_pass_command.as_deref());
        let given = passphrase("new passphrase", file, command, self.new_pass.as_deref())?;
        given.ok_or_else(|| {
            Error::new("no new passphrase is given")
                .hint("give --new-pass-file or --new-pass-command, or set PGCAIRN_REPO_CIPHER_NEW_PASS")
        })
    }
}

fn passphrase(
    what: &str,
    file: Option<&Path>,
    command: Option<&str>,
    given: Option<&str>,
) -> Result<Option<Passphrase>> {
    let (bytes, from) = match (file, command, given) {
        (None, None, None) => return Ok(None),
        (Some(path), None, None) => (from_file(what, path)?, path.display().to_string()),
        (None, Some(command), None) => (from_command(what, command)?, format!("the command \"{command}\"")),
        (None, None, Some(given)) => (given.as_bytes().to_vec(), "the environment or the configuration file".into()),
        _ => {
            return Err(Error::new(format!("the {what} is given more than once"))
                .hint("keep one of: file, command, environment variable; the configuration file counts too"));
        }
    };
    let passphrase = Passphrase::new(first_line(bytes));
    Ok(Some(passphrase.ok_or_else(|| Error::new(format!("the {what} from {from} is empty")))?))
}

fn first_line(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len());
    let end = if bytes[..end].ends_with(b"\r") { end - 1 } else { end };
    bytes[end..].zeroize();
    bytes.truncate(end);
    bytes
}

fn from_file(what: &str, path: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(&format!("read the {what} from"), path, error))?;
    if let Ok(metadata) = path.metadata()
        && metadata.permissions().mode() & 0o007 != 0
    {
        tracing::warn!(file = %path.display(), "everybody on this machine may use the file of the passphrase");
    }
    Ok(bytes)
}

fn from_command(what: &str, command: &str) -> Result<Vec<u8>> {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(command).stdin(Stdio::null()).stderr(Stdio::inherit());
    let output = shell.output().context(|| format!("cannot run the command for the {what}"))?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(Error::new(format!("the command for the {what} failed: \"{command}\", {}", output.status))),
    }
}

impl std::fmt::Debug for Cipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cipher")
    }
}

impl std::fmt::Debug for NewCipher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NewCipher")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_passphrase_is_the_first_line() {
        for (text, line) in [("word", "word"), ("two words \n", "two words "), ("one\r\ntwo\r\n", "one"), ("\n", "")] {
            assert_eq!(first_line(text.into()), line.as_bytes(), "{text:?}");
        }
    }

    #[test]
    fn each_source_gives_it_and_two_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pass");
        std::fs::write(&file, "word\nrest").unwrap();
        let same = Passphrase::new("word".into());
        assert_eq!(passphrase("passphrase", Some(&file), None, None).unwrap(), same);
        assert_eq!(passphrase("passphrase", None, Some("echo word; echo more"), None).unwrap(), same);
        assert_eq!(passphrase("passphrase", None, None, Some("word")).unwrap(), same);
        assert_eq!(passphrase("passphrase", None, None, None).unwrap(), None);
        let refused = [
            (passphrase("passphrase", Some(&file), None, Some("word")), "more than once"),
            (passphrase("passphrase", None, Some("exit 3"), None), "exit status: 3"),
            (passphrase("passphrase", None, Some("true"), None), "is empty"),
            (passphrase("passphrase", Some(&directory.path().join("none")), None, None), "cannot read the passphrase"),
        ];
        for (refused, why) in refused {
            assert!(refused.unwrap_err().to_string().contains(why), "{why}");
        }
    }

    #[test]
    fn secrets_on_the_command_line_are_refused() {
        let refused = |words: &[&str]| refuse_secrets(&words.iter().map(OsString::from).collect::<Vec<_>>()).is_err();
        assert!(refused(&["pgcairn", "info", "--repo-cipher-pass", "word"]));
        assert!(refused(&["pgcairn", "--repo-cipher-pass=word", "info"]));
        assert!(refused(&["pgcairn", "repo", "passwd", "--new-pass=word"]));
        assert!(!refused(&["pgcairn", "--repo-cipher-pass-file=/file", "info", "--new-pass-file", "/new"]));
        assert!(!refused(&["pgcairn", "start", "--", "--repo-cipher-pass"]));
    }
}
