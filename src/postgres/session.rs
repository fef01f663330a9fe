//! Settings that a session of ours begins with. They stand in its startup packet, where they beat those of its role and its
//! database: the owner of a database may set its `search_path`, and names without a schema would then be his functions, which
//! a superuser who asks would run.

/// For any server. A name that a server does not know would end the connection: these are known to all.
const GUARDS: &str = "-c search_path=pg_catalog -c statement_timeout=0 -c lock_timeout=0 \
                      -c idle_in_transaction_session_timeout=0 -c standard_conforming_strings=on";

/// The same of the names that count most, as a statement: a connection pooler may drop what stands in the startup packet.
pub const GUARD: &str = "SELECT pg_catalog.set_config('search_path', 'pg_catalog', false)";

/// The `options` of a connection to any server, behind those that its user gave.
pub fn guarded(own: Option<&str>) -> String {
    match own {
        // the last one of a name counts
        Some(own) if !own.trim().is_empty() => format!("{own} {GUARDS}"),
        _ => GUARDS.to_owned(),
    }
}

/// The `options` of our own connection to a clone of this major version: nothing that its source's roles and databases set, and,
/// where the role may say so (`triggers` false), no trigger on its login, which would change rows of the clone or refuse.
pub fn of_clone(major: u32, triggers: bool) -> String {
    let mut options = format!("{GUARDS} -c role=none");
    if major >= 14 {
        options.push_str(" -c idle_session_timeout=0");
    }
    if major >= 17 {
        options.push_str(" -c transaction_timeout=0");
        if !triggers {
            options.push_str(" -c event_triggers=off");
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_stand_behind_the_users_own() {
        assert_eq!(guarded(None), GUARDS);
        assert_eq!(guarded(Some(" ")), GUARDS);
        assert_eq!(guarded(Some("-c role=x -c search_path=evil")), format!("-c role=x -c search_path=evil {GUARDS}"));
    }

    #[test]
    fn a_server_is_told_only_what_it_knows() {
        assert!(!of_clone(13, false).contains("idle_session_timeout"));
        for major in [14, 16] {
            let options = of_clone(major, false);
            assert!(options.contains("idle_session_timeout=0") && !options.contains("event_triggers"), "{options}");
        }
        assert!(of_clone(17, false).ends_with("-c event_triggers=off"));
        assert!(!of_clone(17, true).contains("event_triggers"));
    }
}
