// SPDX-License-Identifier: BSD-3-Clause
//! Two sessions with their windows against each other over a simulated fabric.
//!
//! A seed decides on everything: sizes and limits of both sides, and, step by step,
//! which of all the things that could happen next does happen. Some seeds are also
//! tried with each fault at each step of theirs. What must hold:
//! bytes out equal bytes in, in order; or the connection ends on both sides, and
//! what came in is a beginning of what went out. Either way all memory is given
//! back. And the two never find that the other broke the protocol, nor wait for
//! each other for ever.
//!
//! ```text
//! cargo test -p valkey-rdma-proto --test simulation                            5,000 seeds
//! SIMULATION_SEEDS=100000 cargo test -p valkey-rdma-proto --test simulation
//! SIMULATION_SEED=17 cargo test -p valkey-rdma-proto --test simulation         that one, step by step
//! SIMULATION_SEED=17 SIMULATION_FAULT='break 1 230' …     with this fault instead of its own
//! ```

mod fabric;
mod side;

use fabric::{Fabric, Port, Setup};
use fastrand::Rng;
use side::{NOW, Plan, Side, size};
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

const SEEDS: u64 = 5_000;

/// One in so many seeds is tried with each fault at each step.
const FAULTLESS: u64 = 500;
/// Steps that such a seed takes at most.
const SHORT: u32 = 600;

/// Steps without a byte moved after which a connection that still has something to do is
/// called stuck. Who goes by the clock alone may take a third of it.
const PATIENCE: u32 = 1_000_000;

/// What happens to the connection, at which step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The application of one side closes.
    Close(Port, u32),
    /// One side disappears from the connection manager's view.
    Disconnect(Port, u32),
    /// One side's queue pair breaks.
    Break(Port, u32),
}

/// What a connection came to.
#[derive(Clone, Copy, Debug)]
enum Ending {
    /// Both sides have all bytes of the other.
    Complete,
    /// One side closed before that; what it had written arrived.
    Closed,
    /// Something broke it, and both sides know.
    Failed,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    CarryOut(Port),
    Acknowledge(Port),
    Poll(Port),
    Event(Port),
    Serve(Port),
    Jobs(Port),
    Produce(Port),
    Ask(Port),
    KeepAlive(Port),
    Tick,
}

struct World {
    rng: Rng,
    fabric: Fabric,
    sides: [Side; 2],
    fault: Fault,
    loud: bool,
    /// Whether what happens here may have to wait for the clock to look again.
    needs_clock: bool,
    /// One in so many steps is the clock's.
    rush: u32,
    /// How often in a row only the clock moved anything.
    idle_ticks: u32,
    /// Steps since the connection began.
    steps: u32,
    /// Bytes that both sides have sent and received, and the step that moved the last.
    moved: (u64, u32),
}

impl World {
    /// The world of a seed, with another fault than its own if one is given.
    fn new(seed: u64, fault: Option<Fault>, loud: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let plans = [0, 1].map(|port| plan(port, &mut rng));
        let setups = plans.map(|plan| {
            let control = usize::from(plan.control_slots) + 2;
            let least = plan.payload_depth / 2 + 1;
            // Full queues go with refusals: both leave it to the clock to look again.
            let scarce = plan.refusals > 0 && rng.bool();
            let payload =
                if scarce { rng.usize(least..=plan.payload_depth) } else { plan.payload_depth };
            Setup {
                depth: control + payload,
                retries: (rng.u32(0..10) == 0).then(|| rng.u32(0..50)),
            }
        });
        let mut fabric = Fabric::new(setups);
        let sides = plans.map(|plan| Side::new(plan, &mut fabric, &mut rng));
        let needs_clock = plans.iter().any(|plan| plan.refusals > 0);
        let (port, step) = (rng.usize(0..2), size(&mut rng, 11) as u32);
        let own = match rng.u32(0..8) {
            0 | 1 => Fault::Close(port, step),
            2 => Fault::Disconnect(port, step),
            3 => Fault::Break(port, step),
            _ => Fault::None,
        };
        let fault = fault.unwrap_or(own);
        if loud {
            println!("{plans:#?}\n{setups:?}\n{fault:?}");
        }
        NOW.set(0);
        let needs_clock = needs_clock || fault != Fault::None;
        Self {
            fabric,
            sides,
            fault,
            loud,
            needs_clock,
            rush: 3 + size(&mut rng, 8) as u32,
            rng,
            idle_ticks: 0,
            steps: 0,
            moved: (0, 0),
        }
    }

