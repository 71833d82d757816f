//! The xenstore nodes of a connection, in the formats of libxl, xen-pcifront and the driver domain.
//!
//! The backend's folder belongs to the driver domain, which parses what guests say. What is read from
//! there is a claim: bounded, shown without control characters, never the ground for giving rights.

use pciback::nodes::folder;
use pciback::sbdf::Sbdf;

use crate::sysfs::Function;
use crate::xen::Store;

/// Domains from this number on are reserved; one of them holds functions in quarantine.
pub const DOMID_IO: u32 = 0x7ff1;

/// This tool's own records, dom0's alone: a folder a function that was made assignable.
pub const RECORDS: &str = "/pciback/assignable";

/// Where `serve` writes down which vectors it has mapped.
pub const JOURNALS: &str = "/run/pciback-stubdom/vectors";

/// Functions a virtual bus can hold.
pub const MAX_FUNCTIONS: u32 = 256;

/// Backend and frontend folders of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// The driver domain.
    pub driver: u32,
    /// The guest.
    pub guest: u32,
}

impl Link {
    /// A node of the backend's folder.
    pub fn back(&self, node: &str) -> String {
        format!("{}/{node}", self.back_folder())
    }

    /// The backend's folder.
    pub fn back_folder(&self) -> String {
        format!("/local/domain/{}/backend/pci/{}/0", self.driver, self.guest)
    }

    /// A node of the frontend's folder.
    pub fn front(&self, node: &str) -> String {
        format!("{}/{node}", self.front_folder())
    }

    /// The frontend's folder.
    pub fn front_folder(&self) -> String {
        format!("/local/domain/{}/device/pci/0", self.guest)
    }

    /// How many functions are listed; `None` if there is no backend folder.
    pub fn count<S: Store + ?Sized>(&self, store: &S, tx: u32) -> Option<u32> {
        store.read(tx, &self.back("num_devs")).map(|text| text.parse().unwrap_or(0).min(MAX_FUNCTIONS))
    }

    /// The place of a function in the list.
    pub fn index_of<S: Store + ?Sized>(&self, store: &S, tx: u32, sbdf: Sbdf) -> Option<u32> {
        let count = self.count(store, tx)?;
        (0..count).find(|index| {
            store.read(tx, &self.back(&format!("dev-{index}"))).is_some_and(|name| name == sbdf.to_string())
        })
    }
}

/// Nodes that come once a function.
pub const PER_FUNCTION: [&str; 10] = ["dev", "key", "opts", "id", "irq", "resource", "state", "vdev", "error", "name"];

/// The function of a folder's name.
pub fn of_folder(folder: &str) -> Option<Sbdf> {
    let (rest, function) = folder.rsplit_once('-')?;
    format!("{}.{function}", rest.replace('-', ":")).parse().ok()
}

/// A node that a driver domain publishes of itself.
pub fn own(driver: u32, node: &str) -> String {
    format!("/local/domain/{driver}/data/pciback/{node}")
}

/// A published node of one function of a driver domain.
pub fn published(driver: u32, sbdf: Sbdf, node: &str) -> String {
    own(driver, &format!("device/{}/{node}", folder(sbdf)))
}

/// One of this tool's records: `driver`, what had the function in dom0; `registers`, what was set in it then; `domid`, the
/// guest that has it; `assigning`, the guest that a process is about to give it to, and that process (0: one that was
/// killed, and it is to be taken back); `released`, the guest that it was detached from by hand.
pub fn record(sbdf: Sbdf, node: &str) -> String {
    format!("{RECORDS}/{}/{node}", folder(sbdf))
}

/// A node that another domain writes, fit for a terminal: one line, no control characters, bounded.
pub fn told<S: Store + ?Sized>(store: &S, path: &str) -> Option<String> {
    let text = store.read(0, path)?;
    Some(text.chars().take(300).map(|ch| if ch.is_control() { '?' } else { ch }).collect())
}

/// A domain's name, or nothing.
pub fn name_of<S: Store + ?Sized>(store: &S, domid: u32) -> String {
    told(store, &format!("/local/domain/{domid}/name")).unwrap_or_default()
}

/// The nodes of function number `index`, without its state.
pub fn function_nodes(function: &Function, irq: u32, permissive: bool) -> Vec<(&'static str, String)> {
    let name = function.sbdf.to_string();
    let permissive = u8::from(permissive);
    vec![
        ("dev", name.clone()),
        ("key", name),
        ("opts", format!("msitranslate=0,power_mgmt=0,permissive={permissive},rdm_policy=strict")),
        ("id", function.id_text()),
        ("irq", irq.to_string()),
        ("resource", function.resource_text()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_being_part_of_a_path() {
        for text in ["0000:01:00.0", "00ff:80:1f.7"] {
            let sbdf: Sbdf = text.parse().unwrap();
            assert_eq!(of_folder(&folder(sbdf)), Some(sbdf));
        }
        for text in ["", "-", "0000-01-00", "0000-01-00-0-0", "..", "0000:01:00.0-x"] {
            assert_eq!(of_folder(text), None, "{text}");
        }
    }
}
