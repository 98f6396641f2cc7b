// SPDX-License-Identifier: BSD-3-Clause
//! Habits: what devices do each in their own way, as long as they are there. The fabric has
//! those of Soft-RoCE unless terms of `SOFTRDMA_FAULTS`, or of the [profile](crate::profiles)
//! that `SOFTRDMA_DEVICE` names, say otherwise. README.md lists the terms.

use crate::fault::errno;
use crate::profiles::Profile;
use crate::verbs::context::limit;
use std::time::Duration;

/// What a queue pair gets of the inline data that it asks for.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Inline {
    /// All of it, and more where the gather list has the room.
    Granted,
    /// So many bytes, whatever it asks for.
    Clamped(u32),
    /// All of it, up to so many bytes; beyond them there is no queue pair.
    Limited(u32),
    /// All of it, but the data are fetched by their key as any other.
    Ignored,
}

/// What comes of a request that finds no receive, and of the timer that says when to repeat it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Rnr {
    /// It is repeated after the timer, which can be changed at any time.
    Timed,
    /// It is repeated after 655 ms, whatever the timer is set to.
    Ignored,
    /// It is repeated after the timer, which can't be changed once the queue pair is ready to
    /// send.
    Refused,
    /// There is no such thing: both queue pairs end.
    Missing,
}

/// What becomes of a WRITE of no bytes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum ZeroWrite {
    /// It arrives, and its key is not looked at.
    Arrives,
    /// It arrives if there is a key. Else the sender's queue pair fails.
    NeedsKey,
    /// The sender's queue pair fails.
    Fails,
}

/// See the module's text.
#[derive(Debug)]
pub struct Habits {
    pub inline: Inline,
    /// What a post with more inline data than was granted answers.
    pub inline_error: i32,
    /// Posts answer their error numbers with a minus.
    pub negative: bool,
    /// What a post to a full queue answers.
    pub full: i32,
    /// What a post to a queue pair in the error state answers; otherwise it is flushed.
    pub dead: Option<i32>,
    /// Every so many receives the device has not let go of its place in the queue yet: the post
    /// answers -EAGAIN. Not in a queue's first round.
    pub receive_busy: Option<u64>,
    /// There is immediate data.
    pub immediate: bool,
    pub rnr: Rnr,
    /// A change of attributes that does not name the state resets the queue pair.
    pub modify_resets: bool,
    pub zero_write: ZeroWrite,
    /// The local ACK timeout of connections that the manager makes: 4.096 us * 2 to this.
    pub ack_timeout: u8,
    pub max_qp: i32,
    pub max_cqe: i32,
    pub max_mr: i32,
    pub max_pd: i32,
    /// What is answered beyond one of the four.
    pub at_limit: i32,
    /// Entries of the largest completion queue that can be had, whatever the device says.
    pub cq_most: Option<i32>,
    /// A completion queue is armed by the next poll or post.
    pub deferred_arm: bool,
    /// Events for each arming.
    pub events: u32,
    /// Flushes are found by polling: the first of a queue pair has an event, no other has.
    pub flush_on_poll: bool,
    /// What destroying a queue pair takes for each entry of its completion queue.
    pub destroy_cost: Duration,
    /// The node has a GUID.
    pub has_guid: bool,
    /// A process can connect to itself.
    pub loopback: bool,
    /// How much later than it came "ready to use" is delivered.
    pub late_rtu: Duration,
    /// It is an iWARP device by its transport type.
    pub iwarp: bool,
    /// The library learns the kernel's number of the device, which needs netlink.
    pub netlink: bool,
    /// Its vendor's number.
    pub vendor: u32,
}

impl Default for Habits {
    fn default() -> Habits {
        Habits {
            inline: Inline::Granted,
            inline_error: libc::EINVAL,
            negative: false,
            full: libc::ENOMEM,
            dead: None,
            receive_busy: None,
            immediate: true,
            rnr: Rnr::Timed,
            modify_resets: false,
            zero_write: ZeroWrite::Arrives,
            ack_timeout: 14,
            max_qp: limit::QP,
            max_cqe: limit::CQE,
            max_mr: limit::MR,
            max_pd: limit::PD,
            at_limit: libc::ENOMEM,
            cq_most: None,
            deferred_arm: false,
            events: 1,
            flush_on_poll: false,
            destroy_cost: Duration::ZERO,
            has_guid: true,
            loopback: true,
            late_rtu: Duration::ZERO,
            iwarp: false,
            netlink: true,
            vendor: 0,
        }
    }
}

impl Habits {
    /// Takes all of a profile's.
    ///
    /// # Errors
    /// If one of its terms is none of a habit.
    pub fn take_profile(&mut self, profile: &Profile) -> Result<(), String> {
        for (term, _) in profile.habits {
            if !self.take(term) {
                return Err(format!("{}: can't understand '{term}'", profile.name));
            }
        }
        Ok(())
    }

