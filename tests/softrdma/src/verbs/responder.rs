// SPDX-License-Identifier: BSD-3-Clause
//! The responder: executes the other side's requests in order, checks each
//! access, places the data, and acknowledges (9.7.4, 9.7.5, 9.9.3).

use super::cq::Completion;
use super::qp::{Inner, Qp, RTR, RTS, SQD, right};
use super::work::*;
use crate::fault::{self, Point};
use crate::habits::Rnr;
use crate::keys;
use crate::link::{Link, want};
use rdma_sys::{ibv_event_type, ibv_wc_flags, ibv_wc_opcode, ibv_wc_status};

const CHUNK: usize = 64 * 1024;

/// What the responder is at.
pub enum Inbound {
    /// Between two requests.
    Idle,
    /// The receive queue was empty when a SEND came; waits for RNR retry `n`.
    NotReady(u64),
    /// The same, for a WRITE with immediate whose data is placed already.
    NotReadyAtEnd(u64, Header),
    /// Placing a request's payload.
    Place { header: Header, offset: usize, recv: Option<RecvWork> },
    /// Sending the data that a READ asked for.
    Answer { header: Header, offset: usize },
}

impl Inbound {
    /// The receive that was taken from its queue and is not complete.
    pub fn into_recv(self) -> Option<RecvWork> {
        match self {
            Inbound::Place { recv, .. } => recv,
            _ => None,
        }
    }
}

/// Why a request can't be executed: what the receive's completion says, what the
/// requester is told, and the event that this side gets.
struct Violation {
    local: ibv_wc_status::Type,
    nak: u32,
    event: Option<ibv_event_type>,
}

const ACCESS: Violation = Violation {
    local: ibv_wc_status::IBV_WC_LOC_ACCESS_ERR,
    nak: nak::ACCESS,
    event: Some(ibv_event_type::IBV_EVENT_QP_ACCESS_ERR),
};
const INVALID: Violation = Violation {
    local: ibv_wc_status::IBV_WC_REM_INV_REQ_ERR,
    nak: nak::INVALID_REQUEST,
    event: Some(ibv_event_type::IBV_EVENT_QP_REQ_ERR),
};
const TOO_LONG: Violation =
    Violation { local: ibv_wc_status::IBV_WC_LOC_LEN_ERR, nak: nak::INVALID_REQUEST, event: None };
const BAD_RECEIVE: Violation =
    Violation { local: ibv_wc_status::IBV_WC_LOC_PROT_ERR, nak: nak::OPERATIONAL, event: None };
/// As iWARP has it, where nothing is ever tried again.
const NO_RECEIVE: Violation = Violation {
    local: ibv_wc_status::IBV_WC_FATAL_ERR,
    nak: nak::OPERATIONAL,
    event: Some(ibv_event_type::IBV_EVENT_QP_FATAL),
};
/// Soft-RoCE checks a shared receive's buffers against the queue pair's domain.
const FOREIGN_RECEIVE: Violation =
    Violation { local: ibv_wc_status::IBV_WC_LOC_QP_OP_ERR, nak: nak::OPERATIONAL, event: None };

impl Inner {
    /// True if the other side has requests that we could go on with now.
    pub fn can_serve(&self, link: &Link) -> bool {
        if !matches!(self.state, RTR | RTS | SQD) || link.severed() {
            return false;
        }
        match &self.inbound {
            Inbound::Idle => link.requests_in().filled() >= HEADER,
            Inbound::Place { .. } => link.requests_in().filled() > 0,
            Inbound::Answer { .. } => link.responses_out().room() > 0,
            Inbound::NotReady(n) | Inbound::NotReadyAtEnd(n, _) => link.retried() >= *n,
        }
    }

    /// Executes what has come of the other side's requests.
    pub fn serve(&mut self, qp: &Qp, link: &Link, rang: &mut u32) -> bool {
        let mut any = false;
        while self.can_serve(link) {
            any = true;
            let step = match std::mem::replace(&mut self.inbound, Inbound::Idle) {
                Inbound::Idle => self.begin(qp, link, rang),
                Inbound::NotReady(_) => self.begin(qp, link, rang),
                Inbound::NotReadyAtEnd(_, header) => self.end(qp, link, rang, header, None),
                Inbound::Place { header, offset, recv } => {
                    self.place(qp, link, rang, header, offset, recv)
                }
                Inbound::Answer { header, offset } => self.answer(qp, link, rang, header, offset),
            };
            if let Err((violation, recv)) = step {
                self.violate(qp, link, violation, recv);
            }
        }
        any
    }

