// SPDX-License-Identifier: BSD-3-Clause
//! A thin, owning layer over the C interface for tests: what a test asks for is
//! one line, and what it does not mention has a default.
//!
#![allow(dead_code)]
#![allow(
    clippy::undocumented_unsafe_blocks,
    reason = "every call passes live objects that this module made itself"
)]

use rdma_sys::*;
use softrdma as _;
use std::ffi::{c_int, c_void};
use std::mem::zeroed;
use std::process::Command;
use std::ptr::{null, null_mut};
use std::sync::Mutex;
use std::time::{Duration, Instant};

pub const WAIT: Duration = Duration::from_secs(10);
pub const ALL: u32 = 1 | 2 | 4 | 16;

/// What a test wants of a side of a connection.
#[derive(Clone)]
pub struct Options {
    pub send_wr: u32,
    pub recv_wr: u32,
    pub sge: u32,
    pub inline: u32,
    pub cqe: i32,
    pub rnr_retry: u8,
    pub sig_all: bool,
    pub buffer: usize,
    pub access: u32,
    pub private: Vec<u8>,
    pub reads: u8,
    /// Share these instead of making own ones.
    pub pd: *mut ibv_pd,
    pub srq: *mut ibv_srq,
    pub queue: Option<Queue>,
    /// Sends complete here instead.
    pub send_queue: Option<Queue>,
}

/// A completion queue with its channel.
#[derive(Clone, Copy)]
pub struct Queue {
    pub channel: *mut ibv_comp_channel,
    pub cq: *mut ibv_cq,
}

// The verbs may be called from any thread.
unsafe impl Send for Queue {}
unsafe impl Sync for Queue {}

impl Queue {
    pub fn new(context: *mut ibv_context, cqe: c_int) -> Queue {
        unsafe {
            let channel = ibv_create_comp_channel(context);
            let cq = ibv_create_cq(context, cqe, null_mut(), channel, 0);
            assert!(!channel.is_null() && !cq.is_null());
            Queue { channel, cq }
        }
    }

    pub fn destroy(self) {
        unsafe {
            assert_eq!(ibv_destroy_cq(self.cq), 0);
            assert_eq!(ibv_destroy_comp_channel(self.channel), 0);
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Options {
            send_wr: 64,
            recv_wr: 64,
            sge: 4,
            inline: 64,
            cqe: 256,
            rnr_retry: 7,
            sig_all: false,
            buffer: 1 << 16,
            access: ALL,
            private: Vec::new(),
            reads: 8,
            pd: null_mut(),
            srq: null_mut(),
            queue: None,
            send_queue: None,
        }
    }
}

/// One completion.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wc {
    pub wr_id: u64,
    pub status: u32,
    pub opcode: u32,
    pub len: u32,
    pub imm: Option<u32>,
}

/// A fetched connection event, acknowledged at once.
#[derive(Debug)]
pub struct CmEvent {
    pub kind: u32,
    pub status: i32,
    pub id: *mut rdma_cm_id,
    pub private: Vec<u8>,
}

/// Names the test that a process of its own is for.
pub const PART: &str = "SOFTRDMA_TEST_PART";

/// This program as a process of its own for that test.
pub fn again(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(PART, name);
    command
}

/// Runs `body` in a process of its own with that plan: a plan is the process's.
pub fn planned(name: &str, plan: &str, body: impl FnOnce()) {
    planned_by("SOFTRDMA_FAULTS", name, plan, body);
}

/// The same, with what stands in that variable.
pub fn planned_by(variable: &str, name: &str, plan: &str, body: impl FnOnce()) {
    if std::env::var(PART).as_deref() == Ok(name) {
        return body();
    }
    let out = again(name).env(variable, plan).output().expect("the process");
    let text = [out.stdout, out.stderr].concat();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&text));
}

pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

pub fn readable(fd: i32, within: Duration) -> bool {
    let mut p = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    unsafe { libc::poll(&raw mut p, 1, within.as_millis() as i32) == 1 }
}

pub fn nonblocking(fd: i32) {
    unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK) };
}

