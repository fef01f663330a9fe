//! The call for one WAL file where a worker pushes ahead: it says yes only to what the worker saw confirmed, byte for byte.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::protocol::{About, Answer, Content, Outcome, Stamp};
use super::spool::Spool;
use crate::error::{Error, Result};
use crate::files;
use crate::repo::asking::Asking;

/// The shortest and the longest pause between two looks into the spool; between them, a quarter of the time waited so far.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// How many workers may fail under one call, before it does the work itself.
const FAILURES_MAX: u32 = 2;

/// What has become of a worker that was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// it runs
    Alive,
    /// it ended well: another one runs, or there was nothing to do
    Ended,
    /// it failed
    Failed,
}

/// Asks for the fate of one worker.
pub type Watch = Box<dyn FnMut() -> Fate>;

/// Where PostgreSQL keeps the file it asks for.
#[derive(Clone, Debug)]
pub struct Place {
    /// the directory `pg_wal`
    pub wal: PathBuf,
    /// `system_identifier` of `pg_control`
    pub system_id: u64,
    /// the file's name
    pub name: String,
}

impl Place {
    /// The place of a file that PostgreSQL itself wants archived; of any other, `None`: nobody would find it ahead.
    pub fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_owned();
        let wal = std::path::absolute(path).ok()?.parent()?.to_owned();
        if !ready(&wal, &name).exists() {
            return None;
        }
        let system_id = Asking::read(wal.parent()?)?.system_id;
        Some(Self { wal: wal.canonicalize().ok()?, system_id, name })
    }

    /// The data directory.
    pub fn data_directory(&self) -> &Path {
        self.wal.parent().unwrap_or(&self.wal)
    }
}

/// What tells that `name` is to be archived.
pub(super) fn ready(wal: &Path, name: &str) -> PathBuf {
    wal.join(crate::archive::worker::STATUS).join(format!("{name}.ready"))
}

/// What a call came to.
#[derive(Debug)]
pub enum Asked {
    /// the store has this file
    Archived,
    /// the spool is of no use: the caller has to push the file itself
    Alone(Error),
}

/// Waits until the worker says that `name`, whose bytes are at `path`, is in the store. `start` starts a worker.
///
/// # Errors
/// What the worker failed of, or that it said nothing for `timeout`.
pub fn ask(
    spool: &Spool,
    name: &str,
    path: &Path,
    timeout: Duration,
    start: &dyn Fn() -> Result<Watch>,
) -> Result<Asked> {
    let mut call = Call { spool, name, path, content: None, failures: 0, worker: None };
    let begun = Instant::now();
    // an answer "failed" of an earlier call is not one to this: without it, the worker tries at once
    match call.answer() {
        Ok(Some(Outcome::Failed { .. })) => {
            if let Err(error) = spool.remove(&Answer::file(name)) {
                return Ok(Asked::Alone(error));
            }
        }
        Ok(_) => {}
        Err(error) => return Ok(Asked::Alone(error)),
    }
    loop {
        match call.look(start) {
            Ok(Look::Outcome(Outcome::Archived { .. })) => return Ok(Asked::Archived),
            Ok(Look::Outcome(Outcome::Failed { error, hint, .. })) => {
                let error = Error::new(error);
                return Err(if let Some(hint) = hint { error.hint(hint) } else { error });
            }
            Ok(Look::Nothing) => {}
            Ok(Look::Changed(error)) => return Err(error),
            Err(error) => return Ok(Asked::Alone(error)),
        }
        if begun.elapsed() >= timeout {
            let seconds = timeout.as_secs();
            return Err(Error::new(format!("the store did not confirm {name} within {seconds} s")).hint(
                "PostgreSQL keeps the file and asks again; is the repository slow or away? see --archive-timeout",
            ));
        }
        sleep((begun.elapsed() / 4).clamp(LOOK_EVERY.0, LOOK_EVERY.1));
    }
}

