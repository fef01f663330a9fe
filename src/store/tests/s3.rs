//! Servers that refuse, hang, cut connections and lie.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use pgcairn_s3_server::Trouble;

use super::*;

pub(super) fn options(endpoint: String) -> S3Options {
    S3Options {
        bucket: "bucket".into(),
        endpoint: Some(endpoint),
        key: Some("a-long-enough-key".into()),
        key_secret: Some("secret".into()),
        attempt_timeout: Some(Duration::from_secs(1)),
        connect_timeout: Some(Duration::from_millis(500)),
        ..Default::default()
    }
}

/// Answers every request with the same bytes, then closes the connection.
pub(super) fn liar(answer: &'static str) -> S3Store {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let _ = lie(connection, answer);
        }
    });
    S3Store::open(options(endpoint)).unwrap()
}

fn lie(mut connection: TcpStream, answer: &str) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.windows(4).any(|window| window == b"\r\n\r\n") {
        let len = connection.read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        request.extend_from_slice(&buffer[..len]);
    }
    connection.write_all(answer.as_bytes())
}

#[test]
fn a_server_in_trouble_is_waited_for() {
    let s3 = TestS3::start();
    let options = S3Options { attempt_timeout: Some(Duration::from_secs(1)), ..s3.options("") };
    let store = Retry::new(S3Store::open(options).unwrap(), quick());
    put(&store, "a", "x");
    let troubles = [
        Trouble::Status(503, "SlowDown"),
        Trouble::Status(500, "InternalError"),
        Trouble::Status(429, "TooManyRequests"),
        Trouble::Status(409, "OperationAborted"),
        Trouble::Status(400, "RequestTimeout"),
        Trouble::StatusAfter(500, "InternalError"),
        Trouble::Cut,
        Trouble::CutAfter,
    ];
    for trouble in troubles {
        for round in 0..6 {
            // the code is in the body, and the answer to a HEAD request has none
            if round == 3 && trouble == Trouble::Status(400, "RequestTimeout") {
                continue;
            }
            s3.server.trouble(trouble, 3);
            match round {
                0 => put(&store, "a", "x"),
                1 => assert_eq!(store.get("a").unwrap(), "x", "{trouble:?}"),
                2 => assert_eq!(store.get_range("a", 0, 1).unwrap(), "x", "{trouble:?}"),
                3 => assert_eq!(store.size("a").unwrap(), Some(1), "{trouble:?}"),
                4 => assert_eq!(store.list("", None).unwrap().objects.len(), 1, "{trouble:?}"),
                _ => store.delete(&["b".into(), "c".into()]).unwrap(),
            }
        }
    }
    s3.server.trouble(Trouble::Hang, 1);
    assert_eq!(store.get("a").unwrap(), "x");
}

/// However often it is tried in that time.
#[test]
fn the_deadline_decides_not_the_number_of_tries() {
    let s3 = TestS3::start();
    let retry = quick();
    let store = Retry::new(S3Store::open(S3Options { retry, ..s3.options("") }).unwrap(), retry);
    put(&store, "a", "x");
    let source = tempfile::NamedTempFile::new().unwrap();
    source.as_file().set_len((64 << 20) + 1).unwrap();
    let calls: [(&str, &dyn Fn()); 7] = [
        ("put", &|| put(&store, "a", "x")),
        ("get", &|| assert_eq!(store.get("a").unwrap(), "x")),
        ("range", &|| assert_eq!(store.get_range("a", 0, 1).unwrap(), "x")),
        ("size", &|| assert_eq!(store.size("a").unwrap(), Some(1))),
        ("list", &|| assert_eq!(store.list("", None).unwrap().objects.len(), 1)),
        ("delete", &|| store.delete(&["b".into(), "c".into()]).unwrap()),
        ("parts", &|| store.put("b", Body::File(source.path().into())).unwrap()),
    ];
    for (name, call) in calls {
        let before = s3.server.requests();
        // of an upload in parts, the first part; more often than a fixed number of tries would allow
        let of = if name == "parts" { "partNumber=1" } else { "" };
        s3.server.trouble_of(of, Trouble::Status(503, "SlowDown"), 12);
        call();
        assert!(s3.server.requests() - before > 12, "{name} met no trouble");
    }
}

