//! Packs: what is in them is proved chunk by chunk, and kept as fingerprints to which manifests are held.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::{Checked, Findings, VerifyOptions, each, finding};
use crate::error::{Context, Result};
use crate::format::FormatError;
use crate::format::chunk::{ChunkRef, Decoder, PackId};
use crate::format::pack::{HEADER_LEN, Header, Pack, TRAILER_LEN, Trailer};
use crate::progress::Monitor;
use crate::repo::reread::{self, Reads};
use crate::repo::{Repository, layout};

/// What is known of the packs that backups need.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// fingerprints of the sound chunks of each pack, ascending; of no pack in a quick run
    sound: HashMap<PackId, Box<[u64]>>,
    /// packs with something wrong; a chunk in one that is not in `sound` either is to be looked at by itself
    harmed: HashMap<PackId, String>,
    /// chunks of harmed packs that were looked at: what is wrong with them
    alone: Mutex<HashMap<(PackId, u32), Option<String>>>,
    quick: bool,
}

/// What a chunk is found to be.
pub(super) enum Verdict {
    Sound,
    /// what is wrong
    Harmed(String),
}

impl Found {
    /// Every pack is whole, as far as was looked.
    pub(super) fn is_sound(&self) -> bool {
        self.harmed.is_empty()
    }

    /// Packs with something wrong.
    pub(super) fn harmed(&self) -> impl Iterator<Item = &PackId> {
        self.harmed.keys()
    }

    /// Whether a chunk is where a manifest says.
    pub(super) fn judge(&self, repository: &Repository, decoder: &mut Decoder, chunk: &ChunkRef) -> Result<Verdict> {
        if let Some(prints) = self.sound.get(&chunk.pack)
            && prints.binary_search(&fingerprint(chunk)).is_ok()
        {
            return Ok(Verdict::Sound);
        }
        match self.harmed.get(&chunk.pack) {
            None if self.quick => Ok(Verdict::Sound),
            None => Ok(Verdict::Harmed(format!("has no such chunk at byte {}", chunk.offset))),
            Some(_) => self.look(repository, decoder, chunk),
        }
    }

    /// A chunk of a harmed pack: readers take it by its place, so it may be whole though the pack is not.
    fn look(&self, repository: &Repository, decoder: &mut Decoder, chunk: &ChunkRef) -> Result<Verdict> {
        let place = (chunk.pack, chunk.offset);
        if let Some(known) = self.alone.lock().get(&place) {
            return Ok(known.clone().map_or(Verdict::Sound, Verdict::Harmed));
        }
        let what = match repository.fetch_chunk(decoder, chunk) {
            Ok(_) => None,
            Err(error) => Some(finding(error, "")?.1),
        };
        self.alone.lock().insert(place, what.clone());
        Ok(what.map_or(Verdict::Sound, Verdict::Harmed))
    }
}

/// 64 bits of everything a manifest says of a chunk: enough to find a mistake, and the id itself was proved.
fn fingerprint(chunk: &ChunkRef) -> u64 {
    let mut id = [0; 8];
    id.copy_from_slice(&chunk.id.0[..8]);
    let place = (u64::from(chunk.offset) << 32) | u64::from(chunk.stored_len);
    let mixed =
        place.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(chunk.plain_len).wrapping_mul(0xc2b2_ae3d_27d4_eb4f);
    u64::from_le_bytes(id) ^ mixed.rotate_left(29)
}

/// Compares what is needed with what is listed: packs that are missing, or cannot be whole.
pub(super) fn compare(
    repository: &Repository,
    needed: &HashMap<PackId, u64>,
    there: &HashMap<PackId, u64>,
    findings: &Findings,
) -> Result<Found> {
    let mut found = Found { quick: true, ..Found::default() };
    for (id, size) in needed {
        let key = layout::pack(&repository.stanza, *id);
        if there.get(id).is_some_and(|bytes| bytes >= size) {
            continue;
        }
        // a listing alone does not condemn it
        let what = match repository.store.size(&key)? {
            None => "is missing".to_owned(),
            Some(bytes) if bytes < *size => format!("has {bytes} bytes, backups need {size} of it"),
            Some(_) => continue,
        };
        findings.harm(&key, what.clone());
        found.harmed.insert(*id, what);
    }
    Ok(found)
}

