//! Servers that speak another protocol than the URL says.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Instant;

use super::s3::{liar, options};
use super::*;

/// Answers every connection with these bytes at once, or never; then closes it when the client has said all.
fn deaf(answer: Option<&'static [u8]>, scheme: &str) -> S3Store {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut head = [0; 5];
                connection.read_exact(&mut head)?;
                match answer {
                    Some(answer) => connection.write_all(answer)?,
                    // a server of HTTP waits for the end of a line
                    None if head.is_ascii() && head[0] >= b' ' => connection.write_all(b"HTTP/1.1 400 Bad\r\n\r\n")?,
                    None => {}
                }
                std::io::copy(&mut connection, &mut std::io::sink()).map(drop)
            });
        }
    });
    let options =
        S3Options { connect_timeout: Some(Duration::from_secs(2)), ..options(format!("{scheme}://{address}")) };
    S3Store::open(options).unwrap()
}

/// Another protocol than the URL's does not get better, whether the server says a word or not.
#[test]
fn another_protocol_is_said_at_once() {
    const ALERT: &[u8] = &[0x15, 3, 3, 0, 2, 2, 40];
    let failed = |store: S3Store| {
        let start = Instant::now();
        let error = Retry::new(store, RetryPolicy::default()).get("a").unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        assert_eq!(error.kind, ErrorKind::Other, "{}", shown(&error));
        (shown(&error), error.hint().unwrap_or_default())
    };
    let (error, hint) = failed(deaf(Some(ALERT), "http"));
    assert!(error.contains("speaks TLS") && hint.contains("https:// instead of http://"), "{error} {hint}");
    let (error, hint) = failed(deaf(None, "https"));
    assert!(error.contains("does not speak TLS") && hint.contains("http:// instead of https://"), "{error} {hint}");
    for page in ["Client sent an HTTP request to an HTTPS server.", "The plain HTTP request was sent to HTTPS port"] {
        let answer = format!("HTTP/1.1 400 Bad Request\r\nContent-Length: {}\r\n\r\n{page}", page.len());
        let error = liar(answer.leak()).get("a").unwrap_err();
        assert_eq!(error.kind, ErrorKind::Other, "{}", shown(&error));
        assert!(error.hint().unwrap_or_default().contains("https:// instead of http://"), "{}", shown(&error));
    }
    // neither the one nor the other: it may be on its way up
    assert_eq!(kind(deaf(Some(b"?????"), "http").get("a")), ErrorKind::Transient);
}
