// SPDX-License-Identifier: BSD-3-Clause
//! Identifiers: the connection manager's endpoints and their states (12.9).

use super::address;
use super::channel::{EventChannel, Pending};
use super::connection::{Connection, Listener};
use super::devices::{self, Reference};
use super::message::{Message, kind, reason};
use crate::engine::engine;
use crate::fault::habits_of;
use crate::habits::Habits;
use crate::handle::{self, Acks};
use crate::link::{self, Link};
use crate::sys::{self, Fd};
use crate::verbs::context::limit;
use crate::verbs::device::{self, Device, Place};
use crate::verbs::qp::{self, Qp, mask};
use rdma_sys::rdma_cm_event_type::*;
use rdma_sys::*;
use std::cell::UnsafeCell;
use std::mem::zeroed;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::RawFd;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// How long a REQ may stay unanswered: what the kernel's connection manager
/// allows once the other side has said that it is busy with it.
const REQ_TIMEOUT: Duration = Duration::from_secs(68);
/// How long a DREQ may stay unanswered.
const DREQ_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an ended connection rests before TIMEWAIT_EXIT.
const TIME_WAIT: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum State {
    Idle,
    Bound,
    AddressResolved,
    RouteResolved,
    Listening,
    /// REQ sent.
    Connecting,
    /// REQ received.
    Requested,
    /// REP sent.
    Accepted,
    /// REP received.
    Responded,
    Connected,
    /// DREQ sent.
    Disconnecting,
    /// DREQ received and not answered.
    PeerDisconnected,
    Ended,
}

struct Inner {
    state: State,
    /// Bound, and neither listening nor connected yet.
    socket: Option<Fd>,
    local: Option<SocketAddr>,
    remote: Option<SocketAddr>,
    v6_only: bool,
    listener: Option<Arc<Listener>>,
    backlog: i32,
    connection: Option<Arc<Connection>>,
    /// What the other side sent in its REQ or REP.
    theirs: Option<Box<Message>>,
    retry_count: u8,
    initiator_depth: u8,
    responder_resources: u8,
    /// As the application wishes it.
    ack_timeout: Option<u8>,
}

/// An identifier.
#[repr(C)]
pub struct CmId {
    c: UnsafeCell<rdma_cm_id>,
    inner: Mutex<Inner>,
    channel: Mutex<Arc<EventChannel>>,
    /// What it holds of the device that it is bound to.
    device: Mutex<Option<Reference>>,
    /// Made without a channel: calls wait for their events themselves.
    pub sync: AtomicBool,
    pub acks: Acks,
    /// For rdma_get_request: how to make the queue pair of a new connection.
    pub qp_template: Mutex<Option<Template>>,
    weak: Weak<CmId>,
}

/// A queue pair's attributes, kept for later.
pub struct Template(pub ibv_qp_init_attr);
// SAFETY: the pointers inside are only passed back to where they came from.
unsafe impl Send for Template {}

// SAFETY: the C part is written by calls that the application may not make on
// one identifier at once, as with rdma-core.
unsafe impl Send for CmId {}
// SAFETY: as above.
unsafe impl Sync for CmId {}

impl CmId {
    pub fn new(
        channel: Arc<EventChannel>,
        sync: bool,
        context: *mut std::ffi::c_void,
        ps: rdma_port_space::Type,
        qp_type: ibv_qp_type::Type,
    ) -> Arc<CmId> {
        // SAFETY: all zeroes is a valid rdma_cm_id.
        let mut c: rdma_cm_id = unsafe { zeroed() };
        c.channel = Arc::as_ptr(&channel).cast_mut().cast();
        c.context = context;
        c.ps = ps;
        c.qp_type = qp_type;
        let inner = Inner {
            state: State::Idle,
            socket: None,
            local: None,
            remote: None,
            v6_only: false,
            listener: None,
            backlog: 0,
            connection: None,
            theirs: None,
            retry_count: 7,
            initiator_depth: 0,
            responder_resources: 0,
            ack_timeout: None,
        };
        let id = Arc::new_cyclic(|weak| CmId {
            c: UnsafeCell::new(c),
            inner: Mutex::new(inner),
            channel: Mutex::new(channel),
            device: Mutex::default(),
            sync: AtomicBool::new(sync),
            acks: Acks::default(),
            qp_template: Mutex::new(None),
            weak: weak.clone(),
        });
        let mut ids = IDS.lock().unwrap();
        if ids.len() == ids.capacity() {
            ids.retain(|other| other.strong_count() > 0);
        }
        ids.push(Arc::downgrade(&id));
        drop(ids);
        id
    }

