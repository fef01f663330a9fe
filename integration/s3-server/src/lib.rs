//! A real S3 server in this process, over a directory: the buckets are its subdirectories. It can answer late, refuse,
//! hang, cut connections, and lie.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{HttpError, HttpResponse};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// The access key that every server accepts.
pub const ACCESS_KEY: &str = "pgcairn-test-access-key";
/// The secret key that belongs to it.
pub const SECRET_KEY: &str = "pgcairn-test-secret-key";

/// Another key with the same secret: for credentials that change.
pub const SECOND_ACCESS_KEY: &str = "pgcairn-test-second-key";

/// What happens to one request instead of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// none for this one: it lets a later request be met
    Pass,
    /// this status, with S3's error code for it
    Status(u16, &'static str),
    /// the request is carried out, then answered with this status
    StatusAfter(u16, &'static str),
    /// the connection is closed without an answer
    Cut,
    /// the request is carried out, then the connection is closed
    CutAfter,
    /// no answer ever comes
    Hang,
    /// the request is carried out so much later
    Late(Duration),
    /// an HTML page with this status, as a proxy sends it
    Page(u16),
    /// the request is carried out, then the answer has no body
    Empty,
    /// the request is carried out, then half of the body comes, with a length that says that this is all
    Short,
    /// the request is carried out, then one byte in the middle of the body is another one
    Flip,
    /// the request is carried out, then the answer ends before its entry of this number, counted from 0: of a listing, an
    /// object or a directory
    CutListing(usize),
    /// a range is answered with the whole object
    WholeForRange,
}

/// A trouble, and which requests it meets.
#[derive(Clone, Debug)]
struct Rule {
    /// part of `METHOD PATH?QUERY`
    of: String,
    trouble: Trouble,
    /// how many more requests it meets
    count: usize,
    until: Option<Instant>,
}

/// A running server; it stops when dropped.
#[derive(Debug)]
pub struct S3Server {
    /// `http://127.0.0.1:PORT`
    pub endpoint: String,
    /// the access key
    pub access_key: &'static str,
    /// the secret key
    pub secret_key: &'static str,
    directory: PathBuf,
    control: Arc<Control>,
    runtime: Option<Runtime>,
}

#[derive(Debug, Default)]
struct Control {
    latency_micros: AtomicU64,
    requests: AtomicU64,
    rules: Mutex<VecDeque<Rule>>,
    log: Mutex<Vec<String>>,
    refused_keys: Mutex<Vec<String>>,
}

impl Control {
    /// The trouble that this request meets: of the first rule that is of it.
    fn meet(&self, request: &str) -> Option<Trouble> {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        rules.retain(|rule| rule.count > 0 && rule.until.is_none_or(|until| now < until));
        let rule = rules.iter_mut().find(|rule| request.contains(&rule.of))?;
        rule.count -= 1;
        Some(rule.trouble)
    }

    fn add(&self, rule: Rule) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).push_back(rule);
    }
}

impl S3Server {
    /// Serves `directory` on a free port of 127.0.0.1. Each request waits for `latency` first, all at the same time.
    pub fn start(directory: &Path, latency: Duration) -> io::Result<Self> {
        Self::start_on(directory, latency, 0)
    }

    /// The same on a chosen port.
    pub fn start_on(directory: &Path, latency: Duration, port: u16) -> io::Result<Self> {
        let files = s3s_fs::FileSystem::new(directory).map_err(|e| io::Error::other(format!("{e:?}")))?;
        let mut service = S3ServiceBuilder::new(files);
        let mut keys = SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY);
        keys.register(SECOND_ACCESS_KEY.to_owned(), SECRET_KEY.into());
        service.set_auth(keys);
        let control = Arc::new(Control::default());
        let handler =
            Handler { service: service.build(), control: Arc::clone(&control), directory: directory.to_owned() };

        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let listener = std::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
        listener.set_nonblocking(true)?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        runtime.spawn(serve(listener, handler));

