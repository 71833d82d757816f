//! The messages between the driver domain and `xl-pciback serve` in dom0, byte by byte. Both ends use this file, so
//! there is one place that knows the layout, and the tests below fix it.
//!
//! Every message has a fixed size and travels whole. Little endian; bytes without a meaning are 0, and a message in
//! which they are not is refused, as is every number outside its range: [`Request::decode`] is the first thing
//! dom0 does with what a driver domain says.
//!
//! ```text
//! request, driver domain to dom0          answer, dom0 to driver domain
//!  0 u32 session                           0 u32 session
//!  4 u32 sequence, from 1                  4 u32 sequence of the request; 0: hello
//!  8 u32 function, as pci_sbdf_t           8 u32 errno, positive; 0: done
//! 12 u8  operation                        12 u32 value: a pirq; 1 or 0; of a hello, the version
//! 13 u8  width in bytes, or vectors
//! 14 u16 guest
//! 16 u16 offset, or entry
//! 18 u16 0
//! 20 u32 value, or pirq, or 1 for a reset of all on the bus
//! 24 u64 table base
//! ```
//!
//! dom0 speaks first, with a hello that names a session and the version. A request carries the session it belongs to;
//! after another hello the requests of before are void. So neither end can take up the other's former life.

use crate::physdev::{Pirq, Vector};
use crate::platform::{DomId, Width};
use crate::sbdf::Sbdf;

/// Version of the protocol. Both ends must have the same.
pub const VERSION: u32 = 2;

/// Where the driver domain's end is announced, below its own directory: libxenvchan's `ring-ref` and `event-channel`.
pub const CHANNEL: &str = "data/pciback/channel";

/// Bytes of a request.
pub const REQUEST: usize = 32;
/// Bytes of an answer.
pub const ANSWER: usize = 16;

/// What the driver domain wants of dom0. All but [`Operation::Again`] are about the request's function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Writes configuration space, through Xen's intercept.
    Write {
        /// Below 4096, a multiple of the width.
        offset: u16,
        /// How wide.
        width: Width,
        /// No more bits than the width.
        value: u32,
    },
    /// PHYSDEVOP_prepare_msix.
    Prepare,
    /// PHYSDEVOP_release_msix.
    Release,
    /// PHYSDEVOP_restore_msi_ext.
    Restore,
    /// PHYSDEVOP_map_pirq of a message interrupt; the answer's value is the pirq.
    Map {
        /// The guest that has the function.
        guest: DomId,
        /// What is mapped.
        vector: Vector,
    },
    /// PHYSDEVOP_unmap_pirq.
    Unmap {
        /// The guest it was mapped for.
        guest: DomId,
        /// The (first) pirq.
        pirq: Pirq,
    },
    /// Starts the reset that dom0's kernel has for the function.
    Reset {
        /// One that reaches all functions on its bus, which are at rest.
        together: bool,
    },
    /// Asks whether that reset is done: the value is 1 then, 0 before.
    ResetDone,
    /// The driver domain knows of this mapping: see [`Operation::Settle`].
    Keep {
        /// The guest it was mapped for.
        guest: DomId,
        /// The (first) pirq.
        pirq: Pirq,
    },
    /// Unmaps every vector of the function that [`Operation::Keep`] did not name in this session: what was mapped while
    /// the answer was lost, or by a driver domain of before.
    Settle,
    /// Asks for another hello: an answer has not come in time.
    Again,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The session, from the hello.
    pub session: u32,
    /// Counts up from 1.
    pub sequence: u32,
    /// The function.
    pub function: Sbdf,
    /// What is to be done.
    pub operation: Operation,
}

/// A request that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// Numbers of the operations.
mod number {
    pub const WRITE: u8 = 1;
    pub const PREPARE: u8 = 2;
    pub const RELEASE: u8 = 3;
    pub const RESTORE: u8 = 4;
    pub const MAP_MSI: u8 = 5;
    pub const MAP_MULTI_MSI: u8 = 6;
    pub const MAP_MSIX: u8 = 7;
    pub const UNMAP: u8 = 8;
    pub const RESET: u8 = 9;
    pub const RESET_DONE: u8 = 10;
    pub const KEEP: u8 = 11;
    pub const SETTLE: u8 = 12;
    pub const AGAIN: u8 = 13;
}

