//! The scenarios, one file each, in one table.

use crate::dom0::{Outcome, Rig};

mod command_line;
mod destroyed;
mod exception;
mod hotplug;
mod idle;
mod lifecycle;
mod module_reload;
mod nic;
mod nvme;
mod read_only;
mod reboot;
mod tool_errors;
mod tool_reads;
mod two_functions;
mod two_guests;

/// Which boot a scenario needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// Xen with `mmcfg=0`.
    Writable,
    /// Xen as it comes; on the oldest release only, because a boot more costs half a minute.
    Plain,
}

/// A scenario.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// The boot it needs.
    pub boot: Boot,
    /// Does it.
    pub run: fn(&mut Rig) -> Outcome,
}

const fn scenario(name: &'static str, about: &'static str, run: fn(&mut Rig) -> Outcome) -> Scenario {
    Scenario { name, about, boot: Boot::Writable, run }
}

/// All of them.
pub const ALL: [Scenario; 15] = [
    scenario("nvme", "a guest reads and writes an NVMe drive, with interrupts", nvme::run),
    scenario("nic", "a guest uses a network card", nic::run),
    scenario("two-guests", "two guests use a device each at once", two_guests::run),
    scenario("two-functions", "a guest gets a second function while it runs", two_functions::run),
    scenario("destroyed", "a guest dies under I/O, the next one gets the device", destroyed::run),
    scenario("reboot", "a guest reboots and gets its device again", reboot::run),
    scenario("hotplug", "a device is detached and attached while the guest runs", hotplug::run),
    scenario("module-reload", "the guest reloads its drivers and pcifront", module_reload::run),
    scenario("idle", "the driver domain does not run when nothing is to do", idle::run),
    scenario("command-line", "wrong words on the command line are reported", command_line::run),
    scenario("tool-reads", "list and check say what is, and change nothing", tool_reads::run),
    scenario("tool-errors", "dom0's tool refuses what cannot work", tool_errors::run),
    scenario("exception", "an exception in the driver domain is reported and ends it", exception::run),
    scenario("lifecycle", "xl shutdown, reboot and destroy of the driver domain", lifecycle::run),
    Scenario {
        name: "read-only",
        about: "without mmcfg=0 the driver domain serves reads and lives",
        boot: Boot::Plain,
        run: read_only::run,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = ALL.iter().map(|scenario| scenario.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
