// SPDX-License-Identifier: BSD-3-Clause
//! What is counted, for Prometheus.

use crate::http::{self, Answer, Request};
use anyhow::{Context, Result};
use prometheus_client::encoding::text;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::net::{SocketAddr, TcpListener};

/// One label: its name and its value.
type Label = [(&'static str, &'static str); 1];

/// Where bytes go.
#[derive(Clone, Copy, Debug)]
pub enum Direction {
    /// From programs.
    ToServer,
    /// From the server.
    ToPrograms,
}

impl Direction {
    fn label(self) -> Label {
        let value = match self {
            Self::ToServer => "to_server",
            Self::ToPrograms => "to_programs",
        };
        [("direction", value)]
    }
}

/// What carries a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// RDMA.
    Rdma,
    /// TCP, as a fallback.
    Tcp,
}

impl By {
    fn label(self) -> Label {
        [("carrier", if self == Self::Rdma { "rdma" } else { "tcp" })]
    }
}

/// Why a program was refused.
#[derive(Clone, Copy, Debug)]
pub enum Reason {
    /// There are as many as may be.
    Limit,
    /// The server can't be reached, or there is no memory for it.
    Unreachable,
}

impl Reason {
    fn label(self) -> Label {
        let value = match self {
            Self::Limit => "limit",
            Self::Unreachable => "unreachable",
        };
        [("reason", value)]
    }
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    bytes: Family<Label, Counter>,
    connections: Family<Label, Gauge>,
    connected: Family<Label, Counter>,
    refused: Family<Label, Counter>,
    /// Turns of the event loop.
    pub wakeups: Counter,
}

impl Metrics {
    /// The counter of bytes that go there.
    pub fn bytes(&self, direction: Direction) -> Counter {
        self.bytes.get_or_create(&direction.label()).clone()
    }

    /// A connection to the server stands.
    pub fn connected(&self, by: By) {
        self.connections.get_or_create(&by.label()).inc();
        self.connected.get_or_create(&by.label()).inc();
    }

    /// One is over.
    pub fn disconnected(&self, by: By) {
        self.connections.get_or_create(&by.label()).dec();
    }

    /// A program was refused.
    pub fn refused(&self, reason: Reason) {
        self.refused.get_or_create(&reason.label()).inc();
    }

    fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("valkey_rdma_bridge");
        registry.register_with_unit(
            "carried",
            "Bytes carried between programs and the server",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register(
            "connections",
            "Connections to the server that stand",
            self.connections.clone(),
        );
        registry.register("connected", "Connections made to the server", self.connected.clone());
        registry.register("refused", "Programs that were refused", self.refused.clone());
        registry.register("wakeups", "Turns of the event loop", self.wakeups.clone());
        registry
    }

    /// As Prometheus reads them.
    fn text(&self) -> String {
        let mut registry = self.registry();
        let registered = Gauge::<i64>::default();
        registered.set(i64::try_from(verbs::account::registered().0).unwrap_or(i64::MAX));
        registry.register_with_unit("registered", "Registered memory", Unit::Bytes, registered);
        let mut text = String::new();
        text::encode(&mut text, &registry).expect("a String takes all");
        text
    }

    /// Answers who asks at `address`, in a thread of its own.
    ///
    /// # Errors
    /// If it can't be listened at.
    pub fn serve(&self, address: SocketAddr) -> Result<()> {
        let listener = TcpListener::bind(address)
            .with_context(|| format!("cannot offer the metrics at {address}"))?;
        let metrics = self.clone();
        std::thread::spawn(move || http::serve(&listener, move |request| metrics.answer(request)));
        Ok(())
    }

    fn answer(&self, request: &Request) -> Answer {
        match request.path.as_str() {
            "/metrics" => Answer {
                status: "200 OK",
                kind: "application/openmetrics-text; version=1.0.0; charset=utf-8",
                body: self.text(),
            },
            _ => Answer::plain("404 Not Found", "the metrics are at /metrics"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_told() {
        let metrics = Metrics::default();
        metrics.bytes(Direction::ToServer).inc_by(7);
        metrics.connected(By::Rdma);
        metrics.connected(By::Rdma);
        metrics.disconnected(By::Rdma);
        metrics.refused(Reason::Limit);
        let text = metrics.text();
        for line in [
            "valkey_rdma_bridge_carried_bytes_total{direction=\"to_server\"} 7",
            "valkey_rdma_bridge_connections{carrier=\"rdma\"} 1",
            "valkey_rdma_bridge_connected_total{carrier=\"rdma\"} 2",
            "valkey_rdma_bridge_refused_total{reason=\"limit\"} 1",
            "valkey_rdma_bridge_wakeups_total 0",
            "valkey_rdma_bridge_registered_bytes 0",
            "# EOF",
        ] {
            assert!(text.lines().any(|it| it == line), "no '{line}' in\n{text}");
        }
    }
}
