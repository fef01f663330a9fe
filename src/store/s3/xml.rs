//! Whether an XML answer is all there.
//!
//! The SDK reads an answer as far as it goes: a listing that a proxy cut between two objects is a shorter listing to it, and
//! a missing object is the end of WAL to PostgreSQL. So the answer's own bytes are looked at again.

use std::sync::Arc;

use aws_sdk_s3::config::interceptors::AfterDeserializationInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_smithy_runtime_api::client::interceptors::dyn_dispatch_hint;
use bytes::Bytes;
use parking_lot::Mutex;
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// Keeps the body of one request's answer.
#[derive(Clone, Debug, Default)]
pub(super) struct KeepBody(Arc<Mutex<Bytes>>);

impl KeepBody {
    /// The body; empty before there is one.
    pub(super) fn bytes(&self) -> Bytes {
        self.0.lock().clone()
    }
}

#[dyn_dispatch_hint]
impl Intercept for KeepBody {
    fn name(&self) -> &'static str {
        "KeepBody"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        if let Some(bytes) = context.response().body().bytes() {
            *self.0.lock() = Bytes::copy_from_slice(bytes);
        }
        Ok(())
    }
}

/// The names of the elements directly below the root of a document that is whole.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outline(Vec<String>);

impl Outline {
    /// Reads a document to the end of its root element `root`.
    ///
    /// # Errors
    /// When it is another document, or is not well-formed, or ends before its root does.
    pub(super) fn parse(document: &[u8], root: &str) -> Result<Self, String> {
        let mut reader = Reader::from_reader(document);
        reader.config_mut().expand_empty_elements = true;
        let mut outline = Self::default();
        let (mut depth, mut is_over) = (0_usize, false);
        loop {
            match reader.read_event().map_err(|error| format!("it is not well-formed XML: {error}"))? {
                Event::Start(element) => {
                    outline.open(&element, depth, is_over, root)?;
                    depth += 1;
                }
                // the reader matches end tags with their start tags
                Event::End(_) => {
                    depth = depth.saturating_sub(1);
                    is_over |= depth == 0;
                }
                Event::Text(text) if depth == 0 && !text.trim_ascii().is_empty() => {
                    return Err(format!("there is text outside of <{root}>"));
                }
                Event::Eof if is_over => return Ok(outline),
                Event::Eof => return Err(format!("it ends before </{root}>")),
                _ => {}
            }
        }
    }

    fn open(&mut self, element: &BytesStart, depth: usize, is_over: bool, root: &str) -> Result<(), String> {
        let name = element.local_name();
        let name = String::from_utf8_lossy(name.as_ref());
        match depth {
            0 if is_over || name != root => return Err(format!("<{name}> came instead of <{root}>")),
            1 => self.0.push(name.into_owned()),
            _ => {}
        }
        Ok(())
    }

    /// How many elements have this name.
    pub(super) fn count(&self, name: &str) -> usize {
        self.0.iter().filter(|known| *known == name).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = concat!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">",
        "<Name>bucket</Name><Delimiter/><KeyCount>2</KeyCount><IsTruncated>false</IsTruncated>",
        "<Contents><Key>a&amp;b</Key><Size>1</Size></Contents>\n<Contents><Key>c</Key><Size>2</Size></Contents>",
        "</ListBucketResult>\n"
    );

    fn parse(document: &str) -> Result<Outline, String> {
        Outline::parse(document.as_bytes(), "ListBucketResult")
    }

    #[test]
    fn a_whole_document_is_outlined() {
        let outline = parse(LISTING).unwrap();
        assert_eq!(outline.count("Contents"), 2);
        assert_eq!(outline.count("Key"), 0, "only what is directly below the root counts");
        assert_eq!(outline.count("Delimiter"), 1);
    }

    #[test]
    fn whatever_is_cut_off_is_missed() {
        let end = LISTING.trim_end().len();
        for len in 0..end {
            assert!(parse(&LISTING[..len]).is_err(), "{}", &LISTING[..len]);
        }
        assert!(parse(&LISTING[..end]).is_ok());
    }

    #[test]
    fn other_documents_are_refused() {
        let others = [
            "",
            "<html></html>",
            "<html>a captive portal",
            "<Error><Code>SlowDown</Code></Error>",
            "<ListBucketResult/><ListBucketResult/>",
            "<ListBucketResult></ListBucketResult>more",
            "<ListBucketResult><a></b></ListBucketResult>",
            "<ListBucketResult></ListBucketResult></a>",
        ];
        for other in others {
            assert!(parse(other).is_err(), "{other}");
        }
        assert!(parse("<ListBucketResult/>").is_ok());
    }
}
