//! What was found is noted in the repository, so that new backups store anew what lies in harmed packs.

use std::collections::HashSet;

use super::packs::Found;
use crate::error::{Context, Result};
use crate::format::chunk::PackId;
use crate::format::info::Harm;
use crate::repo::{Repository, layout};
use crate::store::Body;

/// Notes harmed packs, and after a full run forgets those that are whole again or that nobody needs.
pub(super) fn remember(repository: &Repository, found: &Found, quick: bool) -> Result<()> {
    let noted = repository.harm_notes()?;
    let known: HashSet<PackId> = noted.iter().flat_map(|(_, packs)| packs).copied().collect();
    let mut fresh: Vec<PackId> = found.harmed().filter(|pack| !known.contains(pack)).copied().collect();
    if !fresh.is_empty() {
        fresh.sort_unstable();
        let harm = Harm { packs: fresh.iter().map(PackId::to_string).collect() };
        let mut name = [0; 16];
        getrandom::fill(&mut name).context(|| "cannot get random bytes".into())?;
        let key = format!("{}{}", layout::harms(&repository.stanza), PackId(name));
        repository.store.put(&key, Body::Bytes(repository.encode_info(&key, &harm)?))?;
    }
    let harmed: HashSet<&PackId> = found.harmed().collect();
    let over = |packs: &Vec<PackId>| !packs.iter().any(|pack| harmed.contains(pack));
    let gone: Vec<String> = noted.into_iter().filter(|(_, packs)| over(packs)).map(|(key, _)| key).collect();
    match quick || gone.is_empty() {
        true => Ok(()),
        false => Ok(repository.store.delete(&gone)?),
    }
}
