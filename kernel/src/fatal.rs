//! The end of the line: panics and processor exceptions. Both are reported on port 0xE9 (`xl dmesg`)
//! and on the console, then the domain crashes, so that `on_crash=` of its xl config decides.

use core::fmt::Write;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicBool, Ordering};

use xen_guest::console::Line;
use xen_guest::port_e9::PortE9;
use xen_guest::sched::{self, Reason};

use crate::logger;

/// Set once the end has begun: a fault inside the report must not report again.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Reports `what` and crashes the domain.
pub fn stop(what: core::fmt::Arguments<'_>) -> ! {
    if !ENDING.swap(true, Ordering::Relaxed) {
        // Writing to the port cannot fail.
        let _ = writeln!(PortE9, "pciback-stubdom: fatal: {what}");
        let mut line = Line::<512>::new();
        // A report that is too long is cut.
        let _ = write!(line, "fatal: {what}");
        logger::emergency(line.as_str());
    }
    sched::shutdown(Reason::Crash)
}

/// Every panic of the image.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    stop(format_args!("{info}"))
}
