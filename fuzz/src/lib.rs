// SPDX-License-Identifier: BSD-3-Clause
//! The module's own sources for what a peer's bytes reach first: they need nothing
//! but the standard library, so the fuzzer builds them without the rest.

#[path = "../../src/session.rs"]
pub mod session;
#[path = "../../src/window/mod.rs"]
pub mod window;
#[path = "../../src/wire.rs"]
pub mod wire;
