// SPDX-License-Identifier: BSD-3-Clause
//! The tests, by theme.

use crate::cell::Case;

mod abilities;
mod basics;
mod beside_links;
mod bridged;
mod children;
mod churn;
mod config;
mod counters;
mod crowd;
mod deadlock;
mod device_events;
mod device_lacks;
mod devices;
mod doctor;
mod durable;
mod endings;
mod failover;
mod hostile;
mod io_threads;
mod late;
mod lifecycle;
mod links;
mod monitored;
mod operators;
mod outgoing;
mod panics;
mod peers;
mod profiles;
mod programs;
mod providers;
mod refusals;
mod removal;
mod replica;
mod replicas_soak;
mod replication;
mod sizes;
mod soak;
mod stalled;
mod stock_clients;
mod two_devices;
mod upstream;

/// Every case there is.
pub fn all() -> impl Iterator<Item = &'static Case> {
    [
        abilities::CASES,
        basics::CASES,
        bridged::CASES,
        children::CASES,
        sizes::CASES,
        stock_clients::CASES,
        deadlock::CASES,
        device_events::CASES,
        device_lacks::CASES,
        devices::CASES,
        doctor::CASES,
        durable::CASES,
        stalled::CASES,
        hostile::CASES,
        io_threads::CASES,
        soak::CASES,
        churn::CASES,
        crowd::CASES,
        late::CASES,
        lifecycle::CASES,
        endings::CASES,
        operators::CASES,
        outgoing::CASES,
        panics::CASES,
        profiles::CASES,
        programs::CASES,
        providers::CASES,
        config::CASES,
        counters::CASES,
        refusals::CASES,
        removal::CASES,
        replica::CASES,
        replication::CASES,
        failover::CASES,
        links::CASES,
        monitored::CASES,
        replicas_soak::CASES,
        beside_links::CASES,
        two_devices::CASES,
    ]
    .into_iter()
    .flatten()
}
