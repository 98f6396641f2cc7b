// SPDX-License-Identifier: BSD-3-Clause
//! Owners of the RDMA objects that one client connection needs. Each frees its object when
//! dropped; [`crate::rdma`] holds them in the order in which they may go.

use std::alloc::Layout;
use std::ffi::CStr;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::{io, mem};

use rdma_sys::*;

use crate::error::{Error, Result};

/// Makes `fd` non-blocking: every wait of this crate is a `poll(2)` with a time-out.
fn set_nonblocking(fd: RawFd) -> Result<()> {
    // SAFETY: fcntl on a descriptor that the caller owns.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        if flags < 0 || libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) < 0 {
            return Err(Error::last("fcntl"));
        }
    }
    Ok(())
}

/// Turns a call's non-zero result into an error; verbs return an errno, the connection
/// manager −1 with errno set.
fn check(call: &'static str, result: i32) -> Result<()> {
    match result {
        0 => Ok(()),
        code if code > 0 => Err(Error::System { call, source: io::Error::from_raw_os_error(code) }),
        _ => Err(Error::last(call)),
    }
}

fn owned<T>(call: &'static str, pointer: *mut T) -> Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(|| Error::last(call))
}

/// A socket address in the form that C functions take.
fn c_address(address: SocketAddr) -> libc::sockaddr_storage {
    // SAFETY: all zeroes is a valid sockaddr_storage.
    let mut storage: libc::sockaddr_storage = unsafe { mem::zeroed() };
    let place = ptr::from_mut(&mut storage);
    // SAFETY: a sockaddr_storage has room and alignment for either kind.
    unsafe {
        match address {
            SocketAddr::V4(v4) => place.cast::<libc::sockaddr_in>().write(libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            }),
            SocketAddr::V6(v6) => place.cast::<libc::sockaddr_in6>().write(libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            }),
        }
    }
    storage
}

/// An event of the connection manager, acknowledged already.
#[derive(Clone, Copy, Debug)]
pub struct CmEvent {
    pub kind: rdma_cm_event_type::Type,
    pub status: i32,
}

impl CmEvent {
    /// The event as an error of connecting.
    pub fn refusal(self) -> Error {
        // SAFETY: the library returns a static string for any value.
        let event = unsafe { CStr::from_ptr(rdma_event_str(self.kind)) };
        Error::NotConnected { event: event.to_string_lossy().into_owned(), status: self.status }
    }
}

/// A connection manager identifier with the event channel of its own.
pub struct CmId {
    id: NonNull<rdma_cm_id>,
    channel: NonNull<rdma_event_channel>,
}

impl CmId {
    pub fn new() -> Result<Self> {
        // SAFETY: the channel is passed on while it lives; the identifier is checked.
        unsafe {
            let channel = owned("rdma_create_event_channel", rdma_create_event_channel())?;
            let mut id = ptr::null_mut();
            let made = check(
                "rdma_create_id",
                rdma_create_id(
                    channel.as_ptr(),
                    &mut id,
                    ptr::null_mut(),
                    rdma_port_space::RDMA_PS_TCP,
                ),
            );
            if let Err(error) = made {
                rdma_destroy_event_channel(channel.as_ptr());
                return Err(error);
            }
            let this = Self { id: owned("rdma_create_id", id)?, channel };
            set_nonblocking(this.fd())?;
            Ok(this)
        }
    }

    /// The descriptor that becomes readable with the next event.
    pub fn fd(&self) -> RawFd {
        // SAFETY: the channel lives as long as self.
        unsafe { self.channel.as_ref().fd }
    }

