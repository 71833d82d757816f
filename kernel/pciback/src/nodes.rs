//! xenstore node names, states and number formats, exactly as the toolstack and the frontends have
//! them. What a frontend writes is guest-controlled: numbers are parsed strictly.

use alloc::format;
use alloc::string::String;

use crate::platform::{DomId, Store, StoreError, Transaction};
use crate::sbdf::Sbdf;

/// Below the own domain's directory: one folder a frontend domain.
pub const BACKEND: &str = "backend/pci";
/// Below the own domain's directory: what this domain says of itself.
pub const PUBLISHED: &str = "data/pciback";

/// `enum xenbus_state` of `xen/io/xenbus.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XenbusState {
    /// Not a state.
    Unknown = 0,
    /// Made by the toolstack.
    Initialising = 1,
    /// The backend is there.
    InitWait = 2,
    /// Ready to connect.
    Initialised = 3,
    /// Connected.
    Connected = 4,
    /// Going away.
    Closing = 5,
    /// Gone.
    Closed = 6,
    /// The set of functions changes.
    Reconfiguring = 7,
    /// The set of functions has changed.
    Reconfigured = 8,
}

impl XenbusState {
    /// The state a node's text names.
    pub fn parse(text: &str) -> XenbusState {
        match text {
            "1" => XenbusState::Initialising,
            "2" => XenbusState::InitWait,
            "3" => XenbusState::Initialised,
            "4" => XenbusState::Connected,
            "5" => XenbusState::Closing,
            "6" => XenbusState::Closed,
            "7" => XenbusState::Reconfiguring,
            "8" => XenbusState::Reconfigured,
            _ => XenbusState::Unknown,
        }
    }

    /// As a node's text.
    pub fn text(self) -> &'static str {
        match self {
            XenbusState::Unknown => "0",
            XenbusState::Initialising => "1",
            XenbusState::InitWait => "2",
            XenbusState::Initialised => "3",
            XenbusState::Connected => "4",
            XenbusState::Closing => "5",
            XenbusState::Closed => "6",
            XenbusState::Reconfiguring => "7",
            XenbusState::Reconfigured => "8",
        }
    }
}

/// A decimal number: digits only, no sign, no blanks, at most ten digits.
pub fn decimal(text: &str) -> Option<u32> {
    let plain = !text.is_empty() && text.len() <= 10 && text.bytes().all(|b| b.is_ascii_digit());
    if plain { text.parse().ok() } else { None }
}

