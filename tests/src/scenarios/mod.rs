//! The scenarios, one file each, in one table.

use crate::dom0::{Outcome, Rig};
use crate::packages::Release;

mod alone;
mod bus_reset;
mod command_line;
mod destroyed;
mod device_matrix;
mod exception;
mod foreign;
mod hostile_driver;
mod hostile_guest;
mod hotplug;
mod idle;
pub(crate) mod killed_enabling;
mod lifecycle;
mod lost_addresses;
mod module_reload;
mod msi_drive;
mod msix_nvme;
mod nic;
mod nic_kinds;
mod nvme;
mod passthrough_topology;
mod promises;
mod read_only;
mod reboot;
mod reboots;
mod saved;
mod serve_killed;
pub(crate) mod stale_maskall;
mod store_load;
mod tool_errors;
mod tool_reads;
mod two_drivers;
mod two_functions;
mod two_guests;
mod usb;
mod virtual_function;

/// A kind of machine: which Xen it boots, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// The release's Xen with `mmcfg=0`.
    Writable,
    /// The release's Xen as it comes.
    Plain,
    /// Xen with the config-owner change.
    Changed,
}

impl Boot {
    /// All of them, in the order in which they are booted.
    pub const ALL: [Boot; 3] = [Boot::Writable, Boot::Plain, Boot::Changed];

    /// Whether dom0's service runs from the start.
    pub fn has_serve(self) -> bool {
        self != Boot::Changed
    }

    /// The mode a driver domain must be in.
    pub fn mode(self) -> &'static str {
        match self {
            Boot::Writable => "mmcfg0",
            Boot::Plain => "delegated",
            Boot::Changed => "direct",
        }
    }

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Boot::Writable => "mmcfg=0",
            Boot::Plain => "plain",
            Boot::Changed => "changed",
        }
    }
}

/// A scenario.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// Where it runs.
    pub boots: &'static [Boot],
    /// Does it.
    pub run: fn(&mut Rig) -> Outcome,
}

const fn scenario(
    name: &'static str,
    boots: &'static [Boot],
    about: &'static str,
    run: fn(&mut Rig) -> Outcome,
) -> Scenario {
    Scenario { name, about, boots, run }
}

/// Where configuration writes need no change of Xen's.
const STOCK: &[Boot] = &[Boot::Writable, Boot::Plain];
/// Everywhere: the way of writing, of mapping vectors and of handing over is another with each.
const EVERYWHERE: &[Boot] = &Boot::ALL;
/// Where every write is dom0's.
const DELEGATED: &[Boot] = &[Boot::Plain];