    /// The next event, if there is one.
    pub fn event(&self) -> Result<Option<CmEvent>> {
        let mut event = ptr::null_mut();
        // SAFETY: the event is read before it is acknowledged, and acknowledged once.
        unsafe {
            if rdma_get_cm_event(self.channel.as_ptr(), &mut event) != 0 {
                return match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                    source => Err(Error::System { call: "rdma_get_cm_event", source }),
                };
            }
            let seen = CmEvent { kind: (*event).event, status: (*event).status };
            check("rdma_ack_cm_event", rdma_ack_cm_event(event))?;
            Ok(Some(seen))
        }
    }

    /// Starts to resolve `address`, from `source` if one is given.
    pub fn resolve_address(
        &self,
        source: Option<SocketAddr>,
        address: SocketAddr,
        timeout_ms: i32,
    ) -> Result<()> {
        let mut source = source.map(c_address);
        let mut address = c_address(address);
        let source = source.as_mut().map_or(ptr::null_mut(), |source| ptr::from_mut(source).cast());
        // SAFETY: both addresses outlive the call.
        check("rdma_resolve_addr", unsafe {
            rdma_resolve_addr(
                self.id.as_ptr(),
                source,
                ptr::from_mut(&mut address).cast(),
                timeout_ms,
            )
        })
    }

    /// Starts to resolve the route.
    pub fn resolve_route(&self, timeout_ms: i32) -> Result<()> {
        // SAFETY: the identifier lives.
        check("rdma_resolve_route", unsafe { rdma_resolve_route(self.id.as_ptr(), timeout_ms) })
    }

    /// The device that the resolved address belongs to.
    pub fn device(&self) -> *mut ibv_context {
        // SAFETY: the identifier lives.
        unsafe { self.id.as_ref().verbs }
    }

    /// Starts the connection.
    pub fn connect(&self) -> Result<()> {
        self.connect_with(7)
    }

    /// The same, allowing the other side so many retries where no receive is posted here.
    pub fn connect_with(&self, rnr_retry: u8) -> Result<()> {
        // SAFETY: all zeroes is a valid rdma_conn_param; it outlives the call.
        unsafe {
            let mut parameters: rdma_conn_param = mem::zeroed();
            parameters.responder_resources = 1;
            parameters.initiator_depth = 1;
            parameters.retry_count = 7;
            parameters.rnr_retry_count = rnr_retry;
            check("rdma_connect", rdma_connect(self.id.as_ptr(), &mut parameters))
        }
    }

    /// The address of this side, once it is resolved.
    pub fn local_address(&self) -> Option<SocketAddr> {
        // SAFETY: the identifier lives; every member of the union begins with the family, by
        // which the right one is read.
        unsafe {
            let address = &raw const self.id.as_ref().route.addr.src_addr_union;
            match i32::from((*address.cast::<libc::sockaddr>()).sa_family) {
                libc::AF_INET => {
                    let v4 = &*address.cast::<libc::sockaddr_in>();
                    let ip = IpAddr::from(v4.sin_addr.s_addr.to_ne_bytes());
                    Some(SocketAddr::new(ip, u16::from_be(v4.sin_port)))
                }
                libc::AF_INET6 => {
                    let v6 = &*address.cast::<libc::sockaddr_in6>();
                    let ip = IpAddr::from(v6.sin6_addr.s6_addr);
                    Some(SocketAddr::new(ip, u16::from_be(v6.sin6_port)))
                }
                _ => None,
            }
        }
    }

    /// Starts an orderly disconnection.
    pub fn disconnect(&self) -> Result<()> {
        // SAFETY: the identifier lives.
        check("rdma_disconnect", unsafe { rdma_disconnect(self.id.as_ptr()) })
    }
}

impl Drop for CmId {
    fn drop(&mut self) {
        // SAFETY: both are owned here; all events are acknowledged, so this doesn't block.
        unsafe {
            rdma_destroy_id(self.id.as_ptr());
            rdma_destroy_event_channel(self.channel.as_ptr());
        }
    }
}

/// A protection domain.
pub struct ProtectionDomain(NonNull<ibv_pd>);

impl ProtectionDomain {
    pub fn new(device: *mut ibv_context) -> Result<Self> {
        // SAFETY: the device is that of a resolved identifier.
        Ok(Self(owned("ibv_alloc_pd", unsafe { ibv_alloc_pd(device) })?))
    }
}

impl Drop for ProtectionDomain {
    fn drop(&mut self) {
        // SAFETY: owned, and dropped after what was made in it.
        unsafe { ibv_dealloc_pd(self.0.as_ptr()) };
    }
}

/// Registered memory of its own pages.
pub struct Memory {
    region: NonNull<ibv_mr>,
    start: NonNull<u8>,
    layout: Layout,
    length: usize,
}

impl Memory {
    /// `length` zeroed bytes that this side and, with `remote`, the other side may write.
    pub fn new(domain: &ProtectionDomain, length: usize, remote: bool) -> Result<Self> {
        let mut access = ibv_access_flags::IBV_ACCESS_LOCAL_WRITE;
        if remote {
            access |= ibv_access_flags::IBV_ACCESS_REMOTE_WRITE;
        }
        // Even a window of no bytes needs an address and a key.
        let layout = Layout::from_size_align(length.max(1), 4096).expect("a sane length");
        // SAFETY: the layout is not empty; the memory is freed with the same layout.
        unsafe {
            let start = NonNull::new(std::alloc::alloc_zeroed(layout))
                .unwrap_or_else(|| std::alloc::handle_alloc_error(layout));
            let region = ibv_reg_mr(
                domain.0.as_ptr(),
                start.as_ptr().cast(),
                layout.size(),
                access.0 as i32,
            );
            match owned("ibv_reg_mr", region) {
                Ok(region) => Ok(Self { region, start, layout, length }),
                Err(error) => {
                    std::alloc::dealloc(start.as_ptr(), layout);
                    Err(error)
                }
            }
        }
    }

