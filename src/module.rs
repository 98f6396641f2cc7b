// SPDX-License-Identifier: BSD-3-Clause
//! Loading, refusing, `INFO`.

use crate::commands;
use crate::config::{self, Settings};
use crate::conntype;
use crate::conntype::listener::Listening;
use crate::conntype::rebind;
use crate::conntype::table;
use crate::doctor;
use crate::host::difference::Difference;
use crate::host::line::{Layout, Line, Version};
use crate::host::main_cell::{declare_main_thread, is_main_thread};
use crate::host::symbols::{self, Symbols, server_has_own_rdma};
use crate::host::{api, fingerprint, probe};
use crate::namesake;
use crate::not_loaded::NotLoaded;
use crate::panic::{guard, log_panics};
use crate::poller::{Poller, exit};
use crate::replication;
use redis_module::raw;
use std::ffi::{CString, c_char, c_int};
use verbs::{account, fork, library};

/// The module's name, which is also that of the connection type.
const NAME: &std::ffi::CStr = c"rdma";

const OK: c_int = raw::REDISMODULE_OK as c_int;
const ERR: c_int = raw::REDISMODULE_ERR as c_int;

/// Descriptors that may fire together with a device's: two for each I/O thread, and
/// no more than a part of what the event loop reserves.
const MOST_WAKEUP_FDS: usize = 24;

/// The version as one number, as `MODULE LIST` shows it: 1.2.3 is 10203.
fn version_number() -> c_int {
    env!("CARGO_PKG_VERSION")
        .split(['.', '-'])
        .take(3)
        .fold(0, |number, part| number * 100 + part.parse::<c_int>().unwrap_or(0))
}

/// The server's entry point.
///
/// # Safety
/// Called by the server, with its context and arguments.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ValkeyModule_OnLoad(
    ctx: *mut raw::RedisModuleCtx,
    argv: *mut *mut raw::RedisModuleString,
    argc: c_int,
) -> c_int {
    guard("loading", || {
        log_panics();
        declare_main_thread();
        let version = version_number();
        // SAFETY: the server's own context; the name is a C string.
        unsafe {
            if raw::Export_RedisModule_Init(
                ctx,
                NAME.as_ptr(),
                version,
                raw::REDISMODULE_APIVER_1 as c_int,
            ) == ERR
            {
                refuse_beside_namesake(ctx, version);
                return ERR;
            }
            api::start(ctx);
            api::take_nothing_away(ctx);
            match load(ctx, argv, argc) {
                Ok(()) => OK,
                Err(why) => {
                    log::error!("not loaded: {why}");
                    ERR
                }
            }
        }
    })
    .unwrap_or(ERR)
}

/// Says who has our name.
///
/// # Safety
/// As [`ValkeyModule_OnLoad`], with the API in place.
unsafe fn refuse_beside_namesake(ctx: *mut raw::RedisModuleCtx, version: c_int) {
    // A server answers only who has a name, and forgets it with the failed load. Nothing else
    // of what loading does may be done: this code may be loaded and at work already.
    // SAFETY: by the caller's promise; C strings.
    unsafe {
        let api = raw::REDISMODULE_APIVER_1 as c_int;
        if raw::Export_RedisModule_Init(ctx, c"valkey-rdma".as_ptr(), version, api) == ERR {
            return;
        }
        let text = CString::new(format!("not loaded: {}", namesake::why_taken(ctx)));
        if let (Some(log), Ok(text)) = (raw::RedisModule_Log, text) {
            log(ctx, c"warning".as_ptr(), c"%s".as_ptr(), text.as_ptr());
        }
    }
}

/// The server asks before it forgets us. The connection type that we registered can't be taken
/// back, and its functions must stay: we refuse, unless the server exits (9.1 asks then too, and
/// complains of who refuses). For that case our code was told to stay mapped.
///
/// # Safety
/// Called by the server.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ValkeyModule_OnUnload(_ctx: *mut raw::RedisModuleCtx) -> c_int {
    if api::is_exiting() {
        api::let_go();
        return OK;
    }
    log::warn!(
        "a connection type can't be unloaded; to be rid of it, or for another version of it, \
         restart the server"
    );
    ERR
}

