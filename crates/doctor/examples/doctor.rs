// SPDX-License-Identifier: BSD-3-Clause
//! Examines the RDMA device that has an address of this machine, and prints what was found.
//!
//! ```sh
//! cargo run -p valkey-rdma-doctor --example doctor -- 10.0.0.1
//! ```

use std::error::Error;
use valkey_rdma_doctor::examine;

fn main() -> Result<(), Box<dyn Error>> {
    let address = std::env::args().nth(1).ok_or("usage: doctor ADDRESS")?.parse()?;
    verbs::library::load()?;
    let found = examine(address);
    if let Some(facts) = &found.facts {
        println!("{facts}");
    }
    for (name, outcome) in &found.checks {
        println!("{name}: {outcome}");
    }
    println!("resembles: {}", found.resembles);
    let failed = found.failures().count();
    if failed == 0 { Ok(()) } else { Err(format!("{failed} checks failed").into()) }
}
