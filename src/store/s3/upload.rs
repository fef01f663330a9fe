//! Writing files: streamed in one request when small, in parallel parts when large.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::{ByteStream, Length};
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use tokio::task::JoinSet;

use super::answer;
use super::bridge::{Bridge, bounded, moving};
use super::failure::{Failure, chain};
use crate::store::{ErrorKind, RetryPolicy};

/// A file up to this long is written with one request.
const SINGLE_LEN_MAX: u64 = 64 << 20;
/// Bytes of a part; more where S3's limit on the number of parts demands it.
const PART_LEN: u64 = 16 << 20;
const PARTS_MAX: u64 = 10_000;
/// Parts in flight, and in memory, at a time.
const PARALLEL: usize = 4;
const READ_BUFFER_LEN: usize = 1 << 20;

type Outcome<T> = Result<T, Failure>;

/// Writes the file `path` as the object `key`.
pub(super) fn file(bridge: &Bridge, bucket: &str, key: &str, path: &Path) -> Outcome<()> {
    let source = File::open(path).map_err(|e| unreadable(path, &e))?;
    let len = source.metadata().map_err(|e| unreadable(path, &e))?.len();
    if len > SINGLE_LEN_MAX {
        match parts(bridge, bucket, key, Arc::new(source), len) {
            Err(failure) if parts_unknown(&failure) && len <= super::PUT_LEN_MAX => {
                tracing::debug!(key, %failure, "written with one request instead of in parts");
            }
            outcome => return outcome,
        }
    }
    single(bridge, bucket, key, path, len)
}

/// The server has no multipart uploads, or speaks of them in words of its own: rclone 1.75 names the answer's XML root
/// otherwise than S3, and the SDK takes that for an error.
fn parts_unknown(failure: &Failure) -> bool {
    failure.code.as_deref() == Some("NotImplemented") || failure.code.is_none() && failure.status == Some(200)
}

fn single(bridge: &Bridge, bucket: &str, key: &str, path: &Path, len: u64) -> Outcome<()> {
    bridge.run(len, async |client| {
        let body = match len {
            0 => ByteStream::from_static(b""),
            _ => ByteStream::read_from()
                .path(path)
                .length(Length::Exact(len))
                .buffer_size(READ_BUFFER_LEN)
                .build()
                .await
                .map_err(|e| Failure::other(format!("cannot read {}: {}", path.display(), chain(&e))))?,
        };
        let put = client.put_object().bucket(bucket).key(key).content_length(len as i64).body(body).send().await?;
        answer::check_origin(put.e_tag.as_deref())
    })
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    Failure::other(format!("cannot read {}: {error}", path.display()))
}

/// One multipart upload: where it goes and how long its requests may take.
#[derive(Clone)]
struct Upload {
    client: Client,
    bucket: String,
    key: String,
    id: String,
    limit: Duration,
    part_len: u64,
    retry: RetryPolicy,
}

fn parts(bridge: &Bridge, bucket: &str, key: &str, source: Arc<File>, len: u64) -> Outcome<()> {
    let part_len = PART_LEN.max(len.div_ceil(PARTS_MAX).next_multiple_of(1 << 20));
    bridge.drive(async |client| {
        let create = async { Ok(client.create_multipart_upload().bucket(bucket).key(key).send().await?) };
        let created = bounded(bridge.limit(0), create).await?;
        let id = created.upload_id.ok_or_else(|| Failure::other("the server gave no upload id"))?;
        let upload = Upload {
            client: client.clone(),
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            id,
            limit: bridge.limit(part_len),
            part_len,
            retry: bridge.retry(),
        };
        let outcome = match upload.parts(source, len, part_len).await {
            Ok(parts) => upload.complete(parts).await,
            Err(failure) => Err(failure),
        };
        if outcome.is_err() {
            upload.abort().await;
        }
        outcome
    })
}

