// SPDX-License-Identifier: BSD-3-Clause
//! Reliable-connection queue pairs: creation, states (10.3.1), posting, and who
//! makes progress when.
//!
//! The two halves of the protocol are [`super::requester`] and [`super::responder`];
//! both work on [`Inner`] under the queue pair's lock, whichever thread they run on.

use super::context::{About, Context, limit};
use super::cq::{Completion, Cq};
use super::memory::{InPd, Mr, Mw, Pd};
use super::responder::Inbound;
use super::srq::Srq;
use super::work::*;
use crate::board::{self, Place};
use crate::habits::{Habits, Inline, Rnr};
use crate::handle::{self, Acks};
use crate::keys;
use crate::link::{Link, want};
use crate::number;
use crate::patience;
use crate::tally;
use rdma_sys::*;
use std::cell::UnsafeCell;
use std::collections::{HashMap, VecDeque};
use std::mem::zeroed;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, RwLock, Weak};
use std::time::Instant;

pub use ibv_qp_state::{
    IBV_QPS_ERR as ERR, IBV_QPS_INIT as INIT, IBV_QPS_RESET as RESET, IBV_QPS_RTR as RTR,
    IBV_QPS_RTS as RTS, IBV_QPS_SQD as SQD,
};

/// What of a queue pair changes, under its lock.
pub struct Inner {
    pub state: ibv_qp_state::Type,
    pub attr: ibv_qp_attr,

    // Requester.
    pub sq: VecDeque<SendWork>,
    /// How many of `sq`, from the front, are wholly sent.
    pub sent: usize,
    /// Payload bytes of the next one that are sent; its header is, if this is `Some`.
    pub sending: Option<usize>,
    /// Sends posted so far.
    pub posted: u64,
    /// Requests put on the wire so far.
    pub requests: u64,
    /// READs sent whose data has not all come.
    pub reads: usize,
    /// Bytes received of the READ that is next to complete.
    pub read_offset: usize,
    pub rnr_seen: u64,
    pub rnr_left: u8,
    pub acked_seen: u64,
    pub giving_up: bool,
    /// Something was sent that takes a receive on the other side.
    pub completes_there: bool,

    // Responder.
    pub rq: VecDeque<RecvWork>,
    /// Receives that were to be posted so far.
    pub receives: u64,
    pub inbound: Inbound,
    /// Requests of the other side that were executed.
    pub executed: u64,
}

type End = Box<dyn FnOnce() + Send>;

/// A queue pair.
#[repr(C)]
pub struct Qp {
    c: UnsafeCell<ibv_qp>,
    pub num: u32,
    pub context: Arc<Context>,
    pub pd: InPd,
    pub send_cq: Arc<Cq>,
    pub recv_cq: Arc<Cq>,
    pub srq: Option<Arc<Srq>>,
    pub cap: ibv_qp_cap,
    pub sig_all: bool,
    /// The send queue's slots up to this number are free.
    pub released: Arc<AtomicU64>,
    pub async_acks: Acks,
    /// Something of it was flushed.
    flushed: AtomicBool,
    link: OnceLock<Arc<Link>>,
    ends: Mutex<Vec<End>>,
    inner: Mutex<Inner>,
    /// Stands for it on the process's notice board.
    pair: u32,
    weak: Weak<Qp>,
}

// SAFETY: the C part is constant but for the state, which is a plain word that
// is written under the queue pair's lock, as rdma-core does.
unsafe impl Send for Qp {}
// SAFETY: as above.
unsafe impl Sync for Qp {}

/// The process's queue pairs as they stand on its notice board.
static PAIRS: RwLock<Vec<Weak<Qp>>> = RwLock::new(Vec::new());
/// The process's queue pairs by number.
static QPS: Mutex<Option<HashMap<u32, Weak<Qp>>>> = Mutex::new(None);
/// Wires that the connection manager has laid for queue pairs not yet connected.
static LAID: Mutex<Option<HashMap<u32, Arc<Link>>>> = Mutex::new(None);

