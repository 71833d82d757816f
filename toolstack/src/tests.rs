//! Attach and detach against recorded fakes: what is checked, in which order things are done, and that
//! a failure at any step leaves nothing behind.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use pciback::sbdf::Sbdf;

use crate::attach::{self, Host, attach};
use crate::detach::{self, detach};
use crate::domains::{Domains, Driver, Guest, XenInfo};
use crate::error::{Failure, Outcome};
use crate::sysfs::{NOBODY, Sysfs};
use crate::xen::{Hypervisor, Store};
use crate::{aer, assignable, list};

const NIC: &str = "0000:01:00.0";

/// Where dom0 wishes that a function be handed over.
const RETRY: &str = "/local/domain/2/data/pciback/retry";

/// Where dom0 asks for counters, and where they are told.
const REPORT: &str = "/local/domain/2/data/pciback/report";
const COUNTERS: &str = "/local/domain/2/data/pciback/device/0000-01-00-0/counters";

/// Where dom0 reports errors, and where it is told what became of the last.
const AER: &str = "/local/domain/2/data/pciback/aer";
const FATE: &str = "/local/domain/2/data/pciback/device/0000-01-00-0/aer";

/// A host that records. Step number `fail_at` of hypercalls and writes fails.
struct Fake {
    root: PathBuf,
    log: RefCell<Vec<String>>,
    nodes: RefCell<BTreeMap<String, String>>,
    saved: RefCell<Option<BTreeMap<String, String>>>,
    guest: RefCell<Guest>,
    info: RefCell<XenInfo>,
    /// What the driver domain was started with.
    extra: RefCell<Option<String>>,
    /// The guest that Xen assigned each function to.
    owners: RefCell<BTreeMap<Sbdf, u32>>,
    step: Cell<u32>,
    fail_at: Cell<u32>,
    /// Whether driver domain and frontend answer.
    alive: Cell<bool>,
    refuse: Cell<bool>,
    /// Xen's answer to every assignment to a guest, if it is not 0.
    refuses_assignment: Cell<Option<i32>>,
    /// Whether another try makes a broken function ready.
    mends: Cell<bool>,
    /// What becomes of an error of the card that is reported; without it, the driver domain does not take reports up.
    fate: RefCell<Option<String>>,
    /// What the driver domain has counted for the card; without it, it does not answer who asks.
    counters: RefCell<Option<String>>,
}

impl Fake {
    fn new(name: &str) -> Fake {
        let root = std::env::temp_dir().join(format!("xl-pciback-{}-{name}", std::process::id()));
        let folder = root.join(format!("sys/bus/pci/devices/{NIC}"));
        fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        write("vendor", "0x8086\n");
        write("device", "0x10d3\n");
        write("class", "0x020000\n");
        write("irq", "21\n");
        write("reset", "");
        write("enable", "1\n");
        write("driver_override", &format!("{NOBODY}\n"));
        write(
            "resource",
            "0x0000000380000000 0x0000000380003fff 0x0000000000140204\n0x0 0x0 0x0\n0x000000000000c040 0x000000000000c05f 0x0000000000040101\n",
        );
        fs::write(folder.join("config"), [0u8; 64]).unwrap();
        let fake = Fake {
            root,
            log: RefCell::default(),
            nodes: RefCell::default(),
            saved: RefCell::default(),
            guest: RefCell::new(Guest {
                domid: 3,
                name: "db1".into(),
                kind: "pv".into(),
                e820_host: true,
                passthrough: "enabled".into(),
            }),
            info: RefCell::new(XenInfo { commandline: "mmcfg=0".into(), virt_caps: "pv_directio".into() }),
            extra: RefCell::new(Some("ecam=0000:00-ff@b0000000 dev=0000:01:00.0,id=8086:10d3 mode=mmcfg0".into())),
            owners: RefCell::default(),
            step: Cell::new(0),
            fail_at: Cell::new(0),
            alive: Cell::new(true),
            refuse: Cell::new(false),
            refuses_assignment: Cell::new(None),
            mends: Cell::new(false),
            fate: RefCell::default(),
            counters: RefCell::default(),
        };
        for (path, value) in [
            ("/local/domain/2/name", "pciback0"),
            ("/local/domain/2/data/pciback/version", "0.1.0"),
            ("/local/domain/2/data/pciback/mode", "mmcfg0"),
            ("/local/domain/2/data/pciback/state", "ready"),
            ("/local/domain/2/data/pciback/device/0000-01-00-0/state", "ready"),
            ("/local/domain/2/data/pciback/device/0000-01-00-0/id", "8086:10d3"),
            ("/local/domain/3/name", "db1"),
        ] {
            fake.nodes.borrow_mut().insert(path.into(), value.into());
        }
        fake
    }

    /// One more function of the host, assignable, with GSI 21.
    fn add_function(&self, sbdf: &str, resource: &str) {
        let folder = self.root.join(format!("sys/bus/pci/devices/{sbdf}"));
        fs::create_dir_all(&folder).unwrap();
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        for (name, text) in [
            ("vendor", "0x1b36\n"),
            ("device", "0x0010\n"),
            ("class", "0x010802\n"),
            ("irq", "21\n"),
            ("enable", "1\n"),
            ("driver_override", "pciback-stubdom\n"),
            ("resource", resource),
        ] {
            write(name, text);
        }
        fs::write(folder.join("config"), [0u8; 64]).unwrap();
        let extra = format!("ecam=0000:00-ff@b0000000 dev={NIC} dev={sbdf} mode=mmcfg0");
        *self.extra.borrow_mut() = Some(extra);
        let node = sbdf.replace([':', '.'], "-");
        self.set(&format!("/local/domain/2/data/pciback/device/{node}/state"), "ready");
    }

    fn set(&self, path: &str, value: &str) {
        self.nodes.borrow_mut().insert(path.into(), value.into());
    }

    fn sysfs(&self) -> Sysfs {
        Sysfs::at(&self.root)
    }

    fn set_sysfs(&self, name: &str, text: &str) {
        fs::write(self.root.join(format!("sys/bus/pci/devices/{NIC}/{name}")), text).unwrap();
    }

