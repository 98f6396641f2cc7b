// SPDX-License-Identifier: BSD-3-Clause
//! The sockets of the handshake: listeners and connections, as the progress
//! thread serves them.
//!
//! A connection's socket stays open as long as the connection. Its end is the
//! sign that the other process died, because the kernel closes it in any case.

use super::id::CmId;
use super::message::{self, Message, reason};
use crate::engine::{Source, Watch, engine};
use crate::fault::{self, Point};
use crate::link::Link;
use crate::sys::{self, Fd};
use crate::verbs::qp::Qp;
use std::io::ErrorKind;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, Weak};

/// A listening socket.
pub struct Listener {
    socket: Fd,
    id: Weak<CmId>,
    watch: Mutex<Option<Watch>>,
}

impl Listener {
    /// Starts to accept on a bound socket.
    pub fn start(socket: Fd, id: &Arc<CmId>, backlog: i32) -> Result<Arc<Listener>, i32> {
        // 0 is the largest backlog to librdmacm, the smallest to listen(2).
        let backlog = if backlog > 0 { backlog } else { 1024 };
        sys::listen(&socket, backlog).map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
        let listener =
            Arc::new(Listener { socket, id: Arc::downgrade(id), watch: Mutex::new(None) });
        let watch = engine().watch(listener.socket.raw(), listener.clone());
        *listener.watch.lock().unwrap() = Some(watch);
        Ok(listener)
    }

    pub fn stop(&self) {
        if let Some(watch) = self.watch.lock().unwrap().take() {
            engine().unwatch(watch, self.socket.raw());
        }
    }
}

impl Source for Listener {
    fn ready(self: Arc<Self>) {
        while let Ok(socket) = sys::accept(&self.socket) {
            // It becomes an identifier when its REQ is there.
            Connection::start(socket, Owner::Listener(self.id.clone()));
        }
    }
}

enum Owner {
    /// Accepted, but no REQ has come yet.
    Listener(Weak<CmId>),
    Id(Weak<CmId>),
    Nobody,
}

/// A connection's socket.
pub struct Connection {
    socket: Fd,
    owner: Mutex<Owner>,
    link: Mutex<Option<(Arc<Link>, u32)>>,
    watch: Mutex<Option<Watch>>,
}

impl Connection {
    fn start(socket: Fd, owner: Owner) -> Arc<Connection> {
        let connection = Arc::new(Connection {
            socket,
            owner: Mutex::new(owner),
            link: Mutex::new(None),
            watch: Mutex::new(None),
        });
        let mut watch = connection.watch.lock().unwrap();
        *watch = Some(engine().watch(connection.socket.raw(), connection.clone()));
        drop(watch);
        connection
    }

    /// Takes over a connected socket for `id`.
    pub fn of(socket: Fd, id: &Arc<CmId>) -> Arc<Connection> {
        Connection::start(socket, Owner::Id(Arc::downgrade(id)))
    }

    /// Sends a message; a dead peer is noticed by the socket's end instead.
    pub fn send(&self, message: &Message, fds: &[RawFd]) {
        let lost = match message.kind {
            message::kind::REQ => fault::strikes(Point::LoseRequest),
            message::kind::REP => fault::strikes(Point::LoseReply),
            message::kind::RTU => fault::strikes(Point::LoseReadyToUse),
            message::kind::DREQ => fault::strikes(Point::LoseDisconnect),
            _ => None,
        };
        if lost.is_some() {
            return self.cut();
        }
        let _ = sys::send_packet(&self.socket, message.as_bytes(), fds);
    }

    /// Both ends find the connection ended, as a planned fault.
    fn cut(&self) {
        sys::shut_down(&self.socket);
    }

    /// The wire of this connection and the local queue pair that it goes to.
    pub fn set_link(self: &Arc<Self>, link: Arc<Link>, qp_num: u32) {
        let weak = Arc::downgrade(self);
        link.set_cut(move || {
            if let Some(connection) = weak.upgrade() {
                connection.cut();
            }
        });
        *self.link.lock().unwrap() = Some((link, qp_num));
    }

    pub fn link(&self) -> Option<Arc<Link>> {
        self.link.lock().unwrap().as_ref().map(|(link, _)| link.clone())
    }

    /// The queue pair that uses the wire on this side, if there still is one.
    fn qp(&self) -> Option<Arc<Qp>> {
        let num = self.link.lock().unwrap().as_ref()?.1;
        Qp::by_number(num)
    }

    /// Which queue pair uses the wire on this side.
    pub fn set_qp(&self, qp_num: u32) {
        if let Some((_, num)) = self.link.lock().unwrap().as_mut() {
            *num = qp_num;
        }
    }

    /// Nobody wants to hear of this connection any more.
    pub fn stop(&self) {
        *self.owner.lock().unwrap() = Owner::Nobody;
        self.unwatch();
    }

    fn unwatch(&self) {
        if let Some(watch) = self.watch.lock().unwrap().take() {
            engine().unwatch(watch, self.socket.raw());
        }
    }

    fn ended(self: &Arc<Self>) {
        self.unwatch();
        let qp = self.qp();
        if let Some((link, _)) = self.link.lock().unwrap().take() {
            link.set_dead();
        }
        if let Some(qp) = qp {
            qp.link_down();
        }
        if let Owner::Id(id) = &*self.owner.lock().unwrap()
            && let Some(id) = id.upgrade()
        {
            engine().soon(move || id.peer_ended());
        }
    }

    /// Nobody listens any more, since the request was sent: the kernel says so to the peer.
    fn refuse(&self) {
        let mut rej = Message::new(message::kind::REJ);
        rej.reason = reason::INVALID_SERVICE;
        self.send(&rej, &[]);
        self.unwatch();
    }

    fn deliver(self: &Arc<Self>, message: Message, mut fds: Vec<Fd>) {
        let mut owner = self.owner.lock().unwrap();
        match &*owner {
            Owner::Id(id) => {
                let id = id.upgrade();
                drop(owner);
                if let (message::kind::REP, Some(link)) = (message.kind, self.link())
                    && !link.meet(message.channel, fds)
                {
                    return;
                }
                // What came before the hanging up is completed before that is told,
                // whichever thread is at it: an adapter needs none of the application's.
                if message.kind == message::kind::DREQ
                    && let Some(qp) = self.qp()
                {
                    qp.progress();
                }
                let Some(id) = id else { return };
                let late = id.habits().late_rtu;
                if message.kind == message::kind::RTU && !late.is_zero() {
                    engine().after(late, move || id.message(message));
                } else {
                    id.message(message);
                }
            }
            Owner::Listener(listener) if message.kind == message::kind::REQ => {
                let Some(listener) = listener.upgrade() else { return self.refuse() };
                if fds.is_empty() {
                    return;
                }
                let Ok(link) = Link::attach(fds.remove(0)) else { return };
                if !link.meet(message.channel, fds) {
                    return;
                }
                self.set_link(Arc::new(link), 0);
                *owner = match listener.request(self.clone(), message) {
                    Some(id) => Owner::Id(id),
                    None => {
                        self.refuse();
                        Owner::Nobody
                    }
                };
            }
            _ => {}
        }
    }
}

impl Source for Connection {
    fn ready(self: Arc<Self>) {
        loop {
            let mut bytes = [0; message::SIZE];
            let mut fds = Vec::new();
            match sys::recv_packet(&self.socket, &mut bytes, &mut fds) {
                Ok(0) => return self.ended(),
                Ok(n) => {
                    if let Some(message) = Message::from_bytes(&bytes[..n]) {
                        self.deliver(message, fds);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(_) => return self.ended(),
            }
        }
    }
}
