//! Whether an answer is what was asked for.

use std::time::{Duration, Instant};

use aws_sdk_s3::operation::get_object::GetObjectOutput;
use aws_sdk_s3::primitives::ByteStream;
use bytes::{Bytes, BytesMut};

use super::bridge::moving;
use super::failure::{Failure, chain};
use crate::store::ErrorKind;

/// What is set aside on a server's word alone.
const RESERVE_MAX: u64 = 64 << 20;

/// Whether an answer about an object can be S3's: that always names the object's version. A proxy's page does not, and what
/// it says was written is nowhere.
pub(super) fn check_origin(e_tag: Option<&str>) -> Result<(), Failure> {
    match e_tag {
        Some(e_tag) if !e_tag.is_empty() => Ok(()),
        _ => Err(Failure::transient("the answer is not S3's: it names no version of the object (ETag)")),
    }
}

/// The whole body, which must have `len` bytes if that is known. It has `limit`, and what moving the bytes that came takes:
/// a link may be slow, but one that moves nothing gets no longer than the call.
pub(super) async fn whole(mut body: ByteStream, len: Option<u64>, limit: Duration) -> Result<Bytes, Failure> {
    let mut bytes = BytesMut::with_capacity(len.unwrap_or(0).min(RESERVE_MAX) as usize);
    let begun = Instant::now();
    loop {
        let left = (limit + moving(bytes.len() as u64)).saturating_sub(begun.elapsed());
        let part = tokio::time::timeout(left, body.next()).await;
        let Some(part) = part.map_err(|_| Failure::cut_off(bytes.len() as u64, len))? else { break };
        let part = part.map_err(|e| Failure::transient(format!("the answer was cut off: {}", chain(&e))))?;
        bytes.extend_from_slice(&part);
        if len.is_some_and(|len| bytes.len() as u64 > len) {
            break;
        }
    }
    match len {
        Some(len) if bytes.len() as u64 != len => {
            Err(Failure::transient(format!("{len} bytes were to come, but {} came", bytes.len())))
        }
        _ => Ok(bytes.freeze()),
    }
}

/// Whether the answer's head promises exactly the `len` bytes from `offset`. Servers answer a range past the end with
/// what is there, or with the whole object.
pub(super) fn check_range(answer: &GetObjectOutput, offset: u64, len: u64) -> Result<(), Failure> {
    let content_len = answer.content_length.and_then(|len| u64::try_from(len).ok());
    let Some(range) = answer.content_range.as_deref() else {
        return match content_len {
            Some(size) if offset == 0 && size == len => Ok(()),
            Some(size) if offset.saturating_add(len) > size => Err(truncated(offset, len, Some(size))),
            _ => Err(Failure::transient("the server ignores the range: it answered with the whole object")),
        };
    };
    let Some((first, last, size)) = parse_range(range) else {
        return Err(Failure::transient(format!("the server answered with the range {range:?}")));
    };
    if size.is_some_and(|size| offset.saturating_add(len) > size) || last < offset + (len - 1) {
        return Err(truncated(offset, len, size));
    }
    if first != offset || last != offset + (len - 1) || content_len.is_some_and(|content| content != len) {
        return Err(Failure::transient(format!("bytes {offset}+{len} asked for, but {range:?} came")));
    }
    Ok(())
}

fn truncated(offset: u64, len: u64, size: Option<u64>) -> Failure {
    let size = size.map_or("fewer".to_owned(), |size| size.to_string());
    Failure::of(ErrorKind::Truncated, format!("bytes {offset}+{len} asked for, but the object has {size} bytes"))
}

/// `bytes 0-99/1234`, or `*` for a length not known.
fn parse_range(range: &str) -> Option<(u64, u64, Option<u64>)> {
    let (span, size) = range.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = span.split_once('-')?;
    let size = if size == "*" { None } else { Some(size.parse().ok()?) };
    Some((first.parse().ok()?, last.parse().ok()?, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(range: Option<&str>, content_len: i64, offset: u64, len: u64) -> Option<ErrorKind> {
        let answer = GetObjectOutput::builder().content_length(content_len).set_content_range(range.map(str::to_owned));
        check_range(&answer.build(), offset, len).err().map(|failure| failure.kind)
    }

    #[test]
    fn ranges() {
        assert_eq!(kind(Some("bytes 10-19/100"), 10, 10, 10), None);
        assert_eq!(kind(Some("bytes 10-19/*"), 10, 10, 10), None);
        assert_eq!(kind(None, 10, 0, 10), None, "the whole object asked for as a range");
        assert_eq!(kind(Some("bytes 95-99/100"), 5, 95, 10), Some(ErrorKind::Truncated));
        assert_eq!(kind(Some("bytes 95-99/*"), 5, 95, 10), Some(ErrorKind::Truncated));
        assert_eq!(kind(None, 100, 100, 10), Some(ErrorKind::Truncated), "moto, past the end");
        assert_eq!(kind(None, 100, 10, 10), Some(ErrorKind::Transient));
        assert_eq!(kind(Some("bytes 0-9/100"), 10, 10, 10), Some(ErrorKind::Truncated));
        assert_eq!(kind(Some("bytes 9-19/100"), 11, 10, 10), Some(ErrorKind::Transient));
        assert_eq!(kind(Some("bytes 10-19/100"), 9, 10, 10), Some(ErrorKind::Transient));
        assert_eq!(kind(Some("nonsense"), 10, 10, 10), Some(ErrorKind::Transient));
    }
}
