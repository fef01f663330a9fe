//! Writing settings into `postgresql.conf` and `postgresql.auto.conf`.
//!
//! Both are read line by line; the last line that sets a parameter wins. The bytes of the file are kept as they are,
//! in whatever encoding.

/// A setting that no configuration file can hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfError {
    /// not a parameter's name
    #[error("\"{name}\" is not the name of a setting")]
    Name {
        /// what was given
        name: String,
    },
    /// a zero byte cannot be written
    #[error("setting {name} has a zero byte in its value")]
    ZeroByte {
        /// the setting
        name: String,
    },
}

/// The value between single quotes, as the server reads it back: quotes and backslashes doubled, line breaks escaped.
pub fn quote(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 2);
    quoted.push('\'');
    for c in value.chars() {
        match c {
            '\'' => quoted.push_str("''"),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            _ => quoted.push(c),
        }
    }
    quoted.push('\'');
    quoted
}

/// One line `name = 'value'`, with its line break.
pub fn setting(name: &str, value: &str) -> Result<String, ConfError> {
    if !is_name(name) {
        return Err(ConfError::Name { name: name.to_owned() });
    }
    if value.contains('\0') {
        return Err(ConfError::ZeroByte { name: name.to_owned() });
    }
    Ok(format!("{name} = {}\n", quote(value)))
}

/// Appends settings below a line of comment. Later lines win, so these override what is set above.
pub fn append(contents: &mut Vec<u8>, comment: &str, settings: &[(&str, &str)]) -> Result<(), ConfError> {
    let mut lines = String::new();
    if contents.last().is_some_and(|&last| last != b'\n') {
        lines.push('\n');
    }
    for line in comment.lines() {
        lines.push_str(&format!("# {line}\n"));
    }
    for (name, value) in settings {
        lines.push_str(&setting(name, value)?);
    }
    contents.extend_from_slice(lines.as_bytes());
    Ok(())
}

/// Makes a comment of every line that sets a parameter for which `of_these` holds; it is given the name in lower case.
pub fn comment_out(contents: &[u8], of_these: impl Fn(&str) -> bool) -> Vec<u8> {
    let mut result = Vec::with_capacity(contents.len());
    for line in contents.split_inclusive(|&byte| byte == b'\n') {
        if name_of(line).is_some_and(|name| of_these(&name)) {
            result.extend_from_slice(b"# ");
        }
        result.extend_from_slice(line);
    }
    result
}

/// Settings by which pg_cron runs no job. Before 1.5 it knows no switch: it connects to run each, here to nowhere.
pub const NO_JOBS: [(&str, &str); 3] =
    [("cron.launch_active_jobs", "off"), ("cron.use_background_workers", "off"), ("cron.host", "/nowhere")];

/// Settings of a server that is a copy of another: it must not act in its place. It archives nothing, takes over no replication
/// slot of a publisher, runs no jobs of pg_cron, and none of its source's commands; it writes into none of its source's
/// directories. Foreign servers, and background workers of other libraries, are as they were.
pub fn of_copy(major: u32) -> Vec<(&'static str, &'static str)> {
    let mut settings = vec![
        ("max_logical_replication_workers", "0"),
        ("archive_cleanup_command", ""),
        ("recovery_end_command", ""),
        ("external_pid_file", ""),
        ("log_directory", "log"),
    ];
    settings.extend(NO_JOBS);
    settings.extend((major < 15).then_some(("stats_temp_directory", "pg_stat_tmp")));
    settings.extend((major >= 17).then_some(("sync_replication_slots", "off")));
    settings.push(("archive_mode", "off"));
    settings
}

/// Whether this parameter says where the data directory is, so that a copy with that line would run on its source's.
pub fn is_data_directory(name: &str) -> bool {
    name == "data_directory"
}

/// The values that lines give to a parameter, in their order.
pub fn values(contents: &[u8], of: &str) -> Vec<String> {
    let value = |line: &[u8]| {
        let line = line.trim_ascii_start();
        let rest = String::from_utf8_lossy(&line[of.len().min(line.len())..]).into_owned();
        unquote(rest.trim_start().strip_prefix('=').unwrap_or(&rest).trim_start())
    };
    let lines = contents.split(|&byte| byte == b'\n');
    lines.filter(|line| name_of(line).is_some_and(|name| name == of)).map(value).collect()
}

