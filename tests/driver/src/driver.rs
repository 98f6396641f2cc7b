// SPDX-License-Identifier: BSD-3-Clause
//! The commands, and the connections that they work on. All of it on the main thread.

use crate::abi::{self, Connection, ConnectionType, c_string, error_text};
use redis_module::{
    BlockedClient, Context, NextArg, RedisError, RedisResult, RedisString, RedisValue,
    ThreadSafeContext, raw,
};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CString, c_int, c_longlong};

const OK: RedisResult = Ok(RedisValue::SimpleStringStatic("OK"));

/// A client that waits for a handler.
type Client = ThreadSafeContext<BlockedClient>;

thread_local! {
    static CONNECTIONS: RefCell<Connections> = RefCell::default();
    static BLOCKS: Cell<bool> = const { Cell::new(false) };
}

/// Does the work of a slot that blocks, in which no handler may be called.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    BLOCKS.set(true);
    let result = work();
    BLOCKS.set(false);
    result
}

/// The table, for a handler that is called at this moment.
fn in_handler() -> &'static ConnectionType {
    assert!(!BLOCKS.get(), "a handler was called inside a slot that blocks");
    rdma().expect("the type that the connection is of")
}

/// The open connections. Never borrowed while a slot is called: the slot may call back.
#[derive(Default)]
struct Connections {
    by_number: HashMap<u64, *mut Connection>,
    waiting: HashMap<*mut Connection, Waiting>,
    last: u64,
}

/// What a connection's handlers work towards.
enum Waiting {
    Connect { client: Client, close: bool },
    Exchange(Exchange),
}

struct Exchange {
    client: Client,
    unsent: Vec<u8>,
    sent: usize,
    received: Vec<u8>,
    wanted: usize,
}

fn with<T>(work: impl FnOnce(&mut Connections) -> T) -> T {
    CONNECTIONS.with(|connections| work(&mut connections.borrow_mut()))
}

fn rdma() -> Result<&'static ConnectionType, RedisError> {
    // SAFETY: the server filled the function in while loading.
    let version = unsafe { raw::RedisModule_GetServerVersion.expect("server API")() };
    abi::rdma(version as u32).map_err(RedisError::String)
}

/// A command's arguments, in order.
struct Arguments(std::iter::Skip<std::vec::IntoIter<RedisString>>);

impl Arguments {
    fn new(arguments: Vec<RedisString>) -> Self {
        Self(arguments.into_iter().skip(1))
    }

    fn connection(&mut self) -> Result<*mut Connection, RedisError> {
        let number = self.0.next_u64()?;
        with(|open| open.by_number.get(&number).copied())
            .ok_or_else(|| RedisError::String(format!("ERR no connection {number}")))
    }

    fn text(&mut self) -> Result<CString, RedisError> {
        c_string(self.0.next_arg()?.as_slice()).map_err(RedisError::String)
    }

    fn optional_text(&mut self) -> Result<Option<CString>, RedisError> {
        let argument = self.0.next();
        argument.map(|text| c_string(text.as_slice()).map_err(RedisError::String)).transpose()
    }

    fn bytes(&mut self) -> Result<Vec<u8>, RedisError> {
        Ok(self.0.next_arg()?.as_slice().to_vec())
    }

    fn port(&mut self) -> Result<c_int, RedisError> {
        c_int::try_from(self.0.next_i64()?).map_err(|error| RedisError::String(error.to_string()))
    }

    fn count(&mut self) -> Result<usize, RedisError> {
        usize::try_from(self.0.next_u64()?).map_err(|error| RedisError::String(error.to_string()))
    }

    fn milliseconds(&mut self) -> Result<c_longlong, RedisError> {
        self.0.next_i64()
    }
}

/// What a slot left behind that failed.
fn failure(rdma: &ConnectionType, slot: &str, connection: *mut Connection) -> RedisError {
    // SAFETY: a live connection.
    let (state, error) = unsafe { (rdma.state(connection), rdma.last_error(connection)) };
    RedisError::String(format!("ERR {slot} failed; state {state}; last error {error}"))
}

/// The same, of a slot that also leaves an error number.
fn failed_with(
    rdma: &ConnectionType,
    slot: &str,
    connection: *mut Connection,
    errno: i32,
) -> RedisError {
    let rest = failure(rdma, slot, connection);
    RedisError::String(format!("{rest}; errno {}", error_text(errno)))
}

/// The words of the server's TCP type, relative to where its executable was loaded.
pub fn table(_: &Context, _: Vec<RedisString>) -> RedisResult {
    let words = abi::tcp_words().map_err(RedisError::String)?;
    let texts = words.into_iter().map(|word| RedisValue::BulkString(format!("{word:#x}")));
    Ok(RedisValue::Array(texts.collect()))
}

/// State, last error, local and remote address, and whether the peer is local.
fn view(rdma: &ConnectionType, connection: *mut Connection) -> RedisValue {
    // SAFETY: a live connection.
    let texts = unsafe {
        [
            rdma.state(connection).to_owned(),
            rdma.last_error(connection),
            rdma.addr(connection, false),
            rdma.addr(connection, true),
            rdma.is_local(connection).to_string(),
        ]
    };
    RedisValue::Array(texts.map(RedisValue::BulkString).into())
}

