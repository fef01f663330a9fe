//! Another passphrase for the same secret: nothing that is stored changes but the object that wraps it.

use super::unlock::Unlocked;
use super::{Repository, layout};
use crate::error::{Error, Result};
use crate::format::cipher_key::{Passphrase, Secret};
use crate::format::info::LockKind;

/// Makes `new` the passphrase. One that was interrupted before its end leaves a stanza that both open; run again, with either,
/// it ends what was begun.
///
/// # Errors
/// When `old` is not the passphrase, or the stanza is not encrypted, or somebody else works on what the stanza is.
pub fn change_passphrase(repository: &Repository, old: &Passphrase, new: &Passphrase) -> Result<()> {
    let opened = Repository::open(repository.store.clone(), &repository.stanza, Some(old))?;
    let lock = opened.lock(LockKind::Stanza, "repo passwd")?;
    // looked at again under the lock: another change may just have ended
    let Some(Unlocked { secret, place }) = opened.unlock(old)? else {
        return Err(Error::new(format!("the key of stanza {} is gone", opened.stanza)));
    };
    let places = layout::secret_places(&opened.stanza);
    let begun = begun(&opened, &places, &secret, new)?;
    let free = places.iter().find(|other| **other != place);
    let Some(kept) = begun.or(free) else {
        return Err(Error::new(format!("the key of stanza {} is at {place}", opened.stanza)));
    };
    if begun.is_none() {
        lock.check()?;
        opened.write_secret(kept, &secret, new)?;
    }
    lock.check()?;
    let others: Vec<String> = places.iter().filter(|place| *place != kept).cloned().collect();
    Ok(opened.store.delete(&others)?)
}

/// The place where a change that was interrupted has put the secret for `new` already.
fn begun<'a>(
    repository: &Repository,
    places: &'a [String],
    secret: &Secret,
    new: &Passphrase,
) -> Result<Option<&'a String>> {
    for place in places {
        match repository.unlock_at(place, new) {
            Ok(Some(Some(found))) if found == *secret => return Ok(Some(place)),
            Ok(_) => {}
            // what nobody can read is replaced
            Err(error) if error.is_damage() => {
                tracing::warn!(place, %error, "this place is used for the new passphrase")
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
