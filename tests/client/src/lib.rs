// SPDX-License-Identifier: BSD-3-Clause
//! A Valkey client for tests, over RDMA and over TCP.
//!
//! Ordinary use is [`rdma::Connection::open`] or [`tcp::Connection::open`], wrapped in a
//! [`resp::Client`] that speaks RESP over either. The RDMA connection can also do what no
//! well-behaved client does: keep its receive window shut, post control messages of any
//! content, or vanish without a word; [`raw::Raw`] is for what is worse. Every call is bounded by a time-out and sleeps in
//! `poll(2)`; nothing here spins.

pub mod error;
pub mod pattern;
pub mod raw;
pub mod rdma;
pub mod resp;
pub mod tcp;
mod verbs;
pub mod wire;

pub use error::Error;
pub use resp::{Client, Value};