    pub fn as_c(&self) -> *mut rdma_cm_id {
        self.c.get()
    }

    pub fn channel(&self) -> Arc<EventChannel> {
        self.channel.lock().unwrap().clone()
    }

    fn strong(&self) -> Arc<CmId> {
        self.weak.upgrade().expect("the application still holds it")
    }

    fn push(&self, kind: rdma_cm_event_type::Type, status: i32, message: Option<Message>) {
        let Some(id) = self.weak.upgrade() else { return };
        let pending = Pending { kind, status, id, listener: None, message: message.map(Box::new) };
        self.channel.lock().unwrap().notices.push(pending);
    }

    // Addresses.

    /// Writes the device and the addresses where the application sees them.
    pub fn publish_addresses(&self) {
        let inner = self.inner.lock().unwrap();
        // SAFETY: the application's own call is what brought us here.
        unsafe {
            let c = &mut *self.c.get();
            let bound = inner.local.map(|a| a.ip()).filter(|ip| !ip.is_unspecified());
            let mut device = self.device.lock().unwrap();
            if let Some(ip) = bound
                && device.is_none()
                && let Ok(reference) = devices::acquire(ip)
            {
                // librdmacm finds the device by its GUID, if that is one.
                if reference.device.habits.has_guid {
                    (c.verbs, c.pd) = (reference.verbs, reference.pd);
                }
                c.port_num = 1;
                *device = Some(reference);
            }
            let mapped = |a: SocketAddr| match a.ip() {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            };
            let addr = &mut c.route.addr;
            if let Some(local) = inner.local {
                address::to_c(local, &raw mut addr.src_addr_union.src_storage);
                addr.addr.ibaddr.sgid.raw = mapped(local);
            }
            if let Some(remote) = inner.remote {
                address::to_c(remote, &raw mut addr.dst_addr_union.dst_storage);
                addr.addr.ibaddr.dgid.raw = mapped(remote);
            }
            addr.addr.ibaddr.pkey = 0xffff;
        }
    }

    pub fn ports(&self) -> (u16, u16) {
        let inner = self.inner.lock().unwrap();
        let port = |a: Option<SocketAddr>| a.map_or(0, |a| a.port());
        (port(inner.local), port(inner.remote))
    }

    pub fn set_v6_only(&self, on: bool) -> Result<(), i32> {
        let mut inner = self.inner.lock().unwrap();
        if inner.state != State::Idle {
            return Err(libc::EINVAL);
        }
        inner.v6_only = on;
        Ok(())
    }

    pub fn set_ack_timeout(&self, timeout: u8) {
        self.inner.lock().unwrap().ack_timeout = Some(timeout & 31);
    }

    pub fn bind(&self, to: SocketAddr) -> Result<(), i32> {
        {
            let mut inner = self.inner.lock().unwrap();
            if inner.state != State::Idle {
                return Err(libc::EINVAL);
            }
            check_device(to.ip())?;
            inner.bind(to, false)?;
            inner.state = State::Bound;
        }
        self.publish_addresses();
        Ok(())
    }