/// A value as it stands in a file, up to its end: a comment may follow.
fn unquote(text: &str) -> String {
    let Some(quoted) = text.strip_prefix('\'') else {
        return text.split(|c: char| c.is_whitespace() || c == '#').next().unwrap_or_default().to_owned();
    };
    let mut value = String::new();
    let mut chars = quoted.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\'' if chars.peek() != Some(&'\'') => break,
            '\'' | '\\' => value.extend(chars.next()),
            _ => value.push(c),
        }
    }
    value
}

/// Whether this parameter says what recovery is to reach, so that an earlier one must not stay beside ours.
pub fn is_recovery_target(name: &str) -> bool {
    name.starts_with("recovery_target")
}

/// The parameter a line sets, in lower case; names are ASCII and case is ignored.
fn name_of(line: &[u8]) -> Option<String> {
    let line = line.trim_ascii_start();
    let end = line.iter().position(|&byte| !is_name_byte(byte)).unwrap_or(line.len());
    let name = String::from_utf8_lossy(&line[..end]).to_ascii_lowercase();
    is_name(&name).then_some(name)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'$')
}

/// A name, or an extension's name and one of its settings: `pg_stat_statements.max`.
pub fn is_name(name: &str) -> bool {
    name.bytes().all(is_name_byte)
        && name.split('.').all(|part| part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_'))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quotes_as_the_server_reads() {
        assert_eq!(quote(""), "''");
        assert_eq!(quote("it's C:\\x"), "'it''s C:\\\\x'");
        assert_eq!(quote("a\nb\r"), "'a\\nb\\r'");
        assert_eq!(setting("restore_command", "cp '%p' x").unwrap(), "restore_command = 'cp ''%p'' x'\n");
    }

    #[test]
    fn refuses_what_no_file_can_hold() {
        for name in ["", "a b", "1a", "a=b", ".a", "a.", "a..b", "ä", "a\nb"] {
            assert_eq!(setting(name, "x"), Err(ConfError::Name { name: name.to_owned() }));
        }
        assert_eq!(setting("a", "x\0"), Err(ConfError::ZeroByte { name: "a".to_owned() }));
        assert!(setting("pg_stat_statements.max", "1").is_ok());
    }

    #[test]
    fn comments_out_the_settings_asked_for_and_nothing_else() {
        let before = b"# Do not edit\nrecovery_target_time = '2024'\n  Recovery_Target_Action='pause'\r\n\
            recovery_target_x 'y'\nrestore_command = 'recovery_target'\nlatin = '\xE9'\nrecovery_target = 'immediate'";
        let after = b"# Do not edit\n# recovery_target_time = '2024'\n#   Recovery_Target_Action='pause'\r\n\
            # recovery_target_x 'y'\nrestore_command = 'recovery_target'\nlatin = '\xE9'\n# recovery_target = 'immediate'";
        assert_eq!(comment_out(before, is_recovery_target), after);
    }

    #[test]
    fn values_are_read_as_the_server_reads_them() {
        let text = b"a = 'x, \"y z\"' # why\n  A'it''s'\nb = 1\na=2# two\n#a = 3\na  = \na.b = 4\na 'open";
        assert_eq!(values(text, "a"), ["x, \"y z\"", "it's", "2", "", "open"]);
        assert_eq!(values(text, "a.b"), ["4"]);
    }

    #[test]
    fn appends_below_what_is_there() {
        let mut contents = b"a = 1".to_vec();
        append(&mut contents, "added\nfor recovery", &[("b", "2"), ("c", "")]).unwrap();
        assert_eq!(String::from_utf8(contents).unwrap(), "a = 1\n# added\n# for recovery\nb = '2'\nc = ''\n");
        let mut contents = b"a = 1\n".to_vec();
        assert!(append(&mut contents, "", &[("b", "2"), ("c d", "")]).is_err());
        assert_eq!(contents, b"a = 1\n");
    }

    proptest! {
        #[test]
        fn a_quoted_value_is_one_line_and_ends_where_it_should(value in "[^\0]*") {
            let quoted = quote(&value);
            prop_assert!(!quoted.contains(['\n', '\r']));
            let inner = &quoted[1..quoted.len() - 1];
            let plain = inner.replace("''", "").replace("\\\\", "");
            prop_assert!(!plain.contains('\''));
        }

        #[test]
        fn nothing_is_lost_by_commenting_out(contents: Vec<u8>) {
            let result = comment_out(&contents, |_| true);
            let marks = result.len() - contents.len();
            prop_assert!(marks.is_multiple_of(2));
            let again = comment_out(&result, |_| true);
            prop_assert_eq!(again, result);
        }
    }
}