    pub fn length(&self) -> usize {
        self.length
    }

    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    pub fn rkey(&self) -> u32 {
        // SAFETY: the region lives as long as self.
        unsafe { self.region.as_ref().rkey }
    }

    fn lkey(&self) -> u32 {
        // SAFETY: as above.
        unsafe { self.region.as_ref().lkey }
    }

    /// Appends `length` bytes from `offset` on to `into`. The device may write elsewhere in
    /// this memory meanwhile, so no slice of it is ever made.
    pub fn copy_out(&self, offset: usize, length: usize, into: &mut Vec<u8>) {
        assert!(offset + length <= self.length);
        into.reserve(length);
        // SAFETY: within bounds on both sides; `into` has the room reserved above.
        unsafe {
            ptr::copy_nonoverlapping(
                self.start.as_ptr().add(offset),
                into.as_mut_ptr().add(into.len()),
                length,
            );
            into.set_len(into.len() + length);
        }
    }

    /// Copies `bytes` to `offset`.
    pub fn copy_in(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.length);
        // SAFETY: within bounds, and `bytes` can't overlap memory that only this type reaches.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr().add(offset), bytes.len());
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: owned; the queue pair that used it is gone by the order of dropping.
        unsafe {
            ibv_dereg_mr(self.region.as_ptr());
            std::alloc::dealloc(self.start.as_ptr(), self.layout);
        }
    }
}

/// What a completion says, as far as this client needs it.
pub struct Completion {
    pub wr_id: u64,
    pub status: ibv_wc_status::Type,
    pub opcode: ibv_wc_opcode::Type,
    pub byte_len: u32,
    pub immediate: u32,
}

impl Completion {
    /// The library's words for the status.
    pub fn status_text(&self) -> String {
        // SAFETY: the library returns a static string for any value.
        let text = unsafe { CStr::from_ptr(ibv_wc_status_str(self.status)) };
        text.to_string_lossy().into_owned()
    }
}

/// A completion queue with its channel.
pub struct CompletionQueue {
    queue: NonNull<ibv_cq>,
    channel: NonNull<ibv_comp_channel>,
}

impl CompletionQueue {
    pub fn new(device: *mut ibv_context, entries: u32) -> Result<Self> {
        // SAFETY: the device is that of a resolved identifier.
        unsafe {
            let channel = owned("ibv_create_comp_channel", ibv_create_comp_channel(device))?;
            let queue = ibv_create_cq(device, entries as i32, ptr::null_mut(), channel.as_ptr(), 0);
            match owned("ibv_create_cq", queue) {
                Ok(queue) => {
                    let this = Self { queue, channel };
                    set_nonblocking(this.fd())?;
                    Ok(this)
                }
                Err(error) => {
                    ibv_destroy_comp_channel(channel.as_ptr());
                    Err(error)
                }
            }
        }
    }

    /// The descriptor that becomes readable with the next completion after [`Self::arm`].
    pub fn fd(&self) -> RawFd {
        // SAFETY: the channel lives as long as self.
        unsafe { self.channel.as_ref().fd }
    }

    /// Asks for a notification with the next completion.
    pub fn arm(&self) -> Result<()> {
        // SAFETY: the queue lives.
        check("ibv_req_notify_cq", unsafe { ibv_req_notify_cq(self.queue.as_ptr(), 0) })
    }

    /// Takes the notifications that have come.
    pub fn acknowledge(&self) {
        let mut queue = ptr::null_mut();
        let mut context = ptr::null_mut();
        // SAFETY: the channel is non-blocking; each event taken is acknowledged.
        unsafe {
            while ibv_get_cq_event(self.channel.as_ptr(), &mut queue, &mut context) == 0 {
                ibv_ack_cq_events(queue, 1);
            }
        }
    }

    /// The next completion, if there is one.
    pub fn poll(&self) -> Result<Option<Completion>> {
        // SAFETY: all zeroes is a valid ibv_wc, and the library fills it.
        unsafe {
            let mut entry: ibv_wc = mem::zeroed();
            match ibv_poll_cq(self.queue.as_ptr(), 1, &mut entry) {
                0 => Ok(None),
                1 => Ok(Some(Completion {
                    wr_id: entry.wr_id,
                    status: entry.status,
                    opcode: entry.opcode,
                    byte_len: entry.byte_len,
                    immediate: u32::from_be(entry.imm_data_invalidated_rkey_union.imm_data),
                })),
                _ => Err(Error::last("ibv_poll_cq")),
            }
        }
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        // SAFETY: owned; its queue pair is gone by the order of dropping.
        unsafe {
            ibv_destroy_cq(self.queue.as_ptr());
            ibv_destroy_comp_channel(self.channel.as_ptr());
        }
    }
}

/// Where a write goes on the other side.
#[derive(Clone, Copy)]
pub struct Remote {
    pub address: u64,
    pub rkey: u32,
}

