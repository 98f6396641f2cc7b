// SPDX-License-Identifier: BSD-3-Clause
//! The connection manager: event channels and ids.

use crate::address::{from_c, to_c};
use crate::descriptor::set_nonblocking;
use crate::library::call;
use crate::{Error, error, fork};
use rdma_sys::*;
use std::ffi::c_int;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::{mem, ptr};

/// A queue of connection manager events behind one descriptor. Any thread.
#[derive(Debug)]
pub struct EventChannel {
    raw: *mut rdma_event_channel,
}

// SAFETY: librdmacm reads events from the channel's descriptor and looks ids up under locks of
// its own; the structure behind the pointer does not change after its creation.
unsafe impl Send for EventChannel {}
// SAFETY: as above.
unsafe impl Sync for EventChannel {}

/// A connection manager event of an id. The kernel's event is copied and acknowledged before
/// anybody looks at it, since destroying an id waits for its acknowledgements.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// Its kind.
    pub kind: EventKind,
    /// The id that it happened to, by its address; for a connection request the new one.
    pub id: IdKey,
    /// The system's word on it: an error number, or a reject reason.
    pub status: i32,
}

/// The kind of a connection manager event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The address asked for is resolved: the id has a device.
    AddressResolved,
    /// The route is resolved: the id can connect.
    RouteResolved,
    /// A peer asks for a connection to a listening id.
    ConnectRequest,
    /// The connection stands.
    Established,
    /// The peer, or this side, has ended the connection.
    Disconnected,
    /// The peer refused the connection.
    Rejected,
    /// Address, route or connection could not be had.
    Failed,
    /// The id's device is being removed: the id has to go.
    DeviceRemoval,
    /// The device has lost the address, or got another.
    AddressChange,
    /// The queue pair's number may be used again.
    TimewaitExit,
    /// An event that this crate has no name for.
    Other,
}

/// Identity of an id, comparable and storable; gives no access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IdKey(usize);

impl EventChannel {
    /// Opens a channel whose descriptor is non-blocking and closed on exec.
    ///
    /// # Errors
    /// If the kernel has no RDMA connection manager, or no descriptor is left.
    pub fn new() -> Result<Self, Error> {
        // SAFETY: no arguments.
        let raw = unsafe { call!(rdma_create_event_channel()) };
        if raw.is_null() {
            return Err(Error::last(error::OPEN));
        }
        let channel = Self { raw };
        fork::note(channel.fd());
        set_nonblocking(channel.fd())?;
        Ok(channel)
    }

    /// The descriptor that polls readable when an event waits.
    pub fn fd(&self) -> RawFd {
        // SAFETY: `raw` is live as long as `self`.
        unsafe { (*self.raw).fd }
    }

    /// The next event, if one waits.
    ///
    /// # Errors
    /// If the channel can't be read.
    pub fn next(&self) -> Result<Option<Event>, Error> {
        let mut raw = ptr::null_mut();
        // SAFETY: a live channel and a place for the event.
        if unsafe { call!(rdma_get_cm_event(self.raw, &mut raw)) } != 0 {
            let error = Error::last("read connection manager events");
            return match error.errno {
                libc::EAGAIN | libc::EINTR => Ok(None),
                _ => Err(error),
            };
        }
        // SAFETY: the call succeeded, so the event is valid until acknowledged;
        // what is needed of it is copied first.
        unsafe {
            let event = Event {
                kind: EventKind::from_raw((*raw).event),
                id: IdKey((*raw).id.expose_provenance()),
                status: (*raw).status,
            };
            call!(rdma_ack_cm_event(raw));
            Ok(Some(event))
        }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        fork::forget(self.fd());
        // SAFETY: created by rdma_create_event_channel; nobody else frees it.
        unsafe { call!(rdma_destroy_event_channel(self.raw)) }
    }
}

impl EventKind {
    fn from_raw(event: rdma_cm_event_type::Type) -> Self {
        use rdma_cm_event_type as raw;
        match event {
            raw::RDMA_CM_EVENT_ADDR_RESOLVED => Self::AddressResolved,
            raw::RDMA_CM_EVENT_ROUTE_RESOLVED => Self::RouteResolved,
            raw::RDMA_CM_EVENT_CONNECT_REQUEST => Self::ConnectRequest,
            raw::RDMA_CM_EVENT_ESTABLISHED => Self::Established,
            raw::RDMA_CM_EVENT_DISCONNECTED => Self::Disconnected,
            raw::RDMA_CM_EVENT_REJECTED => Self::Rejected,
            raw::RDMA_CM_EVENT_ADDR_ERROR
            | raw::RDMA_CM_EVENT_ROUTE_ERROR
            | raw::RDMA_CM_EVENT_CONNECT_ERROR
            | raw::RDMA_CM_EVENT_UNREACHABLE => Self::Failed,
            raw::RDMA_CM_EVENT_DEVICE_REMOVAL => Self::DeviceRemoval,
            raw::RDMA_CM_EVENT_ADDR_CHANGE => Self::AddressChange,
            raw::RDMA_CM_EVENT_TIMEWAIT_EXIT => Self::TimewaitExit,
            _ => Self::Other,
        }
    }
}

