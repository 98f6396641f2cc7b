// SPDX-License-Identifier: BSD-3-Clause
//! Which connections of the server become links over RDMA, and what has to hold for that.
//!
//! A connection is known by the handler that the server gives with it: functions that the server
//! exports, and uses for nothing else. So whatever else is opened by way of the TCP type
//! (`MIGRATE`, the cluster's bus, a replica's second channel, into which a child writes) stays
//! as it is, in every configuration.

use super::identity;
use super::link;
use super::report::{self, Purpose};
use crate::child::in_child;
use crate::config::Replication;
use crate::host::connection::{Connection, Handler};
use crate::host::line::{Layout, Line, Version};
use crate::host::symbols;
use crate::host::tcp_slots::{Replacement, Target, TcpSlots};
use crate::panic::guard;
use crate::poller::connection::RdmaConnection;
use once_cell::sync::OnceCell;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;
use std::io;

const ERR: c_int = -1;

/// Why links can't go over RDMA in this server.
#[derive(Debug)]
pub enum Unfit {
    /// Its release is newer than any known one of its line, the last of which this is.
    Newer(Version, Version),
    /// Nobody has seen its source, or tried it.
    Unseen(Version),
    /// It exports no function of this name.
    Handler(&'static str),
    /// Its TCP type can't be written to.
    ReadOnly,
    /// There is nothing to draw an identity from.
    Identity(io::Error),
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("replication over RDMA is not possible in this server: ")?;
        match self {
            Self::Unseen(version) => {
                write!(
                    f,
                    "how {version} replicates is not known; releases before and after it are"
                )?;
            }
            Self::Newer(version, last) => write!(
                f,
                "it is {version}, and {last} is the last release of its line whose replication \
                 this module knows"
            )?,
            Self::Handler(name) => write!(f, "it exports no function {name}")?,
            Self::ReadOnly => f.write_str("its TCP connection type lies in read-only memory")?,
            Self::Identity(error) => write!(f, "no random numbers: {error}")?,
        }
        f.write_str("; replication=no serves clients all the same")
    }
}

impl std::error::Error for Unfit {}

/// What is needed where a connection is opened.
#[derive(Debug)]
struct Patch {
    slots: TcpSlots,
    /// The handlers of links, as addresses.
    handlers: Vec<(usize, Purpose)>,
}

static PATCH: OnceCell<Patch> = OnceCell::new();

/// Releases whose structures are known by their neighbours alone. Of all other known ones the
/// source was read, or, where there is none to be had (8.1.8, 9.1.1), a build was tried: links are
/// opened by the TCP type's `conn_create` and `connect`, with the handlers below, and the second
/// channel of dual-channel replication has another one, which is not exported.
const UNSEEN: [Version; 1] = [Version(0x0008_0008)];

/// The handlers of links in a line, and what they are for.
fn handlers(line: Line) -> &'static [(&'static CStr, Purpose)] {
    const REPLICATION: (&CStr, Purpose) = (c"syncWithPrimary", Purpose::Replication);
    const SLOTS: (&CStr, Purpose) = (c"slotExportConnectHandler", Purpose::SlotMigration);
    match line {
        Line::V8_0 | Line::V8_1 => &[REPLICATION],
        Line::V9_0 | Line::V9_1 => &[REPLICATION, SLOTS],
    }
}

/// A server that is fit for links over RDMA, and not changed yet.
#[derive(Debug)]
pub struct Fit(Patch);

/// Looks whether the server is fit, if it has to be, and draws its identity.
///
/// # Errors
/// The first reason why not.
///
/// # Safety
/// `table` is the server's TCP table, which has passed its fingerprint and the probes.
pub unsafe fn examine(
    wanted: Replication,
    version: Version,
    line: Line,
    table: *const c_void,
) -> Result<Option<Fit>, Unfit> {
    identity::draw().map_err(Unfit::Identity)?;
    if wanted == Replication::No {
        return Ok(None);
    }
    if Layout::of(version).is_none() {
        return Err(Unfit::Newer(version, line.last_known()));
    }
    if UNSEEN.contains(&version) {
        return Err(Unfit::Unseen(version));
    }
    let mut found = Vec::new();
    for (name, purpose) in handlers(line) {
        let address = symbols::find(name).ok_or(Unfit::Handler(name.to_str().unwrap_or("?")))?;
        found.push((address as usize, *purpose));
    }
    // SAFETY: by the caller's promise.
    let slots = unsafe { TcpSlots::find(line, table) };
    if !slots.are_writable() {
        return Err(Unfit::ReadOnly);
    }
    Ok(Some(Fit(Patch { slots, handlers: found })))
}

impl Fit {
    /// From now on links go over RDMA. Main thread, while the module loads.
    pub fn install(self) {
        let patch = PATCH.get_or_init(|| self.0);
        // SAFETY: they are writable; the server opens no connection while it loads a module.
        unsafe {
            patch.slots.replace(Replacement { create, connect, connect_multipath });
        }
    }
}

/// `conn_create` of the TCP type: as the server's, with room behind it.
unsafe extern "C" fn create() -> *mut Connection {
    let make = || {
        let kind = PATCH.get().map_or(std::ptr::null(), |patch| patch.slots.kind());
        RdmaConnection::create_tcp(kind).cast()
    };
    // The server has no word for a connection that can't be made.
    guard("conn_create of TCP", make).unwrap_or_else(make)
}

unsafe extern "C" fn connect(
    connection: *mut Connection,
    address: *const c_char,
    port: c_int,
    source: *const c_char,
    handler: Option<Handler>,
) -> c_int {
    // SAFETY: the server's arguments.
    unsafe { open(connection, address, port, source, 0, handler) }
}

unsafe extern "C" fn connect_multipath(
    connection: *mut Connection,
    address: *const c_char,
    port: c_int,
    source: *const c_char,
    multipath: c_int,
    handler: Option<Handler>,
) -> c_int {
    // SAFETY: the server's arguments.
    unsafe { open(connection, address, port, source, multipath, handler) }
}

/// `connect` of the TCP type.
///
/// # Safety
/// As the server calls it, for a connection of the TCP type or of the TLS type.
unsafe fn open(
    connection: *mut Connection,
    address: *const c_char,
    port: c_int,
    source: *const c_char,
    multipath: c_int,
    handler: Option<Handler>,
) -> c_int {
    let work = || {
        let patch = PATCH.get().expect("installed");
        // SAFETY: C strings of the server's, or null; a live connection.
        let (target, kind) = unsafe {
            let copy = |text: *const c_char| CStr::from_ptr(text).to_owned();
            let source = (!source.is_null()).then(|| copy(source));
            let target = Target { address: copy(address), port, source, multipath };
            (target, (*connection).kind)
        };
        let purpose = handler.and_then(|handler| {
            let known = patch.handlers.iter().find(|(address, _)| *address == handler as usize);
            known.map(|(_, purpose)| *purpose)
        });
        match purpose {
            Some(purpose) if kind == patch.slots.kind() && !in_child() => {
                // SAFETY: a new connection of the TCP type, which `create` has made.
                unsafe { link::open(patch.slots, connection.cast(), target, purpose, handler) }
            }
            purpose => {
                if purpose.is_some() && kind != patch.slots.kind() {
                    report::encrypted();
                }
                // SAFETY: the server's arguments.
                unsafe { patch.slots.connect(connection, &target, handler) }
            }
        }
    };
    guard("connect of TCP", work).unwrap_or_else(|| {
        // SAFETY: the server's connection is live: it is told of a failure and closes it.
        unsafe { (*connection).fail(libc::EIO) };
        ERR
    })
}
