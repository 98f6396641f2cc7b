// SPDX-License-Identifier: BSD-3-Clause
//! What an operator may ask: `RDMA.CLIENTS`, `RDMA.STATS` and `RDMA.DOCTOR`.
//!
//! `RDMA.CLIENTS` says of each connection what it is doing and what it waits for, so that
//! a client that hangs is explained by it alone. `RDMA.STATS` is `INFO rdma` for programs.
//! Both only look. `RDMA.DOCTOR` (`doctor`) tries the devices out. They show addresses, so they are in the ACL category *admin*, as the
//! server's `CLIENT LIST` is, and in *rdma*, to be given away without the others.

use crate::conntype::listener::Listening;
use crate::doctor;
use crate::endpoint::Role;
use crate::endpoint::status;
use crate::endpoint::wr_id::MAX_ENDPOINTS;
use crate::host::api::{self, Unsupported};
use crate::host::reply::Reply;
use crate::metrics::METRICS;
use crate::panic::guard;
use crate::poller::Poller;
use crate::replication;
use redis_module::raw;
use std::ffi::{CStr, c_int};
use std::ptr;
use verbs::account;

const OK: c_int = raw::REDISMODULE_OK as c_int;

/// The ACL category of all commands of this module.
const CATEGORY: &CStr = c"rdma";

/// Who may call a command.
#[derive(Clone, Copy)]
enum Who {
    /// An operator.
    Operator,
    /// Anybody who can connect, before it has said who it is.
    Anybody,
}

impl Who {
    /// The ACL categories with and without the module's own.
    fn categories(self) -> [&'static CStr; 2] {
        match self {
            // As `CLIENT LIST`.
            Self::Operator => [c"admin dangerous slow rdma", c"admin dangerous slow"],
            Self::Anybody => [c"fast connection rdma", c"fast connection"],
        }
    }

    /// They answer whatever state the server is in: that is when they are needed.
    fn flags(self) -> &'static CStr {
        match self {
            Self::Operator => c"readonly admin deny-script allow-loading allow-stale allow-busy",
            Self::Anybody => {
                c"readonly no-auth fast deny-script allow-loading allow-stale allow-busy"
            }
        }
    }
}

struct Command {
    name: &'static CStr,
    summary: &'static CStr,
    complexity: &'static CStr,
    /// Its words at least, as the server counts them.
    arity: c_int,
    who: Who,
    run: raw::RedisModuleCmdFunc,
}

/// The commands' names, as the server has them.
pub fn names() -> impl Iterator<Item = &'static str> {
    COMMANDS.iter().map(|command| command.name.to_str().expect("ASCII"))
}

/// The limits that are told, in the order of `limits`.
pub const LIMITS: [&str; 4] = ["handshakes", "registered_bytes", "locked_bytes", "connections"];

const COMMANDS: [Command; 4] = [
    Command {
        name: c"rdma.clients",
        summary: c"Lists the RDMA connections: what each does, and what it waits for.",
        complexity: c"O(N) where N is the number of RDMA connections",
        arity: 1,
        who: Who::Operator,
        run: Some(clients),
    },
    Command {
        name: c"rdma.stats",
        summary: c"Returns the counters, limits and devices of the RDMA transport.",
        complexity: c"O(N) where N is the number of RDMA connections",
        arity: 1,
        who: Who::Operator,
        run: Some(stats),
    },
    Command {
        name: c"rdma.doctor",
        summary:
            c"Tries out what the RDMA devices do with the things that the transport relies on.",
        complexity:
            c"O(N) where N is the number of RDMA devices; it takes up to some seconds for each",
        arity: -1,
        who: Who::Operator,
        run: Some(doctor::command),
    },
    Command {
        name: c"rdma.identity",
        summary: c"Returns a token of this server process, by which a replica knows it again.",
        complexity: c"O(1)",
        arity: 1,
        who: Who::Anybody,
        run: Some(identity),
    },
];

/// Registers the commands, while the module loads.
///
/// # Errors
/// If the server does not take one, or does not tell of its clients.
///
/// # Safety
/// `ctx` is the context that the server passed while loading.
pub unsafe fn register(ctx: *mut raw::RedisModuleCtx) -> Result<(), Unsupported> {
    // SAFETY: by the caller's promise; C strings.
    unsafe {
        api::on_client(ctx, |client| {
            guard("new client", || Listening::get().client_connected(client));
        })?;
        // Another module may have taken the category's name: then there is none of ours.
        let own_category =
            raw::RedisModule_AddACLCategory.expect("server API")(ctx, CATEGORY.as_ptr()) == OK;
        COMMANDS.iter().try_for_each(|command| {
            let [all, of_server] = command.who.categories();
            enter(ctx, command, if own_category { all } else { of_server })
        })
    }
}

