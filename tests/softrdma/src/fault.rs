// SPDX-License-Identifier: BSD-3-Clause
//! Faults on demand, from the environment variable `SOFTRDMA_FAULTS`.
//!
//! A list of terms, separated by commas or blanks: `seed=N`, settings, and faults
//! `NAME[=VALUE][WHEN]`, where WHEN is `@N` (the Nth time, once), `/N` (every Nth
//! time) or `%N` (one time in N, by a chance that only the seed and the count
//! decide); without it, always. Each fault counts for itself in each process.
//! README.md lists the names. The terms of the profile that `SOFTRDMA_DEVICE` names come
//! before those of the list.
//!
//! `SOFTRDMA_SECOND` is a second device: its address, then the name of a profile or terms of
//! habits, in that order, and `appears=MILLISECONDS`.

use crate::habits::Habits;
use crate::profiles;
use crate::verbs::device::Place;
use std::net::IpAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A place where a fault can strike.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Point {
    PostSend,
    PostReceive,
    SendQueueFull,
    Register,
    SendError,
    ReceiveError,
    CompletionDelay,
    CompletionBatch,
    EventLost,
    ReceiverNotReady,
    LoseRequest,
    LoseReply,
    LoseReadyToUse,
    LoseDisconnect,
    LoseTransfer,
    RemoveDevice,
    AddressChange,
    Poll,
    CompletionQueueError,
    AsyncEvent,
}

const NAMES: [(&str, Point); 20] = [
    ("post-send", Point::PostSend),
    ("post-recv", Point::PostReceive),
    ("sq-full", Point::SendQueueFull),
    ("reg-mr", Point::Register),
    ("wc-error", Point::SendError),
    ("recv-error", Point::ReceiveError),
    ("wc-delay", Point::CompletionDelay),
    ("wc-batch", Point::CompletionBatch),
    ("event-lost", Point::EventLost),
    ("rnr", Point::ReceiverNotReady),
    ("lose-req", Point::LoseRequest),
    ("lose-rep", Point::LoseReply),
    ("lose-rtu", Point::LoseReadyToUse),
    ("lose-dreq", Point::LoseDisconnect),
    ("lose-transfer", Point::LoseTransfer),
    ("remove-device", Point::RemoveDevice),
    ("address-changes", Point::AddressChange),
    ("poll-fails", Point::Poll),
    ("cq-err", Point::CompletionQueueError),
    ("async-event", Point::AsyncEvent),
];

#[derive(Clone, Copy, PartialEq, Debug)]
enum When {
    Always,
    Once(u64),
    Every(u64),
    Chance(u64),
}

#[derive(Debug)]
struct Fault {
    point: Point,
    value: u64,
    when: When,
    count: AtomicU64,
}

/// What the variable asks for.
#[derive(Debug, Default)]
pub struct Plan {
    seed: u64,
    faults: Vec<Fault>,
    /// Bytes that may be registered, as RLIMIT_MEMLOCK limits them on a device.
    pub memlock: Option<u64>,
    /// There is no device.
    pub no_device: bool,
    /// Milliseconds after which a device that was removed is back.
    pub device_returns: Option<u64>,
    /// The only address that the device owns.
    pub only: Option<IpAddr>,
    /// What the device does in its own way.
    pub habits: Habits,
    /// There is another one.
    pub second: Option<Second>,
}

/// A second device.
#[derive(Debug)]
pub struct Second {
    /// The address that it has, and the first has not.
    pub at: IpAddr,
    /// How much later than the first it comes.
    pub appears: Option<Duration>,
    habits: Habits,
}

/// The process's plan. A plan that can't be understood ends the process: a test
/// that believes in faults which never come proves nothing.
pub fn plan() -> &'static Plan {
    static PLAN: OnceLock<Plan> = OnceLock::new();
    PLAN.get_or_init(|| {
        let variable = |name| std::env::var(name).unwrap_or_default();
        let planned = Plan::of(&variable("SOFTRDMA_DEVICE"), &variable("SOFTRDMA_FAULTS"));
        let planned = planned.and_then(|mut plan| {
            plan.second = Second::of(&variable("SOFTRDMA_SECOND"))?;
            Ok(plan)
        });
        planned.unwrap_or_else(|error| {
            eprintln!("softrdma: {error}");
            std::process::exit(2);
        })
    })
}

/// What the device at a place does in its own way.
pub fn habits_of(place: Place) -> &'static Habits {
    match (place, &plan().second) {
        (Place::Second, Some(second)) => &second.habits,
        _ => &plan().habits,
    }
}

/// The value of the fault that strikes here and now, if one does.
pub fn strikes(point: Point) -> Option<u64> {
    let plan = plan();
    if plan.faults.is_empty() {
        return None;
    }
    plan.strikes(point)
}