    fn violate(&mut self, qp: &Qp, link: &Link, violation: Violation, recv: Option<RecvWork>) {
        link.refuse(violation.nak);
        if let Some(recv) = recv {
            qp.fail_recv(recv.wr_id, violation.local);
        }
        if let Some(event) = violation.event {
            qp.notify(event);
        }
        qp.enter_error(self);
    }

    fn begin(&mut self, qp: &Qp, link: &Link, rang: &mut u32) -> Result<(), Stop> {
        let ring = link.requests_in();
        let mut header = Header::default();
        // SAFETY: a whole header is there.
        unsafe { ring.get(0, (&raw mut header).cast(), HEADER) };
        let mut recv = None;
        match header.kind {
            kind::SEND => {
                recv = self.next_recv(qp);
                if recv.is_none() || fault::strikes(Point::ReceiverNotReady).is_some() {
                    self.put_back(qp, recv.take());
                }
                let Some(work) = &recv else {
                    if qp.habits().rnr == Rnr::Missing {
                        return Err((NO_RECEIVE, None));
                    }
                    let n = link.not_ready(self.attr.min_rnr_timer);
                    self.inbound = Inbound::NotReady(n);
                    *rang = want::ALL;
                    return Ok(());
                };
                if total(&work.sges) < u64::from(header.len) {
                    return Err((TOO_LONG, recv));
                }
            }
            kind::WRITE | kind::READ => {
                if !self.allows(right(header.kind)) {
                    return Err((INVALID, None));
                }
                if !permitted(qp, &header) {
                    return Err((ACCESS, None));
                }
            }
            _ => return Err((INVALID, None)),
        }
        ring.consume(HEADER);
        if header.kind == kind::READ {
            return self.answer(qp, link, rang, header, 0);
        }
        self.place(qp, link, rang, header, 0, recv)
    }

    fn next_recv(&mut self, qp: &Qp) -> Option<RecvWork> {
        match &qp.srq {
            Some(srq) => srq.pop(),
            None => self.rq.pop_front(),
        }
    }

    /// A planned fault pretends that there is no receive.
    fn put_back(&mut self, qp: &Qp, recv: Option<RecvWork>) {
        match (recv, &qp.srq) {
            (Some(recv), Some(srq)) => srq.put_back(recv),
            (Some(recv), None) => self.rq.push_front(recv),
            (None, _) => {}
        }
    }

    fn place(
        &mut self,
        qp: &Qp,
        link: &Link,
        rang: &mut u32,
        header: Header,
        mut offset: usize,
        recv: Option<RecvWork>,
    ) -> Result<(), Stop> {
        let ring = link.requests_in();
        let len = header.len as usize;
        while offset < len {
            let n = ring.filled().min(len - offset).min(CHUNK);
            if n == 0 {
                self.inbound = Inbound::Place { header, offset, recv };
                return Ok(());
            }
            let keys = keys::read();
            if let Some(work) = &recv {
                if qp.srq.as_ref().is_some_and(|srq| srq.pd.pd.id != qp.pd.pd.id) {
                    return Err((FOREIGN_RECEIVE, recv));
                }
                let mut at = 0;
                let ok =
                    walk(&keys, qp.pd.pd.id, &work.sges, keys::LOCAL_WRITE, offset, n, |p, m| {
                        // SAFETY: registered memory, held by the key table's lock.
                        unsafe { ring.get(at, p, m) };
                        at += m;
                    });
                if !ok {
                    return Err((BAD_RECEIVE, recv));
                }
            } else {
                let addr = header.addr.wrapping_add(offset as u64);
                let pd = qp.pd.pd.id;
                let to = keys.remote(header.rkey, pd, qp.num, addr, n as u64, keys::REMOTE_WRITE);
                let Some(to) = to else { return Err((ACCESS, None)) };
                // SAFETY: registered memory, held by the key table's lock.
                unsafe { ring.get(0, to, n) };
            }
            drop(keys);
            ring.consume(n);
            offset += n;
            if ring.room() >= ring.filled() {
                link.tell(want::ROOM, false);
            }
        }
        self.end(qp, link, rang, header, recv)
    }