#[test]
fn a_server_that_hangs_is_left_in_bounded_time() {
    let s3 = TestS3::start();
    let options = S3Options { attempt_timeout: Some(Duration::from_millis(300)), ..s3.options("") };
    let store = S3Store::open(options).unwrap();
    s3.server.trouble(Trouble::Hang, 2);
    let start = Instant::now();
    let error = store.get("a").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Transient);
    assert_eq!(shown(&error), "cannot read s3://bucket/a: no answer within 0.3 s");
    assert_eq!(kind(store.put("a", Body::Bytes("x".into()))), ErrorKind::Transient);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_part_that_fails_is_repeated_alone_and_nothing_stays_behind() {
    let s3 = TestS3::start();
    let store = s3.store();
    let source = tempfile::NamedTempFile::new().unwrap();
    source.as_file().set_len((64 << 20) + 1).unwrap();
    put(&store, "first", "");
    let before = s3.server.requests();
    store.put("a", Body::File(source.path().into())).unwrap();
    // created, five parts, completed
    assert_eq!(s3.server.requests() - before, 7);

    s3.server.trouble(Trouble::Status(500, "InternalError"), 1);
    assert_eq!(kind(store.put("b", Body::File(source.path().into()))), ErrorKind::Transient);
    s3.server.trouble(Trouble::Pass, 1);
    s3.server.trouble(Trouble::Status(503, "SlowDown"), 2);
    s3.server.trouble(Trouble::Cut, 1);
    store.put("b", Body::File(source.path().into())).unwrap();
    assert_eq!(store.size("b").unwrap(), Some((64 << 20) + 1));

    s3.server.trouble(Trouble::Pass, 2);
    // after it took the part: an answer that comes before is lost when the connection closes on what is still sent
    s3.server.trouble(Trouble::StatusAfter(403, "AccessDenied"), 1);
    assert_eq!(kind(store.put("c", Body::File(source.path().into()))), ErrorKind::Denied);
    assert_eq!(store.size("c").unwrap(), None);
    let left = std::fs::read_dir(s3.directory())
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains("upload"));
    assert_eq!(left.count(), 0, "the parts of a failed upload are removed");
}

#[test]
fn latency_is_per_request_not_per_server() {
    let s3 = TestS3::start();
    let store = s3.store();
    put(&store, "a", "x");
    s3.server.set_latency(Duration::from_millis(200));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| assert_eq!(store.get("a").unwrap(), "x"));
        }
    });
    let elapsed = start.elapsed();
    assert!(elapsed >= Duration::from_millis(200) && elapsed < Duration::from_secs(2), "{elapsed:?}");
}

#[test]
fn refusals_say_what_to_look_at() {
    let s3 = TestS3::start();
    let wrong = S3Store::open(S3Options { key_secret: Some("wrong".into()), ..s3.options("") }).unwrap();
    let error = wrong.get("a").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Denied);
    assert!(shown(&error).contains("403 SignatureDoesNotMatch"), "{}", shown(&error));

    let missing = S3Store::open(S3Options { bucket: "missing".into(), ..s3.options("") }).unwrap();
    for error in [missing.list("", None).unwrap_err(), missing.names("").unwrap_err(), missing.size("a").unwrap_err()] {
        assert_eq!(error.kind, ErrorKind::Other);
        assert!(shown(&error).contains("there is no bucket \"missing\""), "{}", shown(&error));
    }

    let gone = S3Store::open(options("http://127.0.0.1:1".into())).unwrap();
    let error = gone.get("a").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Transient);
    assert!(shown(&error).contains("onnection refused"), "{}", shown(&error));
}

