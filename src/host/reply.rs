// SPDX-License-Identifier: BSD-3-Clause
//! Replies of commands, as values.
//!
//! A [`Reply`] is made up first and sent at once, so that nothing of the transport is
//! open while the server builds its answer. Maps are maps to a client that speaks
//! RESP3, and lists of names and values to one that speaks RESP2.

use redis_module::raw;
use std::ffi::{CString, c_char, c_long};
use std::fmt;

/// The reply of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
    /// A line without its length, as `OK` is.
    Status(String),
    /// There is no value.
    Nothing,
    /// Values in their order.
    List(Vec<Reply>),
    /// Values by name.
    Map(Vec<(&'static str, Reply)>),
}

impl Reply {
    /// Hands the reply to the server.
    ///
    /// # Safety
    /// `ctx` is that of a command that was not answered yet.
    pub unsafe fn send(&self, ctx: *mut raw::RedisModuleCtx) {
        // SAFETY: by the caller's promise; the texts are copied by the server.
        unsafe {
            match self {
                Self::Number(number) => {
                    let number = i64::try_from(*number).unwrap_or(i64::MAX);
                    raw::RedisModule_ReplyWithLongLong.expect("server API")(ctx, number);
                }
                Self::Text(text) => send_text(ctx, text),
                Self::Status(line) => {
                    let line = CString::new(line.as_str()).unwrap_or_default();
                    raw::RedisModule_ReplyWithSimpleString.expect("server API")(ctx, line.as_ptr());
                }
                Self::Nothing => {
                    raw::RedisModule_ReplyWithNull.expect("server API")(ctx);
                }
                Self::List(items) => {
                    let count = items.len() as c_long;
                    raw::RedisModule_ReplyWithArray.expect("server API")(ctx, count);
                    for item in items {
                        item.send(ctx);
                    }
                }
                Self::Map(fields) => {
                    let count = fields.len() as c_long;
                    raw::RedisModule_ReplyWithMap.expect("server API")(ctx, count);
                    for (name, value) in fields {
                        send_text(ctx, name);
                        value.send(ctx);
                    }
                }
            }
        }
    }
}

/// # Safety
/// As [`Reply::send`].
unsafe fn send_text(ctx: *mut raw::RedisModuleCtx, text: &str) {
    // SAFETY: by the caller's promise.
    unsafe {
        let start = text.as_ptr().cast::<c_char>();
        raw::RedisModule_ReplyWithStringBuffer.expect("server API")(ctx, start, text.len());
    }
}

impl From<u64> for Reply {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<String> for Reply {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<&str> for Reply {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl<T: Into<Reply>> From<Option<T>> for Reply {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Nothing, Into::into)
    }
}

/// In one line, for `INFO` and the log: `name=value,name=value`.
impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) | Self::Status(text) => f.write_str(text),
            Self::Nothing => f.write_str("-"),
            Self::List(items) => {
                let texts: Vec<_> = items.iter().map(ToString::to_string).collect();
                f.write_str(&texts.join(" "))
            }
            Self::Map(fields) => {
                let texts: Vec<_> = fields.iter().map(|(name, v)| format!("{name}={v}")).collect();
                f.write_str(&texts.join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_says_it_all() {
        let reply = Reply::Map(vec![
            ("name", "d0".into()),
            ("ports", Reply::List(vec![1_u64.into(), 2_u64.into()])),
            ("id", None::<u64>.into()),
        ]);
        assert_eq!(reply.to_string(), "name=d0,ports=1 2,id=-");
    }
}
