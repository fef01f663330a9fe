//! Packs in which damage was found.

use std::collections::{HashMap, HashSet};

use super::proof::Doubt;
use super::{Repository, layout};
use crate::error::Result;
use crate::format::chunk::PackId;
use crate::format::info::Harm;
use crate::format::manifest::PackUse;

/// What is known of all packs without reading one.
#[derive(Debug)]
pub struct PacksKnown {
    /// those that are there, and their lengths
    present: HashMap<PackId, u64>,
    /// those in which verify found damage
    harmed: HashSet<PackId>,
}

impl Repository {
    /// Packs on which nothing new may be built: verify found damage in them. What a new backup has in them it stores anew.
    pub fn harmed_packs(&self) -> Result<HashSet<PackId>> {
        Ok(self.harm_notes()?.into_iter().flat_map(|(_, packs)| packs).collect())
    }

    /// Lists all packs, and reads the notes of damage.
    pub fn packs_known(&self) -> Result<PacksKnown> {
        Ok(PacksKnown { present: self.packs()?, harmed: self.harmed_packs()? })
    }

    /// What speaks against the packs of a backup: one is missing, or damage was found in it.
    ///
    /// # Errors
    /// When the store fails, so that nobody knows.
    pub fn packs_doubt(&self, label: &str, known: &PacksKnown) -> Result<Option<Doubt>> {
        match self.manifest_packs(label) {
            Ok(uses) => Ok(uses.iter().find_map(|of| known.against(of)).map(|what| Doubt { segment: None, what })),
            Err(error) => Doubt::told(error).map(Some),
        }
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

impl PacksKnown {
    fn against(&self, PackUse { pack, size, .. }: &PackUse) -> Option<String> {
        match self.present.get(pack) {
            None => Some(format!("pack {pack} is missing")),
            Some(found) if found != size => {
                Some(format!("pack {pack} has {found} bytes, and had {size} when it was written"))
            }
            Some(_) => self.harmed.contains(pack).then(|| format!("verify found damage in pack {pack}")),
        }
    }
}
