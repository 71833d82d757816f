//! Carries out what one driver domain asks for, and nothing else: each request is for a function that its xl
//! configuration lists and that was taken from dom0 for this project, and a mapping is for the guest that this tool
//! attached the function to. The driver domain's word counts for nothing: it parses what guests say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pciback::cmdline::{DeviceConfig, Reset};
use pciback::config::registers::{command, offset};
use pciback::delegate::message::{Answer, Operation, REQUEST, Request};
use pciback::physdev::{PhysdevError, Pirq, Vector};
use pciback::platform::{DomId, Width};
use pciback::sbdf::Sbdf;
use pciback::throttle::Throttle;

use super::bus::Bus;
use super::journal::{Journal, Mapping};
use super::rules::Rules;
use crate::domains::Driver;
use crate::mend;
use crate::nodes;
use crate::sysfs::{NOBODY, Sysfs};
use crate::xen::Store;
use crate::xen::calls::Physdev;

/// How long a guest that was looked up counts as the one that has a function. Xen itself maps for nobody else.
const FRESH: Duration = Duration::from_secs(1);

/// Pirqs looked at for a mapping that nobody wrote down: those below are ISA interrupts, and a guest has as many as the
/// host has interrupt pins and `extra_guest_irqs` more.
const FIRST: Pirq = 16;
const LAST: Pirq = 2048;

/// A function of the driver domain.
struct Function {
    entry: DeviceConfig,
    /// Its `driver_override`.
    claim: Option<fs::File>,
    space: Option<Rc<fs::File>>,
    rules: Option<Rules>,
    journal: Journal,
    kept: BTreeSet<Mapping>,
    guest: Option<(DomId, Instant)>,
    reset: Option<JoinHandle<Result<(), String>>>,
    /// The function whose reset reaches this one, too.
    reset_with: Option<Sbdf>,
}

/// One driver domain's office.
pub struct Office<'a> {
    calls: &'a dyn Physdev,
    /// Stops and lets go the driver domain, so that it changes nothing between a look and a call; an errno if not.
    pause: &'a dyn Fn(bool) -> Result<(), i32>,
    store: &'a dyn Store,
    sysfs: Sysfs,
    /// Where the journals are.
    dir: PathBuf,
    name: String,
    session: u32,
    functions: BTreeMap<Sbdf, Function>,
    throttle: Throttle,
    start: Instant,
}

/// Why a request is not carried out: the answer's errno, and what is logged of it.
type Refusal = (PhysdevError, Option<String>);

fn refused<T>(error: PhysdevError, why: impl Into<String>) -> Result<T, Refusal> {
    Err((error, Some(why.into())))
}

/// What Xen answered; the driver domain tells of it.
fn xen(number: i32) -> Refusal {
    (PhysdevError::of(number.abs()), None)
}

