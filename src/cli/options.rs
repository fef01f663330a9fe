//! Options that several verbs share, and how they become a repository and a fetcher.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::cipher::Cipher;
use crate::error::{Error, Result};
use crate::postgres::{CONTROL_FILE, TablespaceDirectory};
use crate::read::cache::{self, DiskCache};
use crate::read::fetch::{FetchOptions, Fetcher};
use crate::repo::Repository;
use crate::store::{self, RetryPolicy, StoreOptions};

/// Options of every verb.
#[derive(Clone, Debug, Args)]
pub(super) struct Common {
    /// Configuration file (TOML); its keys are the names of the options
    #[arg(long, global = true, env = "PGCAIRN_CONFIG", value_name = "FILE", help_heading = "Common options")]
    pub(super) config: Option<PathBuf>,
    /// Repository: s3://BUCKET/PREFIX, file:///PATH or a path
    #[arg(long, global = true, env = "PGCAIRN_REPO", value_name = "URL", help_heading = "Common options")]
    pub(super) repo: Option<String>,
    /// Name of the cluster in the repository
    #[arg(long, global = true, env = "PGCAIRN_STANZA", value_name = "NAME", help_heading = "Common options")]
    pub(super) stanza: Option<String>,
    /// What to log
    #[arg(
        long,
        global = true,
        env = "PGCAIRN_LOG_LEVEL",
        value_name = "LEVEL",
        default_value = "warn",
        help_heading = "Common options"
    )]
    #[arg(value_parser = ["off", "error", "warn", "info", "debug", "trace"], ignore_case = true)]
    pub(super) log_level: String,
    /// How long a call of an S3 repository that fails is tried again, e.g. 180s or 5m
    #[arg(
        long,
        global = true,
        env = "PGCAIRN_IO_TIMEOUT",
        value_name = "TIME",
        default_value = "180s",
        value_parser = io_timeout,
        help_heading = "Common options"
    )]
    pub(super) io_timeout: Duration,
    /// set when the program is asked to end: calls of the repository fail from then on
    #[arg(skip)]
    pub(super) stop: store::Stop,
    #[command(flatten)]
    pub(super) s3: S3,
    #[command(flatten)]
    pub(super) cipher: Cipher,
}

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "S3 options (what is not given comes from the AWS environment and profile)")]
pub(super) struct S3 {
    /// URL of the S3 server, for any but AWS
    #[arg(long, global = true, env = "PGCAIRN_REPO_S3_ENDPOINT", value_name = "URL")]
    repo_s3_endpoint: Option<String>,
    /// Region
    #[arg(long, global = true, env = "PGCAIRN_REPO_S3_REGION", value_name = "NAME")]
    repo_s3_region: Option<String>,
    /// Access key; better in the environment or in the AWS profile
    #[arg(long, global = true, env = "PGCAIRN_REPO_S3_KEY", value_name = "ID", hide_env_values = true)]
    repo_s3_key: Option<String>,
    /// Secret of the access key: only from the environment (PGCAIRN_REPO_S3_KEY_SECRET) or the configuration file
    #[arg(long, global = true, env = "PGCAIRN_REPO_S3_KEY_SECRET", hide = true, hide_env_values = true)]
    repo_s3_key_secret: Option<String>,
    /// Where the bucket stands: in the path (default with an endpoint) or in the host name
    #[arg(long, global = true, env = "PGCAIRN_REPO_S3_URI_STYLE", value_name = "STYLE")]
    repo_s3_uri_style: Option<UriStyle>,
    /// Certificates to trust, PEM
    #[arg(long, global = true, env = "PGCAIRN_REPO_STORAGE_CA_FILE", value_name = "FILE")]
    repo_storage_ca_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum UriStyle {
    Path,
    Host,
}

/// Options of verbs that read backups.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Cache options")]
pub(super) struct Cache {
    /// Directory of the disk cache of decompressed chunks
    #[arg(long, env = "PGCAIRN_CACHE_PATH", value_name = "DIR")]
    pub(super) cache_path: Option<PathBuf>,
    /// Bytes the disk cache may hold, e.g. 20G; 0 does without
    #[arg(long, env = "PGCAIRN_CACHE_SIZE", value_name = "SIZE", default_value = "10G", value_parser = size)]
    pub(super) cache_size: u64,
    /// Bytes of chunks kept in memory
    #[arg(long, env = "PGCAIRN_CACHE_MEMORY", value_name = "SIZE", default_value = "64M", value_parser = size)]
    pub(super) cache_memory: u64,
}

/// How long output is for: people or programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// for people
    Text,
    /// for programs
    Json,
}

