//! Carries out what one driver domain asks for, and nothing else: each request is for a function that its xl
//! configuration lists and that was taken from dom0 for this project, and a mapping is for the guest that this tool
//! attached the function to. The driver domain's word counts for nothing: it parses what guests say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pciback::cmdline::Reset;
use pciback::delegate::message::{Answer, Operation, REQUEST, Request};
use pciback::physdev::{Pirq, Vector};
use pciback::platform::{DomId, Width};
use pciback::sbdf::Sbdf;
use pciback::throttle::Throttle;

use super::journal::{Journal, Mapping};
use super::rules::Rules;
use crate::domains::Driver;
use crate::error::errno;
use crate::nodes;
use crate::sysfs::Sysfs;
use crate::xen::Store;
use crate::xen::calls::Physdev;

/// `xen/errno.h`.
mod number {
    pub const EPERM: u32 = 1;
    pub const ENOENT: u32 = 2;
    pub const EIO: u32 = 5;
    pub const EBUSY: u32 = 16;
    pub const ENODEV: u32 = 19;
    pub const EINVAL: u32 = 22;
}
use number::{EBUSY, EINVAL, EIO, ENODEV, ENOENT, EPERM};

/// How long a guest that was looked up counts as the one that has a function. Xen itself maps for nobody else.
const FRESH: Duration = Duration::from_secs(1);

/// Pirqs looked at for a mapping that nobody wrote down: those below are ISA interrupts, and a guest has as many as the
/// host has interrupt pins and `extra_guest_irqs` more.
const FIRST: Pirq = 16;
const LAST: Pirq = 2048;

/// A function of the driver domain.
struct Function {
    reset_by_bus: bool,
    space: Option<fs::File>,
    rules: Option<Rules>,
    journal: Journal,
    kept: BTreeSet<Mapping>,
    guest: Option<(DomId, Instant)>,
    reset: Option<JoinHandle<Result<(), String>>>,
}

/// One driver domain's office.
pub struct Office<'a> {
    calls: &'a dyn Physdev,
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
type Refusal = (u32, Option<String>);

fn refused<T>(number: u32, why: impl Into<String>) -> Result<T, Refusal> {
    Err((number, Some(why.into())))
}

/// What Xen answered; the driver domain tells of it.
fn xen(number: i32) -> Refusal {
    (number.unsigned_abs(), None)
}

impl<'a> Office<'a> {
    /// The office for `driver`. Mappings of which nobody knows whether they were made are looked for at once.
    pub fn open(
        calls: &'a dyn Physdev,
        store: &'a dyn Store,
        sysfs: Sysfs,
        dir: PathBuf,
        driver: &Driver,
    ) -> Office<'a> {
        let function = |device: &pciback::cmdline::DeviceConfig| {
            let function = Function {
                reset_by_bus: device.reset == Reset::Bus,
                space: None,
                rules: None,
                journal: Journal::open(&dir, device.sbdf),
                kept: BTreeSet::new(),
                guest: None,
                reset: None,
            };
            (device.sbdf, function)
        };
        let functions = driver.config.devices.iter().map(function).collect();
        let name = driver.name.clone();
        let throttle = Throttle::default();
        let mut office =
            Office { calls, store, sysfs, dir, name, session: 0, functions, throttle, start: Instant::now() };
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
            Err((errno, why)) => {
                if let Some(why) = why {
                    self.log(&format!("{function}: {why}: refused"));
                }
                (errno, 0)
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
        let Some(function) = self.functions.get_mut(&sbdf) else {
            return refused(EPERM, "its xl configuration (dev=) does not list this function");
        };
        match operation {
            Operation::Write { offset, width, value } => write(&self.sysfs, sbdf, function, offset, width, value),
            Operation::Prepare => {
                owned(&self.sysfs, sbdf)?;
                self.calls.prepare_msix(sbdf).map(|()| 0).map_err(xen)
            }
            Operation::Release => {
                owned(&self.sysfs, sbdf)?;
                self.calls.release_msix(sbdf).map(|()| 0).map_err(xen)
            }
            Operation::Restore => {
                owned(&self.sysfs, sbdf)?;
                self.calls.restore_msi(sbdf).map(|()| 0).map_err(xen)
            }
            Operation::Map { guest, vector } => self.map(sbdf, guest, vector),
            Operation::Unmap { guest, pirq } => {
                if !function.journal.mapped().contains(&(guest, pirq)) {
                    return refused(EINVAL, format!("pirq {pirq} of domain {guest} is no vector of it"));
                }
                unmap(self.calls, function, (guest, pirq)).map(|()| 0).map_err(xen)
            }
            Operation::Reset => self.reset(sbdf),
            Operation::ResetDone => match function.reset.take() {
                None => refused(ENOENT, "no reset was asked for"),
                Some(running) if !running.is_finished() => {
                    function.reset = Some(running);
                    Ok(0)
                }
                Some(done) => match done.join() {
                    Ok(Ok(())) => Ok(1),
                    Ok(Err(why)) => refused(EIO, format!("dom0's kernel does not reset it: {why}")),
                    Err(_) => refused(EIO, "the reset ended badly"),
                },
            },
            Operation::Keep { guest, pirq } => {
                function.kept.insert((guest, pirq));
                Ok(0)
            }
            Operation::Settle => {
                let unknown: Vec<Mapping> = function.journal.mapped().difference(&function.kept).copied().collect();
                for mapping in unknown {
                    unmap(self.calls, function, mapping).map_err(xen)?;
                }
                // What it knows was made by this tool, or it may not have it unmapped either.
                Ok(0)
            }
            Operation::Again => Ok(0),
        }
    }

