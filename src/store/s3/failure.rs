//! What a failed request means.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::store::ErrorKind;

/// A failed request: its kind, and a line that a person can act on.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) kind: ErrorKind,
    /// S3's name for it, where the server gave one
    pub(super) code: Option<String>,
    /// the HTTP status, where there was an answer
    pub(super) status: Option<u16>,
    /// nothing came, or nothing that is an answer of HTTP
    pub(super) is_unanswered: bool,
    message: String,
    hint: Option<&'static str>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {}

impl Failure {
    pub(super) fn of(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, code: None, status: None, is_unanswered: false, message: message.into(), hint: None }
    }

    pub(super) fn other(message: impl Into<String>) -> Self {
        Self::of(ErrorKind::Other, message)
    }

    pub(super) fn transient(message: impl Into<String>) -> Self {
        Self::of(ErrorKind::Transient, message)
    }

    pub(super) fn timeout(limit: Duration) -> Self {
        Self::unanswered(match limit.as_secs_f64() {
            seconds if seconds < 0.1 => "no answer in time".to_owned(),
            seconds if seconds < 10.0 => format!("no answer within {seconds:.1} s"),
            seconds => format!("no answer within {seconds:.0} s"),
        })
    }

    /// Nothing more came of an answer.
    pub(super) fn cut_off(came: u64, of: Option<u64>) -> Self {
        let of = of.map_or_else(String::new, |len| format!(" of {len}"));
        Self::transient(format!("the answer did not come in time: {came}{of} bytes of it did"))
    }

    /// Worth another try, unless the server is of another kind.
    fn unanswered(message: impl Into<String>) -> Self {
        Self { is_unanswered: true, ..Self::transient(message) }
    }

    pub(super) fn not_tls() -> Self {
        Self::other("the server does not speak TLS")
            .hinted("give --repo-s3-endpoint with http:// instead of https://, or another port")
    }

    pub(super) fn tls() -> Self {
        Self::other("the server speaks TLS, and was asked without").hinted(TLS)
    }

    /// With what helps against it.
    #[must_use]
    pub(super) fn hinted(self, hint: &'static str) -> Self {
        Self { hint: Some(hint), ..self }
    }

    /// What helps against it, if that is more than its kind says.
    pub(super) fn hint(&self) -> Option<&'static str> {
        self.hint
    }

    /// A failure after which a new try may succeed, for a reason.
    pub(super) fn again(self, why: &str) -> Self {
        Self { kind: ErrorKind::Transient, message: format!("{}; {why}", self.message), ..self }
    }

    pub(super) fn stopped() -> Self {
        Self::other("the program is ending")
    }

    /// 404 from whoever it was: S3's own says `NoSuchKey`.
    pub(super) fn bare_404() -> Self {
        Self::transient("404 without S3's NoSuchKey: the answer may be a proxy's")
    }

    pub(super) fn no_bucket(bucket: &str) -> Self {
        Self::other(format!("there is no bucket {bucket:?}"))
            .hinted("create the bucket, or check --repo and --repo-s3-endpoint")
    }

    /// An answer's S3 code, or one key's in the answer to a batch.
    pub(super) fn of_code(status: Option<u16>, code: Option<&str>, message: Option<&str>) -> Self {
        let kind = kind_of(status.unwrap_or(0), code.unwrap_or(""));
        let number = status.map(|status| status.to_string());
        let words: Vec<&str> = [number.as_deref(), code].into_iter().flatten().collect();
        let head = if words.is_empty() { "the server refused".to_owned() } else { words.join(" ") };
        let message = match message {
            Some(message) if !message.is_empty() => format!("{head}: {message}"),
            _ => head,
        };
        Self { status, code: code.map(str::to_owned), hint: code.and_then(hint_of), ..Self::of(kind, message) }
    }
}

