//! Values of libpq connection strings and of settings that hold lists.

/// A value as `keyword=value` takes it: between single quotes unless it needs none.
pub fn value(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-:+@%,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\\', r"\\").replace('\'', r"\'"))
}

/// One directory as an element of a setting that is a list of directories, such as `unix_socket_directories`.
pub fn list_element(directory: &str) -> String {
    format!("\"{}\"", directory.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_where_they_must_be() {
        for (text, quoted) in [
            ("/var/run/postgresql", "/var/run/postgresql"),
            ("", "''"),
            ("cl o'nes", r"'cl o\'nes'"),
            (r"o'hara\x", r"'o\'hara\\x'"),
            ("a=b", "'a=b'"),
        ] {
            assert_eq!(value(text), quoted);
            let parsed: Result<postgres::Config, _> = format!("user={} port=5", value(text)).parse();
            assert_eq!(parsed.ok().and_then(|config| config.get_user().map(str::to_owned)).as_deref(), Some(text));
        }
        assert_eq!(list_element("/a, \"b\""), "\"/a, \"\"b\"\"\"");
    }
}