/// Has a wire ready for when queue pair `num` is moved to RTR.
pub fn lay(num: u32, link: Arc<Link>) {
    LAID.lock().unwrap().get_or_insert_default().insert(num, link);
}
/// Forgets a wire that was laid and not used.
pub fn unlay(num: u32) {
    LAID.lock().unwrap().get_or_insert_default().remove(&num);
}

/// Slips of a queue pair.
mod slip {
    pub const REQUESTS: u32 = 0;
    pub const ANSWERS: u32 = 1;
    pub const CALL: u32 = 2;
}

/// The queue pair that a slip belongs to, if it still exists.
pub fn by_slip(slip: u32) -> Option<Arc<Qp>> {
    PAIRS.read().unwrap().get(board::pair(slip) as usize)?.upgrade()
}

/// On the progress thread: the other side has called for a queue pair.
pub fn called(slip: u32) {
    if let Some(qp) = by_slip(slip) {
        tally::CALLS.count();
        let mut inner = qp.lock();
        if let Some(link) = qp.link.get() {
            link.ask(want::REQUEST);
        }
        qp.run(&mut inner);
    }
}

/// Every queue pair of the process.
pub fn all() -> Vec<Arc<Qp>> {
    let qps = QPS.lock().unwrap();
    qps.iter().flat_map(|by_number| by_number.values()).filter_map(Weak::upgrade).collect()
}

/// Queue pair numbers are 24 bits and should differ between processes, for the
/// sake of whoever reads them: each process starts somewhere else.
fn next_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id().wrapping_mul(0x9e37_79b1) >> 8;
    loop {
        let n = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) & 0xff_ffff;
        // 0 and 1 are reserved for management.
        let used = QPS.lock().unwrap().get_or_insert_default().contains_key(&n);
        if n > 1 && !used {
            return n;
        }
    }
}

impl Qp {
    pub fn new(pd: Arc<Pd>, init: &ibv_qp_init_attr) -> Result<Arc<Qp>, i32> {
        if init.qp_type != ibv_qp_type::IBV_QPT_RC {
            return Err(libc::EOPNOTSUPP);
        }
        if init.send_cq.is_null() || init.recv_cq.is_null() {
            return Err(libc::EINVAL);
        }
        let mut cap = init.cap;
        if !init.srq.is_null() {
            cap.max_recv_wr = 0;
            cap.max_recv_sge = 0;
        }
        if cap.max_send_wr > limit::QP_WR
            || cap.max_recv_wr > limit::QP_WR
            || cap.max_send_sge > limit::SGE
            || cap.max_recv_sge > limit::SGE
            || cap.max_inline_data > limit::INLINE
        {
            return Err(libc::EINVAL);
        }
        let habits = pd.context.habits();
        cap.max_inline_data = match habits.inline {
            // As Soft-RoCE does: inline data may fill the room of the gather list.
            Inline::Granted => cap.max_inline_data.max(cap.max_send_sge * 16),
            Inline::Clamped(bytes) => bytes,
            Inline::Limited(most) if cap.max_inline_data > most => return Err(libc::EINVAL),
            Inline::Limited(_) | Inline::Ignored => cap.max_inline_data,
        };
        if QPS.lock().unwrap().as_ref().is_some_and(|qps| qps.len() >= habits.max_qp as usize) {
            return Err(habits.at_limit);
        }
        // SAFETY: the application passes live objects of ours.
        let (send_cq, recv_cq, srq) = unsafe {
            let srq = (!init.srq.is_null()).then(|| handle::share::<Srq, _>(init.srq));
            (handle::share::<Cq, _>(init.send_cq), handle::share::<Cq, _>(init.recv_cq), srq)
        };
        let pair = board::own().new_pair().ok_or(libc::ENOMEM)?;
        if let Some(srq) = &srq {
            srq.users.fetch_add(1, Ordering::Relaxed);
        }
        let num = next_number();
        // SAFETY: all zeroes is a valid ibv_qp and ibv_qp_attr.
        let (mut c, mut attr): (ibv_qp, ibv_qp_attr) = unsafe { (zeroed(), zeroed()) };
        c.context = pd.context.as_c();
        c.qp_context = init.qp_context;
        c.pd = (&raw const pd.c).cast_mut();
        c.send_cq = init.send_cq;
        c.recv_cq = init.recv_cq;
        c.srq = init.srq;
        c.handle = num;
        c.qp_num = num;
        c.state = RESET;
        c.qp_type = init.qp_type;
        attr.port_num = 1;
        attr.cap = cap;
        let inner = Inner {
            state: RESET,
            attr,
            sq: VecDeque::new(),
            sent: 0,
            sending: None,
            posted: 0,
            requests: 0,
            reads: 0,
            read_offset: 0,
            rnr_seen: 0,
            rnr_left: 0,
            acked_seen: 0,
            giving_up: false,
            completes_there: false,
            rq: VecDeque::new(),
            receives: 0,
            inbound: Inbound::Idle,
            executed: 0,
        };
        let qp = Arc::new_cyclic(|weak| Qp {
            c: UnsafeCell::new(c),
            num,
            context: pd.context.clone(),
            pd: InPd::new(pd),
            send_cq,
            recv_cq,
            srq,
            cap,
            sig_all: init.sq_sig_all != 0,
            released: Arc::new(AtomicU64::new(0)),
            async_acks: Acks::default(),
            flushed: AtomicBool::new(false),
            link: OnceLock::new(),
            ends: Mutex::new(Vec::new()),
            inner: Mutex::new(inner),
            pair,
            weak: weak.clone(),
        });
        let mut pairs = PAIRS.write().unwrap();
        if pairs.len() <= pair as usize {
            pairs.resize(pair as usize + 1, Weak::new());
        }
        pairs[pair as usize] = Arc::downgrade(&qp);
        drop(pairs);
        qp.send_cq.attach(&qp);
        qp.recv_cq.attach(&qp);
        QPS.lock().unwrap().get_or_insert_default().insert(num, Arc::downgrade(&qp));
        Ok(qp)
    }

