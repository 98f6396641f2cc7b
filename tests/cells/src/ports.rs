// SPDX-License-Identifier: BSD-3-Clause
//! Ports that no other run of these tests takes.
//!
//! A port that was free a moment ago may be another's when a server comes to listen there. So
//! each process has a block of ports of its own for as long as it lives. They lie below those
//! that the kernel gives to whoever does not care, and a block is held by a name that, like a
//! port, exists once in a network namespace.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::{Mutex, OnceLock};

use anyhow::{Context, Result};

use crate::lab::LOOPBACK;

const FIRST: u16 = 10_000;
/// So many that they come round again after minutes: a port of the fabric's that a long cell
/// listens on does not show as in use.
const EACH: u16 = 1000;
const BLOCKS: u16 = 22;

/// A port of this process's own that nobody listens on now.
pub fn free_port() -> Result<u16> {
    static OWN: OnceLock<Mutex<Block>> = OnceLock::new();
    if OWN.get().is_none() {
        let _ = OWN.set(Mutex::new(Block::take()?));
    }
    let block = OWN.get().expect("set above");
    block.lock().expect("drawing a port does not panic").next()
}

/// Ports that belong to their owner until it goes.
struct Block {
    first: u16,
    drawn: u16,
    _held: UnixListener,
}

impl Block {
    fn take() -> Result<Self> {
        let start = fastrand::u16(..);
        (0..BLOCKS)
            .find_map(|at| Self::hold(start.wrapping_add(at) % BLOCKS))
            .context("other runs hold all blocks of ports")
    }

    fn hold(number: u16) -> Option<Self> {
        let name = format!("valkey-rdma-cells/ports/{number}");
        let name = SocketAddr::from_abstract_name(name).ok()?;
        let held = UnixListener::bind_addr(&name).ok()?;
        Some(Self { first: FIRST + number * EACH, drawn: 0, _held: held })
    }

    /// The next one in turn, so that a port is not drawn again soon.
    fn next(&mut self) -> Result<u16> {
        (0..EACH)
            .map(|_| {
                self.drawn = (self.drawn + 1) % EACH;
                self.first + self.drawn
            })
            .find(|&port| TcpListener::bind((LOOPBACK, port)).is_ok())
            .context("somebody listens on each port of this run")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_has_one_owner_at_a_time() {
        let block = Block::take().unwrap();
        let number = (block.first - FIRST) / EACH;
        assert!(number < BLOCKS && Block::hold(number).is_none());
        drop(block);
        assert_eq!(Block::hold(number).unwrap().first, FIRST + number * EACH);
    }

    #[test]
    fn a_port_that_somebody_listens_on_is_passed_over() {
        let mut block = Block::take().unwrap();
        let first = block.next().unwrap();
        let _somebody = TcpListener::bind((LOOPBACK, first + 1)).unwrap();
        assert_eq!(block.next().unwrap(), first + 2);
        let drawn: Vec<_> = (0..3 * EACH).map(|_| block.next().unwrap()).collect();
        assert!(!drawn.contains(&(first + 1)) && drawn.contains(&first));
    }
}
