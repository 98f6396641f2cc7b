// SPDX-License-Identifier: BSD-3-Clause
//! A software RDMA fabric for tests and demos.
//!
//! One shared object stands in for both `libibverbs.so.1` and `librdmacm.so.1`
//! and moves bytes between processes of one machine in user space. It is never
//! loaded unless `scripts/softrdma.sh` puts it on the library path, and its
//! speed says nothing about RDMA. README.md tells how it works and what it leaves out.

mod board;
mod cm;
mod engine;
mod fault;
mod fork;
mod habits;
mod handle;
mod keys;
mod link;
mod notice;
mod number;
mod patience;
mod profiles;
mod removal;
mod sys;
pub mod tally;
mod verbs;