pub fn sockaddr(address: &str) -> libc::sockaddr_storage {
    let address: std::net::SocketAddr = address.parse().expect("an address");
    unsafe {
        let mut out: libc::sockaddr_storage = zeroed();
        match address {
            std::net::SocketAddr::V4(a) => {
                let sa = &mut *(&raw mut out).cast::<libc::sockaddr_in>();
                sa.sin_family = libc::AF_INET as _;
                sa.sin_port = a.port().to_be();
                sa.sin_addr.s_addr = u32::from(*a.ip()).to_be();
            }
            std::net::SocketAddr::V6(a) => {
                let sa = &mut *(&raw mut out).cast::<libc::sockaddr_in6>();
                sa.sin6_family = libc::AF_INET6 as _;
                sa.sin6_port = a.port().to_be();
                sa.sin6_addr.s6_addr = a.ip().octets();
            }
        }
        out
    }
}

/// An event channel with the identifiers made on it.
pub struct Cm {
    pub channel: *mut rdma_event_channel,
}

impl Cm {
    pub fn new() -> Cm {
        let channel = unsafe { rdma_create_event_channel() };
        assert!(!channel.is_null());
        Cm { channel }
    }

    pub fn fd(&self) -> i32 {
        unsafe { (*self.channel).fd }
    }

    pub fn id(&self) -> *mut rdma_cm_id {
        let mut id = null_mut();
        let ret = unsafe {
            rdma_create_id(self.channel, &raw mut id, null_mut(), rdma_port_space::RDMA_PS_TCP)
        };
        assert_eq!(ret, 0);
        id
    }

    pub fn try_event(&self, within: Duration) -> Option<CmEvent> {
        if !readable(self.fd(), within) {
            return None;
        }
        unsafe {
            let mut event: *mut rdma_cm_event = null_mut();
            assert_eq!(rdma_get_cm_event(self.channel, &raw mut event), 0);
            let e = &*event;
            let conn = e.param.conn;
            let private = if conn.private_data.is_null() {
                Vec::new()
            } else {
                std::slice::from_raw_parts(
                    conn.private_data.cast::<u8>(),
                    usize::from(conn.private_data_len),
                )
                .to_vec()
            };
            let out = CmEvent { kind: e.event, status: e.status, id: e.id, private };
            rdma_ack_cm_event(event);
            Some(out)
        }
    }

    pub fn event(&self) -> CmEvent {
        self.try_event(WAIT).expect("an event in time")
    }

    pub fn expect(&self, kind: u32) -> CmEvent {
        let event = self.event();
        assert_eq!(event.kind, kind, "got {event:?}");
        event
    }

    /// Listens at an address; answers the identifier and the port.
    pub fn listen(&self, address: &str) -> (*mut rdma_cm_id, u16) {
        let id = self.id();
        let mut sa = sockaddr(address);
        unsafe {
            assert_eq!(rdma_bind_addr(id, (&raw mut sa).cast()), 0, "bind {address}: {}", errno());
            assert_eq!(rdma_listen(id, 16), 0);
            (id, u16::from_be(rdma_get_src_port(id)))
        }
    }

    /// Resolves the way to an address.
    pub fn resolve(&self, address: &str) -> *mut rdma_cm_id {
        let id = self.id();
        let mut sa = sockaddr(address);
        assert_eq!(unsafe { rdma_resolve_addr(id, null_mut(), (&raw mut sa).cast(), 2000) }, 0);
        self.expect(rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED);
        assert_eq!(unsafe { rdma_resolve_route(id, 2000) }, 0);
        self.expect(rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED);
        id
    }
}

impl Drop for Cm {
    fn drop(&mut self) {
        unsafe { rdma_destroy_event_channel(self.channel) };
    }
}

pub fn connect(id: *mut rdma_cm_id, o: &Options) -> c_int {
    let mut param = conn_param(o);
    unsafe { rdma_connect(id, &raw mut param) }
}

pub fn accept(id: *mut rdma_cm_id, o: &Options) -> c_int {
    let mut param = conn_param(o);
    unsafe { rdma_accept(id, &raw mut param) }
}

fn conn_param(o: &Options) -> rdma_conn_param {
    rdma_conn_param {
        private_data: if o.private.is_empty() { null() } else { o.private.as_ptr().cast() },
        private_data_len: o.private.len() as u8,
        responder_resources: o.reads,
        initiator_depth: o.reads,
        flow_control: 0,
        retry_count: 2,
        rnr_retry_count: o.rnr_retry,
        srq: 0,
        qp_num: 0,
    }
}

