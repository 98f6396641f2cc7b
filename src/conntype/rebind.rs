// SPDX-License-Identifier: BSD-3-Clause
//! `rdma.port` and `rdma.bind`: the settings that 8.0 can change at run time.
//!
//! From 8.1 on the server has the directives `rdma-port` and `rdma-bind`. 8.0 knows
//! nothing of RDMA, so there the module brings settings of its own, by the module
//! API. Their defaults are the module's arguments; what the configuration file or
//! `CONFIG SET` says wins over those.

use crate::conntype::listener::Listening;
use crate::host::api;
use crate::host::layout::MAX_BINDS;
use crate::panic::guard;
use redis_module::configuration::{
    ConfigurationContext, ConfigurationFlags, ConfigurationValue, register_i64_configuration,
    register_string_configuration,
};
use redis_module::{Context, RedisError, RedisString, raw};

struct Port;
struct Bind;

/// The answer to a setting that could not be looked at.
const FAILED: Result<(), RedisError> = Err(RedisError::Str("failed; the server's log says more"));

impl ConfigurationValue<i64> for Port {
    fn get(&self, _: &ConfigurationContext) -> i64 {
        guard("the value of rdma.port", || i64::from(Listening::get().own().1)).unwrap_or(0)
    }

    fn set(&self, _: &ConfigurationContext, port: i64) -> Result<(), RedisError> {
        guard("rdma.port", || {
            let port = u16::try_from(port).map_err(|_| RedisError::Str("not a port"))?;
            let before = Listening::get().set_own(None, Some(port));
            if api::is_starting() && before.1 != 0 && before.1 != port {
                log::info!(
                    "the directive rdma.port {port} wins over the argument port={}",
                    before.1
                );
            }
            apply(before)
        })
        .unwrap_or(FAILED)
    }
}

impl ConfigurationValue<RedisString> for Bind {
    fn get(&self, _: &ConfigurationContext) -> RedisString {
        let bind = guard("the value of rdma.bind", || Listening::get().own().0.join(" "))
            .unwrap_or_default();
        RedisString::create(None, bind)
    }

    fn set(&self, _: &ConfigurationContext, value: RedisString) -> Result<(), RedisError> {
        guard("rdma.bind", || {
            let bind: Vec<String> =
                value.to_string_lossy().split_ascii_whitespace().map(str::to_owned).collect();
            if bind.len() > MAX_BINDS {
                return Err(RedisError::Str("at most 16 addresses"));
            }
            apply(Listening::get().set_own(Some(bind), None))
        })
        .unwrap_or(FAILED)
    }
}

/// Listens as told now, or, if that can't be, on the addresses and port of `before`. While the
/// server starts it does so by itself later.
fn apply((bind, port): (Vec<String>, u16)) -> Result<(), RedisError> {
    if api::is_starting() {
        return Ok(());
    }
    let listening = Listening::get();
    // SAFETY: the server's own listener of our registered type, on the main thread.
    if unsafe { listening.reopen() } {
        return Ok(());
    }
    listening.set_own(Some(bind), Some(port));
    // The server has closed its descriptors of the old listeners, which are there still.
    // SAFETY: as above.
    unsafe { listening.reopen() };
    Err(RedisError::Str("cannot listen there; the server's log says why"))
}

/// Registers the two settings.
///
/// # Safety
/// `ctx` is the context that the server passed while loading.
pub unsafe fn register(ctx: *mut raw::RedisModuleCtx) {
    let context = Context::new(ctx);
    let (bind, port) = Listening::get().own();
    let (port, bind) = (i64::from(port), bind.join(" "));
    let flags = || ConfigurationFlags::DEFAULT;
    register_i64_configuration(&context, "port", &Port, port, 0, 65_535, flags(), None);
    register_string_configuration(&context, "bind", &Bind, &bind, flags(), None);
}