    fn with<T>(&self, job: impl FnOnce(&Host<'_>) -> T) -> T {
        let sysfs = self.sysfs();
        job(&Host {
            xen: self,
            store: self,
            sysfs: &sysfs,
            domains: self,
            patience: Duration::from_millis(180),
            journals: self.root.join("vectors"),
        })
    }

    fn attach(&self) -> Outcome<String> {
        self.attach_this(NIC)
    }

    fn attach_this(&self, sbdf: &str) -> Outcome<String> {
        self.with(|host| attach(host, "db1", sbdf.parse().unwrap(), &attach::Options::default()))
    }

    fn detach(&self, force: bool) -> Outcome<String> {
        self.detach_this(NIC, force)
    }

    fn detach_this(&self, sbdf: &str, force: bool) -> Outcome<String> {
        let options = detach::Options { timeout: Duration::from_millis(60), force, driver: None };
        self.with(|host| detach(host, "db1", sbdf.parse().unwrap(), &options))
    }

    /// Counts a step that can fail, and records it.
    fn try_step(&self, what: String) -> Result<(), i32> {
        self.step.set(self.step.get() + 1);
        if self.step.get() == self.fail_at.get() {
            return Err(22);
        }
        self.log.borrow_mut().push(what);
        Ok(())
    }

    /// What driver domain and frontend do when the list changes.
    fn react(&self) {
        let base = "/local/domain/2/backend/pci/3/0";
        let mut nodes = self.nodes.borrow_mut();
        let wish = nodes.get(RETRY).cloned().unwrap_or_default();
        let state = format!("/local/domain/2/data/pciback/device/{wish}/state");
        if let Some(present) = nodes.get(&state).cloned()
            && (present != "broken" || self.mends.get())
        {
            nodes.insert(state, "ready".into());
            nodes.insert(RETRY.into(), String::new());
        }
        if let Some(fate) = self.fate.borrow().clone()
            && let Some(wish) = nodes.get(AER).cloned().filter(|wish| !wish.is_empty())
        {
            self.log.borrow_mut().push(format!("report {wish}"));
            nodes.insert(FATE.into(), fate);
            nodes.insert(AER.into(), String::new());
        }
        if let Some(counters) = self.counters.borrow().clone()
            && nodes.get(REPORT).is_some_and(|wish| wish == "1")
        {
            nodes.insert(COUNTERS.into(), counters);
            nodes.insert(REPORT.into(), String::new());
        }
        if !self.alive.get() || !nodes.contains_key(&format!("{base}/state")) {
            return;
        }
        for index in 0..4 {
            let state = format!("{base}/state-{index}");
            match nodes.get(&state).map(String::as_str) {
                Some("1") if self.refuse.get() => {
                    nodes.insert(format!("{base}/error-{index}"), "it is on fire".into());
                    nodes.insert(state, "6".into());
                }
                Some("1") => {
                    nodes.insert(format!("{base}/vdev-{index}"), format!("0000:00:0{index}.00"));
                    nodes.insert(state, "3".into());
                }
                Some("5") => drop(nodes.insert(state, "6".into())),
                _ => {}
            }
        }
        nodes.insert(format!("{base}/state"), "4".into());
    }

    /// Rights that were given and not taken back.
    fn rights(&self) -> BTreeMap<String, i32> {
        let mut rights = BTreeMap::new();
        for line in self.log.borrow().iter() {
            if let Some((right, change)) = line.rsplit_once(' ')
                && ["+", "-"].contains(&change)
            {
                *rights.entry(right.to_string()).or_insert(0) = i32::from(change == "+");
            }
        }
        rights.retain(|_, given| *given != 0);
        rights
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

fn sign(allow: bool) -> char {
    if allow { '+' } else { '-' }
}

impl Hypervisor for Fake {
    fn assign(&self, domid: u32, sbdf: Sbdf, relaxed: bool) -> Result<(), i32> {
        assert_eq!(relaxed, domid == 0x7ff1);
        if let Some(number) = self.refuses_assignment.get().filter(|_| domid != 0x7ff1) {
            return Err(number);
        }
        let right = if domid == 0x7ff1 { format!("quarantine {sbdf}") } else { format!("assign {sbdf} {domid} +") };
        self.try_step(right)?;
        if domid != 0x7ff1 {
            self.owners.borrow_mut().insert(sbdf, domid);
        }
        Ok(())
    }
    fn is_free(&self, sbdf: Sbdf) -> Result<bool, i32> {
        Ok(!self.owners.borrow().contains_key(&sbdf))
    }
    fn deassign(&self, domid: u32, sbdf: Sbdf) -> Result<(), i32> {
        self.try_step(format!("assign {sbdf} {domid} -"))?;
        self.owners.borrow_mut().remove(&sbdf);
        Ok(())
    }
    fn iomem(&self, domid: u32, first: u64, frames: u64, allow: bool) -> Result<(), i32> {
        self.try_step(format!("iomem {domid} {first:x} {frames} {}", sign(allow)))
    }
    fn ioport(&self, domid: u32, first: u32, count: u32, allow: bool) -> Result<(), i32> {
        self.try_step(format!("ioport {domid} {first:x} {count} {}", sign(allow)))
    }
    fn map_pirq(&self, domid: u32, gsi: u32) -> Result<(), i32> {
        self.try_step(format!("pirq {domid} {gsi} +"))
    }
    fn unmap_pirq(&self, domid: u32, pirq: u32) -> Result<(), i32> {
        self.try_step(format!("pirq {domid} {pirq} -"))
    }
    fn port_is_closed(&self, _: u32, _: u32) -> Result<bool, i32> {
        Ok(true)
    }
    fn irq(&self, domid: u32, pirq: u32, allow: bool) -> Result<(), i32> {
        self.try_step(format!("irq {domid} {pirq} {}", sign(allow)))
    }
}

impl Store for Fake {
    fn read(&self, tx: u32, path: &str) -> Option<String> {
        if tx == 0 {
            self.react();
        }
        self.nodes.borrow().get(path).cloned()
    }
    fn write(&self, _: u32, path: &str, value: &str) -> Result<(), i32> {
        // A wish is no step that has to be undone.
        if ![RETRY, AER].contains(&path) {
            self.try_step(format!("write {path}"))?;
        }
        self.set(path, value);
        Ok(())
    }
    fn remove(&self, _: u32, path: &str) -> Result<(), i32> {
        if path != RETRY {
            self.log.borrow_mut().push(format!("remove {path}"));
        }
        let below = format!("{path}/");
        self.nodes.borrow_mut().retain(|key, _| key != path && !key.starts_with(&below));
        Ok(())
    }
    fn list(&self, _: u32, path: &str) -> Vec<String> {
        let below = format!("{path}/");
        let nodes = self.nodes.borrow();
        let mut names: Vec<String> =
            nodes.keys().filter_map(|key| key.strip_prefix(&below)?.split('/').next().map(String::from)).collect();
        names.dedup();
        names
    }
    fn permit(&self, _: u32, _: &str, owner: u32, _: Option<u32>) -> Result<(), i32> {
        assert!([2, 3].contains(&owner));
        Ok(())
    }
    fn begin(&self) -> Result<u32, i32> {
        *self.saved.borrow_mut() = Some(self.nodes.borrow().clone());
        Ok(1)
    }
    fn end(&self, _: u32, commit: bool) -> Result<(), i32> {
        let saved = self.saved.borrow_mut().take().unwrap();
        if !commit {
            *self.nodes.borrow_mut() = saved;
        }
        Ok(())
    }
}

impl Domains for Fake {
    fn guest(&self, name: &str) -> Outcome<Guest> {
        let guest = self.guest.borrow().clone();
        if guest.name == name { Ok(guest) } else { Err(Failure::new("no such domain", "start it")) }
    }
    fn drivers(&self) -> Outcome<Vec<Driver>> {
        let extra = self.extra.borrow().clone();
        let driver =
            |extra: String| Driver { domid: 2, name: "pciback0".into(), config: pciback::cmdline::parse(&extra).0 };
        Ok(extra.map(driver).into_iter().collect())
    }
    fn xen(&self) -> Outcome<XenInfo> {
        Ok(self.info.borrow().clone())
    }
}

#[test]
fn attach_goes_in_the_order_of_the_design_and_gives_just_what_is_needed() {
    let fake = Fake::new("order");
    let told = fake.attach().unwrap();
    assert!(told.contains("exported to \"db1\""), "{told}");
    let log = fake.log.borrow();
    // What is begun is written down before, and done with the announcement.
    let place = |what: &str| log.iter().position(|line| line.contains(what));
    assert!(place("write /pciback/assignable/0000-01-00-0/assigning") < place("assign 0000:01:00.0 3 +"), "{log:#?}");
    assert!(place("irq 3 21 +") < place("remove /pciback/assignable/0000-01-00-0/assigning"), "{log:#?}");
    let is_call = |line: &&str| !line.starts_with("write") && !line.starts_with("remove");
    let hypercalls: Vec<&str> = log.iter().map(String::as_str).filter(is_call).collect();
    assert_eq!(
        hypercalls,
        ["assign 0000:01:00.0 3 +", "iomem 3 380000 4 +", "ioport 3 c040 32 +", "pirq 3 21 +", "irq 3 21 +"]
    );
    let nodes = fake.nodes.borrow();
    let back = |name: &str| nodes[&format!("/local/domain/2/backend/pci/3/0/{name}")].clone();
    assert_eq!(
        (back("dev-0"), back("irq-0"), back("num_devs"), back("domain")),
        (NIC.into(), "21".into(), "1".into(), "db1".into())
    );
    assert!(pciback::config::Resource::parse_list(&back("resource-0")).is_some(), "the driver domain understands it");
    assert_eq!(nodes["/local/domain/3/device/pci/0/backend"], "/local/domain/2/backend/pci/3/0");
}

#[test]
fn a_failure_at_any_step_leaves_nothing_behind() {
    let steps = {
        let fake = Fake::new("count");
        fake.attach().unwrap();
        fake.step.get()
    };
    assert!(steps > 20);
    for step in 1..=steps {
        let fake = Fake::new(&format!("fail{step}"));
        let before = fake.nodes.borrow().clone();
        fake.fail_at.set(step);
        let failure = fake.attach().expect_err("a step failed");
        assert!(failure.what.contains("EINVAL"), "{failure}");
        assert_eq!(*fake.nodes.borrow(), before, "step {step}");
        assert_eq!(fake.rights(), BTreeMap::new(), "step {step}");
    }
}

#[test]
fn a_refusal_by_the_driver_domain_is_told_and_leaves_nothing_behind() {
    let fake = Fake::new("refuse");
    let before = fake.nodes.borrow().clone();
    fake.refuse.set(true);
    let failure = fake.attach().expect_err("refused");
    assert!(failure.what.contains("it is on fire"), "{failure}");
    assert_eq!(*fake.nodes.borrow(), before);
    assert_eq!(fake.rights(), BTreeMap::new());
    assert!(fake.log.borrow().contains(&format!("quarantine {NIC}")));
}

#[test]
fn every_wrong_start_has_its_own_message_and_changes_nothing() {
    type Change = fn(&Fake);
    const STATE: &str = "/local/domain/2/data/pciback/device/0000-01-00-0/state";
    let cases: [(Change, &str, &str); 19] = [
        (|f| f.guest.borrow_mut().name = "other".into(), "no such domain", "start"),
        (|f| f.guest.borrow_mut().domid = 0, "domain 0 is no guest", "name a guest"),
        (|f| f.guest.borrow_mut().kind = "pvh".into(), "PV guests only", "type = \"pv\""),
        (|f| f.guest.borrow_mut().e820_host = false, "without e820_host", "e820_host = 1"),
        (|f| f.guest.borrow_mut().passthrough = "disabled".into(), "without passthrough", "passthrough = \"enabled\""),
        (|f| f.set_sysfs("driver_override", "(null)\n"), "not made assignable", "assignable-add"),
        (|f| f.set_sysfs("class", "0x060000\n"), "the host itself needs", "a device"),
        (|f| *f.extra.borrow_mut() = None, "no driver domain is running", "xl create"),
        (
            |f| *f.extra.borrow_mut() = Some("ecam=0000:00-ff@b0000000 dev=0000:02:00.0".into()),
            "no running driver domain has 0000:01:00.0",
            "dev=",
        ),
        (
            |f| drop(f.nodes.borrow_mut().remove(STATE)),
            "does not say that 0000:01:00.0 is ready",
            "xl console pciback0",
        ),
        (|f| f.set("/local/domain/2/data/pciback/device/0000-01-00-0/state", "in-use"), "already attached", "detach"),
        (
            |f| {
                f.set("/local/domain/2/data/pciback/device/0000-01-00-0/state", "broken");
                f.set("/local/domain/2/data/pciback/device/0000-01-00-0/reason", "no frame");
            },
            "no frame",
            "start the driver domain again",
        ),
        (|f| f.set("/local/domain/2/data/pciback/device/0000-01-00-0/id", "8086:1533"), "reads 8086:1533", "check"),
        (
            |f| *f.extra.borrow_mut() = Some("ecam=0000:00-ff@b0000000 dev=0000:01:00.0,guest=web".into()),
            "promised to guest \"web\"",
            "attach it to that guest",
        ),
        (|f| f.owners.borrow_mut().extend([(NIC.parse().unwrap(), 7)]), "Xen says that another domain", "xl dmesg"),
        (
            |f| {
                f.set("/local/domain/3/device/pci/0/backend-id", "0");
                f.set("/local/domain/0/backend/pci/3/0/state", "4");
            },
            "gets its PCI functions from domain 0",
            "take pci= out",
        ),
        (|f| f.info.borrow_mut().virt_caps.clear(), "no usable IOMMU", "firmware"),
        (|f| f.info.borrow_mut().commandline.clear(), "not booted with mmcfg=0", "boot Xen with mmcfg=0"),
        (
            |f| {
                let folder = f.root.join(format!("sys/bus/pci/devices/{NIC}"));
                std::os::unix::fs::symlink("/sys/bus/pci/drivers/e1000e", folder.join("driver")).unwrap();
            },
            "in use by dom0's driver \"e1000e\"",
            "assignable-add",
        ),
    ];
    for (number, (change, told, remedy)) in cases.into_iter().enumerate() {
        let fake = Fake::new(&format!("wrong{number}"));
        change(&fake);
        let before = fake.nodes.borrow().clone();
        let failure = fake.attach().expect_err(told);
        assert!(failure.what.contains(told), "{failure}");
        assert!(failure.remedy.contains(remedy), "{failure}");
        assert_eq!(*fake.nodes.borrow(), before, "{told}");
        assert_eq!(*fake.log.borrow(), Vec::<String>::new(), "{told}");
    }
}

/// What broke a function may be over: a guest whose vectors were mapped has died.
#[test]
fn a_broken_function_is_tried_again_before_it_is_given_up() {
    let fake = Fake::new("retry");
    let device = "/local/domain/2/data/pciback/device/0000-01-00-0";
    fake.set(&format!("{device}/state"), "broken");
    fake.set(&format!("{device}/reason"), "release_msix answered -EBUSY (-16)");
    assert!(fake.attach().expect_err("still broken").what.contains("-EBUSY"));
    assert!(!fake.nodes.borrow().contains_key(RETRY), "no wish is left behind");
    fake.mends.set(true);
    fake.attach().unwrap();
}

/// dom0's reset behind the back of a driver domain that has just restored and checked the function would undo it.
#[test]
fn dom0_resets_only_what_has_no_reset_of_its_own() {
    for (method, dom0s) in [("flr", false), ("none", false), ("dom0", true)] {
        let fake = Fake::new(&format!("reset-{method}"));
        let reset = fake.root.join(format!("sys/bus/pci/devices/{NIC}/reset"));
        fake.set("/local/domain/2/data/pciback/device/0000-01-00-0/reset", method);
        fake.attach().unwrap();
        assert_eq!(fs::read_to_string(&reset).unwrap() == "1", dom0s, "attach, {method}");
        fs::write(&reset, "").unwrap();
        fake.detach(false).unwrap();
        assert_eq!(fs::read_to_string(&reset).unwrap() == "1", dom0s, "detach, {method}");
    }
}

/// libxl revokes first and tells the guest afterwards.
#[test]
fn detach_tells_the_guest_before_it_takes_anything() {
    let fake = Fake::new("detach");
    let before = fake.nodes.borrow().clone();
    fake.attach().unwrap();
    fake.log.borrow_mut().clear();
    fake.detach(false).unwrap();
    let log = fake.log.borrow();
    let first_right = log.iter().position(|line| line.ends_with(" -")).unwrap();
    let told = log.iter().position(|line| line.ends_with("/state-0")).unwrap();
    assert!(told < first_right);
    let taken: Vec<&str> = log.iter().map(String::as_str).filter(|line| line.ends_with(" -")).collect();
    // A BAR above 4 GiB is taken back at its full address (XSA-476).
    assert_eq!(
        taken,
        ["irq 3 21 -", "pirq 3 21 -", "iomem 3 380000 4 -", "ioport 3 c040 32 -", "assign 0000:01:00.0 3 -"]
    );
    drop(log);
    assert_eq!(*fake.nodes.borrow(), before);
}

#[test]
fn a_guest_that_does_not_answer_keeps_its_device_unless_forced() {
    let fake = Fake::new("deaf");
    fake.attach().unwrap();
    fake.alive.set(false);
    fake.log.borrow_mut().clear();
    let failure = fake.detach(false).expect_err("no answer");
    assert!(failure.what.contains("did not let 0000:01:00.0 go"), "{failure}");
    assert!(!fake.log.borrow().iter().any(|line| line.ends_with(" -")));
    assert_eq!(fake.nodes.borrow()["/local/domain/2/backend/pci/3/0/state-0"], "3", "the wish is withdrawn");
    fake.detach(true).unwrap();
    assert!(fake.log.borrow().iter().any(|line| line.starts_with("assign") && line.ends_with(" -")));
}

/// What a program that was killed in the middle of attaching leaves: the function is listed, and refused.
#[test]
fn a_function_that_was_never_exported_is_taken_away_without_telling_the_guest() {
    let fake = Fake::new("refused");
    let before = fake.nodes.borrow().clone();
    fake.attach().unwrap();
    let base = "/local/domain/2/backend/pci/3/0";
    fake.nodes.borrow_mut().remove(&format!("{base}/vdev-0"));
    fake.set(&format!("{base}/state-0"), "6");
    fake.set(&format!("{base}/error-0"), "it is on fire");
    fake.log.borrow_mut().clear();
    fake.detach(false).unwrap();
    let log = fake.log.borrow();
    assert!(!log.iter().any(|line| line.starts_with("write") && line.ends_with("state-0")), "{log:#?}");
    assert!(log.iter().any(|line| line == "assign 0000:01:00.0 3 -"), "{log:#?}");
    assert_eq!(*fake.nodes.borrow(), before);
}

#[test]
fn an_error_is_reported_and_what_becomes_of_it_told() {
    let fake = Fake::new("aer");
    let report =
        |severity| fake.with(|host| aer::report(host, NIC.parse().unwrap(), severity, Duration::from_millis(60)));
    for (fate, severity) in [("nonfatal: recovered", "auto"), ("fatal: reset: no guest has it", "fatal")] {
        *fake.fate.borrow_mut() = Some(fate.into());
        fake.log.borrow_mut().clear();
        assert_eq!(report(severity), Ok(format!("{NIC}: {fate}")));
        assert_eq!(
            *fake.log.borrow(),
            [format!("report 0000-01-00-0 {severity}")],
            "one report, in the driver's words"
        );
    }
    fake.attach().unwrap();
    for fate in ["fatal: failed: its guest's driver gives it up (resume)", "nonsense", "", "fatal: recovered!"] {
        *fake.fate.borrow_mut() = Some(fate.into());
        let failure = report("auto").expect_err(fate);
        assert!(failure.what.contains(fate), "{failure}");
        assert!(failure.remedy.contains("xl-pciback detach db1 0000:01:00.0"), "{failure}");
    }
    *fake.fate.borrow_mut() = Some("fatal: recovering".into());
    assert!(report("auto").expect_err("still at it").what.contains("does not say"));
}

/// A report that stays would be taken up by the next driver domain of this number, of another device.
#[test]
fn a_report_that_nobody_takes_up_is_not_left_behind_and_another_programs_is_left_alone() {
    let fake = Fake::new("aer-deaf");
    let report = || fake.with(|host| aer::report(host, NIC.parse().unwrap(), "fatal", Duration::from_millis(60)));
    assert!(report().expect_err("deaf").what.contains("does not take up"));
    assert!(!fake.nodes.borrow().contains_key(AER));
    fake.set(AER, "0000-02-00-0 fatal");
    assert!(report().expect_err("taken").what.contains("does not take up"));
    assert_eq!(fake.nodes.borrow()[AER], "0000-02-00-0 fatal");
    assert!(fake.with(|host| aer::report(host, "0000:09:00.0".parse().unwrap(), "fatal", Duration::ZERO)).is_err());
}

#[test]
fn only_four_words_say_how_bad_an_error_is() {
    for word in ["auto", "nonfatal", "fatal", "permanent"] {
        assert_eq!(aer::severity(word), Ok(word));
    }
    for word in ["", "Fatal", "correctable", "fatal ", "2"] {
        assert!(aer::severity(word).is_err(), "{word:?}");
    }
}

#[test]
fn detaching_what_is_not_attached_says_so() {
    let fake = Fake::new("absent");
    assert!(fake.detach(false).expect_err("absent").what.contains("is not attached"));
}

#[test]
fn the_list_closes_up_when_a_function_in_the_middle_goes() {
    let fake = Fake::new("renumber");
    let base = "/local/domain/2/backend/pci/3/0";
    fake.set(&format!("{base}/num_devs"), "3");
    fake.set(&format!("{base}/state"), "4");
    for (index, name) in ["0000:00:05.0", NIC, "0000:02:00.0"].iter().enumerate() {
        fake.set(&format!("{base}/dev-{index}"), name);
        fake.set(&format!("{base}/state-{index}"), "3");
        fake.set(&format!("{base}/vdev-{index}"), &format!("0000:00:0{index}.00"));
    }
    fake.set(&format!("{base}/error-1"), "old");
    let link = crate::nodes::Link { driver: 2, guest: 3 };
    fake.with(|host| attach::withdraw(host, &link, NIC.parse().unwrap())).unwrap();
    let nodes = fake.nodes.borrow();
    assert_eq!(nodes[&format!("{base}/num_devs")], "2");
    assert_eq!(nodes[&format!("{base}/dev-1")], "0000:02:00.0");
    assert_eq!(nodes[&format!("{base}/vdev-1")], "0000:00:02.00");
    assert!(!nodes.contains_key(&format!("{base}/error-1")));
    assert!(!nodes.contains_key(&format!("{base}/dev-2")));
}

#[test]
fn a_function_is_taken_from_dom0_and_given_back() {
    let fake = Fake::new("assignable");
    fake.set_sysfs("driver_override", "(null)\n");
    let sbdf: Sbdf = NIC.parse().unwrap();
    assert_eq!(fake.with(|host| assignable::add(host, sbdf)), Ok(format!("{NIC}: assignable")));
    assert_eq!(fake.with(|host| assignable::add(host, sbdf)), Ok(format!("{NIC}: already assignable")));
    assert_eq!(fake.with(assignable::list), [format!("{NIC} 8086:10d3 irq 21")]);
    fake.set("/local/domain/2/backend/pci/3/0/num_devs", "1");
    fake.set("/local/domain/2/backend/pci/3/0/dev-0", NIC);
    let failure = fake.with(|host| assignable::remove(host, sbdf, true)).expect_err("attached");
    assert!(failure.what.contains("attached to domain 3 (\"db1\")"), "{failure}");
    fake.nodes.borrow_mut().remove("/local/domain/2/backend/pci/3/0/num_devs");
    assert!(fake.with(|host| assignable::remove(host, sbdf, true)).is_ok());
    assert!(fake.with(assignable::list).is_empty());
}

#[test]
fn a_bridge_cannot_be_made_assignable() {
    let fake = Fake::new("bridge");
    let mut header = [0u8; 64];
    header[0x0e] = 0x81;
    fs::write(fake.root.join(format!("sys/bus/pci/devices/{NIC}/config")), header).unwrap();
    let failure = fake.with(|host| assignable::add(host, NIC.parse().unwrap())).expect_err("bridge");
    assert!(failure.what.contains("is a bridge"), "{failure}");
}

#[test]
fn the_list_shows_states_guests_and_promises() {
    let fake = Fake::new("list");
    fake.attach().unwrap();
    fake.set("/local/domain/2/data/pciback/device/0000-01-00-0/state", "in-use");
    fake.set("/local/domain/2/data/pciback/device/0000-01-00-0/frontend", "3");
    fake.set("/local/domain/2/backend/pci/3/0/vdev-0", "0000:00:00.00");
    let rows = fake.with(list::rows).unwrap();
    assert_eq!(rows.len(), 1);
    let json = list::json(&rows);
    assert_eq!(json[0]["function"], NIC);
    assert_eq!(json[0]["guest"], "db1");
    assert_eq!(json[0]["guest_address"], "0000:00:00.00");
    assert_eq!(json[0]["reason"], serde_json::Value::Null);
    let table = list::table(&rows);
    assert!(
        table.lines().nth(1).unwrap().contains("pciback0 (2)   0000:01:00.0  8086:10d3  in-use  db1 (3)"),
        "{table}"
    );
}

/// What `status` goes by.
fn counted(fake: &Fake) -> Vec<list::Row> {
    fake.with(|host| {
        let mut rows = list::rows(host).unwrap();
        list::count(host, &mut rows);
        rows
    })
}

#[test]
fn the_status_shows_what_guests_do_and_what_is_wrong() {
    let fake = Fake::new("status");
    let device = "/local/domain/2/data/pciback/device/0000-01-00-0";
    fake.attach().unwrap();
    for (node, value) in
        [("state", "in-use"), ("frontend", "3"), ("interrupts", "MSI-X 3"), ("msix", "65 entries"), ("reset", "flr")]
    {
        fake.set(&format!("{device}/{node}"), value);
    }
    fake.set("/local/domain/2/data/pciback/mode", "direct");
    fake.set("/local/domain/2/data/pciback/mode-why", "Xen takes its calls");
    fake.set("/local/domain/2/data/pciback/serve", "not needed");
    *fake.counters.borrow_mut() = Some("120 34 5 6".into());
    let rows = counted(&fake);
    assert_eq!(
        list::overview(&rows),
        "FUNCTION      STATE   GUEST    MODE    INTERRUPTS  MSI-X       RESET  READS  WRITES  REFUSED  ERRORS\n\
         0000:01:00.0  in-use  db1 (3)  direct  MSI-X 3     65 entries  flr    120    34      5        6\n\
         \n\
         pciback0 (2)\n  mode              direct\n  mode because      Xen takes its calls\n  serve             \
         not needed"
    );
    let paragraph = list::details(&rows);
    for line in [
        "0000:01:00.0 8086:10d3: in-use, guest db1 (3)",
        "  interrupts        MSI-X 3",
        "  MSI-X             65 entries",
        "  reset             flr",
        "  counters          120 reads, 34 writes, 5 refused, 6 errors",
        "  driver domain     pciback0 (2), mode direct",
        "  serve             not needed",
    ] {
        assert!(paragraph.lines().any(|found| found == line), "{line}:\n{paragraph}");
    }
    let json = list::json(&rows);
    for (key, value) in [("reads", 120), ("writes", 34), ("refused", 5), ("errors", 6)] {
        assert_eq!(json[0][key], value, "{key}");
    }
    assert_eq!(json[0]["serve"], "not needed");

    fake.set(&format!("{device}/state"), "broken");
    fake.set(&format!("{device}/reason"), "it is on fire");
    let table = list::overview(&counted(&fake));
    assert!(table.contains("\n\n0000:01:00.0: broken: it is on fire\n\npciback0 (2)\n"), "{table}");
}

#[test]
fn a_driver_domain_that_does_not_answer_has_no_counters() {
    let fake = Fake::new("uncounted");
    // From an earlier time, when it did.
    fake.set(COUNTERS, "1 2 3 4");
    let rows = counted(&fake);
    assert!(!fake.nodes.borrow().contains_key(REPORT), "no wish is left behind");
    let table = list::overview(&rows);
    let cells: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(cells, [NIC, "ready", "-", "mmcfg0", "-", "-", "-", "-", "-", "-", "-"]);
    assert!(table.ends_with("\n  serve             -"), "{table}");
    assert!(list::details(&rows).contains("\n  counters          -\n"));
    let json = list::json(&rows);
    for key in ["reads", "writes", "refused", "errors", "serve"] {
        assert_eq!(json[0].get(key), Some(&serde_json::Value::Null), "{key}");
    }
    // One that has not come up is not waited for, and nothing is made in its name.
    *fake.counters.borrow_mut() = Some("9 8 7 6".into());
    assert_eq!(list::json(&counted(&fake))[0]["reads"], 9);
    fake.nodes.borrow_mut().remove("/local/domain/2/data/pciback/state");
    fake.log.borrow_mut().clear();
    assert_eq!(counted(&fake)[0].counters, None);
    assert!(fake.log.borrow().is_empty());
}

#[test]
fn the_list_asks_for_nothing() {
    let fake = Fake::new("quiet");
    *fake.counters.borrow_mut() = Some("1 2 3 4".into());
    let rows = fake.with(list::rows).unwrap();
    assert_eq!(rows[0].counters, None);
    assert!(fake.log.borrow().is_empty() && !fake.nodes.borrow().contains_key(REPORT));
}

/// The rig's "two-functions" on Xen 4.17: NVMe drive and network card have GSI 21, and after the card was
/// detached the drive got no interrupt any more ("I/O timeout, completion polled").
#[test]
fn what_another_function_of_the_guest_needs_stays() {
    const DRIVE: &str = "0000:00:05.0";
    let fake = Fake::new("shared");
    // Its first BAR begins in the last frame of the card's.
    fake.add_function(DRIVE, "0x0000000380003800 0x00000003800047ff 0x0000000000140204\n");
    fake.attach().unwrap();
    fake.attach_this(DRIVE).unwrap();
    fake.log.borrow_mut().clear();
    fake.detach_this(DRIVE, false).unwrap();
    let taken = |fake: &Fake| {
        let log = fake.log.borrow();
        log.iter().filter(|line| line.ends_with(" -")).cloned().collect::<Vec<_>>()
    };
    assert_eq!(taken(&fake), ["iomem 3 380004 1 -".to_string(), format!("assign {DRIVE} 3 -")]);
    // The last one takes it all along.
    fake.log.borrow_mut().clear();
    fake.detach(false).unwrap();
    assert_eq!(taken(&fake)[..3], ["irq 3 21 -", "pirq 3 21 -", "iomem 3 380000 4 -"]);
}

#[test]
fn a_failed_attach_takes_nothing_from_the_functions_that_the_guest_has() {
    const DRIVE: &str = "0000:00:05.0";
    let new = |name: &str| {
        let fake = Fake::new(name);
        fake.add_function(DRIVE, "0x0000000380003800 0x00000003800047ff 0x0000000000140204\n");
        fake.attach().unwrap();
        fake.log.borrow_mut().clear();
        fake.step.set(0);
        fake
    };
    let steps = {
        let fake = new("second-count");
        fake.attach_this(DRIVE).unwrap();
        fake.step.get()
    };
    for step in 1..=steps {
        let fake = new(&format!("second{step}"));
        let before = fake.nodes.borrow().clone();
        fake.fail_at.set(step);
        fake.attach_this(DRIVE).expect_err("a step failed");
        assert_eq!(*fake.nodes.borrow(), before, "step {step}");
        let log = fake.log.borrow();
        let lost: Vec<&String> = log
            .iter()
            .filter(|line| {
                line.ends_with(" -") && **line != format!("assign {DRIVE} 3 -") && *line != "iomem 3 380004 1 -"
            })
            .collect();
        assert!(lost.is_empty(), "step {step}: {lost:?}");
    }
}

/// Any guest may write `data/pciback` below its own directory.
#[test]
fn a_guest_that_poses_as_a_driver_domain_is_not_believed() {
    let fake = Fake::new("impostor");
    fake.set("/local/domain/1/data/pciback/version", "0.1.0");
    fake.set("/local/domain/1/data/pciback/device/0000-01-00-0/state", "ready");
    fake.attach().unwrap();
    assert_eq!(fake.nodes.borrow()["/local/domain/3/device/pci/0/backend-id"], "2");
    assert_eq!(fake.with(list::rows).unwrap().len(), 1);
    // Without the real one there is none.
    let fake = Fake::new("impostor-alone");
    *fake.extra.borrow_mut() = None;
    fake.set("/local/domain/1/data/pciback/version", "0.1.0");
    fake.set("/local/domain/1/data/pciback/device/0000-01-00-0/state", "ready");
    assert!(fake.attach().expect_err("impostor").what.contains("no driver domain is running"));
}

#[test]
fn what_a_driver_domain_writes_is_bounded_and_fit_for_a_terminal() {
    let fake = Fake::new("hostile");
    fake.set("/local/domain/2/data/pciback/device/0000-01-00-0/state", "broken");
    fake.set(
        "/local/domain/2/data/pciback/device/0000-01-00-0/reason",
        &format!("\u{1b}]0;owned\u{7}\n{}", "x".repeat(5000)),
    );
    let failure = fake.attach().expect_err("broken").to_string();
    assert!(failure.contains("?]0;owned??x"), "{failure}");
    assert!(failure.len() < 600);
    let table = list::table(&fake.with(list::rows).unwrap());
    assert_eq!(table.lines().count(), 2);
    // A count of four thousand million is not followed.
    fake.set("/local/domain/2/backend/pci/3/0/num_devs", "4294967295");
    let link = crate::nodes::Link { driver: 2, guest: 3 };
    assert_eq!(link.count(&fake, 0), Some(256));
}

#[test]
fn what_a_driver_domain_tells_the_status_is_no_more_than_it_may_be() {
    let long = "9".repeat(5000);
    for counters in ["", "1 2 3", "1 2 3 4 5", "-1 2 3 4", "1 2 3 4\u{1b}[2J", "1 2 3 99999999999999999999", &long] {
        let fake = Fake::new("hostile-counters");
        *fake.counters.borrow_mut() = Some(counters.into());
        assert_eq!(counted(&fake)[0].counters, None, "{counters:?}");
    }
    let fake = Fake::new("hostile-status");
    let device = "/local/domain/2/data/pciback/device/0000-01-00-0";
    let nasty = format!("\u{1b}]0;owned\u{7}\n{}", "x".repeat(5000));
    for node in ["state", "reason", "interrupts", "msix", "reset", "id", "frontend"] {
        fake.set(&format!("{device}/{node}"), &nasty);
    }
    for node in ["mode", "mode-why", "serve", "state"] {
        fake.set(&format!("/local/domain/2/data/pciback/{node}"), &nasty);
    }
    *fake.counters.borrow_mut() = Some(nasty);
    let rows = counted(&fake);
    assert_eq!((rows[0].counters, rows[0].serve.as_deref()), (None, None));
    let table = list::overview(&rows);
    assert!(table.lines().all(|line| line.len() < 700) && !table.contains(['\u{1b}', '\u{7}']), "{table}");
    assert_eq!(table.lines().count(), 2 + 2 + 5, "{table}");
    assert!(table.lines().take(2).all(|line| line.len() < 350), "{table}");
}

#[test]
fn a_device_whose_driver_domain_is_gone_can_still_be_taken_away() {
    let fake = Fake::new("orphan");
    let before = fake.nodes.borrow().clone();
    fake.attach().unwrap();
    // xenstored removes the directory of a domain that ends.
    fake.nodes.borrow_mut().retain(|path, _| !path.starts_with("/local/domain/2/"));
    *fake.extra.borrow_mut() = None;
    fake.log.borrow_mut().clear();
    let sbdf: Sbdf = NIC.parse().unwrap();
    let failure = fake.with(|host| assignable::remove(host, sbdf, true)).expect_err("a guest has it");
    assert!(failure.what.contains("attached to domain 3"), "{failure}");
    let failure = fake.detach(false).expect_err("nobody can tell the guest");
    assert!(failure.what.contains("is gone, so the guest cannot be told"), "{failure}");
    assert!(fake.log.borrow().is_empty());
    fake.detach(true).unwrap();
    assert!(fake.owners.borrow().is_empty());
    let left: Vec<String> = fake.nodes.borrow().keys().filter(|path| !before.contains_key(*path)).cloned().collect();
    assert_eq!(left, Vec::<String>::new());
}

#[test]
fn one_range_that_cannot_be_taken_back_keeps_no_other() {
    let fake = Fake::new("stubborn");
    fake.attach().unwrap();
    fake.log.borrow_mut().clear();
    // Steps of a detach: two writes, interrupt permission, interrupt, then the first BAR.
    fake.fail_at.set(fake.step.get() + 5);
    let failure = fake.detach(false).expect_err("a BAR");
    assert!(failure.what.contains("detached, but memory 0x380000000-0x380003fff: EINVAL"), "{failure}");
    let log = fake.log.borrow();
    assert!(log.contains(&"ioport 3 c040 32 -".to_string()));
    assert!(log.contains(&format!("assign {NIC} 3 -")));
}

#[test]
fn a_function_that_cannot_be_taken_or_quarantined_goes_back_to_dom0() {
    for (step, why) in [(1, "remember"), (2, "remember"), (3, "cannot be made assignable")] {
        let fake = Fake::new("unquarantined");
        fake.set_sysfs("driver_override", "(null)\n");
        let before = fake.nodes.borrow().clone();
        fake.fail_at.set(step);
        let sbdf: Sbdf = NIC.parse().unwrap();
        let failure = fake.with(|host| assignable::add(host, sbdf)).expect_err("refused");
        assert!(failure.what.contains(why), "{failure}");
        assert_eq!(*fake.nodes.borrow(), before);
        assert!(fake.with(assignable::list).is_empty());
    }
}

#[test]
fn what_a_guest_has_is_not_quarantined_by_a_second_assignable_add() {
    let fake = Fake::new("again");
    fake.attach().unwrap();
    fake.log.borrow_mut().clear();
    let told = fake.with(|host| assignable::add(host, NIC.parse().unwrap())).unwrap();
    assert!(told.contains("attached to domain 3"), "{told}");
    assert!(fake.log.borrow().is_empty());
}

#[test]
fn registers_of_a_stranger_in_the_same_frame_are_noticed() {
    let fake = Fake::new("stranger");
    fake.add_function("0000:00:05.0", "0x0000000380003800 0x00000003800047ff 0x0000000000140204\n");
    let strangers = fake.with(|host| {
        let function = host.sysfs.function(NIC.parse().unwrap()).unwrap();
        crate::rights::strangers(host, &function, &[])
    });
    assert_eq!(strangers.frames, ["0000:00:05.0".parse().unwrap()]);
    assert_eq!(strangers.line, [], "nobody uses it");
}

#[test]
fn xsa_461_a_line_that_a_stranger_shares_is_told() {
    let fake = Fake::new("line");
    let resource = "0x00000000f0000000 0x00000000f0000fff 0x0000000000040200\n";
    for (sbdf, irq, driver) in
        [("0000:00:05.0", "21", true), ("0000:00:06.0", "22", true), ("0000:00:07.0", "21", false)]
    {
        fake.add_function(sbdf, resource);
        let folder = fake.root.join(format!("sys/bus/pci/devices/{sbdf}"));
        fs::write(folder.join("irq"), irq).unwrap();
        if driver {
            std::os::unix::fs::symlink("/sys/bus/pci/drivers/nvme", folder.join("driver")).unwrap();
        }
    }
    let strangers = |own: &[Sbdf]| {
        fake.with(|host| {
            let function = |sbdf: Sbdf| host.sysfs.function(sbdf).unwrap();
            let own: Vec<_> = own.iter().map(|sbdf| function(*sbdf)).collect();
            crate::rights::strangers(host, &function(NIC.parse().unwrap()), &own)
        })
    };
    let neighbour = "0000:00:05.0".parse().unwrap();
    assert_eq!(strangers(&[]).line, [neighbour]);
    assert_eq!(strangers(&[neighbour]).line, [], "one of the guest's own");
}

/// XSA-476: libxl took back the right to the lower 32 bits of an address, and left the guest the one it had.
#[test]
fn xsa_476_the_right_to_an_address_above_4_gib_is_taken_back_whole() {
    let fake = Fake::new("xsa476");
    fake.attach().unwrap();
    let given: Vec<String> = fake.rights().into_keys().filter(|right| right.contains("380000")).collect();
    assert!(!given.is_empty(), "frames above 4 GiB: {:?}", fake.rights());
    fake.detach(false).unwrap();
    assert_eq!(fake.rights(), BTreeMap::new());
}

/// XSA-449: with a phantom function that could not be assigned the function itself was handed on all the same.
#[test]
fn xsa_449_an_assignment_that_xen_refuses_gives_the_guest_nothing() {
    let fake = Fake::new("xsa449");
    fake.refuses_assignment.set(Some(16));
    let failure = fake.attach().unwrap_err();
    assert!(failure.what.contains(NIC), "{failure:?}");
    assert_eq!(fake.rights(), BTreeMap::new());
    let base = "/local/domain/2/backend/pci/3/0";
    assert!(!fake.nodes.borrow().keys().any(|path| path.starts_with(base)), "{:?}", fake.nodes.borrow());
}

/// As xl's `BB:DD.*`, of which libxl attaches the highest function only.
#[test]
fn a_star_means_every_function_of_the_slot_from_0_on() {
    let fake = Fake::new("star");
    for sbdf in ["0000:05:00.1", "0000:05:00.0", "0000:05:01.0", "0001:05:00.0", "0000:05:00.7"] {
        fs::create_dir_all(fake.root.join(format!("sys/bus/pci/devices/{sbdf}"))).unwrap();
    }
    let named = |word: &str| {
        let found = fake.sysfs().named(word);
        found.map(|all| all.iter().map(Sbdf::to_string).collect::<Vec<_>>()).map_err(|failure| failure.what)
    };
    let slot = Ok(["0000:05:00.0", "0000:05:00.1", "0000:05:00.7"].map(String::from).to_vec());
    assert_eq!(named("05:00.*"), slot);
    assert_eq!(named("0000:05:00.*"), slot);
    assert_eq!(named("0001:05:00.*"), Ok(vec!["0001:05:00.0".to_string()]));
    assert_eq!(named("05:00.1"), Ok(vec!["0000:05:00.1".to_string()]));
    // One address need not be there: who uses it says so in its own words.
    assert_eq!(named("07:00.0"), Ok(vec!["0000:07:00.0".to_string()]));
    assert!(named("07:00.*").expect_err("an empty slot").contains("no PCI function in slot 07:00"));
    for wrong in ["05:*.*", "05:00.**", "*", ".*", "05:20.*", "05:00*"] {
        assert!(named(wrong).expect_err(wrong).contains("not a PCI address"), "{wrong}");
    }
}

/// xl's `seize`: what dom0 has is taken for the attachment, but not before all else is there.
#[test]
fn a_function_is_seized_only_where_guest_and_driver_domain_are_there() {
    let sbdf: Sbdf = NIC.parse().unwrap();
    let fake = Fake::new("seize");
    fake.set_sysfs("driver_override", "(null)\n");
    assert!(fake.attach().expect_err("dom0 has it").what.contains("not made assignable"));
    for (guest, driver, told) in [("nobody", None, "no such domain"), ("db1", Some("other"), "is not running")] {
        let failure = fake.with(|host| assignable::seize(host, guest, sbdf, driver)).expect_err(told);
        assert!(failure.what.contains(told), "{failure}");
        assert!(fake.with(assignable::list).is_empty(), "{told}: dom0 still has it");
    }
    fake.with(|host| assignable::seize(host, "db1", sbdf, None)).unwrap();
    assert!(fake.log.borrow().contains(&format!("quarantine {NIC}")));
    fake.log.borrow_mut().clear();
    fake.with(|host| assignable::seize(host, "db1", sbdf, None)).unwrap();
    assert!(fake.log.borrow().is_empty(), "it was seized before");
    fake.attach().unwrap();
}

/// Case 62: XCP-ng's documentation, QubesOS issue 2530: Xen refuses a device with reserved memory of the platform
/// (RMRR), and the reason was in no message.
#[test]
fn case_62_a_device_with_reserved_memory_is_refused_with_a_reason() {
    let fake = Fake::new("rmrr");
    let before = fake.nodes.borrow().clone();
    fake.refuses_assignment.set(Some(1));
    let failure = fake.attach().expect_err("refused");
    assert!(failure.what.contains("reserved memory (RMRR)") && failure.remedy.contains("xl dmesg"), "{failure}");
    assert_eq!(*fake.nodes.borrow(), before);
    assert_eq!(fake.rights(), BTreeMap::new());
    // Nothing was left behind, so another policy of the host is all that it takes.
    fake.refuses_assignment.set(None);
    fake.attach().unwrap();
}