/// The kinds of work that this client posts.
#[derive(Clone, Copy)]
pub enum Work {
    /// A control message.
    Send,
    /// A control message with an immediate, which the protocol does not know.
    SendWith(u32),
    /// Bytes of the other side, which the protocol does not know either.
    Read(Remote),
    /// Payload, with the immediate that announces it or without.
    Write(Remote, Option<u32>),
}

/// A reliable connected queue pair.
pub struct QueuePair(NonNull<ibv_qp>);

impl QueuePair {
    /// Makes the queue pair of `id`, with `depth` requests in each direction.
    pub fn new(
        id: &CmId,
        domain: &ProtectionDomain,
        queue: &CompletionQueue,
        depth: u32,
    ) -> Result<Self> {
        // SAFETY: all zeroes is a valid ibv_qp_init_attr; everything it names is alive.
        unsafe {
            let mut attributes: ibv_qp_init_attr = mem::zeroed();
            attributes.qp_type = ibv_qp_type::IBV_QPT_RC;
            attributes.send_cq = queue.queue.as_ptr();
            attributes.recv_cq = queue.queue.as_ptr();
            attributes.cap.max_send_wr = depth;
            attributes.cap.max_recv_wr = depth;
            attributes.cap.max_send_sge = 1;
            attributes.cap.max_recv_sge = 1;
            check(
                "rdma_create_qp",
                rdma_create_qp(id.id.as_ptr(), domain.0.as_ptr(), &mut attributes),
            )?;
            Ok(Self(owned("rdma_create_qp", id.id.as_ref().qp)?))
        }
    }

    /// Offers `length` bytes of `memory` at `offset` to receive into.
    pub fn post_receive(
        &self,
        memory: &Memory,
        offset: usize,
        length: usize,
        wr_id: u64,
    ) -> Result<()> {
        assert!(offset + length <= memory.length());
        let mut piece = ibv_sge {
            addr: memory.address() + offset as u64,
            length: length as u32,
            lkey: memory.lkey(),
        };
        let mut request =
            ibv_recv_wr { wr_id, next: ptr::null_mut(), sg_list: &mut piece, num_sge: 1 };
        let mut refused = ptr::null_mut();
        // SAFETY: the request is copied by the call; the memory outlives the queue pair.
        check("ibv_post_recv", unsafe {
            ibv_post_recv(self.0.as_ptr(), &mut request, &mut refused)
        })
    }

    /// Posts work on `length` bytes of `memory` at `offset`, signalled.
    pub fn post(
        &self,
        work: Work,
        memory: &Memory,
        offset: usize,
        length: usize,
        wr_id: u64,
    ) -> Result<()> {
        assert!(offset + length <= memory.length());
        let mut piece = ibv_sge {
            addr: memory.address() + offset as u64,
            length: length as u32,
            lkey: memory.lkey(),
        };
        // SAFETY: all zeroes is a valid ibv_send_wr; the call copies it; the memory outlives
        // the queue pair.
        unsafe {
            let mut request: ibv_send_wr = mem::zeroed();
            request.wr_id = wr_id;
            request.sg_list = &mut piece;
            request.num_sge = i32::from(length > 0);
            request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
            request.opcode = match work {
                Work::Send => ibv_wr_opcode::IBV_WR_SEND,
                Work::SendWith(_) => ibv_wr_opcode::IBV_WR_SEND_WITH_IMM,
                Work::Read(_) => ibv_wr_opcode::IBV_WR_RDMA_READ,
                Work::Write(_, None) => ibv_wr_opcode::IBV_WR_RDMA_WRITE,
                Work::Write(_, Some(_)) => ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM,
            };
            if let Work::Write(remote, _) | Work::Read(remote) = work {
                request.wr.rdma = rdma_t { remote_addr: remote.address, rkey: remote.rkey };
            }
            if let Work::Write(_, Some(immediate)) | Work::SendWith(immediate) = work {
                request.imm_data_invalidated_rkey_union.imm_data = immediate.to_be();
            }
            let mut refused = ptr::null_mut();
            check("ibv_post_send", ibv_post_send(self.0.as_ptr(), &mut request, &mut refused))
        }
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: owned. Not rdma_destroy_qp: the identifier may live on without it.
        unsafe { ibv_destroy_qp(self.0.as_ptr()) };
    }
}

/// Waits until one of `fds` is readable: false when `timeout_ms` passed first.
pub fn wait_readable(fds: [RawFd; 2], timeout_ms: i32) -> Result<bool> {
    let mut entries = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    // SAFETY: the array outlives the call.
    match unsafe { libc::poll(entries.as_mut_ptr(), entries.len() as _, timeout_ms) } {
        0 => Ok(false),
        count if count > 0 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            source => Err(Error::System { call: "poll", source }),
        },
    }
}