/// The fields of a request besides session, sequence and function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Fields {
    operation: u8,
    small: u8,
    guest: u16,
    at: u16,
    value: u32,
    base: u64,
}

impl Fields {
    fn of(operation: Operation) -> Fields {
        let only = |operation| Fields { operation, ..Fields::default() };
        match operation {
            Operation::Write { offset, width, value } => {
                Fields { at: offset, small: width.bytes() as u8, value, ..only(number::WRITE) }
            }
            Operation::Prepare => only(number::PREPARE),
            Operation::Release => only(number::RELEASE),
            Operation::Restore => only(number::RESTORE),
            Operation::Map { guest, vector: Vector::Msi } => Fields { guest, ..only(number::MAP_MSI) },
            Operation::Map { guest, vector: Vector::MultiMsi { count } } => {
                Fields { guest, small: count, ..only(number::MAP_MULTI_MSI) }
            }
            Operation::Map { guest, vector: Vector::Msix { entry, table_base } } => {
                Fields { guest, at: entry, base: table_base, ..only(number::MAP_MSIX) }
            }
            Operation::Unmap { guest, pirq } => Fields { guest, value: pirq.cast_unsigned(), ..only(number::UNMAP) },
            Operation::Reset { together } => Fields { value: together.into(), ..only(number::RESET) },
            Operation::ResetDone => only(number::RESET_DONE),
            Operation::Keep { guest, pirq } => Fields { guest, value: pirq.cast_unsigned(), ..only(number::KEEP) },
            Operation::Settle => only(number::SETTLE),
            Operation::Again => only(number::AGAIN),
        }
    }

    fn operation(self) -> Option<Operation> {
        let Fields { operation, small, guest, at, value, base } = self;
        let found = match operation {
            number::WRITE => {
                let width = Width::from_bytes(small.into())?;
                let fits = at < 4096 && at.is_multiple_of(width.bytes()) && value & !width.mask() == 0;
                fits.then_some(Operation::Write { offset: at, width, value })?
            }
            number::PREPARE => Operation::Prepare,
            number::RELEASE => Operation::Release,
            number::RESTORE => Operation::Restore,
            number::MAP_MSI => Operation::Map { guest, vector: Vector::Msi },
            number::MAP_MULTI_MSI => {
                let count = Some(small).filter(|count| count.is_power_of_two() && (2..=32).contains(count))?;
                Operation::Map { guest, vector: Vector::MultiMsi { count } }
            }
            number::MAP_MSIX => {
                let entry = Some(at).filter(|entry| *entry < 2048)?;
                Operation::Map { guest, vector: Vector::Msix { entry, table_base: base } }
            }
            number::UNMAP => Operation::Unmap { guest, pirq: Pirq::try_from(value).ok()? },
            number::RESET => Operation::Reset { together: value == 1 },
            number::RESET_DONE => Operation::ResetDone,
            number::KEEP => Operation::Keep { guest, pirq: Pirq::try_from(value).ok()? },
            number::SETTLE => Operation::Settle,
            number::AGAIN => Operation::Again,
            _ => return None,
        };
        // What has no meaning for the operation is 0: what it says again is what it said.
        (Fields::of(found) == self).then_some(found)
    }
}

impl Request {
    /// As bytes.
    pub fn encode(&self) -> [u8; REQUEST] {
        let fields = Fields::of(self.operation);
        let mut bytes = [0; REQUEST];
        put(&mut bytes, 0, &self.session.to_le_bytes());
        put(&mut bytes, 4, &self.sequence.to_le_bytes());
        put(&mut bytes, 8, &self.function.packed().to_le_bytes());
        put(&mut bytes, 12, &[fields.operation, fields.small]);
        put(&mut bytes, 14, &fields.guest.to_le_bytes());
        put(&mut bytes, 16, &fields.at.to_le_bytes());
        put(&mut bytes, 20, &fields.value.to_le_bytes());
        put(&mut bytes, 24, &fields.base.to_le_bytes());
        bytes
    }

