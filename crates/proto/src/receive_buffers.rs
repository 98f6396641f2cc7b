// SPDX-License-Identifier: BSD-3-Clause
//! The receive buffers of one connection: which memory is announced next.
//!
//! There is one, or two in turn for a peer that sends much. How large they are is the policy
//! of [`crate::buffer_size`]; here is what stands where. A buffer that may still be read, or
//! written to by the peer, is never given back.

use crate::buffer_size;
use crate::lifecycle::Millis;
use crate::port::Port;
use crate::window::ReceiveWindow;
use std::ops::RangeInclusive;

#[derive(Debug)]
pub(crate) struct ReceiveBuffers<B> {
    /// The one that was announced last.
    present: B,
    /// The one before, if there are two. Perhaps it is read still.
    other: Option<B>,
    /// When the present one was announced, unless it was not yet.
    since: Option<Millis>,
    /// The peer's writes until then, since the connection began.
    writes_before: u64,
    /// The smallest and the largest that one may be, in bytes.
    sizes: RangeInclusive<u32>,
}

impl<B> ReceiveBuffers<B> {
    pub(crate) fn new(first: B, sizes: RangeInclusive<u32>) -> Self {
        Self { present: first, other: None, since: None, writes_before: 0, sizes }
    }

    pub(crate) fn present(&self) -> &B {
        &self.present
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &B> {
        std::iter::once(&self.present).chain(&self.other)
    }

    /// Gives the second one back. Only if every buffer before the present one is consumed.
    pub(crate) fn shrink(&mut self) {
        self.other = None;
    }

    /// Has the next receive buffer ready, of a size that fits the traffic, the present one
    /// being full. `false` if the peer has to wait until that was read.
    pub(crate) fn turn<P: Port<Buffer = B>>(
        &mut self,
        window: &ReceiveWindow,
        port: &mut P,
        writes: u64,
        now: Millis,
    ) -> bool {
        let took = self.since.map(|since| now - since);
        let present = port.memory(&self.present).length;
        let by = writes - self.writes_before;
        let wanted = took.map_or(present, |took| {
            buffer_size::next(present, *self.sizes.end(), took, by).max(*self.sizes.start())
        });
        let fits = |port: &P, buffer: &B| port.memory(buffer).length == wanted;
        let has_two = self.other.as_ref().is_some_and(|other| fits(port, other));
        let two = took.is_some_and(|took| buffer_size::wants_two(took, has_two));
        if window.is_consumed() {
            if !two {
                self.other = None;
            }
            // Slower but right with what there is, where there is no memory for more.
            if wanted != present
                && let Some(buffer) = port.register(wanted)
            {
                self.present = buffer;
            }
        } else {
            if !two || !window.is_other_free() {
                return false;
            }
            let other = self.other.take().filter(|other| fits(port, other));
            let Some(next) = other.or_else(|| port.register(wanted)) else { return false };
            self.other = Some(std::mem::replace(&mut self.present, next));
            port.announced_early();
        }
        self.since = Some(now);
        self.writes_before = writes;
        true
    }
}
