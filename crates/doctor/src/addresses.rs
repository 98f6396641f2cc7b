// SPDX-License-Identifier: BSD-3-Clause
//! The addresses of this machine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ptr;

/// The addresses of this machine that can be connected to without a scope, those of loopback
/// last; none where the system does not tell, as in a service that is kept from `AF_NETLINK`.
pub fn local() -> Vec<IpAddr> {
    let mut list = ptr::null_mut();
    // SAFETY: a place for the list.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut next = list;
    // SAFETY: a list of the system's, read until its end and freed once by the system's own
    // function; an address is of the kind that its family says.
    unsafe {
        while let Some(entry) = next.as_ref() {
            next = entry.ifa_next;
            if entry.ifa_addr.is_null() {
                continue;
            }
            match i32::from((*entry.ifa_addr).sa_family) {
                libc::AF_INET => {
                    let address = entry.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned();
                    found.push(IpAddr::V4(Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes())));
                }
                libc::AF_INET6 => {
                    let address = entry.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned();
                    let address = Ipv6Addr::from(address.sin6_addr.s6_addr);
                    if !address.is_unicast_link_local() {
                        found.push(IpAddr::V6(address));
                    }
                }
                _ => {}
            }
        }
        libc::freeifaddrs(list);
    }
    found.sort_by_key(|address| (address.is_loopback(), address.is_ipv6()));
    found
}

#[cfg(test)]
mod tests {
    #[test]
    fn loopback_is_there_and_last() {
        let all = super::local();
        assert!(all.last().is_some_and(|address| address.is_loopback()), "{all:?}");
    }
}
