// SPDX-License-Identifier: BSD-3-Clause
//! `rdma.replication`: whether links may go over TCP instead, which can be changed at run time.
//! Whether they go over RDMA at all can't: that is decided while the server starts.

use crate::config::Replication;
use crate::host::api;
use crate::panic::guard;
use crate::poller::Poller;
use redis_module::configuration::{
    ConfigurationContext, ConfigurationFlags, ConfigurationValue, register_string_configuration,
};
use redis_module::{Context, RedisError, RedisString, raw};

struct Policy;

/// The policy at this moment.
fn policy() -> Replication {
    Poller::get().settings().borrow_mut().replication
}

impl ConfigurationValue<RedisString> for Policy {
    fn get(&self, _: &ConfigurationContext) -> RedisString {
        let text = guard("the value of rdma.replication", || policy().text()).unwrap_or_default();
        RedisString::create(None, text)
    }

    fn set(&self, _: &ConfigurationContext, value: RedisString) -> Result<(), RedisError> {
        guard("rdma.replication", || {
            let value = value.to_string_lossy();
            let wanted = Replication::ALL.into_iter().find(|it| it.text() == value);
            let wanted = wanted.ok_or(RedisError::Str("no, prefer or require"))?;
            let present = policy();
            let touches = (wanted == Replication::No) != (present == Replication::No);
            if touches && !api::is_starting() {
                return Err(RedisError::Str("\"no\" can't be left or taken while the server runs"));
            }
            Poller::get().settings().borrow_mut().replication = wanted;
            if wanted != present {
                log::info!("rdma.replication is {} from now on", wanted.text());
            }
            Ok(())
        })
        .unwrap_or(Err(RedisError::Str("failed; the server's log says more")))
    }
}

/// Registers the setting, whose default is the module's argument.
///
/// # Safety
/// `ctx` is the context that the server passed while loading.
pub unsafe fn register(ctx: *mut raw::RedisModuleCtx) {
    let flags = ConfigurationFlags::DEFAULT;
    let context = Context::new(ctx);
    register_string_configuration(&context, "replication", &Policy, policy().text(), flags, None);
}