impl Failure {
    /// An answer without S3's words: it may be a proxy's page. Its own words say the most.
    fn of_page(raw: &HttpResponse, error: &str) -> Self {
        let status = raw.status().as_u16();
        let kind = match kind_of(status, "") {
            // not by S3: it names what it does not find
            ErrorKind::NotFound => ErrorKind::Transient,
            _ if status < 300 => ErrorKind::Transient,
            kind => kind,
        };
        let text = raw.body().bytes().map(page_text);
        let hint = text.as_deref().filter(|text| status == 400 && names_tls(text)).map(|_| TLS);
        let shown = match text {
            Some(text) if !text.is_empty() => format!("an answer that is not S3's: {text:?}"),
            // of a HEAD request, or of nobody
            Some(_) if !(200..300).contains(&status) => "no explanation".to_owned(),
            _ => format!("an answer that is not understood: {error}"),
        };
        let failure = Self::of(kind, format!("{status} and {shown}"));
        Self { status: Some(status), hint, ..failure }.region(raw)
    }

    /// Names the region in which the bucket is, where the server does.
    fn region(mut self, raw: &HttpResponse) -> Self {
        if raw.status().as_u16() >= 300
            && let Some(region) = raw.headers().get("x-amz-bucket-region")
        {
            self.message = format!("{}; the bucket is in region {region}", self.message);
            self.hint = Some(REGION);
        }
        self
    }

    /// Names both clocks, where their difference is the reason.
    fn clocks(mut self, raw: &HttpResponse) -> Self {
        if self.code.as_deref() == Some("RequestTimeTooSkewed") {
            let body = raw.body().bytes().map(String::from_utf8_lossy).unwrap_or_default();
            let (_, rest) = body.split_once("<ServerTime>").unwrap_or_default();
            let server = rest.split('<').next().filter(|time| !time.is_empty()).or(raw.headers().get("date"));
            let server = server.unwrap_or("unknown");
            let ours = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
            self.message = format!("{}; the server's clock says {server}, this machine's {ours}", self.message);
        }
        self
    }
}

const TLS: &str = "give --repo-s3-endpoint with https:// instead of http://, or another port";
const REGION: &str = "give the bucket's region with --repo-s3-region";

/// What helps against an answer with this code.
fn hint_of(code: &str) -> Option<&'static str> {
    Some(match code {
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" => {
            "check the access key and its secret: --repo-s3-key and PGCAIRN_REPO_S3_KEY_SECRET, or AWS's variables or profile"
        }
        "ExpiredToken" | "InvalidToken" => "the credentials have expired: renew them where they come from",
        "AccessDenied" => {
            "the key may have to be allowed to read, write, list and delete below the repository's prefix"
        }
        "RequestTimeTooSkewed" => "set the clock of this machine, e.g. by NTP",
        "PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException" => REGION,
        "NoSuchBucket" => "create the bucket, or check --repo and --repo-s3-endpoint",
        _ => return None,
    })
}

/// Whether a page complains of plain HTTP on a port for TLS, as nginx, Apache and Go's servers do.
fn names_tls(text: &str) -> bool {
    let text = text.to_ascii_lowercase();
    text.contains("http ") && ["to https port", "to an https server", "ssl-enabled"].iter().any(|of| text.contains(of))
}