    pub fn resolve_address(&self, from: Option<SocketAddr>, to: SocketAddr) -> Result<(), i32> {
        let mut inner = self.inner.lock().unwrap();
        if !matches!(inner.state, State::Idle | State::Bound) {
            return Err(libc::EINVAL);
        }
        if let (State::Idle, Some(from)) = (inner.state, from) {
            check_device(from.ip())?;
            inner.bind(from, false)?;
            inner.state = State::Bound;
        }
        // An unspecified target means this machine, as with TCP.
        let to = match to.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => {
                SocketAddr::new([127, 0, 0, 1].into(), to.port())
            }
            IpAddr::V6(ip) if ip.is_unspecified() => {
                SocketAddr::new(Ipv6Addr::LOCALHOST.into(), to.port())
            }
            _ => to,
        };
        inner.remote = Some(to);
        let source = if device::present().is_empty() {
            Err(libc::ENODEV)
        } else if devices::at(to.ip()).is_some() {
            address::source_for(to.ip())
        } else {
            // The fabric ends at this machine.
            Err(libc::EHOSTUNREACH)
        };
        let status = match source {
            Ok(source) => match inner.local {
                Some(local) => {
                    if local.ip().is_unspecified() {
                        inner.local = Some(SocketAddr::new(source, local.port()));
                    }
                    0
                }
                None => inner.bind(SocketAddr::new(source, 0), true).err().unwrap_or(0),
            },
            Err(code) => code,
        };
        if status == 0 {
            inner.state = State::AddressResolved;
        }
        drop(inner);
        let kind = if status == 0 { RDMA_CM_EVENT_ADDR_RESOLVED } else { RDMA_CM_EVENT_ADDR_ERROR };
        self.push(kind, -status, None);
        Ok(())
    }

    pub fn resolve_route(&self) -> Result<(), i32> {
        let mut inner = self.inner.lock().unwrap();
        if inner.state != State::AddressResolved {
            return Err(libc::EINVAL);
        }
        inner.state = State::RouteResolved;
        drop(inner);
        self.push(RDMA_CM_EVENT_ROUTE_RESOLVED, 0, None);
        Ok(())
    }

    // The passive side.

    pub fn listen(&self, backlog: i32) -> Result<(), i32> {
        {
            let mut inner = self.inner.lock().unwrap();
            if inner.state == State::Idle {
                inner.bind(SocketAddr::new([0, 0, 0, 0].into(), 0), false)?;
                inner.state = State::Bound;
            }
            if inner.state != State::Bound {
                return Err(libc::EINVAL);
            }
            let socket = inner.socket.take().expect("a bound identifier has its socket");
            inner.backlog = backlog;
            // At no particular address it waits for a device, if there is none.
            if !device::present().is_empty() {
                inner.listener = Some(Listener::start(socket, &self.strong(), backlog)?);
            }
            inner.state = State::Listening;
        }
        self.publish_addresses();
        Ok(())
    }

    /// A REQ has come to this listener: makes the new connection's identifier.
    pub fn request(
        self: Arc<Self>,
        connection: Arc<Connection>,
        req: Message,
    ) -> Option<Weak<CmId>> {
        let target = req.target();
        if self.inner.lock().unwrap().state != State::Listening || devices::at(target).is_none() {
            return None;
        }
        // SAFETY: constant fields.
        let (ps, qp_type) = unsafe { ((*self.c.get()).ps, (*self.c.get()).qp_type) };
        let channel = self.channel();
        let id = CmId::new(channel.clone(), false, null_mut(), ps, qp_type);
        {
            let mut inner = id.inner.lock().unwrap();
            inner.state = State::Requested;
            inner.local = Some(SocketAddr::new(target, req.port));
            inner.remote = Some(SocketAddr::new(req.source(), req.source_port));
            inner.connection = Some(connection);
            inner.retry_count = req.retry_count;
            inner.initiator_depth = req.responder_resources;
            inner.responder_resources = req.initiator_depth;
            inner.theirs = Some(Box::new(req));
        }
        let weak = Arc::downgrade(&id);
        channel.notices.push(Pending {
            kind: RDMA_CM_EVENT_CONNECT_REQUEST,
            status: 0,
            id,
            listener: Some(self),
            message: Some(Box::new(req)),
        });
        Some(weak)
    }

    /// The application learns of this identifier, which came from `listener`.
    pub fn introduce(&self, listener: Option<&CmId>) {
        if let Some(listener) = listener {
            // SAFETY: the application does not know this identifier yet.
            unsafe { (*self.c.get()).context = (*listener.c.get()).context };
            self.move_to(listener.channel());
        }
        self.publish_addresses();
    }

    pub fn accept(&self, param: Option<&rdma_conn_param>) -> Result<(), i32> {
        let mut rep = Message::new(kind::REP);
        let (connection, qp_num);
        {
            let mut inner = self.inner.lock().unwrap();
            if inner.state != State::Requested {
                return Err(libc::EINVAL);
            }
            inner.take_param(param);
            rep.fill(&inner, param)?;
            qp_num = self.qp_number(param);
            rep.qp_num = qp_num;
            connection = inner.connection.clone().ok_or(libc::ENOTCONN)?;
        }
        let link = connection.link().ok_or(libc::ECONNRESET)?;
        connection.set_qp(qp_num);
        qp::lay(qp_num, link);
        if self.has_qp()
            && let Err(code) = self.connect_qp()
        {
            return Err(code);
        }
        let mut inner = self.inner.lock().unwrap();
        if inner.state == State::Requested {
            inner.state = State::Accepted;
            let fds;
            (rep.channel, fds) = link::introduction(self.channel_fd());
            connection.send(&rep, &fds);
        }
        Ok(())
    }

    /// # Safety
    /// `private` is readable for `len` bytes.
    pub unsafe fn reject(&self, private: *const u8, len: usize) -> Result<(), i32> {
        let mut rej = Message::new(kind::REJ);
        rej.reason = reason::CONSUMER;
        // SAFETY: the caller's word.
        if !unsafe { rej.set_private(private, len) } {
            return Err(libc::EINVAL);
        }
        let mut inner = self.inner.lock().unwrap();
        if !matches!(inner.state, State::Requested | State::Responded) {
            return Err(libc::EINVAL);
        }
        inner.state = State::Ended;
        if let Some(connection) = inner.connection.take() {
            connection.stop();
            connection.send(&rej, &[]);
        }
        Ok(())
    }

    // The active side.

    pub fn connect(&self, param: Option<&rdma_conn_param>) -> Result<(), i32> {
        let mut req = Message::new(kind::REQ);
        let mut inner = self.inner.lock().unwrap();
        if inner.state != State::RouteResolved {
            return Err(libc::EINVAL);
        }
        inner.initiator_depth = limit::READS;
        inner.responder_resources = limit::READS;
        inner.take_param(param);
        inner.retry_count = param.map_or(7, |p| p.retry_count.min(7));
        req.fill(&inner, param)?;
        req.qp_num = self.qp_number(param);
        let (local, remote) = inner.local.zip(inner.remote).ok_or(libc::EINVAL)?;
        req.set_addresses(local, remote);
        let code = |e: std::io::Error| e.raw_os_error().unwrap_or(libc::EIO);
        let (link, memory) = Link::create().map_err(code)?;
        let socket = inner.socket.take().ok_or(libc::EINVAL)?;
        inner.state = State::Connecting;
        if !self.habits().loopback && is_own_listener(remote.port()) {
            inner.state = State::Ended;
            drop(inner);
            self.push(RDMA_CM_EVENT_UNREACHABLE, -libc::ETIMEDOUT, None);
            return Ok(());
        }
        let found = address::listener_names(remote)
            .iter()
            .any(|name| sys::connect_abstract(&socket, name).is_ok());
        if !found {
            // Nobody listens there: the kernel's connection manager answers for him.
            inner.state = State::Ended;
            drop(inner);
            let mut rej = Message::new(kind::REJ);
            rej.reason = reason::INVALID_SERVICE;
            self.push(RDMA_CM_EVENT_REJECTED, rej.reason, Some(rej));
            return Ok(());
        }
        let connection = Connection::of(socket, &self.strong());
        connection.set_link(Arc::new(link), req.qp_num);
        let mut fds;
        (req.channel, fds) = link::introduction(self.channel_fd());
        fds.insert(0, memory.raw());
        connection.send(&req, &fds);
        inner.connection = Some(connection);
        drop(inner);
        let weak = self.weak.clone();
        engine().after(REQ_TIMEOUT, move || {
            if let Some(id) = weak.upgrade() {
                id.req_timeout();
            }
        });
        Ok(())
    }

    fn req_timeout(&self) {
        let mut inner = self.inner.lock().unwrap();
        if inner.state == State::Connecting {
            inner.state = State::Ended;
            drop(inner);
            self.push(RDMA_CM_EVENT_UNREACHABLE, -libc::ETIMEDOUT, None);
        }
    }

    /// The REP's event is being fetched: connects the queue pair and sends RTU.
    pub fn process_response(&self) -> i32 {
        let connection = {
            let inner = self.inner.lock().unwrap();
            if inner.state != State::Responded {
                return -libc::ECONNRESET;
            }
            inner.connection.clone()
        };
        let Some((connection, link)) = connection.and_then(|c| c.link().map(|l| (c, l))) else {
            return -libc::ECONNRESET;
        };
        qp::lay(self.qp_number(None), link);
        if let Err(code) = self.connect_qp() {
            return -code;
        }
        self.rtu(&connection);
        0
    }

    /// rdma_establish: the application has connected a queue pair of its own.
    pub fn establish(&self) -> Result<(), i32> {
        let connection = {
            let inner = self.inner.lock().unwrap();
            if inner.state != State::Responded || self.has_qp() {
                return Err(libc::EINVAL);
            }
            inner.connection.clone().ok_or(libc::ENOTCONN)?
        };
        self.rtu(&connection);
        Ok(())
    }

    /// rdma_notify: the application has received something, so the other side is ready.
    pub fn communication_established(&self) -> Result<(), i32> {
        let mut inner = self.inner.lock().unwrap();
        match inner.state {
            State::Accepted => inner.state = State::Connected,
            State::Connected => return Err(libc::EISCONN),
            _ => return Err(libc::EINVAL),
        }
        drop(inner);
        self.push(RDMA_CM_EVENT_ESTABLISHED, 0, None);
        Ok(())
    }

    fn rtu(&self, connection: &Connection) {
        let mut inner = self.inner.lock().unwrap();
        if inner.state == State::Responded {
            inner.state = State::Connected;
        }
        connection.send(&Message::new(kind::RTU), &[]);
    }

    // The queue pair.

    fn qp(&self) -> *mut ibv_qp {
        // SAFETY: a word that the application's own calls write.
        unsafe { (*self.c.get()).qp }
    }
    pub fn has_qp(&self) -> bool {
        !self.qp().is_null()
    }
    /// Its queue pair. In calls of the application only, whose part it is not to destroy
    /// the queue pair meanwhile; the progress thread finds queue pairs by number.
    fn qp_object(&self) -> Option<Arc<Qp>> {
        let qp = self.qp();
        // SAFETY: set by rdma_create_qp, cleared before the queue pair goes.
        (!qp.is_null()).then(|| unsafe { handle::share::<Qp, _>(qp) })
    }
    fn channel_fd(&self) -> Option<(u64, RawFd)> {
        self.qp_object().and_then(|qp| qp.channel_fd())
    }
    fn qp_number(&self, param: Option<&rdma_conn_param>) -> u32 {
        self.qp_object().map_or_else(|| param.map_or(0, |p| p.qp_num), |qp| qp.num)
    }

    /// Moves the queue pair to INIT, as rdma_create_qp does.
    pub fn init_qp(&self) -> Result<(), i32> {
        let qp = self.qp_object().ok_or(libc::EINVAL)?;
        let (attr, mask) = self.qp_attributes(qp::INIT)?;
        done(qp.modify(&attr, mask))
    }

    fn connect_qp(&self) -> Result<(), i32> {
        let qp = self.qp_object().ok_or(libc::EINVAL)?;
        for state in [qp::INIT, qp::RTR, qp::RTS] {
            let (attr, mask) = self.qp_attributes(state)?;
            done(qp.modify(&attr, mask))?;
        }
        Ok(())
    }

    pub fn fail_qp(&self) {
        if let Some(qp) = self.qp_object() {
            qp.enter_error(&mut qp.lock());
        }
    }

    /// What ibv_modify_qp needs to reach a state, as the handshake settled it.
    pub fn qp_attributes(&self, state: ibv_qp_state::Type) -> Result<(ibv_qp_attr, u32), i32> {
        let inner = self.inner.lock().unwrap();
        // SAFETY: all zeroes is a valid ibv_qp_attr.
        let mut attr: ibv_qp_attr = unsafe { zeroed() };
        attr.qp_state = state;
        let theirs = inner.theirs.as_deref();
        let mask = match state {
            qp::INIT => {
                attr.port_num = 1;
                attr.qp_access_flags = crate::keys::REMOTE_WRITE;
                if inner.responder_resources > 0 && theirs.is_some() {
                    attr.qp_access_flags |= crate::keys::REMOTE_READ | crate::keys::REMOTE_ATOMIC;
                }
                mask::PKEY_INDEX | mask::PORT | mask::ACCESS_FLAGS
            }
            qp::RTR => {
                let theirs = theirs.ok_or(libc::EINVAL)?;
                attr.dest_qp_num = theirs.qp_num;
                attr.path_mtu = ibv_mtu::IBV_MTU_4096;
                attr.max_dest_rd_atomic = inner.responder_resources;
                attr.ah_attr.is_global = 1;
                attr.ah_attr.port_num = 1;
                if let Some(IpAddr::V4(ip)) = inner.remote.map(|a| a.ip()) {
                    attr.ah_attr.grh.dgid.raw = ip.to_ipv6_mapped().octets();
                } else if let Some(IpAddr::V6(ip)) = inner.remote.map(|a| a.ip()) {
                    attr.ah_attr.grh.dgid.raw = ip.octets();
                }
                // The connection manager leaves the RNR timer at 0: 655 ms.
                mask::AV
                    | mask::PATH_MTU
                    | mask::DEST_QPN
                    | mask::RQ_PSN
                    | mask::MAX_DEST_RD_ATOMIC
                    | mask::MIN_RNR_TIMER
            }
            qp::RTS => {
                let theirs = theirs.ok_or(libc::EINVAL)?;
                attr.timeout = inner.ack_timeout.unwrap_or(self.habits().ack_timeout);
                attr.retry_cnt = inner.retry_count;
                // How often we may try is what the other side allows.
                attr.rnr_retry = theirs.rnr_retry_count.min(7);
                attr.max_rd_atomic = inner.initiator_depth;
                mask::TIMEOUT
                    | mask::RETRY_CNT
                    | mask::RNR_RETRY
                    | mask::SQ_PSN
                    | mask::MAX_QP_RD_ATOMIC
            }
            _ => return Err(libc::EINVAL),
        };
        Ok((attr, mask | mask::STATE))
    }

    // Messages and the end, on the progress thread.

    pub fn message(&self, message: Message) {
        let mut inner = self.inner.lock().unwrap();
        let event = match (message.kind, inner.state) {
            (kind::REP, State::Connecting) => {
                inner.state = State::Responded;
                inner.theirs = Some(Box::new(message));
                // We send no more READs at once than the other side takes.
                inner.initiator_depth = inner.initiator_depth.min(message.responder_resources);
                RDMA_CM_EVENT_CONNECT_RESPONSE
            }
            (kind::REJ, State::Connecting | State::Requested | State::Accepted) => {
                inner.state = State::Ended;
                RDMA_CM_EVENT_REJECTED
            }
            (kind::RTU, State::Accepted) => {
                inner.state = State::Connected;
                RDMA_CM_EVENT_ESTABLISHED
            }
            (kind::DREQ, State::Connected | State::Accepted | State::Responded) => {
                inner.state = State::PeerDisconnected;
                RDMA_CM_EVENT_DISCONNECTED
            }
            (kind::DREQ, State::Disconnecting) => {
                inner.answer_dreq();
                inner.state = State::Ended;
                RDMA_CM_EVENT_DISCONNECTED
            }
            (kind::DREP, State::Disconnecting) => {
                inner.state = State::Ended;
                RDMA_CM_EVENT_DISCONNECTED
            }
            _ => return,
        };
        let ended = inner.state == State::Ended && event == RDMA_CM_EVENT_DISCONNECTED;
        drop(inner);
        let status = if message.kind == kind::REJ { message.reason } else { 0 };
        self.push(event, status, Some(message));
        if ended {
            self.rest();
        }
    }

    /// The socket ended: the other process died, or destroyed its identifier.
    pub fn peer_ended(&self) {
        let mut inner = self.inner.lock().unwrap();
        let was = inner.state;
        match was {
            State::Connecting | State::Requested | State::Accepted => {
                inner.state = State::Ended;
                drop(inner);
                let mut rej = Message::new(kind::REJ);
                rej.reason =
                    if was == State::Connecting { reason::CONSUMER } else { reason::TIMEOUT };
                self.push(RDMA_CM_EVENT_REJECTED, rej.reason, Some(rej));
            }
            State::Responded | State::Connected | State::Disconnecting => {
                inner.state = if was == State::Disconnecting {
                    State::Ended
                } else {
                    State::PeerDisconnected
                };
                drop(inner);
                self.push(RDMA_CM_EVENT_DISCONNECTED, 0, None);
                if was == State::Disconnecting {
                    self.rest();
                }
            }
            _ => {}
        }
    }

    /// rdma_disconnect: flushes the queue pair, then says so to the other side.
    pub fn disconnect(&self) -> Result<(), i32> {
        self.fail_qp();
        let mut inner = self.inner.lock().unwrap();
        match inner.state {
            State::PeerDisconnected => {
                inner.answer_dreq();
                inner.state = State::Ended;
                drop(inner);
                self.rest();
            }
            State::Connected | State::Accepted | State::Responded => {
                if let Some(connection) = &inner.connection {
                    connection.send(&Message::new(kind::DREQ), &[]);
                }
                inner.state = State::Disconnecting;
                drop(inner);
                let weak = self.weak.clone();
                engine().after(DREQ_TIMEOUT, move || {
                    if let Some(id) = weak.upgrade() {
                        id.message(Message::new(kind::DREP));
                    }
                });
            }
            State::Disconnecting | State::Ended => {}
            _ => return Err(libc::EINVAL),
        }
        Ok(())
    }

    /// TIMEWAIT: the event follows if the identifier still exists then.
    fn rest(&self) {
        let weak = self.weak.clone();
        engine().after(TIME_WAIT, move || {
            if let Some(id) = weak.upgrade() {
                id.push(RDMA_CM_EVENT_TIMEWAIT_EXIT, 0, None);
            }
        });
    }

    // Moving and destroying.

    fn move_to(&self, channel: Arc<EventChannel>) {
        let mut mine = self.channel.lock().unwrap();
        if Arc::ptr_eq(&mine, &channel) {
            return;
        }
        // SAFETY: a word that belongs to the calls on this identifier.
        unsafe { (*self.c.get()).channel = Arc::as_ptr(&channel).cast_mut().cast() };
        for pending in mine.notices.remove(|p| self.concerns(p)) {
            channel.notices.push(pending);
        }
        *mine = channel;
    }

    fn concerns(&self, pending: &Pending) -> bool {
        let about = pending.listener.as_ref().unwrap_or(&pending.id);
        std::ptr::eq(Arc::as_ptr(about), self)
    }

    /// rdma_migrate_id: later and pending events go to another channel.
    pub fn migrate(&self, channel: Arc<EventChannel>, sync: bool) {
        self.move_to(channel);
        self.sync.store(sync, Ordering::Relaxed);
        self.acks.wait();
    }

    /// Leaves its connection, or listens no more.
    fn leave(&self) {
        let (listener, connection) = {
            let mut inner = self.inner.lock().unwrap();
            let goodbye = match inner.state {
                State::Connected | State::Accepted | State::Responded => {
                    Some(Message::new(kind::DREQ))
                }
                State::PeerDisconnected => Some(Message::new(kind::DREP)),
                State::Connecting | State::Requested => {
                    let mut rej = Message::new(kind::REJ);
                    let sent = inner.state == State::Connecting;
                    rej.reason = if sent { reason::TIMEOUT } else { reason::CONSUMER };
                    Some(rej)
                }
                _ => None,
            };
            if let (Some(goodbye), Some(connection)) = (goodbye, &inner.connection) {
                connection.send(&goodbye, &[]);
            }
            inner.state = State::Ended;
            inner.socket = None;
            (inner.listener.take(), inner.connection.take())
        };
        if let Some(listener) = listener {
            listener.stop();
        }
        if let Some(connection) = connection {
            connection.stop();
        }
    }

    /// Ends the identifier; returns once all its events are acknowledged.
    pub fn destroy(&self) {
        self.leave();
        let dropped = self.channel().notices.remove(|p| self.concerns(p));
        for pending in dropped.iter().filter(|p| p.listener.is_some()) {
            // A request that nobody will see is refused.
            pending.id.destroy();
        }
        self.acks.wait();
        let reference = self.device.lock().unwrap().take();
        drop(reference);
    }

    /// What its device does in its own way; the first device's, while it has none.
    pub fn habits(&self) -> &'static Habits {
        let own = self.device.lock().unwrap();
        own.as_ref().map_or_else(|| habits_of(Place::First), |own| own.device.habits)
    }

    fn is_on(&self, device: &Device) -> bool {
        let own = self.device.lock().unwrap();
        own.as_ref().is_some_and(|own| std::ptr::eq(own.device, device))
    }

    /// Whether it listens on every device there is.
    fn is_everywhere(inner: &Inner) -> bool {
        inner.state == State::Listening
            && inner.local.is_some_and(|local| local.ip().is_unspecified())
    }

    /// A device is there: whoever listens on all of them listens on this one.
    fn listen_again(&self) {
        let mut inner = self.inner.lock().unwrap();
        let (Some(local), None, true) = (inner.local, &inner.listener, Self::is_everywhere(&inner))
        else {
            return;
        };
        if inner.bind(local, false).is_ok()
            && let Some(socket) = inner.socket.take()
        {
            inner.listener = Listener::start(socket, &self.strong(), inner.backlog).ok();
        }
    }
}

