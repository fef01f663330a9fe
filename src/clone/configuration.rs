//! A configuration that this machine's server does not take whole: it names what is not here. The
//! clone does without that.
//!
//! The server says what it does not take (`utils/misc/guc-file.l`, `guc.c`, `utils/fmgr/dfmgr.c`),
//! in English, since
//! `lc_messages` is on its command line. A value that it does not take stops it also where another
//! one counts.

use std::io;
use std::path::{Component, Path, PathBuf};

use crate::postgres::{conf, conninfo};

/// Files that are included in one another deeper than this are no configuration; PostgreSQL stops
/// there, too.
const DEPTH_MAX: usize = 10;
/// How a server ends that does not take its configuration.
const REFUSED: &str = "contains errors";
/// How one goes on that does not take all of it at a reload; what it says then did not keep it from starting.
const RELOADED: &str = "contains errors;";
/// What it says at a reload of values that its command line has given to it.
const AT_START_ONLY: &str = " cannot be changed without restarting";
/// What stands before a complaint.
const SEVERITIES: [&str; 3] = ["FATAL:  ", "ERROR:  ", "LOG:  "];

/// What a server does not take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Complaint {
    /// an included file or directory that it cannot read
    Include(PathBuf),
    /// a parameter that it does not know
    Unknown(String),
    /// a parameter whose value, the last that is given, it does not take
    Value(String),
    /// a line that it cannot read
    Line(PathBuf, u64),
    /// a library that it cannot load, by its name without a path and an ending
    Library(String),
}

/// What a server's log complains of, each with its own words.
pub fn complaints(log: &str) -> Vec<(Complaint, String)> {
    let refused = log.lines().any(|line| line.contains(REFUSED) && !line.contains(RELOADED));
    let mut found: Vec<(Complaint, String)> = Vec::new();
    for line in log.lines() {
        let Some(words) = SEVERITIES.iter().find_map(|severity| line.split_once(severity)).map(|(_, words)| words)
        else {
            continue;
        };
        let complaint = library(words).or_else(|| configuration(words).filter(|_| refused));
        if let Some(complaint) = complaint.filter(|complaint| !found.iter().any(|(known, _)| known == complaint)) {
            found.push((complaint, words.to_owned()));
        }
    }
    found
}

fn library(words: &str) -> Option<Complaint> {
    let beginnings = ["could not access file \"", "could not load library \"", "incompatible library \""];
    let path = beginnings.iter().find_map(|beginning| words.strip_prefix(beginning))?.split('"').next()?;
    Some(Complaint::Library(stem(path).to_owned()))
}

fn configuration(words: &str) -> Option<Complaint> {
    let quoted = |after: &str| Some(words.split_once(after)?.1.split('"').next()?.to_owned());
    for kind in ["file", "directory"] {
        if let Some(path) = quoted(&format!("could not open configuration {kind} \"")) {
            return Some(Complaint::Include(path.into()));
        }
    }
    if let Some(rest) = words.strip_prefix("syntax error in file \"") {
        let (file, rest) = rest.split_once("\" line ")?;
        let number = rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
        return Some(Complaint::Line(file.into(), number));
    }
    // those of builds without something name no parameter
    for (build, name) in [("Bonjour is not supported", "bonjour"), ("SSL is not supported", "ssl")] {
        if words.starts_with(build) {
            return Some(Complaint::Value(name.to_owned()));
        }
    }
    // a reload tells of changes in the same way
    let of_reload = words.contains(" changed to ") || words.contains(AT_START_ONLY);
    let name = quoted("parameter \"").filter(|_| !of_reload)?;
    let name = name.to_ascii_lowercase();
    Some(if words.starts_with("unrecognized ") { Complaint::Unknown(name) } else { Complaint::Value(name) })
}

/// `pg_cron` of `$libdir/pg_cron.so`.
fn stem(library: &str) -> &str {
    let name = library.rsplit('/').next().unwrap_or(library);
    name.strip_suffix(".so").unwrap_or(name)
}

/// A list of libraries, as `shared_preload_libraries` has it, without this one; none if it is not
/// in the list.
pub fn without_library(list: &str, missing: &str) -> Option<String> {
    let names: Vec<&str> = list.split(',').map(|name| name.trim().trim_matches('"')).collect();
    let kept: Vec<String> =
        names.iter().filter(|name| stem(name) != missing).map(|name| conninfo::list_element(name)).collect();
    (kept.len() < names.len()).then(|| kept.join(", "))
}

