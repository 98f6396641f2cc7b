// SPDX-License-Identifier: BSD-3-Clause
//! The public module API, as far as the transport needs it.

use super::MainCell;
use log::{Level, LevelFilter, Log, Metadata, Record};
use redis_module::{RedisValue, raw};
use std::ffi::{CStr, CString, c_int, c_void};
use std::fmt;
use std::os::fd::RawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::Duration;

/// A context that lives as long as the process: for the log and for timers.
static CONTEXT: AtomicPtr<raw::RedisModuleCtx> = AtomicPtr::new(std::ptr::null_mut());

/// See [`CONTEXT`]; null once the server has let us go.
pub(super) fn context() -> *mut raw::RedisModuleCtx {
    CONTEXT.load(Ordering::Acquire)
}

/// Keeps a context for later and sends `log`'s records to the server's log.
///
/// # Safety
/// `load_context` is the one that the server passed while loading, and the
/// module's name and API version are set.
pub unsafe fn start(load_context: *mut raw::RedisModuleCtx) {
    // SAFETY: by the caller's promise; the API table is filled by then.
    let detached =
        unsafe { raw::RedisModule_GetDetachedThreadSafeContext.expect("server API")(load_context) };
    CONTEXT.store(detached, Ordering::Release);
    if log::set_logger(&ServerLog).is_ok() {
        log::set_max_level(LevelFilter::Trace);
    }
}

/// What else a server may do with a module in it, as `valkeymodule.h` numbers it. Of a module
/// that does not say so it is believed that it can't bear it, and then nobody may.
const MAY_LOAD_BESIDE_OLD_DATA: c_int = 1 << 2;
const MAY_MIGRATE_SLOTS: c_int = 1 << 5;

/// Promises the server, as far as it knows them, what a module without keys of its own can
/// promise: that it may load a replica's data while the old data is served, and move slots
/// to another node key by key.
///
/// # Safety
/// `ctx` is the context that the server passed while loading.
pub unsafe fn take_nothing_away(ctx: *mut raw::RedisModuleCtx) {
    // SAFETY: by the caller's promise.
    unsafe {
        let known = raw::RedisModule_GetModuleOptionsAll.expect("server API")();
        let options = (MAY_LOAD_BESIDE_OLD_DATA | MAY_MIGRATE_SLOTS) & known;
        raw::RedisModule_SetModuleOptions.expect("server API")(ctx, options);
    }
}

/// Whether the server is still starting: it reads its configuration and listens later.
pub fn is_starting() -> bool {
    let starting = raw::REDISMODULE_CTX_FLAGS_SERVER_STARTUP as c_int;
    // SAFETY: the API table and the context are set at load.
    unsafe { raw::RedisModule_GetContextFlags.expect("server API")(context()) & starting != 0 }
}

/// A descriptor's callback: the descriptor, the number it was registered with, what it is ready
/// for.
pub type OnDescriptor = unsafe extern "C" fn(c_int, *mut c_void, c_int);

const READABLE: c_int = raw::REDISMODULE_EVENTLOOP_READABLE as c_int;
const WRITABLE: c_int = raw::REDISMODULE_EVENTLOOP_WRITABLE as c_int;

/// Calls `callback` on the main thread whenever `fd` is readable.
///
/// Returns whether the event loop took it: it has a limit on descriptors.
pub fn watch(fd: RawFd, callback: OnDescriptor, data: usize) -> bool {
    add(fd, READABLE, callback, data)
}

/// The same whenever it is writable.
pub fn watch_writable(fd: RawFd, callback: OnDescriptor, data: usize) -> bool {
    add(fd, WRITABLE, callback, data)
}

fn add(fd: RawFd, what: c_int, callback: OnDescriptor, data: usize) -> bool {
    // SAFETY: the API table is filled at load; `data` is a number to the callback.
    unsafe {
        raw::RedisModule_EventLoopAdd.expect("server API")(
            fd,
            what,
            Some(callback),
            data as *mut c_void,
        ) == 0
    }
}

/// Ends [`watch`]. Before the descriptor is closed.
pub fn unwatch(fd: RawFd) {
    // SAFETY: the API table is filled at load; what is not registered is an error, no more.
    unsafe { raw::RedisModule_EventLoopDel.expect("server API")(fd, READABLE) };
}

