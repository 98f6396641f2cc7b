// SPDX-License-Identifier: BSD-3-Clause
//! Why an address can't be listened on.

use crate::endpoint::NoMemory;
use std::{fmt, io};
use verbs::Error;
use verbs::device::Device;

/// Why the server's listener is not what it should be.
#[derive(Debug)]
pub enum ListenError {
    /// An address, as the operator wrote it, and a port.
    Address(String, u16, Box<ListenError>),
    /// All addresses were optional, and none could be had.
    NoneOptional(Devices),
    /// An address stands there twice.
    Twice,
    /// A name has no address.
    Resolve(io::Error),
    /// The connection manager did not do it.
    Verbs(Error),
    /// The connection manager did not listen: the address may be no device's.
    Device(Error, Devices),
    /// No client could be served.
    Memory(NoMemory),
    /// There is no descriptor for the server.
    Descriptor(io::Error),
}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(name, port, why) => {
                write!(f, "cannot listen on {name} port {port}: {why}")
            }
            Self::NoneOptional(devices) => {
                write!(f, "none of the optional addresses could be listened on ({devices})")
            }
            Self::Twice => f.write_str("the address is named twice"),
            Self::Resolve(error) => write!(f, "{error}"),
            Self::Verbs(error) => write!(f, "{error}"),
            Self::Device(error, devices) => write!(f, "{error} ({devices})"),
            Self::Memory(error) => write!(f, "{error}"),
            Self::Descriptor(error) => write!(f, "no descriptor left: {error}"),
        }
    }
}

impl std::error::Error for ListenError {}

impl From<NoMemory> for ListenError {
    fn from(error: NoMemory) -> Self {
        Self::Memory(error)
    }
}

/// The devices that there are to listen on, by their names.
#[derive(Debug)]
pub struct Devices(Vec<String>);

impl Devices {
    /// Those that there are now.
    pub fn now() -> Self {
        Self(Device::all().iter().map(Device::name).collect())
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("this machine has no RDMA device; see `rdma link`");
        }
        let names = self.0.join(", ");
        write!(f, "RDMA devices: {names}; see `rdma link` and `ip addr` for their addresses")
    }
}