struct Call<'a> {
    spool: &'a Spool,
    name: &'a str,
    path: &'a Path,
    content: Option<Content>,
    failures: u32,
    worker: Option<Watch>,
}

enum Look {
    Outcome(Outcome),
    Nothing,
    /// the file itself cannot be read
    Changed(Error),
}

impl Call<'_> {
    /// The answer of the run that lives.
    fn answer(&self) -> Result<Option<Outcome>> {
        // the answer first: it counts if its run lives after it was read
        let Some(answer) = Answer::read(self.spool, self.name)? else { return Ok(None) };
        match self.spool.live_run()? {
            Some(live) if live == answer.run => Ok(Some(answer.outcome)),
            // of a worker whose spool this once was: the one that lives must not take it for its own
            Some(_) => self.spool.remove(&Answer::file(self.name)).map(|()| None),
            None => Ok(None),
        }
    }

    fn look(&mut self, start: &dyn Fn() -> Result<Watch>) -> Result<Look> {
        match self.answer()? {
            Some(Outcome::Archived { about }) => {
                match self.is_ours(&about) {
                    Ok(true) => return Ok(Look::Outcome(Outcome::Archived { about })),
                    Ok(false) => {}
                    Err(error) => return Ok(Look::Changed(error)),
                }
                // it was for another file of this name, before a restore perhaps: the worker must look at this one
                self.spool.remove(&Answer::file(self.name))?;
                Ok(Look::Nothing)
            }
            Some(failed) => Ok(Look::Outcome(failed)),
            None => {
                self.have_worker(start)?;
                Ok(Look::Nothing)
            }
        }
    }

    fn have_worker(&mut self, start: &dyn Fn() -> Result<Watch>) -> Result<()> {
        match self.worker.as_mut().map(|fate| fate()) {
            Some(Fate::Alive) => return Ok(()),
            Some(Fate::Failed) => self.failures += 1,
            Some(Fate::Ended) | None => {}
        }
        self.worker = None;
        if self.spool.live_run()?.is_some() {
            return Ok(());
        }
        if self.failures == FAILURES_MAX {
            return Err(Error::new("the worker that pushes ahead does not stay alive").hint("see its log"));
        }
        self.worker = Some(start()?);
        Ok(())
    }

    fn is_ours(&mut self, about: &About) -> Result<bool> {
        Ok(match about {
            About::File(stamp) => Stamp::of(self.path)? == *stamp,
            About::Content(content) => self.content()?.to_hex().as_str() == content,
        })
    }

    fn content(&mut self) -> Result<Content> {
        match self.content {
            Some(content) => Ok(content),
            None => {
                let content = content_of(self.path)?;
                self.content = Some(content);
                Ok(content)
            }
        }
    }
}

fn content_of(path: &Path) -> Result<Content> {
    let file = files::open_regular(path).map_err(|error| Error::io("open", path, error))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(file).map_err(|error| Error::io("read", path, error))?;
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Or the worker that lives would take it for its own, and never look at the file.
    #[test]
    fn an_answer_of_another_run_is_taken_away() {
        let place = tempfile::tempdir().unwrap();
        let spool = Spool::open(place.path(), "main", &[]).unwrap();
        let (name, path) = ("000000010000000000000001", place.path().join("000000010000000000000001"));
        std::fs::write(&path, b"what").unwrap();
        let answer = |run: &str| {
            let about = About::content(content_of(&path).unwrap());
            Answer { run: run.to_owned(), outcome: Outcome::Archived { about } }.write(&spool, name).unwrap();
        };
        let asked = || ask(&spool, name, &path, Duration::ZERO, &|| panic!("there is a worker"));
        let run = spool.begin("").unwrap().unwrap();
        answer("another");
        asked().unwrap_err();
        assert_eq!(spool.read(&Answer::file(name)).unwrap(), None);
        answer(&run.id);
        assert!(matches!(asked(), Ok(Asked::Archived)));
    }
}
