// SPDX-License-Identifier: BSD-3-Clause
//! `RDMA.DOCTOR [device]`, and `probe=` at load: what each device does with the things that the
//! module relies on.
//!
//! The checks connect a device to itself and wait for it, so they run on a thread of their own,
//! one examination at a time. The client waits for its answer, nobody else does.

use crate::config::Probe;
use crate::conntype::listener::Listening;
use crate::host::api;
use crate::host::reply::Reply;
use crate::panic::guard;
use crate::poller::Poller;
use doctor::{Examination, Outcome};
use redis_module::raw;
use std::ffi::{CString, c_int, c_void};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fmt, io};
use verbs::account;
use verbs::device::Device;

const OK: c_int = raw::REDISMODULE_OK as c_int;

/// Whether somebody is being examined.
static BUSY: AtomicBool = AtomicBool::new(false);

/// Why there is no examination, or why it is held against the devices.
#[derive(Debug)]
pub enum DoctorError {
    /// There is no connection manager.
    Verbs(verbs::Error),
    /// No device of that name, or of any, has an address that is listened on.
    NoDevice(Option<String>),
    /// One is being made.
    Busy,
    /// There are more words than a device's name.
    Arguments,
    /// Nobody can wait for it in a transaction.
    Transaction,
    /// No thread can be had.
    Thread(io::Error),
    /// What failed of that which was required.
    Unfit(Vec<String>),
}

impl fmt::Display for DoctorError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Verbs(error) => error.fmt(f),
            Self::NoDevice(Some(name)) => write!(
                f,
                "no device {name} has an address that is listened on; without a name all that \
                 have one are examined"
            ),
            Self::NoDevice(None) => f.write_str(
                "no RDMA device has one of this machine's addresses; `rdma link` and `ip addr` \
                 show both",
            ),
            Self::Busy => f.write_str("an examination is under way: try again in a few seconds"),
            Self::Arguments => f.write_str("wrong number of arguments: RDMA.DOCTOR [device]"),
            Self::Transaction => {
                f.write_str("the examination takes seconds: not in a transaction or a script")
            }
            Self::Thread(error) => write!(f, "no thread can be had: {error}"),
            Self::Unfit(what) => write!(f, "probe=require, and {}", what.join("; ")),
        }
    }
}

impl From<verbs::Error> for DoctorError {
    fn from(error: verbs::Error) -> Self {
        Self::Verbs(error)
    }
}

/// What an examination comes to: one for each device.
type Answer = Result<Vec<Examination>, DoctorError>;

/// Says of each device what it says of itself.
pub fn introduce() {
    for device in Device::all() {
        match device.facts() {
            Ok(facts) => log::info!("device {facts}"),
            Err(error) => log::warn!("device {}: {error}", device.name()),
        }
    }
}

/// Examines the devices that have one of `binds`, or any address of this machine if there is
/// none. Waits for seconds. Any thread.
///
/// # Errors
/// If there is no device to examine.
pub fn examine(binds: &[IpAddr], wanted: Option<&str>) -> Answer {
    let local;
    let addresses = match binds.iter().any(IpAddr::is_unspecified) || binds.is_empty() {
        true => {
            local = doctor::addresses::local();
            &local
        }
        false => binds,
    };
    let mut devices = doctor::devices(addresses)?;
    if let Some(wanted) = wanted {
        devices.retain(|(name, _)| name == wanted);
    }
    if devices.is_empty() {
        return Err(DoctorError::NoDevice(wanted.map(str::to_owned)));
    }
    // What is registered for a moment is not what the server needs.
    Ok(account::uncounted(|| {
        devices.into_iter().map(|(_, address)| doctor::examine(address)).collect()
    }))
}

/// `RDMA.DOCTOR [device]`.
///
/// # Safety
/// Called by the server.
pub unsafe extern "C" fn command(
    ctx: *mut raw::RedisModuleCtx,
    argv: *mut *mut raw::RedisModuleString,
    argc: c_int,
) -> c_int {
    // SAFETY: the server's context and arguments of this command.
    let refused = guard("a command", || unsafe {
        if argc > 2 {
            return Err(DoctorError::Arguments);
        }
        let flags = raw::RedisModule_GetContextFlags.expect("server API")(ctx);
        if flags as u32 & raw::REDISMODULE_CTX_FLAGS_DENY_BLOCKING != 0 {
            return Err(DoctorError::Transaction);
        }
        let wanted = (argc == 2).then(|| api::text(*argv.add(1)));
        start(ctx, wanted)
    });
    if !matches!(refused, Some(Ok(()))) {
        // SAFETY: a command that was not answered yet.
        unsafe { fail(ctx, refused.and_then(Result::err).as_ref()) };
    }
    OK
}

/// Answers with an error; without a reason, what was to be done has panicked.
///
/// # Safety
/// `ctx` is that of a command that was not answered yet.
unsafe fn fail(ctx: *mut raw::RedisModuleCtx, why: Option<&DoctorError>) {
    let why = match why {
        Some(why) => format!("ERR {why}"),
        None => String::from("ERR the command failed; the server's log says more"),
    };
    let why = CString::new(why).unwrap_or_default();
    // SAFETY: by the caller's promise; a C string.
    unsafe { raw::RedisModule_ReplyWithError.expect("server API")(ctx, why.as_ptr()) };
}

