//! The event loop: xenstore events and frontends' events, then sleep in Xen until the next.
//!
//! A config access takes two hypercalls at most: the poll that wakes us and the event that tells the
//! frontend; in a burst the next event is often seen before sleeping. Nothing else wakes the domain but the
//! deadlines of a hand-over: no tick.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

use pciback::backend::{Backend, EVENTS_A_TURN};
use pciback::cmdline::{Complaint, Config};
use pciback::platform::{Nanos, Platform, Port, Store};
use xen_guest::halt_poll::HaltPoll;
use xen_guest::sched::{self, POLL_PORTS, Reason};
use xen_guest::store::WatchEvent;
use xen_guest::{hypercall, memory};

use crate::machine::Machine;
use crate::{fatal, logger};

/// Watches of the loop itself; the backend's have other tokens.
const SHUTDOWN: (&str, &str) = ("control/shutdown", "shutdown");
const REPORT: (&str, &str) = ("data/pciback/report", "report");

/// How long the next event is looked for at most before sleeping: 200 microseconds.
const LOOK: Nanos = 200_000;

/// Serves until the tools end the domain. `entry` is the CPU time, in nanoseconds, at the first instruction
/// that could ask for it.
pub fn run(machine: Machine, config: Config, complaints: Vec<Complaint>, entry: u64) -> ! {
    let mut backend = Backend::new(machine, config, complaints);
    watch(&mut backend);
    backend.start();
    publish_start(&mut backend, entry);

    let mut ports: Vec<Port> = Vec::with_capacity(POLL_PORTS);
    let mut poll = HaltPoll::new(LOOK);
    // Counted for the report: an idle domain does not wake up.
    let mut sleeps = 0;
    loop {
        // Frontends first: what they need is looked at in as few pages as can be.
        let mut busy = backend.serve(Machine::take_pending);

        let [store_port, console_port, channel_port] = backend.platform_mut().own_ports();
        if backend.platform_mut().take_pending(store_port) | backend.platform_mut().client().may_have_events() {
            busy = true;
            store_events(&mut backend, sleeps);
        }
        if backend.platform_mut().take_pending(console_port) {
            busy = true;
            logger::discard_input();
        }

        ports.clear();
        ports.extend(backend.ports());
        ports.extend([store_port, console_port, channel_port]);
        let deadline = backend.next_deadline();
        if !busy {
            sleeps += u64::from(wait(backend.platform_mut(), &ports, &mut poll, deadline));
        }
    }
}

/// Handles what xenstore has to tell, a bounded part of it, after the loop has slept `sleeps` times.
fn store_events(backend: &mut Backend<Machine>, sleeps: u64) {
    for _ in 0..EVENTS_A_TURN {
        let Some(event) = backend.platform_mut().client().next_event() else { break };
        handle(backend, &event, sleeps);
    }
    if backend.platform_mut().client().take_lost_watches() {
        log::warn!("xenstore events were lost: looking at everything again");
        watch(backend);
        backend.store_reconnected();
    }
}

/// Waits for an event of `ports`: looks for a while if that has been worth it, then sleeps in Xen. True if
/// it slept.
fn wait(machine: &Machine, ports: &[Port], poll: &mut HaltPoll, deadline: Option<Nanos>) -> bool {
    if poll.window() > 0 && machine.look(ports, poll.window()) {
        return false;
    }
    let start = machine.now();
    if let Err(error) = sched::poll(ports, deadline) {
        fatal::stop(format_args!("SCHEDOP_poll on {} ports failed: {error}", ports.len()));
    }
    poll.slept(machine.now().saturating_sub(start));
    true
}

/// Sets the loop's own watches.
fn watch(backend: &mut Backend<Machine>) {
    if let Err(error) = backend.platform_mut().client().watch_all(&[SHUTDOWN, REPORT]) {
        log::error!("cannot watch {} and {}: {error}", SHUTDOWN.0, REPORT.0);
    }
}

/// Says what the domain can do and what its start has cost since `entry`, nanoseconds of its CPU time.
fn publish_start(backend: &mut Backend<Machine>, entry: u64) {
    let cpu = memory::cpu_time().unwrap_or(0).saturating_sub(entry) / 1000;
    let (used, free) = crate::memory::heap_usage();
    log::info!("ready after {cpu} us of CPU; heap: {} KiB used, {} KiB free", used / 1024, free / 1024);
    let (grant, port) = backend.platform_mut().channel();
    write_all(
        backend.platform_mut(),
        &[
            // dom0's tool connects when it sees the second.
            ("data/pciback/channel/event-channel", port.to_string()),
            ("data/pciback/channel/ring-ref", grant.to_string()),
            ("control/feature-poweroff", "1".to_string()),
            ("control/feature-reboot", "1".to_string()),
            ("data/pciback/ready-cpu-us", cpu.to_string()),
        ]
        .map(named),
    );
}

/// One xenstore event.
fn handle(backend: &mut Backend<Machine>, event: &WatchEvent, sleeps: u64) {
    if event.token == SHUTDOWN.1 {
        shutdown(backend);
    } else if event.token == REPORT.1 {
        report(backend, sleeps);
    } else {
        backend.watch_fired(&event.path, &event.token);
    }
}

/// Does what `xl shutdown` or `xl reboot` asks, if one does.
fn shutdown(backend: &mut Backend<Machine>) {
    let Ok(wish) = backend.platform_mut().store().read(None, SHUTDOWN.0) else { return };
    let reason = match wish.as_str() {
        "" => return,
        "poweroff" | "halt" => Reason::Poweroff,
        "reboot" => Reason::Reboot,
        other => {
            log::warn!("control/shutdown asks for {other:?}, which this domain cannot do");
            let _ = backend.platform_mut().store().write(None, SHUTDOWN.0, "");
            return;
        }
    };
    log::info!("{wish} asked for: closing all frontends");
    // The empty value tells the tools that the wish was seen.
    if let Err(error) = backend.platform_mut().store().write(None, SHUTDOWN.0, "") {
        log::warn!("cannot acknowledge {wish}: {error}");
    }
    backend.shutdown();
    sched::shutdown(reason)
}

/// Publishes counters, the domain's and each function's, because dom0 wrote to the report node; the write back to it
/// is the answer, and comes last.
fn report(backend: &mut Backend<Machine>, sleeps: u64) {
    let machine = backend.platform_mut();
    let Ok(wish) = machine.store().read(None, REPORT.0) else { return };
    if wish.is_empty() {
        return;
    }
    let counted = hypercall::count();
    let cpu = memory::cpu_time().unwrap_or(0) / 1000;
    let heap = crate::memory::heap_usage().0;
    let mut nodes = backend.counters();
    nodes.extend(
        [
            ("data/pciback/hypercalls", counted.to_string()),
            ("data/pciback/sleeps", sleeps.to_string()),
            ("data/pciback/cpu-us", cpu.to_string()),
            ("data/pciback/heap-used", heap.to_string()),
            (REPORT.0, String::new()),
        ]
        .map(named),
    );
    write_all(backend.platform_mut(), &nodes);
}

/// A node as it is written.
fn named((path, value): (&str, String)) -> (String, String) {
    (path.to_string(), value)
}

fn write_all(machine: &mut Machine, nodes: &[(String, String)]) {
    if let Err(error) = machine.store().write_all(nodes) {
        log::warn!("cannot publish features and counters of this domain: {error}");
    }
}
