//! A relation's page: its header, and the checksum that tells whether it is as PostgreSQL wrote it.
//!
//! The checksum is 32 sums side by side over the page's 32-bit words, each an FNV-1a with a shift that mixes the high
//! bits down; the 32 are then folded into one, the block number is mixed in so that a page in the wrong place is
//! noticed, and the result is reduced to 1..=65535. PostgreSQL chose this so that the sums fit vector registers, and
//! the compiler sees to it where vectors can be multiplied: baseline x86-64 cannot, hence the choice at run time.

use super::lsn::Lsn;

/// Sums kept side by side.
const SUMS: usize = 32;
/// A row: one word for each sum.
const ROW_BYTES: usize = SUMS * 4;
const FNV_PRIME: u32 = 16_777_619;
/// The checksum's own place in the header, taken as zero by the checksum.
const CHECKSUM_AT: usize = 8;

/// Where each sum starts.
const OFFSET_BASIS: [u32; SUMS] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// What a page turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// as PostgreSQL wrote it
    Ok,
    /// all zeros: allocated, never written; it carries no checksum
    New,
    /// not as PostgreSQL wrote it: torn by a write under way, or damaged
    Mismatch {
        /// the WAL position of the page's last change, as far as its header can be believed
        lsn: Lsn,
        /// the checksum in the page
        stored: u16,
        /// the checksum of the page; equal to the stored one when the header alone is blank
        computed: u16,
    },
}

/// The WAL position of the page's last change.
///
/// # Panics
/// When the page has fewer than 8 bytes.
pub fn lsn(page: &[u8]) -> Lsn {
    // two 32-bit halves, the high one first, each in the machine's byte order
    Lsn(u64::from(u32_at(page, 0)) << 32 | u64::from(u32_at(page, 4)))
}

/// The checksum stored in the page.
///
/// # Panics
/// When the page has fewer than 10 bytes.
pub fn stored_checksum(page: &[u8]) -> u16 {
    u16::from_le_bytes([page[CHECKSUM_AT], page[CHECKSUM_AT + 1]])
}

/// Whether the header says that the page was never written: its end of free space, `pd_upper`, is 0.
///
/// # Panics
/// When the page has fewer than 16 bytes.
pub fn is_new(page: &[u8]) -> bool {
    page[14] == 0 && page[15] == 0
}

/// The checksum of a page at `block`, counted from the start of the relation, not of its file.
///
/// # Panics
/// When the length is not a page's: a power of two from 1 KiB to 32 KiB.
pub fn checksum(page: &[u8], block: u32) -> u16 {
    assert!(page.len().is_power_of_two() && (1024..=32 << 10).contains(&page.len()), "{} byte page", page.len());
    let folded = fold(page) ^ block;
    (folded % 65535) as u16 + 1
}

/// Checks a page at `block`, counted from the start of the relation, not of its file.
///
/// A page whose header is blank but whose body is not is a mismatch, as for a server that reads it.
///
/// # Panics
/// When the length is not a page's: a power of two from 1 KiB to 32 KiB.
pub fn verify(page: &[u8], block: u32) -> Verdict {
    if is_new(page) && is_zero(page) {
        return Verdict::New;
    }
    let (stored, computed) = (stored_checksum(page), checksum(page, block));
    if stored == computed && !is_new(page) {
        return Verdict::Ok;
    }
    Verdict::Mismatch { lsn: lsn(page), stored, computed }
}

/// Row by row, so that the compiler can look at many bytes at once.
fn is_zero(page: &[u8]) -> bool {
    let (rows, rest) = page.as_chunks::<ROW_BYTES>();
    rows.iter().all(|row| row.iter().fold(0, |any, byte| any | byte) == 0) && rest.iter().all(|&byte| byte == 0)
}

fn u32_at(page: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

#[cfg(target_arch = "x86_64")]
fn fold(page: &[u8]) -> u32 {
    #[target_feature(enable = "avx2")]
    fn with_avx2(page: &[u8]) -> u32 {
        fold_portable(page)
    }

    if !std::arch::is_x86_feature_detected!("avx2") {
        return fold_portable(page);
    }
    #[expect(unsafe_code, reason = "a function compiled for AVX2 can be called in no other way")]
    // SAFETY: the processor has AVX2, as just asked
    unsafe {
        with_avx2(page)
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn fold(page: &[u8]) -> u32 {
    fold_portable(page)
}

/// The 32 sums of a page, folded into one word.
#[inline(always)]
fn fold_portable(page: &[u8]) -> u32 {
    let mut sums = OFFSET_BASIS;
    let (first, rest) = page.split_at(ROW_BYTES);
    let mut header_row = [0; ROW_BYTES];
    header_row.copy_from_slice(first);
    header_row[CHECKSUM_AT..CHECKSUM_AT + 2].fill(0);
    add_row(&mut sums, &header_row);
    let (rows, _) = rest.as_chunks::<ROW_BYTES>();
    for row in rows {
        add_row(&mut sums, row);
    }
    // two rows of zeros, so that the last words are mixed as well as the first
    add_row(&mut sums, &[0; ROW_BYTES]);
    add_row(&mut sums, &[0; ROW_BYTES]);
    sums.into_iter().fold(0, |folded, sum| folded ^ sum)
}

#[inline(always)]
fn add_row(sums: &mut [u32; SUMS], row: &[u8; ROW_BYTES]) {
    let (words, _) = row.as_chunks::<4>();
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ u32::from_le_bytes(*word);
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Block 7 of a table of clusters made with `initdb --data-checksums`.
    const PAGES: [&[u8]; 2] = [include_bytes!("fixtures/page_15_block_7"), include_bytes!("fixtures/page_18_block_7")];

    #[test]
    fn accepts_pages_of_real_servers_in_their_place_only() {
        for page in PAGES {
            assert_eq!(verify(page, 7), Verdict::Ok);
            assert_eq!(checksum(page, 7), stored_checksum(page));
            assert!(lsn(page).is_valid());
            let (stored, computed) = (stored_checksum(page), checksum(page, 8));
            assert_eq!(verify(page, 8), Verdict::Mismatch { lsn: lsn(page), stored, computed });
        }
    }

    #[test]
    fn the_vector_code_computes_the_same() {
        for page in PAGES {
            assert_eq!(fold(page), fold_portable(page));
        }
    }

    #[test]
    fn zeros_are_a_new_page_but_a_blank_header_alone_is_not() {
        assert_eq!(verify(&[0; 8192], 0), Verdict::New);
        let mut page = PAGES[0].to_vec();
        page[..24].fill(0);
        assert!(matches!(verify(&page, 7), Verdict::Mismatch { lsn: Lsn::INVALID, stored: 0, .. }));
        let computed = checksum(&page, 7);
        page[8..10].copy_from_slice(&computed.to_le_bytes());
        assert!(matches!(verify(&page, 7), Verdict::Mismatch { stored, .. } if stored == computed));
    }

    #[test]
    fn every_page_size_is_summed() {
        let sums: Vec<u16> = (10..=15).map(|power| checksum(&vec![1; 1 << power], 0)).collect();
        assert!(sums.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn flipped_bits_are_mismatches() {
        let mut page = PAGES[0].to_vec();
        let mut missed = 0;
        for bit in (0..8 * 8192).step_by(7) {
            page[bit / 8] ^= 1 << (bit % 8);
            missed += usize::from(verify(&page, 7) == Verdict::Ok);
            page[bit / 8] ^= 1 << (bit % 8);
        }
        // 16 bits let one in 65535 pass
        assert!(missed <= 2, "{missed} of 9363");
    }
}