/// # Safety
/// As [`ValkeyModule_OnLoad`], with the API in place.
unsafe fn load(
    ctx: *mut raw::RedisModuleCtx,
    argv: *mut *mut raw::RedisModuleString,
    argc: c_int,
) -> Result<(), NotLoaded> {
    // SAFETY: by the caller's promise.
    let (version, arguments) = unsafe {
        (
            Version(raw::RedisModule_GetServerVersion.expect("server API")() as u32),
            arguments(argv, argc),
        )
    };
    if !api::is_starting() {
        return Err(NotLoaded::TooLate);
    }
    let line = Line::of(version).ok_or(NotLoaded::Line(version))?;
    if server_has_own_rdma() {
        return Err(NotLoaded::OwnTransport);
    }
    let settings = Settings::from_arguments(arguments.iter().map(String::as_str))?;
    let known = Layout::of(version);
    if known.is_none() && settings.refuse_unknown {
        return Err(NotLoaded::Release(version, line));
    }
    // SAFETY: the server's, whose release is of this line.
    let symbols =
        unsafe { probed(line, known) }.map_err(|what| NotLoaded::Differs(version, what))?;
    if known.is_none() {
        log::info!(
            "valkey-server {version} is newer than {}, the last release of its line that this \
             module knows; whatever can be probed is as it has to be, so it is served",
            line.last_known()
        );
    }
    library::load()?;
    fork::prepare()?;
    account::limit_registered(settings.max_registered_memory, config::MAX_REGISTERED_MEMORY);

    let examined = doctor::at_load(settings.probe, &settings.bind)?;
    let (poller, listening) = conntype::start(line, symbols, settings)?;
    doctor::learn(&examined);
    if line.wakes_threads_by_descriptors() {
        // 9.0 can change the number while it runs.
        // SAFETY: by the caller's promise.
        unsafe {
            allow_wakeup_fds(ctx);
            api::on_setting(ctx, c"io-threads", |ctx| {
                guard("io-threads", || allow_wakeup_fds(ctx));
            })?;
        }
    }
    // SAFETY: by the caller's promise.
    unsafe {
        note_appendfsync(ctx);
        api::on_setting(ctx, c"appendfsync", |ctx| {
            guard("appendfsync", || note_appendfsync(ctx));
        })?;
    }
    if !poller.watch() {
        return Err(NotLoaded::EventLoop);
    }
    // SAFETY: the server's context.
    unsafe { take_settings(ctx, line) }?;
    let wanted = poller.settings().borrow_mut().replication;
    // SAFETY: the server's table, which is as the line has it.
    let fit = unsafe { replication::patch::examine(wanted, version, line, symbols.tcp_table()) }?;
    // SAFETY: the server's context.
    unsafe { commands::register(ctx) }?;
    if symbols::stay() {
        // SAFETY: the server's context.
        unsafe { api::note_exit(ctx) }?;
        exit::delay_exit();
    }
    // From here on nothing may fail: a registered type can't be taken back.
    let kind = table::of(line);
    // SAFETY: the line's table, which lives for ever; the listener is our type's own.
    unsafe {
        if !symbols.register(kind) {
            return Err(NotLoaded::TypeTaken);
        }
        listening.configure(symbols.listener(), kind);
        raw::RedisModule_RegisterInfoFunc.expect("server API")(ctx, Some(info));
    }
    if let Some(fit) = fit {
        fit.install();
    }
    log::info!(
        "valkey-rdma {} loaded into valkey-server {version} (line {line})",
        env!("CARGO_PKG_VERSION")
    );
    doctor::introduce();
    // SAFETY: the server's context.
    unsafe { namesake::followers(ctx) }.iter().for_each(|what| log::warn!("{what}"));
    Ok(())
}

/// Registers the module's own settings and takes over what the configuration file says.
///
/// # Safety
/// As [`ValkeyModule_OnLoad`], with the API in place.
unsafe fn take_settings(ctx: *mut raw::RedisModuleCtx, line: Line) -> Result<(), NotLoaded> {
    // SAFETY: by the caller's promise.
    unsafe {
        if !line.has_directives() {
            rebind::register(ctx);
        }
        replication::setting::register(ctx);
        // The server has said why not.
        match raw::RedisModule_LoadConfigs.expect("server API")(ctx) == OK {
            true => Ok(()),
            false => Err(NotLoaded::Setting),
        }
    }
}