    /// Ends the queue pair: nothing more is sent, received or completed.
    pub fn destroy(&self) {
        let cost = self.habits().destroy_cost * self.recv_cq.c.cqe as u32;
        let started = Instant::now();
        while started.elapsed() < cost {
            std::hint::spin_loop();
        }
        {
            let mut inner = self.inner.lock().unwrap();
            if let Some(link) = self.link.get() {
                link.close();
                link.clear_address();
            }
            self.set_state(&mut inner, RESET);
            inner.sq.clear();
            inner.rq.clear();
            inner.inbound = Inbound::Idle;
        }
        for end in self.ends.lock().unwrap().drain(..) {
            end();
        }
        self.send_cq.detach(self);
        self.recv_cq.detach(self);
        if let Some(srq) = &self.srq {
            srq.users.fetch_sub(1, Ordering::Relaxed);
        }
        self.pd.release();
        QPS.lock().unwrap().get_or_insert_default().remove(&self.num);
        unlay(self.num);
        PAIRS.write().unwrap()[self.pair as usize] = Weak::new();
        // Nobody may look at its queues again: libvalkey tries to destroy its queue first, is
        // refused, and forgets it. News that hang there would keep the slips for good.
        if !board::own().is_clear(self.pair) {
            self.send_cq.look(true);
            self.recv_cq.look(true);
        }
        board::own().free_pair(self.pair);
    }

    /// The queue pair with this number.
    pub fn by_number(num: u32) -> Option<Arc<Qp>> {
        QPS.lock().unwrap().as_ref()?.get(&num)?.upgrade()
    }

    pub fn strong(&self) -> Option<Arc<Qp>> {
        self.weak.upgrade()
    }

    fn set_state(&self, inner: &mut Inner, state: ibv_qp_state::Type) {
        inner.state = state;
        inner.attr.qp_state = state;
        // SAFETY: a word written under the lock; the application reads it at will.
        unsafe { (*self.c.get()).state = state };
    }