/// The beginning of what a person would read of a page.
fn page_text(page: &[u8]) -> String {
    const SHOWN_MAX: usize = 120;
    let page = String::from_utf8_lossy(&page[..page.len().min(8192)]).into_owned();
    let (mut text, mut is_tag) = (String::new(), false);
    for character in page.chars() {
        match character {
            '<' => is_tag = true,
            '>' => {
                is_tag = false;
                text.push(' ');
            }
            character if !is_tag => text.push(character),
            _ => {}
        }
    }
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn kind_of(status: u16, code: &str) -> ErrorKind {
    match code {
        "NoSuchBucket" => return ErrorKind::Other,
        "NoSuchKey" | "NotFound" => return ErrorKind::NotFound,
        "InvalidRange" => return ErrorKind::Truncated,
        "AccessDenied"
        | "InvalidAccessKeyId"
        | "SignatureDoesNotMatch"
        | "ExpiredToken"
        | "InvalidToken"
        | "RequestTimeTooSkewed" => return ErrorKind::Denied,
        // MinIO's and Ceph's ways to say that they are full
        "XMinioStorageFull" | "QuotaExceeded" | "XMinioAdminBucketQuotaExceeded" => return ErrorKind::NoSpace,
        "SlowDown"
        | "RequestTimeout"
        | "InternalError"
        | "ServiceUnavailable"
        | "Throttling"
        | "ThrottlingException"
        | "RequestLimitExceeded"
        | "OperationAborted"
        | "ConditionalRequestConflict"
        | "IncompleteBody" => return ErrorKind::Transient,
        _ => {}
    }
    match status {
        404 => ErrorKind::NotFound,
        401 | 403 => ErrorKind::Denied,
        416 => ErrorKind::Truncated,
        507 => ErrorKind::NoSpace,
        501 => ErrorKind::Other,
        408 | 409 | 425 | 429 | 500.. => ErrorKind::Transient,
        _ => ErrorKind::Other,
    }
}

impl<E: ProvideErrorMetadata + Error + 'static> From<SdkError<E, HttpResponse>> for Failure {
    fn from(error: SdkError<E, HttpResponse>) -> Self {
        match &error {
            SdkError::ServiceError(answer) => {
                let (raw, code, message) = (answer.raw(), answer.err().code(), answer.err().message());
                match (code, message) {
                    (None, None) => Self::of_page(raw, &chain(answer.err())),
                    _ => Self::of_code(Some(raw.status().as_u16()), code, message).region(raw).clocks(raw),
                }
            }
            // an answer cut off, or not of S3: a proxy's page perhaps
            SdkError::ResponseError(answer) => Self::of_page(answer.raw(), &chain(&error)),
            SdkError::TimeoutError(_) => Self::unanswered(chain(&error)),
            SdkError::DispatchFailure(failure) => match tls_error(&error) {
                Some(tls) => Self::of_tls(tls, chain(&error)),
                None if failure.is_user() => Self::other(chain(&error)),
                None => Self::unanswered(chain(&error)),
            },
            _ => Self::other(chain(&error)),
        }
    }
}

impl Failure {
    /// A server that is not trusted, or does not speak TLS, will not at the next try either.
    fn of_tls(error: &rustls::Error, chain: String) -> Self {
        use rustls::{CertificateError, Error};
        let hint = match error {
            Error::InvalidMessage(_) => return Self::not_tls(),
            Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
                "give the certificate of the authority that signed the server's with --repo-storage-ca-file"
            }
            Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
                "renew the server's certificate, or set the clock of this machine"
            }
            Error::InvalidCertificate(_) => "the endpoint's host must be one that the server's certificate names",
            _ => return Self::transient(chain),
        };
        Self::other(chain).hinted(hint)
    }
}

/// The error of TLS among the causes.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // an I/O error does not name the error it wraps among its causes
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match wrapped {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    None
}

/// The messages of an error and its causes, the repeated ones once.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let part = error.to_string();
        if parts.last().is_none_or(|last| !last.contains(&part)) {
            parts.push(part);
        }
        next = error.source();
    }
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        let kinds = [
            (404, "NoSuchKey", ErrorKind::NotFound),
            (404, "", ErrorKind::NotFound),
            (404, "NoSuchBucket", ErrorKind::Other),
            (403, "", ErrorKind::Denied),
            (400, "ExpiredToken", ErrorKind::Denied),
            (416, "", ErrorKind::Truncated),
            (409, "", ErrorKind::Transient),
            (429, "", ErrorKind::Transient),
            (400, "RequestTimeout", ErrorKind::Transient),
            (500, "InternalError", ErrorKind::Transient),
            (503, "SlowDown", ErrorKind::Transient),
            (501, "NotImplemented", ErrorKind::Other),
            (400, "InvalidArgument", ErrorKind::Other),
        ];
        for (status, code, kind) in kinds {
            assert_eq!(kind_of(status, code), kind, "{status} {code}");
        }
    }
}
