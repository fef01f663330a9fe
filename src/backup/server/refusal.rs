//! What helps against a server's refusal, by its cause: the SQLSTATE, and the server's own hint.

use postgres::error::SqlState;

use crate::error::Error;

/// What must be granted to a role that is no superuser, by the function or view that was asked.
const GRANTS: [(&str, &str); 5] = [
    (
        "pg_start_backup",
        "GRANT EXECUTE ON FUNCTION pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean)",
    ),
    (
        "pg_stop_backup",
        "GRANT EXECUTE ON FUNCTION pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean)",
    ),
    ("pg_backup_st", "GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean)"),
    ("pg_create_restore_point", "GRANT EXECUTE ON FUNCTION pg_create_restore_point(text), pg_switch_wal()"),
    ("pg_switch_wal", "GRANT EXECUTE ON FUNCTION pg_create_restore_point(text), pg_switch_wal()"),
];

/// What to do when the server refuses `sql`.
pub(super) fn hint(sql: &str, error: &postgres::Error) -> String {
    let Some(refusal) = error.as_db_error() else {
        return "the server was stopped or the connection was cut; run the command again".into();
    };
    if *refusal.code() == SqlState::INSUFFICIENT_PRIVILEGE {
        return grants(sql);
    }
    match refusal.hint() {
        Some(hint) => hint.to_owned(),
        None => "the server's log may say more".into(),
    }
}

fn grants(sql: &str) -> String {
    let needed = match GRANTS.iter().find(|(called, _)| sql.contains(called)) {
        Some((_, grant)) => format!("{grant} TO the role"),
        None if sql.contains("replication_slot") => "ALTER ROLE ... REPLICATION".into(),
        None => "GRANT pg_monitor TO the role".into(),
    };
    format!("as a superuser, in the database that --pg names: {needed}; or name a superuser in --pg")
}

/// Whether the server refused because of the state it is in.
pub(super) fn is_of_state(error: &Error) -> bool {
    let code = error.find::<postgres::Error>().and_then(postgres::Error::code);
    code == Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE)
}

/// Whether the session ended.
pub(super) fn is_end(error: &postgres::Error) -> bool {
    // operator intervention: shutdowns, a session that was terminated
    error.code().is_none_or(|code| code.code().starts_with("57P"))
}

/// What to do when there is no connection.
pub(super) fn no_connection(error: &postgres::Error) -> &'static str {
    let Some(code) = error.code() else {
        return "check --pg (a libpq conninfo string such as \"host=/var/run/postgresql user=postgres\") and that the server runs";
    };
    match code {
        code if *code == SqlState::INVALID_PASSWORD => "check the password: PGPASSWORD, or password= in --pg",
        code if *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            "name a role that may log in from here with user= in --pg; pg_hba.conf and the server's log say who may"
        }
        code if *code == SqlState::INVALID_CATALOG_NAME => "name a database that exists with dbname= in --pg",
        code if *code == SqlState::TOO_MANY_CONNECTIONS => "raise max_connections, or wait until others have gone",
        code if *code == SqlState::CANNOT_CONNECT_NOW => "wait until the server has started, or see its log",
        _ => "check --pg; the server's log may say more",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_function_has_its_grant() {
        for (sql, grant) in [
            ("SELECT pg_backup_start('x', true)", "pg_backup_start(text, boolean), pg_backup_stop(boolean) TO"),
            ("SELECT lsn FROM pg_backup_stop(false)", "pg_backup_start(text, boolean), pg_backup_stop(boolean) TO"),
            ("SELECT pg_start_backup('x', true, false)", "pg_stop_backup(boolean, boolean) TO"),
            ("SELECT lsn FROM pg_stop_backup(false, false)", "pg_stop_backup(boolean, boolean) TO"),
            ("SELECT pg_switch_wal()", "pg_create_restore_point(text), pg_switch_wal() TO"),
            ("SHOW data_directory", "GRANT pg_monitor TO"),
            ("SELECT slot_name FROM pg_create_physical_replication_slot('x', true, true)", "REPLICATION"),
        ] {
            assert!(grants(sql).contains(grant), "{sql}: {}", grants(sql));
        }
    }
}
