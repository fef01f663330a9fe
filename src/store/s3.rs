//! Objects on S3, through the AWS SDK, with any server that speaks its protocol.
//!
//! What the servers differ in must not hurt: no request needs more than signatures, ranges and listings; checksums of
//! the protocol are neither sent nor expected (one server answers a range with the checksum of the whole object), since
//! every reader checks contents itself; and every answer to a range is compared with what was asked for.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;

use super::{Body, ErrorKind, Page, Result, RetryPolicy, Stop, Store, StoreError};
use crate::store::object_key;

mod answer;
mod bridge;
mod connect;
mod endpoint;
mod failure;
mod listing;
mod upload;
mod xml;

use bridge::Bridge;
use failure::Failure;

/// Where the objects are and how to reach them.
#[derive(Clone, Default)]
pub struct S3Options {
    /// the bucket's name; it must exist
    pub bucket: String,
    /// what all keys begin with, without slashes around it; may be empty
    pub prefix: String,
    /// the server's URL; AWS's own (or `AWS_ENDPOINT_URL`) when absent
    pub endpoint: Option<String>,
    /// the region; of the AWS environment when absent, `us-east-1` when there is none but an endpoint is given
    pub region: Option<String>,
    /// bucket in the path instead of the host name; by default when an endpoint is given
    pub path_style: Option<bool>,
    /// the access key; of the AWS chain (environment, profile, web identity, container, instance) when absent
    pub key: Option<String>,
    /// the secret key that belongs to `key`
    pub key_secret: Option<String>,
    /// a PEM file with certificates to trust in addition to the system's
    pub ca_file: Option<PathBuf>,
    /// how long one try may take, 60 s by default; grows with the bytes to be moved
    pub attempt_timeout: Option<Duration>,
    /// how long connecting may take, 5 s by default
    pub connect_timeout: Option<Duration>,
    /// how the parts of one upload are tried again
    pub retry: RetryPolicy,
    /// ends all calls when it is set
    pub stop: Stop,
}

impl std::fmt::Debug for S3Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("S3Options")
            .field("bucket", &self.bucket)
            .field("prefix", &self.prefix)
            .field("endpoint", &self.endpoint)
            .field("region", &self.region)
            .field("path_style", &self.path_style)
            .finish_non_exhaustive()
    }
}

/// The bytes a single PUT may carry.
const PUT_LEN_MAX: u64 = 5 << 30;

/// A store in a bucket, below a prefix.
#[derive(Debug)]
pub struct S3Store {
    bridge: Bridge,
    bucket: String,
    /// empty, or ends in a slash
    prefix: String,
    url: String,
    /// a call succeeded that would not have without the bucket
    bucket_seen: AtomicBool,
}

impl S3Store {
    /// Checks the options. Nothing is sent yet and no thread started: a program may still fork.
    pub fn open(options: S3Options) -> Result<Self> {
        let prefix = options.prefix.trim_matches('/').to_owned();
        let url = format!("s3://{}{}{prefix}", options.bucket, if prefix.is_empty() { "" } else { "/" });
        let failed = |why: String| StoreError::new(ErrorKind::Other, "open", &url, "", why);
        // a bad name is not shown: it may be a password put before the bucket
        connect::check_bucket(&options.bucket)
            .map_err(|why| StoreError::new(ErrorKind::Other, "open", "s3://...", "", why))?;
        connect::check(&options).map_err(failed)?;
        if !prefix.is_empty() {
            object_key::check(&prefix).map_err(|e| failed(e.to_string()))?;
        }
        let bucket = options.bucket.clone();
        let prefix = if prefix.is_empty() { prefix } else { prefix + "/" };
        let bridge = Bridge::new(options);
        Ok(Self { bridge, bucket, prefix, url, bucket_seen: AtomicBool::new(false) })
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn done<T>(&self, operation: &'static str, key: &str, outcome: std::result::Result<T, Failure>) -> Result<T> {
        match outcome {
            Ok(value) => {
                self.bucket_seen.store(true, Ordering::Relaxed);
                Ok(value)
            }
            Err(failure) => {
                let no_bucket = failure.code.as_deref() == Some("NoSuchBucket");
                let failure = match failure.code.as_deref() {
                    _ if no_bucket => Failure::no_bucket(&self.bucket),
                    // the SDK's word for a 404 without any
                    Some("NotFound") if failure.kind == ErrorKind::NotFound => Failure::bare_404(),
                    _ => failure,
                };
                let (kind, hint) = (failure.kind, failure.hint());
                Err(StoreError { hint, ..StoreError::new(kind, operation, &self.url, key, failure) })
            }
        }
    }

    /// A missing bucket must not look like a missing object, nor must whatever answers 404 in the server's place.
    fn found<T>(&self, outcome: std::result::Result<T, Failure>) -> std::result::Result<T, Failure> {
        match outcome {
            Err(failure) if failure.kind == ErrorKind::NotFound => {
                let proved = failure.code.as_deref() == Some("NoSuchKey");
                self.check_bucket().and(Err(if proved { failure } else { Failure::bare_404() }))
            }
            outcome => outcome,
        }
    }

    /// The answer to a HEAD request does not say whether the object or the bucket is missing, and some servers say of
    /// every object in a missing bucket that it is missing. So the first time, the bucket is looked for.
    fn check_bucket(&self) -> std::result::Result<(), Failure> {
        if self.bucket_seen.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.bridge.run(0, async |client| {
            match client.head_bucket().bucket(&self.bucket).send().await.map_err(Failure::from) {
                Err(failure) if failure.kind == ErrorKind::NotFound => Err(Failure::no_bucket(&self.bucket)),
                Err(failure) if failure.kind == ErrorKind::Transient => Err(failure),
                // not allowed to ask is no proof against the bucket
                _ => {
                    self.bucket_seen.store(true, Ordering::Relaxed);
                    Ok(())
                }
            }
        })
    }

    /// The object's length. Refusals of a HEAD request come without a word: what they mean is asked with a GET of the first
    /// byte, whose answer names the reason, and only `NoSuchKey` proves that there is no object.
    async fn head(&self, client: &aws_sdk_s3::Client, key: &str) -> std::result::Result<Option<u64>, Failure> {
        let head = client.head_object().bucket(&self.bucket).key(self.key(key)).send().await;
        let failure = match head.map_err(Failure::from) {
            Ok(head) => {
                answer::check_origin(head.e_tag.as_deref())?;
                return match head.content_length.map(u64::try_from) {
                    Some(Ok(len)) => Ok(Some(len)),
                    _ => Err(Failure::transient("the server did not say the object's length")),
                };
            }
            Err(failure) if failure.kind == ErrorKind::Transient => return Err(failure),
            Err(failure) => failure,
        };
        let first = client.get_object().bucket(&self.bucket).key(self.key(key)).range("bytes=0-0").send().await;
        match first.map_err(Failure::from) {
            Err(asked) if asked.code.as_deref() == Some("NoSuchKey") => Ok(None),
            Err(asked) if asked.kind == ErrorKind::NotFound && asked.code.as_deref() == Some("NotFound") => {
                Err(Failure::bare_404())
            }
            Err(asked) => Err(asked),
            Ok(_) => Err(Failure::transient(format!("a HEAD request says {failure}, but a GET request finds it"))),
        }
    }

    /// A range of no bytes cannot be asked for over HTTP.
    fn empty_range(&self, key: &str, offset: u64) -> Result<Bytes> {
        match self.size(key)? {
            None => Err(StoreError::new(ErrorKind::NotFound, "read", &self.url, key, "no such object")),
            Some(size) if offset > size => Err(StoreError::truncated(&self.url, key, offset, 0, Some(size))),
            Some(_) => Ok(Bytes::new()),
        }
    }
}

impl Store for S3Store {
    fn get(&self, key: &str) -> Result<Bytes> {
        object_key::require("read", &self.url, key)?;
        let outcome = self.bridge.run_read(async |client| {
            let answer = client.get_object().bucket(&self.bucket).key(self.key(key)).send().await?;
            answer::check_origin(answer.e_tag.as_deref())?;
            let len = answer.content_length.and_then(|len| u64::try_from(len).ok());
            let limit = self.bridge.limit(0);
            Ok((len.unwrap_or(0), async move { answer::whole(answer.body, len, limit).await }))
        });
        self.done("read", key, self.found(outcome))
    }