    /// Takes a term; false if it is none of a habit.
    pub fn take(&mut self, term: &str) -> bool {
        let Some((name, value)) = term.split_once('=') else {
            if term == "modify-resets" {
                self.modify_resets = true;
            }
            return term == "modify-resets";
        };
        self.set(name, value).is_some()
    }

    fn set(&mut self, name: &str, value: &str) -> Option<()> {
        let number = || value.parse().ok();
        let positive = || value.parse().ok().filter(|n| *n > 0);
        match (name, value) {
            ("inline", "ignored") => self.inline = Inline::Ignored,
            ("inline", _) => {
                self.inline = match value.split_once(':') {
                    None => Inline::Clamped(value.parse().ok()?),
                    Some((most, "error")) => Inline::Limited(most.parse().ok()?),
                    Some(_) => return None,
                }
            }
            ("inline-error", _) => self.inline_error = errno(value)? as i32,
            ("errno", "negative") => self.negative = true,
            ("full", _) => self.full = errno(value)? as i32,
            ("dead", _) => self.dead = Some(errno(value)? as i32),
            ("recv-busy", _) => self.receive_busy = Some(value.parse().ok().filter(|n| *n > 0)?),
            ("imm", "none") => self.immediate = false,
            ("rnr", "ignored") => self.rnr = Rnr::Ignored,
            ("rnr", "refused") => self.rnr = Rnr::Refused,
            ("rnr", "none") => self.rnr = Rnr::Missing,
            ("zero-write", "fails") => self.zero_write = ZeroWrite::Fails,
            ("zero-write", "needs-key") => self.zero_write = ZeroWrite::NeedsKey,
            ("ack-timeout", _) => self.ack_timeout = value.parse().ok().filter(|n| *n < 32)?,
            ("max-qp", _) => self.max_qp = positive()?,
            ("max-cqe", _) => self.max_cqe = positive()?,
            ("max-mr", _) => self.max_mr = positive()?,
            ("max-pd", _) => self.max_pd = positive()?,
            ("at-limit", _) => self.at_limit = errno(value)? as i32,
            ("cq-fails-above", _) => self.cq_most = Some(number()?),
            ("arm", "deferred") => self.deferred_arm = true,
            ("events", "2") => self.events = 2,
            ("flush", "on-poll") => self.flush_on_poll = true,
            ("destroy-cost", _) => self.destroy_cost = Duration::from_nanos(value.parse().ok()?),
            ("guid", "0") => self.has_guid = false,
            ("loopback", "no") => self.loopback = false,
            ("late-rtu", _) => self.late_rtu = Duration::from_millis(value.parse().ok()?),
            ("transport", "iwarp") => self.iwarp = true,
            ("netlink", "no") => self.netlink = false,
            ("vendor", _) => {
                let hex = value.strip_prefix("0x").map(|hex| u32::from_str_radix(hex, 16));
                self.vendor = hex.unwrap_or_else(|| value.parse()).ok()?;
            }
            _ => return None,
        }
        Some(())
    }

    /// An error number of a post, as this device's provider returns it.
    pub fn as_returned(&self, code: i32) -> i32 {
        if self.negative { -code.abs() } else { code }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_are_taken_and_nonsense_is_not() {
        let mut habits = Habits::default();
        for good in [
            "inline=96:error",
            "errno=negative",
            "full=EINVAL",
            "dead=EIO",
            "recv-busy=50",
            "imm=none",
            "rnr=ignored",
            "modify-resets",
            "zero-write=needs-key",
            "ack-timeout=18",
            "max-mr=3",
            "at-limit=ENOSPC",
            "arm=deferred",
            "events=2",
            "flush=on-poll",
            "destroy-cost=4",
            "guid=0",
            "loopback=no",
            "late-rtu=4300",
            "transport=iwarp",
            "vendor=0x2c9",
        ] {
            assert!(habits.take(good), "{good}");
        }
        assert_eq!((habits.inline, habits.max_mr), (Inline::Limited(96), 3));
        assert_eq!(habits.vendor, 713);
        assert_eq!((habits.full, habits.dead), (libc::EINVAL, Some(libc::EIO)));
        assert_eq!(habits.as_returned(libc::ENOMEM), -libc::ENOMEM);
        for bad in [
            "inline",
            "inline=",
            "inline=-1",
            "inline=96:often",
            "errno=positive",
            "imm=some",
            "rnr=1",
            "rnr",
            "ack-timeout=32",
            "max-qp=0",
            "events=3",
            "modify-resets=1",
            "guid=1",
        ] {
            assert!(!habits.take(bad), "{bad}");
        }
    }
}
