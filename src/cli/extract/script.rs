//! A dump as it passes: its rows are counted, and settings that the other server does not know are left out.

use std::collections::HashSet;
use std::io::{BufRead, Result, Write};

/// What was in a dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    pub(super) rows: u64,
}

/// Copies a dump. Of the settings at its head, which only make its session what the dump expects, those stay that are `known`;
/// a newer pg_dump turns off time-outs that an older server does not have.
pub(super) fn pass(from: impl BufRead, mut to: impl Write, known: Option<&HashSet<String>>) -> Result<Contents> {
    let (mut contents, mut in_head, mut in_rows) = (Contents::default(), true, false);
    let mut from = from;
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line)? > 0 {
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        if in_rows {
            match text {
                b"\\." => in_rows = false,
                _ => contents.rows += 1,
            }
        } else if text.starts_with(b"COPY ") && text.ends_with(b" FROM stdin;") {
            (in_head, in_rows) = (false, true);
        } else if text.starts_with(b"-- Name: ") || text.starts_with(b"CREATE ") {
            in_head = false;
        }
        let unknown = in_head && known.is_some_and(|known| setting(text).is_some_and(|name| !known.contains(&name)));
        if !unknown {
            to.write_all(&line)?;
        }
        line.clear();
    }
    to.flush()?;
    Ok(contents)
}

/// The name in `SET name = value;`.
fn setting(line: &[u8]) -> Option<String> {
    let line = std::str::from_utf8(line).ok()?;
    let (name, value) = line.strip_prefix("SET ")?.split_once(" = ")?;
    let is_name = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
    (is_name && value.ends_with(';')).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn rows_are_counted_and_unknown_settings_left_out() {
        let dump = "--\n-- PostgreSQL database dump\n--\n\n\\restrict abc\n\nSET statement_timeout = 0;\nSET transaction_timeout = 0;\n\
                    SELECT pg_catalog.set_config('search_path', '', false);\nSET row_security = off;\n\n\
                    --\n-- Name: t; Type: TABLE\n--\n\nSET transaction_timeout = 1;\nCREATE TABLE t (i int);\n\
                    COPY t (i) FROM stdin;\n1\nSET transaction_timeout = 0;\nCOPY t (i) FROM stdin;\n\\.\n\n\
                    COPY u (i) FROM stdin;\n\\.\n";
        let mut all = Vec::new();
        assert_eq!(pass(dump.as_bytes(), &mut all, None).unwrap().rows, 3);
        assert_eq!(all, dump.as_bytes());
        let known = ["statement_timeout", "row_security"].map(str::to_owned).into();
        let mut some = Vec::new();
        assert_eq!(pass(dump.as_bytes(), &mut some, Some(&known)).unwrap().rows, 3);
        assert_eq!(String::from_utf8(some).unwrap(), dump.replacen("SET transaction_timeout = 0;\n", "", 1));
    }
}