    /// What could happen now, things that stand for more of the same more than once.
    fn possible(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        for port in [0, 1] {
            let side = &self.sides[port];
            let mut add = |count: usize, action| actions.extend(std::iter::repeat_n(action, count));
            if self.fabric.can_carry_out(port) {
                add(3, Action::CarryOut(port));
            }
            if self.fabric.can_acknowledge(port) {
                add(2, Action::Acknowledge(port));
            }
            if side.ended {
                continue;
            }
            if self.fabric.has_completions(port) {
                add(3, Action::Poll(port));
            }
            if self.fabric.has_events(port) {
                add(1, Action::Event(port));
            }
            if side.ready {
                add(2, Action::Serve(port));
            }
            if side.has_job() {
                add(1, Action::Jobs(port));
            }
            if side.may_produce() {
                add(1, Action::Produce(port));
            }
            if side.may_ask() {
                add(1, Action::Ask(port));
            }
        }
        actions
    }

    fn act(&mut self, action: Action) {
        let Self { rng, fabric, sides, .. } = self;
        if self.loud {
            println!("{action:?}");
        }
        match action {
            Action::CarryOut(port) => fabric.carry_out(port),
            Action::Acknowledge(port) => fabric.acknowledge(port),
            Action::Poll(port) => sides[port].poll(fabric, rng),
            Action::Event(port) => sides[port].event(fabric, rng),
            Action::Serve(port) => sides[port].serve(fabric, rng),
            Action::Jobs(port) => sides[port].do_jobs(fabric, rng),
            Action::Produce(port) => sides[port].produce(fabric, rng),
            Action::Ask(port) => sides[port].ask(fabric, rng),
            Action::KeepAlive(port) => sides[port].keep_alive(fabric, rng),
            Action::Tick => {
                NOW.set(NOW.get() + rng.u64(1..=1_000));
                for side in sides.iter_mut().filter(|side| !side.ended) {
                    side.tick(NOW.get(), fabric, rng);
                }
            }
        }
        fabric.reap();
    }

    /// Lets things happen until `done`.
    fn run(&mut self, mut done: impl FnMut(&Self) -> bool) {
        while !done(self) {
            self.steps += 1;
            let moved = self.sides.iter().map(|side| side.accepted + side.received).sum();
            if moved != self.moved.0 {
                self.moved = (moved, self.steps);
            }
            let quiet = self.steps - self.moved.1;
            assert!(quiet < PATIENCE && self.idle_ticks < 200, "stuck: {:#?}", self.sides);
            self.inject(self.steps);
            let possible = self.possible();
            let action = match self.rng.u32(0..self.rush) {
                0 => Action::Tick,
                1 => Action::KeepAlive(self.rng.usize(0..2)),
                _ => self.rng.choice(possible.iter().copied()).unwrap_or(Action::Tick),
            };
            if let Action::KeepAlive(port) = action
                && self.sides[port].ended
            {
                continue;
            }
            self.idle_ticks = if possible.is_empty() { self.idle_ticks + 1 } else { 0 };
            let failed = self.sides.iter().any(|side| side.failed);
            assert!(
                self.idle_ticks == 0 || self.needs_clock || failed,
                "asleep with something to do: {:#?}",
                self.sides
            );
            self.act(action);
        }
    }

    fn inject(&mut self, step: u32) {
        let Self { rng, fabric, sides, .. } = self;
        match self.fault {
            Fault::Close(port, at) if at <= step => {
                sides[port].close(fabric, rng);
                // Before the handshake is complete there is nothing to close.
                if sides[port].closed || sides[port].ended {
                    self.fault = Fault::None;
                }
            }
            Fault::Disconnect(port, at) if at == step && !sides[port].ended => {
                fabric.disconnect(port);
            }
            Fault::Break(port, at) if at == step && !sides[port].ended => {
                fabric.break_pair(port);
            }
            _ => {}
        }
        fabric.reap();
    }

    fn check(&mut self) -> Ending {
        let planned = self.fault;
        let over = |world: &Self| {
            let [a, b] = &world.sides;
            a.ended && b.ended
                || a.is_complete(b)
                    && b.is_complete(a)
                    && world.possible().is_empty()
                    && !matches!(world.fault, Fault::Close(..))
        };
        self.run(over);
        // Lingering goes by the clock.
        self.needs_clock = true;
        if self.sides.iter().all(|side| !side.ended) {
            // All is said: idle connections give their memory back, and one side leaves.
            for _ in 0..40 {
                self.act(Action::Tick);
                while let Some(action) = self.possible().first() {
                    self.act(*action);
                }
            }
            if self.sides.iter().all(|side| !side.ended) {
                self.sides.iter().for_each(|side| side.assert_nothing_in_flight(&self.fabric));
            }
            let leaver = self.rng.usize(0..2);
            self.sides[leaver].close(&mut self.fabric, &mut self.rng);
            self.fabric.reap();
        }
        self.run(|world| world.sides.iter().all(|side| side.ended));
        assert_eq!(self.fabric.registered(), 0, "memory left behind");
        let excused = matches!(planned, Fault::Disconnect(..) | Fault::Break(..))
            || self.fabric.ran_out_of_retries;
        for port in [0, 1] {
            let (side, peer) = (&self.sides[port], &self.sides[1 - port]);
            assert!(side.received <= peer.accepted, "more than was sent");
            if !excused {
                // All that was accepted has arrived, unless its reader had closed, or was
                // still in its handshake.
                let read = side.handed_over && !side.closed;
                assert!(!read || side.received == peer.accepted, "bytes lost at a close");
                assert!(planned != Fault::None || side.is_complete(peer), "bytes lost");
            }
        }
        match excused {
            true => Ending::Failed,
            false if planned == Fault::None => Ending::Complete,
            false => Ending::Closed,
        }
    }
}

