//! One conformance suite over every store and decorator, and what is particular to some of them.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pgcairn_s3_server::S3Server;
use tempfile::TempDir;

use super::*;

mod conformance;
mod directory;
mod faults;
mod protocol;
mod s3;

/// A bucket of its own in an S3 server of its own.
pub(super) struct TestS3 {
    pub(super) server: S3Server,
    directory: TempDir,
}

impl TestS3 {
    pub(super) fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    pub(super) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = S3Server::start(directory.path(), Duration::ZERO).unwrap();
        server.make_bucket("bucket").unwrap();
        Self { server, directory }
    }

    pub(super) fn options(&self, prefix: &str) -> S3Options {
        S3Options {
            bucket: "bucket".into(),
            prefix: prefix.into(),
            endpoint: Some(self.server.endpoint.clone()),
            key: Some(self.server.access_key.into()),
            key_secret: Some(self.server.secret_key.into()),
            ..Default::default()
        }
    }

    pub(super) fn store(&self) -> S3Store {
        S3Store::open(self.options("")).unwrap()
    }
}

/// A retry policy that does not make tests wait.
pub(super) fn quick() -> RetryPolicy {
    RetryPolicy {
        delay_base: Duration::from_millis(1),
        delay_max: Duration::from_millis(5),
        deadline: Duration::from_secs(60),
    }
}

pub(super) fn put(store: &dyn Store, key: &str, bytes: impl Into<Bytes>) {
    store.put(key, Body::Bytes(bytes.into())).unwrap();
}

pub(super) fn kind<T: fmt::Debug>(outcome: Result<T>) -> ErrorKind {
    outcome.unwrap_err().kind
}

/// The error and its causes, as people see it.
pub(super) fn shown(error: &StoreError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[test]
fn memory() {
    conformance::run(&MemoryStore::new());
    a_directory_is_no_object(&MemoryStore::new());
}

/// S3 servers that keep objects as files fail here, so nothing above the stores may come to depend on it.
fn a_directory_is_no_object(store: &dyn Store) {
    put(store, "a/b/c", "x");
    for key in ["a", "a/b"] {
        assert_eq!(kind(store.get(key)), ErrorKind::NotFound, "{key}");
        assert_eq!(kind(store.get_range(key, 0, 1)), ErrorKind::NotFound, "{key}");
        assert_eq!(store.size(key).unwrap(), None, "{key}");
        store.delete(&[key.into()]).unwrap();
    }
    assert_eq!(store.get("a/b/c").unwrap(), "x");
}

#[test]
fn a_directory() {
    let directory = tempfile::tempdir().unwrap();
    let store = DirectoryStore::open(&directory.path().join("new/repository"), true).unwrap();
    conformance::run(&store);
    a_directory_is_no_object(&store);
}

#[test]
fn s3_server() {
    let s3 = TestS3::start();
    conformance::run(&s3.store());
}

#[test]
fn s3_server_below_a_prefix() {
    let s3 = TestS3::start();
    put(&s3.store(), "some/other", "not ours");
    put(&s3.store(), "some/prefix-not-ours", "not ours");
    conformance::run(&S3Store::open(s3.options("some/prefix/")).unwrap());
    assert_eq!(s3.store().names("some/").unwrap(), ["other", "prefix-not-ours"]);
}

#[test]
fn decorators() {
    conformance::run(&Retry::new(MemoryStore::new(), RetryPolicy::default()));
    conformance::run(&Record::new(MemoryStore::new()));
    conformance::run(&Fault::new(MemoryStore::new()));
    let shared: Arc<dyn Store> = Arc::new(MemoryStore::new());
    conformance::run(&shared);
    conformance::run(&Retry::new(Record::new(Fault::new(shared)), quick()));
}

/// Over any server named in the environment, with the credentials of the AWS variables, and with the certificates of
/// `PGCAIRN_TEST_S3_CA_FILE` if that is given.
#[test]
fn external_s3_server() {
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let (Some(endpoint), Some(bucket)) = (set("PGCAIRN_TEST_S3_ENDPOINT"), set("PGCAIRN_TEST_S3_BUCKET")) else {
        return;
    };
    let prefix = format!("conformance-{:016x}", getrandom::u64().unwrap());
    let ca_file = set("PGCAIRN_TEST_S3_CA_FILE").map(Into::into);
    let options = StoreOptions { endpoint: Some(endpoint), ca_file, ..Default::default() };
    let store = open(&format!("s3://{bucket}/{prefix}"), &options, false).unwrap();
    conformance::run(&store);
    let missing = open("s3://pgcairn-no-such-bucket", &options, false).unwrap();
    let error = shown(&missing.list("", None).unwrap_err());
    assert!(error.contains("there is no bucket"), "{error}");
    assert_eq!(kind(missing.size("a")), ErrorKind::Other);
    assert_eq!(kind(missing.get("a")), ErrorKind::Other);
}

#[test]
fn urls() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().canonicalize().unwrap().display().to_string();
    let options = StoreOptions { key: Some("id".into()), key_secret: Some("hush".into()), ..Default::default() };
    let url = |url: &str| open(url, &options, true).map(|store| store.url().to_owned());
    assert_eq!(url(&format!("file://{root}/a")).unwrap(), format!("{root}/a"));
    assert_eq!(url(&format!("{root}/b")).unwrap(), format!("{root}/b"));
    assert_eq!(url("s3://bucket").unwrap(), "s3://bucket");
    assert_eq!(url("s3://bucket/").unwrap(), "s3://bucket");
    assert_eq!(url("s3://bucket/a/b/").unwrap(), "s3://bucket/a/b");
    let bad = ["", "gs://bucket", "s3:bucket", "s3://", "s3://b", "s3://bucket/a//b", "s3://bucket/../a", "file://a"];
    for bad in bad.into_iter().chain(["s3://id:hush@bucket/a", "https://id:hush@host/a"]) {
        let error = url(bad).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Other, "{bad}");
        assert!(!shown(&error).contains("hush"), "{}", shown(&error));
    }
    assert!(!format!("{:?} {:?}", options, open("s3://bucket", &options, false)).contains("hush"));
    let missing = open(&format!("{root}/missing"), &options, false).unwrap_err();
    assert_eq!(missing.kind, ErrorKind::NotFound);
    assert_eq!(missing.to_string(), format!("cannot open {root}/missing"));
}