/// True if any fault is planned: then shortcuts that would pass by them are off.
pub fn planned() -> bool {
    !plan().faults.is_empty()
}

/// A well-mixed function of its argument (splitmix64).
fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// Errnos by name, as far as the calls concerned return them.
pub fn errno(name: &str) -> Option<u64> {
    if let Some(positive) = name.strip_prefix('-') {
        return errno(positive).map(u64::wrapping_neg);
    }
    let code = match name {
        "EAGAIN" => libc::EAGAIN,
        "EFAULT" => libc::EFAULT,
        "EINVAL" => libc::EINVAL,
        "EIO" => libc::EIO,
        "ENOSPC" => libc::ENOSPC,
        "EOPNOTSUPP" => libc::EOPNOTSUPP,
        "ENODEV" => libc::ENODEV,
        "ENOMEM" => libc::ENOMEM,
        "EPERM" => libc::EPERM,
        _ => return name.parse().ok(),
    };
    Some(code as u64)
}

impl Plan {
    /// The plan for a device of that profile, or of none if it is empty, with faults.
    fn of(device: &str, faults: &str) -> Result<Plan, String> {
        let mut plan = Plan::default();
        if !device.is_empty() {
            plan.habits.take_profile(profiles::find(device)?)?;
        }
        for term in terms(faults) {
            let wrong = || format!("SOFTRDMA_FAULTS: can't understand '{term}'");
            plan.term(term).ok_or_else(wrong)?;
        }
        Ok(plan)
    }

    fn term(&mut self, term: &str) -> Option<()> {
        match term.split_once('=') {
            Some(("seed", n)) => self.seed = n.parse().ok()?,
            Some(("memlock", n)) => self.memlock = Some(n.parse().ok()?),
            Some(("device-returns", n)) => self.device_returns = Some(n.parse().ok()?),
            Some(("only", ip)) => self.only = Some(ip.parse().ok()?),
            _ if term == "no-device" => self.no_device = true,
            _ if self.habits.take(term) => {}
            _ => self.faults.push(Fault::parse(term)?),
        }
        Some(())
    }

    fn strikes(&self, point: Point) -> Option<u64> {
        let mut struck = None;
        for (i, fault) in self.faults.iter().enumerate().filter(|(_, f)| f.point == point) {
            let n = fault.count.fetch_add(1, Ordering::Relaxed) + 1;
            let hit = match fault.when {
                When::Always => true,
                When::Once(at) => n == at,
                When::Every(each) => n % each == 0,
                When::Chance(of) => mix(self.seed ^ mix(i as u64) ^ mix(n)).is_multiple_of(of),
            };
            if hit {
                struck = struck.or(Some(fault.value));
            }
        }
        struck
    }
}

fn terms(list: &str) -> impl Iterator<Item = &str> {
    list.split([',', ' ', '\n']).filter(|term| !term.is_empty())
}

impl Second {
    /// The device that a list asks for; none if it is empty.
    fn of(list: &str) -> Result<Option<Second>, String> {
        let wrong = |term: &str| format!("SOFTRDMA_SECOND: can't understand '{term}'");
        let mut terms = terms(list);
        let Some(address) = terms.next() else { return Ok(None) };
        let at = address.parse().map_err(|_| wrong(address))?;
        let mut second = Second { at, appears: None, habits: Habits::default() };
        for term in terms {
            if let Some(after) = term.strip_prefix("appears=") {
                let after = after.parse().map_err(|_| wrong(term))?;
                second.appears = Some(Duration::from_millis(after));
            } else if let Ok(profile) = profiles::find(term) {
                second.habits.take_profile(profile)?;
            } else if !second.habits.take(term) {
                return Err(wrong(term));
            }
        }
        Ok(Some(second))
    }
}

