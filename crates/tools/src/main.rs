// SPDX-License-Identifier: BSD-3-Clause
//! `valkey-rdma`: whether a server answers over RDMA, how fast, and why not; what its clients do,
//! on a screen and for Prometheus; and a bridge to it for programs that speak no RDMA.

mod bridge;
mod check;
mod exporter;
mod http;
mod monitor;
mod ping;
mod reply;
mod server;
mod top;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Whether a Valkey server answers over RDMA, how fast, and why not; what its clients do; and a
/// bridge to it.
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
    Bridge(bridge::Arguments),
    Top(top::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Ping(arguments) => ping::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Exporter(arguments) => exporter::run(&arguments),
        Command::Bridge(arguments) => bridge::run(&arguments),
        Command::Top(arguments) => top::run(&arguments),
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
    use std::collections::BTreeSet;

    #[test]
    fn the_arguments_are_consistent() {
        super::Arguments::command().debug_assert();
    }

    #[test]
    fn every_option_of_the_bridge_is_documented() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/clients.md");
        let page = std::fs::read_to_string(page).unwrap();
        let rows = page.lines().filter(|line| line.starts_with("| `--"));
        let documented: BTreeSet<_> = rows
            .map(|row| row.split('|').map(str::trim).collect::<Vec<_>>())
            .map(|cells| {
                let name = cells[1].trim_matches('`').trim_start_matches('-');
                (name.to_owned(), cells[2].replace("no limit", ""))
            })
            .collect();
        let bridge = super::Arguments::command();
        let bridge = bridge.find_subcommand("bridge").unwrap();
        let options: BTreeSet<_> = bridge
            .get_arguments()
            .map(|it| {
                let defaults: Vec<_> =
                    it.get_default_values().iter().map(|it| it.to_string_lossy()).collect();
                (it.get_long().unwrap().to_owned(), defaults.join(" "))
            })
            .collect();
        assert_eq!(documented, options);
    }

    #[test]
    fn the_unit_runs_the_bridge() {
        let unit =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../packaging/valkey-rdma-bridge@.service");
        let unit = std::fs::read_to_string(unit).unwrap();
        let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/"));
        let command = command.unwrap().replace("%t", "/run").replace("%i", "cache");
        let command = command.replace("${TO}", "192.0.2.10:6379");
        let command = command.replace("$OPTIONS", "--max-connections 1000 --fallback");
        let parsed = super::Arguments::command().try_get_matches_from(command.split(' '));
        assert_eq!(parsed.unwrap().subcommand_name(), Some("bridge"));
    }
}
