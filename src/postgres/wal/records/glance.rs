//! A glance at WAL that says whether it is worth walking through for a rare record.

use super::{RECORD_HEADER_BYTES, RESTORE_POINT_BYTES, TABLESPACE, TABLESPACE_BYTES, is_restore_point, u32_at};
use crate::postgres::wal::header::LONG_PAGE_HEADER_BYTES;

/// Bytes that are looked at together for one, from the cache.
const GLANCE_BYTES: usize = 4096;

/// Whether a restore point may begin in these whole pages of WAL. Where none begins the answer is mostly, but not always, no.
pub fn may_begin_restore_point(bytes: &[u8], page: usize) -> bool {
    let begins = |at: usize| {
        let in_page = page.saturating_sub(at % page.max(1));
        let head = &bytes[at..bytes.len().min(at + in_page.min(RECORD_HEADER_BYTES))];
        // a page's end may cut the header
        head.len() < RECORD_HEADER_BYTES || is_restore_point(head)
    };
    let lengths = |block| <[u8]>::as_chunks::<8>(block).0.iter().map(|eight| u64::from_le_bytes(*eight) as u32);
    bytes.chunks(GLANCE_BYTES).enumerate().any(|(number, block)| {
        // most have none: to look at all of a block, without a branch, is several times as fast
        lengths(block).fold(false, |any, length| any | (length == RESTORE_POINT_BYTES))
            && lengths(block)
                .enumerate()
                .any(|(eight, length)| length == RESTORE_POINT_BYTES && begins(number * GLANCE_BYTES + eight * 8))
    })
}

/// Whether a record that creates a tablespace may begin, or go on, in these whole pages of WAL. Where none does the answer is
/// mostly, but not always, no.
pub fn may_create_tablespace(bytes: &[u8], page: usize) -> bool {
    // the last eight bytes of the record's header: info, of which the lower half is the WAL's own, manager, padding, CRC
    let ends_header = |word: &[u8; 8]| u64::from_le_bytes(*word) as u32 & !0x0F == u32::from(TABLESPACE) << 8;
    bytes.chunks(GLANCE_BYTES).enumerate().any(|(number, block)| {
        let words = <[u8]>::as_chunks::<8>(block).0;
        let is_one = |at: usize| {
            // a page's end may have cut the header
            let is_whole = at % page.max(1) >= LONG_PAGE_HEADER_BYTES + 16;
            !is_whole || u32_at(bytes, at - 16).is_some_and(|length| TABLESPACE_BYTES.contains(&length))
        };
        words.iter().fold(false, |any, word| any | ends_header(word))
            && words
                .iter()
                .enumerate()
                .any(|(eight, word)| ends_header(word) && is_one(number * GLANCE_BYTES + eight * 8))
    })
}
