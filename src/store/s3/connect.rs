//! From options to a client of the SDK.

use std::path::Path;
use std::time::Duration;

use aws_config::environment::region::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::{
    Credentials, ProvideCredentials, RequestChecksumCalculation, ResponseChecksumValidation, SharedHttpClient,
    StalledStreamProtectionConfig,
};
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode};
use aws_smithy_http_client::{Connector, ConnectorBuilder};
use aws_smithy_runtime_api::client::http::{SharedHttpConnector, http_client_fn};
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::S3Options;
use super::endpoint::Endpoint;
use super::failure::{Failure, chain};
use crate::store::ErrorKind;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A transfer that moves nothing for this long is cut off.
const STALL_MAX: Duration = Duration::from_secs(20);

/// Servers close idle connections without a word; one that is reused too late costs a failed try.
const IDLE_MAX: Duration = Duration::from_secs(20);

/// Whether a bucket may have this name; looser than AWS, since other servers are.
pub(super) fn check_bucket(bucket: &str) -> std::result::Result<(), String> {
    let valid = |b: u8| b.is_ascii_alphanumeric() || b".-_".contains(&b);
    if !(3..=255).contains(&bucket.len()) || !bucket.bytes().all(valid) || bucket.starts_with('.') {
        return Err("the bucket's name is not a valid one".to_owned());
    }
    Ok(())
}

/// What can be said about the options without reaching the server.
pub(super) fn check(options: &S3Options) -> std::result::Result<(), String> {
    if let Some(endpoint) = &options.endpoint {
        let host = endpoint.strip_prefix("http://").or(endpoint.strip_prefix("https://"));
        if host.is_none_or(|host| host.is_empty() || host.contains('@')) {
            return Err("the endpoint must be http://HOST[:PORT] or https://HOST[:PORT]".to_owned());
        }
    }
    if options.key.is_some() != options.key_secret.is_some() {
        return Err("the access key and the secret key must be given together".to_owned());
    }
    options.ca_file.as_deref().map_or(Ok(()), |path| read_certificates(path).map(drop))
}

/// The SDK panics over a file of bad certificates, so they are looked at first.
fn read_certificates(path: &Path) -> std::result::Result<Vec<u8>, String> {
    let shown = path.display();
    let pem = std::fs::read(path).map_err(|e| format!("cannot read the certificates in {shown}: {e}"))?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let added = certificate.map_err(|e| e.to_string()).and_then(|c| roots.add(c).map_err(|e| e.to_string()));
        added.map_err(|e| format!("bad certificate in {shown}: {e}"))?;
    }
    if roots.is_empty() { Err(format!("no certificate in {shown}")) } else { Ok(pem) }
}

/// A client, and the credentials that were there when it was made.
///
/// The SDK asks again for credentials that expire (web identity, container, instance, process), but reads a profile once.
pub(super) async fn connect(options: &S3Options) -> std::result::Result<(Client, Credentials), Failure> {
    let endpoint = url(options);
    let https = https_client(options, ProxyConfig::from_env)?;
    let timeouts = TimeoutConfig::builder().connect_timeout(options.connect_timeout.unwrap_or(CONNECT_TIMEOUT)).build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(https.clone())
        .timeout_config(timeouts)
        .retry_config(RetryConfig::disabled())
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .stalled_stream_protection(StalledStreamProtectionConfig::enabled().grace_period(STALL_MAX).build());
    loader = match (&options.region, &endpoint) {
        (Some(region), _) => loader.region(Region::new(region.clone())),
        // without AWS's own endpoint, do not ask an instance's metadata service, which is slow to be absent
        (None, Some(_)) => loader.region(
            RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
                .or_else(ProfileFileRegionProvider::new())
                .or_else(Region::new("us-east-1")),
        ),
        (None, None) => loader,
    };
    if let (Some(key), Some(secret)) = (&options.key, &options.key_secret) {
        loader = loader.credentials_provider(Credentials::new(key, secret, None, None, "options"));
    }
    let shared = loader.load().await;
    let credentials = credentials(&shared).await?;
    if shared.region().is_none() {
        return Err(Failure::other("no region is configured for AWS"));
    }
    let mut config =
        aws_sdk_s3::config::Builder::from(&shared).force_path_style(options.path_style.unwrap_or(endpoint.is_some()));
    if let Some(endpoint) = endpoint {
        let of = Endpoint::parse(&endpoint);
        config = config.endpoint_url(endpoint);
        // no proxy leads to this machine, whatever NO_PROXY says
        let is_here = of.as_ref().is_some_and(Endpoint::is_loopback);
        let proxy: Proxies = if is_here { ProxyConfig::disabled } else { ProxyConfig::from_env };
        match of {
            Some(of) if !of.is_tls => config = config.http_client(http_client(proxy)),
            Some(_) if is_here => config = config.http_client(https_client(options, proxy)?),
            _ => {}
        }
    }
    Ok((Client::from_conf(config.build()), credentials))
}

