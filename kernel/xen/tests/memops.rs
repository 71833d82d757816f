//! The image's own memory functions, `boot/memops.s`, against the obvious definition.

use std::arch::global_asm;

global_asm!(include_str!("../../../boot/memops.s"));

unsafe extern "C" {
    fn stubdom_memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8;
    fn stubdom_memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8;
    fn stubdom_memset(to: *mut u8, byte: i32, len: usize) -> *mut u8;
    fn stubdom_memcmp(a: *const u8, b: *const u8, len: usize) -> i32;
    fn stubdom_strlen(text: *const u8) -> usize;
}

fn pattern() -> Vec<u8> {
    (0..96u32).map(|i| (i * 37 % 251) as u8).collect()
}

#[test]
fn copies_of_every_length_and_overlap_are_right() {
    for len in 0..40 {
        for (to, from) in [(0, 40), (40, 0), (10, 12), (12, 10), (10, 10), (0, 39), (39, 0)] {
            let mut ours = pattern();
            let mut theirs = pattern();
            theirs.copy_within(from..from + len, to);
            let base = ours.as_mut_ptr();
            // SAFETY: both ranges lie in the 96 bytes.
            let answer = unsafe { stubdom_memmove(base.wrapping_add(to), base.wrapping_add(from), len) };
            assert_eq!(answer, base.wrapping_add(to));
            assert_eq!(ours, theirs, "move {len} bytes from {from} to {to}");
            if to.abs_diff(from) >= len {
                let mut ours = pattern();
                let base = ours.as_mut_ptr();
                // SAFETY: both ranges lie in the 96 bytes and do not overlap.
                let answer = unsafe { stubdom_memcpy(base.wrapping_add(to), base.wrapping_add(from), len) };
                assert_eq!(answer, base.wrapping_add(to));
                assert_eq!(ours, theirs, "copy {len} bytes from {from} to {to}");
            }
        }
    }
}

#[test]
fn set_fills_exactly_the_range_with_the_low_byte() {
    for len in 0..20 {
        let mut ours = pattern();
        let mut theirs = pattern();
        theirs[7..7 + len].fill(0xab);
        // SAFETY: the range lies in the 96 bytes.
        unsafe { stubdom_memset(ours.as_mut_ptr().wrapping_add(7), 0x1ab, len) };
        assert_eq!(ours, theirs);
    }
}

#[test]
fn comparison_has_the_sign_of_the_first_difference_as_unsigned_bytes() {
    let cases: [(&[u8], &[u8]); 6] =
        [(b"", b""), (b"a", b"a"), (b"a", b"b"), (b"\xff", b"\x01"), (b"ab\x00c", b"ab\x00d"), (b"zz", b"az")];
    for (a, b) in cases {
        // SAFETY: both slices have the length given.
        let sign = unsafe { stubdom_memcmp(a.as_ptr(), b.as_ptr(), a.len()) }.signum();
        assert_eq!(sign, a.cmp(b) as i32, "{a:?} {b:?}");
    }
}

#[test]
fn a_string_ends_at_its_zero_byte() {
    for text in [c"", c"a", c"hello"] {
        // SAFETY: C strings.
        assert_eq!(unsafe { stubdom_strlen(text.as_ptr().cast()) }, text.count_bytes());
    }
}
