// SPDX-License-Identifier: BSD-3-Clause
//! Errors: the operation that failed, and the system's error number.

use crate::account::{limit_name, locked_memory_limit};
use std::{fmt, io};

/// The actions whose failure has causes worth explaining.
pub(crate) const REGISTER: &str = "register memory";
pub(crate) const REGISTER_WITHIN: &str = "register memory within the configured total";
pub(crate) const OPEN: &str = "open the RDMA connection manager";
/// What fails where the connection manager names no device.
pub const FIND: &str = "find the device";

/// A verbs or connection manager call that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Error {
    /// The operation, in words that fit behind "cannot".
    pub action: &'static str,
    /// The system's error number.
    pub errno: i32,
}

impl Error {
    /// The error that `errno` holds right after a call failed.
    pub(crate) fn last(action: &'static str) -> Self {
        Self { action, errno: io::Error::last_os_error().raw_os_error().unwrap_or(0) }
    }

    /// `Ok` for the 0 of calls that return 0 or −1 and set `errno`.
    pub(crate) fn check(action: &'static str, result: i32) -> Result<(), Self> {
        if result == 0 { Ok(()) } else { Err(Self::last(action)) }
    }

    /// `Ok` for the 0 of calls that return the error number itself. Where the manual promises
    /// a number some providers return it with a minus, and others −1 and set `errno`.
    pub(crate) fn check_number(action: &'static str, result: i32) -> Result<(), Self> {
        match result {
            0 => Ok(()),
            -1 => Err(Self::last(action)),
            number => Err(Self { action, errno: number.saturating_abs() }),
        }
    }

    /// Whether a queue took no more work requests, and will when some are over. Most providers
    /// say `ENOMEM` then, some `EAGAIN`.
    pub fn is_queue_full(&self) -> bool {
        matches!(self.errno, libc::ENOMEM | libc::EAGAIN)
    }

    /// Whether a device does not know what it was asked for.
    pub fn is_unsupported(&self) -> bool {
        matches!(self.errno, libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)
    }

    /// Whether memory could not be had or registered.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self.errno, libc::ENOMEM | libc::EDQUOT)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}", self.action)?;
        // Our own limit, which the system's words for the number ("Disk quota") would hide.
        if self.errno == libc::EDQUOT {
            return match limit_name() {
                Some(name) if self.action == REGISTER_WITHIN => write!(f, " ({name})"),
                _ => Ok(()),
            };
        }
        write!(f, ": {}", io::Error::from_raw_os_error(self.errno))?;
        if self.action == REGISTER && self.errno == libc::ENOMEM {
            match locked_memory_limit() {
                Some(bytes) => write!(
                    f,
                    "; the limit on locked memory (memlock) is {bytes} bytes: raise it \
                     (`ulimit -l`, or LimitMEMLOCK=infinity in the service's unit)"
                )?,
                None => write!(f, "; locked memory is not limited, so the device or machine is")?,
            }
        }
        if self.action == FIND && self.errno == libc::ENODEV {
            f.write_str(
                "; it was removed, or its node GUID is 0, by which librdmacm finds it (`rdma dev \
                 show`; of a virtual function, `ip link set DEV vf N node_guid GUID`)",
            )?;
        }
        let makes = |word: &str| self.action.starts_with(word);
        if self.errno == libc::EAGAIN && ["create", "allocate", "register"].into_iter().any(makes) {
            f.write_str("; the limit of the server's rdma cgroup (rdma.max) is reached")?;
        }
        if self.action == OPEN {
            f.write_str(match self.errno {
                libc::ENODEV => {
                    "; there is no RDMA device (`rdma link` shows them): load the driver of \
                     yours, such as mlx5_ib or rdma_rxe, and `modprobe rdma_ucm`; a container \
                     or a service has to be let to /dev/infiniband (--device, DeviceAllow=)"
                }
                libc::ENOENT | libc::ENXIO => {
                    "; there is no /dev/infiniband/rdma_cm: `modprobe rdma_ucm`; a container or \
                     a service has to be let to it (--device, PrivateDevices=no)"
                }
                libc::EPERM => {
                    "; /dev/infiniband/rdma_cm is closed to this container or service \
                     (--device, DeviceAllow=)"
                }
                libc::EACCES => {
                    "; /dev/infiniband/rdma_cm is closed to the server's user: its mode is 0666 \
                     by rdma-core's udev rules"
                }
                _ => "",
            })?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_registration_names_the_limit() {
        let text = Error { action: REGISTER, errno: libc::ENOMEM }.to_string();
        assert!(text.starts_with("cannot register memory: "), "{text}");
        let limit = locked_memory_limit().map_or("not limited".to_owned(), |b| b.to_string());
        assert!(text.contains(&limit), "{text}");
    }

    #[test]
    fn a_connection_manager_that_is_not_there_says_what_to_do() {
        for (errno, words) in [
            (libc::ENODEV, &["No such device", "rdma link", "driver", "modprobe rdma_ucm"][..]),
            (libc::ENOENT, &["/dev/infiniband/rdma_cm", "modprobe rdma_ucm"]),
            (libc::EPERM, &["--device", "DeviceAllow="]),
            (libc::EACCES, &["0666"]),
        ] {
            let text = Error { action: OPEN, errno }.to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
    }

    #[test]
    fn a_number_is_the_same_however_a_provider_returns_it() {
        let check = |result| Error::check_number("post", result).map_err(|error| error.errno);
        assert_eq!(check(0), Ok(()));
        assert_eq!((check(libc::EINVAL), check(-libc::EINVAL)), (Err(22), Err(22)));
        // SAFETY: the calling thread's own errno.
        unsafe { *libc::__errno_location() = libc::ENODEV };
        assert_eq!(check(-1), Err(libc::ENODEV));
        let is_room = |result| Error::check_number("post", result).unwrap_err().is_queue_full();
        assert!(is_room(-libc::EAGAIN) && is_room(libc::ENOMEM) && !is_room(-libc::EINVAL));
    }

    #[test]
    fn limits_that_the_number_hides_are_named() {
        let guid = Error { action: FIND, errno: libc::ENODEV }.to_string();
        assert!(guid.contains("node GUID is 0"), "{guid}");
        let cgroup = Error { action: "create a queue pair", errno: libc::EAGAIN }.to_string();
        assert!(cgroup.contains("rdma.max"), "{cgroup}");
    }

    #[test]
    fn other_errors_say_what_the_system_answered() {
        let text = Error { action: "listen", errno: libc::EADDRINUSE }.to_string();
        assert!(text.starts_with("cannot listen: Address already in use"), "{text}");
    }
}
