//! Listing and deleting: what takes several requests or several keys.

use std::collections::BTreeSet;

use aws_sdk_s3::Client;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};

use super::bridge::Bridge;
use super::failure::Failure;
use super::xml::{KeepBody, Outline};
use crate::store::{ErrorKind, Listed, PAGE_OBJECTS_MAX, Page, object_key};

/// How many keys one request may delete.
pub(super) const DELETE_KEYS_MAX: usize = 1000;

type Outcome<T> = Result<T, Failure>;

/// One request's page; the token of the one before, else everything after a key. It is whole, or an error.
async fn request(
    client: &Client,
    bucket: &str,
    prefix: &str,
    delimiter: Option<&str>,
    after: Option<String>,
    token: Option<String>,
) -> Outcome<ListObjectsV2Output> {
    let body = KeepBody::default();
    let request = client
        .list_objects_v2()
        .bucket(bucket)
        .prefix(prefix)
        .max_keys(PAGE_OBJECTS_MAX as i32)
        .set_delimiter(delimiter.map(str::to_owned))
        .set_start_after(after)
        .set_continuation_token(token.clone());
    match request.customize().interceptor(body.clone()).send().await.map_err(Failure::from) {
        // whatever a listing does not find, it is not an object
        Err(failure) if failure.kind == ErrorKind::NotFound => Err(Failure::no_bucket(bucket)),
        Err(failure) => Err(failure),
        Ok(answer) => match incomplete(&answer, &body.bytes(), prefix, &token) {
            None => Ok(answer),
            Some(why) => Err(Failure::transient(format!("the server's listing is not complete: {why}"))),
        },
    }
}

/// What a listing lacks, or has too much, to be the answer to the question. An object that a listing does not show is taken
/// for one that does not exist: a listing that may have been cut is none.
fn incomplete(answer: &ListObjectsV2Output, body: &[u8], prefix: &str, token: &Option<String>) -> Option<String> {
    let outline = match Outline::parse(body, "ListBucketResult") {
        Ok(outline) => outline,
        Err(why) => return Some(why),
    };
    let (objects, directories) = (answer.contents(), answer.common_prefixes());
    let (count, elements) =
        (objects.len() + directories.len(), outline.count("Contents") + outline.count("CommonPrefixes"));
    if count != elements {
        return Some(format!("it has {elements} entries, of which {count} are understood"));
    }
    // some servers count objects alone
    if let Some(said) = answer.key_count().and_then(|said| usize::try_from(said).ok())
        && said > count
    {
        return Some(format!("its KeyCount is {said}, but it has {count} entries"));
    }
    match (answer.is_truncated, &answer.next_continuation_token) {
        (None, _) => return Some("it does not say whether it is truncated".into()),
        // a server that says there is more but gives no new token would be asked forever
        (Some(true), next) if next.is_none() || next == token => {
            return Some("it has more pages, but no token for them".into());
        }
        _ => {}
    }
    let keys = objects.iter().map(|object| object.key()).chain(directories.iter().map(|below| below.prefix()));
    for key in keys {
        match key {
            Some(key) if key.starts_with(prefix) => {}
            Some(key) => return Some(format!("{prefix:?} was asked for, but {key:?} came")),
            None => return Some("an entry has no key".into()),
        }
    }
    None
}

/// The token to go on with.
fn next_token(answer: ListObjectsV2Output) -> Option<String> {
    answer.next_continuation_token.filter(|_| answer.is_truncated == Some(true))
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
        let more = next_token(answer);
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
        if object_key::check(key).is_err() {
            continue;
        }
        let (Some(Ok(size)), Some(modified)) = (object.size().map(u64::try_from), object.last_modified()) else {
            return Err(Failure::transient(format!("the listing has no size or time for {key:?}")));
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
            names.extend(name.filter(|name| object_key::check(name).is_ok()).map(str::to_owned));
        }
        token = next_token(answer);
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
    let body = KeepBody::default();
    let request = client.delete_objects().bucket(bucket).delete(batch).customize().interceptor(body.clone());
    let answer = request.send().await?;
    Outline::parse(&body.bytes(), "DeleteResult")
        .map_err(|why| Failure::transient(format!("the server's answer to a deletion is not complete: {why}")))?;
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
