// SPDX-License-Identifier: BSD-3-Clause
//! The requester: sends what is posted, collects acknowledgements and READ data,
//! and completes work requests in the order of their posting (9.7.1, 9.7.5, 10.8.3.3).

use super::qp::{ERR, Inner, Qp, RTS, SQD};
use super::responder::Inbound;
use super::work::*;
use crate::engine::engine;
use crate::fault::{self, Point};
use crate::habits::ZeroWrite;
use crate::keys::{self, Grant};
use crate::link::{Link, want};
use rdma_sys::ibv_wc_status::{self, *};
use std::time::Duration;

/// Copied before the other side is told, so that both sides work at once.
const CHUNK: usize = 64 * 1024;

enum Step {
    Done,
    Blocked,
    Failed(ibv_wc_status::Type),
}

impl Inner {
    /// Puts as much of the send queue on the wire as fits.
    pub fn send(&mut self, qp: &Qp, link: &Link, rang: &mut u32) -> bool {
        let mut any = false;
        while self.state == RTS && self.sent < self.sq.len() {
            let before = self.sending;
            match self.send_one(qp, link, rang) {
                Step::Done => {
                    self.sent += 1;
                    self.sending = None;
                    any = true;
                }
                Step::Blocked => {
                    any |= self.sending != before;
                    break;
                }
                Step::Failed(status) => {
                    // What was sent before it completes first, in order.
                    if self.sent == 0 {
                        self.fail_front(qp, status);
                        any = true;
                    }
                    break;
                }
            }
        }
        any
    }

    fn send_one(&mut self, qp: &Qp, link: &Link, rang: &mut u32) -> Step {
        let work = &mut self.sq[self.sent];
        if work.fence && self.reads > 0 {
            return Step::Blocked;
        }
        let header = match &work.operation {
            Operation::Request(header) => *header,
            local => {
                if !execute_local(qp, local) {
                    return Step::Failed(IBV_WC_MW_BIND_ERR);
                }
                work.request = self.requests;
                return Step::Done;
            }
        };
        let len = if header.kind == kind::READ { 0 } else { header.len as usize };
        let ring = link.requests_out();
        if self.sending.is_none() {
            ring.rewind();
            if ring.room() < HEADER {
                return Step::Blocked;
            }
            if header.is_write_of_nothing() {
                match qp.habits().zero_write {
                    ZeroWrite::Arrives => {}
                    ZeroWrite::NeedsKey if header.rkey != 0 => {}
                    ZeroWrite::NeedsKey | ZeroWrite::Fails => {
                        return Step::Failed(IBV_WC_LOC_QP_OP_ERR);
                    }
                }
            }
            // A gather list that is not allowed fails before anything is sent.
            if work.inline.is_none() {
                let access = if header.kind == kind::READ { keys::LOCAL_WRITE } else { 0 };
                let keys = keys::read();
                if !walk(&keys, qp.pd.pd.id, &work.sges, access, 0, header.len as usize, |_, _| ())
                {
                    return Step::Failed(IBV_WC_LOC_PROT_ERR);
                }
            }
            // SAFETY: a header's worth of room was found.
            unsafe { ring.put(0, (&raw const header).cast(), HEADER) };
            ring.publish(HEADER);
            self.requests += 1;
            work.request = self.requests;
            if header.kind == kind::READ {
                self.reads += 1;
            }
            self.sending = Some(0);
            *rang |= want::REQUEST;
        }
        let mut offset = self.sending.unwrap_or(0);
        while offset < len {
            let n = ring.room().min(len - offset).min(CHUNK);
            if n == 0 {
                self.sending = Some(offset);
                return Step::Blocked;
            }
            if let Some(data) = &work.inline {
                // SAFETY: within the data and the room.
                unsafe { ring.put(0, data.as_ptr().add(offset), n) };
            } else {
                let keys = keys::read();
                let mut at = 0;
                let ok = walk(&keys, qp.pd.pd.id, &work.sges, 0, offset, n, |p, m| {
                    // SAFETY: registered memory, held by the key table's lock.
                    unsafe { ring.put(at, p, m) };
                    at += m;
                });
                if !ok {
                    self.sending = Some(offset);
                    return Step::Failed(IBV_WC_LOC_PROT_ERR);
                }
            }
            ring.publish(n);
            offset += n;
            self.sending = Some(offset);
            if offset < len {
                link.tell(want::REQUEST, false);
            }
        }
        *rang |= want::REQUEST;
        self.completes_there |= header.kind == kind::SEND || header.flags & flag::IMM != 0;
        Step::Done
    }

