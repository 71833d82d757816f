//! dom0's `xl-pciback serve` as the driver domain meets it: requests carried out at once and in order, a record of what is
//! mapped that outlives it, and the ways in which it can go.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;

use pciback::delegate::Line;
use pciback::delegate::message::{ANSWER, Answer, Operation, REQUEST, Request};
use pciback::physdev::Pirq;
use pciback::platform::{DomId, Nanos};
use pciback::sbdf::Sbdf;

use super::World;

/// When it ends, counted in requests from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// Before it carries out the request.
    Before,
    /// After it carried it out, before it wrote that down.
    Unwritten,
    /// After it wrote it down, before it answers.
    Unanswered,
}

#[derive(Default)]
pub struct Dom0 {
    pub running: Cell<bool>,
    /// It runs and does nothing.
    pub hung: Cell<bool>,
    session: Cell<u32>,
    queue: RefCell<VecDeque<Request>>,
    inbox: RefCell<VecDeque<Answer>>,
    /// Everything that came.
    pub requests: RefCell<Vec<Request>>,
    death: Cell<Option<(u32, Death)>>,
    /// What it has written down: mapped vectors, and a mapping that it has begun.
    mapped: RefCell<BTreeSet<(Sbdf, DomId, Pirq)>>,
    begun: RefCell<Option<Sbdf>>,
    kept: RefCell<BTreeSet<(Sbdf, DomId, Pirq)>>,
    /// Functions it does not let the driver domain have.
    pub refused: RefCell<BTreeSet<Sbdf>>,
    /// Its kernel can reset the functions; how long that takes, and what it answers at the end.
    pub can_reset: Cell<bool>,
    pub reset_time: Cell<Nanos>,
    pub reset_errno: Cell<u32>,
    /// Its kernel resets functions on a bus with several only all together; what it answers to a wish for one alone.
    pub alone_errno: Cell<Option<i32>>,
    resetting: RefCell<Option<(Sbdf, Nanos, bool)>>,
    /// Resets that were begun, and whether of all on the bus.
    pub resets: RefCell<Vec<(Sbdf, bool)>>,
}

impl World {
    /// Starts dom0's tool.
    pub fn serve(&self) {
        let dom0 = &self.dom0;
        dom0.running.set(true);
        dom0.hung.set(false);
        dom0.queue.borrow_mut().clear();
        dom0.kept.borrow_mut().clear();
        if let Some(sbdf) = dom0.begun.borrow_mut().take() {
            self.unmap_unknown(sbdf, &dom0.mapped.borrow());
        }
        self.hello();
    }

    fn hello(&self) {
        let dom0 = &self.dom0;
        dom0.session.set(dom0.session.get() + 1);
        dom0.inbox.borrow_mut().push_back(Answer::hello(dom0.session.get()));
    }

    /// It ends without a word.
    pub fn kill_serve(&self) {
        self.dom0.running.set(false);
        self.dom0.death.set(None);
    }

    /// It ends with the request after `count` more.
    pub fn kill_serve_at(&self, count: u32, how: Death) {
        self.dom0.death.set(Some((count, how)));
    }

    /// It goes on after it hung.
    pub fn wake_serve(&self) {
        self.dom0.hung.set(false);
        self.carry_out();
    }

    /// What dom0 does by itself.
    pub fn as_dom0<T>(&self, act: impl FnOnce(&super::Xen) -> T) -> T {
        self.xen.by_dom0.set(true);
        let answer = act(&self.xen);
        self.xen.by_dom0.set(false);
        answer
    }

    fn unmap_unknown(&self, sbdf: Sbdf, known: &BTreeSet<(Sbdf, DomId, Pirq)>) {
        self.xen.by_dom0.set(true);
        for (guest, pirq, number) in self.xen.mapped(sbdf) {
            // Of several vectors of MSI the first stands for all.
            let known = [pirq, pirq - Pirq::from(number)].iter().any(|pirq| known.contains(&(sbdf, guest, *pirq)));
            if !known && self.xen.listed(guest) {
                let _ = self.xen.unmap(guest, pirq);
            }
        }
        self.xen.by_dom0.set(false);
    }