/// A switch as pgBackRest writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum YesNo {
    /// on
    #[value(alias = "true")]
    Y,
    /// off
    #[value(alias = "false")]
    N,
}

impl Common {
    /// The stanza, whose store gives up on what fails after `patience`.
    pub(super) fn repository_within(&self, patience: Duration) -> Result<Repository> {
        Repository::open(
            self.store_with(false, patience.min(self.io_timeout))?,
            self.stanza()?,
            self.cipher.passphrase()?.as_ref(),
        )
    }

    /// What tells one repository from another without opening it.
    pub(super) fn identity(&self) -> [String; 4] {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let repo = self.repo.as_deref().map(absolute).unwrap_or_default();
        [repo, text(&self.s3.repo_s3_endpoint), text(&self.s3.repo_s3_region), text(&self.stanza)]
    }

    /// The name of the stanza.
    pub(super) fn stanza(&self) -> Result<&str> {
        self.stanza.as_deref().ok_or_else(|| missing("stanza", "--stanza main"))
    }

    /// The stanza, by its name; opened with the passphrase if it is encrypted.
    pub(super) fn repository(&self) -> Result<Repository> {
        Repository::open(self.store(false)?, self.stanza()?, self.cipher.passphrase()?.as_ref())
    }

    /// The same for verbs that read `archive.info` before all else, which tells them too that a stanza is encrypted. They
    /// run once for every segment of WAL: without a passphrase this saves them a request.
    pub(super) fn repository_of_archive(&self) -> Result<Repository> {
        match self.cipher.passphrase()? {
            Some(passphrase) => Repository::open(self.store(false)?, self.stanza()?, Some(&passphrase)),
            None => Repository::new(self.store(false)?, self.stanza()?),
        }
    }

    /// The store alone.
    pub(super) fn store(&self, create: bool) -> Result<Arc<dyn store::Store>> {
        self.store_with(create, self.io_timeout)
    }

    fn store_with(&self, create: bool, deadline: Duration) -> Result<Arc<dyn store::Store>> {
        let url =
            self.repo.as_deref().ok_or_else(|| missing("repo", "--repo /backups or --repo s3://bucket/prefix"))?;
        let options = StoreOptions {
            endpoint: self.s3.repo_s3_endpoint.clone(),
            region: self.s3.repo_s3_region.clone(),
            path_style: self.s3.repo_s3_uri_style.map(|style| style == UriStyle::Path),
            key: self.s3.repo_s3_key.clone(),
            key_secret: self.s3.repo_s3_key_secret.clone(),
            ca_file: self.s3.repo_storage_ca_file.clone(),
            retry: RetryPolicy { deadline, ..RetryPolicy::default() },
            stop: self.stop.clone(),
            ..StoreOptions::default()
        };
        store::open(url, &options, create).map_err(|error| {
            let failed = Error::new(format!("cannot open the repository {url}"));
            match error.hint() {
                Some(_) => failed.source(error),
                None if self.repository_directory().is_none() => failed.hint(S3_HINT).source(error),
                None if error.kind == store::ErrorKind::NotFound => {
                    failed.hint("check --repo; \"pgcairn stanza-create\" makes a directory").source(error)
                }
                None => failed.source(error),
            }
        })
    }

    /// The directory of a repository that is one.
    pub(super) fn repository_directory(&self) -> Option<PathBuf> {
        let url = self.repo.as_deref()?;
        match url.strip_prefix("file://") {
            Some(path) => Some(PathBuf::from(path)),
            None => (!url.contains("://")).then(|| PathBuf::from(url)),
        }
    }