pub fn new(_ctx: &Context, _arguments: Vec<RedisString>) -> RedisResult {
    let connection = rdma()?.create();
    if connection.is_null() {
        return Err(RedisError::Str("ERR conn_create failed"));
    }
    Ok(RedisValue::Integer(with(|open| {
        open.last += 1;
        open.by_number.insert(open.last, connection);
        open.last as i64
    })))
}

pub fn state(_ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let connection = Arguments::new(arguments).connection()?;
    Ok(view(rdma()?, connection))
}

pub fn connect(ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let mut arguments = Arguments::new(arguments);
    let connection = arguments.connection()?;
    start(ctx, connection, &mut arguments, false)
}

pub fn visit(ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let rdma = rdma()?;
    let connection = rdma.create();
    let started = start(ctx, connection, &mut Arguments::new(arguments), true);
    if started.is_err() {
        // SAFETY: a live connection, which nobody else knows.
        unsafe { rdma.close(connection) };
    }
    started
}

pub fn overlap(ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let rdma = rdma()?;
    let mut arguments = Arguments::new(arguments);
    let (first, second) = (arguments.connection()?, arguments.connection()?);
    let started = start(ctx, first, &mut arguments, false)?;
    let (host, port, timeout) = (arguments.text()?, arguments.port()?, arguments.milliseconds()?);
    // SAFETY: a live connection. Its outcome is its state, which another command shows.
    let _ = blocking(|| unsafe { rdma.blocking_connect(second, &host, port, timeout) });
    Ok(started)
}

/// Begins to connect; the client waits for the handler.
fn start(
    ctx: &Context,
    connection: *mut Connection,
    arguments: &mut Arguments,
    close: bool,
) -> RedisResult {
    let rdma = rdma()?;
    let (host, port) = (arguments.text()?, arguments.port()?);
    // An empty source is none.
    let source = arguments.optional_text()?.filter(|source| !source.is_empty());
    // SAFETY: a live connection.
    unsafe {
        if !rdma.connect(connection, &host, port, source.as_deref(), on_connected) {
            return Err(failure(rdma, "connect", connection));
        }
    }
    let client = ThreadSafeContext::with_blocked_client(ctx.block_client());
    with(|open| open.waiting.insert(connection, Waiting::Connect { client, close }));
    Ok(RedisValue::NoReply)
}

unsafe extern "C" fn on_connected(connection: *mut Connection) {
    let rdma = in_handler();
    let Some(Waiting::Connect { client, close }) = with(|open| open.waiting.remove(&connection))
    else {
        panic!("a connect handler that nobody waits for");
    };
    client.reply(Ok(view(rdma, connection)));
    if close {
        // SAFETY: a live connection, which nobody else knows.
        unsafe { rdma.close(connection) };
    }
}

unsafe extern "C" fn on_abandoned(_connection: *mut Connection) {
    panic!("the handler of a connection that was closed before");
}

pub fn abandon(_ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let rdma = rdma()?;
    let mut arguments = Arguments::new(arguments);
    let (host, port) = (arguments.text()?, arguments.port()?);
    let connection = rdma.create();
    // SAFETY: a live connection, which nobody else knows.
    let started = unsafe {
        let started = rdma.connect(connection, &host, port, None, on_abandoned);
        rdma.close(connection);
        started
    };
    Ok(RedisValue::Integer(started.into()))
}

pub fn blocking_connect(_ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let rdma = rdma()?;
    let mut arguments = Arguments::new(arguments);
    let connection = arguments.connection()?;
    let (host, port, timeout) = (arguments.text()?, arguments.port()?, arguments.milliseconds()?);
    // SAFETY: a live connection.
    blocking(|| unsafe { rdma.blocking_connect(connection, &host, port, timeout) })
        .map_err(|errno| failed_with(rdma, "blocking_connect", connection, errno))?;
    OK
}

pub fn sync_write(_ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let rdma = rdma()?;
    let mut arguments = Arguments::new(arguments);
    let connection = arguments.connection()?;
    let (bytes, timeout) = (arguments.bytes()?, arguments.milliseconds()?);
    // SAFETY: a live connection.
    blocking(|| unsafe { rdma.sync_write(connection, &bytes, timeout) })
        .map(|count| RedisValue::Integer(count as i64))
        .map_err(|errno| failed_with(rdma, "sync_write", connection, errno))
}

pub fn sync_read(_ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    read_synchronously("sync_read", arguments)
}

pub fn sync_readline(_ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    read_synchronously("sync_readline", arguments)
}

fn read_synchronously(slot: &str, arguments: Vec<RedisString>) -> RedisResult {
    let rdma = rdma()?;
    let mut arguments = Arguments::new(arguments);
    let connection = arguments.connection()?;
    let (count, timeout) = (arguments.count()?, arguments.milliseconds()?);
    let mut bytes = vec![0xff; count];
    // SAFETY: a live connection.
    let read = blocking(|| unsafe { rdma.sync_read(slot, connection, &mut bytes, timeout) })
        .map_err(|errno| failed_with(rdma, slot, connection, errno))?;
    bytes.truncate(read);
    Ok(RedisValue::StringBuffer(bytes))
}