impl<'a> Office<'a> {
    /// The office for `driver`. Mappings of which nobody knows whether they were made are looked for at once.
    pub fn open(
        calls: &'a dyn Physdev,
        pause: &'a dyn Fn(bool) -> Result<(), i32>,
        store: &'a dyn Store,
        sysfs: Sysfs,
        dir: PathBuf,
        driver: &Driver,
    ) -> Office<'a> {
        let function = |device: &DeviceConfig| {
            let function = Function {
                entry: device.clone(),
                claim: None,
                space: None,
                rules: None,
                journal: Journal::open(&dir, device.sbdf),
                kept: BTreeSet::new(),
                guest: None,
                reset: None,
                reset_with: None,
            };
            (device.sbdf, function)
        };
        let functions = driver.config.devices.iter().map(function).collect();
        let name = driver.name.clone();
        let throttle = Throttle::default();
        let mut office =
            Office { calls, pause, store, sysfs, dir, name, session: 0, functions, throttle, start: Instant::now() };
        let all: Vec<Sbdf> = office.functions.keys().copied().collect();
        for sbdf in all {
            office.recover(sbdf);
        }
        office
    }

    /// Begins a session: its hello.
    pub fn begin(&mut self, session: u32) -> Answer {
        self.session = session.max(1);
        for function in self.functions.values_mut() {
            function.kept.clear();
        }
        Answer::hello(self.session)
    }

    /// Carries out a request; `None` if it is of another session.
    pub fn carry_out(&mut self, bytes: &[u8; REQUEST]) -> Option<Answer> {
        let Ok(request) = Request::decode(bytes) else {
            self.log("a message that is none: is image and tool of the same version?");
            return None;
        };
        if request.operation == Operation::Again {
            let next = self.session.wrapping_add(1);
            return Some(self.begin(next));
        }
        if request.session != self.session {
            return None;
        }
        let Request { session, sequence, function, operation } = request;
        let (errno, value) = match self.operate(function, operation) {
            Ok(value) => (0, value),
            Err((error, why)) => {
                if let Some(why) = why {
                    self.log(&format!("{function}: {why}: refused"));
                }
                (error.errno().unsigned_abs(), 0)
            }
        };
        Some(Answer { session, sequence, errno, value })
    }

    /// Says something about this driver domain, a bounded number of times.
    fn log(&mut self, what: &str) {
        let now = self.start.elapsed().as_nanos() as u64 + u64::from(u32::MAX) * 10;
        if let Some(dropped) = self.throttle.allow(now) {
            let more = if dropped > 0 { format!(" ({dropped} more lines like it)") } else { String::new() };
            eprintln!("xl-pciback: driver domain {:?}: {what}{more}", self.name);
        }
    }

    fn operate(&mut self, sbdf: Sbdf, operation: Operation) -> Result<u32, Refusal> {
        let leader = self.functions.get(&sbdf).and_then(|function| function.reset_with);
        let together = leader.and_then(|leader| self.functions.get(&leader)?.reset.as_ref());
        if together.is_some_and(|reset| !reset.is_finished()) {
            return refused(PhysdevError::Busy, "a request while dom0 resets the bus it is on");
        }
        let Some(function) = self.functions.get_mut(&sbdf) else {
            return refused(PhysdevError::NotPermitted, "its xl configuration (dev=) does not list this function");
        };
        function.reset_with = None;
        if function.reset.as_ref().is_some_and(|reset| !reset.is_finished())
            && !matches!(operation, Operation::ResetDone)
        {
            return refused(PhysdevError::Busy, "a request while dom0 resets it");
        }
        match operation {
            Operation::Write { offset, width, value } => write(&self.sysfs, sbdf, function, offset, width, value),
            Operation::Prepare => self.paused(|office| office.prepare(sbdf)),
            Operation::Release => {
                owned(&self.sysfs, sbdf, function)?;
                if !rules(&self.sysfs, sbdf, function)?.has_msix() {
                    return refused(PhysdevError::NoDevice, "release_msix for a function without MSI-X");
                }
                self.calls.release_msix(sbdf).map(|()| 0).map_err(xen)
            }
            Operation::Restore => self.paused(|office| office.restore(sbdf)),
            Operation::Map { guest, vector } => self.map(sbdf, guest, vector),
            Operation::Unmap { guest, pirq } => {
                if !function.journal.mapped().contains_key(&(guest, pirq)) {
                    return refused(PhysdevError::Invalid, format!("pirq {pirq} of domain {guest} is no vector of it"));
                }
                unmap(self.calls, function, (guest, pirq)).map(|()| 0).map_err(xen)
            }
            Operation::Reset { together } => self.reset(sbdf, together),
            Operation::ResetDone => match function.reset.take() {
                None => refused(PhysdevError::NotFound, "no reset was asked for"),
                Some(running) if !running.is_finished() => {
                    function.reset = Some(running);
                    Ok(0)
                }
                Some(done) => match done.join() {
                    Ok(Ok(())) => Ok(1),
                    Ok(Err(why)) => refused(PhysdevError::Failed, format!("dom0's kernel does not reset it: {why}")),
                    Err(_) => refused(PhysdevError::Failed, "the reset ended badly"),
                },
            },
            Operation::Keep { guest, pirq } => {
                // What is not mapped needs no keeping, and what anybody may name needs a bound.
                if function.journal.mapped().contains_key(&(guest, pirq)) {
                    function.kept.insert((guest, pirq));
                }
                Ok(0)
            }
            Operation::Settle => {
                let mapped = function.journal.mapped().keys();
                let unknown: Vec<Mapping> =
                    mapped.filter(|mapping| !function.kept.contains(mapping)).copied().collect();
                for mapping in unknown {
                    unmap(self.calls, function, mapping).map_err(xen)?;
                }
                // What it knows was made by this tool, or it may not have it unmapped either.
                Ok(0)
            }
            Operation::Again => Ok(0),
        }
    }

    /// Does something while the driver domain stands still: where it may write its frame itself, it could change what
    /// was looked at before Xen looks.
    fn paused(&mut self, act: impl FnOnce(&mut Self) -> Result<u32, Refusal>) -> Result<u32, Refusal> {
        if let Err(number) = (self.pause)(true) {
            return refused(
                PhysdevError::Failed,
                format!("a call for which the domain must stand still, and it does not: errno {number}"),
            );
        }
        let done = act(self);
        if let Err(number) = (self.pause)(false) {
            self.log(&format!("it does not go on after a pause: errno {number}; xl unpause it"));
        }
        done
    }

    /// Xen takes the address of the MSI-X table from the function's registers, and will write there.
    fn prepare(&mut self, sbdf: Sbdf) -> Result<u32, Refusal> {
        self.owned(sbdf)?;
        let Some(function) = self.functions.get_mut(&sbdf) else { return Err((PhysdevError::NoDevice, None)) };
        if !rules(&self.sysfs, sbdf, function)?.has_msix() {
            return refused(PhysdevError::NoDevice, "prepare_msix for a function without MSI-X");
        }
        self.in_place(sbdf, "prepare_msix")?;
        self.calls.prepare_msix(sbdf).map(|()| 0).map_err(xen)
    }

    /// Xen writes to the MSI-X table, and takes it for a bug if that cannot be reached.
    fn restore(&mut self, sbdf: Sbdf) -> Result<u32, Refusal> {
        self.owned(sbdf)?;
        let Some(function) = self.functions.get_mut(&sbdf) else { return Err((PhysdevError::NoDevice, None)) };
        let read = reader(&self.sysfs, sbdf, function)?;
        let mapped = !function.journal.mapped().is_empty();
        if mapped {
            let held = read(offset::COMMAND, Width::Word).unwrap_or(u32::MAX) as u16;
            if held == u16::MAX || held & command::MEMORY == 0 {
                return Err((PhysdevError::NoMemoryDecode, None));
            }
        }
        // Without vectors Xen writes nothing: it is how a driver domain begins with a function without MSI-X.
        if mapped || self.store.read(0, &nodes::record(sbdf, "domid")).is_none() {
            self.in_place(sbdf, "restore_msi")?;
        }
        self.calls.restore_msi(sbdf).map(|()| 0).map_err(xen)
    }

    /// The registers must be where dom0 knows them. A driver domain that died in a reset has left the function without
    /// addresses: they are put back for the next one, which begins with such a call, while nobody has the function.
    fn in_place(&mut self, sbdf: Sbdf, call: &str) -> Result<(), Refusal> {
        let store = self.store;
        let Some(function) = self.functions.get_mut(&sbdf) else { return Err((PhysdevError::NoDevice, None)) };
        let read = reader(&self.sysfs, sbdf, function)?;
        if rules(&self.sysfs, sbdf, function)?.is_in_place(&read) {
            return Ok(());
        }
        let (Some(space), Some(rules)) = (&function.space, &function.rules) else {
            return Err((PhysdevError::NoDevice, None));
        };
        let used = store.read(0, &nodes::record(sbdf, "domid")).is_some();
        if used || !function.journal.mapped().is_empty() {
            return refused(
                PhysdevError::Invalid,
                format!("{call} while its base address registers are not what dom0 set"),
            );
        }
        match mend::put_back(space, rules, mend::record(store, sbdf).as_deref()) {
            Ok(_) => {
                self.log(&format!("{sbdf}: it had lost its addresses in a reset that nobody finished: put back"));
                Ok(())
            }
            Err(error) => refused(PhysdevError::Failed, format!("{call}: its addresses cannot be put back: {error}")),
        }
    }

    fn owned(&mut self, sbdf: Sbdf) -> Result<(), Refusal> {
        let function = self.functions.get_mut(&sbdf).ok_or((PhysdevError::NoDevice, None))?;
        owned(&self.sysfs, sbdf, function)
    }

    fn map(&mut self, sbdf: Sbdf, guest: DomId, vector: Vector) -> Result<u32, Refusal> {
        self.owned(sbdf)?;
        let Some(function) = self.functions.get_mut(&sbdf) else { return Err((PhysdevError::NoDevice, None)) };
        let what = match vector {
            Vector::Msix { entry, .. } => Some(entry),
            Vector::Msi | Vector::MultiMsi { .. } => None,
        };
        if !(if what.is_some() { function.entry.msix } else { function.entry.msi }) {
            return refused(PhysdevError::NotPermitted, "a vector of a kind that its xl configuration switches off");
        }
        // Xen does not look, and its count of the table's users would be wrong after it.
        let mapped = function.journal.mapped().values();
        if mapped.clone().any(|other| other.is_none() || what.is_none()) {
            return refused(PhysdevError::Busy, "MSI and MSI-X at once");
        }
        if mapped.clone().any(|other| *other == what) {
            return refused(PhysdevError::Exists, "an entry of the MSI-X table twice");
        }
        if function.guest.is_none_or(|(known, since)| known != guest || since.elapsed() > FRESH) {
            let recorded = self.store.read(0, &nodes::record(sbdf, "domid")).and_then(|text| text.parse().ok());
            if recorded != Some(u32::from(guest)) {
                function.guest = None;
                return refused(
                    PhysdevError::NotPermitted,
                    format!("a vector for domain {guest}, which this tool has not attached it to"),
                );
            }
            function.guest = Some((guest, Instant::now()));
        }
        if let Vector::Msix { table_base, .. } = vector {
            let rules = rules(&self.sysfs, sbdf, function)?;
            if rules.table_base() != Some(table_base) {
                return refused(
                    PhysdevError::Invalid,
                    format!("an MSI-X table at {table_base:#x}, where dom0 knows of none"),
                );
            }
        }
        if let Err(error) = function.journal.begin(guest) {
            return refused(
                PhysdevError::Failed,
                format!("the journal in {} cannot be written: {error}", self.dir.display()),
            );
        }
        match self.calls.map(guest, sbdf, vector) {
            Ok(pirq) => {
                function.journal.end(Some(((guest, pirq), what)));
                Ok(pirq.cast_unsigned())
            }
            Err(number) => {
                function.journal.end(None);
                Err(xen(number))
            }
        }
    }

    /// Has dom0's kernel reset the function: alone, if it can; else with the functions on its bus, if these are this
    /// driver domain's and it says that they are at rest.
    fn reset(&mut self, sbdf: Sbdf, together: bool) -> Result<u32, Refusal> {
        self.owned(sbdf)?;
        let Some(function) = self.functions.get_mut(&sbdf) else { return Err((PhysdevError::NoDevice, None)) };
        if function.reset.is_some() {
            return Err((PhysdevError::Busy, None));
        }
        if !function.journal.mapped().is_empty() {
            return refused(PhysdevError::Invalid, "a reset with vectors mapped");
        }
        let wish = function.entry.reset == Reset::Bus;
        let alone = self.sysfs.has(sbdf, "reset");
        // The kernel has the method for the only function of a bus.
        if !alone || wish {
            let shared = Bus::of(&self.sysfs, sbdf);
            if let Some(bus) = shared {
                return self.reset_bus(sbdf, bus, together);
            }
        }
        if !alone {
            return refused(PhysdevError::NotFound, "dom0's kernel has no reset for it");
        }
        let (sysfs, bus) = (self.sysfs.clone(), wish && self.sysfs.has(sbdf, "reset_method"));
        function.reset = Some(std::thread::spawn(move || {
            let set = |attribute: &str, value: &str| sysfs.set(sbdf, attribute, value).map_err(|failure| failure.what);
            if !bus {
                return set("reset", "1");
            }
            set("reset_method", "bus")?;
            let done = set("reset", "1");
            set("reset_method", "default")?;
            done
        }));
        Ok(0)
    }

    /// Resets all functions on a bus: none that is another's, that dom0 has, or that has vectors.
    fn reset_bus(&mut self, sbdf: Sbdf, bus: Bus, together: bool) -> Result<u32, Refusal> {
        for other in bus.functions() {
            let Some(function) = self.functions.get_mut(other) else {
                return refused(
                    PhysdevError::SharedWithOthers,
                    format!("its reset would reach {other}, which is not this driver domain's (dev=)"),
                );
            };
            if owned(&self.sysfs, *other, function).is_err() {
                return refused(
                    PhysdevError::SharedWithOthers,
                    format!(
                        "its reset would reach {other}, which dom0 has itself (xl-pciback assignable-add takes it)"
                    ),
                );
            }
            if together && (!function.journal.mapped().is_empty() || function.reset.is_some()) {
                return refused(PhysdevError::Invalid, format!("its reset would reach {other}, which is not at rest"));
            }
        }
        if !together {
            return Err((PhysdevError::Shared, None));
        }
        for other in bus.functions() {
            if let Some(function) = self.functions.get_mut(other) {
                function.reset_with = Some(sbdf).filter(|sbdf| sbdf != other);
            }
        }
        let sysfs = self.sysfs.clone();
        if let Some(function) = self.functions.get_mut(&sbdf) {
            function.reset = Some(std::thread::spawn(move || bus.reset(&sysfs)));
        }
        Ok(0)
    }

    /// Looks for a mapping that was begun and never written down, and unmaps it: a pirq of the guest that is in no
    /// journal and is no interrupt line.
    fn recover(&mut self, sbdf: Sbdf) {
        let Some(function) = self.functions.get_mut(&sbdf) else { return };
        let Some(guest) = function.journal.begun() else { return };
        let known = Journal::all(&self.dir);
        let lines: BTreeSet<u32> =
            self.sysfs.functions().into_iter().filter_map(|other| Some(self.sysfs.function(other).ok()?.irq)).collect();
        let candidates = FIRST..LAST;
        let found: Vec<Pirq> = candidates
            .filter(|pirq| !known.contains(&(guest, *pirq)) && !lines.contains(&pirq.cast_unsigned()))
            .filter(|pirq| self.calls.unmap(guest, *pirq).is_ok())
            .collect();
        eprintln!(
            "xl-pciback: driver domain {:?}: {sbdf}: the last serve ended while it mapped a vector for domain {guest}; \
             unmapped now: {found:?}",
            self.name
        );
        function.journal.end(None);
    }
}

