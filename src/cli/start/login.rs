//! Logs in to a clone's server, and tells a server that is not ready from one that will never let anybody in.

use clap::Args;
use postgres::error::SqlState;
use postgres::{Client, NoTls};

use super::super::clones::{Clone, Login, Place};
use crate::error::{Error, Result};
use crate::format::manifest::Description;

/// Whom the clone's server is asked as, and in which database.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct LoginOptions {
    /// Role to log in to the clone as [default: the cluster's bootstrap superuser]
    #[arg(long, env = "PGCAIRN_PG_USER", value_name = "ROLE")]
    pg_user: Option<String>,
    /// Database to log in to [default: postgres, else template1]
    #[arg(long, env = "PGCAIRN_PG_DATABASE", value_name = "DATABASE")]
    pg_database: Option<String>,
}

/// Why nobody could log in.
#[derive(Debug)]
pub(super) enum NoLogin {
    /// the server does not take connections yet
    NotYet(postgres::Error),
    /// it refuses, and will go on refusing
    Refused(Error),
}

/// Roles and databases to try, in this order.
#[derive(Debug)]
pub(super) struct Logins {
    users: Vec<String>,
    databases: Vec<String>,
    /// the server's major version
    major: u32,
}

/// What a failed login leads to.
enum Next {
    /// the same again, later
    Wait,
    /// another database
    Database,
    /// another role
    Role,
    /// the same without the libraries that are loaded into each session
    WithoutLibraries,
    /// nothing helps
    Never,
}

impl LoginOptions {
    /// What to try on a clone of this backup.
    pub(super) fn candidates(&self, of: &Description) -> Logins {
        let databases = match &self.pg_database {
            Some(database) => vec![database.clone()],
            None => vec!["postgres".to_owned(), "template1".to_owned()],
        };
        let users = match (&self.pg_user, of.superuser.as_deref()) {
            (Some(user), _) => vec![user.clone()],
            (None, Some(superuser)) if superuser != "postgres" => vec![superuser.to_owned(), "postgres".to_owned()],
            (None, _) => vec!["postgres".to_owned()],
        };
        Logins { users, databases, major: of.database.version }
    }
}

impl Logins {
    /// The first login that works.
    ///
    /// # Errors
    /// The first refusal, if all of them are for good.
    pub(super) fn connect(&self, place: &Place, clone: &Clone) -> std::result::Result<(Client, Login), NoLogin> {
        let mut refused: Option<(Login, postgres::Error)> = None;
        'users: for user in &self.users {
            for database in &self.databases {
                let mut login = Login {
                    user: user.clone(),
                    database: database.clone(),
                    without_libraries: false,
                    major: self.major,
                    with_triggers: false,
                };
                loop {
                    let error = match Client::connect(&clone.own_conninfo(place, &login), NoTls) {
                        Ok(client) => return Ok((client, login)),
                        Err(error) => error,
                    };
                    if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) && !login.with_triggers {
                        login.with_triggers = true;
                        continue;
                    }
                    match next(&error) {
                        Next::Wait => return Err(NoLogin::NotYet(error)),
                        Next::WithoutLibraries if !login.without_libraries => {
                            login.without_libraries = true;
                            continue;
                        }
                        Next::Never | Next::WithoutLibraries => return Err(NoLogin::Refused(refusal(&login, error))),
                        Next::Role => {
                            _ = refused.get_or_insert((login, error));
                            continue 'users;
                        }
                        Next::Database => {
                            _ = refused.get_or_insert((login, error));
                            break;
                        }
                    }
                }
            }
        }
        Err(NoLogin::Refused(match refused {
            Some((login, error)) => refusal(&login, error),
            None => Error::new("there is no role to log in to the clone as"),
        }))
    }
}

/// A server that starts up or shuts down says so; what has no SQLSTATE is a failed connection.
fn next(error: &postgres::Error) -> Next {
    let Some(code) = error.code() else { return Next::Wait };
    if [
        SqlState::CANNOT_CONNECT_NOW,
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::TOO_MANY_CONNECTIONS,
    ]
    .contains(code)
    {
        return Next::Wait;
    }
    if [SqlState::INVALID_AUTHORIZATION_SPECIFICATION, SqlState::INVALID_PASSWORD].contains(code) {
        return Next::Role;
    }
    let of_database =
        [SqlState::INVALID_CATALOG_NAME, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, SqlState::INSUFFICIENT_PRIVILEGE];
    if of_database.contains(code) {
        return Next::Database;
    }
    // a library that is not installed, or cannot be loaded
    if [SqlState::UNDEFINED_FILE, SqlState::INTERNAL_ERROR].contains(code) {
        return Next::WithoutLibraries;
    }
    Next::Never
}

fn refusal(login: &Login, error: postgres::Error) -> Error {
    let hint = match error.code() {
        Some(code)
            if *code == SqlState::INVALID_CATALOG_NAME || *code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE =>
        {
            "name a database of the cluster with --pg-database"
        }
        Some(code) if *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION => {
            "name a role that may log in with --pg-user"
        }
        _ => "name another role or database with --pg-user and --pg-database",
    };
    let Login { user, database, .. } = login;
    Error::new(format!("the clone's server refuses role \"{user}\" in database \"{database}\""))
        .hint(hint)
        .source(said(&error))
}

/// What the server said, without the driver's own words.
pub(in super::super) fn said(error: &postgres::Error) -> String {
    error
        .as_db_error()
        .map_or_else(|| error.to_string(), |error| format!("{} ({})", error.message(), error.code().code()))
}

/// A role and a database that were named, or a path, must fit into a connection string.
pub(super) fn check_path(place: &Place) -> Result<()> {
    let root = place.root();
    let Some(text) = root.to_str() else {
        return Err(Error::new(format!("the clone's directory {} is not UTF-8", root.display()))
            .hint("choose another with --clone-path"));
    };
    // a comma separates hosts; the others mean something to the shell that pg_ctl runs, even between quotes
    if let Some(bad) = text.chars().find(|c| ",\"$`\\".contains(*c) || c.is_control()) {
        return Err(Error::new(format!("the clone's directory {} has a {bad:?} in its name", root.display()))
            .hint("choose another with --clone-path"));
    }
    // 107 bytes at most: .s.PGSQL.65535
    let socket = place.run().join(".s.PGSQL.65535");
    if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(Error::new(format!(
            "the path of the clone's socket would be too long: {} ({} bytes of {SOCKET_PATH_BYTES_MAX})",
            socket.display(),
            socket.as_os_str().len()
        ))
        .hint("give a shorter --name, or a shorter directory with --clone-path"));
    }
    Ok(())
}

/// The longest path of a Unix socket.
const SOCKET_PATH_BYTES_MAX: usize = 107;
