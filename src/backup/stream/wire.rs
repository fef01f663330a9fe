//! A connection on which the server takes replication commands. The `postgres` crate knows none of these; what is on the wire is
//! coded by `postgres-protocol`, on which that crate stands too.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres::Config;
use postgres::config::Host;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::backend::{ErrorFields, Message};
use postgres_protocol::message::frontend;

use crate::error::{Context, Error, Result};
use crate::postgres::session;

/// How a session that streams calls itself; another name than that of the session that takes the backup.
const APPLICATION_NAME: &str = "pgcairn stream";
/// Bytes read from the socket at once.
const READ_BYTES: usize = 128 * 1024;
/// A DBA's defaults must not end a long backup.
const NO_TIMEOUTS: &str = "SELECT pg_catalog.set_config(name, '0', false) FROM pg_catalog.pg_settings \
     WHERE name IN ('statement_timeout', 'idle_session_timeout', 'transaction_timeout')";

/// What the server answered instead of doing what it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(super) struct Refusal {
    /// SQLSTATE
    pub(super) code: String,
    pub(super) message: String,
}

/// A row as text.
pub(super) type Row = Vec<Option<String>>;

/// An open connection.
pub(super) struct Wire {
    socket: Socket,
    arrived: BytesMut,
    read: Box<[u8]>,
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Wire {
    /// Connects to the first of the hosts that answers, as the `postgres` crate does, and authenticates.
    pub(super) fn connect(config: &Config) -> Result<Self> {
        let mut last = None;
        for (at, host) in config.get_hosts().iter().enumerate() {
            let ports = config.get_ports();
            let port = ports.get(at).or(ports.first()).copied().unwrap_or(5432);
            let address = config.get_hostaddrs().get(at).map(ToString::to_string);
            match Socket::connect(host, address, port, config.get_connect_timeout().copied()) {
                Ok(socket) => return Self::authenticated(socket, config),
                Err(error) => last = Some(error),
            }
        }
        let error = Error::new("cannot connect to the server for replication");
        Err(match last {
            Some(last) => error.source(last),
            None => error,
        })
    }

    fn authenticated(socket: Socket, config: &Config) -> Result<Self> {
        let mut wire = Self { socket, arrived: BytesMut::new(), read: vec![0; READ_BYTES].into() };
        wire.log_in(config).map_err(|error| match error.find::<Refusal>() {
            Some(refusal) => {
                let hint = hint_for(refusal);
                Error::new("the server refuses a connection for replication").source(error).hint(hint)
            }
            None => error,
        })?;
        for statement in [session::GUARD, NO_TIMEOUTS] {
            wire.query(statement)?;
            wire.rows()?;
            wire.ready()?;
        }
        Ok(wire)
    }

    fn log_in(&mut self, config: &Config) -> Result<()> {
        let (user, database) = (config.get_user().unwrap_or_default(), config.get_dbname().unwrap_or_default());
        let options = config.get_options().map(|options| ("options", options));
        let parameters = [
            ("client_encoding", "UTF8"),
            ("user", user),
            ("database", database),
            // such a session is admitted by the same lines of pg_hba.conf as any other, and takes SQL too
            ("replication", "database"),
            ("application_name", APPLICATION_NAME),
        ];
        self.send(|out| frontend::startup_message(parameters.into_iter().chain(options), out))?;
        let password = || {
            config.get_password().ok_or_else(|| {
                Error::new("the server asks for a password").hint("give it in --pg (password=...) or in PGPASSWORD")
            })
        };
        let mut scram: Option<sasl::ScramSha256> = None;
        let unexpected = || Error::new("the server's authentication makes no sense");
        loop {
            match self.next()? {
                Message::AuthenticationOk | Message::BackendKeyData(_) => {}
                Message::AuthenticationCleartextPassword => {
                    let password = password()?;
                    self.send(|out| frontend::password_message(password, out))?;
                }
                Message::AuthenticationMd5Password(body) => {
                    let hash = md5_hash(user.as_bytes(), password()?, body.salt());
                    self.send(|out| frontend::password_message(hash.as_bytes(), out))?;
                }
                Message::AuthenticationSasl(_) => {
                    let started =
                        scram.insert(sasl::ScramSha256::new(password()?, sasl::ChannelBinding::unsupported()));
                    let first = started.message();
                    self.send(|out| frontend::sasl_initial_response(sasl::SCRAM_SHA_256, first, out))?;
                }
                Message::AuthenticationSaslContinue(body) => {
                    let scram = scram.as_mut().ok_or_else(unexpected)?;
                    scram.update(body.data()).context(|| "cannot authenticate".into())?;
                    self.send(|out| frontend::sasl_response(scram.message(), out))?;
                }
                Message::AuthenticationSaslFinal(body) => {
                    let scram = scram.as_mut().ok_or_else(unexpected)?;
                    scram.finish(body.data()).context(|| "the server does not know the password".into())?;
                }
                Message::ReadyForQuery(_) => return Ok(()),
                _ => {
                    return Err(Error::new("the server asks for a kind of authentication that pgcairn does not know")
                        .hint("for the role of --pg, pg_hba.conf must ask for scram-sha-256, md5, password, peer or trust"));
                }
            }
        }
    }

    /// Sends a command; its answers are read one by one.
    pub(super) fn query(&mut self, command: &str) -> Result<()> {
        self.send(|out| frontend::query(command, out))
    }

    /// The rows of the next result.
    pub(super) fn rows(&mut self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        loop {
            match self.next()? {
                Message::RowDescription(_) => {}
                Message::DataRow(body) => {
                    let column = |range: Option<std::ops::Range<usize>>| {
                        Ok(range.map(|range| String::from_utf8_lossy(&body.buffer()[range]).into_owned()))
                    };
                    rows.push(body.ranges().map(column).collect().context(|| "the server's answer is cut".into())?);
                }
                Message::CommandComplete(_) => return Ok(rows),
                _ => return Err(out_of_turn("rows")),
            }
        }
    }

    /// Reads to the end of the answer to a command.
    pub(super) fn ready(&mut self) -> Result<()> {
        loop {
            match self.next()? {
                Message::ReadyForQuery(_) => return Ok(()),
                Message::CommandComplete(_) => {}
                _ => return Err(out_of_turn("the end of an answer")),
            }
        }
    }

    /// The next message. What the server says by the way goes to the log; that it refuses is an error with a [`Refusal`].
    pub(super) fn next(&mut self) -> Result<Message> {
        loop {
            let parsed = Message::parse(&mut self.arrived).context(|| "the server's answer makes no sense".into())?;
            match parsed {
                Some(Message::ErrorResponse(body)) => {
                    let refusal = refusal(body.fields());
                    return Err(Error::new("the server refuses").hint("the server's log may say more").source(refusal));
                }
                Some(Message::NoticeResponse(body)) => {
                    tracing::warn!(notice = %refusal(body.fields()), "the server says");
                }
                Some(Message::ParameterStatus(_) | Message::NotificationResponse(_)) => {}
                Some(message) => return Ok(message),
                None => self.receive()?,
            }
        }
    }

    /// From now on silence of this length is an error.
    pub(super) fn set_timeout(&self, timeout: Duration) -> Result<()> {
        let set = match &self.socket {
            Socket::Tcp(socket) => socket.set_read_timeout(Some(timeout)),
            Socket::Unix(socket) => socket.set_read_timeout(Some(timeout)),
        };
        set.context(|| "cannot bound the time of the connection".into())
    }

    fn receive(&mut self) -> Result<()> {
        let count = loop {
            match self.socket.read(&mut self.read) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Err(Error::new("the server sends nothing any more"));
                }
                other => break other.context(|| "the connection to the server broke".into())?,
            }
        };
        match count {
            0 => Err(Error::new("the server closed the connection")),
            count => {
                self.arrived.extend_from_slice(&self.read[..count]);
                Ok(())
            }
        }
    }

    fn send(&mut self, message: impl FnOnce(&mut BytesMut) -> io::Result<()>) -> Result<()> {
        let mut out = BytesMut::new();
        let sent = message(&mut out).and_then(|()| self.socket.write_all(&out));
        sent.context(|| "cannot send to the server".into())
    }
}