/// # Safety
/// As [`register`].
unsafe fn enter(
    ctx: *mut raw::RedisModuleCtx,
    command: &Command,
    categories: &CStr,
) -> Result<(), Unsupported> {
    let version = raw::RedisModuleCommandInfoVersion {
        version: 1,
        sizeof_historyentry: size_of::<raw::RedisModuleCommandHistoryEntry>(),
        sizeof_keyspec: size_of::<raw::RedisModuleCommandKeySpec>(),
        sizeof_arg: size_of::<raw::RedisModuleCommandArg>(),
    };
    let info = raw::RedisModuleCommandInfo {
        version: &version,
        summary: command.summary.as_ptr(),
        complexity: command.complexity.as_ptr(),
        since: c"0.1.0".as_ptr(),
        history: ptr::null_mut(),
        tips: c"nondeterministic_output".as_ptr(),
        arity: command.arity,
        key_specs: ptr::null_mut(),
        args: ptr::null_mut(),
    };
    let name = command.name.as_ptr();
    // SAFETY: by the caller's promise; the server copies what it is given.
    let done = unsafe {
        raw::RedisModule_CreateCommand.expect("server API")(
            ctx,
            name,
            command.run,
            command.who.flags().as_ptr(),
            0,
            0,
            0,
        ) == OK
            && {
                let made = raw::RedisModule_GetCommand.expect("server API")(ctx, name);
                raw::RedisModule_SetCommandInfo.expect("server API")(made, &info) == OK
                    && raw::RedisModule_SetCommandACLCategories.expect("server API")(
                        made,
                        categories.as_ptr(),
                    ) == OK
            }
    };
    done.then_some(()).ok_or(Unsupported::Command(command.name))
}

unsafe extern "C" fn clients(
    ctx: *mut raw::RedisModuleCtx,
    _argv: *mut *mut raw::RedisModuleString,
    _argc: c_int,
) -> c_int {
    // SAFETY: the server's context of this command.
    unsafe {
        answer(ctx, || {
            let endpoints = Poller::get().endpoints();
            Reply::List(endpoints.iter().map(|endpoint| status::describe(endpoint)).collect())
        })
    }
}

unsafe extern "C" fn stats(
    ctx: *mut raw::RedisModuleCtx,
    _argv: *mut *mut raw::RedisModuleString,
    _argc: c_int,
) -> c_int {
    // SAFETY: the server's context of this command.
    unsafe {
        answer(ctx, || {
            let counters = METRICS.fields();
            let mut map: Vec<_> =
                counters.into_iter().map(|(name, value)| (name, Reply::from(value))).collect();
            let limits = limits().into_iter().map(|limit| {
                let values = [("now", limit.now.into()), ("most", limit.most.into())];
                (limit.name, Reply::Map(values.into()))
            });
            map.push(("limits", Reply::Map(limits.collect())));
            map.push(("devices", Reply::List(Poller::get().describe_devices())));
            Reply::Map(map)
        })
    }
}

/// `RDMA.IDENTITY`. Who asks over RDMA is a server that wants a link.
unsafe extern "C" fn identity(
    ctx: *mut raw::RedisModuleCtx,
    _argv: *mut *mut raw::RedisModuleString,
    _argc: c_int,
) -> c_int {
    // SAFETY: the server's context of this command.
    unsafe {
        let client = raw::RedisModule_GetClientId.expect("server API")(ctx);
        answer(ctx, || {
            if let Some(endpoint) = Poller::get().find_client(client) {
                endpoint.main_state().role = Role::Replica;
            }
            Reply::Status(replication::identity::own().to_string())
        })
    }
}

/// Answers a command; with an error if making the answer up panicked.
///
/// # Safety
/// `ctx` is that of a command that was not answered yet.
unsafe fn answer(ctx: *mut raw::RedisModuleCtx, make: impl FnOnce() -> Reply) -> c_int {
    let reply = guard("a command", make);
    // SAFETY: by the caller's promise.
    unsafe {
        match reply {
            Some(reply) => reply.send(ctx),
            None => {
                let text = c"ERR the command failed; the server's log says more";
                raw::RedisModule_ReplyWithError.expect("server API")(ctx, text.as_ptr());
            }
        }
    }
    OK
}

/// A limit, and how near it is.
struct Limit {
    name: &'static str,
    now: u64,
    /// `None` where there is none.
    most: Option<u64>,
}

fn limits() -> [Limit; 4] {
    let poller = Poller::get();
    let (max_handshakes, max_registered_memory) = {
        let settings = poller.settings().borrow_mut();
        (u64::from(settings.max_handshakes), settings.max_registered_memory)
    };
    let (registered, _) = account::registered();
    let connections = poller.count() as u64;
    let [handshakes, registered_bytes, locked_bytes, most_connections] = LIMITS;
    [
        Limit { name: handshakes, now: poller.transients(), most: Some(max_handshakes) },
        Limit {
            name: registered_bytes,
            now: registered,
            most: (max_registered_memory != u64::MAX).then_some(max_registered_memory),
        },
        Limit { name: locked_bytes, now: registered, most: account::locked_memory_limit() },
        Limit { name: most_connections, now: connections, most: Some(MAX_ENDPOINTS as u64) },
    ]
}

/// The counters of `INFO rdma`. Any thread.
pub fn counters() -> Vec<(String, Reply)> {
    METRICS.fields().into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}

/// The fields of `INFO rdma`, without the module's version. Main thread.
pub fn fields() -> Vec<(String, Reply)> {
    let mut fields = Vec::new();
    for (index, device) in Poller::get().describe_devices().into_iter().enumerate() {
        fields.push((format!("device{index}"), device));
    }
    let policy = Poller::get().settings().borrow_mut().replication;
    fields.push((String::from("replication"), policy.text().into()));
    if let Some(link) = replication::report::primary() {
        fields.push((String::from("primary_link"), link));
    }
    fields.extend(counters());
    for limit in limits() {
        let most = limit.most.map_or_else(|| String::from("none"), |most| most.to_string());
        fields.push((format!("limit_{}", limit.name), format!("{}/{most}", limit.now).into()));
    }
    fields
}