    fn get_range(&self, key: &str, offset: u64, len: u64) -> Result<Bytes> {
        object_key::require("read", &self.url, key)?;
        if len == 0 {
            return self.empty_range(key, offset);
        }
        let Some(end) = offset.checked_add(len) else {
            return Err(StoreError::truncated(&self.url, key, offset, len, None));
        };
        let outcome = self.bridge.run_read(async |client| {
            let range = format!("bytes={offset}-{}", end - 1);
            let answer = client.get_object().bucket(&self.bucket).key(self.key(key)).range(range).send().await?;
            answer::check_origin(answer.e_tag.as_deref())?;
            answer::check_range(&answer, offset, len)?;
            let limit = self.bridge.limit(0);
            Ok((len, async move { answer::whole(answer.body, Some(len), limit).await }))
        });
        self.done("read", key, self.found(outcome))
    }

    fn put(&self, key: &str, body: Body) -> Result<()> {
        object_key::require("write", &self.url, key)?;
        let outcome = match body {
            Body::Bytes(bytes) if bytes.len() as u64 > PUT_LEN_MAX => {
                Err(Failure::other("more than 5 GiB can only be written from a file"))
            }
            Body::Bytes(bytes) => self.bridge.run(bytes.len() as u64, async |client| {
                let put = client.put_object().bucket(&self.bucket).key(self.key(key));
                let answer =
                    put.content_length(bytes.len() as i64).body(ByteStream::from(bytes.clone())).send().await?;
                answer::check_origin(answer.e_tag.as_deref())
            }),
            Body::File(path) => upload::file(&self.bridge, &self.bucket, &self.key(key), &path),
        };
        self.done("write", key, outcome)
    }

    fn size(&self, key: &str) -> Result<Option<u64>> {
        object_key::require("read", &self.url, key)?;
        let outcome = self.bridge.run(0, async |client| self.head(client, key).await);
        let outcome = match outcome {
            Ok(None) => self.check_bucket().map(|()| None),
            outcome => outcome,
        };
        self.done("read", key, outcome)
    }

    fn list(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        object_key::require_prefix(&self.url, prefix)?;
        let outcome = listing::page(&self.bridge, &self.bucket, &self.prefix, prefix, after);
        self.done("list", prefix, outcome)
    }

    fn names(&self, prefix: &str) -> Result<Vec<String>> {
        object_key::require_directory(&self.url, prefix)?;
        let outcome = listing::names(&self.bridge, &self.bucket, &self.key(prefix));
        self.done("list", prefix, outcome)
    }

    fn delete(&self, keys: &[String]) -> Result<()> {
        keys.iter().try_for_each(|key| object_key::require("delete", &self.url, key))?;
        for batch in keys.chunks(listing::DELETE_KEYS_MAX) {
            let outcome = listing::delete(&self.bridge, &self.bucket, &self.prefix, batch);
            self.done("delete", &batch[0], outcome)?;
        }
        Ok(())
    }

    fn url(&self) -> &str {
        &self.url
    }
}