impl Socket {
    fn connect(host: &Host, address: Option<String>, port: u16, timeout: Option<Duration>) -> io::Result<Self> {
        let name = match host {
            Host::Unix(directory) => {
                return UnixStream::connect(directory.join(format!(".s.PGSQL.{port}"))).map(Self::Unix);
            }
            Host::Tcp(name) => address.as_ref().unwrap_or(name),
        };
        let mut last = io::Error::new(ErrorKind::NotFound, format!("{name} has no address"));
        for address in (name.as_str(), port).to_socket_addrs()? {
            let connected = match timeout {
                Some(timeout) => TcpStream::connect_timeout(&address, timeout),
                None => TcpStream::connect(address),
            };
            match connected {
                Ok(socket) => {
                    socket.set_nodelay(true)?;
                    return Ok(Self::Tcp(socket));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(buf),
            Self::Unix(socket) => socket.read(buf),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.write_all(bytes),
            Self::Unix(socket) => socket.write_all(bytes),
        }
    }
}

/// A message that has no place where it came.
pub(super) fn out_of_turn(instead: &str) -> Error {
    Error::new(format!("the server sends something else where {instead} should come"))
}

fn refusal(mut fields: ErrorFields<'_>) -> Refusal {
    let (mut code, mut message, mut detail) = (String::new(), String::new(), String::new());
    while let Ok(Some(field)) = fields.next() {
        let value = || String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => code = value(),
            b'M' => message = value(),
            b'D' => detail = format!(" ({})", value()),
            _ => {}
        }
    }
    Refusal { code, message: message + &detail }
}

fn hint_for(refusal: &Refusal) -> &'static str {
    match refusal.code.as_str() {
        "42501" => "the role of --pg needs the attribute REPLICATION: ALTER ROLE ... REPLICATION",
        "53300" => "a stream takes one of the server's max_wal_senders: raise it, or wait until another is free",
        "28000" | "28P01" => "see pg_hba.conf, and the password in --pg or PGPASSWORD",
        _ => "the server's log may say more",
    }
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wire").finish_non_exhaustive()
    }
}