/// An address to bind must be the machine's, and the device's.
fn check_device(ip: IpAddr) -> Result<(), i32> {
    if ip.is_unspecified() || devices::at(ip).is_some() {
        Ok(())
    } else if address::owned(ip) {
        Err(libc::ENODEV)
    } else {
        Err(libc::EADDRNOTAVAIL)
    }
}

fn all() -> Vec<Arc<CmId>> {
    IDS.lock().unwrap().iter().filter_map(Weak::upgrade).collect()
}

/// Ends every identifier that is bound to the device, and tells it. Those that listen
/// everywhere hear nothing of it, and rest if there is no other.
pub fn device_removed(device: &Device) {
    let last = device::present().is_empty();
    for id in all() {
        if id.is_on(device) {
            id.leave();
            id.push(RDMA_CM_EVENT_DEVICE_REMOVAL, 0, None);
        } else if last {
            let mut inner = id.inner.lock().unwrap();
            let listener = if CmId::is_everywhere(&inner) { inner.listener.take() } else { None };
            drop(inner);
            if let Some(listener) = listener {
                listener.stop();
            }
        }
    }
}

/// The device's address has moved to another port of it, as far as anybody can tell.
pub fn address_changed() {
    for id in all() {
        if id.device.lock().unwrap().is_some() {
            id.push(RDMA_CM_EVENT_ADDR_CHANGE, 0, None);
        }
    }
}

