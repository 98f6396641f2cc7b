// SPDX-License-Identifier: BSD-3-Clause
//! Completion queues and completion channels.

use super::context::{About, Context, unique};
use super::qp::{self, Qp};
use crate::board::{self, Mood, Place};
use crate::engine::engine;
use crate::fault::{self, Point};
use crate::fork;
use crate::handle::Acks;
use crate::notice::Notices;
use rdma_sys::*;
use std::collections::{HashMap, VecDeque};
use std::mem::zeroed;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock, Weak};
use std::time::Duration;

/// How long a planned fault waits for a batch to fill.
const BATCH_LIMIT: Duration = Duration::from_millis(5);

/// A completion channel.
#[repr(C)]
pub struct Channel {
    pub c: ibv_comp_channel,
    pub notices: Notices<Arc<Cq>>,
    pub users: AtomicUsize,
    /// Tells it from the process's other channels.
    pub number: u64,
    pub context: Arc<Context>,
    cqs: Mutex<Vec<Weak<Cq>>>,
}

// SAFETY: the C part is constant after creation.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    pub fn new(context: Arc<Context>) -> Option<Arc<Channel>> {
        let notices = Notices::new().ok()?;
        let c = ibv_comp_channel { context: context.as_c(), fd: notices.fd(), refcnt: 0 };
        let cqs = Mutex::new(Vec::new());
        let (users, number) = (AtomicUsize::new(0), unique());
        let channel = Arc::new(Channel { c, notices, users, number, context, cqs });
        channel.context.enter(&channel);
        Some(channel)
    }

    /// The next event; the error is an errno.
    pub fn next(&self) -> Result<Arc<Cq>, i32> {
        let pull = || {
            let cqs: Vec<_> = self.cqs.lock().unwrap().iter().filter_map(Weak::upgrade).collect();
            cqs.iter().any(|cq| cq.pull())
        };
        self.notices.pop(pull, |cq| cq.acks.reported())
    }

    /// A completion queue is being destroyed.
    pub fn leave(&self, cq: &Arc<Cq>) {
        self.notices.remove(|other| Arc::ptr_eq(other, cq));
        self.cqs.lock().unwrap().retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(cq)));
        self.users.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One completion.
pub struct Completion {
    pub wr_id: u64,
    pub status: ibv_wc_status::Type,
    pub opcode: ibv_wc_opcode::Type,
    pub byte_len: u32,
    pub imm: u32,
    pub flags: u32,
    pub qp: u32,
    /// The peer asked for a solicited event, or this is an error.
    pub solicited: bool,
    /// It raises no event.
    pub quiet: bool,
    /// The send queue whose slots up to this number are free once this is polled.
    pub frees: Option<(Arc<AtomicU64>, u64)>,
}

/// What an armed queue waits for.
#[derive(Clone, Copy, PartialEq)]
enum Armed {
    No,
    Solicited,
    Any,
}

struct Inner {
    queue: VecDeque<Completion>,
    armed: Armed,
    overrun: bool,
    /// Polls of a queue that is dead find nothing, where others say that it is.
    silent: bool,
    /// How it is to be armed by the next poll or post.
    deferred: Armed,
    /// Completions that a planned fault holds back.
    held: VecDeque<Completion>,
}

/// A completion queue.
#[repr(C)]
pub struct Cq {
    pub c: ibv_cq,
    inner: Mutex<Inner>,
    pub channel: Option<Arc<Channel>>,
    pub context: Arc<Context>,
    /// The queue pairs that complete here, by number.
    qps: RwLock<HashMap<u32, Arc<Qp>>>,
    /// Where on the process's notice board their other sides leave news.
    pub hook: u32,
    pub acks: Acks,
    pub async_acks: Acks,
    armed: AtomicBool,
    weak: Weak<Cq>,
}

// SAFETY: the C part is constant after creation.
unsafe impl Send for Cq {}
// SAFETY: as above.
unsafe impl Sync for Cq {}

impl Cq {
    pub fn new(
        context: Arc<Context>,
        cqe: i32,
        user: *mut std::ffi::c_void,
        channel: Option<Arc<Channel>>,
    ) -> Result<Arc<Cq>, i32> {
        if !(1..=context.habits().max_cqe).contains(&cqe) {
            return Err(libc::EINVAL);
        }
        if context.habits().cq_most.is_some_and(|most| cqe > most) {
            return Err(libc::ENOMEM);
        }
        // SAFETY: all zeroes is a valid ibv_cq (an initialised mutex and condition).
        let mut c: ibv_cq = unsafe { zeroed() };
        c.context = context.as_c();
        c.channel =
            channel.as_ref().map_or(std::ptr::null_mut(), |ch| (&raw const ch.c).cast_mut());
        c.cq_context = user;
        c.cqe = cqe;
        let hook = board::own().new_hook().ok_or(libc::ENOMEM)?;
        let inner = Inner {
            queue: VecDeque::new(),
            armed: Armed::No,
            overrun: false,
            silent: false,
            deferred: Armed::No,
            held: VecDeque::new(),
        };
        let cq = Arc::new_cyclic(|weak| Cq {
            c,
            inner: Mutex::new(inner),
            channel,
            context,
            qps: RwLock::new(HashMap::new()),
            hook,
            acks: Acks::default(),
            async_acks: Acks::default(),
            armed: AtomicBool::new(false),
            weak: weak.clone(),
        });
        if let Some(channel) = &cq.channel {
            channel.users.fetch_add(1, Ordering::Relaxed);
            channel.cqs.lock().unwrap().push(Arc::downgrade(&cq));
        }
        Ok(cq)
    }