    /// The send at the front ends with an error, and the queue pair with it.
    fn fail_front(&mut self, qp: &Qp, status: ibv_wc_status::Type) {
        if let Some(work) = self.sq.pop_front() {
            qp.complete_send(&work, status);
        }
        qp.enter_error(self);
    }

    /// Completes what is acknowledged and acts on negative acknowledgements.
    pub fn collect(&mut self, qp: &Qp, link: &Link, rang: &mut u32) -> bool {
        if !matches!(self.state, RTS | SQD) || self.sq.is_empty() {
            return false;
        }
        // Before the count: a NAK is stored after the last acknowledgement.
        let nak = link.nak();
        let gone = link.peer_gone();
        let acked = link.acked();
        let mut any = false;
        if acked != self.acked_seen {
            self.acked_seen = acked;
            self.rnr_left = self.attr.rnr_retry;
        }
        while self.sent > 0 {
            let front = &self.sq[0];
            if let Operation::Request(Header { kind: kind::READ, len, .. }) = front.operation {
                let before = self.read_offset;
                if !self.receive_read(qp, link, len as usize, rang) {
                    self.fail_front(qp, IBV_WC_LOC_PROT_ERR);
                    return true;
                }
                any |= self.read_offset != before;
                if self.read_offset < len as usize || self.sq[0].request > acked {
                    break;
                }
                self.read_offset = 0;
                self.reads -= 1;
            } else if front.request > acked {
                break;
            }
            if let Some(status) = fault::strikes(Point::SendError) {
                self.fail_front(qp, status as ibv_wc_status::Type);
                return true;
            }
            let work = self.sq.pop_front().expect("sent is not beyond the queue");
            self.sent -= 1;
            qp.complete_send(&work, IBV_WC_SUCCESS);
            any = true;
        }
        if self.sq.is_empty() {
            return any;
        }
        let (rnr, timer) = link.rnr();
        if nak != 0 {
            self.fail_front(qp, nak_status(nak));
            return true;
        }
        if rnr > self.rnr_seen {
            self.rnr_seen = rnr;
            any = true;
            self.receiver_not_ready(qp, rnr, timer);
        } else if gone && !self.giving_up && link.acked() == acked {
            self.giving_up = true;
            self.give_up_later(qp);
        }
        any
    }

    /// Takes the data of the READ at the front as far as it has come.
    fn receive_read(&mut self, qp: &Qp, link: &Link, len: usize, rang: &mut u32) -> bool {
        let ring = link.responses_in();
        while self.read_offset < len {
            let n = ring.filled().min(len - self.read_offset).min(CHUNK);
            if n == 0 {
                break;
            }
            let keys = keys::read();
            let mut at = 0;
            let sges = &self.sq[0].sges;
            let ok =
                walk(&keys, qp.pd.pd.id, sges, keys::LOCAL_WRITE, self.read_offset, n, |p, m| {
                    // SAFETY: registered memory, held by the key table's lock.
                    unsafe { ring.get(at, p, m) };
                    at += m;
                });
            if !ok {
                return false;
            }
            ring.consume(n);
            self.read_offset += n;
            *rang |= want::RESPONSE_ROOM;
        }
        true
    }

    /// 9.7.5.2.8: waits as long as the responder asks, then tries again, as often
    /// as the connection allows; 7 means for ever.
    fn receiver_not_ready(&mut self, qp: &Qp, number: u64, timer: u8) {
        if self.attr.rnr_retry != 7 {
            if self.rnr_left == 0 {
                self.fail_front(qp, IBV_WC_RNR_RETRY_EXC_ERR);
                return;
            }
            self.rnr_left -= 1;
        }
        let Some(qp) = qp.strong() else { return };
        engine().after(rnr_delay(timer), move || qp.retry_after_rnr(number));
    }

    /// 9.7.6.1.3: nobody acknowledges any more; after the connection's timeouts the
    /// transport retry counter is exceeded.
    fn give_up_later(&mut self, qp: &Qp) {
        // 4.096 us times two to the timeout, for each try.
        let once = Duration::from_nanos(4096) * (1u32 << self.attr.timeout.min(31));
        let delay = once * (u32::from(self.attr.retry_cnt) + 1);
        let Some(qp) = qp.strong() else { return };
        engine().after(delay, move || qp.give_up());
    }