/// There is a device again.
pub fn device_added() {
    for id in all() {
        id.listen_again();
    }
}

/// Whether this process listens at that port.
fn is_own_listener(port: u16) -> bool {
    all().iter().any(|id| {
        // Who asks holds the lock of its own identifier, which does not listen.
        id.inner.try_lock().is_ok_and(|inner| {
            inner.state == State::Listening && inner.local.is_some_and(|at| at.port() == port)
        })
    })
}

static IDS: Mutex<Vec<Weak<CmId>>> = Mutex::new(Vec::new());

fn done(code: i32) -> Result<(), i32> {
    if code == 0 { Ok(()) } else { Err(code) }
}

impl Inner {
    fn bind(&mut self, to: SocketAddr, to_call: bool) -> Result<(), i32> {
        let socket = sys::packet_socket().map_err(|e| e.raw_os_error().unwrap_or(libc::EMFILE))?;
        self.local = Some(address::bind(&socket, to, self.v6_only, to_call)?);
        self.socket = Some(socket);
        Ok(())
    }

    fn take_param(&mut self, param: Option<&rdma_conn_param>) {
        if let Some(p) = param {
            if p.initiator_depth != u8::MAX {
                self.initiator_depth = p.initiator_depth.min(limit::READS);
            }
            if p.responder_resources != u8::MAX {
                self.responder_resources = p.responder_resources.min(limit::READS);
            }
        }
    }