    pub fn query(&self, attr: &mut ibv_qp_attr, init: &mut ibv_qp_init_attr) {
        let inner = self.inner.lock().unwrap();
        // SAFETY: plain data, whose generated type only lacks the derive.
        *attr = unsafe { std::ptr::read(&raw const inner.attr) };
        attr.cur_qp_state = inner.state;
        // SAFETY: constant fields.
        let c = unsafe { &*self.c.get() };
        *init = ibv_qp_init_attr {
            qp_context: c.qp_context,
            send_cq: c.send_cq,
            recv_cq: c.recv_cq,
            srq: c.srq,
            cap: self.cap,
            qp_type: c.qp_type,
            sq_sig_all: i32::from(self.sig_all),
        };
    }

    /// ibv_modify_qp; the result is 0 or an errno.
    pub fn modify(self: &Arc<Self>, attr: &ibv_qp_attr, mask: u32) -> i32 {
        let mut inner = self.inner.lock().unwrap();
        let from = inner.state;
        let to = if mask & mask::STATE != 0 { attr.qp_state } else { from };
        if mask & mask::CUR_STATE != 0 && attr.cur_qp_state != from {
            return libc::EINVAL;
        }
        let Some(required) = required(from, to) else { return libc::EINVAL };
        if mask & required != required {
            return libc::EINVAL;
        }
        if (from, to) == (RTS, RTS) && self.habits().rnr == Rnr::Refused {
            return libc::EINVAL;
        }
        if (from, to) == (RTS, RTS) && mask & mask::STATE == 0 && self.habits().modify_resets {
            self.enter_reset(&mut inner);
            return 0;
        }
        if to == RTR && from == INIT {
            let laid = LAID.lock().unwrap().get_or_insert_default().remove(&self.num);
            if let Some(link) = laid
                && self.link.set(link).is_err()
            {
                return libc::EOPNOTSUPP;
            }
            // A wire that is not laid is met by number, once the state allows it.
        }
        inner.merge(attr, mask, self.habits());
        if from != to {
            match to {
                ERR => self.enter_error(&mut inner),
                RESET => self.enter_reset(&mut inner),
                _ => self.set_state(&mut inner, to),
            }
        }
        if to == RTR && from == INIT {
            if self.link.get().is_some() {
                self.open_wire();
            } else if let Err(code) = number::connect(self, inner.attr.dest_qp_num) {
                self.set_state(&mut inner, from);
                return code;
            }
        }
        if matches!(to, RTR | RTS) {
            self.run(&mut inner);
        }
        0
    }

    /// The wire has come, for a queue pair that is connected by number.
    pub fn wire_up(&self, link: Arc<Link>) {
        let mut inner = self.inner.lock().unwrap();
        if self.link.set(link.clone()).is_err() || !matches!(inner.state, RTR | RTS | SQD) {
            link.close();
            return;
        }
        self.open_wire();
        self.run(&mut inner);
    }

    /// From now on the other side knows where its news go.
    fn open_wire(&self) {
        let Some(link) = self.link.get() else { return };
        let place = |which, cq: &Cq| Place { slip: board::slip(self.pair, which), hook: cq.hook };
        let one_queue = Arc::ptr_eq(&self.send_cq, &self.recv_cq);
        let answers = if one_queue { slip::REQUESTS } else { slip::ANSWERS };
        link.set_address(
            place(slip::REQUESTS, &self.recv_cq),
            place(answers, &self.send_cq),
            board::slip(self.pair, slip::CALL),
            self.send_cq.channel_number() == self.recv_cq.channel_number(),
        );
        link.ask(want::REQUEST);
    }

    /// Has something done when the queue pair ends.
    pub fn at_end(&self, job: impl FnOnce() + Send + 'static) {
        self.ends.lock().unwrap().push(Box::new(job));
    }

    fn enter_reset(&self, inner: &mut Inner) {
        if let Some(link) = self.link.get() {
            link.close();
        }
        inner.sq.clear();
        inner.rq.clear();
        inner.sent = 0;
        inner.sending = None;
        inner.inbound = Inbound::Idle;
        self.set_state(inner, RESET);
    }

