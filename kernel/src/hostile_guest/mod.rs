//! A guest that plays pcifront by itself, and not by the rules, for the rig (feature `hostile-guest`; no part of the real
//! image). It attacks the driver domain with all that a guest can reach: the shared page, its grant, the event channel
//! and its own xenstore nodes. It says on its console what it did and what it was answered; the scenario `hostile-guest`
//! reads that, and looks that nobody else has noticed.

mod attacks;
mod client;
mod second;

use pciback::wire::RawRequest;
use xen_guest::sched;

use crate::fatal;
use crate::machine::Guest;

use self::client::Client;

/// An attack.
type Attack = fn(&mut Client);

/// Attacks, tells, and then does nothing more.
pub fn run(guest: Guest) -> ! {
    let mut client = match Client::new(guest) {
        Ok(client) => client,
        Err(error) => fatal::stop(format_args!("no backend: {error}")),
    };
    if let Err(error) = second::start(client.shared()) {
        fatal::stop(format_args!("no second processor: {error}"));
    }
    log::info!("hostile: connecting to domain {}", client.backend());
    if !client.connect() {
        fatal::stop(format_args!("the backend does not connect: it is in state {:?}", client.back_state()));
    }
    let identity = identity(&mut client);
    let phases: [(&str, Attack); 9] = [
        ("operations", attacks::operations),
        ("torn", attacks::torn),
        ("flags", attacks::flags),
        ("events", attacks::events),
        ("grants", attacks::grants),
        ("frames", attacks::frames),
        ("ports", attacks::ports),
        ("nodes", attacks::nodes),
        ("states", attacks::states),
    ];
    for (name, attack) in phases {
        let (start, before) = (client.now(), client.counts);
        attack(&mut client);
        let seconds = client.now().saturating_sub(start) / 1_000_000_000;
        log::info!("hostile: {name}: {seconds} s, {}", client.counts.since(&before));
        log::info!("hostile: {name}: answers {:?}", client.take_answers());
    }
    // As if nothing had been.
    client.close();
    let connected = client.connect();
    let same = connected && identity.is_some() && self::identity(&mut client) == identity;
    log::info!("hostile: done: sane={} {}", u8::from(same), client.counts);
    loop {
        // An error leaves a busy loop, which is what a hostile guest may do.
        let _ = sched::poll(&[], Some(client.now().saturating_add(1_000_000_000)));
    }
}

/// The function's vendor and device.
fn identity(client: &mut Client) -> Option<u32> {
    let (err, value) = client.ask(&RawRequest { size: 4, ..RawRequest::default() }, &[])?;
    (err == 0).then_some(value)
}
