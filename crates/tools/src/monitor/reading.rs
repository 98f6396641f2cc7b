// SPDX-License-Identifier: BSD-3-Clause
//! `INFO rdma` and `RDMA.CLIENTS`, by the names of their fields.

use crate::reply::Reply;
use anyhow::{Context, Result, bail};

/// The fields of `INFO rdma`, without `rdma_` before their names, in the server's order.
#[derive(Clone, Debug, Default)]
pub struct Info(Vec<(String, String)>);

impl Info {
    /// Reads the answer's text.
    pub fn parse(text: &str) -> Self {
        let fields = text.lines().filter_map(|line| line.strip_prefix("rdma_")?.split_once(':'));
        Self(fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
    }

    /// All fields.
    pub fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// A field's value, if there is such a field.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.fields().find(|(it, _)| *it == name).map(|(_, value)| value)
    }

    /// A field that is a number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }

    /// A limit: what there is now, and the most, if there is one.
    pub fn limit(&self, name: &str) -> Option<(u64, Option<u64>)> {
        let (now, most) = self.text(name)?.split_once('/')?;
        Some((now.parse().ok()?, most.parse().ok()))
    }

    /// The maps `device0`, `device1`, …
    pub fn devices(&self) -> impl Iterator<Item = Map<'_>> {
        let devices = self.fields().filter(|(name, _)| is_device(name));
        devices.map(|(_, value)| Map(value))
    }

    /// A field that is a map.
    pub fn map(&self, name: &str) -> Option<Map<'_>> {
        self.text(name).map(Map)
    }
}

/// Whether a field is one of the devices.
pub fn is_device(name: &str) -> bool {
    name.strip_prefix("device").is_some_and(|number| number.parse::<u32>().is_ok())
}

/// A map within a field: `name=value,name=value`.
#[derive(Clone, Copy, Debug)]
pub struct Map<'a>(&'a str);

impl<'a> Map<'a> {
    /// A value by its name.
    pub fn text(self, name: &str) -> Option<&'a str> {
        let fields = self.0.split(',').filter_map(|field| field.split_once('='));
        fields.into_iter().find(|(it, _)| *it == name).map(|(_, value)| value)
    }

    /// A value that is a number.
    pub fn number(self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }
}

/// What a connection may wait for, as `waits-for` says it.
pub const WAITS: [&str; 9] = [
    "nothing",
    "client's window",
    "client's announcement",
    "connection manager",
    "completion",
    "I/O thread",
    "server",
    "pass",
    "delivery",
];

/// A connection, as `RDMA.CLIENTS` tells of it. What an older module does not tell is 0 or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Client {
    /// Its number in `CLIENT LIST`; none while the handshake goes on.
    pub id: Option<u64>,
    /// The client's address.
    pub addr: String,
    /// The device that carries it.
    pub device: String,
    /// `client`, `replica` or `primary`.
    pub role: String,
    /// How far it has come: `handshaking`, `established`, `lingering` or `ending`.
    pub state: String,
    /// What it waits for.
    pub waits_for: String,
    /// Since when, in milliseconds.
    pub waits_ms: u64,
    /// How old it is, in milliseconds.
    pub age_ms: u64,
    /// Bytes that have arrived, ever.
    pub received: u64,
    /// Of these, those that the server has not read.
    pub unread: u64,
    /// Bytes that were sent, ever.
    pub sent: u64,
    /// Bytes in our window, and its size.
    pub receive_window: (u64, u64),
    /// Bytes in the client's window, and its size.
    pub send_window: (u64, u64),
    /// Writes that are not known to have arrived.
    pub in_flight: u64,
    /// Registered memory beside what each connection has.
    pub buffers: u64,
}

impl Client {
    /// Takes one element of the answer.
    ///
    /// # Errors
    /// If that is no map.
    pub fn parse(map: Reply) -> Result<Self> {
        let Reply::List(fields) = map else { bail!("a client is {}", map.kind()) };
        let mut client = Self::default();
        for field in fields.chunks(2) {
            let [name, value] = field else { bail!("a client's field has no value") };
            let name = name.text().context("a client's field has no name")?;
            let number = match value {
                Reply::Number(number) => u64::try_from(*number).ok(),
                _ => None,
            };
            let text = || value.text().unwrap_or_default();
            let count = number.unwrap_or_default();
            match name.as_str() {
                "id" => client.id = number,
                "addr" => client.addr = text(),
                "device" => client.device = text(),
                "role" => client.role = text(),
                "state" => client.state = text(),
                "waits-for" => client.waits_for = text(),
                "waits-ms" => client.waits_ms = count,
                "age-ms" => client.age_ms = count,
                "bytes-received" => client.received = count,
                "bytes-unread" => client.unread = count,
                "bytes-sent" => client.sent = count,
                "receive-window-filled" => client.receive_window.0 = count,
                "receive-window-size" => client.receive_window.1 = count,
                "send-window-filled" => client.send_window.0 = count,
                "send-window-size" => client.send_window.1 = count,
                "writes-in-flight" => client.in_flight = count,
                "receive-buffer" | "staging-buffer" => client.buffers += count,
                _ => {}
            }
        }
        Ok(client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_name() {
        let info = Info::parse(
            "# rdma\r\nrdma_version:0.1.0\r\nrdma_device0:name=d0,ports=1 2,connections=7\r\n\
             rdma_reads_io:5\r\nrdma_limit_handshakes:3/none\r\nother:1\r\n",
        );
        assert_eq!((info.text("version"), info.number("reads_io")), (Some("0.1.0"), Some(5)));
        assert_eq!(info.limit("limit_handshakes"), Some((3, None)));
        assert_eq!(info.fields().count(), 4);
        let device = info.devices().next().unwrap();
        assert_eq!((device.text("ports"), device.number("connections")), (Some("1 2"), Some(7)));
        assert_eq!(device.text("port"), None);
    }

    #[test]
    fn a_client_is_a_list_of_names_and_values() {
        let text = |text: &str| Reply::Text(text.into());
        let map = vec![
            text("id"),
            Reply::Nothing,
            text("waits-for"),
            text("pass"),
            text("receive-buffer"),
            Reply::Number(16384),
            text("staging-buffer"),
            Reply::Number(14080),
            text("of-another-version"),
            Reply::List(Vec::new()),
        ];
        let client = Client::parse(Reply::List(map)).unwrap();
        let wanted = Client { waits_for: "pass".into(), buffers: 30464, ..Client::default() };
        assert_eq!(client, wanted);
        assert!(Client::parse(text("x")).is_err());
        assert!(Client::parse(Reply::List(vec![text("id")])).is_err());
    }
}