    /// Refuses a directory repository that lies in a cluster, which would back it up again and again.
    pub(super) fn refuse_repository_in_data_directory(&self, of: Option<&Path>) -> Result<()> {
        let Some(directory) = self.repository_directory() else { return Ok(()) };
        refuse_in_data_directory("the repository", &directory, "--repo")?;
        // a tablespace's directory may be the cluster's long before a relation lies in it
        let spaces = of.map(|of| of.join("pg_tblspc").read_dir()).into_iter().flatten().flatten().flatten();
        for space in spaces.filter_map(|entry| entry.path().canonicalize().ok()) {
            if resolved(&directory)?.starts_with(&space) {
                return Err(Error::new(format!(
                    "the repository {} lies in the tablespace {}",
                    directory.display(),
                    space.display()
                ))
                .hint("name a directory outside of the cluster: --repo"));
            }
        }
        Ok(())
    }

    /// Options that a child process needs to open the same stanza; secrets go through the environment.
    pub(super) fn arguments(&self) -> Vec<String> {
        let pairs = [
            ("--config", self.config.as_deref().map(absolute_path)),
            ("--repo", self.repo.as_deref().map(absolute)),
            ("--stanza", self.stanza.clone()),
            ("--log-level", Some(self.log_level.clone())),
            ("--io-timeout", self.io_timeout_given().map(|time| time.as_secs().to_string())),
            ("--repo-s3-endpoint", self.s3.repo_s3_endpoint.clone()),
            ("--repo-s3-region", self.s3.repo_s3_region.clone()),
            ("--repo-s3-key", self.s3.repo_s3_key.clone()),
            (
                "--repo-s3-uri-style",
                self.s3.repo_s3_uri_style.map(|style| match style {
                    UriStyle::Path => "path".into(),
                    UriStyle::Host => "host".into(),
                }),
            ),
            ("--repo-storage-ca-file", self.s3.repo_storage_ca_file.as_deref().map(absolute_path)),
        ];
        pairs
            .into_iter()
            .chain(self.cipher.arguments())
            .filter_map(|(name, value)| Some([name.to_owned(), value?]))
            .flatten()
            .collect()
    }

    fn io_timeout_given(&self) -> Option<Duration> {
        Some(self.io_timeout).filter(|time| *time != RetryPolicy::default().deadline)
    }

    /// Secrets, for a child's environment.
    pub(super) fn secrets(&self) -> Vec<(&'static str, &str)> {
        self.s3_secret().into_iter().chain(self.cipher.secret()).collect()
    }

    /// The secret of the access key, for a child's environment.
    pub(super) fn s3_secret(&self) -> Option<(&'static str, &str)> {
        self.s3.repo_s3_key_secret.as_deref().map(|secret| ("PGCAIRN_REPO_S3_KEY_SECRET", secret))
    }
}

impl Cache {
    /// A fetcher with these caches.
    pub(super) fn fetcher(&self, repository: Repository) -> Result<Arc<Fetcher>> {
        let disk = match self.cache_size {
            0 => None,
            size => Some(DiskCache::open(&self.path()?, size)?),
        };
        Ok(Arc::new(Fetcher::new(repository, FetchOptions { memory_bytes: self.cache_memory as usize, disk })))
    }

    /// Where the disk cache is, if there is one; marked as ours.
    pub(super) fn directory(&self) -> Result<Option<PathBuf>> {
        match self.cache_size {
            0 => Ok(None),
            _ => {
                let path = self.path()?;
                cache::prepare(&path)?;
                Ok(Some(path))
            }
        }
    }

    fn path(&self) -> Result<PathBuf> {
        let path = self.cache_path.clone().map_or_else(default_cache_path, Ok)?;
        refuse_in_data_directory("the cache", &path, "--cache-path")?;
        Ok(path)
    }

    /// Options that a child process needs.
    pub(super) fn arguments(&self) -> Vec<String> {
        let mut arguments =
            vec![format!("--cache-size={}", self.cache_size), format!("--cache-memory={}", self.cache_memory)];
        arguments.extend(self.cache_path.as_deref().map(|path| format!("--cache-path={}", absolute_path(path))));
        arguments
    }
}

