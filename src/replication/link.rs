// SPDX-License-Identifier: BSD-3-Clause
//! How a link comes about. The server waits for one handler call, which says that the connection
//! is there, or is not. Before that call:
//!
//! 1. the server behind the address is asked over TCP who it is,
//! 2. the same address and port are connected to over RDMA,
//! 3. and whoever is there is asked as well, over that connection.
//!
//! Is it the same, then the server has its connection. Where anything comes in between, the
//! server may have its link over TCP instead, in the same attempt (`prefer`), or none
//! (`require`).

use super::attempts::Attempts;
use super::failure::Failure;
use super::identity::{self, Answer, Identity, LONGEST_ANSWER, QUESTION};
use super::inquiry::{Inquiry, Unanswered};
use super::report::{self, Purpose, Transport};
use crate::config::Replication;
use crate::conntype::listener::Listening;
use crate::conntype::outgoing;
use crate::endpoint::{Endpoint, ReadOutcome, Role, WriteOutcome};
use crate::host::connection::{Connection, Handler, State};
use crate::host::main_cell::MainPtr;
use crate::host::tcp_slots::{Target, TcpSlots};
use crate::host::{MainCell, api};
use crate::metrics::METRICS;
use crate::panic::guard;
use crate::poller::connection::{Opener, RdmaConnection};
use crate::poller::serving::call_handler;
use crate::poller::{Poller, again};
use crate::time;
use proto::session::Millis;
use redis_module::raw::RedisModuleCtx;
use std::ffi::{c_int, c_void};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::Duration;

/// How often links that are asking are looked at.
const CLOCK: Duration = Duration::from_millis(500);

/// Where a link is.
#[derive(Debug)]
enum Phase {
    /// The server behind the TCP address is being asked.
    AskingTcp(Inquiry),
    /// The RDMA connection is being opened, to this server.
    Connecting(Identity),
    /// It was asked over RDMA, and has said this so far.
    AskingRdma(Identity, Vec<u8>),
    /// The server has the connection.
    HandedOver,
}

#[derive(Debug)]
struct Link {
    number: usize,
    connection: MainPtr<RdmaConnection>,
    slots: TcpSlots,
    target: Target,
    purpose: Purpose,
    handler: Option<Handler>,
    phase: Phase,
    /// When a server that is asked has to have answered.
    deadline: Millis,
}

/// The links of this server, one or two as a rule. Not borrowed while the server is called.
static LINKS: MainCell<Vec<Link>> = MainCell::new(Vec::new());
static LAST_NUMBER: MainCell<usize> = MainCell::new(0);
static CLOCK_RUNS: MainCell<bool> = MainCell::new(false);
static ATTEMPTS: MainCell<Attempts> = MainCell::new(Attempts::none());

/// Opens a link in the server's place. Returns what the server's own `connect` would.
///
/// # Safety
/// `connection` is live, new, and from [`RdmaConnection::create_tcp`]. Main thread.
pub(super) unsafe fn open(
    slots: TcpSlots,
    connection: *mut RdmaConnection,
    target: Target,
    purpose: Purpose,
    handler: Option<Handler>,
) -> c_int {
    let poller = Poller::get();
    let number = {
        let mut last = LAST_NUMBER.borrow_mut();
        *last += 1;
        *last
    };
    // SAFETY: by the caller's promise.
    let own = unsafe { &mut *connection };
    // Also where there is no other way: a server whose link ends in the middle of its
    // synchronization opens the next at once, and each costs its primary a fork. After an attempt
    // that is refused it waits a second.
    let failure = if ATTEMPTS.borrow_mut().were_in_vain(&target) {
        Some(Failure::InVain)
    } else if own.take_over(Listening::get().kind()) {
        own.opener = Some(Box::new(Handle));
        own.base.set_state(State::Connecting);
        match Inquiry::start(&target, number, on_inquiry) {
            Ok(inquiry) => {
                LINKS.borrow_mut().push(Link {
                    number,
                    connection: MainPtr(connection),
                    slots,
                    target,
                    purpose,
                    handler,
                    phase: Phase::AskingTcp(inquiry),
                    deadline: deadline(poller),
                });
                run_clock();
                return 0;
            }
            Err(why) => Some(Failure::Tcp(why)),
        }
    } else {
        Some(Failure::Descriptor)
    };
    let failure = failure.expect("returned where there is none");
    let phase = Phase::HandedOver;
    let connection = MainPtr(connection);
    let deadline = 0;
    let link = Link { number, connection, slots, target, purpose, handler, phase, deadline };
    // SAFETY: as above.
    unsafe { instead(poller, &link, &failure) }
}

fn deadline(poller: &Poller) -> Millis {
    time::now() + poller.settings().borrow_mut().timing.handshake
}

