// SPDX-License-Identifier: BSD-3-Clause
//! The verbs: device, memory, completion queues, queue pairs.

pub mod context;
pub mod cq;
pub mod device;
pub mod exports;
pub mod memory;
pub mod qp;
mod requester;
mod responder;
pub mod srq;
mod strings;
mod vendors;
pub mod work;
