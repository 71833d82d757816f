//! A guest uses a network card: its link comes up and traffic passes.

use crate::check;
use crate::dom0::{Guest, NIC, Outcome, Rig};

/// Configures the card and pings QEMU's gateway.
pub(super) const PING: &str = "ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0 2>/dev/null; \
     n=0; until [ \"$(cat /sys/class/net/eth0/carrier)\" = 1 ]; do n=$((n+1)); [ $n -gt 100 ] && exit 9; sleep 0.3; done; \
     ping -c 5 -W 10 10.0.2.2";

pub(super) fn run(rig: &mut Rig) -> Outcome {
    rig.create(Guest::named("g1"))?;
    rig.attach("g1", NIC)?;
    rig.wait_up("g1", 1)?;
    rig.guest_wait("g1", "its network card", 60, "[ -e /sys/class/net/eth0 ]")?;
    let said = rig.guest("g1", PING)?;
    check!(said.contains(" 0% packet loss"), "ping lost packets: {said}");
    check!(rig.interrupts("g1", "eth0")? > 0, "the card has no interrupts");
    Ok(())
}
