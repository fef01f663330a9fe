//! The packs that are there.

use std::collections::HashMap;

use super::{Repository, layout};
use crate::error::Result;
use crate::format::FormatError;
use crate::format::chunk::PackId;
use crate::format::manifest::PackUse;

impl Repository {
    /// Every pack below `chunk/` and its length: a page of a listing for a thousand of them.
    pub fn packs(&self) -> Result<HashMap<PackId, u64>> {
        self.packs_since(i64::MIN)
    }

    /// The same, of those written at this second (of the store's clock) or later.
    pub fn packs_since(&self, second: i64) -> Result<HashMap<PackId, u64>> {
        let prefix = layout::packs(&self.stanza);
        let (mut packs, mut after) = (HashMap::new(), None);
        loop {
            let page = self.store.list(&prefix, after.as_deref())?;
            let id = |key: &str| key.rsplit('/').next().and_then(PackId::from_hex);
            let young = page.objects.iter().filter(|object| object.modified >= second);
            packs.extend(young.filter_map(|object| Some((id(&object.key)?, object.size))));
            match page.next {
                Some(next) => after = Some(next),
                None => return Ok(packs),
            }
        }
    }

    /// Fails, as damage, unless all of these packs are there in their length.
    pub fn prove_packs(&self, needed: &[PackUse]) -> Result<()> {
        if needed.is_empty() {
            return Ok(());
        }
        let present = self.packs()?;
        for PackUse { pack, size, .. } in needed {
            let what = match present.get(pack) {
                Some(found) if found == size => continue,
                Some(found) => format!("it has {found} bytes, and had {size} when it was written"),
                None => "the object is missing".into(),
            };
            return Err(FormatError::new(&layout::pack(&self.stanza, *pack), 0, what).into());
        }
        Ok(())
    }
}