    /// From bytes that anybody may have written.
    ///
    /// # Errors
    /// [`Malformed`]: no operation has this form.
    pub fn decode(bytes: &[u8; REQUEST]) -> Result<Request, Malformed> {
        let sequence = dword(bytes, 4);
        let fields = Fields {
            operation: bytes[12],
            small: bytes[13],
            guest: word(bytes, 14),
            at: word(bytes, 16),
            value: dword(bytes, 20),
            base: u64::from(dword(bytes, 24)) | u64::from(dword(bytes, 28)) << 32,
        };
        let operation = fields.operation().filter(|_| word(bytes, 18) == 0 && sequence != 0).ok_or(Malformed)?;
        Ok(Request { session: dword(bytes, 0), sequence, function: Sbdf::from_packed(dword(bytes, 8)), operation })
    }
}

/// An answer, or with sequence 0 a hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The session.
    pub session: u32,
    /// The request's; 0 is a hello.
    pub sequence: u32,
    /// 0, or a positive errno of `xen/errno.h`.
    pub errno: u32,
    /// By operation.
    pub value: u32,
}

impl Answer {
    /// The first message of a session. `session` is not 0.
    pub const fn hello(session: u32) -> Answer {
        Answer { session, sequence: 0, errno: 0, value: VERSION }
    }

    /// Whether it begins a session.
    pub const fn is_hello(&self) -> bool {
        self.sequence == 0 && self.session != 0
    }

    /// As bytes.
    pub fn encode(&self) -> [u8; ANSWER] {
        let mut bytes = [0; ANSWER];
        put(&mut bytes, 0, &self.session.to_le_bytes());
        put(&mut bytes, 4, &self.sequence.to_le_bytes());
        put(&mut bytes, 8, &self.errno.to_le_bytes());
        put(&mut bytes, 12, &self.value.to_le_bytes());
        bytes
    }

