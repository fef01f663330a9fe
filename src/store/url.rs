//! From what people type to a store.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{DirectoryStore, ErrorKind, Result, Retry, RetryPolicy, S3Options, S3Store, Stop, Store, StoreError};

/// Everything about a store that is not in its URL.
#[derive(Clone, Default)]
pub struct StoreOptions {
    /// the S3 server's URL
    pub endpoint: Option<String>,
    /// the S3 region
    pub region: Option<String>,
    /// bucket in the path instead of the host name
    pub path_style: Option<bool>,
    /// the S3 access key
    pub key: Option<String>,
    /// the S3 secret key
    pub key_secret: Option<String>,
    /// a PEM file with certificates to trust in addition to the system's
    pub ca_file: Option<PathBuf>,
    /// how long one try may take
    pub attempt_timeout: Option<Duration>,
    /// how long connecting may take
    pub connect_timeout: Option<Duration>,
    /// how long to try
    pub retry: RetryPolicy,
    /// ends all calls when it is set
    pub stop: Stop,
}

impl fmt::Debug for StoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreOptions")
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("path_style", &self.path_style)
            .finish_non_exhaustive()
    }
}

/// Why a URL names no store.
#[derive(Debug, thiserror::Error)]
enum BadUrl {
    #[error("the repository's URL is empty")]
    Empty,
    #[error("only s3://BUCKET/PREFIX, file:///PATH and paths are known")]
    Scheme,
    #[error("file:// wants an absolute path: file:///PATH")]
    RelativeFile,
}

/// Opens `s3://BUCKET/PREFIX`, `file:///PATH` or a path; makes the directory when `create`. Calls to S3 are retried.
pub fn open(url: &str, options: &StoreOptions, create: bool) -> Result<Arc<dyn Store>> {
    // what is no URL of ours may hold a password: it is not shown
    let failed = |shown: &str, why| Err(StoreError::new(ErrorKind::Other, "open", shown, "", why));
    if let Some(place) = url.strip_prefix("s3://") {
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        return open_s3(bucket, prefix, options);
    }
    match url.strip_prefix("file://") {
        Some(path) if path.starts_with('/') => open_directory(path, create),
        Some(_) => failed("the repository", BadUrl::RelativeFile),
        None if url.is_empty() => failed("the repository", BadUrl::Empty),
        None if has_scheme(url) => failed(&format!("{}:...", scheme(url)), BadUrl::Scheme),
        None => open_directory(url, create),
    }
}

fn scheme(url: &str) -> &str {
    url.split(':').next().unwrap_or_default()
}

/// `gs://x` and also `s3:x`; a path with a colon in it needs `./` before it.
fn has_scheme(url: &str) -> bool {
    let scheme = scheme(url);
    scheme.len() < url.len() && !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'+')
}

fn open_directory(path: &str, create: bool) -> Result<Arc<dyn Store>> {
    Ok(Arc::new(DirectoryStore::open(Path::new(path), create)?))
}

fn open_s3(bucket: &str, prefix: &str, options: &StoreOptions) -> Result<Arc<dyn Store>> {
    let options = options.clone();
    let (retry, stop) = (options.retry, options.stop);
    let store = S3Store::open(S3Options {
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
        endpoint: options.endpoint,
        region: options.region,
        path_style: options.path_style,
        key: options.key,
        key_secret: options.key_secret,
        ca_file: options.ca_file,
        attempt_timeout: options.attempt_timeout,
        connect_timeout: options.connect_timeout,
        retry,
        stop: stop.clone(),
    })?;
    Ok(Arc::new(Retry::new(store, retry).until(stop)))
}
