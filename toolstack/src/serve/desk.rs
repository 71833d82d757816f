//! One thread a driver domain: its channel, opened and opened again, with an office behind it. A driver domain that asks
//! too much, or nothing sensible, holds nobody up but itself.

use std::hash::{BuildHasher, RandomState};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use pciback::delegate::message::{CHANNEL, REQUEST};
use pciback::sbdf::Sbdf;

use super::office::Office;
use crate::domains::Driver;
use crate::error::Outcome;
use crate::sysfs::Sysfs;
use crate::xen::calls::Calls;
use crate::xen::channel::Channel;
use crate::xen::events::wait_readable;
use crate::xen::{Store, Xen};

/// How often a channel that another end still holds is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// `xen/errno.h`.
const EIO: i32 = 5;

/// Requests in a row before the wish to stop is looked for.
const TURN: u32 = 1024;

/// A running desk.
pub struct Desk {
    /// Closing it ends the thread; a byte tells it to look for the channel.
    bell: UnixStream,
    thread: JoinHandle<()>,
    functions: Vec<Sbdf>,
}

/// The functions of a driver domain.
fn functions(driver: &Driver) -> Vec<Sbdf> {
    driver.config.devices.iter().map(|device| device.sbdf).collect()
}

impl Desk {
    /// Opens a desk for `driver`.
    ///
    /// # Errors
    /// No thread or no pair of sockets.
    pub fn open(driver: &Driver, sysfs: &Sysfs, dir: PathBuf, libdir: Option<String>) -> std::io::Result<Desk> {
        let (bell, ring) = UnixStream::pair()?;
        bell.set_nonblocking(true)?;
        ring.set_nonblocking(true)?;
        let (driver, sysfs) = (driver.clone(), sysfs.clone());
        let functions = functions(&driver);
        let body = move || {
            if let Err(failure) = run(&driver, sysfs, dir, libdir.as_deref(), &ring) {
                eprintln!("driver domain {:?} is not served: {failure}", driver.name);
            }
        };
        let thread = std::thread::Builder::new().name("desk".into()).stack_size(256 << 10).spawn(body)?;
        Ok(Desk { bell, thread, functions })
    }

    /// The driver domain may have announced its channel.
    pub fn ring(&self) {
        // A full socket rings as well.
        let _ = std::io::Write::write(&mut &self.bell, &[1]);
    }

    /// Whether it is for the functions that `driver` has now.
    pub fn serves(&self, driver: &Driver) -> bool {
        self.functions == functions(driver)
    }

    /// Whether it still works.
    pub fn is_open(&self) -> bool {
        !self.thread.is_finished()
    }

    /// Closes it, and waits for what it is doing.
    pub fn close(self) {
        drop(self.bell);
        let _ = self.thread.join();
    }
}

/// What the bell said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bell {
    Look,
    Stop,
}

fn listen(mut ring: &UnixStream) -> Bell {
    let mut bytes = [0; 64];
    loop {
        match ring.read(&mut bytes) {
            Ok(0) => return Bell::Stop,
            Ok(_) => {}
            Err(_) => return Bell::Look,
        }
    }
}

fn run(driver: &Driver, sysfs: Sysfs, dir: PathBuf, libdir: Option<&str>, ring: &UnixStream) -> Outcome<()> {
    let xen = Xen::open(libdir)?;
    let calls = Calls::open(&xen)?;
    // A note first: a domain that stood still when the last life ended goes on now.
    let note = dir.with_file_name(format!("paused-{}", driver.domid));
    if note.exists() {
        let _ = xen.pause(driver.domid, false);
        let _ = std::fs::remove_file(&note);
    }
    let pause = |still: bool| {
        if still {
            std::fs::write(&note, "").map_err(|error| error.raw_os_error().unwrap_or(EIO))?;
        }
        let done = xen.pause(driver.domid, still);
        if still == done.is_err() {
            // It runs: it was let go, or never stood still. One that does not go on keeps its note.
            let _ = std::fs::remove_file(&note);
        }
        done
    };
    let mut office = Office::open(&calls, &pause, &xen, sysfs, dir, driver);
    let announced = format!("/local/domain/{}/{CHANNEL}/ring-ref", driver.domid);
    let (mut told, mut spoilt) = (false, false);
    loop {
        // Without an announcement only the bell can bring one.
        let channel = xen.read(0, &announced).and_then(|_| Channel::open(&xen, driver.domid).ok());
        let bell = match channel {
            Some(channel) => {
                told = false;
                serve(&mut office, &channel, driver, ring, &mut spoilt)
            }
            None => {
                let held = xen.read(0, &announced).is_some();
                if held && !std::mem::replace(&mut told, true) {
                    eprintln!("xl-pciback: driver domain {:?}: its channel is in use; waiting for it", driver.name);
                }
                wait_readable(&[ring.as_raw_fd()], held.then_some(RETRY));
                listen(ring)
            }
        };
        if bell == Bell::Stop {
            return Ok(());
        }
    }
}

/// Serves until the bell says stop.
fn serve(office: &mut Office<'_>, channel: &Channel, driver: &Driver, ring: &UnixStream, spoilt: &mut bool) -> Bell {
    let session = RandomState::new().hash_one(Instant::now()) as u32;
    if !channel.send(&office.begin(session).encode()) {
        if !std::mem::replace(spoilt, true) {
            eprintln!("xl-pciback: driver domain {:?} has no room for a word in its channel: not served", driver.name);
        }
        wait_readable(&[ring.as_raw_fd()], None);
        return listen(ring);
    }
    eprintln!("xl-pciback: driver domain {:?} (domain {}): connected", driver.name, driver.domid);
    let fds = [channel.fd(), ring.as_raw_fd()];
    let mut request = [0; REQUEST];
    // An event is taken behind the request it came with: the guest waits for that.
    let mut event = false;
    loop {
        let mut served = 0;
        while served < TURN && channel.receive(&mut request) {
            served += 1;
            if let Some(answer) = office.carry_out(&request) {
                channel.send(&answer.encode());
            }
        }
        if std::mem::take(&mut event) {
            channel.take_event();
            // What came before that brings no event.
            if served < TURN && channel.has_data() {
                continue;
            }
        }
        // A look that costs nothing where the turn was cut short.
        let timeout = (served == TURN).then_some(Duration::ZERO);
        let ready = wait_readable(&fds, timeout);
        event = ready.first() == Some(&true);
        if ready.get(1) == Some(&true) && listen(ring) == Bell::Stop {
            return Bell::Stop;
        }
    }
}
