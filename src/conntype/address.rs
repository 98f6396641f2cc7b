// SPDX-License-Identifier: BSD-3-Clause
//! Addresses as the operator writes them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};

/// The address behind a name; `*` and `::*` are all of a family.
///
/// # Errors
/// If the name has none.
pub fn resolve(name: &str, port: u16) -> io::Result<SocketAddr> {
    match name {
        "*" => return Ok(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)),
        "::*" => return Ok(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port)),
        _ => {}
    }
    let mut found = (name, port).to_socket_addrs()?;
    found.next().ok_or_else(|| io::Error::other("the name has no address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_are_all_addresses_of_a_family() {
        assert_eq!(resolve("*", 1).unwrap(), "0.0.0.0:1".parse().unwrap());
        assert_eq!(resolve("::*", 2).unwrap(), "[::]:2".parse().unwrap());
        assert_eq!(resolve("::1", 3).unwrap(), "[::1]:3".parse().unwrap());
        assert!(resolve("no such name", 4).is_err());
    }
}