impl Fault {
    fn parse(term: &str) -> Option<Fault> {
        let (rest, when) = match term.find(['@', '/', '%']) {
            None => (term, When::Always),
            Some(at) => {
                let n: u64 = term[at + 1..].parse().ok().filter(|n| *n > 0)?;
                let when = match term.as_bytes()[at] {
                    b'@' => When::Once(n),
                    b'/' => When::Every(n),
                    _ => When::Chance(n),
                };
                (&term[..at], when)
            }
        };
        let (name, value) = rest.split_once('=').map_or((rest, None), |(n, v)| (n, Some(v)));
        let point = NAMES.iter().find(|(n, _)| *n == name)?.1;
        let value = match (point, value) {
            (Point::PostSend | Point::PostReceive, Some(v)) => errno(v)?,
            (Point::Register, Some(v)) if !v.starts_with('-') => errno(v)?,
            // Microseconds; completions; a completion status.
            (Point::CompletionDelay | Point::CompletionBatch, Some(v))
            | (Point::SendError | Point::ReceiveError, Some(v)) => v.parse().ok()?,
            (Point::AsyncEvent, Some(v)) => {
                v.parse().ok().filter(|kind| *kind < crate::removal::KINDS.len() as u64)?
            }
            (Point::PostSend | Point::PostReceive | Point::Register, None)
            | (Point::CompletionDelay | Point::CompletionBatch, None)
            | (Point::SendError | Point::ReceiveError | Point::AsyncEvent, None)
            | (_, Some(_)) => return None,
            (_, None) => 0,
        };
        Some(Fault { point, value, when, count: AtomicU64::new(0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(text: &str, point: Point, tries: u64) -> Vec<u64> {
        let plan = Plan::of("", text).expect("a plan");
        (1..=tries).filter(|_| plan.strikes(point).is_some()).collect()
    }

    #[test]
    fn a_fault_strikes_when_it_is_told_to() {
        assert_eq!(hits("sq-full@3", Point::SendQueueFull, 10).len(), 1);
        assert_eq!(hits("sq-full/4", Point::SendQueueFull, 12).len(), 3);
        assert_eq!(hits("rnr", Point::ReceiverNotReady, 5).len(), 5);
        assert_eq!(hits("rnr", Point::SendQueueFull, 5).len(), 0);
    }

    #[test]
    fn chance_is_the_seed_s_alone() {
        let once = hits("seed=5 rnr%10", Point::ReceiverNotReady, 10_000);
        assert_eq!(once, hits("seed=5 rnr%10", Point::ReceiverNotReady, 10_000));
        assert_ne!(once, hits("seed=6 rnr%10", Point::ReceiverNotReady, 10_000));
        assert!((800..1200).contains(&once.len()), "{}", once.len());
    }

    #[test]
    fn values_are_read_and_nonsense_is_not() {
        let read = |text| Plan::of("", text);
        let plan = read("post-send=EIO@1,reg-mr=12 memlock=65536,only=::1").expect("a plan");
        assert_eq!(plan.strikes(Point::PostSend), Some(libc::EIO as u64));
        assert_eq!(plan.strikes(Point::Register), Some(12));
        assert_eq!(
            (plan.memlock, plan.only),
            (Some(65_536), Some("::1".parse().expect("an address")))
        );
        let plan = read("post-send=-EAGAIN post-recv=-22").expect("a plan");
        assert_eq!(plan.strikes(Point::PostSend).map(|code| code as i32), Some(-libc::EAGAIN));
        assert_eq!(plan.strikes(Point::PostReceive).map(|code| code as i32), Some(-22));
        for bad in [
            "rnr@0",
            "rnr=1",
            "imm",
            "zero-write=always",
            "async-event",
            "post-send",
            "wc-delay=x",
            "nothing",
            "rnr%",
            "seed=x",
            "only=me",
            "reg-mr=-12",
            "inline=-1",
        ] {
            let error = read(bad).unwrap_err();
            assert_eq!(error, format!("SOFTRDMA_FAULTS: can't understand '{bad}'"));
        }
    }

    #[test]
    fn every_profile_is_understood_and_terms_of_the_list_come_after_its_own() {
        for profile in profiles::PROFILES {
            Plan::of(profile.name, "").expect(profile.name);
        }
        let plan = Plan::of("erdma", "rnr=ignored").expect("a plan");
        assert_eq!(plan.habits.rnr, crate::habits::Rnr::Ignored);
        let error = Plan::of("mlx6", "").unwrap_err();
        assert!(error.contains("'mlx6'") && error.contains("mlx5") && error.contains("qedr"));
    }

    #[test]
    fn a_second_device_has_an_address_and_habits_of_its_own() {
        assert!(Second::of("").expect("no device").is_none());
        let second = Second::of("127.0.0.2 erdma rnr=ignored,appears=500");
        let second = second.expect("a plan").expect("a device");
        assert_eq!(second.at.to_string(), "127.0.0.2");
        assert_eq!(second.appears, Some(Duration::from_millis(500)));
        assert!(second.habits.negative, "the profile's");
        assert_eq!(second.habits.rnr, crate::habits::Rnr::Ignored, "the term's, after it");
        for (bad, word) in
            [("erdma", "erdma"), ("::1 rnr@1", "rnr@1"), ("::1 appears=x", "appears=x")]
        {
            let error = Second::of(bad).unwrap_err();
            assert_eq!(error, format!("SOFTRDMA_SECOND: can't understand '{word}'"));
        }
    }
}