    /// Moves to the error state: whatever is queued is flushed (10.3.1.7).
    pub fn enter_error(&self, inner: &mut Inner) {
        if matches!(inner.state, ERR | RESET) {
            return;
        }
        self.set_state(inner, ERR);
        // The other side first: who sees the flush may hang up at once, and what the
        // other side was refused must have reached it by then.
        if let Some(link) = self.link.get() {
            link.close();
        }
        inner.sent = 0;
        inner.sending = None;
        while let Some(work) = inner.sq.pop_front() {
            self.complete_send(&work, ibv_wc_status::IBV_WC_WR_FLUSH_ERR);
        }
        if let Some(recv) = std::mem::replace(&mut inner.inbound, Inbound::Idle).into_recv() {
            inner.rq.push_front(recv);
        }
        while let Some(recv) = inner.rq.pop_front() {
            self.fail_recv(recv.wr_id, ibv_wc_status::IBV_WC_WR_FLUSH_ERR);
        }
        if self.srq.is_some() {
            self.notify(ibv_event_type::IBV_EVENT_QP_LAST_WQE_REACHED);
        }
    }

    pub fn notify(&self, kind: ibv_event_type) {
        if let Some(qp) = self.strong() {
            self.context.notify(kind, About::Qp(qp));
        }
    }