/// A connection manager id: a listener, or one end of a connection.
#[derive(Debug)]
pub struct Id {
    raw: *mut rdma_cm_id,
    /// The channel of its events: librdmacm uses the channel until the id is destroyed.
    channel: Mutex<Arc<EventChannel>>,
}

/// Retries that the connection asks its two queue pairs for. 7 is "for ever" for
/// receiver-not-ready: what we give in accept limits the *peer's* patience when
/// our receives run out, and a peer that is only ahead of us must not fail.
const RETRIES: u8 = 7;

// SAFETY: librdmacm and the kernel lock what they must; the id is destroyed by its owner alone.
unsafe impl Send for Id {}
// SAFETY: as above.
unsafe impl Sync for Id {}

/// Level and names of options, here "this id's address family only", as
/// `rdma_cma.h` numbers them in anonymous enumerations.
const OPTION_LEVEL_ID: c_int = 0;
const OPTION_FAMILY_ONLY: c_int = 2;
/// Of the option "how long an acknowledgement is waited for".
const OPTION_ACK_TIMEOUT: c_int = 3;

impl Id {
    /// A new id whose events go to `channel`.
    ///
    /// # Errors
    /// As the connection manager's.
    pub fn new(channel: &Arc<EventChannel>) -> Result<Self, Error> {
        let mut raw = ptr::null_mut();
        // SAFETY: a live channel and a place for the id.
        Error::check("create a connection manager id", unsafe {
            call!(rdma_create_id(
                channel.raw,
                &mut raw,
                ptr::null_mut(),
                rdma_port_space::RDMA_PS_TCP,
            ))
        })?;
        Ok(Self { raw, channel: Mutex::new(Arc::clone(channel)) })
    }

    /// Takes over the new id of a connection request.
    ///
    /// # Safety
    /// `key` must come from a [`EventKind::ConnectRequest`] of this channel that nobody took
    /// over yet.
    pub unsafe fn from_request(key: IdKey, channel: &Arc<EventChannel>) -> Self {
        let raw = ptr::with_exposed_provenance_mut(key.0);
        Self { raw, channel: Mutex::new(Arc::clone(channel)) }
    }

    /// The id's identity in events.
    pub fn key(&self) -> IdKey {
        IdKey(self.raw.expose_provenance())
    }

    /// The pointer for the sibling owners of this module.
    pub(crate) fn raw(&self) -> *mut rdma_cm_id {
        self.raw
    }

    /// Binds to a local address and listens. IPv6 listeners don't take IPv4.
    ///
    /// # Errors
    /// `ENODEV` or `EADDRNOTAVAIL` if no RDMA device owns the address, `EADDRINUSE`.
    pub fn listen(&self, address: SocketAddr, backlog: i32) -> Result<(), Error> {
        let mut only: c_int = 1;
        // SAFETY: a live id; an int of the given length. A refusal is harmless
        // (the option is older than any kernel with RoCE), so it is not looked at.
        unsafe {
            call!(rdma_set_option(
                self.raw,
                OPTION_LEVEL_ID,
                OPTION_FAMILY_ONLY,
                (&raw mut only).cast(),
                mem::size_of::<c_int>(),
            ));
        }
        let mut storage = to_c(address);
        // SAFETY: a live id and a valid socket address.
        Error::check("bind the address to an RDMA device", unsafe {
            call!(rdma_bind_addr(self.raw, (&raw mut storage).cast()))
        })?;
        // SAFETY: a bound id.
        Error::check("listen", unsafe { call!(rdma_listen(self.raw, backlog)) })
    }

    /// How long this side of the connection waits for an acknowledgement before it sends again:
    /// 4.096 µs times 2 to this number, from 1 to 31. Before it is accepted or asked for.
    ///
    /// # Errors
    /// If the kernel does not know the option.
    pub fn set_ack_timeout(&self, mut exponent: u8) -> Result<(), Error> {
        // SAFETY: a live id; a byte of the given length.
        Error::check("set the time to wait for acknowledgements", unsafe {
            call!(rdma_set_option(
                self.raw,
                OPTION_LEVEL_ID,
                OPTION_ACK_TIMEOUT,
                (&raw mut exponent).cast(),
                mem::size_of::<u8>(),
            ))
        })
    }