impl Upload {
    async fn parts(&self, source: Arc<File>, len: u64, part_len: u64) -> Outcome<Vec<CompletedPart>> {
        let mut waiting = (0..len.div_ceil(part_len)).map(|index| (index as i32 + 1, index * part_len));
        let mut running = JoinSet::new();
        let mut done = Vec::new();
        let mut failed = None;
        loop {
            while failed.is_none()
                && running.len() < PARALLEL
                && let Some((number, offset)) = waiting.next()
            {
                let (upload, source) = (self.clone(), Arc::clone(&source));
                let part_len = part_len.min(len - offset);
                running.spawn(async move { upload.part(source, number, offset, part_len).await });
            }
            // after a failure, too: a part that arrives when the upload was aborted stays behind
            match running.join_next().await {
                None => break,
                Some(Ok(Ok(part))) => done.push(part),
                Some(Ok(Err(failure))) => failed = failed.or(Some(failure)),
                Some(Err(panic)) => {
                    failed = failed.or(Some(Failure::other(format!("a part was not written: {panic}"))))
                }
            }
        }
        if let Some(failure) = failed {
            return Err(failure);
        }
        done.sort_unstable_by_key(|part: &CompletedPart| part.part_number);
        Ok(done)
    }

    async fn part(&self, source: Arc<File>, number: i32, offset: u64, len: u64) -> Outcome<CompletedPart> {
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; len as usize];
            source.read_exact_at(&mut bytes, offset).map(|()| Bytes::from(bytes))
        });
        let bytes = match read.await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(e)) => return Err(Failure::other(format!("cannot read the file at byte {offset}: {e}"))),
            Err(panic) => return Err(Failure::other(panic.to_string())),
        };
        let e_tag = self
            .retried(|| {
                let part = self.client.upload_part().bucket(&self.bucket).key(&self.key).upload_id(&self.id);
                let part = part.part_number(number).content_length(len as i64);
                let part = part.body(ByteStream::from(bytes.clone()));
                async move {
                    let e_tag = part.send().await?.e_tag;
                    answer::check_origin(e_tag.as_deref())?;
                    Ok(e_tag)
                }
            })
            .await?;
        Ok(CompletedPart::builder().part_number(number).set_e_tag(e_tag).build())
    }

    async fn complete(&self, parts: Vec<CompletedPart>) -> Outcome<()> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let completed = self
            .retried(|| {
                let complete = self.client.complete_multipart_upload().bucket(&self.bucket).key(&self.key);
                let complete = complete.upload_id(&self.id).multipart_upload(parts.clone());
                async move { answer::check_origin(complete.send().await?.e_tag.as_deref()) }
            })
            .await;
        match completed {
            // an earlier try may have completed it and its answer been lost: only a new upload can tell
            Err(failure) if failure.code.as_deref() == Some("NoSuchUpload") => {
                Err(Failure::transient("the upload is no longer known to the server"))
            }
            completed => completed,
        }
    }

    /// Parts that stay behind cost money; a failure to remove them must not hide the first one.
    async fn abort(&self) {
        let abort = self.client.abort_multipart_upload().bucket(&self.bucket).key(&self.key).upload_id(&self.id);
        let aborted = bounded(self.limit, async { Ok(abort.send().await?) }).await;
        if let Err(failure) = aborted {
            tracing::warn!(key = self.key, %failure, "the parts of a failed upload stay behind");
        }
    }

    /// A part fails alone and is repeated alone, as long as any call would be. The whole upload is repeated, if need be, by
    /// whoever repeats `put`.
    async fn retried<T, F>(&self, call: impl Fn() -> F) -> Outcome<T>
    where
        F: Future<Output = Outcome<T>>,
    {
        let start = Instant::now();
        let mut tries = 1;
        loop {
            let left = self.retry.deadline.saturating_sub(start.elapsed());
            let failure = match bounded(self.limit.min(left + moving(self.part_len)), call()).await {
                Err(failure) if failure.kind == ErrorKind::Transient => failure,
                outcome => return outcome,
            };
            let left = self.retry.deadline.saturating_sub(start.elapsed());
            let Some(delay) = self.retry.next_delay(tries, left) else { return Err(failure) };
            tracing::debug!(key = self.key, tries, %failure, "try again");
            tokio::time::sleep(delay).await;
            tries += 1;
        }
    }
}
