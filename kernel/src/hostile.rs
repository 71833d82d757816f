//! A driver domain that has been taken over, for the rig (feature `hostile`; no part of the real image): it asks dom0's
//! service for what it may not have, and publishes what it was answered. The scenario `hostile-driver` reads that, and
//! looks that nobody else has noticed.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;

use pciback::cmdline::Config;
use pciback::delegate::Line;
use pciback::delegate::message::{ANSWER, Operation, REQUEST};
use pciback::physdev::{PhysdevError, Vector};
use pciback::platform::{Platform, Store, Width};
use pciback::sbdf::Sbdf;
use xen_guest::sched;

use crate::machine::Machine;

/// Domains that are tried.
const DOMAINS: core::ops::Range<u16> = 0..64;
/// How often a request without an answer is made again, a tenth of a second apart.
const TRIES: u32 = 300;
/// Refused requests in a row.
const FLOOD: u32 = 5_000;

/// Attacks, tells, and then does nothing more. The first function of the command line is its own.
pub fn run(mut machine: Machine, config: &Config) -> ! {
    let (grant, port) = machine.channel();
    publish(&mut machine, &[("channel/event-channel", port.to_string()), ("channel/ring-ref", grant.to_string())]);
    while machine.poll_dom0().is_err() {
        wait(&machine);
    }
    log::info!("connected; attacking");
    let own = config.devices.first().map_or(Sbdf::new(0, 0, 0), |device| device.sbdf);
    let mut told: Vec<(&str, String)> = Vec::new();
    let command = Operation::Write { offset: 4, width: Width::Word, value: 0x400 };
    told.push(("own-write", answers(&mut machine, &[own], &[command])));

    // Every function of the first four buses but its own.
    let others: Vec<Sbdf> = (0..4u8)
        .flat_map(|bus| (0..=255).map(move |devfn| Sbdf::new(0, bus, devfn)))
        .filter(|sbdf| *sbdf != own)
        .collect();
    let vector = Vector::Msix { entry: 0, table_base: 0xfebc_0000 };
    let calls =
        [command, Operation::Prepare, Operation::Release, Operation::Restore, Operation::Reset { together: false }];
    told.push(("foreign", answers(&mut machine, &others, &calls)));
    let maps: Vec<Operation> =
        DOMAINS.flat_map(|guest| [Vector::Msi, vector].map(|vector| Operation::Map { guest, vector })).collect();
    told.push(("foreign-map", answers(&mut machine, &others[..64], &maps[..16])));
    told.push(("own-map", answers(&mut machine, &[own], &maps)));
    let unmaps: Vec<Operation> =
        DOMAINS.flat_map(|guest| (16..80).map(move |pirq| Operation::Unmap { guest, pirq })).collect();
    told.push(("unmap", answers(&mut machine, &[own], &unmaps)));
    let bars: Vec<Operation> = (0x10..0x28)
        .step_by(4)
        .flat_map(|offset| {
            [0xfee0_0000, 0xffff_ffff].map(|value| Operation::Write { offset, width: Width::Dword, value })
        })
        .collect();
    told.push(("bars", answers(&mut machine, &[own], &bars)));
    let parts: Vec<Operation> =
        (0x10..0x28).map(|offset| Operation::Write { offset, width: Width::Byte, value: 0xfe }).collect();
    told.push(("bar-parts", answers(&mut machine, &[own], &parts)));
    let settled: Vec<Operation> =
        DOMAINS.map(|guest| Operation::Keep { guest, pirq: 55 }).chain([Operation::Settle]).collect();
    told.push(("settle", answers(&mut machine, &[own], &settled)));
    for _ in 0..FLOOD {
        let _ = machine.delegate().borrow_mut().call(others[0], command);
    }
    told.push(("after-flood", answers(&mut machine, &[own], &[command])));
    nonsense(&mut machine);
    told.push(("after-nonsense", answers(&mut machine, &[own], &[command])));
    let dom0 = machine.delegate();
    dom0.borrow_mut().line().scribble();
    told.push(("done", "1".to_string()));
    let nodes: Vec<(String, String)> =
        told.into_iter().map(|(node, value)| (format!("data/pciback/hostile/{node}"), value)).collect();
    if let Err(error) = machine.store().write_all(&nodes) {
        log::error!("cannot tell: {error}");
    }
    log::info!("done");
    loop {
        wait(&machine);
    }
}

/// What each answer is, each once: numbers of errors, or "ok".
fn answers(machine: &mut Machine, functions: &[Sbdf], operations: &[Operation]) -> String {
    let mut all: Vec<String> = Vec::new();
    let dom0 = machine.delegate();
    for function in functions {
        for operation in operations {
            let mut answer = "none".to_string();
            for _ in 0..TRIES {
                let said = dom0.borrow_mut().call(*function, *operation);
                match said {
                    Ok(_) => answer = "ok".to_string(),
                    // It was slow, and is asked to begin again.
                    Err(PhysdevError::NotConnected) => {
                        wait(machine);
                        let _ = machine.poll_dom0();
                        continue;
                    }
                    Err(error) => answer = error.errno().to_string(),
                }
                break;
            }
            if !all.contains(&answer) {
                all.push(answer);
            }
        }
    }
    all.sort_unstable();
    all.join(" ")
}

/// Messages that are none, as many as there is room for.
fn nonsense(machine: &mut Machine) {
    let dom0 = machine.delegate();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..2_000 {
        let mut bytes = [0u8; REQUEST];
        for byte in &mut bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
        let mut dom0 = dom0.borrow_mut();
        let mut answer = [0; ANSWER];
        while dom0.line().receive(&mut answer) {}
        if !dom0.line().send(&bytes) {
            let deadline = dom0.line().now().saturating_add(100_000_000);
            dom0.line().wait(deadline);
        }
    }
}

fn wait(machine: &Machine) {
    // An error leaves a busy loop, which is what a hostile domain may do.
    let _ = sched::poll(&machine.own_ports(), Some(machine.now().saturating_add(100_000_000)));
}

fn publish(machine: &mut Machine, nodes: &[(&str, String)]) {
    let nodes: Vec<(String, String)> =
        nodes.iter().map(|(node, value)| (format!("data/pciback/{node}"), value.clone())).collect();
    let _ = machine.store().write_all(&nodes);
}