/// Ends [`watch_writable`]. Before the descriptor is closed.
pub fn unwatch_writable(fd: RawFd) {
    // SAFETY: as above.
    unsafe { raw::RedisModule_EventLoopDel.expect("server API")(fd, WRITABLE) };
}

/// A part of the module API that this server lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// It does not tell of this.
    Event(&'static str),
    /// It does not take the command of this name.
    Command(&'static CStr),
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Event(what) => write!(f, "the server does not tell {what}"),
            Self::Command(name) => {
                write!(f, "the server takes no command {}", name.to_string_lossy())
            }
        }
    }
}

impl std::error::Error for Unsupported {}

/// A timer's callback.
pub type OnTimer = unsafe extern "C" fn(*mut raw::RedisModuleCtx, *mut c_void);

/// The last timer of each callback, which may have fired since.
static TIMERS: MainCell<Vec<(OnTimer, u64)>> = MainCell::new(Vec::new());

/// Calls `callback` once, on the main thread, after `delay`.
pub fn after(delay: Duration, callback: OnTimer) {
    // SAFETY: the API table and the context are set at load.
    let timer = unsafe {
        raw::RedisModule_CreateTimer.expect("server API")(
            context(),
            delay.as_millis() as i64,
            Some(callback),
            std::ptr::null_mut(),
        )
    };
    let mut timers = TIMERS.borrow_mut();
    timers.retain(|(other, _)| !std::ptr::fn_addr_eq(*other, callback));
    timers.push((callback, timer));
}

/// Whether the server is about to exit; see [`note_exit`].
static EXITS: AtomicBool = AtomicBool::new(false);

/// Notes it when the server is about to exit, beyond recall, and stops the timers: 9.1 unloads
/// its modules then, and complains of one that has a timer.
///
/// # Errors
/// If the server does not tell.
///
/// # Safety
/// `ctx` is the context that the server passed while loading.
pub unsafe fn note_exit(ctx: *mut raw::RedisModuleCtx) -> Result<(), Unsupported> {
    unsafe extern "C" fn exits(
        _ctx: *mut raw::RedisModuleCtx,
        _event: raw::RedisModuleEvent,
        _what: u64,
        _data: *mut c_void,
    ) {
        EXITS.store(true, Ordering::Relaxed);
        for (_, timer) in std::mem::take(&mut *TIMERS.borrow_mut()) {
            // SAFETY: as for `after`; one that has fired is not found.
            unsafe {
                raw::RedisModule_StopTimer.expect("server API")(
                    context(),
                    timer,
                    std::ptr::null_mut(),
                )
            };
        }
    }
    // SAFETY: by the caller's promise.
    unsafe { subscribe(ctx, raw::REDISMODULE_EVENT_SHUTDOWN, exits) }
        .ok_or(Unsupported::Event("when it exits"))
}

/// Whether the server is about to exit.
pub fn is_exiting() -> bool {
    EXITS.load(Ordering::Relaxed)
}

/// The server frees what belongs to the module: from now on nothing of it is used.
pub fn let_go() {
    CONTEXT.store(std::ptr::null_mut(), Ordering::Release);
}

/// Calls `callback` with the number of each new client, on the main thread, while the
/// server accepts it.
///
/// # Errors
/// If the server does not tell.
///
/// # Safety
/// `ctx` is the context that the server passed while loading.
pub unsafe fn on_client(
    ctx: *mut raw::RedisModuleCtx,
    callback: fn(client: u64),
) -> Result<(), Unsupported> {
    static CALLBACK: OnceLock<fn(u64)> = OnceLock::new();
    unsafe extern "C" fn changed(
        _ctx: *mut raw::RedisModuleCtx,
        _event: raw::RedisModuleEvent,
        what: u64,
        client: *mut c_void,
    ) {
        if what == raw::REDISMODULE_SUBEVENT_CLIENT_CHANGE_CONNECTED
            && let Some(callback) = CALLBACK.get()
        {
            // SAFETY: this event comes with such a structure.
            callback(unsafe { (*client.cast::<raw::RedisModuleClientInfo>()).id });
        }
    }
    let _ = CALLBACK.set(callback);
    // SAFETY: by the caller's promise.
    unsafe { subscribe(ctx, raw::REDISMODULE_EVENT_CLIENT_CHANGE, changed) }
        .ok_or(Unsupported::Event("of its clients"))
}