/// Goes over TCP, or not at all. Returns what the server's own `connect` does.
///
/// # Safety
/// The link's connection is live and not connected, and nobody else's any more.
unsafe fn instead(poller: &Poller, link: &Link, failure: &Failure) -> c_int {
    let to = format!("{} port {}", link.target.address.to_string_lossy(), link.target.port);
    let why = failure.text();
    if matches!(failure, Failure::Other { .. }) {
        METRICS.links_to_another_server.add(1);
    }
    // SAFETY: by the caller's promise.
    let own = unsafe { &mut *link.connection.0 };
    if let Some(endpoint) = own.endpoint.take() {
        poller.close(&endpoint);
    }
    let policy = poller.settings().borrow_mut().replication;
    if policy == Replication::Require {
        METRICS.links_refused.add(1);
        report::carried(link.purpose, Transport::Nothing, &to, &why);
        own.base.read_handler = None;
        own.base.fail(failure.errno());
        return -1;
    }
    // A server that is not there at all is no reason to speak of transports.
    if !matches!(failure, Failure::Tcp(Unanswered::Unreachable(_))) {
        METRICS.links_over_tcp.add(1);
        report::carried(link.purpose, Transport::Tcp, &to, &why);
    }
    own.give_back(link.slots.kind());
    // SAFETY: it is a new connection of the TCP type again.
    unsafe { link.slots.connect(link.connection.0.cast(), &link.target, link.handler) }
}

/// The link does not come about: the server hears of it, or of its TCP connection later.
fn fail(poller: &Poller, number: usize, failure: &Failure) {
    let Some(link) = take(|link| link.number == number) else { return };
    let connection: *mut Connection = link.connection.0.cast();
    // SAFETY: a link's connection is live: its close takes the link away. Nothing is borrowed
    // while the server is called.
    unsafe {
        (*link.connection.0).base.conn_handler = None;
        outgoing::forget(link.connection.0);
        if instead(poller, &link, failure) != 0 {
            call_handler(connection, link.handler);
        }
    }
}

fn take(is_it: impl Fn(&Link) -> bool) -> Option<Link> {
    let mut links = LINKS.borrow_mut();
    let index = links.iter().position(is_it)?;
    Some(links.swap_remove(index))
}

/// The inquiry's connection may go on.
unsafe extern "C" fn on_inquiry(_fd: c_int, data: *mut c_void, _mask: c_int) {
    guard("a link's inquiry", || {
        let number = data as usize;
        let answer = {
            let mut links = LINKS.borrow_mut();
            let Some(link) = links.iter_mut().find(|link| link.number == number) else { return };
            let Phase::AskingTcp(inquiry) = &mut link.phase else { return };
            match inquiry.proceed(on_inquiry) {
                None => return,
                Some(Ok(identity)) => {
                    link.phase = Phase::Connecting(identity);
                    Ok((link.connection.0, link.target.clone()))
                }
                Some(Err(why)) => Err(why),
            }
        };
        let poller = Poller::get();
        match answer {
            Ok((connection, target)) => connect(poller, number, connection, &target),
            Err(why) => fail(poller, number, &Failure::Tcp(why)),
        }
    });
}

fn connect(poller: &Poller, number: usize, connection: *mut RdmaConnection, target: &Target) {
    let source = target.source.as_ref().map(|source| source.to_string_lossy());
    let to = target.address.to_string_lossy();
    let port = u16::try_from(target.port).unwrap_or(0);
    // SAFETY: a link's connection is live.
    let started = unsafe {
        outgoing::connect(poller, connection, &to, port, source.as_deref(), Some(on_connected))
    };
    if !started {
        // SAFETY: as above.
        let errno = unsafe { (*connection).base.last_errno() };
        fail(poller, number, &Failure::Rdma(errno));
    }
}

/// The RDMA connection is there or has failed, or the server behind it has said something.
unsafe extern "C" fn on_connected(connection: *mut Connection) {
    let done = guard("a link's connection", || {
        let poller = Poller::get();
        let own: *mut RdmaConnection = connection.cast();
        // SAFETY: the poller passes a live connection.
        let (state, endpoint) = unsafe { ((*own).base.state(), (*own).endpoint.clone()) };
        let mut links = LINKS.borrow_mut();
        let Some(link) = links.iter_mut().find(|link| link.connection.0 == own) else { return };
        let number = link.number;
        let (State::Connected, Some(endpoint)) = (state, endpoint) else {
            drop(links);
            // SAFETY: as above.
            let errno = unsafe { (*own).base.last_errno() };
            fail(poller, number, &Failure::Rdma(errno));
            return;
        };
        let outcome = match &mut link.phase {
            Phase::Connecting(identity) => {
                let identity = *identity;
                link.deadline = deadline(poller);
                link.phase = Phase::AskingRdma(identity, Vec::new());
                ask(&endpoint)
            }
            Phase::AskingRdma(identity, answer) => compare(&endpoint, *identity, answer),
            Phase::AskingTcp(_) | Phase::HandedOver => return,
        };
        drop(links);
        match outcome {
            Ok(Progress::Waits) => {
                // Until it is known who is there, the server's connection is not connected.
                // SAFETY: as above.
                unsafe {
                    (*own).base.set_state(State::Connecting);
                    (*own).base.conn_handler = Some(on_connected);
                    (*own).base.read_handler = Some(on_connected);
                }
            }
            // SAFETY: as above.
            Ok(Progress::Same) => unsafe { hand_over(own, &endpoint) },
            Err(failure) => fail(poller, number, &failure),
        }
    });
    if done.is_none() {
        // The connection is over, and the poller tells this handler: the link fails then.
        // SAFETY: as above; what panicked did not come so far as to free it.
        let endpoint = unsafe {
            (*connection).fail(libc::EIO);
            (*connection).read_handler = Some(on_connected);
            (*connection.cast::<RdmaConnection>()).endpoint.clone()
        };
        if let Some(endpoint) = endpoint {
            Poller::get().give_up(&endpoint);
        }
    }
}

