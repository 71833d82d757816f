//! The xenstore nodes of a connection, in the formats of libxl, xen-pcifront and the driver domain.

use pciback::sbdf::Sbdf;

use crate::sysfs::Function;
use crate::xen::Store;

/// Domains from this number on are reserved; one of them holds functions in quarantine.
pub const DOMID_IO: u32 = 0x7ff1;

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
        store.read(tx, &self.back("num_devs")).map(|text| text.parse().unwrap_or(0))
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

/// A published node of one function of a driver domain.
pub fn published(driver: u32, sbdf: Sbdf, node: &str) -> String {
    let (segment, bus, device, function) = (sbdf.segment(), sbdf.bus(), sbdf.device(), sbdf.function());
    format!("/local/domain/{driver}/data/pciback/device/{segment:04x}-{bus:02x}-{device:02x}-{function:x}/{node}")
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

/// Domains that run this project's image: number and name.
pub fn drivers<S: Store + ?Sized>(store: &S) -> Vec<(u32, String)> {
    let ids = store.list(0, "/local/domain").into_iter().filter_map(|id| id.parse().ok());
    ids.filter(|id| store.read(0, &format!("/local/domain/{id}/data/pciback/version")).is_some())
        .map(|id: u32| (id, store.read(0, &format!("/local/domain/{id}/name")).unwrap_or_default()))
        .collect()
}
