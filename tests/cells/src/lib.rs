// SPDX-License-Identifier: BSD-3-Clause
//! Servers with the module in them, for whoever starts some: the cells of the integration
//! tests, and the benchmark.

pub mod info;
pub mod lab;
pub mod matrix;
pub mod ports;
pub mod process;
pub mod report;
pub mod server;