/// A path without `.` and `..`, by its words alone, as the server writes it.
fn canonical(path: &Path) -> PathBuf {
    let mut words = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => _ = words.pop(),
            part => words.push(part),
        }
    }
    words
}

/// Where configuration files are read.
pub trait Files {
    /// The content of a file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// The files of a directory that is included, in their order.
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>>;
}

/// A line of a configuration.
#[derive(Clone, Debug)]
struct Line {
    file: PathBuf,
    number: u64,
    bytes: Vec<u8>,
    /// what it includes: that stands behind it
    includes: Option<PathBuf>,
    is_left_out: bool,
}

impl Line {
    /// Whether it gives a value to a parameter.
    fn gives(&self, name: &str) -> bool {
        !self.is_left_out && !conf::values(&self.bytes, name).is_empty()
    }
}

/// A configuration file, with everything that it includes in its place.
#[derive(Clone, Debug, Default)]
pub struct Configuration {
    lines: Vec<Line>,
}

impl Configuration {
    /// Reads it. What is included and cannot be read is not there: the server says so, if it
    /// matters.
    ///
    /// # Errors
    /// When the file itself cannot be read.
    pub fn read(path: &Path, files: &dyn Files) -> io::Result<Self> {
        let mut configuration = Self::default();
        configuration.add(path, &files.read(path)?, files, 0);
        Ok(configuration)
    }

    fn add(&mut self, path: &Path, bytes: &[u8], files: &dyn Files, depth: usize) {
        let directory = path.parent().unwrap_or(Path::new("/"));
        for (number, bytes) in (1..).zip(bytes.split_inclusive(|&byte| byte == b'\n')) {
            let line = |includes| Line {
                file: path.to_owned(),
                number,
                bytes: bytes.to_owned(),
                includes,
                is_left_out: false,
            };
            let of = |name: &str| conf::values(bytes, name).pop().map(|value| directory.join(value));
            let file = of("include").or_else(|| of("include_if_exists"));
            let Some(at) = file.clone().or_else(|| of("include_dir")).filter(|_| depth < DEPTH_MAX) else {
                self.lines.push(line(None));
                continue;
            };
            self.lines.push(line(Some(at.clone())));
            let included = if file.is_some() { vec![at] } else { files.list(&at).unwrap_or_default() };
            for file in included {
                if let Ok(bytes) = files.read(&file) {
                    self.add(&file, &bytes, files, depth + 1);
                }
            }
        }
    }

    /// The last value that it gives to a parameter.
    pub fn value(&self, name: &str) -> Option<String> {
        let line = self.lines.iter().rev().find(|line| line.gives(name))?;
        conf::values(&line.bytes, name).pop()
    }

    /// Leaves out what the server does not take; where that stands, with its words, in this
    /// configuration.
    pub fn leave_out(&mut self, complaint: &Complaint) -> Vec<String> {
        let mut places = Vec::new();
        let last = match complaint {
            Complaint::Value(name) => self.lines.iter().rposition(|line| line.gives(name)),
            _ => None,
        };
        for (index, line) in self.lines.iter_mut().enumerate().filter(|(_, line)| !line.is_left_out) {
            let file = canonical(&line.file);
            let names = |path: &Path| file == *path || file.parent() == Some(path);
            let leaves = match complaint {
                Complaint::Include(path) => {
                    let path = canonical(path);
                    // what could be read here, but not by the server, goes with the line that
                    // includes it
                    line.is_left_out = names(&path);
                    line.includes.as_deref().is_some_and(|includes| canonical(includes) == path)
                }
                Complaint::Unknown(name) => line.gives(name),
                Complaint::Value(_) => last == Some(index),
                Complaint::Line(path, number) => file == canonical(path) && line.number == *number,
                Complaint::Library(_) => false,
            };
            if leaves {
                line.is_left_out = true;
                let words = String::from_utf8_lossy(&line.bytes);
                places.push(format!("{} line {}: {}", line.file.display(), line.number, words.trim()));
            }
        }
        places
    }

    /// As one file.
    pub fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for line in &self.lines {
            if line.is_left_out || line.includes.is_some() {
                text.extend_from_slice(b"# ");
            }
            text.extend_from_slice(&line.bytes);
            if !line.bytes.ends_with(b"\n") {
                text.push(b'\n');
            }
        }
        text
    }
}

#[cfg(test)]
mod tests;
