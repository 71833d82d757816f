//! What follows from what is: which guests are to get which functions, which attachments are over. A pure function of a
//! [`View`], so that it does not matter how it came to that, or whether this program has just been started.

use std::collections::BTreeMap;

use pciback::cmdline::Mode;
use pciback::sbdf::Sbdf;

use crate::domains::Driver;

/// What is known of one function of a driver domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// What the driver domain says of it; empty if nothing.
    pub state: String,
    /// By this tool's record: the guest that has it.
    pub holder: Option<u32>,
    /// Whether this driver domain lists it for that guest, and whoever gave it to the guest came to the end of that.
    pub listed: bool,
    /// By this tool's record: the guest that it was detached from by hand, and that shall not get it again.
    pub released: Option<u32>,
}

/// A driver domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Its configuration.
    pub driver: Driver,
    /// The mode it says it is in; empty if it has not said.
    pub mode: String,
    /// Its functions.
    pub functions: BTreeMap<Sbdf, Known>,
}

/// What there is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// All domains but dom0: number and name.
    pub domains: BTreeMap<u32, String>,
    /// The driver domains.
    pub servers: Vec<Server>,
    /// Functions with a holder by this tool's record that no driver domain has.
    pub lost: BTreeMap<Sbdf, u32>,
}

/// Something to do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// The guest that had it is gone: what is left of the attachment goes.
    Forget {
        /// The function.
        sbdf: Sbdf,
        /// The guest.
        guest: u32,
        /// The driver domain, if one has it.
        driver: Option<u32>,
    },
    /// A guest has it from a driver domain that is gone, and another one has come, or has half of it: it is taken from the
    /// guest.
    Orphan {
        /// The function.
        sbdf: Sbdf,
        /// The guest.
        guest: u32,
    },
    /// It was promised to a guest that runs and has it not.
    Attach {
        /// The guest.
        guest: u32,
        /// The function.
        sbdf: Sbdf,
        /// Name of the driver domain.
        driver: String,
        /// Its number.
        domid: u32,
    },
}

impl Server {
    /// Whether the driver domain is still to find out how it may write.
    pub fn is_undecided(&self) -> bool {
        self.mode.is_empty() || self.driver.config.mode == Mode::Auto && self.mode == "read-only"
    }
}