/// The function must have been taken from dom0: while `driver_override` names nobody, no driver of dom0 can have it.
/// The attribute stays open, as this comes before every write.
fn owned(sysfs: &Sysfs, sbdf: Sbdf, function: &mut Function) -> Result<(), Refusal> {
    if function.claim.is_none() {
        // A driver that was bound before the name was set would keep it.
        let free = sysfs.is_nobodys(sbdf);
        function.claim = sysfs.open_override(sbdf).filter(|_| free);
    }
    let mut name = [0; NOBODY.len() + 1];
    let held = function.claim.as_ref().and_then(|claim| claim.read_at(&mut name, 0).ok());
    if held == Some(name.len()) && name.strip_suffix(b"\n") == Some(NOBODY.as_bytes()) {
        return Ok(());
    }
    function.claim = None;
    refused(PhysdevError::Busy, "dom0 has the function itself")
}

fn unmap(calls: &dyn Physdev, function: &mut Function, mapping: Mapping) -> Result<(), i32> {
    match calls.unmap(mapping.0, mapping.1) {
        // EINVAL: not mapped any more. ESRCH: the guest is gone, and its pirqs are or will be.
        Ok(()) | Err(3 | 22) => {
            function.journal.unmapped(mapping);
            Ok(())
        }
        Err(number) => Err(number),
    }
}

