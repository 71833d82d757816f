//! The `log` backend: one line a record, to the PV console once its ring is known, to port 0xE9
//! before. Lines are built on the stack: logging never allocates.

use core::fmt::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};
use spin::Mutex;
use xen_guest::console::{Console, Line};
use xen_guest::port_e9::PortE9;

/// Longest line; what is longer is cut.
const LINE: usize = 400;

struct Logger(Mutex<Option<Console>>);

static LOGGER: Logger = Logger(Mutex::new(None));

/// Installs the logger, at level info until [`set_level`].
pub fn init() {
    // The only caller, at boot: it cannot have been set before.
    let _ = log::set_logger(&LOGGER);
    log::set_max_level(LevelFilter::Info);
}

/// Sets what is logged.
pub fn set_level(level: LevelFilter) {
    log::set_max_level(level);
}

/// From now on lines go to the console.
pub fn use_console(console: Console) {
    *LOGGER.0.lock() = Some(console);
}

/// Drops what somebody typed at the console.
pub fn discard_input() {
    if let Some(console) = LOGGER.0.lock().as_ref() {
        console.discard_input();
    }
}

/// A line from the panic path, if nobody holds the console.
pub fn emergency(line: &str) {
    if let Some(mut console) = LOGGER.0.try_lock()
        && let Some(console) = console.as_mut()
    {
        console.line(line);
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let level = match record.level() {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            Level::Info => "",
            Level::Debug => "debug: ",
            Level::Trace => "trace: ",
        };
        let mut line = Line::<LINE>::new();
        // A line that is too long is cut.
        let _ = write!(line, "{level}{}", record.args());
        match self.0.lock().as_mut() {
            Some(console) => console.line(line.as_str()),
            // Writing to the port cannot fail.
            None => drop(writeln!(PortE9, "{}", line.as_str())),
        }
    }

    fn flush(&self) {}
}