/// What cannot get better is an error at once, and its hint is of what is wrong.
#[test]
fn what_is_set_wrongly_is_said_at_once() {
    let s3 = TestS3::start();
    let start = Instant::now();
    let failed = |options: S3Options| {
        let store = Retry::new(S3Store::open(options).unwrap(), RetryPolicy::default());
        let error = store.get("a").unwrap_err();
        assert_ne!(error.kind, ErrorKind::Transient, "{}", shown(&error));
        (shown(&error), error.hint().unwrap_or_default())
    };
    let (_, hint) = failed(S3Options { key_secret: Some("wrong".into()), ..s3.options("") });
    assert!(hint.contains("--repo-s3-key"), "{hint}");
    let (error, hint) = failed(S3Options { bucket: "missing".into(), ..s3.options("") });
    assert!(error.contains("there is no bucket") && hint.contains("--repo"), "{error} {hint}");
    let plain = s3.server.endpoint.replace("http://", "https://");
    let (error, hint) = failed(S3Options { endpoint: Some(plain), ..s3.options("") });
    assert!(error.contains("does not speak TLS") && hint.contains("http://"), "{error} {hint}");
    assert!(start.elapsed() < Duration::from_secs(60), "{:?}", start.elapsed());

    let answered = |head: &str, body: &str| {
        let answer = format!("HTTP/1.1 {head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let error = liar(answer.leak()).get("a").unwrap_err();
        (shown(&error), error.hint().unwrap_or_default())
    };
    let (error, hint) =
        answered("301 Moved\r\nx-amz-bucket-region: eu-west-7", "<Error><Code>PermanentRedirect</Code></Error>");
    assert!(error.contains("eu-west-7") && hint.contains("--repo-s3-region"), "{error} {hint}");
    let (error, hint) = answered("400 Bad Request\r\nx-amz-bucket-region: eu-west-7", "");
    assert!(error.contains("eu-west-7") && hint.contains("--repo-s3-region"), "{error} {hint}");
    let skewed = "<Error><Code>RequestTimeTooSkewed</Code><ServerTime>2001-02-03T04:05:06Z</ServerTime></Error>";
    let (error, hint) = answered("403 Forbidden", skewed);
    assert!(error.contains("2001-02-03T04:05:06Z, this machine's 20") && hint.contains("clock"), "{error} {hint}");
    let (error, hint) = answered("403 Forbidden", "<Error><Code>AccessDenied</Code><Message>no</Message></Error>");
    assert!(error.contains("403 AccessDenied: no") && hint.contains("allowed"), "{error} {hint}");
}

#[test]
fn a_call_under_way_ends_when_the_program_does() {
    let s3 = TestS3::start();
    let stop = Stop::default();
    let store = S3Store::open(S3Options { stop: stop.clone(), ..s3.options("") }).unwrap();
    put(&store, "a", "x");
    s3.server.trouble(Trouble::Hang, 1);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let read = scope.spawn(|| store.get("a").unwrap_err());
        std::thread::sleep(Duration::from_millis(100));
        stop.set();
        assert!(shown(&read.join().unwrap()).contains("the program is ending"));
    });
    assert!(shown(&store.get("a").unwrap_err()).contains("the program is ending"));
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

/// Whoever is in a hurry waits some seconds for a store that hangs, once, and does not harm what answers.
#[test]
fn a_hurry_ends_calls_that_hang() {
    let s3 = TestS3::start();
    let stop = Stop::default();
    let retry = RetryPolicy::default();
    let store = S3Store::open(S3Options { stop: stop.clone(), retry, ..s3.options("") }).unwrap();
    let store = Retry::new(store, retry).until(stop.clone());
    put(&store, "a", "x");
    stop.hurry();
    assert_eq!(store.get("a").unwrap(), "x");
    s3.server.trouble(Trouble::Hang, 1000);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let reads = [(); 3].map(|()| scope.spawn(|| store.get("a").unwrap_err()));
        for read in reads {
            assert!(shown(&read.join().unwrap()).contains("the program is ending"));
        }
    });
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    // the others need not find out again
    let start = Instant::now();
    for _ in 0..5 {
        store.get("a").unwrap_err();
    }
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
}