    fn map(&mut self, sbdf: Sbdf, guest: DomId, vector: Vector) -> Result<u32, Refusal> {
        owned(&self.sysfs, sbdf)?;
        let Some(function) = self.functions.get_mut(&sbdf) else { return Err((ENODEV, None)) };
        if function.guest.is_none_or(|(known, since)| known != guest || since.elapsed() > FRESH) {
            let recorded = self.store.read(0, &nodes::record(sbdf, "domid")).and_then(|text| text.parse().ok());
            if recorded != Some(u32::from(guest)) {
                function.guest = None;
                return refused(EPERM, format!("a vector for domain {guest}, which this tool has not attached it to"));
            }
            function.guest = Some((guest, Instant::now()));
        }
        if let Vector::Msix { table_base, .. } = vector {
            let rules = rules(&self.sysfs, sbdf, function)?;
            if rules.table_base() != Some(table_base) {
                return refused(EINVAL, format!("an MSI-X table at {table_base:#x}, where dom0 knows of none"));
            }
        }
        if let Err(error) = function.journal.begin(guest) {
            return refused(EIO, format!("the journal in {} cannot be written: {error}", self.dir.display()));
        }
        match self.calls.map(guest, sbdf, vector) {
            Ok(pirq) => {
                function.journal.end(Some((guest, pirq)));
                Ok(pirq.cast_unsigned())
            }
            Err(number) => {
                function.journal.end(None);
                Err(xen(number))
            }
        }
    }

    fn reset(&mut self, sbdf: Sbdf) -> Result<u32, Refusal> {
        owned(&self.sysfs, sbdf)?;
        let Some(function) = self.functions.get_mut(&sbdf) else { return Err((ENODEV, None)) };
        if function.reset.is_some() {
            return Err((EBUSY, None));
        }
        if !function.journal.mapped().is_empty() {
            return refused(EINVAL, "a reset with vectors mapped");
        }
        if !self.sysfs.has(sbdf, "reset") {
            return refused(ENOENT, "dom0's kernel has no reset for it");
        }
        let (sysfs, bus) = (self.sysfs.clone(), function.reset_by_bus && self.sysfs.has(sbdf, "reset_method"));
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

    /// Unmaps everything the driver domain had mapped: it is gone, and its guests' vectors would keep the functions.
    pub fn close(&mut self) {
        for (sbdf, function) in &mut self.functions {
            for mapping in function.journal.mapped().clone() {
                if let Err(number) = unmap(self.calls, function, mapping) {
                    eprintln!(
                        "xl-pciback: warning: {sbdf}: pirq {} of domain {} stays mapped: {}",
                        mapping.1,
                        mapping.0,
                        errno(number)
                    );
                }
            }
        }
    }
}

/// The function must have been taken from dom0, and no driver of dom0 may have it.
fn owned(sysfs: &Sysfs, sbdf: Sbdf) -> Result<(), Refusal> {
    if sysfs.is_nobodys(sbdf) { Ok(()) } else { refused(EBUSY, "dom0 has the function itself") }
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
        let space = sysfs.config_space(sbdf).map_err(|failure| (ENODEV, Some(failure.what)))?;
        let known = sysfs.function(sbdf).map_err(|failure| (ENODEV, Some(failure.what)))?;
        if let Some(refusal) = known.refusal() {
            return Err((EPERM, Some(refusal.what)));
        }
        function.rules = Rules::new(&known, &space);
    }
    // One that does not answer is looked at again with the next request.
    function.rules.as_ref().ok_or((ENODEV, None))
}

fn write(
    sysfs: &Sysfs,
    sbdf: Sbdf,
    function: &mut Function,
    offset: u16,
    width: Width,
    value: u32,
) -> Result<u32, Refusal> {
    owned(sysfs, sbdf)?;
    if function.space.is_none() {
        function.space = Some(sysfs.open_config(sbdf).map_err(|failure| (ENODEV, Some(failure.what)))?);
    }
    rules(sysfs, sbdf, function)?;
    let (Some(space), Some(rules)) = (&function.space, &function.rules) else { return Err((ENODEV, None)) };
    let read = |at: u16, width: Width| {
        let mut bytes = [0; 4];
        let wanted = bytes.get_mut(..usize::from(width.bytes()))?;
        space.read_exact_at(wanted, at.into()).ok()?;
        Some(u32::from_le_bytes(bytes))
    };
    if let Err(why) = rules.judge(offset, width, value, read) {
        return refused(EPERM, format!("a write of {value:#x} ({} bytes) to {offset:#x}: {why}", width.bytes()));
    }
    let bytes = value.to_le_bytes();
    let bytes = bytes.get(..usize::from(width.bytes())).unwrap_or(&bytes);
    match space.write_at(bytes, offset.into()) {
        Ok(written) if written == bytes.len() => Ok(0),
        Ok(_) => refused(EIO, format!("dom0 cannot write {offset:#x}")),
        Err(error) => {
            // The function may have been removed and found again.
            function.space = None;
            refused(EIO, format!("dom0's kernel refuses a write to {offset:#x}: {error}"))
        }
    }
}
