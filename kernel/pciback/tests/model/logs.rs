//! What is logged while a test listens; each test has its own thread, and so its own lines.

use std::cell::RefCell;
use std::sync::Once;

thread_local!(static LINES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) });

struct Listener;

impl log::Log for Listener {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        LINES.with_borrow(Option::is_some)
    }
    fn log(&self, record: &log::Record<'_>) {
        LINES.with_borrow_mut(|lines| {
            if let Some(lines) = lines {
                lines.push(format!("{}: {}", record.level(), record.args()));
            }
        });
    }
    fn flush(&self) {}
}

/// Starts to listen, or forgets what was heard.
pub fn listen() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        log::set_logger(&Listener).expect("the only logger of a test file");
        log::set_max_level(log::LevelFilter::Info);
    });
    LINES.set(Some(Vec::new()));
}

/// What was heard since [`listen`].
pub fn heard() -> Vec<String> {
    LINES.with_borrow(|lines| lines.clone().expect("listen() comes first"))
}

/// How many lines that is.
pub fn count() -> usize {
    LINES.with_borrow(|lines| lines.as_ref().expect("listen() comes first").len())
}
