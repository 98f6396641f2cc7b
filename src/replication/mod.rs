// SPDX-License-Identifier: BSD-3-Clause
//! Links between servers over RDMA: a replica's to its primary, and that by which slots move.
//!
//! The server that opens a link does it over RDMA, the other one accepts it as it accepts any
//! client. A stock server opens its links by the TCP connection type. Where the operator asks
//! for it, two slots of that type are replaced:
//!
//! * [`patch`]: what is looked at before, and which connections are taken.
//! * [`identity`]: who this server is, so that a link does not end at another one.
//! * `inquiry`: asking the server behind a TCP address who it is.
//! * `link`: how a link comes about, and what becomes of one that does not; `failure`: why not,
//!   and `attempts`: how often nothing came of it.
//! * [`report`]: what of it is told.
//! * [`setting`]: the policy as a setting of the server.

mod attempts;
mod failure;
pub mod identity;
mod inquiry;
mod link;
pub mod patch;
pub mod report;
pub mod setting;
