//! Which packs nobody needs, and since when that is known.
//!
//! A mark is an object that lists packs which no manifest referred to when it was written. It says nothing of now: a backup
//! that ran meanwhile may have taken them up again. So whoever deletes by it looks once more.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::sweep::BATCH;
use crate::error::{Context, Error, Result};
use crate::format::chunk::PackId;
use crate::format::info::Mark;
use crate::interrupt;
use crate::progress::Monitor;
use crate::repo::lock::Lock;
use crate::repo::{Repository, layout};
use crate::store::{Body, Listed};

/// Packs that one mark names at most: what it weighs stays below half a megabyte.
const MARK_PACKS_MAX: usize = 10_000;
/// Manifests read at the same time.
const READERS: usize = 4;

/// The packs that manifests refer to. Only their names: 16 bytes for each pack of the stanza.
#[derive(Debug, Default)]
pub(super) struct Needed {
    seen: BTreeSet<String>,
    packs: HashSet<PackId>,
}

impl Needed {
    /// Reads the manifests that it has not read yet, but for those of `gone`. Backups that go later only make it name too
    /// much.
    ///
    /// # Errors
    /// When one cannot be read, or there is one that the listing does not show: then nobody knows what it needs.
    pub(super) fn update(
        &mut self,
        repository: &Repository,
        monitor: &dyn Monitor,
        gone: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let mut labels = repository.labels_proved()?;
        labels.retain(|label| !self.seen.contains(label) && !gone(label));
        monitor.stage("reading manifests", 0);
        let (next, packs) = (AtomicUsize::new(0), Mutex::new(&mut self.packs));
        let read = || -> Result<()> {
            while let Some(label) = labels.get(next.fetch_add(1, Ordering::Relaxed)) {
                interrupt::check()?;
                let uses = repository.manifest_packs(label).map_err(|error| unreadable(label, error))?;
                packs.lock().extend(uses.iter().map(|of| of.pack));
            }
            Ok(())
        };
        let outcomes: Vec<Result<()>> = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS.min(labels.len())).map(|_| scope.spawn(read)).collect();
            let died = |_| Err(Error::new("a thread that read manifests died"));
            readers.into_iter().map(|reader| reader.join().unwrap_or_else(died)).collect()
        });
        outcomes.into_iter().collect::<Result<()>>()?;
        self.seen.extend(labels);
        Ok(())
    }

    pub(super) fn contains(&self, pack: &PackId) -> bool {
        self.packs.contains(pack)
    }
}

fn unreadable(label: &str, error: Error) -> Error {
    let is_lost = error.is_damage() || error.is_not_found();
    let unreadable =
        Error::new(format!("backup {label} cannot be read, so no pack may be removed: it may need any of them"))
            .source(error);
    match is_lost {
        true => unreadable.hint(format!(
            "run \"pgcairn verify\"; if backup {label} is lost, remove it with \"pgcairn expire --set {label}\""
        )),
        // of a store that could not be asked, it says nothing
        false => unreadable,
    }
}

/// One mark, as found.
#[derive(Debug)]
pub(super) struct Marked {
    pub(super) key: String,
    /// when it was written, by the store's clock
    pub(super) modified: i64,
    pub(super) packs: Vec<PackId>,
}

/// Every mark there is. One that is damaged counts as one of no packs: they are marked again.
pub(super) fn marks(repository: &Repository) -> Result<Vec<Marked>> {
    let mut marks = Vec::new();
    each_object(repository, &layout::marks(&repository.stanza), |object| {
        let packs = match repository.fetch_info::<Mark>(&object.key)? {
            Ok(mark) => mark.packs.iter().filter_map(|id| PackId::from_hex(id)).collect(),
            Err(error) => {
                tracing::warn!(%error, "a mark cannot be read; what it named is marked again");
                Vec::new()
            }
        };
        marks.push(Marked { key: object.key.clone(), modified: object.modified, packs });
        Ok(())
    })?;
    Ok(marks)
}

/// Takes back the marks of packs that these backups need, which are about to go. A backup may have taken up packs that nobody
/// needed, as those of one that died: that nobody needs them counts from its end on, not from before it.
pub(super) fn forget(repository: &Repository, lock: &Lock, labels: &[String]) -> Result<()> {
    let mut stale = if labels.is_empty() { Vec::new() } else { marks(repository)? };
    if stale.is_empty() {
        return Ok(());
    }
    let mut needed = HashSet::new();
    for label in labels {
        match repository.manifest_packs(label) {
            Ok(uses) => needed.extend(uses.iter().map(|of| of.pack)),
            // nobody knows what it needs: every mark may be of that
            Err(error) if error.is_damage() => return take_away(repository, lock, &stale),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    stale.retain(|mark| mark.packs.iter().any(|pack| needed.contains(pack)));
    take_away(repository, lock, &stale)
}

fn take_away(repository: &Repository, lock: &Lock, marks: &[Marked]) -> Result<()> {
    let keys: Vec<String> = marks.iter().map(|mark| mark.key.clone()).collect();
    for batch in keys.chunks(BATCH) {
        lock.check()?;
        repository.store.delete(batch)?;
    }
    Ok(())
}

/// What a look at all packs found.
#[derive(Debug, Default)]
pub(super) struct Packs {
    /// packs there are
    pub(super) total: u64,
    /// those that no manifest refers to and no running backup can have written, with their bytes
    pub(super) unneeded: HashMap<PackId, u64>,
}

/// Lists all packs. Those written at `horizon` or later, by the store's clock, may belong to a backup that runs.
pub(super) fn look(repository: &Repository, needed: &Needed, horizon: i64) -> Result<Packs> {
    let mut packs = Packs::default();
    each_object(repository, &layout::packs(&repository.stanza), |object| {
        let Some(id) = object.key.rsplit('/').next().and_then(PackId::from_hex) else { return Ok(()) };
        packs.total += 1;
        if !needed.contains(&id) && object.modified < horizon {
            packs.unneeded.insert(id, object.size);
        }
        Ok(())
    })?;
    Ok(packs)
}

/// Writes marks for the packs of `unneeded` that have none yet; returns how many.
pub(super) fn mark(repository: &Repository, unneeded: &HashMap<PackId, u64>, marks: &[Marked]) -> Result<u64> {
    let known: HashSet<&PackId> = marks.iter().flat_map(|mark| &mark.packs).collect();
    let mut fresh: Vec<PackId> = unneeded.keys().filter(|id| !known.contains(id)).copied().collect();
    fresh.sort_unstable();
    for part in fresh.chunks(MARK_PACKS_MAX) {
        let mark = Mark { packs: part.iter().map(PackId::to_string).collect() };
        let mut name = [0; 16];
        getrandom::fill(&mut name).context(|| "cannot get random bytes".into())?;
        let key = format!("{}{}", layout::marks(&repository.stanza), PackId(name));
        repository.store.put(&key, Body::Bytes(repository.encode_info(&key, &mark)?))?;
    }
    Ok(fresh.len() as u64)
}

/// Calls `each` with every object below `prefix`.
pub(crate) fn each_object(
    repository: &Repository,
    prefix: &str,
    mut each: impl FnMut(&Listed) -> Result<()>,
) -> Result<()> {
    let mut after = None;
    loop {
        interrupt::check()?;
        let page = repository.store.list(prefix, after.as_deref())?;
        page.objects.iter().try_for_each(&mut each)?;
        after = page.next;
        if after.is_none() {
            return Ok(());
        }
    }
}
