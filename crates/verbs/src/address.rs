// SPDX-License-Identifier: BSD-3-Clause
//! Socket addresses as C has them.

use libc::{AF_INET, AF_INET6, sa_family_t, sockaddr_in, sockaddr_in6, sockaddr_storage};
use std::ffi::c_void;
use std::mem;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};

/// The structure of an address.
pub fn to_c(address: SocketAddr) -> sockaddr_storage {
    // SAFETY: a socket address of zeroes is valid, and the storage is large and
    // aligned enough for either family's structure.
    unsafe {
        let mut storage: sockaddr_storage = mem::zeroed();
        let place: *mut c_void = (&raw mut storage).cast();
        match address {
            SocketAddr::V4(v4) => {
                let mut raw: sockaddr_in = mem::zeroed();
                raw.sin_family = AF_INET as sa_family_t;
                raw.sin_port = v4.port().to_be();
                raw.sin_addr.s_addr = u32::from_ne_bytes(v4.ip().octets());
                place.cast::<sockaddr_in>().write(raw);
            }
            SocketAddr::V6(v6) => {
                let mut raw: sockaddr_in6 = mem::zeroed();
                raw.sin6_family = AF_INET6 as sa_family_t;
                raw.sin6_port = v6.port().to_be();
                raw.sin6_addr.s6_addr = v6.ip().octets();
                raw.sin6_scope_id = v6.scope_id();
                place.cast::<sockaddr_in6>().write(raw);
            }
        }
        storage
    }
}

/// The address in a structure, unless it is of another family.
pub(crate) fn from_c(storage: &sockaddr_storage) -> Option<SocketAddr> {
    let place: *const c_void = (&raw const *storage).cast();
    match i32::from(storage.ss_family) {
        AF_INET => {
            // SAFETY: the family says that a sockaddr_in stands here.
            let raw = unsafe { &*place.cast::<sockaddr_in>() };
            let ip = IpAddr::from(raw.sin_addr.s_addr.to_ne_bytes());
            let IpAddr::V4(ip) = ip else { return None };
            Some(SocketAddr::V4(SocketAddrV4::new(ip, u16::from_be(raw.sin_port))))
        }
        AF_INET6 => {
            // SAFETY: the family says that a sockaddr_in6 stands here.
            let raw = unsafe { &*place.cast::<sockaddr_in6>() };
            Some(SocketAddr::V6(SocketAddrV6::new(
                raw.sin6_addr.s6_addr.into(),
                u16::from_be(raw.sin6_port),
                0,
                raw.sin6_scope_id,
            )))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_c_structures() {
        for text in ["10.9.9.1:6379", "0.0.0.0:0", "[::1]:65535", "[fe80::1%3]:7"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(from_c(&to_c(address)), Some(address));
        }
    }
}