/// How far an answer is.
enum Progress {
    /// It is not complete.
    Waits,
    /// It is the server that it has to be.
    Same,
}

fn ask(endpoint: &Endpoint) -> Result<Progress, Failure> {
    match endpoint.write(&[IoSlice::new(QUESTION)]) {
        WriteOutcome::Bytes(count) if count == QUESTION.len() => Ok(Progress::Waits),
        _ => Err(Failure::Nobody(String::from("it takes no question"))),
    }
}

fn compare(
    endpoint: &Endpoint,
    identity: Identity,
    answer: &mut Vec<u8>,
) -> Result<Progress, Failure> {
    let mut bytes = [MaybeUninit::uninit(); LONGEST_ANSWER];
    match endpoint.read(&mut bytes) {
        ReadOutcome::Bytes(count) => {
            // SAFETY: so many were read.
            answer.extend(bytes[..count].iter().map(|byte| unsafe { byte.assume_init() }));
        }
        ReadOutcome::Again => return Ok(Progress::Waits),
        ReadOutcome::End | ReadOutcome::Broken => return Err(Failure::Rdma(libc::ECONNRESET)),
    }
    match identity::read(answer) {
        Answer::Incomplete => Ok(Progress::Waits),
        Answer::Is(found) if found == identity => Ok(Progress::Same),
        Answer::Is(found) => Err(Failure::Other { tcp: identity, rdma: found }),
        Answer::Other(said) => Err(Failure::Nobody(said)),
    }
}

/// The server has its link.
///
/// # Safety
/// The connection is live and connected to `endpoint`. Nothing is borrowed.
unsafe fn hand_over(own: *mut RdmaConnection, endpoint: &Arc<Endpoint>) {
    let handler = {
        let mut links = LINKS.borrow_mut();
        let Some(link) = links.iter_mut().find(|link| link.connection.0 == own) else { return };
        link.phase = Phase::HandedOver;
        let to = format!("{} port {}", link.target.address.to_string_lossy(), link.target.port);
        let (purpose, handler) = (link.purpose, link.handler.take());
        drop(links);
        METRICS.links_over_rdma.add(1);
        endpoint.main_state().role = Role::Primary;
        report::carried(purpose, Transport::Rdma, &to, "");
        handler
    };
    // SAFETY: by the caller's promise; no reference is held over the call.
    unsafe {
        (*own).base.read_handler = None;
        call_handler(own.cast(), handler);
    }
}

/// The link of a connection, which goes with it.
#[derive(Debug)]
struct Handle;

impl Opener for Handle {
    fn closed(&mut self, base: &Connection) {
        let at = std::ptr::from_ref(base).addr();
        let Some(link) = take(|link| link.connection.0.addr() == at) else { return };
        if !matches!(link.phase, Phase::HandedOver) {
            return;
        }
        report::ended(link.purpose);
        if link.purpose == Purpose::Replication {
            // The server makes a client of the link when the replica is in sync.
            ATTEMPTS.borrow_mut().note(link.target, !base.private_data.is_null());
        }
    }
}

/// Has the clock run while there are links that ask.
fn run_clock() {
    if !std::mem::replace(&mut *CLOCK_RUNS.borrow_mut(), true) {
        api::after(CLOCK, on_clock);
    }
}

unsafe extern "C" fn on_clock(_ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    let runs = guard("the links' clock", || {
        let now = time::now();
        let asks = |link: &Link| matches!(link.phase, Phase::AskingTcp(_) | Phase::AskingRdma(..));
        let late: Vec<_> = {
            let links = LINKS.borrow_mut();
            let late = links.iter().filter(|link| asks(link) && now >= link.deadline);
            late.map(|link| link.number).collect()
        };
        for number in late {
            fail(Poller::get(), number, &Failure::Silent);
        }
        let runs = LINKS.borrow_mut().iter().any(|link| !matches!(link.phase, Phase::HandedOver));
        *CLOCK_RUNS.borrow_mut() = runs;
        runs
    });
    if runs.unwrap_or(true) {
        again(CLOCK, on_clock);
    }
}