/// What the server's setting `name` is now; `None` if the server does not say. Main thread.
///
/// # Safety
/// `ctx` is a context that the server passed, and still live.
pub unsafe fn setting(ctx: *mut raw::RedisModuleCtx, name: &str) -> Option<String> {
    let context = redis_module::Context::new(ctx);
    let answer = context.call("CONFIG", &["GET", name]);
    let Ok(RedisValue::Array(pair)) = answer else { return None };
    match pair.into_iter().nth(1)? {
        RedisValue::SimpleString(text) | RedisValue::BulkString(text) => Some(text),
        _ => None,
    }
}

/// The callback of [`on_setting`], which gets a context.
pub type OnSetting = fn(*mut raw::RedisModuleCtx);

/// Calls `callback` on the main thread after the server's setting `name` was set. To be called
/// while loading, for each setting.
///
/// # Errors
/// If the server does not tell.
///
/// # Safety
/// `ctx` is the context that the server passed while loading.
pub unsafe fn on_setting(
    ctx: *mut raw::RedisModuleCtx,
    name: &'static CStr,
    callback: OnSetting,
) -> Result<(), Unsupported> {
    static CALLBACKS: MainCell<Vec<(&CStr, OnSetting)>> = MainCell::new(Vec::new());
    unsafe extern "C" fn set(
        ctx: *mut raw::RedisModuleCtx,
        _event: raw::RedisModuleEvent,
        _what: u64,
        changes: *mut c_void,
    ) {
        // SAFETY: this event comes with such a structure, and it with as many names.
        let names = unsafe {
            let changes = &*changes.cast::<raw::RedisModuleConfigChange>();
            std::slice::from_raw_parts(changes.config_names, changes.num_changes as usize)
        };
        let callbacks = CALLBACKS.borrow_mut().clone();
        for (name, callback) in callbacks {
            // SAFETY: the server's names are C strings.
            if names.iter().any(|it| unsafe { CStr::from_ptr(*it) } == name) {
                callback(ctx);
            }
        }
    }
    CALLBACKS.borrow_mut().push((name, callback));
    // SAFETY: by the caller's promise.
    unsafe { subscribe(ctx, raw::REDISMODULE_EVENT_CONFIG, set) }
        .ok_or(Unsupported::Event("of its settings"))
}

/// Has the server call `callback` at each event of the kind `id`, in version 1 of its data.
/// `None` if it does not know the event.
///
/// # Safety
/// `ctx` is the context that the server passed while loading.
unsafe fn subscribe(
    ctx: *mut raw::RedisModuleCtx,
    id: u64,
    callback: unsafe extern "C" fn(
        *mut raw::RedisModuleCtx,
        raw::RedisModuleEvent,
        u64,
        *mut c_void,
    ),
) -> Option<()> {
    let event = raw::RedisModuleEvent { id, dataver: 1 };
    // SAFETY: by the caller's promise.
    let subscribed = unsafe {
        raw::RedisModule_SubscribeToServerEvent.expect("server API")(ctx, event, Some(callback))
    };
    (subscribed == raw::REDISMODULE_OK as c_int).then_some(())
}

/// `log`'s records, in the server's own log with its levels.
struct ServerLog;

impl Log for ServerLog {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let level = match record.level() {
            Level::Error | Level::Warn => c"warning",
            Level::Info => c"notice",
            Level::Debug => c"verbose",
            Level::Trace => c"debug",
        };
        let text = record.args().to_string().replace('\0', "?");
        let Ok(text) = CString::new(text) else { return };
        // SAFETY: a printf-like function: format and argument are C strings. The
        // server's log may be written from any thread.
        unsafe {
            if let Some(log) = raw::RedisModule_Log {
                log(context(), level.as_ptr(), c"%s".as_ptr(), text.as_ptr());
            }
        }
    }

    fn flush(&self) {}
}

/// A string of the server's as text; what is no UTF-8 in it is replaced.
///
/// # Safety
/// A live string of the server's, with the API in place.
pub unsafe fn text(string: *mut raw::RedisModuleString) -> String {
    let mut length = 0;
    // SAFETY: by the caller's promise; the server gives as many bytes.
    unsafe {
        let start = raw::RedisModule_StringPtrLen.expect("server API")(string, &mut length);
        let bytes = std::slice::from_raw_parts(start.cast::<u8>(), length);
        String::from_utf8_lossy(bytes).into_owned()
    }
}
