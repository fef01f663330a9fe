//! The server that an endpoint names: whether it is this machine, and whether it speaks what the URL says.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::failure::Failure;

/// How long looking takes at most, in all and for one answer.
const LOOK_MAX: Duration = Duration::from_secs(4);
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Enough of a ClientHello of TLS 1.2 (RFC 5246) that a server of any version answers it, if only with
/// an alert: lengths, version, 32 random bytes, no session, three ciphers, no compression.
const CLIENT_HELLO: [u8; 54] = {
    let mut hello = [0x2a; 54];
    let head = [0x16, 3, 1, 0, 49, 1, 0, 0, 45, 3, 3];
    let tail = [0, 0, 6, 0xc0, 0x2f, 0xc0, 0x2b, 0x13, 0x01, 1, 0];
    let mut at = 0;
    while at < head.len() {
        hello[at] = head[at];
        hello[54 - tail.len() + at] = tail[at];
        at += 1;
    }
    hello
};

/// Where a server is, by its URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Endpoint {
    pub(super) is_tls: bool,
    host: String,
    port: u16,
}

impl Endpoint {
    /// Parses `http://HOST[:PORT]`, `https://[2001:db8::1]:9000` and the like.
    pub(super) fn parse(url: &str) -> Option<Self> {
        let (is_tls, rest) = match url.strip_prefix("https://") {
            Some(rest) => (true, rest),
            None => (false, url.strip_prefix("http://")?),
        };
        let authority = rest.split(['/', '?', '#']).next()?;
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']')?;
                (host, port.strip_prefix(':'))
            }
            None => authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port))),
        };
        let port = port.map_or(Some(if is_tls { 443 } else { 80 }), |port| port.parse().ok())?;
        (!host.is_empty()).then(|| Self { is_tls, host: host.to_owned(), port })
    }

    /// Whether it is on this machine, which no proxy leads to.
    pub(super) fn is_loopback(&self) -> bool {
        let name = self.host.trim_end_matches('.').to_ascii_lowercase();
        name == "localhost"
            || name.ends_with(".localhost")
            || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// Why a server that gave no answer never will: it speaks TLS and was asked without, or the reverse.
    pub(super) fn other_protocol(&self) -> Option<Failure> {
        let (tell, told) = mpsc::channel();
        let this = self.clone();
        // to find the address of a name may take long
        thread::spawn(move || tell.send(this.answers_otherwise()));
        let is_other = told.recv_timeout(LOOK_MAX).ok()?.ok()?;
        is_other.then(|| if self.is_tls { Failure::not_tls() } else { Failure::tls() })
    }

    fn answers_otherwise(&self) -> io::Result<bool> {
        let addresses = (self.host.as_str(), self.port).to_socket_addrs()?;
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for address in addresses {
            match TcpStream::connect_timeout(&address, ANSWER_MAX).and_then(|server| self.ask_otherwise(server)) {
                Ok(answer) => return Ok(answer),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn ask_otherwise(&self, mut server: TcpStream) -> io::Result<bool> {
        server.set_read_timeout(Some(ANSWER_MAX))?;
        server.set_write_timeout(Some(ANSWER_MAX))?;
        match self.is_tls {
            true => write!(server, "HEAD / HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.host)?,
            false => server.write_all(&CLIENT_HELLO)?,
        }
        let mut head = [0; 5];
        server.read_exact(&mut head)?;
        Ok(match self.is_tls {
            true => head == *b"HTTP/",
            // a record of a handshake or an alert, of SSL 3.0 or any TLS
            false => matches!(head, [0x15 | 0x16, 3, 0..=4, ..]),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        let endpoint =
            |url: &str| Endpoint::parse(url).map(|of| (of.is_tls, of.host.clone(), of.port, of.is_loopback()));
        let of = |is_tls, host: &str, port, is_loopback| Some((is_tls, host.to_owned(), port, is_loopback));
        assert_eq!(endpoint("http://127.0.0.1:9000"), of(false, "127.0.0.1", 9000, true));
        assert_eq!(endpoint("https://localhost/"), of(true, "localhost", 443, true));
        assert_eq!(endpoint("http://s3.Localhost."), of(false, "s3.Localhost.", 80, true));
        assert_eq!(endpoint("https://[::1]:9000/x"), of(true, "::1", 9000, true));
        assert_eq!(endpoint("https://[2001:db8::1]"), of(true, "2001:db8::1", 443, false));
        assert_eq!(endpoint("https://s3.example.com:8443"), of(true, "s3.example.com", 8443, false));
        assert_eq!(endpoint("http://localhost.example.com"), of(false, "localhost.example.com", 80, false));
        assert_eq!(endpoint("http://a:b"), None);
        assert_eq!(endpoint("ftp://a"), None);
    }

    #[test]
    fn the_hello_is_one_record() {
        assert_eq!(CLIENT_HELLO.len(), 5 + usize::from(CLIENT_HELLO[4]));
        assert_eq!(usize::from(CLIENT_HELLO[8]), CLIENT_HELLO.len() - 9);
    }
}
