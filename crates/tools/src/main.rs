// SPDX-License-Identifier: BSD-3-Clause
//! `valkey-rdma`: whether a server answers over RDMA, how fast, and why not.

mod check;
mod exporter;
mod monitor;
mod ping;
mod reply;
mod server;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Whether a Valkey server answers over RDMA, how fast, and why not.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Ping(ping::Arguments),
    Check(check::Arguments),
    Exporter(exporter::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Ping(arguments) => ping::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Exporter(arguments) => exporter::run(&arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("valkey-rdma: {error:#}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        super::Arguments::command().debug_assert();
    }
}