/// Reads every pack that is needed.
pub(super) fn read(
    repository: &Repository,
    needed: &HashMap<PackId, u64>,
    there: &HashMap<PackId, u64>,
    findings: &Findings,
    options: &VerifyOptions,
    monitor: &dyn Monitor,
    checked: &mut Checked,
) -> Result<Found> {
    let mut found = compare(repository, needed, there, findings)?;
    found.quick = false;
    let listed = |id: &PackId, size: &u64| there.get(id).copied().or((!found.harmed.contains_key(id)).then_some(*size));
    let mut packs: Vec<(PackId, u64)> = needed.iter().filter_map(|(id, size)| Some((*id, listed(id, size)?))).collect();
    packs.sort_unstable();
    monitor.stage("reading packs", packs.iter().map(|(_, size)| size).sum());
    let (sound, harmed) = (Mutex::new(HashMap::new()), Mutex::new(HashMap::new()));
    let totals = Mutex::new(*checked);
    each(&packs, options.process_max, |(id, size)| {
        let key = layout::pack(&repository.stanza, *id);
        let look = |reads: &Reads<'_>| match reads.get(&key) {
            Ok(bytes) => prove(repository, *id, &key, &bytes),
            Err(error) => Ok(Proved { chunks: Vec::new(), harm: Some(finding(error.into(), &key)?.1) }),
        };
        let is_harmed = |proved: &Result<Proved>| proved.as_ref().is_ok_and(|proved| proved.harm.is_some());
        let proved = reread::judged(&*repository.store, look, is_harmed)??;
        let mut totals = totals.lock();
        totals.packs += 1;
        totals.pack_bytes += size;
        totals.chunks += proved.chunks.len() as u64;
        drop(totals);
        let mut prints: Vec<u64> = proved.chunks.iter().map(fingerprint).collect();
        prints.sort_unstable();
        sound.lock().insert(*id, prints.into_boxed_slice());
        if let Some(what) = proved.harm {
            findings.harm(&key, what.clone());
            harmed.lock().insert(*id, what);
        }
        monitor.advance(*size);
        Ok(())
    })?;
    *checked = totals.into_inner();
    found.sound = sound.into_inner();
    found.harmed.extend(harmed.into_inner());
    Ok(found)
}

/// What one pack came to.
struct Proved {
    /// chunks that are what they should be
    chunks: Vec<ChunkRef>,
    harm: Option<String>,
}

fn prove(repository: &Repository, id: PackId, key: &str, bytes: &[u8]) -> Result<Proved> {
    let told = |error: &FormatError| format!("byte {}: {}", error.offset, error.what);
    let (chunks, mut harm) = match Pack::parse(key, bytes) {
        Ok(pack) => (pack.chunks, (pack.header.id != id).then(|| format!("it is the pack {}", pack.header.id))),
        // one byte may be wrong and the footer whole: then it is seen which chunk has it
        Err(error) => (footer(id, key, bytes).unwrap_or_default(), Some(told(&error))),
    };
    let mut decoder = Decoder::new().context(|| "cannot set up zstd".into())?;
    let (mut sound, mut first) = (Vec::with_capacity(chunks.len()), None);
    for chunk in chunks {
        let stored = &bytes[chunk.offset as usize..chunk.end() as usize];
        match decoder.prove(&repository.keys, key, &chunk, stored) {
            Ok(_) => sound.push(chunk),
            Err(error) => _ = first.get_or_insert_with(|| told(&error)),
        }
    }
    // the chunk says more precisely where
    harm = first.or(harm);
    Ok(Proved { chunks: sound, harm })
}

/// The chunks a pack lists, if header and footer are whole.
fn footer(id: PackId, key: &str, bytes: &[u8]) -> Option<Vec<ChunkRef>> {
    let tail = bytes.len().checked_sub(TRAILER_LEN).filter(|tail| *tail >= HEADER_LEN)?;
    Header::parse(key, &bytes[..HEADER_LEN]).ok().filter(|header| header.id == id)?;
    let trailer = Trailer::parse(key, bytes.len() as u64, &bytes[tail..]).ok()?;
    let from = usize::try_from(trailer.footer_offset).ok()?;
    trailer.footer(key, id, bytes.get(from..tail)?).ok()
}