    /// The payload is placed: completes the receive, if the request takes one.
    fn end(
        &mut self,
        qp: &Qp,
        link: &Link,
        rang: &mut u32,
        header: Header,
        recv: Option<RecvWork>,
    ) -> Result<(), Stop> {
        let with_imm = header.flags & flag::IMM != 0;
        let mut recv = recv;
        if header.kind == kind::WRITE && with_imm {
            recv = self.next_recv(qp);
            if recv.is_none() || fault::strikes(Point::ReceiverNotReady).is_some() {
                self.put_back(qp, recv.take());
                if qp.habits().rnr == Rnr::Missing {
                    return Err((NO_RECEIVE, None));
                }
                let n = link.not_ready(self.attr.min_rnr_timer);
                self.inbound = Inbound::NotReadyAtEnd(n, header);
                *rang = want::ALL;
                return Ok(());
            }
        }
        if recv.is_some()
            && let Some(status) = fault::strikes(Point::ReceiveError)
        {
            let local = status as ibv_wc_status::Type;
            return Err((Violation { local, nak: nak::OPERATIONAL, event: None }, recv));
        }
        let mut flags = 0;
        if with_imm {
            flags |= ibv_wc_flags::IBV_WC_WITH_IMM.0;
        }
        if header.flags & flag::INVALIDATE != 0 {
            if !keys::unbind(header.imm, qp.pd.pd.id) {
                return Err((ACCESS, recv));
            }
            flags |= ibv_wc_flags::IBV_WC_WITH_INV.0;
        }
        if let Some(recv) = recv {
            qp.recv_cq.push(Completion {
                wr_id: recv.wr_id,
                status: ibv_wc_status::IBV_WC_SUCCESS,
                opcode: if header.kind == kind::WRITE {
                    ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM
                } else {
                    ibv_wc_opcode::IBV_WC_RECV
                },
                byte_len: header.len,
                imm: header.imm,
                flags,
                qp: qp.num,
                solicited: header.flags & flag::SOLICITED != 0,
                quiet: false,
                frees: None,
            });
        }
        self.acknowledge(link, rang);
        Ok(())
    }

    fn acknowledge(&mut self, link: &Link, rang: &mut u32) {
        if fault::strikes(Point::LoseTransfer).is_some() {
            link.sever();
        }
        self.executed += 1;
        link.acknowledge(self.executed);
        *rang |= want::ACK | want::COMPLETION | want::ROOM;
    }

    fn answer(
        &mut self,
        qp: &Qp,
        link: &Link,
        rang: &mut u32,
        header: Header,
        mut offset: usize,
    ) -> Result<(), Stop> {
        let ring = link.responses_out();
        let len = header.len as usize;
        if offset == 0 {
            ring.rewind();
        }
        while offset < len {
            let n = ring.room().min(len - offset).min(CHUNK);
            if n == 0 {
                self.inbound = Inbound::Answer { header, offset };
                *rang |= want::RESPONSE;
                return Ok(());
            }
            let keys = keys::read();
            let addr = header.addr.wrapping_add(offset as u64);
            let pd = qp.pd.pd.id;
            let from = keys.remote(header.rkey, pd, qp.num, addr, n as u64, keys::REMOTE_READ);
            let Some(from) = from else { return Err((ACCESS, None)) };
            // SAFETY: registered memory, held by the key table's lock.
            unsafe { ring.put(0, from, n) };
            ring.publish(n);
            offset += n;
            link.tell(want::RESPONSE, false);
        }
        self.acknowledge(link, rang);
        Ok(())
    }
}

type Stop = (Violation, Option<RecvWork>);

/// Checks a request's whole range before any of it is placed. A request for no
/// bytes names no memory, so its key is not looked at (C9-88).
fn permitted(qp: &Qp, header: &Header) -> bool {
    let len = u64::from(header.len);
    let pd = qp.pd.pd.id;
    len == 0
        || keys::read()
            .remote(header.rkey, pd, qp.num, header.addr, len, right(header.kind))
            .is_some()
}