/// Everything one side of a connection has.
pub struct Side {
    pub id: *mut rdma_cm_id,
    pub pd: *mut ibv_pd,
    own_pd: bool,
    pub channel: *mut ibv_comp_channel,
    pub cq: *mut ibv_cq,
    pub qp: *mut ibv_qp,
    pub mr: *mut ibv_mr,
    pub buffer: Vec<u8>,
    pub options: Options,
}

// The verbs may be called from any thread.
unsafe impl Send for Side {}
unsafe impl Sync for Side {}

impl Side {
    /// Equips an identifier with everything a connection needs.
    pub fn new(id: *mut rdma_cm_id, options: Options) -> Side {
        unsafe {
            let context = (*id).verbs;
            let own_pd = options.pd.is_null();
            let pd = if own_pd { ibv_alloc_pd(context) } else { options.pd };
            assert!(!pd.is_null());
            let queue = options.queue.unwrap_or_else(|| Queue::new(context, options.cqe));
            let Queue { channel, cq } = queue;
            let mut init: ibv_qp_init_attr = zeroed();
            init.send_cq = options.send_queue.map_or(cq, |queue| queue.cq);
            init.recv_cq = cq;
            init.srq = options.srq;
            init.qp_type = ibv_qp_type::IBV_QPT_RC;
            init.sq_sig_all = c_int::from(options.sig_all);
            init.cap.max_send_wr = options.send_wr;
            init.cap.max_recv_wr = options.recv_wr;
            init.cap.max_send_sge = options.sge;
            init.cap.max_recv_sge = options.sge;
            init.cap.max_inline_data = options.inline;
            assert_eq!(rdma_create_qp(id, pd, &raw mut init), 0, "{}", errno());
            let mut buffer = vec![0u8; options.buffer];
            let mr =
                ibv_reg_mr(pd, buffer.as_mut_ptr().cast(), buffer.len(), options.access as c_int);
            assert!(!mr.is_null());
            Side { id, pd, own_pd, channel, cq, qp: (*id).qp, mr, buffer, options }
        }
    }

