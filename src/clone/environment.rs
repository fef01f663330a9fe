//! The environment of a clone's programs: `COPY ... FROM PROGRAM 'env'` must not show the secrets of whoever started the clone.

use std::ffi::OsStr;
use std::process::Command;

use nix::unistd::{Uid, User};

/// Variables that are passed on, besides `LC_...`.
const PASSED: [&str; 5] = ["PATH", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH"];
/// Where programs are looked for if the environment does not say.
const DEFAULT_PATH: &str = "/usr/local/bin:/usr/bin:/bin";
/// What the variables begin with that hold secrets of this program.
const SECRET: [&str; 2] = ["PGCAIRN_", "AWS_"];

/// Gives a program of a clone's server an environment of its own: search path, language, time zone, and the home of its user.
pub fn clean(command: &mut Command, uid: u32) {
    command.env_clear().env("PATH", DEFAULT_PATH);
    command.envs(std::env::vars_os().filter(|(name, _)| is_passed(name)));
    if let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) {
        command.env("HOME", user.dir).env("USER", &user.name).env("LOGNAME", &user.name);
    }
}

/// Takes this program's own variables from one that is run for the user, and so keeps the user's environment.
pub fn without_secrets(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if SECRET.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            command.env_remove(name);
        }
    }
}

fn is_passed(name: &OsStr) -> bool {
    PASSED.iter().any(|passed| name == *passed) || name.as_encoded_bytes().starts_with(b"LC_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_the_named_variables_is_passed_on() {
        for name in ["PATH", "LC_ALL", "LC_MESSAGES", "TZ"] {
            assert!(is_passed(OsStr::new(name)), "{name}");
        }
        for name in
            ["PGCAIRN_REPO_CIPHER_PASS", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "LD_PRELOAD", "LANGX", "X_LC_ALL"]
        {
            assert!(!is_passed(OsStr::new(name)), "{name}");
        }
    }
}
