//! What went wrong, and what to do about it: every failure of the tool has both.

use std::fmt;

/// Exit codes.
pub mod exit {
    /// The operation failed.
    pub const FAILED: u8 = 1;
    /// The command line was wrong.
    pub const USAGE: u8 = 2;
    /// `check` found problems.
    pub const PROBLEMS: u8 = 3;
}

/// A failure with its remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// One sentence that names the thing.
    pub what: String,
    /// What the user can do.
    pub remedy: String,
    /// Exit code.
    pub code: u8,
}

/// The result of every step.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    /// A failed operation.
    pub fn new(what: impl Into<String>, remedy: impl Into<String>) -> Failure {
        Failure { what: what.into(), remedy: remedy.into(), code: exit::FAILED }
    }

    /// A wrong command line.
    pub fn usage(what: impl Into<String>) -> Failure {
        Failure { what: what.into(), remedy: "see xl-pciback --help".into(), code: exit::USAGE }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "xl-pciback: error: {}\nremedy: {}", self.what, self.remedy)
    }
}

/// The name of an errno, as users look it up.
pub fn errno(number: i32) -> String {
    let name = match number {
        1 => "EPERM",
        2 => "ENOENT",
        3 => "ESRCH",
        11 => "EAGAIN",
        12 => "ENOMEM",
        13 => "EACCES",
        14 => "EFAULT",
        16 => "EBUSY",
        17 => "EEXIST",
        19 => "ENODEV",
        22 => "EINVAL",
        28 => "ENOSPC",
        38 => "ENOSYS",
        95 => "EOPNOTSUPP",
        _ => return format!("errno {number}"),
    };
    format!("{name} ({number})")
}