        let server = Self {
            endpoint,
            access_key: ACCESS_KEY,
            secret_key: SECRET_KEY,
            directory: directory.to_owned(),
            control,
            runtime: Some(runtime),
        };
        server.set_latency(latency);
        Ok(server)
    }

    /// Makes a bucket, if there is none of that name.
    pub fn make_bucket(&self, name: &str) -> io::Result<()> {
        std::fs::create_dir_all(self.directory.join(name))
    }

    /// From now on each request waits this long.
    pub fn set_latency(&self, latency: Duration) {
        self.control.latency_micros.store(latency.as_micros() as u64, Ordering::SeqCst);
    }

    /// The next `count` requests that come meet this trouble, after those already set.
    pub fn trouble(&self, trouble: Trouble, count: usize) {
        self.trouble_of("", trouble, count);
    }

    /// The same, for requests that have `of` in their `METHOD PATH?QUERY`, such as `GET /bucket/a` or `list-type=2`.
    pub fn trouble_of(&self, of: &str, trouble: Trouble, count: usize) {
        self.control.add(Rule { of: of.to_owned(), trouble, count, until: None });
    }

    /// From now on, for so long, every request that has `of` in its `METHOD PATH?QUERY` meets this trouble.
    pub fn trouble_for(&self, of: &str, trouble: Trouble, time: Duration) {
        let until = Some(Instant::now() + time);
        self.control.add(Rule { of: of.to_owned(), trouble, count: usize::MAX, until });
    }

    /// From now on this access key is not known any more.
    pub fn refuse_key(&self, key: &str) {
        self.control.refused_keys.lock().unwrap_or_else(PoisonError::into_inner).push(format!("Credential={key}/"));
    }

    /// Ends every trouble.
    pub fn calm(&self) {
        self.control.rules.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// `METHOD PATH?QUERY` of every request since the last call.
    pub fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.control.log.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many requests came so far.
    pub fn requests(&self) -> u64 {
        self.control.requests.load(Ordering::SeqCst)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(listener: std::net::TcpListener, handler: Handler) {
    let Ok(listener) = TcpListener::from_std(listener) else { return };
    let server = Builder::new(TokioExecutor::new());
    loop {
        let Ok((socket, _)) = listener.accept().await else {
            // out of file descriptors, perhaps; do not spin
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let _ = socket.set_nodelay(true);
        let connection = server.serve_connection(TokioIo::new(socket), handler.clone()).into_owned();
        tokio::spawn(connection);
    }
}

#[derive(Clone)]
struct Handler {
    service: S3Service,
    control: Arc<Control>,
    directory: PathBuf,
}

type Answer = Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send>>;

impl hyper::service::Service<http::Request<Incoming>> for Handler {
    type Response = HttpResponse;
    type Error = HttpError;
    type Future = Answer;

    fn call(&self, request: http::Request<Incoming>) -> Answer {
        self.control.requests.fetch_add(1, Ordering::SeqCst);
        let latency = Duration::from_micros(self.control.latency_micros.load(Ordering::SeqCst));
        let line = format!("{} {}", request.method(), request.uri().path_and_query().map_or("", |path| path.as_str()));
        let trouble = self.control.meet(&line);
        self.control.log.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        let object = self.directory.join(request.uri().path().trim_start_matches('/'));
        let signed = request.headers().get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let refused = self.control.refused_keys.lock().unwrap_or_else(PoisonError::into_inner);
        let is_refused = refused.iter().any(|key| signed.contains(key.as_str()));
        drop(refused);
        let service = self.service.clone();
        Box::pin(async move {
            if !latency.is_zero() {
                tokio::time::sleep(latency).await;
            }
            let carry_out = || hyper::service::Service::call(&service, request);
            if is_refused {
                return refusal(403, "InvalidAccessKeyId");
            }
            let Some(trouble) = trouble else { return carry_out().await };
            match trouble {
                Trouble::Pass => carry_out().await,
                Trouble::WholeForRange => match std::fs::read(object) {
                    Ok(bytes) => whole(bytes),
                    Err(_) => carry_out().await,
                },
                Trouble::Status(status, code) => refusal(status, code),
                Trouble::StatusAfter(status, code) => {
                    carry_out().await?;
                    refusal(status, code)
                }
                Trouble::Cut => Err(cut()),
                Trouble::CutAfter => {
                    carry_out().await?;
                    Err(cut())
                }
                Trouble::Hang => std::future::pending().await,
                Trouble::Late(time) => {
                    tokio::time::sleep(time).await;
                    carry_out().await
                }
                Trouble::Page(status) => answer(status, "text/html", PAGE.into()),
                Trouble::Empty | Trouble::Short | Trouble::Flip | Trouble::CutListing(_) => {
                    spoil(carry_out().await?, trouble).await
                }
            }
        })
    }
}

/// What a proxy says when the server behind it is away.
const PAGE: &str =
    "<html><head><title>Please log in</title></head><body><h1>Please log in</h1>for access</body></html>";

/// Changes an answer's body as `trouble` says, and its length with it.
async fn spoil(whole: HttpResponse, trouble: Trouble) -> Result<HttpResponse, HttpError> {
    let (mut head, mut body) = whole.into_parts();
    let mut bytes = body.store_all_limited(BODY_MAX).await.map_err(HttpError::new)?.to_vec();
    match trouble {
        Trouble::Empty => bytes.clear(),
        Trouble::Short => bytes.truncate(bytes.len() / 2),
        Trouble::Flip => {
            let middle = bytes.len() / 2;
            bytes.iter_mut().skip(middle).take(1).for_each(|byte| *byte ^= 1);
        }
        Trouble::CutListing(number) => {
            let entries = find_all(&bytes, b"<Contents>").chain(find_all(&bytes, b"<CommonPrefixes>"));
            let mut entries: Vec<usize> = entries.collect();
            entries.sort_unstable();
            bytes.truncate(entries.get(number).copied().unwrap_or(bytes.len()));
        }
        _ => {}
    }
    if head.headers.contains_key("content-length") {
        head.headers.insert("content-length", bytes.len().into());
    }
    Ok(http::Response::from_parts(head, s3s::Body::from(bytes)))
}

/// No body of a test is longer.
const BODY_MAX: usize = 256 << 20;

fn find_all<'a>(text: &'a [u8], what: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    text.windows(what.len()).enumerate().filter(move |(_, window)| *window == what).map(|(at, _)| at)
}

fn cut() -> HttpError {
    HttpError::new(io::Error::other("the connection is cut on purpose").into())
}

fn refusal(status: u16, code: &str) -> Result<HttpResponse, HttpError> {
    let body = format!("<Error><Code>{code}</Code><Message>refused on purpose</Message></Error>");
    answer(status, "application/xml", body)
}

/// The whole object, as the answer to whatever was asked of it.
fn whole(bytes: Vec<u8>) -> Result<HttpResponse, HttpError> {
    http::Response::builder()
        .header("etag", "\"whole\"")
        .header("content-length", bytes.len())
        .body(s3s::Body::from(bytes))
        .map_err(|e| HttpError::new(Box::new(e)))
}

fn answer(status: u16, kind: &str, body: String) -> Result<HttpResponse, HttpError> {
    http::Response::builder()
        .status(status)
        .header("content-type", kind)
        .body(s3s::Body::from(bytes::Bytes::from(body)))
        .map_err(|e| HttpError::new(Box::new(e)))
}