    /// What must wake us when we sleep now; asks the other side for it.
    pub fn wishes(&mut self, link: &Link) -> u32 {
        let mut wishes = 0;
        if matches!(self.state, RTS | SQD) && !self.sq.is_empty() {
            if self.state == RTS && self.sent < self.sq.len() {
                wishes |= want::ROOM;
            }
            if self.reads > 0 {
                wishes |= want::RESPONSE;
                link.ask_ack(self.sq[0].request, want::ACK);
            } else if self.sent < self.sq.len() {
                if self.sent > 0 {
                    link.ask_ack(self.sq[0].request, want::ACK);
                }
            } else if let Some(work) = self.sq.iter().find(|work| work.signaled) {
                link.ask_ack(work.request, want::COMPLETION);
            }
        }
        if matches!(self.inbound, Inbound::Answer { .. }) {
            wishes |= want::RESPONSE_ROOM;
        }
        if wishes != 0 {
            link.ask(wishes);
        }
        wishes
    }

    /// True if something wished for has come in the meantime, or requests wait.
    pub fn unmet(&self, link: &Link, wishes: u32) -> bool {
        if self.state == ERR {
            return false;
        }
        let news = !self.sq.is_empty() && self.sent > 0 && link.acked() > self.acked_seen;
        let room = wishes & want::ROOM != 0
            && link.requests_out().room() >= HEADER
            && !self.sq.get(self.sent).is_some_and(|w| w.fence && self.reads > 0);
        let data = wishes & want::RESPONSE != 0
            && self.sent > 0
            && link.responses_in().filled() > 0
            && self.front_is_read();
        let answer = wishes & want::RESPONSE_ROOM != 0 && link.responses_out().room() > 0;
        let requests = self.can_serve(link);
        news || room || data || answer || requests
    }

    fn front_is_read(&self) -> bool {
        matches!(
            self.sq.front().map(|w| &w.operation),
            Some(Operation::Request(Header { kind: kind::READ, .. }))
        )
    }
}

impl Qp {
    fn retry_after_rnr(&self, number: u64) {
        let mut inner = self.lock();
        if let (RTS | SQD, Some(link)) = (inner.state, self.wire()) {
            link.retry(number);
            link.tell(want::ALL, false);
            self.run(&mut inner);
        }
    }

    fn give_up(&self) {
        let mut inner = self.lock();
        inner.giving_up = false;
        if !matches!(inner.state, RTS | SQD) {
            return;
        }
        // An answer that came in time still counts.
        self.run(&mut inner);
        inner.giving_up = false;
        if matches!(inner.state, RTS | SQD) && !inner.sq.is_empty() {
            inner.fail_front(self, IBV_WC_RETRY_EXC_ERR);
        }
    }
}

fn nak_status(nak: u32) -> ibv_wc_status::Type {
    match nak {
        nak::INVALID_REQUEST => IBV_WC_REM_INV_REQ_ERR,
        nak::ACCESS => IBV_WC_REM_ACCESS_ERR,
        _ => IBV_WC_REM_OP_ERR,
    }
}

/// Binds or invalidates a memory window (10.6.7).
fn execute_local(qp: &Qp, operation: &Operation) -> bool {
    let pd = qp.pd.pd.id;
    match *operation {
        Operation::Request(_) => true,
        Operation::Invalidate(key) => keys::unbind(key, pd),
        Operation::Bind { mw_key, new_key, mr_key, addr, length, access } => {
            if new_key >> 8 != mw_key >> 8 {
                return false;
            }
            if length == 0 {
                // A bind of no bytes takes the window's rights away.
                return true;
            }
            let region = keys::read().live(mr_key).cloned();
            let Some(region) = region else { return false };
            let offset = addr.wrapping_sub(region.iova);
            let inside = offset <= region.length && length <= region.length - offset;
            let writes = access & (keys::REMOTE_WRITE | keys::REMOTE_ATOMIC) != 0;
            // 10.6.7.2.1: the region must permit binding, and local writes if
            // the window permits remote ones.
            if !inside
                || region.access & keys::MW_BIND == 0
                || writes && region.access & keys::LOCAL_WRITE == 0
            {
                return false;
            }
            let grant = Grant {
                pd,
                iova: if access & keys::ZERO_BASED != 0 { 0 } else { addr },
                length,
                base: region.base.wrapping_add(offset as usize),
                access,
                qp: Some(qp.num),
                region: None,
                windows: 0,
            };
            keys::bind(new_key, mr_key, grant)
        }
    }
}

/// Table 45: the RNR NAK timer field.
pub fn rnr_delay(timer: u8) -> Duration {
    const MICROS: [u64; 32] = [
        655_360, 10, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 640, 960, 1_280, 1_920, 2_560,
        3_840, 5_120, 7_680, 10_240, 15_360, 20_480, 30_720, 40_960, 61_440, 81_920, 122_880,
        163_840, 245_760, 327_680, 491_520,
    ];
    Duration::from_micros(MICROS[usize::from(timer & 31)])
}
