//! A real S3 server in this process, over a directory: the buckets are its subdirectories. It can answer late, refuse,
//! hang and cut connections.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

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
    troubles: Mutex<VecDeque<Trouble>>,
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
        service.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        let control = Arc::new(Control::default());
        let handler = Handler { service: service.build(), control: Arc::clone(&control) };

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
        let mut troubles = self.control.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        troubles.extend(std::iter::repeat_n(trouble, count));
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
}

type Answer = Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send>>;

impl hyper::service::Service<http::Request<Incoming>> for Handler {
    type Response = HttpResponse;
    type Error = HttpError;
    type Future = Answer;

    fn call(&self, request: http::Request<Incoming>) -> Answer {
        self.control.requests.fetch_add(1, Ordering::SeqCst);
        let latency = Duration::from_micros(self.control.latency_micros.load(Ordering::SeqCst));
        let trouble = self.control.troubles.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let service = self.service.clone();
        Box::pin(async move {
            if !latency.is_zero() {
                tokio::time::sleep(latency).await;
            }
            let carry_out = || hyper::service::Service::call(&service, request);
            match trouble {
                None | Some(Trouble::Pass) => carry_out().await,
                Some(Trouble::Status(status, code)) => refusal(status, code),
                Some(Trouble::StatusAfter(status, code)) => {
                    carry_out().await?;
                    refusal(status, code)
                }
                Some(Trouble::Cut) => Err(cut()),
                Some(Trouble::CutAfter) => {
                    carry_out().await?;
                    Err(cut())
                }
                Some(Trouble::Hang) => std::future::pending().await,
            }
        })
    }
}

fn cut() -> HttpError {
    HttpError::new(io::Error::other("the connection is cut on purpose").into())
}

fn refusal(status: u16, code: &str) -> Result<HttpResponse, HttpError> {
    let body = format!("<Error><Code>{code}</Code><Message>refused on purpose</Message></Error>");
    http::Response::builder()
        .status(status)
        .header("content-type", "application/xml")
        .body(s3s::Body::from(bytes::Bytes::from(body)))
        .map_err(|e| HttpError::new(Box::new(e)))
}