fn rules<'f>(sysfs: &Sysfs, sbdf: Sbdf, function: &'f mut Function) -> Result<&'f Rules, Refusal> {
    if function.rules.is_none() {
        let space = sysfs.config_space(sbdf).map_err(|failure| (PhysdevError::NoDevice, Some(failure.what)))?;
        let known = sysfs.function(sbdf).map_err(|failure| (PhysdevError::NoDevice, Some(failure.what)))?;
        if let Some(refusal) = known.refusal() {
            return Err((PhysdevError::NotPermitted, Some(refusal.what)));
        }
        if let Some(id) = function.entry.id.filter(|id| *id != known.id) {
            return refused(
                PhysdevError::NoDevice,
                format!("another card is in its place: {}, not {:04x}:{:04x}", known.id_text(), id.0, id.1),
            );
        }
        function.rules = Rules::new(&known, &space);
    }
    // One that does not answer is looked at again with the next request.
    function.rules.as_ref().ok_or((PhysdevError::NoDevice, None))
}

/// Reads the function's registers through dom0's file, which is opened once.
fn reader(
    sysfs: &Sysfs,
    sbdf: Sbdf,
    function: &mut Function,
) -> Result<impl Fn(u16, Width) -> Option<u32> + use<>, Refusal> {
    if function.space.is_none() {
        function.space =
            Some(Rc::new(sysfs.open_config(sbdf).map_err(|failure| (PhysdevError::NoDevice, Some(failure.what)))?));
    }
    let Some(space) = function.space.clone() else { return Err((PhysdevError::NoDevice, None)) };
    Ok(move |at: u16, width: Width| {
        let mut bytes = [0; 4];
        let wanted = bytes.get_mut(..usize::from(width.bytes()))?;
        space.read_exact_at(wanted, at.into()).ok()?;
        Some(u32::from_le_bytes(bytes))
    })
}