    fn answer_dreq(&self) {
        if let Some(connection) = &self.connection {
            connection.send(&Message::new(kind::DREP), &[]);
        }
    }
}

impl Message {
    fn fill(&mut self, inner: &Inner, param: Option<&rdma_conn_param>) -> Result<(), i32> {
        self.initiator_depth = inner.initiator_depth;
        self.responder_resources = inner.responder_resources;
        self.retry_count = inner.retry_count;
        let Some(p) = param else { return Ok(()) };
        self.flow_control = p.flow_control;
        self.retry_count = p.retry_count.min(7);
        self.rnr_retry_count = p.rnr_retry_count.min(7);
        self.srq = p.srq;
        // SAFETY: the application's private data and its length.
        if unsafe { self.set_private(p.private_data.cast(), usize::from(p.private_data_len)) } {
            Ok(())
        } else {
            Err(libc::EINVAL)
        }
    }

    fn source(&self) -> IpAddr {
        self.address(self.source)
    }

    fn target(&self) -> IpAddr {
        self.address(self.target)
    }

    fn address(&self, raw: [u8; 16]) -> IpAddr {
        let v6 = Ipv6Addr::from(raw);
        match v6.to_ipv4_mapped() {
            Some(v4) if self.v4 != 0 => IpAddr::V4(v4),
            _ => IpAddr::V6(v6),
        }
    }

    fn set_addresses(&mut self, local: SocketAddr, remote: SocketAddr) {
        let raw = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        self.source = raw(local.ip());
        self.target = raw(remote.ip());
        self.v4 = u16::from(remote.is_ipv4());
        self.source_port = local.port();
        self.port = remote.port();
    }
}
