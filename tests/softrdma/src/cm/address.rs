// SPDX-License-Identifier: BSD-3-Clause
//! IP addresses and ports, and the abstract socket names that stand for them.
//!
//! `softrdma/PORT/ADDRESS` is what a listener or connection at that address is
//! bound to. The device owns every address that the machine owns, which only
//! the kernel can say; asking it costs a datagram socket and no traffic.

use crate::fault;
use crate::sys::{self, Fd};
use crate::verbs::device::Place;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};

/// Reads a C address; `None` for an unknown family or a null pointer.
///
/// # Safety
/// The pointer is null or points to an address as long as its family says.
pub unsafe fn from_c(sa: *const libc::sockaddr) -> Option<SocketAddr> {
    if sa.is_null() {
        return None;
    }
    // SAFETY: the caller's word.
    unsafe {
        match i32::from((*sa).sa_family) {
            libc::AF_INET => {
                let v4 = &*sa.cast::<libc::sockaddr_in>();
                let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
                Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
            }
            libc::AF_INET6 => {
                let v6 = &*sa.cast::<libc::sockaddr_in6>();
                let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
                Some(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), 0, v6.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

/// Writes a C address.
///
/// # Safety
/// There is room for a sockaddr_storage.
pub unsafe fn to_c(address: SocketAddr, out: *mut libc::sockaddr_storage) {
    // SAFETY: the caller's word; zeroes are valid for each of these.
    unsafe {
        out.write(std::mem::zeroed());
        match address {
            SocketAddr::V4(a) => {
                let sa = &mut *out.cast::<libc::sockaddr_in>();
                sa.sin_family = libc::AF_INET as _;
                sa.sin_port = a.port().to_be();
                sa.sin_addr.s_addr = u32::from(*a.ip()).to_be();
            }
            SocketAddr::V6(a) => {
                let sa = &mut *out.cast::<libc::sockaddr_in6>();
                sa.sin6_family = libc::AF_INET6 as _;
                sa.sin6_port = a.port().to_be();
                sa.sin6_addr.s6_addr = a.ip().octets();
                sa.sin6_scope_id = a.scope_id();
            }
        }
    }
}

/// Which device owns the address, if one does.
pub fn owner(ip: IpAddr) -> Option<Place> {
    let plan = fault::plan();
    if plan.second.as_ref().is_some_and(|second| second.at == ip) {
        return Some(Place::Second);
    }
    plan.only.map_or_else(|| owned(ip), |only| only == ip).then_some(Place::First)
}

/// True if this machine owns the address.
pub fn owned(ip: IpAddr) -> bool {
    match UdpSocket::bind((ip, 0)) {
        Ok(_) => true,
        // Link-local addresses want a scope, which the name does not have.
        Err(e) => {
            matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())
                && e.kind() == ErrorKind::InvalidInput
        }
    }
}

/// The source address that the kernel would use towards `to`; the error is an errno.
pub fn source_for(to: IpAddr) -> Result<IpAddr, i32> {
    let any: IpAddr =
        if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let code = |e: std::io::Error| e.raw_os_error().unwrap_or(libc::EHOSTUNREACH);
    let socket = UdpSocket::bind((any, 0)).map_err(code)?;
    socket.connect((to, 9)).map_err(code)?;
    let source = socket.local_addr().map_err(code)?.ip();
    // The kernel takes the first of the loopback's, which may be another device's.
    Ok(if owner(source) == owner(to) { source } else { to })
}

/// Both protocols: an IPv6 wildcard that takes IPv4 connections too.
const BOTH: &str = "*";

fn name(ip: &str, port: u16) -> String {
    format!("softrdma/{port}/{ip}")
}

/// The names at which a listener for `to` may be found, best first.
pub fn listener_names(to: SocketAddr) -> Vec<String> {
    let any = if to.is_ipv4() { "0.0.0.0" } else { "::" };
    vec![name(&to.ip().to_string(), to.port()), name(any, to.port()), name(BOTH, to.port())]
}

/// Binds a socket to an address, choosing a port if it is 0; the error is an errno.
/// One `to_call` takes no care of wildcards: nobody is called there, and who has many
/// connections would read the long table of all of them for each.
pub fn bind(
    socket: &Fd,
    address: SocketAddr,
    v6_only: bool,
    to_call: bool,
) -> Result<SocketAddr, i32> {
    let both = address.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && !v6_only;
    let ip = if both { BOTH.to_string() } else { address.ip().to_string() };
    if address.port() != 0 {
        if taken(&ip, address.port()) {
            return Err(libc::EADDRINUSE);
        }
        return sys::bind_abstract(socket, &name(&ip, address.port()))
            .map(|()| address)
            .map_err(|e| e.raw_os_error().unwrap_or(libc::EADDRINUSE));
    }
    // The ephemeral range, begun somewhere that differs between processes.
    let start =
        std::process::id().wrapping_mul(7919).wrapping_add(crate::verbs::context::unique() as u32);
    for i in 0..28_000u32 {
        let port = 32_768 + (start.wrapping_add(i) % 28_000) as u16;
        if (to_call || !taken(&ip, port)) && sys::bind_abstract(socket, &name(&ip, port)).is_ok() {
            return Ok(SocketAddr::new(address.ip(), port));
        }
    }
    Err(libc::EADDRINUSE)
}

/// True if a wildcard at this port, of a protocol in common, stands against
/// another address or the other way round. The same name twice is the kernel's
/// to refuse.
fn taken(ip: &str, port: u16) -> bool {
    const UNCONNECTED: &str = "01";
    let Ok(table) = std::fs::read_to_string("/proc/net/unix") else { return false };
    let prefix = format!("@softrdma/{port}/");
    let wild = |a: &str| matches!(a, "0.0.0.0" | "::" | BOTH);
    let common = |a: &str, b: &str| a == BOTH || b == BOTH || a.contains(':') == b.contains(':');
    table.lines().any(|line| {
        let Some((rest, other)) = line.split_once(&prefix) else { return false };
        // An accepted connection shows its listener's name, but does not hold it.
        let holds = rest.split_whitespace().nth(5) == Some(UNCONNECTED);
        holds && other != ip && (wild(other) || wild(ip)) && common(other, ip)
    })
}