    fn carry_out(&self) {
        let dom0 = &self.dom0;
        while dom0.running.get() && !dom0.hung.get() {
            let Some(request) = dom0.queue.borrow_mut().pop_front() else { return };
            let death = dom0.death.get().and_then(|(left, how)| {
                dom0.death.set(Some((left.saturating_sub(1), how)));
                (left == 0).then_some(how)
            });
            if death == Some(Death::Before) {
                return self.kill_serve();
            }
            if request.operation == Operation::Again {
                self.hello();
                continue;
            }
            if request.session != dom0.session.get() {
                continue;
            }
            let answer = self.answer(&request, death == Some(Death::Unwritten));
            if death.is_some() {
                return self.kill_serve();
            }
            let (errno, value) = answer.map_or_else(|errno| (errno.unsigned_abs(), 0), |value| (0, value));
            let Request { session, sequence, .. } = request;
            dom0.inbox.borrow_mut().push_back(Answer { session, sequence, errno, value });
        }
    }

    fn answer(&self, request: &Request, unwritten: bool) -> Result<u32, i32> {
        let (dom0, sbdf) = (&self.dom0, request.function);
        if dom0.refused.borrow().contains(&sbdf) {
            return Err(1);
        }
        self.xen.by_dom0.set(true);
        let answer = match request.operation {
            Operation::Write { offset, width, value } => {
                self.hardware.borrow()[&sbdf].writes.borrow_mut().push((offset, value));
                self.xen.config_write(sbdf, offset, width, value);
                Ok(0)
            }
            Operation::Prepare => self.xen.prepare_msix(sbdf).map(|()| 0),
            Operation::Release => self.xen.release_msix(sbdf).map(|()| 0),
            Operation::Restore => self.xen.restore_msi(sbdf).map(|()| 0),
            Operation::Map { guest, vector } => {
                dom0.begun.replace(Some(sbdf));
                let pirq = self.xen.map(guest, sbdf, vector);
                if !unwritten {
                    dom0.begun.take();
                    dom0.mapped.borrow_mut().extend(pirq.map(|pirq| (sbdf, guest, pirq)));
                }
                pirq.map(Pirq::cast_unsigned)
            }
            Operation::Unmap { guest, pirq } => {
                let done = self.xen.unmap(guest, pirq);
                if done.is_ok() {
                    dom0.mapped.borrow_mut().remove(&(sbdf, guest, pirq));
                }
                done.map(|()| 0)
            }
            Operation::Reset { .. } if !dom0.can_reset.get() => Err(2),
            Operation::Reset { together: false } if dom0.alone_errno.get().is_some() => {
                Err(dom0.alone_errno.get().unwrap_or_default())
            }
            Operation::Reset { together } => {
                dom0.resetting.replace(Some((sbdf, self.now.get() + dom0.reset_time.get(), together)));
                dom0.resets.borrow_mut().push((sbdf, together));
                Ok(0)
            }
            Operation::ResetDone => match *dom0.resetting.borrow() {
                Some((_, end, _)) if self.now.get() < end => Ok(0),
                Some((sbdf, _, together)) if dom0.reset_errno.get() == 0 => {
                    let reached = |other: &Sbdf| {
                        *other == sbdf || together && (other.segment(), other.bus()) == (sbdf.segment(), sbdf.bus())
                    };
                    for (_, function) in self.hardware.borrow().iter().filter(|(other, _)| reached(other)) {
                        function.reset(self.now.get(), (0, super::hardware::Silence::Ones));
                    }
                    Ok(1)
                }
                _ => Err(dom0.reset_errno.get().cast_signed()),
            },
            Operation::Keep { guest, pirq } => {
                dom0.kept.borrow_mut().insert((sbdf, guest, pirq));
                Ok(0)
            }
            Operation::Settle => {
                let kept = dom0.kept.borrow().clone();
                dom0.mapped.borrow_mut().retain(|of| of.0 != sbdf || kept.contains(of));
                self.unmap_unknown(sbdf, &kept);
                Ok(0)
            }
            Operation::Again => unreachable!("handled before"),
        };
        self.xen.by_dom0.set(false);
        answer
    }
}

/// The driver domain's end of the channel.
pub struct End(pub Rc<World>);

impl Line for End {
    fn is_connected(&self) -> bool {
        self.0.dom0.running.get()
    }
    fn send(&mut self, request: &[u8; REQUEST]) -> bool {
        let request = Request::decode(request).expect("a good request");
        self.0.dom0.requests.borrow_mut().push(request);
        self.0.dom0.queue.borrow_mut().push_back(request);
        self.0.carry_out();
        true
    }
    fn receive(&mut self, answer: &mut [u8; ANSWER]) -> bool {
        let Some(next) = self.0.dom0.inbox.borrow_mut().pop_front() else { return false };
        *answer = next.encode();
        true
    }
    fn wait(&mut self, deadline: Nanos) {
        self.0.now.set(deadline);
    }
    fn now(&self) -> Nanos {
        self.0.now.get()
    }
}
