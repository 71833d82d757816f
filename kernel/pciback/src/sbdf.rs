//! The address of a PCI function: segment, bus, device, function.
//! Text form as `xl` and `lspci -D` write it; the packed form is Xen's `pci_sbdf_t`.

use core::fmt;
use core::str::FromStr;

/// Segment, bus, device and function of a PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sbdf {
    segment: u16,
    bus: u8,
    devfn: u8,
}

/// The text is not a PCI address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadSbdf;

impl fmt::Display for BadSbdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a PCI address of the form SSSS:BB:DD.F")
    }
}

impl Sbdf {
    /// The function at `devfn` (device << 3 | function) of `bus` in `segment`.
    pub const fn new(segment: u16, bus: u8, devfn: u8) -> Sbdf {
        Sbdf { segment, bus, devfn }
    }

    /// The function of Xen's packed form; every number is one.
    pub const fn from_packed(packed: u32) -> Sbdf {
        Sbdf { segment: (packed >> 16) as u16, bus: (packed >> 8) as u8, devfn: packed as u8 }
    }

    /// PCI segment (domain), 0 to 0xffff.
    pub const fn segment(self) -> u16 {
        self.segment
    }

    /// Bus number.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// Device << 3 | function.
    pub const fn devfn(self) -> u8 {
        self.devfn
    }

    /// Device (slot) number, 0 to 31.
    pub const fn device(self) -> u8 {
        self.devfn >> 3
    }

    /// Function number, 0 to 7.
    pub const fn function(self) -> u8 {
        self.devfn & 7
    }

    /// Index of the function's 4 KiB frame in its segment's ECAM window: bus << 8 | devfn.
    pub const fn ecam_index(self) -> u32 {
        (self.bus as u32) << 8 | self.devfn as u32
    }

    /// Xen's packed form, `segment << 16 | bus << 8 | devfn`.
    #[doc(alias = "pci_sbdf_t")]
    pub const fn packed(self) -> u32 {
        (self.segment as u32) << 16 | self.ecam_index()
    }
}

impl fmt::Display for Sbdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.segment, self.bus, self.device(), self.function())
    }
}

/// Accepts `SSSS:BB:DD.F` and, with segment 0, `BB:DD.F`; hexadecimal, at most the digits shown.
impl FromStr for Sbdf {
    type Err = BadSbdf;

    fn from_str(text: &str) -> Result<Sbdf, BadSbdf> {
        let (rest, function) = text.rsplit_once('.').ok_or(BadSbdf)?;
        let (rest, device) = rest.rsplit_once(':').ok_or(BadSbdf)?;
        let (segment, bus) = rest.rsplit_once(':').unwrap_or(("0", rest));
        let device = hex(device, 2).filter(|d| *d < 32).ok_or(BadSbdf)?;
        let function = hex(function, 1).filter(|f| *f < 8).ok_or(BadSbdf)?;
        let segment = hex(segment, 4).ok_or(BadSbdf)?;
        let bus = hex(bus, 2).ok_or(BadSbdf)?;
        Ok(Sbdf::new(segment, bus as u8, (device << 3 | function) as u8))
    }
}

/// A hexadecimal number of 1 to `digits` digits and nothing else (no sign, no prefix).
fn hex(text: &str, digits: usize) -> Option<u16> {
    let plain = !text.is_empty() && text.len() <= digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    if plain { u16::from_str_radix(text, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn text_round_trips_with_every_segment_kept() {
        for text in ["0000:01:00.0", "0002:80:14.7", "ffff:ff:1f.7"] {
            let sbdf: Sbdf = text.parse().expect("valid");
            assert_eq!(sbdf.to_string(), text);
        }
        assert_eq!("01:00.0".parse::<Sbdf>().expect("valid").to_string(), "0000:01:00.0");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "1",
            "01:00",
            "01:20.0",
            "01:00.8",
            "10000:01:00.0",
            "0:+1:00.0",
            "0000:01:00.0 ",
            "x:01:00.0",
            "::.",
            "0000:001:00.0",
        ] {
            assert_eq!(text.parse::<Sbdf>(), Err(BadSbdf), "{text}");
        }
    }

    #[test]
    fn ecam_frame_index_and_packed_form() {
        let sbdf: Sbdf = "0002:01:05.3".parse().expect("valid");
        assert_eq!(sbdf.ecam_index(), 0x12b);
        assert_eq!(sbdf.packed(), 0x0002_012b);
        assert_eq!(Sbdf::from_packed(0x0002_012b), sbdf);
    }
}
