// SPDX-License-Identifier: BSD-3-Clause
//! A few active connections among thousands of idle ones: what all of them take, and whether
//! the active ones are as fast as they were alone.

use std::path::Path;

use anyhow::{Result, ensure};
use cells::lab::Lab;
use serde::{Deserialize, Serialize};

use crate::contender::{Contender, alive};
use crate::idle::Idle;
use crate::load::{Figures, Stage};
use crate::table::{Cell, Crowd, Pace, Size};

/// What one turn measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Among {
    /// The server's resident bytes with the idle connections.
    pub resident: u64,
    /// The active ones before the idle ones came.
    pub alone: Figures,
    /// The active ones among the idle ones.
    pub among: Figures,
}

/// Measures once, on one server: first without the idle connections, then with them.
pub fn measure(
    lab: &Lab,
    pace: &Pace,
    crowd: Crowd,
    who: Contender,
    folder: &Path,
) -> Result<Among> {
    let cell = Cell {
        command: "get".into(),
        size: Size(64),
        clients: crowd.active,
        pipeline: 1,
        io_threads: 1,
        seconds: None,
    };
    let mut stage = Stage::set(lab, pace, &cell, who, folder)?;
    let maxclients = crowd.maxclients;
    let set =
        stage.server.tcp(pace.limit())?.words(&format!("CONFIG SET maxclients {maxclients}"))?;
    ensure!(set.text() == "OK", "CONFIG SET maxclients {maxclients}: {set}");
    let figures = figures(lab, pace, crowd, who, &mut stage);
    alive(&mut stage.server)?;
    let figures = figures?;
    stage.strike()?;
    Ok(figures)
}

fn figures(
    lab: &Lab,
    pace: &Pace,
    crowd: Crowd,
    who: Contender,
    stage: &mut Stage,
) -> Result<Among> {
    let alone = stage.figures(pace)?;
    // The C module sees clients leave late. Of the connections made meanwhile many do not last
    // (739 of 1,900 were left in one run), and why has not been looked at.
    stage.wait_until_alone()?;
    let idle =
        Idle::connect(lab, pace.limit(), who, crowd.connections - crowd.active, &stage.server)?;
    let resident = stage.server.resident()?;
    let among = stage.figures(pace)?;
    idle.end()?;
    Ok(Among { resident, alone, among })
}