    /// What its device does in its own way.
    pub fn habits(&self) -> &'static Habits {
        self.context.habits()
    }

    /// The queue pair fails for a reason outside of it.
    pub fn fatal(&self) {
        let mut inner = self.inner.lock().unwrap();
        if !matches!(inner.state, ERR | RESET) {
            self.enter_error(&mut inner);
            self.notify(ibv_event_type::IBV_EVENT_QP_FATAL);
        }
    }

    /// Completes a send, and flushes are always signalled.
    pub fn complete_send(&self, work: &SendWork, status: ibv_wc_status::Type) {
        let error = status != ibv_wc_status::IBV_WC_SUCCESS;
        if !work.signaled && !error {
            return;
        }
        let quiet = self.is_quiet(status);
        self.send_cq.push(Completion {
            wr_id: work.wr_id,
            status,
            opcode: work.opcode,
            byte_len: match &work.operation {
                Operation::Request(h) => h.len,
                _ => 0,
            },
            imm: 0,
            flags: 0,
            qp: self.num,
            solicited: error,
            quiet,
            frees: Some((self.released.clone(), work.index)),
        });
    }

    /// Whether a completion is found by polling alone.
    fn is_quiet(&self, status: ibv_wc_status::Type) -> bool {
        self.habits().flush_on_poll
            && status == ibv_wc_status::IBV_WC_WR_FLUSH_ERR
            && self.flushed.swap(true, Ordering::Relaxed)
    }

    pub fn fail_recv(&self, wr_id: u64, status: ibv_wc_status::Type) {
        let quiet = self.is_quiet(status);
        self.recv_cq.push(Completion {
            wr_id,
            status,
            opcode: ibv_wc_opcode::IBV_WC_RECV,
            byte_len: 0,
            imm: 0,
            flags: 0,
            qp: self.num,
            solicited: true,
            quiet,
            frees: None,
        });
    }

    /// ibv_post_send for one work request; the error is an errno.
    ///
    /// # Safety
    /// The work request and what it points to are valid.
    pub unsafe fn post_send(&self, wr: &ibv_send_wr, inner: &mut Inner) -> Result<(), i32> {
        if !matches!(inner.state, RTS | SQD | ERR) {
            return Err(libc::EINVAL);
        }
        if let (ERR, Some(code)) = (inner.state, self.habits().dead) {
            return Err(code);
        }
        let held = inner.posted - self.released.load(Ordering::Relaxed);
        // A slot is free again once a completion at or after it was polled.
        if held >= u64::from(self.cap.max_send_wr) {
            return Err(self.habits().full);
        }
        // SAFETY: the caller's word.
        let mut work = unsafe { self.translate(wr)? };
        inner.posted += 1;
        work.index = inner.posted;
        if inner.state == ERR {
            self.complete_send(&work, ibv_wc_status::IBV_WC_WR_FLUSH_ERR);
        } else {
            inner.sq.push_back(work);
        }
        Ok(())
    }

    /// Checks a send work request and copies what must be copied.
    unsafe fn translate(&self, wr: &ibv_send_wr) -> Result<SendWork, i32> {
        use ibv_wr_opcode::*;
        let count = usize::try_from(wr.num_sge).map_err(|_| libc::EINVAL)?;
        let sges = if count == 0 {
            Vec::new()
        } else {
            // SAFETY: the caller's word: num_sge entries.
            unsafe { std::slice::from_raw_parts(wr.sg_list, count) }.to_vec()
        };
        if sges.len() > self.cap.max_send_sge as usize {
            return Err(libc::EINVAL);
        }
        let len = total(&sges);
        if len > u64::from(limit::MESSAGE) {
            return Err(libc::EINVAL);
        }
        let flags = wr.send_flags;
        // SAFETY: which members are valid goes with the opcode.
        let (imm, rdma) = unsafe { (wr.imm_data_invalidated_rkey_union.imm_data, wr.wr.rdma) };
        let solicited =
            if flags & ibv_send_flags::IBV_SEND_SOLICITED.0 != 0 { flag::SOLICITED } else { 0 };
        let mut header = Header { len: len as u32, flags: solicited, ..Header::default() };
        let mut local = None;
        let opcode = match wr.opcode {
            IBV_WR_SEND | IBV_WR_SEND_WITH_IMM | IBV_WR_SEND_WITH_INV => {
                header.kind = kind::SEND;
                ibv_wc_opcode::IBV_WC_SEND
            }
            IBV_WR_RDMA_WRITE | IBV_WR_RDMA_WRITE_WITH_IMM => {
                header.kind = kind::WRITE;
                (header.addr, header.rkey) = (rdma.remote_addr, rdma.rkey);
                ibv_wc_opcode::IBV_WC_RDMA_WRITE
            }
            IBV_WR_RDMA_READ => {
                header.kind = kind::READ;
                (header.addr, header.rkey) = (rdma.remote_addr, rdma.rkey);
                ibv_wc_opcode::IBV_WC_RDMA_READ
            }
            IBV_WR_BIND_MW => {
                // SAFETY: valid for this opcode, and the objects are alive.
                local = Some(unsafe { self.bind_operation(wr)? });
                ibv_wc_opcode::IBV_WC_BIND_MW
            }
            IBV_WR_LOCAL_INV => {
                local = Some(Operation::Invalidate(imm));
                ibv_wc_opcode::IBV_WC_LOCAL_INV
            }
            _ => return Err(libc::EOPNOTSUPP),
        };
        if matches!(wr.opcode, IBV_WR_SEND_WITH_IMM | IBV_WR_RDMA_WRITE_WITH_IMM) {
            if !self.habits().immediate {
                return Err(libc::EINVAL);
            }
            header.flags |= flag::IMM;
            header.imm = imm;
        }
        if wr.opcode == IBV_WR_SEND_WITH_INV {
            header.flags |= flag::INVALIDATE;
            header.imm = imm;
        }
        let inline = flags & ibv_send_flags::IBV_SEND_INLINE.0 != 0;
        let inline = if inline && self.habits().inline != Inline::Ignored {
            if header.kind == kind::READ {
                return Err(libc::EINVAL);
            }
            if len > u64::from(self.cap.max_inline_data) {
                return Err(self.habits().inline_error);
            }
            let mut data = Vec::with_capacity(len as usize);
            for sge in &sges {
                // SAFETY: the caller's word: an inline entry is readable memory.
                data.extend_from_slice(unsafe {
                    std::slice::from_raw_parts(sge.addr as *const u8, sge.length as usize)
                });
            }
            Some(data.into_boxed_slice())
        } else {
            None
        };
        Ok(SendWork {
            wr_id: wr.wr_id,
            operation: local.unwrap_or(Operation::Request(header)),
            opcode,
            signaled: self.sig_all || flags & ibv_send_flags::IBV_SEND_SIGNALED.0 != 0,
            fence: flags & ibv_send_flags::IBV_SEND_FENCE.0 != 0,
            sges,
            inline,
            index: 0,
            request: 0,
        })
    }

    unsafe fn bind_operation(&self, wr: &ibv_send_wr) -> Result<Operation, i32> {
        // SAFETY: the caller's word.
        let bind = unsafe { wr.bind_mw_tso_union.bind_mw };
        let info = bind.bind_info;
        if bind.mw.is_null() {
            return Err(libc::EINVAL);
        }
        // SAFETY: live objects of ours.
        let (mw, mr) = unsafe {
            let mr = (!info.mr.is_null()).then(|| handle::borrow::<Mr, _>(info.mr));
            (handle::borrow::<Mw, _>(bind.mw), mr)
        };
        // 10.6.7.2.1: window, region and queue pair share a protection domain.
        if mw.pd.pd.id != self.pd.pd.id || mr.is_some_and(|mr| mr.pd() != self.pd.pd.id) {
            return Err(libc::EINVAL);
        }
        Ok(Operation::Bind {
            mw_key: mw.c.rkey,
            new_key: bind.rkey,
            mr_key: mr.map_or(0, Mr::key),
            addr: info.addr,
            length: info.length,
            access: info.mw_access_flags,
        })
    }

    /// ibv_post_recv for one work request.
    pub fn post_recv(&self, work: RecvWork, inner: &mut Inner) -> Result<(), i32> {
        if self.srq.is_some()
            || inner.state == RESET
            || work.sges.len() > self.cap.max_recv_sge as usize
        {
            return Err(libc::EINVAL);
        }
        if let (ERR, Some(code)) = (inner.state, self.habits().dead) {
            return Err(code);
        }
        if inner.state == ERR {
            self.fail_recv(work.wr_id, ibv_wc_status::IBV_WC_WR_FLUSH_ERR);
            return Ok(());
        }
        if inner.rq.len() >= self.cap.max_recv_wr as usize {
            return Err(self.habits().full);
        }
        inner.receives += 1;
        let used_before = inner.receives > u64::from(self.cap.max_recv_wr);
        if used_before
            && self.habits().receive_busy.is_some_and(|n| inner.receives.is_multiple_of(n))
        {
            return Err(-libc::EAGAIN);
        }
        inner.rq.push_back(work);
        Ok(())
    }

    /// After a post: its completion queues are armed, if that was put off.
    pub fn arm_deferred(&self) {
        self.send_cq.arm_deferred();
        self.recv_cq.arm_deferred();
    }

    /// The wire, once there is one.
    pub fn wire(&self) -> Option<&Arc<Link>> {
        self.link.get()
    }

    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// Does all that can be done now, under the lock.
    pub fn run(&self, inner: &mut Inner) -> bool {
        tally::LOOKS.count();
        let Some(link) = self.link.get() else { return false };
        let mut any = false;
        loop {
            let mut rang = 0;
            let served = inner.serve(self, link, &mut rang);
            let collected = inner.collect(self, link, &mut rang);
            let sent = inner.send(self, link, &mut rang);
            let completes = std::mem::take(&mut inner.completes_there) && rang != want::ALL;
            if rang != 0 && link.tell(rang, completes) {
                patience::watch(link);
            }
            if !(served || collected || sent) {
                let wishes = inner.wishes(link);
                if !inner.unmet(link, wishes) {
                    return any;
                }
            }
            any = true;
        }
    }

    /// Progress on a polling thread: false if another thread is at it already.
    pub fn progress_inline(&self) -> bool {
        let free = self.inner.try_lock();
        free.map(|mut inner| self.run(&mut inner)).is_ok()
    }

    /// Does all that can be done now.
    pub fn progress(&self) {
        let mut inner = self.inner.lock().unwrap();
        self.run(&mut inner);
    }

    /// The channel by which the other side may raise our completion events, and its
    /// number.
    pub fn channel_fd(&self) -> Option<(u64, RawFd)> {
        let channel = self.recv_cq.channel.as_ref()?;
        Some((channel.number, channel.notices.fd()))
    }

    /// The other process died.
    pub fn link_down(&self) {
        if self.link.get().is_some() {
            self.progress();
            self.recv_cq.make_sure();
            self.send_cq.make_sure();
        }
    }
}