/// All of them.
pub const ALL: [Scenario; 38] = [
    scenario("nvme", STOCK, "a guest reads and writes an NVMe drive, with interrupts", nvme::run),
    scenario("nic", STOCK, "a guest uses a network card", nic::run),
    scenario("two-guests", STOCK, "two guests use a device each at once", two_guests::run),
    scenario("two-functions", EVERYWHERE, "a guest gets a second function while it runs", two_functions::run),
    scenario("destroyed", EVERYWHERE, "a guest dies under I/O, the next one gets the device", destroyed::run),
    scenario("reboot", STOCK, "a guest reboots and gets its device again", reboot::run),
    scenario(
        "passthrough-topology",
        STOCK,
        "a guest sees its functions at the host's addresses",
        passthrough_topology::run,
    ),
    scenario("hotplug", EVERYWHERE, "a device is detached and attached while the guest runs", hotplug::run),
    scenario("module-reload", EVERYWHERE, "the guest reloads its drivers and pcifront", module_reload::run),
    scenario("idle", STOCK, "the driver domain does not run when nothing is to do", idle::run),
    scenario("command-line", STOCK, "wrong words on the command line are reported", command_line::run),
    scenario("tool-reads", STOCK, "list and check say what is, and change nothing", tool_reads::run),
    scenario("tool-errors", STOCK, "dom0's tool refuses what cannot work", tool_errors::run),
    scenario("exception", STOCK, "an exception in the driver domain is reported and ends it", exception::run),
    scenario("lifecycle", EVERYWHERE, "xl shutdown, reboot and destroy of the driver domain", lifecycle::run),
    scenario("read-only", &[Boot::Plain], "without mmcfg=0 the driver domain serves reads and lives", read_only::run),
    scenario("msix-nvme", EVERYWHERE, "a drive has MSI-X with a queue for each processor", msix_nvme::run),
    scenario(
        "nic-kinds",
        EVERYWHERE,
        "a network card works with MSI-X and with its line, and gives up MSI cleanly",
        nic_kinds::run,
    ),
    scenario("msi-drive", EVERYWHERE, "a SATA drive works with MSI", msi_drive::run),
    scenario(
        "device-matrix",
        DELEGATED,
        "ten kinds of functions work, and show the right registers",
        device_matrix::run,
    ),
    scenario(
        "virtual-function",
        DELEGATED,
        "two guests in turn use a virtual function of a drive that dom0 uses",
        virtual_function::run,
    ),
    scenario("usb", EVERYWHERE, "a guest has a USB controller with a stick behind it", usb::run),
    scenario(
        "stale-maskall",
        EVERYWHERE,
        "Xen's stale MASKALL is found and reset for the next guest",
        stale_maskall::run,
    ),
    scenario("killed-enabling", EVERYWHERE, "guests die while their vectors are being mapped", killed_enabling::three),
    scenario("killed-often", EVERYWHERE, "many guests die so", killed_enabling::twelve),
    scenario("foreign", &[Boot::Changed], "Xen refuses a function that is not the driver domain's", foreign::run),
    scenario("serve-killed", DELEGATED, "dom0's service ends under I/O and during attachments", serve_killed::run),
    scenario("promises", EVERYWHERE, "guests get what is promised to their names, whatever ends", promises::run),
    scenario(
        "hostile-driver",
        DELEGATED,
        "a driver domain that was taken over gets nothing that is not its own",
        hostile_driver::run,
    ),
    scenario(
        "hostile-guest",
        &[Boot::Plain, Boot::Changed],
        "a guest attacks the driver domain with all it has, and nobody else notices",
        hostile_guest::run,
    ),
    scenario("two-drivers", STOCK, "a drive that two driver domains list has one owner", two_drivers::run),
    scenario(
        "lost-addresses",
        EVERYWHERE,
        "functions that a dead driver domain left without addresses work again",
        lost_addresses::run,
    ),
    scenario("saved", STOCK, "a guest is saved with a drive", saved::run),
    scenario("store-load", STOCK, "all works while xenstored is busy for others", store_load::run),
    scenario("alone", &[Boot::Writable], "with mmcfg=0 a drive works without dom0's service, too", alone::run),
    scenario("bus-reset", STOCK, "dom0 resets a drive by its bus where the configuration says so", bus_reset::run),
    scenario("reboots", EVERYWHERE, "reboots of a guest with MSI-X leak nothing", reboots::five),
    scenario("fifty-reboots", EVERYWHERE, "fifty of them leak nothing", reboots::fifty),
];

/// What the test runs with `mmcfg=0`: what the way of writing and the hand-over make a difference to. The rest is as
/// on the same hypervisor without; `cargo xtask test --long` runs all of it.
const WITH_MMCFG_OFF: [&str; 14] = [
    "nvme",
    "two-functions",
    "destroyed",
    "hotplug",
    "module-reload",
    "lifecycle",
    "msix-nvme",
    "msi-drive",
    "usb",
    "stale-maskall",
    "alone",
    "bus-reset",
    "lost-addresses",
    "two-drivers",
];

/// What only `--long` runs. The hostile guest's scenario fails on a loaded machine: a connection that is refused costs some
/// thirty xenstore calls in a row, which another guest's requests wait for.
const LONG: [&str; 3] = ["fifty-reboots", "hostile-guest", "killed-often"];

/// What one release is enough for in the test: nothing in it is another on the newer one.
const ONCE: [&str; 5] = ["command-line", "device-matrix", "passthrough-topology", "reboots", "virtual-function"];

impl Scenario {
    /// Whether `cargo xtask test` runs it there.
    pub fn is_tested(&self, release: Release, boot: Boot) -> bool {
        let listed = |names: &[&str]| names.contains(&self.name);
        match (release, boot) {
            _ if listed(&LONG) => false,
            (_, Boot::Writable) => release == Release::Bookworm && listed(&WITH_MMCFG_OFF),
            (Release::Trixie, Boot::Plain) => !listed(&ONCE),
            (_, Boot::Plain | Boot::Changed) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = ALL.iter().map(|scenario| scenario.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        let lists = WITH_MMCFG_OFF.iter().chain(&LONG).chain(&ONCE);
        assert!(lists.into_iter().all(|name| names.contains(name)), "a list names a scenario that is none");
    }
}