/// The server's blocked client, for the thread that answers it.
struct Blocked(*mut raw::RedisModuleBlockedClient);

// SAFETY: the server lets any thread unblock a client, and the thread does so once.
unsafe impl Send for Blocked {}

impl Blocked {
    /// # Safety
    /// Once.
    unsafe fn answer(self, answer: Option<Answer>) {
        let answer = Box::into_raw(Box::new(answer)).cast::<c_void>();
        // SAFETY: by the caller's promise; what is handed over comes back to `free`.
        unsafe { raw::RedisModule_UnblockClient.expect("server API")(self.0, answer) };
    }
}

/// Has a thread examine the devices, and the client wait for it.
///
/// # Safety
/// `ctx` is that of a command that was not answered yet, where a client may be blocked.
unsafe fn start(ctx: *mut raw::RedisModuleCtx, wanted: Option<String>) -> Result<(), DoctorError> {
    if BUSY.swap(true, Ordering::AcqRel) {
        return Err(DoctorError::Busy);
    }
    let binds = Listening::get().addresses();
    // SAFETY: by the caller's promise; functions of the types that the server calls.
    let blocked = unsafe {
        let block = raw::RedisModule_BlockClient.expect("server API");
        Blocked(block(ctx, Some(reply), None, Some(free), 0))
    };
    let client = blocked.0;
    let spawned = std::thread::Builder::new().name("rdma-doctor".to_owned()).spawn(move || {
        let blocked = blocked;
        let answer = guard("the doctor", || examine(&binds, wanted.as_deref()));
        BUSY.store(false, Ordering::Release);
        // SAFETY: nobody else answers.
        unsafe { blocked.answer(answer) };
    });
    spawned.map(drop).map_err(|error| {
        BUSY.store(false, Ordering::Release);
        // SAFETY: the client that was blocked above, which no thread answers.
        unsafe { raw::RedisModule_AbortBlock.expect("server API")(client) };
        DoctorError::Thread(error)
    })
}

unsafe extern "C" fn reply(
    ctx: *mut raw::RedisModuleCtx,
    _argv: *mut *mut raw::RedisModuleString,
    _argc: c_int,
) -> c_int {
    // SAFETY: the server's context of a client that `start` has blocked: its private data is
    // what the thread has handed over.
    unsafe {
        let data = raw::RedisModule_GetBlockedClientPrivateData.expect("server API")(ctx);
        let answer = data.cast::<Option<Answer>>().as_ref();
        match answer.and_then(Option::as_ref) {
            Some(Ok(examinations)) => {
                learn(examinations);
                Reply::List(examinations.iter().map(describe).collect()).send(ctx);
            }
            other => fail(ctx, other.and_then(|failed| failed.as_ref().err())),
        }
    }
    OK
}

unsafe extern "C" fn free(_ctx: *mut raw::RedisModuleCtx, data: *mut c_void) {
    if !data.is_null() {
        // SAFETY: what the thread has handed over, given back once.
        drop(unsafe { Box::from_raw(data.cast::<Option<Answer>>()) });
    }
}

fn describe(found: &Examination) -> Reply {
    let checks = found.checks.iter().map(|(name, outcome)| (*name, outcome.to_string().into()));
    let facts = found.facts.as_ref();
    Reply::Map(vec![
        ("device", facts.map(|facts| facts.name.clone()).into()),
        ("address", found.address.to_string().into()),
        ("facts", facts.map(ToString::to_string).into()),
        ("resembles", found.resembles.into()),
        ("checks", Reply::Map(checks.collect())),
    ])
}

/// What was found out about a device is gone by from its next connection on. Main thread.
pub fn learn(examinations: &[Examination]) {
    for found in examinations {
        if let (Some(facts), Some(immediate)) = (&found.facts, found.immediate) {
            Poller::get().note_examined(facts, immediate);
        }
    }
}

/// Examines the devices at load, as far as it is wanted, and hands over what was found.
///
/// # Errors
/// With `require`: what failed, or that there is no device to examine.
pub fn at_load(probe: Probe, binds: &[String]) -> Result<Vec<Examination>, DoctorError> {
    if probe == Probe::No {
        return Ok(Vec::new());
    }
    // A name that is no address, and directives of the server's, come to all that there are.
    let binds: Vec<IpAddr> =
        binds.iter().filter_map(|bind| bind.trim_start_matches('-').parse().ok()).collect();
    let mut failed = Vec::new();
    let examined = match (probe, examine(&binds, None)) {
        (Probe::Require, examined) => examined?,
        (_, Ok(examined)) => examined,
        (_, Err(why)) => {
            log::warn!("devices can't be examined: {why}");
            Vec::new()
        }
    };
    for found in &examined {
        let device = found.facts.as_ref().map_or("unknown", |facts| facts.name.as_str());
        failed.extend(found.failures().map(|(name, why)| format!("{device}: {name}: {why}")));
        for (name, outcome) in &found.checks {
            if let Outcome::Inconclusive(why) = outcome {
                log::info!(
                    "device {device} at {}: {name} could not be checked: {why}",
                    found.address
                );
            }
        }
    }
    match (probe, failed.is_empty()) {
        (_, true) => Ok(examined),
        (Probe::Require, _) => Err(DoctorError::Unfit(failed)),
        _ => {
            failed.iter().for_each(|what| log::warn!("device {what}"));
            Ok(examined)
        }
    }
}