impl Inner {
    fn merge(&mut self, from: &ibv_qp_attr, mask: u32, habits: &Habits) {
        let to = &mut self.attr;
        macro_rules! take {
            ($($bit:ident => $($field:ident),+;)*) => {
                $(if mask & mask::$bit != 0 { $(to.$field = from.$field;)+ })*
            };
        }
        take! {
            ACCESS_FLAGS => qp_access_flags;
            PKEY_INDEX => pkey_index;
            PORT => port_num;
            QKEY => qkey;
            AV => ah_attr;
            PATH_MTU => path_mtu;
            TIMEOUT => timeout;
            RETRY_CNT => retry_cnt;
            RNR_RETRY => rnr_retry;
            RQ_PSN => rq_psn;
            MAX_QP_RD_ATOMIC => max_rd_atomic;
            SQ_PSN => sq_psn;
            MAX_DEST_RD_ATOMIC => max_dest_rd_atomic;
            DEST_QPN => dest_qp_num;
        }
        if mask & mask::RNR_RETRY != 0 {
            self.rnr_left = from.rnr_retry;
        }
        let has_timer = matches!(habits.rnr, Rnr::Timed | Rnr::Refused);
        if mask & mask::MIN_RNR_TIMER != 0 && has_timer {
            to.min_rnr_timer = from.min_rnr_timer;
        }
    }

