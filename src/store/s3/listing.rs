//! Listing and deleting: what takes several requests or several keys.

use std::collections::BTreeSet;

use aws_sdk_s3::Client;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};

use super::bridge::Bridge;
use super::failure::Failure;
use crate::store::{ErrorKind, Listed, PAGE_OBJECTS_MAX, Page, key};

/// How many keys one request may delete.
pub(super) const DELETE_KEYS_MAX: usize = 1000;

type Outcome<T> = Result<T, Failure>;

/// One request's page; the token of the one before, else everything after a key.
async fn request(
    client: &Client,
    bucket: &str,
    prefix: &str,
    delimiter: Option<&str>,
    after: Option<String>,
    token: Option<String>,
) -> Outcome<ListObjectsV2Output> {
    let request = client
        .list_objects_v2()
        .bucket(bucket)
        .prefix(prefix)
        .max_keys(PAGE_OBJECTS_MAX as i32)
        .set_delimiter(delimiter.map(str::to_owned))
        .set_start_after(after)
        .set_continuation_token(token);
    match request.send().await.map_err(Failure::from) {
        // whatever a listing does not find, it is not an object
        Err(failure) if failure.kind == ErrorKind::NotFound => Err(Failure::no_bucket(bucket)),
        answer => answer,
    }
}

/// The token to go on with. A server that says there is more but gives no new token would be asked forever.
fn next_token(answer: &ListObjectsV2Output, token: &Option<String>) -> Outcome<Option<String>> {
    if answer.is_truncated != Some(true) {
        return Ok(None);
    }
    match &answer.next_continuation_token {
        Some(next) if token.as_ref() != Some(next) => Ok(Some(next.clone())),
        _ => Err(Failure::other("the server's listing has more pages but no token for them")),
    }
}

/// The first objects that start with `prefix` and come after `after`, both below `root`.
pub(super) fn page(bridge: &Bridge, bucket: &str, root: &str, prefix: &str, after: Option<&str>) -> Outcome<Page> {
    let mut token = None;
    loop {
        let answer = bridge.run(0, async |client| {
            // with a token, too: some servers start again from the beginning without it
            let start = after.map(|after| format!("{root}{after}"));
            request(client, bucket, &format!("{root}{prefix}"), None, start, token.clone()).await
        })?;
        let mut objects = listed(&answer, root)?;
        // a server may know nothing of start-after
        objects.retain(|object| after.is_none_or(|after| object.key.as_str() > after));
        objects.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        let more = next_token(&answer, &token)?;
        if !objects.is_empty() || more.is_none() {
            let next = more.and(objects.last()).map(|last| last.key.clone());
            return Ok(Page { objects, next });
        }
        token = more;
    }
}

fn listed(answer: &ListObjectsV2Output, root: &str) -> Outcome<Vec<Listed>> {
    let mut objects = Vec::with_capacity(answer.contents().len());
    for object in answer.contents() {
        // what is no key of ours was put there by someone else
        let Some(key) = object.key().and_then(|key| key.strip_prefix(root)) else { continue };
        if key::check(key).is_err() {
            continue;
        }
        let (Some(Ok(size)), Some(modified)) = (object.size().map(u64::try_from), object.last_modified()) else {
            return Err(Failure::other(format!("the listing has no size or time for {key:?}")));
        };
        objects.push(Listed { key: key.to_owned(), size, modified: modified.secs() });
    }
    Ok(objects)
}

/// The names directly below the whole prefix `directory`.
pub(super) fn names(bridge: &Bridge, bucket: &str, directory: &str) -> Outcome<Vec<String>> {
    let mut names = BTreeSet::new();
    let mut token = None;
    loop {
        let answer =
            bridge.run(0, async |client| request(client, bucket, directory, Some("/"), None, token.clone()).await)?;
        let below = answer.common_prefixes().iter().filter_map(|prefix| prefix.prefix());
        let objects = answer.contents().iter().filter_map(|object| object.key());
        for path in below.chain(objects) {
            let name = path.strip_prefix(directory).map(|name| name.trim_end_matches('/'));
            names.extend(name.filter(|name| key::check(name).is_ok()).map(str::to_owned));
        }
        token = next_token(&answer, &token)?;
        if token.is_none() {
            return Ok(names.into_iter().collect());
        }
    }
}

/// Deletes up to [`DELETE_KEYS_MAX`] keys below `root` with one request, or one by one where the server cannot.
pub(super) fn delete(bridge: &Bridge, bucket: &str, root: &str, keys: &[String]) -> Outcome<()> {
    if let [key] = keys {
        return bridge.run(0, async |client| delete_one(client, bucket, &format!("{root}{key}")).await);
    }
    match bridge.run(0, async |client| delete_batch(client, bucket, root, keys).await) {
        Err(failure) if batches_unknown(&failure) => keys.iter().try_for_each(|key| {
            bridge.run(0, async |client| delete_one(client, bucket, &format!("{root}{key}")).await)
        }),
        outcome => outcome,
    }
}

/// Google's S3 knows no batches; some servers demand an MD5 that the SDK no longer sends.
fn batches_unknown(failure: &Failure) -> bool {
    matches!(
        failure.code.as_deref(),
        Some("NotImplemented" | "MissingContentMD5" | "InvalidArgument" | "InvalidRequest" | "MethodNotAllowed")
    )
}

async fn delete_batch(client: &Client, bucket: &str, root: &str, keys: &[String]) -> Outcome<()> {
    let identifiers: Result<Vec<_>, _> =
        keys.iter().map(|key| ObjectIdentifier::builder().key(format!("{root}{key}")).build()).collect();
    let batch = identifiers
        .and_then(|identifiers| Delete::builder().set_objects(Some(identifiers)).quiet(true).build())
        .map_err(|e| Failure::other(e.to_string()))?;
    let answer = client.delete_objects().bucket(bucket).delete(batch).send().await?;
    let errors: Vec<_> = answer.errors().iter().filter(|error| error.code() != Some("NoSuchKey")).collect();
    let Some(first) = errors.first() else { return Ok(()) };
    let message = format!(
        "{} of {} objects were not deleted, the first is {}: {}",
        errors.len(),
        keys.len(),
        first.key().unwrap_or("unknown"),
        first.message().unwrap_or("no reason given"),
    );
    Err(Failure::of_code(None, first.code(), Some(&message)))
}

async fn delete_one(client: &Client, bucket: &str, key: &str) -> Outcome<()> {
    match client.delete_object().bucket(bucket).key(key).send().await.map_err(Failure::from) {
        Err(failure) if failure.kind == ErrorKind::NotFound => Ok(()),
        outcome => outcome.map(drop),
    }
}
