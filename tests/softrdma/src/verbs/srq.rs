// SPDX-License-Identifier: BSD-3-Clause
//! Shared receive queues (10.2.9).

use super::context::{About, Context, limit};
use super::memory::{InPd, Pd};
use super::work::RecvWork;
use crate::handle::Acks;
use rdma_sys::*;
use std::collections::VecDeque;
use std::mem::zeroed;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, Weak};

struct Inner {
    queue: VecDeque<RecvWork>,
    max_wr: u32,
    limit: u32,
}

/// A shared receive queue.
#[repr(C)]
pub struct Srq {
    pub c: ibv_srq,
    inner: Mutex<Inner>,
    pub max_sge: u32,
    pub pd: InPd,
    pub context: Arc<Context>,
    pub users: AtomicUsize,
    pub async_acks: Acks,
    weak: Weak<Srq>,
}

// SAFETY: the C part is constant after creation.
unsafe impl Send for Srq {}
// SAFETY: as above.
unsafe impl Sync for Srq {}

impl Srq {
    pub fn new(
        pd: Arc<Pd>,
        attr: &ibv_srq_attr,
        user: *mut std::ffi::c_void,
    ) -> Result<Arc<Srq>, i32> {
        if attr.max_wr == 0 || attr.max_wr > limit::SRQ_WR || attr.max_sge > limit::SGE {
            return Err(libc::EINVAL);
        }
        // SAFETY: all zeroes is a valid ibv_srq.
        let mut c: ibv_srq = unsafe { zeroed() };
        c.context = pd.context.as_c();
        c.srq_context = user;
        c.pd = (&raw const pd.c).cast_mut();
        Ok(Arc::new_cyclic(|weak| Srq {
            c,
            inner: Mutex::new(Inner { queue: VecDeque::new(), max_wr: attr.max_wr, limit: 0 }),
            max_sge: attr.max_sge.max(1),
            context: pd.context.clone(),
            pd: InPd::new(pd),
            users: AtomicUsize::new(0),
            async_acks: Acks::default(),
            weak: weak.clone(),
        }))
    }

    /// Posts one receive; false when the queue is full.
    pub fn post(&self, work: RecvWork) -> bool {
        let mut inner = self.inner.lock().unwrap();
        let room = inner.queue.len() < inner.max_wr as usize;
        if room {
            inner.queue.push_back(work);
        }
        room
    }

    /// Takes the oldest receive; falling below the limit is told once (10.2.9.1).
    pub fn pop(&self) -> Option<RecvWork> {
        let mut inner = self.inner.lock().unwrap();
        let work = inner.queue.pop_front();
        if work.is_some() && (inner.queue.len() as u32) < inner.limit {
            inner.limit = 0;
            if let Some(srq) = self.weak.upgrade() {
                self.context.notify(ibv_event_type::IBV_EVENT_SRQ_LIMIT_REACHED, About::Srq(srq));
            }
        }
        work
    }

    /// Returns what was popped and not used.
    pub fn put_back(&self, work: RecvWork) {
        self.inner.lock().unwrap().queue.push_front(work);
    }

    pub fn modify(&self, attr: &ibv_srq_attr, mask: u32) -> i32 {
        let mut inner = self.inner.lock().unwrap();
        let max_wr = if mask & 1 != 0 { attr.max_wr } else { inner.max_wr };
        if max_wr == 0 || max_wr > limit::SRQ_WR || (max_wr as usize) < inner.queue.len() {
            return libc::EINVAL;
        }
        if mask & 2 != 0 {
            if attr.srq_limit > max_wr {
                return libc::EINVAL;
            }
            inner.limit = attr.srq_limit;
        }
        inner.max_wr = max_wr;
        0
    }

    pub fn query(&self, attr: &mut ibv_srq_attr) {
        let inner = self.inner.lock().unwrap();
        attr.max_wr = inner.max_wr;
        attr.max_sge = self.max_sge;
        attr.srq_limit = inner.limit;
    }
}