/// What is to be done, in this order.
pub fn plan(view: &View) -> Vec<Step> {
    let mut steps = Vec::new();
    for (sbdf, guest) in &view.lost {
        if !view.domains.contains_key(guest) {
            steps.push(Step::Forget { sbdf: *sbdf, guest: *guest, driver: None });
        }
    }
    for server in &view.servers {
        for (sbdf, known) in &server.functions {
            let Some(guest) = known.holder else { continue };
            if !view.domains.contains_key(&guest) {
                steps.push(Step::Forget { sbdf: *sbdf, guest, driver: Some(server.driver.domid) });
            } else if !known.listed {
                steps.push(Step::Orphan { sbdf: *sbdf, guest });
            }
        }
    }
    for server in view.servers.iter().filter(|server| !server.is_undecided()) {
        for device in &server.driver.config.devices {
            let (Some(name), Some(known)) = (&device.guest, server.functions.get(&device.sbdf)) else { continue };
            let free = known.holder.is_none() && matches!(known.state.as_str(), "ready" | "broken");
            let guest = view.domains.iter().find(|(_, other)| *other == name).map(|(guest, _)| *guest);
            let Some(guest) = guest.filter(|guest| free && known.released != Some(*guest)) else { continue };
            let Driver { name, domid, .. } = &server.driver;
            steps.push(Step::Attach { guest, sbdf: device.sbdf, driver: name.clone(), domid: *domid });
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(domid: u32, mode: &str, known: Known) -> Server {
        let (config, _) =
            pciback::cmdline::parse("ecam=0000:00-ff@b0000000 dev=0000:01:00.0,guest=db1 dev=0000:02:00.0");
        let functions = config.devices.iter().map(|device| (device.sbdf, Known::default())).collect();
        let mut server = Server { driver: Driver { domid, name: "p0".into(), config }, mode: mode.into(), functions };
        server.functions.insert(nic(), known);
        server
    }

    fn nic() -> Sbdf {
        "0000:01:00.0".parse().unwrap()
    }

    fn view(domains: &[(u32, &str)], servers: Vec<Server>) -> View {
        let domains = domains.iter().map(|(domid, name)| (*domid, name.to_string())).collect();
        View { domains, servers, lost: BTreeMap::new() }
    }

    fn ready() -> Known {
        Known { state: "ready".into(), ..Known::default() }
    }

    fn attach(guest: u32, domid: u32) -> Step {
        Step::Attach { guest, sbdf: nic(), driver: "p0".into(), domid }
    }

    #[test]
    fn a_guest_gets_what_was_promised_to_its_name_once_both_are_there() {
        assert_eq!(plan(&view(&[(2, "p0")], vec![server(2, "delegated", ready())])), []);
        assert_eq!(plan(&view(&[(5, "db1")], vec![])), []);
        let both = [(2, "p0"), (5, "db1"), (6, "web")];
        assert_eq!(plan(&view(&both, vec![server(2, "delegated", ready())])), [attach(5, 2)]);
        for state in ["", "resetting", "in-use"] {
            let known = Known { state: state.into(), ..Known::default() };
            assert_eq!(plan(&view(&both, vec![server(2, "direct", known)])), [], "{state}");
        }
        // It may be about to find dom0: a guest attached now could only look.
        for mode in ["", "read-only"] {
            assert_eq!(plan(&view(&both, vec![server(2, mode, ready())])), [], "{mode}");
        }
        let held = Known { holder: Some(5), listed: true, state: "in-use".into(), released: None };
        assert_eq!(plan(&view(&both, vec![server(2, "delegated", held)])), []);
    }

    #[test]
    fn what_was_taken_by_hand_stays_away_until_the_guest_is_another() {
        let known = Known { released: Some(5), ..ready() };
        let domains = |guest| [(2, "p0"), (guest, "db1")];
        assert_eq!(plan(&view(&domains(5), vec![server(2, "delegated", known.clone())])), []);
        assert_eq!(plan(&view(&domains(6), vec![server(2, "delegated", known)])), [attach(6, 2)]);
    }

    #[test]
    fn a_renamed_guest_keeps_what_it_has_and_the_name_gets_it_when_it_is_free() {
        let held = Known { holder: Some(5), listed: true, state: "in-use".into(), released: None };
        let domains = [(2, "p0"), (5, "old"), (6, "db1")];
        assert_eq!(plan(&view(&domains, vec![server(2, "delegated", held)])), []);
        assert_eq!(plan(&view(&domains, vec![server(2, "delegated", ready())])), [attach(6, 2)]);
    }

    #[test]
    fn a_rebooted_guest_is_another_and_the_old_one_is_forgotten_first() {
        let held = Known { holder: Some(5), listed: true, ..ready() };
        let steps = plan(&view(&[(2, "p0"), (6, "db1")], vec![server(2, "delegated", held)]));
        assert_eq!(steps, [Step::Forget { sbdf: nic(), guest: 5, driver: Some(2) }]);
    }

    #[test]
    fn a_guest_keeps_its_function_without_a_driver_domain_until_another_one_comes() {
        let mut alone = view(&[(5, "db1")], vec![]);
        alone.lost.insert(nic(), 5);
        assert_eq!(plan(&alone), []);
        alone.domains.clear();
        assert_eq!(plan(&alone), [Step::Forget { sbdf: nic(), guest: 5, driver: None }]);
        let held = Known { holder: Some(5), ..Known::default() };
        let steps = plan(&view(&[(7, "p0"), (5, "db1")], vec![server(7, "", held)]));
        assert_eq!(steps, [Step::Orphan { sbdf: nic(), guest: 5 }]);
    }
}
