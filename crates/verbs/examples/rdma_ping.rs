// SPDX-License-Identifier: BSD-3-Clause
//! Sends a PING to a Valkey server over RDMA, and prints the reply. Without an address it lists
//! the RDMA devices of this machine.
//!
//! ```sh
//! cargo run -p valkey-rdma-verbs --example rdma_ping -- 10.0.0.1:6379
//! ```

use proto::wire::{MESSAGE_LEN, Memory, Message};
use std::error::Error;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::{io, ptr};
use valkey_rdma_verbs::cm::{EventChannel, EventKind, Id};
use valkey_rdma_verbs::cq::{Batch, CompletionChannel, CompletionQueue, Outcome};
use valkey_rdma_verbs::device::Device;
use valkey_rdma_verbs::library;
use valkey_rdma_verbs::mr::{Access, ProtectionDomain, Region};
use valkey_rdma_verbs::qp::{QueuePair, RemoteBuf};

/// Longest wait for anything.
const TIMEOUT_MS: i32 = 5000;
/// Receives that the server finds posted, for its messages and the immediates of its writes.
const RECEIVES: usize = 4;
/// Where the command stands in its region; the region begins with our announcement.
const COMMAND_AT: usize = 64;
const COMMAND: &[u8] = b"PING\r\n";
const REPLY: &[u8] = b"+PONG\r\n";

fn main() -> Result<(), Box<dyn Error>> {
    library::load()?;
    match std::env::args().nth(1) {
        Some(address) => print!("{}", ping(address.parse()?)?),
        None => Device::all().iter().for_each(|device| println!("{}", device.name())),
    }
    Ok(())
}

fn ping(address: SocketAddr) -> Result<String, Box<dyn Error>> {
    let events = Arc::new(EventChannel::new()?);
    let id = Arc::new(Id::new(&events)?);
    id.resolve_address(None, address, TIMEOUT_MS)?;
    expect(&events, EventKind::AddressResolved)?;
    id.resolve_route(TIMEOUT_MS)?;
    expect(&events, EventKind::RouteResolved)?;

    // What the connection consists of.
    let device = id.device().ok_or("the address belongs to no device")?;
    let domain = Arc::new(ProtectionDomain::new(&device)?);
    let channel = Arc::new(CompletionChannel::new(&device)?);
    let queue = Arc::new(CompletionQueue::new(&channel, 16, 0, 0)?);
    let qp = QueuePair::new(&id, &domain, &queue, 4, RECEIVES as u32)?;
    let messages = Region::new(&domain, RECEIVES * MESSAGE_LEN, Access::Local)?;
    let ours = Region::new(&domain, COMMAND_AT + COMMAND.len(), Access::Local)?;
    let window = Region::new(&domain, 4096, Access::RemoteWrite)?;
    let receive = |slot: usize| {
        qp.post_receive(slot as u64, messages.sge(slot * MESSAGE_LEN, MESSAGE_LEN as u32))
    };
    (0..RECEIVES).try_for_each(receive)?;
    id.connect()?;
    expect(&events, EventKind::Established)?;

    // Tell the server where its replies go. It tells us where commands go.
    let announcement = Message::RegisterXferMemory(Memory {
        address: window.start() as u64,
        length: window.length() as u32,
        rkey: window.rkey(),
    });
    copy_in(&ours, 0, &announcement.encode());
    copy_in(&ours, COMMAND_AT, COMMAND);
    let sent = RECEIVES as u64;
    qp.post_send(sent, ours.sge(0, MESSAGE_LEN as u32))?;

    let mut batch = Batch::default();
    let mut replied = 0;
    while replied < REPLY.len() {
        queue.arm()?;
        queue.poll(&mut batch)?;
        for completion in batch.iter() {
            match completion.outcome {
                Outcome::Received(length) => {
                    let slot = completion.wr_id as usize;
                    let bytes = copy_out(&messages, slot * MESSAGE_LEN, length as usize);
                    if let Message::RegisterXferMemory(theirs) = Message::decode(&bytes)? {
                        let to = RemoteBuf { address: theirs.address, rkey: theirs.rkey };
                        qp.post_write(sent, ours.sge(COMMAND_AT, COMMAND.len() as u32), to, true)?;
                    }
                    receive(slot)?;
                }
                Outcome::Immediate(count) => {
                    replied += count as usize;
                    receive(completion.wr_id as usize)?;
                }
                Outcome::Sent => {}
                Outcome::Failed(status) => return Err(status.text().into()),
                Outcome::Unexpected(code) => return Err(format!("completion {code}").into()),
            }
        }
        // The queue is armed, so what completes after the poll raises an event.
        if batch.iter().next().is_none() {
            wait(channel.fd())?;
            channel.take_event()?;
        }
    }
    let reply = copy_out(&window, 0, replied);
    id.disconnect();
    Ok(String::from_utf8(reply)?)
}

/// Waits for the next event of connecting.
fn expect(events: &EventChannel, kind: EventKind) -> Result<(), Box<dyn Error>> {
    loop {
        match events.next()? {
            Some(event) if event.kind == kind => return Ok(()),
            Some(event) => return Err(format!("{:?}, status {}", event.kind, event.status).into()),
            None => wait(events.fd())?,
        }
    }
}

/// Waits until a descriptor is readable.
fn wait(fd: RawFd) -> io::Result<()> {
    let mut entry = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry.
    match unsafe { libc::poll(&mut entry, 1, TIMEOUT_MS) } {
        0 => Err(io::ErrorKind::TimedOut.into()),
        count if count < 0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Copies bytes into a region, of which no work request uses that part now.
fn copy_in(region: &Region, offset: usize, bytes: &[u8]) {
    assert!(offset + bytes.len() <= region.length());
    // SAFETY: inside the region.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), region.start().add(offset), bytes.len()) }
}

/// Copies bytes out of a region, which the peer has completed writing to.
fn copy_out(region: &Region, offset: usize, length: usize) -> Vec<u8> {
    assert!(offset + length <= region.length());
    let mut bytes = vec![0; length];
    // SAFETY: inside the region, and the vector has as many bytes.
    unsafe { ptr::copy_nonoverlapping(region.start().add(offset), bytes.as_mut_ptr(), length) };
    bytes
}