    pub fn allows(&self, access: u32) -> bool {
        self.attr.qp_access_flags & access == access
    }
}

/// Which attributes ibv_modify_qp is given.
pub mod mask {
    macro_rules! masks {
        ($($name:ident = $bit:ident;)*) => {
            $(pub const $name: u32 = rdma_sys::ibv_qp_attr_mask::$bit.0;)*
        };
    }
    masks! {
        STATE = IBV_QP_STATE;
        CUR_STATE = IBV_QP_CUR_STATE;
        ACCESS_FLAGS = IBV_QP_ACCESS_FLAGS;
        PKEY_INDEX = IBV_QP_PKEY_INDEX;
        PORT = IBV_QP_PORT;
        QKEY = IBV_QP_QKEY;
        AV = IBV_QP_AV;
        PATH_MTU = IBV_QP_PATH_MTU;
        TIMEOUT = IBV_QP_TIMEOUT;
        RETRY_CNT = IBV_QP_RETRY_CNT;
        RNR_RETRY = IBV_QP_RNR_RETRY;
        RQ_PSN = IBV_QP_RQ_PSN;
        MAX_QP_RD_ATOMIC = IBV_QP_MAX_QP_RD_ATOMIC;
        MIN_RNR_TIMER = IBV_QP_MIN_RNR_TIMER;
        SQ_PSN = IBV_QP_SQ_PSN;
        MAX_DEST_RD_ATOMIC = IBV_QP_MAX_DEST_RD_ATOMIC;
        DEST_QPN = IBV_QP_DEST_QPN;
    }
}

/// The attributes that a transition requires (table 91), or `None` if there is
/// no such transition.
fn required(from: ibv_qp_state::Type, to: ibv_qp_state::Type) -> Option<u32> {
    Some(match (from, to) {
        // Only what was initialised can fail.
        (RESET, ERR) => return None,
        (_, RESET | ERR) => 0,
        (RESET, INIT) => mask::PKEY_INDEX | mask::PORT | mask::ACCESS_FLAGS,
        (INIT, INIT) | (RTR, RTR) | (RTS, RTS) | (SQD, SQD) => 0,
        (INIT, RTR) => {
            mask::AV
                | mask::PATH_MTU
                | mask::DEST_QPN
                | mask::RQ_PSN
                | mask::MAX_DEST_RD_ATOMIC
                | mask::MIN_RNR_TIMER
        }
        (RTR, RTS) => {
            mask::TIMEOUT
                | mask::RETRY_CNT
                | mask::RNR_RETRY
                | mask::SQ_PSN
                | mask::MAX_QP_RD_ATOMIC
        }
        (RTS, SQD) | (SQD, RTS) => 0,
        _ => return None,
    })
}

/// Whether an access right is among a queue pair's.
pub fn right(kind: u8) -> u32 {
    if kind == super::work::kind::READ { keys::REMOTE_READ } else { keys::REMOTE_WRITE }
}
