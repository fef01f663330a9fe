//! Packs in which damage was found.

use std::collections::HashSet;

use super::Repository;
use crate::error::Result;
use crate::format::chunk::PackId;
use crate::format::info::Harm;
use crate::repo::layout;

impl Repository {
    /// Packs on which nothing new may be built: verify found damage in them. What a new backup has in them it stores anew.
    pub fn harmed_packs(&self) -> Result<HashSet<PackId>> {
        Ok(self.harm_notes()?.into_iter().flat_map(|(_, packs)| packs).collect())
    }

    /// The notes themselves: key, and packs. A damaged one names none.
    pub fn harm_notes(&self) -> Result<Vec<(String, Vec<PackId>)>> {
        let (mut notes, mut after) = (Vec::new(), None);
        loop {
            let page = self.store.list(&layout::harms(&self.stanza), after.as_deref())?;
            for object in page.objects {
                let harm = match self.fetch_info::<Harm>(&object.key) {
                    Ok(harm) => harm.map(|harm| harm.packs).unwrap_or_default(),
                    Err(error) if error.is_not_found() => continue,
                    Err(error) => return Err(error),
                };
                notes.push((object.key, harm.iter().filter_map(|id| PackId::from_hex(id)).collect()));
            }
            after = page.next;
            if after.is_none() {
                return Ok(notes);
            }
        }
    }
}