    pub fn attach(&self, qp: &Arc<Qp>) {
        self.qps.write().unwrap().insert(qp.num, qp.clone());
    }
    pub fn detach(&self, qp: &Qp) {
        self.qps.write().unwrap().remove(&qp.num);
    }
    pub fn in_use(&self) -> bool {
        !self.qps.read().unwrap().is_empty()
    }

    /// Its channel's number, or 0.
    pub fn channel_number(&self) -> u64 {
        self.channel.as_ref().map_or(0, |channel| channel.number)
    }

    /// Adds a completion. A full queue is an overrun (11.6.3.1 "CQ Error"): the queue is
    /// dead from then on, and every queue pair on it with it.
    pub fn push(&self, completion: Completion) {
        // What is on its way when the device goes does not arrive any more.
        if self.context.device.is_gone() {
            return;
        }
        let mut inner = self.inner.lock().unwrap();
        if inner.overrun {
            return;
        }
        inner.silent = fault::strikes(Point::CompletionQueueError).is_some();
        if inner.silent || inner.queue.len() + inner.held.len() >= self.c.cqe as usize {
            inner.overrun = true;
            drop(inner);
            let Some(cq) = self.weak.upgrade() else { return };
            // Not here: the caller holds a queue pair's lock.
            engine().soon(move || cq.fail());
            return;
        }
        if fault::planned() && self.hold(&mut inner) {
            inner.held.push_back(completion);
            return;
        }
        self.show(&mut inner, completion);
    }

    /// A planned fault holds completions back, and with one all after it: for a
    /// time, or until there are enough, but not for ever.
    fn hold(&self, inner: &mut Inner) -> bool {
        let delay = fault::strikes(Point::CompletionDelay).map(Duration::from_micros);
        let batch = fault::strikes(Point::CompletionBatch);
        let wait = delay.or(batch.map(|_| BATCH_LIMIT));
        if let (Some(wait), true) = (wait, inner.held.is_empty()) {
            let weak = self.weak.clone();
            engine().after(wait, move || {
                if let Some(cq) = weak.upgrade() {
                    cq.release(&mut cq.inner.lock().unwrap());
                }
            });
        } else if batch.is_some_and(|n| inner.held.len() as u64 + 1 >= n) {
            self.release(inner);
            return false;
        }
        wait.is_some() || !inner.held.is_empty()
    }

    fn release(&self, inner: &mut Inner) {
        while let Some(completion) = inner.held.pop_front() {
            self.show(inner, completion);
        }
    }

    fn show(&self, inner: &mut Inner, completion: Completion) {
        let fire = match inner.armed {
            Armed::No => false,
            Armed::Solicited => completion.solicited,
            Armed::Any => true,
        };
        let fire = fire && !completion.quiet;
        inner.queue.push_back(completion);
        if fire {
            self.fire(inner, Notices::push_signalled);
        }
    }

    /// Queues the event; `signalled` is how to if another process has raised it already.
    fn fire(&self, inner: &mut Inner, signalled: fn(&Notices<Arc<Cq>>, Arc<Cq>)) {
        inner.armed = Armed::No;
        self.armed.store(false, Ordering::SeqCst);
        if fault::strikes(Point::EventLost).is_some() {
            board::own().board.set_mood(self.hook, Mood::Away);
            return;
        }
        let told = board::own().board.set_mood(self.hook, Mood::Told) == Mood::Told;
        if let (Some(channel), Some(cq)) = (&self.channel, self.weak.upgrade()) {
            for _ in 1..self.context.habits().events {
                channel.notices.push(cq.clone());
            }
            let push = if told { signalled } else { Notices::push };
            push(&channel.notices, cq);
        }
    }

    /// True if another process has raised the event, and nobody here has noticed yet.
    fn is_raised(&self) -> bool {
        self.armed.load(Ordering::SeqCst) && board::own().board.mood(self.hook) == Mood::Told
    }

    /// A process that was connected here died. If it had just taken it upon itself to
    /// raise the event, its signal may be missing.
    pub fn make_sure(&self) {
        if let Some(channel) = &self.channel
            && (self.is_raised() || channel.notices.waiting())
        {
            channel.notices.signal();
        }
    }