    /// Tells the connection manager that something has arrived from the other side, which is
    /// ready then: [`EventKind::Established`] follows, also if the message that says so was lost.
    pub fn notify_arrival(&self) {
        // SAFETY: a live id. A failure means that it is established already.
        unsafe { call!(rdma_notify(self.raw, ibv_event_type::IBV_EVENT_COMM_EST)) };
    }

    /// Starts resolving `to`; [`EventKind::AddressResolved`] follows.
    ///
    /// # Errors
    /// If no device can reach the address.
    pub fn resolve_address(
        &self,
        from: Option<SocketAddr>,
        to: SocketAddr,
        timeout_ms: i32,
    ) -> Result<(), Error> {
        let mut source = from.map(to_c);
        let source = source.as_mut().map_or(ptr::null_mut(), |s| ptr::from_mut(s).cast());
        let mut target = to_c(to);
        // SAFETY: a live id, socket addresses or NULL.
        Error::check("resolve the address", unsafe {
            call!(rdma_resolve_addr(self.raw, source, (&raw mut target).cast(), timeout_ms))
        })
    }

    /// Starts resolving the route; [`EventKind::RouteResolved`] follows.
    ///
    /// # Errors
    /// As the connection manager's.
    pub fn resolve_route(&self, timeout_ms: i32) -> Result<(), Error> {
        // SAFETY: a live id.
        Error::check("resolve the route", unsafe {
            call!(rdma_resolve_route(self.raw, timeout_ms))
        })
    }

    /// Sends the id's events to another channel from now on. Events of the id that
    /// were read must be acknowledged; [`EventChannel::next`] sees to it.
    ///
    /// # Errors
    /// As the connection manager's.
    pub fn migrate(&self, channel: &Arc<EventChannel>) -> Result<(), Error> {
        // SAFETY: a live id and a live channel.
        Error::check("move the connection to its event channel", unsafe {
            call!(rdma_migrate_id(self.raw, channel.raw))
        })?;
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(channel);
        Ok(())
    }

    /// Accepts a connection request; [`EventKind::Established`] follows.
    ///
    /// # Errors
    /// As the connection manager's; also if the id has no queue pair.
    pub fn accept(&self) -> Result<(), Error> {
        let mut parameters = parameters();
        // SAFETY: a live id.
        Error::check("accept the connection", unsafe {
            call!(rdma_accept(self.raw, &mut parameters))
        })
    }

    /// Asks for a connection; [`EventKind::Established`] or a refusal follows.
    ///
    /// # Errors
    /// As the connection manager's.
    pub fn connect(&self) -> Result<(), Error> {
        let mut parameters = parameters();
        // SAFETY: a live id.
        Error::check("connect", unsafe { call!(rdma_connect(self.raw, &mut parameters)) })
    }

    /// Refuses a connection request.
    pub fn reject(&self) {
        // SAFETY: a live id, no private data. A failure leaves the peer to its time-out.
        unsafe { call!(rdma_reject(self.raw, ptr::null(), 0)) };
    }

    /// Ends the connection: work requests in flight are flushed, the peer is told.
    pub fn disconnect(&self) {
        // SAFETY: a live id. A failure means that it is disconnected already.
        unsafe { call!(rdma_disconnect(self.raw)) };
    }

    /// Whether both ids are served by the same opened device.
    pub fn shares_device(&self, other: &Self) -> bool {
        // SAFETY: live ids. Each holds its context open, so two contexts never have
        // one address.
        unsafe { !(*self.raw).verbs.is_null() && (*self.raw).verbs == (*other.raw).verbs }
    }

    /// The device's port, once there is one.
    pub fn port(&self) -> u8 {
        // SAFETY: a live id.
        unsafe { (*self.raw).port_num }
    }

    /// Address of this end.
    pub fn local_address(&self) -> Option<SocketAddr> {
        // SAFETY: a live id; the union's members all start with the family.
        unsafe { from_c(&(*self.raw).route.addr.src_addr_union.src_storage) }
    }

    /// Address of the other end.
    pub fn peer_address(&self) -> Option<SocketAddr> {
        // SAFETY: as above.
        unsafe { from_c(&(*self.raw).route.addr.dst_addr_union.dst_storage) }
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: created or taken over by us, freed here alone; its queue pair, which would
        // have kept it, is gone.
        unsafe { call!(rdma_destroy_id(self.raw)) };
    }
}

fn parameters() -> rdma_conn_param {
    rdma_conn_param {
        private_data: ptr::null(),
        private_data_len: 0,
        // One each, as every known client asks: 0 is refused by some providers.
        // Nobody can read our memory all the same, no region allows it.
        responder_resources: 1,
        initiator_depth: 1,
        flow_control: 0,
        retry_count: RETRIES,
        rnr_retry_count: RETRIES,
        srq: 0,
        qp_num: 0,
    }
}