/// The endpoint's URL; none where AWS's own is meant.
fn url(options: &S3Options) -> Option<String> {
    options.endpoint.clone().or_else(endpoint_of_environment)
}

/// The server that is asked, where it is known and asked without a proxy.
pub(super) fn endpoint(options: &S3Options) -> Option<Endpoint> {
    let endpoint = Endpoint::parse(&url(options)?)?;
    let is_set = |name: &&str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let is_proxied =
        ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"].iter().any(is_set);
    (endpoint.is_loopback() || !is_proxied).then_some(endpoint)
}

fn endpoint_of_environment() -> Option<String> {
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    set("AWS_ENDPOINT_URL_S3").or_else(|| set("AWS_ENDPOINT_URL"))
}

/// The proxies to go by: those that the environment names (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`), or none.
type Proxies = fn() -> ProxyConfig;

/// A client for both http:// and https://.
fn https_client(options: &S3Options, proxies: Proxies) -> std::result::Result<SharedHttpClient, Failure> {
    let context = match &options.ca_file {
        None => None,
        Some(path) => {
            let pem = read_certificates(path).map_err(Failure::other)?;
            let trust = TrustStore::default().with_pem_certificate(pem);
            let context = TlsContext::builder().with_trust_store(trust).build();
            Some(context.map_err(|e| Failure::other(e.to_string()))?)
        }
    };
    Ok(when_used(proxies, move |connector| {
        let connector = connector.tls_provider(Provider::Rustls(CryptoMode::Ring));
        match &context {
            Some(context) => connector.tls_context(context.clone()).build(),
            None => connector.build(),
        }
    }))
}

/// A client for http:// alone.
fn http_client(proxies: Proxies) -> SharedHttpClient {
    when_used(proxies, ConnectorBuilder::build_http)
}

/// What tells one connector from another: how long connecting and reading may take.
type Timeouts = (Option<Duration>, Option<Duration>);

/// A client whose connectors are made when they are first used. Reading the system's certificates takes longer than
/// compressing a WAL segment, and a store at http:// with keys in the options or the environment never needs them.
fn when_used(
    proxies: Proxies,
    make: impl Fn(ConnectorBuilder) -> Connector + Send + Sync + 'static,
) -> SharedHttpClient {
    let made: Mutex<Vec<(Timeouts, SharedHttpConnector)>> = Mutex::default();
    http_client_fn(move |settings, components| {
        let timeouts = (settings.connect_timeout(), settings.read_timeout());
        let mut made = made.lock();
        if let Some((_, connector)) = made.iter().find(|(known, _)| *known == timeouts) {
            return connector.clone();
        }
        let mut builder = Connector::builder()
            .connector_settings(settings.clone())
            .pool_idle_timeout(IDLE_MAX)
            .proxy_config(proxies());
        builder.set_sleep_impl(components.sleep_impl());
        let connector = SharedHttpConnector::new(make(builder));
        made.push((timeouts, connector.clone()));
        connector
    })
}

async fn credentials(config: &aws_config::SdkConfig) -> std::result::Result<Credentials, Failure> {
    let hint = "give --repo-s3-key and PGCAIRN_REPO_S3_KEY_SECRET, or AWS's own variables or profile";
    let Some(provider) = config.credentials_provider() else {
        return Err(Failure::of(ErrorKind::Denied, "no credentials are configured for S3").hinted(hint));
    };
    provider
        .provide_credentials()
        .await
        .map_err(|e| Failure::of(ErrorKind::Denied, format!("no credentials for S3: {}", chain(&e))).hinted(hint))
}