    /// From bytes.
    pub fn decode(bytes: &[u8; ANSWER]) -> Answer {
        Answer { session: dword(bytes, 0), sequence: dword(bytes, 4), errno: dword(bytes, 8), value: dword(bytes, 12) }
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (place, byte) in bytes.iter_mut().skip(at).zip(value) {
        *place = *byte;
    }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from(word(bytes, at)) | u32::from(word(bytes, at + 2)) << 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn request(operation: Operation) -> Request {
        Request { session: 0x1122_3344, sequence: 0x5566_7788, function: Sbdf::from_packed(0x0002_012b), operation }
    }

    fn all() -> Vec<Operation> {
        std::vec![
            Operation::Write { offset: 0xffc, width: Width::Dword, value: 0x89ab_cdef },
            Operation::Write { offset: 0x4a, width: Width::Word, value: 0xc004 },
            Operation::Write { offset: 0x3c, width: Width::Byte, value: 0x0b },
            Operation::Prepare,
            Operation::Release,
            Operation::Restore,
            Operation::Map { guest: 7, vector: Vector::Msi },
            Operation::Map { guest: 7, vector: Vector::MultiMsi { count: 32 } },
            Operation::Map { guest: 7, vector: Vector::Msix { entry: 2047, table_base: 0x1122_3344_5566_7000 } },
            Operation::Unmap { guest: 7, pirq: 151 },
            Operation::Reset { together: false },
            Operation::Reset { together: true },
            Operation::ResetDone,
            Operation::Keep { guest: 7, pirq: 151 },
            Operation::Settle,
            Operation::Again,
        ]
    }

    #[test]
    fn the_layout_is_this() {
        let vector = Vector::Msix { entry: 0x0102, table_base: 0x1122_3344_5566_7788 };
        let bytes = request(Operation::Map { guest: 0x0a0b, vector }).encode();
        assert_eq!(
            bytes,
            [
                0x44, 0x33, 0x22, 0x11, 0x88, 0x77, 0x66, 0x55, 0x2b, 0x01, 0x02, 0x00, 7, 0, 0x0b, 0x0a, 0x02, 0x01,
                0, 0, 0, 0, 0, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11
            ]
        );
        let bytes = request(Operation::Write { offset: 0x4a, width: Width::Word, value: 0xc004 }).encode();
        assert_eq!(bytes[12..24], [1, 2, 0, 0, 0x4a, 0, 0, 0, 0x04, 0xc0, 0, 0]);
        let numbers: Vec<u8> = all().into_iter().map(|operation| request(operation).encode()[12]).collect();
        assert_eq!(numbers, [1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 10, 11, 12, 13]);
        let answer = Answer { session: 0x1122_3344, sequence: 1, errno: 28, value: 0x5566_7788 };
        assert_eq!(answer.encode(), [0x44, 0x33, 0x22, 0x11, 1, 0, 0, 0, 28, 0, 0, 0, 0x88, 0x77, 0x66, 0x55]);
        assert_eq!(Answer::decode(&answer.encode()), answer);
        assert_eq!(Answer::hello(9).encode()[4..16], [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn every_request_reads_back() {
        for operation in all() {
            assert_eq!(Request::decode(&request(operation).encode()), Ok(request(operation)), "{operation:?}");
        }
    }

    /// What a hostile driver domain may send: bytes at random, and good messages with single bytes changed. What is
    /// taken means exactly what was sent.
    #[test]
    fn arbitrary_bytes_are_refused_or_mean_what_they_say() {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let good: Vec<[u8; REQUEST]> = all().into_iter().map(|operation| request(operation).encode()).collect();
        let (mut taken, mut refused) = (0, 0);
        for round in 0..200_000 {
            let mut bytes = good[round % good.len()];
            if round % 3 == 0 {
                for chunk in bytes.chunks_mut(8) {
                    chunk.copy_from_slice(&random().to_le_bytes());
                }
                bytes[12] %= 15;
            } else {
                for _ in 0..=round % 2 {
                    bytes[(random() % 32) as usize] = random() as u8;
                }
            }
            match Request::decode(&bytes) {
                Ok(read) => {
                    taken += 1;
                    assert_eq!(read.encode(), bytes);
                    if let Operation::Write { offset, width, value } = read.operation {
                        assert!(offset < 4096 && offset.is_multiple_of(width.bytes()) && value & !width.mask() == 0);
                    }
                }
                Err(Malformed) => refused += 1,
            }
        }
        assert!(taken > 10_000 && refused > 10_000, "{taken} {refused}");
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let with = |at: usize, values: &[u8], operation| {
            let mut bytes = request(operation).encode();
            put(&mut bytes, at, values);
            Request::decode(&bytes)
        };
        let write = Operation::Write { offset: 4, width: Width::Word, value: 0 };
        assert!(with(16, &[6, 0], write).is_ok());
        for (at, values) in [
            (16, &[5, 0][..]),
            (16, &[0, 0x10]),
            (13, &[3]),
            (13, &[0]),
            (22, &[1]),
            (18, &[1]),
            (24, &[1]),
            (14, &[1]),
            (12, &[0]),
            (12, &[14]),
            (4, &[0, 0, 0, 0]),
        ] {
            assert_eq!(with(at, values, write), Err(Malformed), "{at} {values:?}");
        }
        let several = Operation::Map { guest: 1, vector: Vector::MultiMsi { count: 2 } };
        for count in [0, 1, 3, 33, 64] {
            assert_eq!(with(13, &[count], several), Err(Malformed), "{count}");
        }
        let entry = Operation::Map { guest: 1, vector: Vector::Msix { entry: 0, table_base: 0 } };
        assert_eq!(with(16, &[0, 8], entry), Err(Malformed));
        let unmap = Operation::Unmap { guest: 1, pirq: 1 };
        assert_eq!(with(23, &[0x80], unmap), Err(Malformed), "a negative pirq");
    }
}