const S3_HINT: &str = "--repo is s3://BUCKET/PREFIX, with letters, digits and . _ = + : - in the prefix; see --repo-s3-endpoint, \
    --repo-s3-key and --repo-storage-ca-file";

/// Parses `180`, `180s`, `5m`: long enough for one answer, and not for ever.
fn io_timeout(text: &str) -> std::result::Result<Duration, String> {
    let time = super::retention::time(text)?;
    match (1..=3600).contains(&time.as_secs()) {
        true => Ok(time),
        false => Err(format!("{text} is not between 1s and 1h")),
    }
}

fn missing(option: &str, example: &str) -> Error {
    Error::new(format!("no --{option} is given"))
        .hint(format!("give {example}, or set it in the configuration file or the environment"))
}

/// A path repository as an absolute path, so that it means the same to a daemon.
fn absolute(url: &str) -> String {
    if url.contains("://") { url.to_owned() } else { absolute_path(Path::new(url)) }
}

pub(super) fn absolute_path(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).display().to_string()
}

fn default_cache_path() -> Result<PathBuf> {
    state_directory("/var/cache/pgcairn", "XDG_CACHE_HOME", ".cache", "pgcairn", "--cache-path")
}

/// Refuses a directory inside a data directory or a tablespace: it would be backed up, and PostgreSQL may remove it.
pub(super) fn refuse_in_data_directory(what: &str, path: &Path, option: &str) -> Result<()> {
    let there = resolved(path)?;
    for above in there.ancestors() {
        let name = above.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let of_tablespace = TablespaceDirectory::parse(name).is_ok();
        if of_tablespace || above.join(CONTROL_FILE).symlink_metadata().is_ok() {
            let kind = if of_tablespace { "the tablespace" } else { "the data directory" };
            return Err(Error::new(format!("{what} {} lies in {kind} {}", there.display(), above.display()))
                .hint(format!("name a directory outside of the cluster: {option}")));
        }
    }
    Ok(())
}

/// An absolute path without links, as far as it exists.
fn resolved(path: &Path) -> Result<PathBuf> {
    let path = std::path::absolute(path).map_err(|error| Error::io("find", path, error))?;
    let there =
        path.ancestors().find_map(|above| Some(above.canonicalize().ok()?.join(path.strip_prefix(above).ok()?)));
    Ok(there.unwrap_or(path))
}

/// `root` for root; else `below` in the directory that `variable` names, or that is `default` in the user's home. `option`
/// names another.
///
/// Never a name in /tmp that others can foresee: whoever made it first would have a say in what is read from it.
pub(super) fn state_directory(root: &str, variable: &str, default: &str, below: &str, option: &str) -> Result<PathBuf> {
    let uid = nix::unistd::geteuid();
    if uid.is_root() {
        return Ok(PathBuf::from(root));
    }
    let named = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(directory) = named(variable) {
        return Ok(directory.join(below));
    }
    if let Some(home) = named("HOME") {
        return Ok(home.join(default).join(below));
    }
    let own = |path: &PathBuf| path.metadata().is_ok_and(|found| found.is_dir() && found.uid() == uid.as_raw());
    let home = nix::unistd::User::from_uid(uid).ok().flatten().map(|user| user.dir).filter(own);
    if let Some(home) = home {
        return Ok(home.join(default).join(below));
    }
    let runtime = PathBuf::from(format!("/run/user/{uid}"));
    if own(&runtime) {
        return Ok(runtime.join(below));
    }
    Err(Error::new("there is no HOME, and no home directory of this user")
        .hint(format!("say where to keep this: {option} DIR, or set HOME or {variable}")))
}

/// Parses `10G`, `64M`, `0`.
pub(super) fn size(text: &str) -> std::result::Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" | "B" => 1,
        "K" | "KB" | "KIB" => 1 << 10,
        "M" | "MB" | "MIB" => 1 << 20,
        "G" | "GB" | "GIB" => 1 << 30,
        "T" | "TB" | "TIB" => 1u64 << 40,
        other => return Err(format!("unknown unit \"{other}\"; use K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("\"{text}\" is no size; it reads like 512M or 10G"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text} is too much"))
}