pub fn write(_ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let rdma = rdma()?;
    let mut arguments = Arguments::new(arguments);
    let (connection, bytes) = (arguments.connection()?, arguments.bytes()?);
    // SAFETY: a live connection.
    let written = unsafe { rdma.write(connection, &bytes) };
    match written {
        -1 => Err(failure(rdma, "write", connection)),
        count => Ok(RedisValue::Integer(count.into())),
    }
}

pub fn read(_ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let rdma = rdma()?;
    let mut arguments = Arguments::new(arguments);
    let (connection, count) = (arguments.connection()?, arguments.count()?);
    let mut bytes = vec![0xff; count];
    // SAFETY: a live connection.
    let read = unsafe { rdma.read(connection, &mut bytes) };
    let read = usize::try_from(read).map_err(|_| failure(rdma, "read", connection))?;
    bytes.truncate(read);
    Ok(RedisValue::StringBuffer(bytes))
}

pub fn exchange(ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let rdma = rdma()?;
    let mut arguments = Arguments::new(arguments);
    let connection = arguments.connection()?;
    let (wanted, unsent) = (arguments.count()?, arguments.bytes()?);
    let client = ThreadSafeContext::with_blocked_client(ctx.block_client());
    let exchange = Exchange { client, unsent, sent: 0, received: Vec::new(), wanted };
    with(|open| open.waiting.insert(connection, Waiting::Exchange(exchange)));
    // SAFETY: a live connection.
    unsafe {
        rdma.set_read_handler(connection, Some(on_readable));
        rdma.set_write_handler(connection, Some(on_writable));
    }
    Ok(RedisValue::NoReply)
}

fn take_exchange(connection: *mut Connection) -> Exchange {
    match with(|open| open.waiting.remove(&connection)) {
        Some(Waiting::Exchange(exchange)) => exchange,
        _ => panic!("a handler that was taken away was called"),
    }
}

/// Writes once, as a server does that has a reply to send.
unsafe extern "C" fn on_writable(connection: *mut Connection) {
    let rdma = in_handler();
    let mut exchange = take_exchange(connection);
    // SAFETY: the connection whose handler this is.
    let written = unsafe { rdma.write(connection, &exchange.unsent[exchange.sent..]) };
    exchange.sent += usize::try_from(written).unwrap_or(0);
    if exchange.sent == exchange.unsent.len() {
        // SAFETY: as above.
        unsafe { rdma.set_write_handler(connection, None) };
    }
    // An error is left to the reader, who finds the end of the connection.
    with(|open| open.waiting.insert(connection, Waiting::Exchange(exchange)));
}

/// Reads once, as a server does.
unsafe extern "C" fn on_readable(connection: *mut Connection) {
    let rdma = in_handler();
    let mut exchange = take_exchange(connection);
    let mut bytes = vec![0; 16 * 1024];
    // SAFETY: the connection whose handler this is.
    let (read, state) = unsafe { (rdma.read(connection, &mut bytes), rdma.state(connection)) };
    exchange.received.extend_from_slice(&bytes[..usize::try_from(read).unwrap_or(0)]);
    let ended = match read {
        0 => Some("end".to_owned()),
        // SAFETY: as above.
        -1 if state != "CONNECTED" => Some(unsafe { rdma.last_error(connection) }),
        _ => None,
    };
    let enough = exchange.received.len() >= exchange.wanted;
    if ended.is_none() && !enough {
        with(|open| open.waiting.insert(connection, Waiting::Exchange(exchange)));
        return;
    }
    let Exchange { client, received, .. } = exchange;
    client.reply(Ok(RedisValue::Array(vec![
        RedisValue::BulkString(ended.clone().unwrap_or_else(|| "enough".to_owned())),
        RedisValue::BulkString(state.to_owned()),
        RedisValue::StringBuffer(received),
    ])));
    // SAFETY: as above; after the close it is not used any more.
    unsafe {
        if ended.is_some() {
            with(|open| open.by_number.retain(|_, other| *other != connection));
            rdma.close(connection);
        } else {
            rdma.set_read_handler(connection, None);
            rdma.set_write_handler(connection, None);
        }
    }
}

pub fn shutdown(_ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let connection = Arguments::new(arguments).connection()?;
    // SAFETY: a live connection.
    unsafe { rdma()?.shutdown(connection) };
    OK
}

pub fn close(_ctx: &Context, arguments: Vec<RedisString>) -> RedisResult {
    let connection = Arguments::new(arguments).connection()?;
    let waiting = with(|open| {
        open.by_number.retain(|_, other| *other != connection);
        open.waiting.remove(&connection)
    });
    // SAFETY: a live connection, which is forgotten by now.
    unsafe { rdma()?.close(connection) };
    if let Some(Waiting::Connect { client, .. } | Waiting::Exchange(Exchange { client, .. })) =
        waiting
    {
        client.reply(Err(RedisError::Str("ERR closed by another command")));
    }
    OK
}