fn plan(port: Port, rng: &mut Rng) -> Plan {
    let small_staging = size(rng, 8);
    let mut staging = small_staging;
    Plan {
        port,
        source: size(rng, 13) as u64,
        receive_bytes: size(rng, 10),
        receive_slots: rng.u16(2..20),
        control_slots: rng.u16(1..5),
        payload_depth: rng.usize(1..=32),
        small_staging,
        larger_staging: [(); 3].map(|()| {
            staging += size(rng, 9);
            staging
        }),
        // A client asks, a server answers.
        questions: if port == 1 { rng.u32(0..30) } else { 0 },
        refusals: if rng.u32(0..4) == 0 { rng.u32(5..100) } else { 0 },
        offload: rng.u32(1..5),
    }
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: a number")))
}

/// The fault that the environment names, such as `break 1 230`.
fn fault() -> Option<Fault> {
    let text = env::var("SIMULATION_FAULT").ok()?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let number = |word: &str| word.parse().expect("SIMULATION_FAULT: KIND SIDE STEP");
    Some(match words[..] {
        ["none"] => Fault::None,
        ["close", port, step] => Fault::Close(number(port) as Port, number(step)),
        ["disconnect", port, step] => Fault::Disconnect(number(port) as Port, number(step)),
        ["break", port, step] => Fault::Break(number(port) as Port, number(step)),
        _ => panic!("SIMULATION_FAULT: none, or close, disconnect or break, SIDE and STEP"),
    })
}

/// Tries all numbers below `count`, and returns one that panicked, if any did.
fn first_failure(count: usize, attempt: impl Fn(usize) + Sync) -> Option<usize> {
    let attempt = AssertUnwindSafe(attempt);
    let next = AtomicUsize::new(0);
    let failed = AtomicUsize::new(usize::MAX);
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while failed.load(Ordering::Relaxed) == usize::MAX {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        break;
                    }
                    if catch_unwind(|| attempt(number)).is_err() {
                        failed.fetch_min(number, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    Some(failed.into_inner()).filter(|number| *number < usize::MAX)
}

#[test]
fn bytes_out_equal_bytes_in_or_both_sides_end() {
    if let Some(seed) = number("SIMULATION_SEED") {
        println!("{:?}", World::new(seed, fault(), true).check());
        return;
    }
    let seeds = number("SIMULATION_SEEDS").unwrap_or(SEEDS);
    let endings = [const { AtomicU64::new(0) }; 3];
    let failed = first_failure(seeds as usize, |seed| {
        let ending = World::new(seed as u64, None, false).check();
        endings[ending as usize].fetch_add(1, Ordering::Relaxed);
    });
    if let Some(seed) = failed {
        panic!(
            "seed {seed} failed: SIMULATION_SEED={seed} cargo test -p valkey-rdma-proto --test simulation -- --nocapture"
        );
    }
    let [complete, closed, broken] = endings.map(AtomicU64::into_inner);
    println!("{seeds} seeds: {complete} complete, {closed} closed early, {broken} failed");
    assert!(
        seeds < 1_000 || complete.min(closed).min(broken) > seeds / 20,
        "the seeds do not try what they should"
    );
}

/// Whichever step it is at which a side closes, disconnects or breaks.
#[test]
fn a_connection_may_end_at_every_step() {
    if number("SIMULATION_SEED").is_some() {
        return;
    }
    let seeds = number("SIMULATION_SEEDS").unwrap_or(SEEDS) / FAULTLESS;
    let mut cases = Vec::new();
    for seed in 0..seeds {
        let mut world = World::new(seed, Some(Fault::None), false);
        world.check();
        for step in 1..=world.steps.min(SHORT) {
            for port in [0, 1] {
                let kinds = [Fault::Close, Fault::Disconnect, Fault::Break];
                cases.extend(kinds.map(|kind| (seed, kind(port, step))));
            }
        }
    }
    let failed = first_failure(cases.len(), |number| {
        let (seed, fault) = cases[number];
        World::new(seed, Some(fault), false).check();
    });
    if let Some(number) = failed {
        let (seed, fault) = cases[number];
        let text = format!("{fault:?}").to_lowercase().replace(['(', ',', ')'], " ");
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        panic!(
            "failed: SIMULATION_SEED={seed} SIMULATION_FAULT='{text}' \
             cargo test -p valkey-rdma-proto --test simulation -- --nocapture"
        );
    }
    println!("{} faults in {seeds} connections", cases.len());
}