/// Reads a state; a node that is missing is `None`.
///
/// A node below a folder we may not read answers "denied" once it is gone (xenstored tells nobody what
/// is missing there), which is how the end of a guest looks from here. So "denied" is `None` too.
///
/// # Errors
/// Any other error.
pub fn read_state<S: Store>(store: &mut S, path: &str) -> Result<Option<XenbusState>, StoreError> {
    match store.read(None, path) {
        Ok(text) => Ok(Some(XenbusState::parse(&text))),
        Err(StoreError::NotFound | StoreError::Denied) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads a node that may be missing. An error is not a missing node: who can't read a condition must not
/// act as if there were none.
///
/// # Errors
/// Any but [`StoreError::NotFound`].
pub fn read_optional<S: Store>(
    store: &mut S,
    tx: Option<Transaction>,
    path: &str,
) -> Result<Option<String>, StoreError> {
    match store.read(tx, path) {
        Ok(text) => Ok(Some(text)),
        Err(StoreError::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Times a transaction is tried that meets others' changes.
pub const TRIES: usize = 8;

/// Does `work` in a transaction: it sees one state of xenstore, and all of its changes are made or none.
///
/// # Errors
/// What `work` or xenstored answered; [`StoreError::Again`] after [`TRIES`] conflicts.
pub fn transact<S: Store, T>(
    store: &mut S,
    mut work: impl FnMut(&mut S, Transaction) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    for _ in 0..TRIES {
        let tx = store.begin()?;
        let outcome = work(store, tx);
        let ended = store.end(tx, outcome.is_ok());
        match (outcome, ended) {
            (Err(StoreError::Again), _) | (Ok(_), Err(StoreError::Again)) => {}
            (Ok(value), Ok(())) => return Ok(value),
            (Err(error), _) | (Ok(_), Err(error)) => return Err(error),
        }
    }
    Err(StoreError::Again)
}

/// One frontend device: the guest and its device id, and the two folders that follow from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    /// The guest.
    pub frontend: DomId,
    /// libxl always uses 0.
    pub devid: u16,
}

impl Link {
    /// The link of path parts `<frontend>/<devid>`.
    pub fn parse(frontend: &str, devid: &str) -> Option<Link> {
        // Domain numbers from 0x7ff0 are reserved (xen.h, DOMID_FIRST_RESERVED).
        let frontend = decimal(frontend).filter(|number| *number < 0x7ff0)?;
        Some(Link { frontend: frontend as DomId, devid: u16::try_from(decimal(devid)?).ok()? })
    }

    /// A node of the backend's folder, relative to the own domain's directory.
    pub fn back(self, node: &str) -> String {
        format!("{BACKEND}/{}/{}/{node}", self.frontend, self.devid)
    }

    /// The backend's folder.
    pub fn back_folder(self) -> String {
        format!("{BACKEND}/{}/{}", self.frontend, self.devid)
    }

    /// Our folder for errors of this link.
    pub fn error_folder(self) -> String {
        format!("error/{}", self.back_folder())
    }

    /// A node of the frontend's folder.
    pub fn front(self, node: &str) -> String {
        format!("{}/{node}", self.front_folder())
    }

    /// The frontend's folder.
    pub fn front_folder(self) -> String {
        format!("/local/domain/{}/device/pci/{}", self.frontend, self.devid)
    }

    /// Token of the watch on the frontend's state.
    pub fn token(self) -> String {
        format!("front/{}/{}", self.frontend, self.devid)
    }

    /// The link of a token that [`Link::token`] made.
    pub fn of_token(token: &str) -> Option<Link> {
        let (frontend, devid) = token.strip_prefix("front/")?.split_once('/')?;
        Link::parse(frontend, devid)
    }
}

/// Text of `vdev-N`, the address in the guest: the function has two digits.
pub fn vdev(place: Sbdf) -> String {
    let (segment, bus, device, function) = (place.segment(), place.bus(), place.device(), place.function());
    format!("{segment:04x}:{bus:02x}:{device:02x}.{function:02x}")
}

/// A node of the folder in which the state of a function is published. xenstored accepts neither
/// colons nor dots in a path, so the address is written as libxl does in `/libxl/pci`.
pub fn published(sbdf: Sbdf, node: &str) -> String {
    format!("{PUBLISHED}/device/{}/{node}", folder(sbdf))
}

/// The name of that folder.
pub fn folder(sbdf: Sbdf) -> String {
    let (segment, bus, device, function) = (sbdf.segment(), sbdf.bus(), sbdf.device(), sbdf.function());
    format!("{segment:04x}-{bus:02x}-{device:02x}-{function:x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_those_that_pcifront_and_libxl_read() {
        let link = Link { frontend: 7, devid: 0 };
        assert_eq!(link.back("state"), "backend/pci/7/0/state");
        assert_eq!(link.front("state"), "/local/domain/7/device/pci/0/state");
        assert_eq!(Link::of_token(&link.token()), Some(link));
        assert_eq!(vdev(Sbdf::new(0, 0, 0xfd)), "0000:00:1f.05");
        assert_eq!(vdev(Sbdf::new(2, 0x80, 0xa0)), "0002:80:14.00");
    }

    #[test]
    fn numbers_and_links_are_strict() {
        for text in ["", "-1", "+1", " 1", "1 ", "0x1", "99999999999", "4294967296"] {
            assert_eq!(decimal(text), None, "{text}");
        }
        assert_eq!(decimal("4294967295"), Some(u32::MAX));
        assert_eq!(Link::parse("32752", "0"), None);
        assert_eq!(Link::parse("1", "65536"), None);
        assert_eq!(Link::of_token("front/1"), None);
    }

    #[test]
    fn states_read_back() {
        for number in 1..=8 {
            let text = format!("{number}");
            assert_eq!(XenbusState::parse(&text).text(), text);
        }
        assert_eq!(XenbusState::parse("04"), XenbusState::Unknown);
    }
}