/// The server's functions, after all that can be found out about it was found to be as the
/// line has it. Nothing is registered yet.
///
/// # Safety
/// Main thread, at load.
unsafe fn probed(line: Line, known: Option<Layout>) -> Result<Symbols, Difference> {
    let symbols = Symbols::find(line)?;
    let tcp = symbols.tcp_table();
    // SAFETY: the server's own tables.
    unsafe {
        fingerprint::check_live(line, tcp)?;
        probe::tcp(line, tcp)?;
        if let Some(tls) = symbols::tls_table(line) {
            let layouts = known.map_or_else(|| line.layouts(), |layout| vec![layout]);
            if fingerprint::tail_live(line, &layouts, tls).is_none() {
                return Err(Difference::Tail(layouts));
            }
        }
    }
    Ok(symbols)
}

/// # Safety
/// As [`ValkeyModule_OnLoad`].
unsafe fn arguments(argv: *mut *mut raw::RedisModuleString, argc: c_int) -> Vec<String> {
    (0..argc.max(0) as usize)
        // SAFETY: the server passes `argc` strings.
        .map(|index| unsafe { api::text(*argv.add(index)) })
        .collect()
}

/// Has as many descriptors fire with a device's as the server's I/O threads are worth.
///
/// # Safety
/// As [`ValkeyModule_OnLoad`], with the API in place.
unsafe fn allow_wakeup_fds(ctx: *mut raw::RedisModuleCtx) {
    // SAFETY: by the caller's promise.
    let io_threads = unsafe { io_threads(ctx) };
    let most = if io_threads > 1 { (2 * io_threads).min(MOST_WAKEUP_FDS) } else { 0 };
    Poller::get().allow_wakeup_fds(most);
}

/// The server's `io-threads`, or 1 if it does not say.
///
/// # Safety
/// As [`ValkeyModule_OnLoad`], with the API in place.
unsafe fn io_threads(ctx: *mut raw::RedisModuleCtx) -> usize {
    // SAFETY: by the caller's promise.
    unsafe { api::setting(ctx, "io-threads") }.and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Notes whether the server syncs its append-only file before it replies.
///
/// # Safety
/// As [`ValkeyModule_OnLoad`], with the API in place.
unsafe fn note_appendfsync(ctx: *mut raw::RedisModuleCtx) {
    // SAFETY: by the caller's promise.
    let policy = unsafe { api::setting(ctx, "appendfsync") };
    if policy.is_none() {
        log::warn!(
            "the server does not tell its appendfsync (CONFIG GET fails): if that is always, and \
             there are I/O threads, 9.1 may acknowledge writes before they are synced, as it does \
             over TCP"
        );
    }
    // Held back without a sync to come, writes would only be tried again and again.
    Poller::get().sync_always(policy.is_some_and(|policy| policy == "always"));
}

unsafe extern "C" fn info(ctx: *mut raw::RedisModuleInfoCtx, for_crash_report: c_int) {
    guard("INFO", || {
        // A crash report is made on the thread that crashed, whatever that was doing: nothing
        // but the counters can be read there.
        let fields = if for_crash_report != 0 || !is_main_thread() {
            commands::counters()
        } else {
            commands::fields()
        };
        // SAFETY: the server's own context, C strings, numbers.
        unsafe {
            if raw::RedisModule_InfoAddSection.expect("server API")(ctx, c"".as_ptr()) == ERR {
                return;
            }
            let text = |name: &str, value: &str| {
                let name = CString::new(name).unwrap_or_default();
                let value = CString::new(value).unwrap_or_default();
                let add = raw::RedisModule_InfoAddFieldCString.expect("server API");
                add(ctx, name.as_ptr().cast::<c_char>(), value.as_ptr());
            };
            text("version", env!("CARGO_PKG_VERSION"));
            text("line", &Listening::get().line().to_string());
            for (name, value) in fields {
                text(&name, &value.to_string());
            }
        }
    });
}
