//! Counter-based random numbers: a pure function of a key and a counter, so that a number can be
//! made again anywhere, in any order.

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// One key for several parts; their order counts.
pub(crate) fn key(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |key, &part| mix(key ^ mix(part)))
}

/// 32 random bits for `counter`: a two-round multiply and xor-shift hash (Wellons' hash-prospector
/// constants) with half of the key before each round. Every step is one vector instruction.
#[inline(always)]
pub(crate) fn bits(key: u64, counter: u32) -> u32 {
    let mut x = counter.wrapping_mul(0x9e37_79b1).wrapping_add(key as u32);
    x ^= x >> 16;
    x = x.wrapping_mul(0x21f0_aaad);
    x ^= x >> 15;
    x ^= (key >> 32) as u32;
    x = x.wrapping_mul(0xd35a_2d97);
    x ^ (x >> 15)
}