    /// If another process has raised the event, queues it for the caller and places what
    /// was sent; false if there is nothing of the kind.
    fn pull(&self) -> bool {
        let raised = self.is_raised();
        if raised {
            let mut inner = self.inner.lock().unwrap();
            // It was raised, so it is delivered, whatever becomes of its reason.
            if self.is_raised() {
                self.fire(&mut inner, Notices::push_for_caller);
            }
            drop(inner);
            self.look(true);
        }
        raised
    }

    /// Makes progress on the queue pairs for which there is news; true if there was any.
    /// Without `patient`, what another thread is at is left for the next time.
    pub fn look(&self, patient: bool) -> bool {
        let board = &board::own().board;
        let mut any = false;
        board.take(self.hook, |slip| {
            let Some(qp) = qp::by_slip(slip) else { return };
            any = true;
            if patient {
                qp.progress();
            } else if !qp.progress_inline() {
                board.hang(Place { slip, hook: self.hook }, false);
            }
        });
        any
    }

    fn fail(self: Arc<Self>) {
        self.context.notify(ibv_event_type::IBV_EVENT_CQ_ERR, About::Cq(self.clone()));
        for qp in self.qps.read().unwrap().values() {
            qp.fatal();
        }
    }

    /// Takes up to `n` completions. When none is there, looks for work that the
    /// progress thread has not done yet: a polling application waits for nobody.
    ///
    /// # Safety
    /// `out` has room for `n` completions.
    pub unsafe fn poll(&self, n: i32, out: *mut ibv_wc) -> i32 {
        if fault::strikes(Point::Poll).is_some() {
            // As providers do that meet one they can't make sense of: what they took before is
            // there, and how much that was is not told.
            self.look(true);
            // SAFETY: the caller's word.
            unsafe { self.take(n - 1, out) };
            return -1;
        }
        // SAFETY: the caller's word, here and below.
        let mut taken = unsafe { self.take(n, out) };
        if taken == 0 && self.look(false) {
            // SAFETY: as above.
            taken = unsafe { self.take(n, out) };
        }
        self.arm_deferred();
        taken
    }

    unsafe fn take(&self, n: i32, out: *mut ibv_wc) -> i32 {
        let mut inner = self.inner.lock().unwrap();
        if inner.overrun && inner.queue.is_empty() {
            return if inner.silent { 0 } else { -1 };
        }
        let mut taken = 0;
        while taken < n
            && let Some(completion) = inner.queue.pop_front()
        {
            if let Some((released, upto)) = &completion.frees {
                released.fetch_max(*upto, Ordering::Relaxed);
            }
            // SAFETY: below `n`, for which the caller has room.
            unsafe { out.add(taken as usize).write(completion.to_c()) };
            taken += 1;
        }
        taken
    }

    /// Arms the queue for one event (11.4.2.2 "Request Completion Notification").
    pub fn arm(&self, solicited_only: bool) {
        let how = if solicited_only { Armed::Solicited } else { Armed::Any };
        if self.context.habits().deferred_arm {
            let mut inner = self.inner.lock().unwrap();
            if inner.deferred != Armed::Any {
                inner.deferred = how;
            }
            return;
        }
        self.arm_now(how);
    }

    /// Arms the queue if that was put off. What is there already raises the event at once: by
    /// its arming a device learns how far the application has polled.
    pub fn arm_deferred(&self) {
        if !self.context.habits().deferred_arm {
            return;
        }
        let how = std::mem::replace(&mut self.inner.lock().unwrap().deferred, Armed::No);
        if how == Armed::No {
            return;
        }
        self.arm_now(how);
        let mut inner = self.inner.lock().unwrap();
        if inner.armed != Armed::No && !inner.queue.is_empty() {
            self.fire(&mut inner, Notices::push_signalled);
        }
    }

    fn arm_now(&self, how: Armed) {
        {
            let mut inner = self.inner.lock().unwrap();
            // A request for any completion is not weakened by a later one.
            if inner.armed != Armed::Any {
                inner.armed = how;
            }
            self.armed.store(true, Ordering::SeqCst);
            if self.channel.is_none() {
                return;
            }
            // Another process can't know what a planned fault or a request for
            // solicited completions makes of its message.
            let direct =
                inner.armed == Armed::Any && !fault::planned() && self.context.habits().events == 1;
            let mood = if direct { Mood::Armed } else { Mood::Indirect };
            board::own().board.set_mood(self.hook, mood);
        }
        // What came before is completed now, and raises the event.
        self.look(true);
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        if !fork::in_child() {
            board::own().free_hook(self.hook);
        }
    }
}

impl Completion {
    fn to_c(&self) -> ibv_wc {
        // SAFETY: all zeroes is a valid ibv_wc.
        let mut wc: ibv_wc = unsafe { zeroed() };
        wc.wr_id = self.wr_id;
        wc.status = self.status;
        wc.opcode = self.opcode;
        wc.byte_len = self.byte_len;
        wc.imm_data_invalidated_rkey_union.imm_data = self.imm;
        wc.qp_num = self.qp;
        wc.wc_flags = self.flags;
        wc
    }
}
