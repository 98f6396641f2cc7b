// SPDX-License-Identifier: BSD-3-Clause
//! Connections to Valkey servers over RDMA, as a byte stream.
//!
//! A [`Connection`] is to a server's RDMA port what a `TcpStream` is to its TCP port: it
//! implements [`Read`](std::io::Read) and [`Write`](std::io::Write), blocks for as long as its
//! time-out says, and carries RESP or whatever else is written. It speaks to this project's module
//! and to upstream's.
//!
//! ```no_run
//! use std::io::{Read, Write};
//! use valkey_rdma_client::{Connection, Options};
//!
//! let mut connection = Connection::open("192.0.2.10:6379", &Options::default())?;
//! connection.write_all(b"PING\r\n")?;
//! let mut reply = [0; 7];
//! connection.read_exact(&mut reply)?;
//! assert_eq!(&reply, b"+PONG\r\n");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! An event loop begins with [`Connecting`], watches [`Connection::descriptors`] and uses
//! [`try_read`](Connection::try_read) and [`try_write`](Connection::try_write), which never wait.
//! Nor do those that save the copy: [`try_fill_buf`](Connection::try_fill_buf) shows the bytes
//! where the server wrote them (waiting for them is [`BufRead`](std::io::BufRead)'s), and
//! [`try_fill`](Connection::try_fill) lends registered memory to put bytes into.
//!
//! The RDMA libraries are opened at run time, so that a program which offers RDMA beside TCP
//! starts without them; [`Error::Library`] says what to install.

#![deny(missing_docs, unreachable_pub)]

mod connecting;
mod connection;
mod error;
mod memory;
mod wait;

pub use connecting::Connecting;
pub use connection::{Connection, Options};
pub use error::Error;