    pub fn addr(&self, offset: usize) -> u64 {
        self.buffer.as_ptr() as u64 + offset as u64
    }
    pub fn rkey(&self) -> u32 {
        unsafe { (*self.mr).rkey }
    }
    pub fn sge(&self, offset: usize, len: usize) -> ibv_sge {
        ibv_sge { addr: self.addr(offset), length: len as u32, lkey: unsafe { (*self.mr).lkey } }
    }
    /// Reads memory that the fabric may have written behind the compiler's back.
    pub fn bytes(&self, offset: usize, len: usize) -> Vec<u8> {
        (0..len).map(|i| unsafe { (self.addr(offset + i) as *const u8).read_volatile() }).collect()
    }
    pub fn fill(&mut self, offset: usize, bytes: &[u8]) {
        self.buffer[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Posts a send work request; the result is 0 or an errno.
    pub fn post(&self, wr: Wr) -> c_int {
        unsafe {
            let mut sges = wr.sges;
            let mut c: ibv_send_wr = zeroed();
            c.wr_id = wr.wr_id;
            c.opcode = wr.opcode;
            c.send_flags = wr.flags;
            c.sg_list = sges.as_mut_ptr();
            c.num_sge = sges.len() as c_int;
            c.imm_data_invalidated_rkey_union.imm_data = wr.imm;
            c.wr.rdma.remote_addr = wr.remote.0;
            c.wr.rdma.rkey = wr.remote.1;
            if let Some(bind) = wr.bind {
                c.bind_mw_tso_union.bind_mw = bind;
            }
            let mut bad = null_mut();
            ibv_post_send(self.qp, &raw mut c, &raw mut bad)
        }
    }

    pub fn recv(&self, wr_id: u64, sges: &[ibv_sge]) -> c_int {
        let mut sges = sges.to_vec();
        let mut wr = ibv_recv_wr {
            wr_id,
            next: null_mut(),
            sg_list: sges.as_mut_ptr(),
            num_sge: sges.len() as c_int,
        };
        let mut bad = null_mut();
        unsafe { ibv_post_recv(self.qp, &raw mut wr, &raw mut bad) }
    }

    pub fn try_poll(&self) -> Option<Wc> {
        poll(self.cq)
    }

    /// Polls until a completion comes.
    pub fn wc(&self) -> Wc {
        let end = Instant::now() + WAIT;
        loop {
            if let Some(wc) = self.try_poll() {
                return wc;
            }
            assert!(Instant::now() < end, "no completion in time");
            std::thread::yield_now();
        }
    }

    /// The next completion, which must be a success of work request `wr_id`.
    pub fn done(&self, wr_id: u64) -> Wc {
        let wc = self.wc();
        assert_eq!((wc.wr_id, wc.status), (wr_id, ibv_wc_status::IBV_WC_SUCCESS), "{wc:?}");
        wc
    }

    /// The next completion, which must be work request `wr_id` with that status.
    pub fn fails(&self, wr_id: u64, status: u32) {
        let wc = self.wc();
        assert_eq!((wc.wr_id, wc.status), (wr_id, status), "{wc:?}");
    }

    pub fn arm(&self, solicited: bool) {
        assert_eq!(unsafe { ibv_req_notify_cq(self.cq, c_int::from(solicited)) }, 0);
    }
    pub fn channel_fd(&self) -> i32 {
        unsafe { (*self.channel).fd }
    }
    /// Fetches and acknowledges one completion event.
    pub fn cq_event(&self) -> Result<(), i32> {
        let (mut cq, mut user): (*mut ibv_cq, *mut c_void) = (null_mut(), null_mut());
        unsafe {
            if ibv_get_cq_event(self.channel, &raw mut cq, &raw mut user) != 0 {
                return Err(errno());
            }
            ibv_ack_cq_events(cq, 1);
        }
        assert_eq!(cq, self.cq);
        Ok(())
    }

    pub fn query(&self) -> ibv_qp_attr {
        unsafe {
            let (mut attr, mut init): (ibv_qp_attr, ibv_qp_init_attr) = (zeroed(), zeroed());
            assert_eq!(ibv_query_qp(self.qp, &raw mut attr, 1, &raw mut init), 0);
            attr
        }
    }
    pub fn state(&self) -> u32 {
        self.query().qp_state
    }
    /// Waits for the error state: the other side's violation arrives in its own time.
    pub fn enters_error(&self) {
        let end = Instant::now() + WAIT;
        while self.state() != ibv_qp_state::IBV_QPS_ERR {
            assert!(Instant::now() < end, "not in the error state");
            std::thread::yield_now();
        }
    }
    pub fn modify(&self, set: impl FnOnce(&mut ibv_qp_attr), mask: ibv_qp_attr_mask) -> c_int {
        unsafe {
            let mut attr: ibv_qp_attr = zeroed();
            set(&mut attr);
            ibv_modify_qp(self.qp, &raw mut attr, mask.0 as c_int)
        }
    }
    /// Sets the wait that this side asks for when its receive queue is empty.
    pub fn rnr_timer(&self, code: u8) {
        assert_eq!(
            self.modify(|a| a.min_rnr_timer = code, ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER),
            0
        );
    }

    pub fn disconnect(&self) {
        assert_eq!(unsafe { rdma_disconnect(self.id) }, 0);
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        unsafe {
            rdma_destroy_qp(self.id);
            assert_eq!(ibv_dereg_mr(self.mr), 0);
            if self.options.queue.is_none() {
                Queue { channel: self.channel, cq: self.cq }.destroy();
            }
            if self.own_pd {
                assert_eq!(ibv_dealloc_pd(self.pd), 0);
            }
            rdma_destroy_id(self.id);
        }
    }
}

pub fn poll(cq: *mut ibv_cq) -> Option<Wc> {
    unsafe {
        let mut wc: ibv_wc = zeroed();
        let n = ibv_poll_cq(cq, 1, &raw mut wc);
        (n == 1).then(|| Wc {
            wr_id: wc.wr_id,
            status: wc.status,
            opcode: wc.opcode,
            len: wc.byte_len,
            imm: (wc.wc_flags & ibv_wc_flags::IBV_WC_WITH_IMM.0 != 0)
                .then_some(wc.imm_data_invalidated_rkey_union.imm_data),
        })
    }
}

/// A send work request.
pub struct Wr {
    pub wr_id: u64,
    pub opcode: u32,
    pub flags: u32,
    pub sges: Vec<ibv_sge>,
    pub remote: (u64, u32),
    pub imm: u32,
    pub bind: Option<bind_mw_t>,
}

pub const SIGNALED: u32 = 2;
pub const SOLICITED: u32 = 4;
pub const INLINE: u32 = 8;
pub const FENCE: u32 = 1;

impl Wr {
    fn new(opcode: u32, wr_id: u64, sges: &[ibv_sge]) -> Wr {
        Wr {
            wr_id,
            opcode,
            flags: SIGNALED,
            sges: sges.to_vec(),
            remote: (0, 0),
            imm: 0,
            bind: None,
        }
    }
    pub fn send(wr_id: u64, sges: &[ibv_sge]) -> Wr {
        Wr::new(ibv_wr_opcode::IBV_WR_SEND, wr_id, sges)
    }
    pub fn send_imm(wr_id: u64, sges: &[ibv_sge], imm: u32) -> Wr {
        Wr { imm, ..Wr::new(ibv_wr_opcode::IBV_WR_SEND_WITH_IMM, wr_id, sges) }
    }
    pub fn write(wr_id: u64, sges: &[ibv_sge], to: u64, rkey: u32) -> Wr {
        Wr { remote: (to, rkey), ..Wr::new(ibv_wr_opcode::IBV_WR_RDMA_WRITE, wr_id, sges) }
    }
    pub fn write_imm(wr_id: u64, sges: &[ibv_sge], to: u64, rkey: u32, imm: u32) -> Wr {
        Wr {
            remote: (to, rkey),
            imm,
            ..Wr::new(ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM, wr_id, sges)
        }
    }
    pub fn read(wr_id: u64, sges: &[ibv_sge], from: u64, rkey: u32) -> Wr {
        Wr { remote: (from, rkey), ..Wr::new(ibv_wr_opcode::IBV_WR_RDMA_READ, wr_id, sges) }
    }
    pub fn flags(self, flags: u32) -> Wr {
        Wr { flags, ..self }
    }
}

/// Two connected sides in this process, each with an event channel of its own.
pub struct Pair {
    // In the order in which they must go.
    pub client: Side,
    pub server: Side,
    pub client_cm: Cm,
    pub server_cm: Cm,
    listener: *mut rdma_cm_id,
}

impl Pair {
    pub fn new(client: Options, server: Options) -> Pair {
        Pair::at("127.0.0.1", client, server)
    }

    pub fn at(ip: &str, client: Options, server: Options) -> Pair {
        let (client_cm, server_cm) = (Cm::new(), Cm::new());
        let at =
            |port| if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") };
        let (listener, port) = server_cm.listen(&at(0));
        let client = Side::new(client_cm.resolve(&at(port)), client);
        assert_eq!(connect(client.id, &client.options), 0);
        let request = server_cm.expect(rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST);
        let server = Side::new(request.id, server);
        assert_eq!(accept(server.id, &server.options), 0);
        client_cm.expect(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED);
        server_cm.expect(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED);
        Pair { client, server, client_cm, server_cm, listener }
    }

    pub fn default() -> Pair {
        Pair::new(Options::default(), Options::default())
    }
}

impl Pair {
    /// Destroys the listener before its time.
    pub fn listener_gone(&mut self) {
        if !self.listener.is_null() {
            unsafe { rdma_destroy_id(self.listener) };
            self.listener = null_mut();
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.listener_gone();
    }
}

/// The asynchronous events about an object until one of that kind comes; all
/// tests of a process share one context, so events about others are kept.
pub fn async_event<T>(side: &Side, about: *mut T, kind: ibv_event_type) {
    static SEEN: Mutex<Vec<(usize, u32)>> = Mutex::new(Vec::new());
    let wanted = (about as usize, kind as u32);
    let end = Instant::now() + WAIT;
    loop {
        let mut seen = SEEN.lock().unwrap_or_else(|e| e.into_inner());
        unsafe {
            let context = (*side.id).verbs;
            while readable((*context).async_fd, Duration::from_millis(20)) {
                let mut event: ibv_async_event = zeroed();
                if ibv_get_async_event(context, &raw mut event) != 0 {
                    // The device was removed, and that is for ever.
                    assert_eq!(errno(), libc::EIO);
                    break;
                }
                ibv_ack_async_event(&raw mut event);
                seen.push((event.element.qp as usize, event.event_type as u32));
            }
        }
        if let Some(at) = seen.iter().position(|e| *e == wanted) {
            seen.remove(at);
            return;
        }
        drop(seen);
        assert!(Instant::now() < end, "no asynchronous event {wanted:?}");
    }
}

/// Bytes that are easy to tell from others.
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed).collect()
}
