//! Xen's error numbers by name, `xen/errno.h`. A hypercall answers the negative of one of these.

use core::fmt;

/// A positive error number of Xen.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// Operation not permitted.
    pub const EPERM: Errno = Errno(1);
    /// No such domain.
    pub const ESRCH: Errno = Errno(3);
    /// Invalid argument.
    pub const EINVAL: Errno = Errno(22);
    /// Function not implemented.
    pub const ENOSYS: Errno = Errno(38);

    /// The C name, or `None` for a number this table lacks.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            1 => "EPERM",
            2 => "ENOENT",
            3 => "ESRCH",
            5 => "EIO",
            6 => "ENXIO",
            7 => "E2BIG",
            11 => "EAGAIN",
            12 => "ENOMEM",
            13 => "EACCES",
            14 => "EFAULT",
            16 => "EBUSY",
            17 => "EEXIST",
            19 => "ENODEV",
            22 => "EINVAL",
            28 => "ENOSPC",
            34 => "ERANGE",
            38 => "ENOSYS",
            61 => "ENODATA",
            62 => "ETIME",
            75 => "EOVERFLOW",
            85 => "ERESTART",
            95 => "EOPNOTSUPP",
            110 => "ETIMEDOUT",
            _ => return None,
        })
    }

    /// Splits a hypercall's answer into its value and its error.
    ///
    /// # Errors
    /// The error number, if the answer is negative.
    pub fn check(answer: i64) -> Result<u64, Errno> {
        match u64::try_from(answer) {
            Ok(value) => Ok(value),
            Err(_) => Err(Errno(i32::try_from(answer.unsigned_abs()).unwrap_or(i32::MAX))),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "-{name} (-{})", self.0),
            None => write!(f, "-{}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_split_into_value_and_error() {
        assert_eq!(Errno::check(0), Ok(0));
        assert_eq!(Errno::check(7), Ok(7));
        assert_eq!(Errno::check(-38), Err(Errno::ENOSYS));
        assert_eq!(Errno::check(i64::MIN), Err(Errno(i32::MAX)));
        assert_eq!(std::format!("{}", Errno(22)), "-EINVAL (-22)");
        assert_eq!(std::format!("{}", Errno(9999)), "-9999");
    }
}