#[test]
fn a_hurry_ends_tries_that_fail() {
    let stop = Stop::default();
    // nobody listens there
    let store = S3Store::open(S3Options { stop: stop.clone(), ..options("http://127.0.0.1:1".into()) }).unwrap();
    let store = Retry::new(store, RetryPolicy::default()).until(stop.clone());
    let start = Instant::now();
    std::thread::scope(|scope| {
        let read = scope.spawn(|| kind(store.get("a")));
        std::thread::sleep(Duration::from_millis(100));
        stop.hurry();
        assert_eq!(read.join().unwrap(), ErrorKind::Transient);
    });
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn times_are_told_as_people_tell_them() {
    let s3 = TestS3::start();
    s3.server.trouble(Trouble::Hang, 100);
    let retry = RetryPolicy { deadline: Duration::from_millis(1500), ..RetryPolicy::default() };
    let store = Retry::new(S3Store::open(S3Options { retry, ..s3.options("") }).unwrap(), retry);
    let error = shown(&store.get("a").unwrap_err());
    assert!(error.contains("no answer within 1.5 s"), "{error}");
}

/// One deadline for all that is tried in a call, also where each answer hangs.
#[test]
fn a_server_that_hangs_costs_one_deadline() {
    let s3 = TestS3::start();
    let retry = RetryPolicy { deadline: Duration::from_secs(1), ..RetryPolicy::default() };
    // one try may take longer than the whole call
    let store = Retry::new(S3Store::open(S3Options { retry, ..s3.options("") }).unwrap(), retry);
    put(&store, "a", "x");
    s3.server.trouble(Trouble::Hang, 1000);
    let calls: [&dyn Fn() -> ErrorKind; 5] = [
        &|| kind(store.get("a")),
        &|| kind(store.get_range("a", 0, 1)),
        &|| kind(store.put("a", Body::Bytes("x".into()))),
        &|| kind(store.names("")),
        &|| kind(store.delete(&["a".into(), "b".into()])),
    ];
    for call in calls {
        let start = Instant::now();
        assert_eq!(call(), ErrorKind::Transient);
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
}

#[test]
fn lies_are_seen() {
    let full = "HTTP/1.1 200 OK\r\nETag: \"1\"\r\nContent-Length: 10\r\n\r\n0123456789";
    assert_eq!(liar(full).get("a").unwrap(), "0123456789");
    assert_eq!(liar(full).get_range("a", 0, 10).unwrap(), "0123456789");
    assert_eq!(kind(liar(full).get_range("a", 20, 2)), ErrorKind::Truncated);
    assert_eq!(kind(liar(full).get_range("a", 2, 2)), ErrorKind::Transient);

    let cut = "HTTP/1.1 200 OK\r\nETag: \"1\"\r\nContent-Length: 10\r\n\r\n01234";
    assert_eq!(kind(liar(cut).get("a")), ErrorKind::Transient);
    let range = |head: &str| {
        format!("HTTP/1.1 206 Partial\r\nETag: \"1\"\r\nContent-Length: 10\r\nContent-Range: {head}\r\n\r\n")
    };
    let cut_range = (range("bytes 0-9/20") + "01234").leak();
    assert_eq!(kind(liar(cut_range).get_range("a", 0, 10)), ErrorKind::Transient);
    let other_range = (range("bytes 5-14/20") + "0123456789").leak();
    assert_eq!(kind(liar(other_range).get_range("a", 4, 10)), ErrorKind::Transient);
    assert_eq!(kind(liar("nonsense\r\n\r\n").get("a")), ErrorKind::Transient);
}

/// Whatever answers in the server's place, with whichever status: nothing is believed to be stored, absent, or deleted.
#[test]
fn a_page_is_not_an_answer() {
    for status in ["200 OK", "404 Not Found", "503 Service Unavailable"] {
        for page in ["<html><title>Please log in</title></html>", ""] {
            let len = page.len();
            let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {len}\r\n\r\n{page}");
            let store = liar(answer.leak());
            let answers = [
                store.get("a").map(drop),
                store.get_range("a", 0, 1).map(drop),
                store.put("a", Body::Bytes("x".into())),
                store.list("", None).map(drop),
                store.names("").map(drop),
                store.delete(&["a".into(), "b".into()]),
            ];
            for (number, answer) in answers.into_iter().enumerate() {
                let error = answer.unwrap_err();
                // 404 without a word to everything: there is no bucket, or somebody else answers
                let bare = status.starts_with("404") && page.is_empty() && error.kind == ErrorKind::Other;
                assert!(error.kind == ErrorKind::Transient || bare, "{status} {page:?} {number} {}", shown(&error));
                if !page.is_empty() && !status.starts_with("200") {
                    assert!(shown(&error).contains("Please log in"), "{}", shown(&error));
                }
            }
        }
    }
    let s3 = TestS3::start();
    let store = s3.store();
    put(&store, "a", "x");
    for status in [200, 404, 403] {
        s3.server.trouble_of("HEAD /bucket/", Trouble::Page(status), 1);
        s3.server.trouble_of("GET /bucket/", Trouble::Page(status), 1);
        store.size("a").unwrap_err();
        s3.server.calm();
    }
    // the word of a HEAD request alone proves nothing
    s3.server.trouble_of("HEAD /bucket/a", Trouble::Page(404), 1);
    assert_eq!(kind(store.size("a")), ErrorKind::Transient);
    assert_eq!(store.size("b").unwrap(), None);
    assert_eq!(store.size("a").unwrap(), Some(1));
}

#[test]
fn a_listing_without_its_end_is_none() {
    let s3 = TestS3::start();
    let store = s3.store();
    for key in ["d/a", "d/b", "d/e/f", "d/e/g"] {
        put(&store, key, "x");
    }
    let cuts = (0..4).map(Trouble::CutListing);
    for trouble in cuts.chain([Trouble::Empty, Trouble::Short, Trouble::Page(200)]) {
        s3.server.trouble(trouble, 1);
        let error = store.list("d/", None).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Transient, "{trouble:?}: {}", shown(&error));
        if trouble == Trouble::CutListing(3) {
            continue;
        }
        s3.server.trouble(trouble, 1);
        assert_eq!(kind(store.names("d/")), ErrorKind::Transient, "{trouble:?}");
    }
    let patient = Retry::new(store, quick());
    s3.server.trouble(Trouble::CutListing(1), 3);
    assert_eq!(patient.list("d/", None).unwrap().objects.len(), 4);
    s3.server.trouble(Trouble::CutListing(2), 3);
    assert_eq!(patient.names("d/").unwrap(), ["a", "b", "e"]);
    s3.server.trouble(Trouble::Short, 1);
    patient.delete(&["d/a".into(), "d/b".into()]).unwrap();
    assert_eq!(patient.names("d/").unwrap(), ["e"]);
}

/// Listings that are well-formed and still not the answer.
#[test]
fn a_listing_must_be_of_what_was_asked() {
    let listing = |body: &str| {
        let body = format!("<ListBucketResult>{body}</ListBucketResult>");
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        liar(answer.leak()).list("d/", None)
    };
    let entry = |key: &str| {
        format!("<Contents><Key>{key}</Key><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>")
    };
    let (a, end) = (entry("d/a"), "<IsTruncated>false</IsTruncated>");
    assert_eq!(listing(&format!("{end}{a}")).unwrap().objects.len(), 1);
    assert_eq!(listing(&format!("{end}<KeyCount>1</KeyCount>{a}")).unwrap().objects.len(), 1);
    let bad = [
        a.clone(),
        format!("{end}<KeyCount>2</KeyCount>{a}"),
        format!("<IsTruncated>true</IsTruncated>{a}"),
        format!("{end}{a}{}", entry("e/a")),
        format!("{end}<Contents><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"),
        format!("{end}<Contents><Key>d/a</Key><Size>1</Size></Contents>"),
    ];
    for bad in bad {
        assert_eq!(kind(listing(&bad)), ErrorKind::Transient, "{bad}");
    }
}

#[test]
fn options_are_checked_before_anything_is_sent() {
    let good = || options("http://127.0.0.1:1".into());
    let certificates = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(certificates.path(), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let bad = [
        S3Options { bucket: "".into(), ..good() },
        S3Options { bucket: "a/b".into(), ..good() },
        S3Options { prefix: "a//b".into(), ..good() },
        S3Options { endpoint: Some("127.0.0.1:9000".into()), ..good() },
        S3Options { endpoint: Some("https://".into()), ..good() },
        S3Options { key_secret: None, ..good() },
        S3Options { ca_file: Some("/missing".into()), ..good() },
        S3Options { ca_file: Some("/dev/null".into()), ..good() },
        S3Options { ca_file: Some(certificates.path().into()), ..good() },
    ];
    for bad in bad {
        let shown = format!("{bad:?}");
        assert_eq!(kind(S3Store::open(bad)), ErrorKind::Other, "{shown}");
    }
}
