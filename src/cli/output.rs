//! The only place that prints: results, errors with hints, progress.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is where the program prints")]

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use parking_lot::Mutex;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use super::options::Common;
use crate::error::Error;
use crate::progress::Monitor;

/// One line of a result.
pub(super) fn line(text: &str) {
    // a reader that went away (head, less) is no failure of ours
    _ = writeln!(std::io::stdout(), "{text}");
}

/// Where a result goes that is no text of ours.
pub(super) fn stream() -> impl Write {
    std::io::stdout().lock()
}

/// One line beside a result: what was assumed, what is being done.
pub(super) fn note(text: &str) {
    _ = writeln!(std::io::stderr(), "{text}");
}

/// An error, its causes on the same line, its hint on the next.
pub(super) fn error(error: &Error) {
    tell("error", error);
}

/// What is wrong, though the work was done; in the form of [`error`].
pub(super) fn warning(error: &Error) {
    tell("warning", error);
}

fn tell(what: &str, error: &Error) {
    _ = writeln!(std::io::stderr(), "{what}: {}", error.told());
    if let Some(hint) = error.hint_text() {
        _ = writeln!(std::io::stderr(), "hint: {hint}");
    }
}

/// Begins logging to standard error.
pub(super) fn start_log(common: &Common) {
    let level: LevelFilter = common.log_level.parse().unwrap_or(LevelFilter::WARN);
    let filter = Targets::new()
        .with_default(level)
        .with_target("aws_config", level.min(LevelFilter::ERROR))
        .with_target("aws_smithy_runtime", level.min(LevelFilter::ERROR))
        .with_target("hyper", level.min(LevelFilter::WARN));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    _ = tracing_subscriber::registry().with(lines.with_filter(filter)).try_init();
}

/// Bytes for people.
pub(super) fn bytes(count: u64) -> String {
    HumanBytes(count).to_string()
}

/// Seconds since 1970 for people.
pub(super) fn time(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

/// A bar on a terminal, a line every ten seconds elsewhere.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    /// whether the lines elsewhere are for everybody, not for the log alone
    told: bool,
    plain: Mutex<Plain>,
}

struct Plain {
    stage: String,
    total: u64,
    done: u64,
    started: Instant,
    told: Instant,
}

/// Time between two lines of progress in a log.
const TELL_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    /// Progress on standard error; none with `quiet`.
    pub(super) fn new(quiet: bool) -> Self {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::no_length();
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        let now = Instant::now();
        let plain = Plain { stage: String::new(), total: 0, done: 0, started: now, told: now };
        Self { bar, told: false, plain: Mutex::new(plain) }
    }

    /// Progress that is seen without a terminal and at every log level: of what may take hours, and is waited for.
    pub(super) fn told() -> Self {
        let mut progress = Self::new(false);
        progress.told = true;
        progress
    }

    /// Removes the bar.
    pub(super) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Monitor for Progress {
    fn stage(&self, name: &str, bytes_total: u64) {
        if let Some(bar) = &self.bar {
            let template = match bytes_total {
                0 => "{msg} {spinner}",
                _ => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            };
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_length(bytes_total);
            bar.reset();
            bar.set_message(name.to_owned());
        }
        tracing::info!("{name}");
        let now = Instant::now();
        *self.plain.lock() = Plain { stage: name.to_owned(), total: bytes_total, done: 0, started: now, told: now };
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
            return;
        }
        let mut plain = self.plain.lock();
        plain.done += bytes;
        if plain.told.elapsed() >= TELL_EVERY {
            plain.told = Instant::now();
            let rate = plain.done as f64 / plain.started.elapsed().as_secs_f64();
            let left = plain.total.saturating_sub(plain.done) as f64 / rate.max(1.0);
            let line = format!(
                "{}: {} of {}, {}/s, {left:.0} s left",
                plain.stage,
                HumanBytes(plain.done),
                HumanBytes(plain.total),
                HumanBytes(rate as u64)
            );
            match self.told {
                true => note(&line),
                false => tracing::info!("{line}"),
            }
        }
    }

    fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => _ = writeln!(std::io::stderr(), "{text}"),
        }
    }
}
