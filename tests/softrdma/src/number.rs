// SPDX-License-Identifier: BSD-3-Clause
//! Queue pairs that the application connects itself, by their numbers.
//!
//! Both sides name the other's number when they move to RTR, in either order. The
//! lower number waits at a socket named after both; the higher one makes the wire
//! and brings it there, trying until the other is ready. Numbers stand for
//! themselves: this fabric has one subnet, the machine.

use crate::engine::{Source, Watch, engine};
use crate::link::{self, Link};
use crate::sys::{self, Fd};
use crate::verbs::qp::{Qp, RTR, RTS, SQD};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// Between two tries of the side that calls.
const RETRY: Duration = Duration::from_millis(10);

/// A socket that belongs to a queue pair: first to meet, then to notice the end.
struct Meeting {
    socket: Fd,
    qp: Weak<Qp>,
    stage: Stage,
    watch: Mutex<Option<Watch>>,
}

enum Stage {
    /// The lower number waits to be called.
    Listening,
    /// The higher number has brought the wire, and waits for the answer.
    Calling(Arc<Link>),
    /// Called; the wire has not come yet, or has.
    Called,
}

/// Connects a queue pair that is being moved to RTR; the error is an errno.
pub fn connect(qp: &Arc<Qp>, to: u32) -> Result<(), i32> {
    if qp.num == to {
        return Err(libc::EOPNOTSUPP);
    }
    let name = format!("softrdma/qp/{}-{}", qp.num.min(to), qp.num.max(to));
    let code = |e: std::io::Error| e.raw_os_error().unwrap_or(libc::EIO);
    if qp.num < to {
        let socket = sys::packet_socket().map_err(code)?;
        sys::bind_abstract(&socket, &name).map_err(code)?;
        sys::listen(&socket, 1).map_err(code)?;
        Meeting::start(socket, qp, Stage::Listening);
    } else {
        call(Arc::downgrade(qp), name);
    }
    Ok(())
}

/// Tries to reach the other side for as long as the queue pair wants it.
fn call(qp: Weak<Qp>, name: String) {
    engine().soon(move || {
        let Some(object) = qp.upgrade() else { return };
        if !matches!(object.lock().state, RTR | RTS | SQD) {
            return;
        }
        let Ok(socket) = sys::packet_socket() else { return };
        if sys::connect_abstract(&socket, &name).is_err() {
            engine().after(RETRY, move || call(qp, name));
            return;
        }
        let Ok((link, memory)) = Link::create() else { return };
        let (channel, mut fds) = link::introduction(object.channel_fd());
        fds.insert(0, memory.raw());
        let _ = sys::send_packet(&socket, &channel.to_ne_bytes(), &fds);
        Meeting::start(socket, &object, Stage::Calling(Arc::new(link)));
    });
}

impl Meeting {
    fn start(socket: Fd, qp: &Arc<Qp>, stage: Stage) {
        let watch = Mutex::new(None);
        let meeting = Arc::new(Meeting { socket, qp: Arc::downgrade(qp), stage, watch });
        // A queue pair that goes takes its socket along.
        let weak = Arc::downgrade(&meeting);
        qp.at_end(move || {
            if let Some(meeting) = weak.upgrade() {
                meeting.stop();
            }
        });
        let mut watch = meeting.watch.lock().unwrap();
        *watch = Some(engine().watch(meeting.socket.raw(), meeting.clone()));
    }

    /// The wire has come: takes it, and introduces this side in return.
    fn answer(&self, qp: &Qp, memory: Fd) -> Option<Arc<Link>> {
        let link = Link::attach(memory).ok()?;
        let (channel, fds) = link::introduction(qp.channel_fd());
        let _ = sys::send_packet(&self.socket, &channel.to_ne_bytes(), &fds);
        Some(Arc::new(link))
    }

    fn stop(&self) {
        if let Some(watch) = self.watch.lock().unwrap().take() {
            engine().unwatch(watch, self.socket.raw());
        }
    }
}

impl Source for Meeting {
    fn ready(self: Arc<Self>) {
        let qp = self.qp.upgrade();
        match (&self.stage, qp) {
            (_, None) => self.stop(),
            (Stage::Listening, Some(qp)) => {
                if let Ok(socket) = sys::accept(&self.socket) {
                    self.stop();
                    Meeting::start(socket, &qp, Stage::Called);
                }
            }
            (stage, Some(qp)) => {
                let (mut bytes, mut fds) = ([0; 8], Vec::new());
                match sys::recv_packet(&self.socket, &mut bytes, &mut fds) {
                    Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
                    Ok(1..) => {
                        let channel = u64::from_ne_bytes(bytes);
                        let link = match stage {
                            Stage::Calling(link) => Some(link.clone()),
                            _ if fds.is_empty() => None,
                            _ => self.answer(&qp, fds.remove(0)),
                        };
                        if let Some(link) = link
                            && link.meet(channel, fds)
                        {
                            qp.wire_up(link);
                        }
                    }
                    Ok(0) | Err(_) => {
                        self.stop();
                        if let Some(link) = qp.wire() {
                            link.set_dead();
                        }
                        qp.link_down();
                    }
                }
            }
        }
    }
}
