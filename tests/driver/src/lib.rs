// SPDX-License-Identifier: BSD-3-Clause
//! A module for tests that is loaded beside the RDMA transport and calls what no stock
//! server calls for RDMA yet: the slots of outgoing connections.
//!
//! A connection is made by `DRIVER.NEW`, which returns its number; each further command
//! calls one slot on it and replies with what came back, or with an error that says what
//! the slot left behind. What is asynchronous blocks its client until the handler came.
//!
//! | command | calls |
//! | --- | --- |
//! | `DRIVER.NEW` | `conn_create` |
//! | `DRIVER.STATE n` | `addr`, `is_local`, `get_last_error` |
//! | `DRIVER.CONNECT n host port [source]` | `connect`; replies with the handler's view |
//! | `DRIVER.VISIT host port` | the same on a new connection, `close` in the handler |
//! | `DRIVER.OVERLAP n m host port source host port ms` | `connect` on n, then `blocking_connect` on m |
//! | `DRIVER.ABANDON host port` | the same, `close` before the handler |
//! | `DRIVER.BLOCKINGCONNECT n host port ms` | `blocking_connect` |
//! | `DRIVER.SYNCWRITE n bytes ms` | `sync_write` |
//! | `DRIVER.SYNCREAD n count ms` | `sync_read` |
//! | `DRIVER.SYNCREADLINE n size ms` | `sync_readline` |
//! | `DRIVER.EXCHANGE n count bytes` | `write` and `read` from handlers, until `count` bytes came |
//! | `DRIVER.WRITE n bytes` | `write`, once |
//! | `DRIVER.READ n count` | `read`, once |
//! | `DRIVER.SHUTDOWN n` | `shutdown` |
//! | `DRIVER.CLOSE n` | `close` |
//!
//! `DRIVER.TABLE` shows the words of the server's TCP type, for which no RDMA has to be there.

mod abi;
mod driver;

use redis_module::{raw, redis_command};
use std::ffi::{CString, c_int};

const OK: c_int = raw::REDISMODULE_OK as c_int;
const ERR: c_int = raw::REDISMODULE_ERR as c_int;

/// The server's entry point.
///
/// # Safety
/// Called by the server, with its context.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ValkeyModule_OnLoad(
    ctx: *mut raw::RedisModuleCtx,
    _argv: *mut *mut raw::RedisModuleString,
    _argc: c_int,
) -> c_int {
    let api = raw::REDISMODULE_APIVER_1 as c_int;
    // SAFETY: the server's own context; the name is a C string.
    if unsafe { raw::Export_RedisModule_Init(ctx, c"driver".as_ptr(), 1, api) } == ERR {
        return ERR;
    }
    redis_command!(ctx, "driver.new", driver::new, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.state", driver::state, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.connect", driver::connect, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.visit", driver::visit, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.overlap", driver::overlap, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.abandon", driver::abandon, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.blockingconnect", driver::blocking_connect, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.syncwrite", driver::sync_write, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.syncread", driver::sync_read, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.syncreadline", driver::sync_readline, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.exchange", driver::exchange, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.write", driver::write, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.read", driver::read, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.shutdown", driver::shutdown, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.table", driver::table, "admin", 0, 0, 0, "");
    redis_command!(ctx, "driver.close", driver::close, "admin", 0, 0, 0, "");
    OK
}