fn write(
    sysfs: &Sysfs,
    sbdf: Sbdf,
    function: &mut Function,
    offset: u16,
    width: Width,
    value: u32,
) -> Result<u32, Refusal> {
    owned(sysfs, sbdf, function)?;
    let read = reader(sysfs, sbdf, function)?;
    rules(sysfs, sbdf, function)?;
    let (Some(space), Some(rules)) = (&function.space, &function.rules) else {
        return Err((PhysdevError::NoDevice, None));
    };
    if let Err(why) = rules.judge(offset, width, value, &read) {
        return refused(
            PhysdevError::NotPermitted,
            format!("a write of {value:#x} ({} bytes) to {offset:#x}: {why}", width.bytes()),
        );
    }
    let bytes = value.to_le_bytes();
    let bytes = bytes.get(..usize::from(width.bytes())).unwrap_or(&bytes);
    match space.write_at(bytes, offset.into()) {
        Ok(written) if written == bytes.len() => Ok(0),
        Ok(_) => refused(PhysdevError::Failed, format!("dom0 cannot write {offset:#x}")),
        Err(error) => {
            // The function may have been removed and found again.
            function.space = None;
            function.rules = None;
            refused(PhysdevError::Failed, format!("dom0's kernel refuses a write to {offset:#x}: {error}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};

    const NIC: &str = "0000:01:00.0";
    const OTHER: &str = "0000:02:00.0";
    const BAR: u64 = 0xfebc_0000;
    const RESET: Operation = Operation::Reset { together: false };

    /// Xen and xenstore, which record.
    #[derive(Default)]
    struct Fake {
        calls: RefCell<Vec<String>>,
        mapped: RefCell<BTreeSet<Mapping>>,
        next: Cell<Pirq>,
        fail: Cell<Option<i32>>,
        guest: Cell<Option<u32>>,
        reads: Cell<u32>,
    }

    impl Fake {
        fn call(&self, text: String) -> Result<(), i32> {
            self.calls.borrow_mut().push(text);
            self.fail.get().map_or(Ok(()), Err)
        }
    }

    impl Physdev for Fake {
        fn prepare_msix(&self, sbdf: Sbdf) -> Result<(), i32> {
            self.call(format!("prepare {sbdf}"))
        }
        fn release_msix(&self, sbdf: Sbdf) -> Result<(), i32> {
            self.call(format!("release {sbdf}"))
        }
        fn restore_msi(&self, sbdf: Sbdf) -> Result<(), i32> {
            self.call(format!("restore {sbdf}"))
        }
        fn map(&self, guest: DomId, sbdf: Sbdf, vector: Vector) -> Result<Pirq, i32> {
            self.call(format!("map {guest} {sbdf} {vector:?}"))?;
            self.next.set(self.next.get() - 1);
            self.mapped.borrow_mut().insert((guest, self.next.get()));
            Ok(self.next.get())
        }
        fn unmap(&self, guest: DomId, pirq: Pirq) -> Result<(), i32> {
            if self.mapped.borrow_mut().remove(&(guest, pirq)) {
                self.call(format!("unmap {guest} {pirq}"))
            } else {
                Err(22)
            }
        }
    }

    impl Store for Fake {
        fn read(&self, _: u32, path: &str) -> Option<String> {
            self.reads.set(self.reads.get() + 1);
            path.ends_with("/0000-01-00-0/domid").then(|| self.guest.get().map(|guest| guest.to_string()))?
        }
        fn write(&self, _: u32, _: &str, _: &str) -> Result<(), i32> {
            unreachable!("an office writes nothing")
        }
        fn remove(&self, _: u32, _: &str) -> Result<(), i32> {
            unreachable!()
        }
        fn list(&self, _: u32, _: &str) -> Vec<String> {
            unreachable!()
        }
        fn permit(&self, _: u32, _: &str, _: u32, _: Option<u32>) -> Result<(), i32> {
            unreachable!()
        }
        fn begin(&self) -> Result<u32, i32> {
            unreachable!()
        }
        fn end(&self, _: u32, _: bool) -> Result<(), i32> {
            unreachable!()
        }
    }

    /// A host with two functions, of which the driver domain has one.
    struct Host {
        root: PathBuf,
        fake: Fake,
        sequence: Cell<u32>,
        still: Rc<Cell<Result<(), i32>>>,
        pause: Box<dyn Fn(bool) -> Result<(), i32>>,
    }

    impl Host {
        fn new(name: &str) -> Host {
            let root = std::env::temp_dir().join(format!("xl-pciback-office-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&root);
            for sbdf in [NIC, OTHER] {
                let folder = root.join(format!("sys/bus/pci/devices/{sbdf}"));
                fs::create_dir_all(&folder).unwrap();
                let mut space = vec![0; 4096];
                space[..4].copy_from_slice(&[0x86, 0x80, 0xd3, 0x10]);
                space[6] = 0x10;
                space[0x10..0x14].copy_from_slice(&(BAR as u32).to_le_bytes());
                space[0x34] = 0x60;
                space[0x60..0x64].copy_from_slice(&[0x11, 0, 4, 0]);
                fs::write(folder.join("config"), space).unwrap();
                for (file, text) in [
                    ("vendor", "0x8086\n"),
                    ("device", "0x10d3\n"),
                    ("class", "0x020000\n"),
                    ("irq", "21\n"),
                    ("reset", ""),
                    ("driver_override", "pciback-stubdom\n"),
                    ("resource", "0x00000000febc0000 0x00000000febdffff 0x0000000000040200\n"),
                ] {
                    fs::write(folder.join(file), text).unwrap();
                }
            }
            fs::create_dir_all(root.join("journal")).unwrap();
            let fake = Fake { next: Cell::new(56), guest: Cell::new(Some(7)), ..Fake::default() };
            let still = Rc::new(Cell::new(Ok(())));
            let answer = still.clone();
            Host { root, fake, sequence: Cell::new(0), still, pause: Box::new(move |_| answer.get()) }
        }

        fn path(&self, sbdf: &str, file: &str) -> PathBuf {
            self.root.join(format!("sys/bus/pci/devices/{sbdf}/{file}"))
        }

        fn office(&self) -> Office<'_> {
            self.office_of(&[NIC])
        }

        fn office_of(&self, functions: &[&str]) -> Office<'_> {
            let devices: String = functions.iter().map(|sbdf| format!(" dev={sbdf}")).collect();
            let (config, _) = pciback::cmdline::parse(&format!("ecam=0000:00-ff@b0000000{devices}"));
            let driver = Driver { domid: 2, name: "p0".into(), config };
            let mut office = Office::open(
                &self.fake,
                &*self.pause,
                &self.fake,
                Sysfs::at(&self.root),
                self.root.join("journal"),
                &driver,
            );
            office.begin(5);
            office
        }

        fn ask(&self, office: &mut Office<'_>, function: &str, operation: Operation) -> Result<u32, PhysdevError> {
            self.sequence.set(self.sequence.get() + 1);
            let function = function.parse().unwrap();
            let request = Request { session: 5, sequence: self.sequence.get(), function, operation };
            let answer = office.carry_out(&request.encode()).expect("an answer");
            assert_eq!((answer.session, answer.sequence), (5, self.sequence.get()));
            if answer.errno == 0 { Ok(answer.value) } else { Err(PhysdevError::of(answer.errno.cast_signed())) }
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.root);
        }
    }

    fn write(offset: u16, value: u32) -> Operation {
        Operation::Write { offset, width: Width::Word, value }
    }

    fn map(guest: DomId, entry: u16) -> Operation {
        Operation::Map { guest, vector: Vector::Msix { entry, table_base: BAR } }
    }

    #[test]
    fn a_write_reaches_the_function_and_no_other() {
        let host = Host::new("write");
        let mut office = host.office();
        assert_eq!(host.ask(&mut office, NIC, write(4, 0x0406)), Ok(0));
        assert_eq!(fs::read(host.path(NIC, "config")).unwrap()[4..6], [0x06, 0x04]);
        assert_eq!(host.ask(&mut office, OTHER, write(4, 0x0406)), Err(PhysdevError::NotPermitted));
        assert_eq!(fs::read(host.path(OTHER, "config")).unwrap()[4..6], [0, 0]);
        let moved = Operation::Write { offset: 0x10, width: Width::Dword, value: 0xfee0_0000 };
        assert_eq!(host.ask(&mut office, NIC, moved), Err(PhysdevError::NotPermitted));
        let back = Operation::Write { offset: 0x10, width: Width::Dword, value: BAR as u32 };
        assert_eq!(host.ask(&mut office, NIC, back), Ok(0));
    }

    #[test]
    fn a_function_that_dom0_has_itself_is_left_alone() {
        let host = Host::new("dom0");
        let mut office = host.office();
        assert_eq!(host.ask(&mut office, NIC, write(4, 2)), Ok(0));
        // As `assignable-remove` does it: no driver can have it before the name is another one.
        fs::write(host.path(NIC, "driver_override"), "(null)\n").unwrap();
        for operation in [write(4, 6), Operation::Prepare, Operation::Release, Operation::Restore, map(7, 0), RESET] {
            assert_eq!(host.ask(&mut office, NIC, operation), Err(PhysdevError::Busy), "{operation:?}");
        }
        std::os::unix::fs::symlink("../drivers/e1000e", host.path(NIC, "driver")).unwrap();
        fs::write(host.path(NIC, "driver_override"), "pciback-stubdom\n").unwrap();
        assert_eq!(
            host.ask(&mut office, NIC, write(4, 6)),
            Err(PhysdevError::Busy),
            "a driver that was there before the name"
        );
        drop(office);
        assert_eq!(host.ask(&mut host.office(), NIC, write(4, 6)), Err(PhysdevError::Busy));
        assert!(host.fake.calls.borrow().is_empty());
        assert_eq!(fs::read(host.path(NIC, "config")).unwrap()[4], 2);
    }

    #[test]
    fn vectors_are_mapped_for_the_guest_that_this_tool_attached_it_to() {
        let host = Host::new("map");
        let mut office = host.office();
        for guest in [0, 1, 8, 0x7ff0] {
            assert_eq!(host.ask(&mut office, NIC, map(guest, 0)), Err(PhysdevError::NotPermitted), "domain {guest}");
        }
        assert_eq!(host.ask(&mut office, OTHER, map(7, 0)), Err(PhysdevError::NotPermitted));
        let elsewhere = Operation::Map { guest: 7, vector: Vector::Msix { entry: 0, table_base: BAR + 0x1000 } };
        assert_eq!(host.ask(&mut office, NIC, elsewhere), Err(PhysdevError::Invalid));
        assert!(host.fake.calls.borrow().is_empty());
        assert_eq!(host.ask(&mut office, NIC, map(7, 0)), Ok(55));
        let reads = host.fake.reads.get();
        assert_eq!(host.ask(&mut office, NIC, map(7, 1)), Ok(54));
        assert_eq!(host.fake.reads.get(), reads, "the guest is not looked up for each vector");
        // Another's pirqs, and a guess.
        for (guest, pirq) in [(7, 53), (8, 55), (0, 55)] {
            assert_eq!(host.ask(&mut office, NIC, Operation::Unmap { guest, pirq }), Err(PhysdevError::Invalid));
        }
        assert_eq!(host.ask(&mut office, NIC, Operation::Unmap { guest: 7, pirq: 55 }), Ok(0));
        assert_eq!(host.ask(&mut office, NIC, Operation::Unmap { guest: 7, pirq: 55 }), Err(PhysdevError::Invalid));
        host.fake.fail.set(Some(28));
        assert_eq!(host.ask(&mut office, NIC, map(7, 2)), Err(PhysdevError::NoPirq));
    }

    /// Xen trusts dom0 with what follows: it does not look itself.
    #[test]
    fn xen_is_asked_for_nothing_that_would_hurt_it() {
        let host = Host::new("trust");
        let mut office = host.office();
        assert_eq!(host.ask(&mut office, NIC, Operation::Prepare), Ok(0));
        // What the domain could change between the look and the call is not looked at.
        host.still.set(Err(1));
        let before = host.fake.calls.borrow().len();
        for operation in [Operation::Prepare, Operation::Restore] {
            assert_eq!(host.ask(&mut office, NIC, operation), Err(PhysdevError::Failed), "{operation:?}");
        }
        assert_eq!(host.fake.calls.borrow().len(), before);
        host.still.set(Ok(()));
        // An entry twice, and MSI beside MSI-X.
        assert_eq!(host.ask(&mut office, NIC, map(7, 0)), Ok(55));
        assert_eq!(host.ask(&mut office, NIC, map(7, 0)), Err(PhysdevError::Exists));
        assert_eq!(
            host.ask(&mut office, NIC, Operation::Map { guest: 7, vector: Vector::Msi }),
            Err(PhysdevError::Busy)
        );
        // Vectors are written again only where the table can be reached.
        assert_eq!(host.ask(&mut office, NIC, Operation::Restore), Err(PhysdevError::NoMemoryDecode));
        assert_eq!(host.ask(&mut office, NIC, write(4, 2)), Ok(0));
        assert_eq!(host.ask(&mut office, NIC, Operation::Restore), Ok(0));
        // A register that has lost its address, as after a reset.
        let mut space = fs::read(host.path(NIC, "config")).unwrap();
        space[0x10..0x14].fill(0);
        fs::write(host.path(NIC, "config"), &space).unwrap();
        let calls = host.fake.calls.borrow().len();
        assert_eq!(host.ask(&mut office, NIC, Operation::Prepare), Err(PhysdevError::Invalid));
        assert_eq!(host.ask(&mut office, NIC, Operation::Restore), Err(PhysdevError::Invalid));
        assert_eq!(host.fake.calls.borrow().len(), calls);
        // Nobody has it any more: a driver domain has died in that reset.
        let (mut clean, fake) = (host.office(), &host.fake);
        clean.carry_out(
            &Request { session: 5, sequence: 1, function: NIC.parse().unwrap(), operation: Operation::Settle }.encode(),
        );
        fake.guest.set(None);
        assert_eq!(host.ask(&mut clean, NIC, Operation::Prepare), Ok(0));
        assert_eq!(fs::read(host.path(NIC, "config")).unwrap()[0x10..0x14], (BAR as u32).to_le_bytes());
        fs::write(host.path(NIC, "config"), &space).unwrap();
        assert_eq!(host.ask(&mut clean, NIC, Operation::Restore), Ok(0));
        assert_eq!(fs::read(host.path(NIC, "config")).unwrap()[0x10..0x14], (BAR as u32).to_le_bytes());
        drop(clean);
        fake.guest.set(Some(7));
        let mut office = host.office();
        assert_eq!(host.ask(&mut office, NIC, map(7, 0)), Ok(54));
        // What may be named is bounded by what is mapped.
        for pirq in 0..1000 {
            assert_eq!(host.ask(&mut office, NIC, Operation::Keep { guest: 7, pirq }), Ok(0));
        }
        assert_eq!(office.functions.values().map(|function| function.kept.len()).sum::<usize>(), 1);
        // A function without MSI-X: Xen's prepare and release would follow a null pointer.
        let host = Host::new("none");
        let mut space = fs::read(host.path(NIC, "config")).unwrap();
        space[6] = 0;
        fs::write(host.path(NIC, "config"), &space).unwrap();
        let mut office = host.office();
        for operation in [Operation::Prepare, Operation::Release] {
            assert_eq!(host.ask(&mut office, NIC, operation), Err(PhysdevError::NoDevice), "{operation:?}");
        }
        assert_eq!(host.ask(&mut office, NIC, Operation::Restore), Ok(0));
        assert_eq!(*host.fake.calls.borrow(), [format!("restore {NIC}")]);
    }

    #[test]
    fn nothing_is_done_to_a_function_while_dom0_resets_it() {
        let host = Host::new("reset");
        let mut office = host.office();
        let (hold, held) = std::sync::mpsc::channel::<()>();
        let sbdf: Sbdf = NIC.parse().unwrap();
        office.functions.get_mut(&sbdf).unwrap().reset = Some(std::thread::spawn(move || {
            let _ = held.recv();
            Ok(())
        }));
        for operation in [write(4, 2), Operation::Prepare, Operation::Restore, map(7, 0), RESET] {
            assert_eq!(host.ask(&mut office, NIC, operation), Err(PhysdevError::Busy), "{operation:?}");
        }
        assert_eq!(host.ask(&mut office, NIC, Operation::ResetDone), Ok(0));
        drop(hold);
        while host.ask(&mut office, NIC, Operation::ResetDone) == Ok(0) {
            std::thread::yield_now();
        }
        assert_eq!(host.ask(&mut office, NIC, RESET), Ok(0));
        while host.ask(&mut office, NIC, Operation::ResetDone) == Ok(0) {
            std::thread::yield_now();
        }
        assert_eq!(fs::read(host.path(NIC, "reset")).unwrap(), b"1");
        assert_eq!(host.ask(&mut office, NIC, map(7, 0)), Ok(55));
        assert_eq!(host.ask(&mut office, NIC, RESET), Err(PhysdevError::Invalid), "with vectors mapped");
    }

    const BRIDGE: &str = "0000:00:1c.0";
    const BESIDE: &str = "0000:01:00.1";
    const TOGETHER: Operation = Operation::Reset { together: true };

    /// NIC and BESIDE on the bus behind BRIDGE, which has this PCI Express slot; neither with a reset of its own.
    fn behind_a_bridge(name: &str, slot: u8) -> Host {
        let host = Host::new(name);
        let real = host.root.join("sys/devices/pci0000:00").join(BRIDGE);
        fs::create_dir_all(&real).unwrap();
        let mut space = vec![0; 256];
        (space[0x06], space[0x0e], space[0x34], space[0x3e]) = (0x10, 1, 0x40, 0x12);
        space[0x40..0x44].copy_from_slice(&[0x10, 0, 0x42, 0x01]);
        space[0x54] = slot;
        fs::write(real.join("config"), space).unwrap();
        let link = |sbdf: &str, to: &std::path::Path| {
            std::os::unix::fs::symlink(to, host.root.join("sys/bus/pci/devices").join(sbdf)).unwrap();
        };
        link(BRIDGE, &real);
        let nic = host.root.join("sys/bus/pci/devices").join(NIC);
        fs::remove_file(nic.join("reset")).unwrap();
        for sbdf in [NIC, BESIDE] {
            fs::create_dir(real.join(sbdf)).unwrap();
            for file in ["config", "vendor", "device", "class", "irq", "driver_override", "resource"] {
                fs::copy(nic.join(file), real.join(sbdf).join(file)).unwrap();
            }
        }
        fs::remove_dir_all(&nic).unwrap();
        link(NIC, &real.join(NIC));
        link(BESIDE, &real.join(BESIDE));
        host
    }

    fn bridge_control(host: &Host) -> u8 {
        fs::read(host.path(BRIDGE, "config")).unwrap()[0x3e]
    }

    /// Case 37: QubesOS issues 4818 and 1393: a function in use behind the same bridge.
    #[test]
    fn a_bus_is_reset_only_if_all_on_it_are_this_domains_and_at_rest() {
        let host = behind_a_bridge("bus", 0);
        let mut office = host.office_of(&[NIC]);
        for operation in [RESET, TOGETHER] {
            let refused = Err(PhysdevError::SharedWithOthers);
            assert_eq!(host.ask(&mut office, NIC, operation), refused, "the other one is not listed");
        }
        drop(office);
        let mut office = host.office_of(&[NIC, BESIDE]);
        assert_eq!(host.ask(&mut office, NIC, RESET), Err(PhysdevError::Shared));
        fs::write(host.path(BESIDE, "driver_override"), "(null)\n").unwrap();
        assert_eq!(host.ask(&mut office, NIC, TOGETHER), Err(PhysdevError::SharedWithOthers), "dom0 has it");
        fs::write(host.path(BESIDE, "driver_override"), "pciback-stubdom\n").unwrap();
        host.fake.guest.set(Some(7));
        let sbdf: Sbdf = BESIDE.parse().unwrap();
        office.functions.get_mut(&sbdf).unwrap().journal.end(Some(((7, 50), Some(0))));
        assert_eq!(host.ask(&mut office, NIC, TOGETHER), Err(PhysdevError::Invalid), "it has a vector");
        office.functions.get_mut(&sbdf).unwrap().journal.unmapped((7, 50));
        assert_eq!(bridge_control(&host), 0x12);

        assert_eq!(host.ask(&mut office, NIC, TOGETHER), Ok(0));
        // The bit is set for a moment, and neither may be touched before all is done.
        for operation in [write(4, 2), Operation::Prepare, RESET, TOGETHER] {
            for sbdf in [NIC, BESIDE] {
                assert_eq!(host.ask(&mut office, sbdf, operation), Err(PhysdevError::Busy), "{sbdf} {operation:?}");
            }
        }
        while host.ask(&mut office, NIC, Operation::ResetDone) == Ok(0) {
            std::thread::yield_now();
        }
        assert_eq!(bridge_control(&host), 0x12);
        assert_eq!(host.ask(&mut office, BESIDE, write(4, 2)), Ok(0));
    }

    #[test]
    fn a_bus_is_reset_the_way_its_bridge_allows() {
        // A port that takes the loss of its link for a removal.
        let host = behind_a_bridge("hot-plug", 0x40);
        let mut office = host.office_of(&[NIC, BESIDE]);
        let end = |office: &mut Office<'_>| loop {
            match host.ask(office, NIC, Operation::ResetDone) {
                Ok(0) => std::thread::yield_now(),
                done => break done,
            }
        };
        assert_eq!(host.ask(&mut office, NIC, TOGETHER), Ok(0));
        assert_eq!(end(&mut office), Err(PhysdevError::Failed));
        // A kernel that knows better.
        fs::write(host.path(BRIDGE, "reset_subordinate"), "").unwrap();
        assert_eq!(host.ask(&mut office, NIC, TOGETHER), Ok(0));
        assert_eq!(end(&mut office), Ok(1));
        assert_eq!(fs::read(host.path(BRIDGE, "reset_subordinate")).unwrap(), b"1");
        // A function that does not come back from it.
        fs::write(host.path(BESIDE, "vendor"), "0x168c\n").unwrap();
        fs::write(host.path(BESIDE, "device"), "0x0030\n").unwrap();
        assert_eq!(host.ask(&mut office, NIC, TOGETHER), Ok(0));
        assert_eq!(end(&mut office), Err(PhysdevError::Failed));
    }

    #[test]
    fn another_life_unmaps_what_the_driver_domain_does_not_know() {
        let host = Host::new("settle");
        let mut office = host.office();
        for entry in 0..3 {
            host.ask(&mut office, NIC, map(7, entry)).unwrap();
        }
        drop(office);
        let mut office = host.office();
        assert_eq!(host.ask(&mut office, NIC, Operation::Keep { guest: 7, pirq: 54 }), Ok(0));
        assert_eq!(host.ask(&mut office, NIC, Operation::Settle), Ok(0));
        assert_eq!(host.fake.mapped.borrow().iter().copied().collect::<Vec<_>>(), [(7, 54)]);
        drop(office);
        // The last life ended between the call and the note of it.
        host.fake.mapped.borrow_mut().insert((7, 53));
        let mut journal = Journal::open(&host.root.join("journal"), NIC.parse().unwrap());
        journal.begin(7).unwrap();
        drop(journal);
        drop(host.office());
        assert_eq!(host.fake.mapped.borrow().iter().copied().collect::<Vec<_>>(), [(7, 54)]);
    }

    #[test]
    fn requests_of_another_session_are_void_and_nonsense_is_no_request() {
        let host = Host::new("session");
        let mut office = host.office();
        let request = Request { session: 4, sequence: 1, function: NIC.parse().unwrap(), operation: write(4, 6) };
        assert_eq!(office.carry_out(&request.encode()), None);
        assert_eq!(office.carry_out(&[0xff; REQUEST]), None);
        assert_eq!(fs::read(host.path(NIC, "config")).unwrap()[4], 0);
        let again = Request { session: 0, sequence: 1, function: Sbdf::new(0, 0, 0), operation: Operation::Again };
        let hello = office.carry_out(&again.encode()).expect("a hello");
        assert!(hello.is_hello() && hello.session != 5);
        let request = Request { session: 5, ..request };
        assert_eq!(office.carry_out(&request.encode()), None);
    }

    /// Whatever a driver domain sends: nothing happens to a function that is not its own, and no guest but its own gets
    /// a vector.
    #[test]
    fn a_hostile_driver_domain_reaches_nothing_that_is_not_its_own() {
        let host = Host::new("hostile");
        let other = fs::read(host.path(OTHER, "config")).unwrap();
        let mut office = host.office();
        let mut state = 0x2545_f491_4f6c_dd1du64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for round in 0..50_000u32 {
            let mut bytes = [0; REQUEST];
            for chunk in bytes.chunks_mut(8) {
                chunk.copy_from_slice(&random().to_le_bytes());
            }
            bytes[..4].copy_from_slice(&office.session.to_le_bytes());
            bytes[12] = (round % 15) as u8;
            if round % 4 > 0 {
                // What would pass the first look: small numbers, and zeros where they must be.
                let function: Sbdf = if round % 8 < 4 { NIC } else { OTHER }.parse().unwrap();
                bytes[8..12].copy_from_slice(&function.packed().to_le_bytes());
                bytes[13..32].fill(0);
                bytes[13] = [0, 1, 2, 4][(random() % 4) as usize];
                bytes[14] = (random() % 16) as u8;
                bytes[16..18].copy_from_slice(&((random() % 4100) as u16).to_le_bytes());
                bytes[20] = random() as u8;
                if round % 3 == 0 {
                    bytes[24..32].copy_from_slice(&BAR.to_le_bytes());
                }
                if bytes[12] != 1 && bytes[12] != 7 {
                    bytes[16..18].fill(0);
                }
                match bytes[12] {
                    1 => bytes[14] = 0,
                    5 => [13, 20, 24, 25, 26, 27].iter().for_each(|at| bytes[*at] = 0),
                    7 => [13, 20].iter().for_each(|at| bytes[*at] = 0),
                    _ => {}
                }
            }
            let _ = office.carry_out(&bytes);
        }
        assert_eq!(fs::read(host.path(OTHER, "config")).unwrap(), other);
        let bar = fs::read(host.path(NIC, "config")).unwrap()[0x10..0x14].to_vec();
        assert_eq!(bar, (BAR as u32).to_le_bytes());
        let calls = host.fake.calls.borrow();
        assert!(calls.iter().any(|call| call.starts_with("map 7 ")), "some requests are good");
        for call in calls.iter() {
            assert!(!call.contains(OTHER), "{call}");
            assert!(!call.starts_with("map ") || call.starts_with("map 7 "), "{call}");
        }
    }
}
