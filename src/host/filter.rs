// SPDX-License-Identifier: BSD-3-Clause
//! A look at each command before the server carries it out: a filter of the module API.
//!
//! Every command of every client pays for it, so it is there only while somebody needs it.

use super::api;
use super::main_cell::MainPtr;
use redis_module::raw;
use std::ffi::c_int;

/// A filter that is in place until it is dropped. Main thread.
#[derive(Debug)]
pub struct Filter(MainPtr<raw::RedisModuleCommandFilter>);

impl Filter {
    /// Has the server call `callback` before each command, from the next one on.
    pub fn new(callback: unsafe extern "C" fn(*mut raw::RedisModuleCommandFilterCtx)) -> Self {
        // SAFETY: the API table and the context are set at load.
        Self(MainPtr(unsafe {
            raw::RedisModule_RegisterCommandFilter.expect("server API")(
                api::context(),
                Some(callback),
                0,
            )
        }))
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        // SAFETY: as above; the filter is this module's own, and registered.
        unsafe {
            raw::RedisModule_UnregisterCommandFilter.expect("server API")(api::context(), self.0.0)
        };
    }
}

/// A command that is about to be carried out.
#[derive(Debug)]
pub struct Command(*mut raw::RedisModuleCommandFilterCtx);

impl Command {
    /// The command that the server shows a filter.
    ///
    /// # Safety
    /// `shown` is what the server passed to a filter that has not returned yet.
    pub unsafe fn new(shown: *mut raw::RedisModuleCommandFilterCtx) -> Self {
        Self(shown)
    }

    /// How many arguments it has, its name included.
    pub fn count(&self) -> usize {
        // SAFETY: by the promise made to `new`.
        let count = unsafe { raw::RedisModule_CommandFilterArgsCount.expect("server API")(self.0) };
        usize::try_from(count).unwrap_or(0)
    }

    /// One of them; nothing if there are fewer.
    pub fn argument(&self, at: usize) -> &[u8] {
        if at >= self.count() {
            return b"";
        }
        // SAFETY: as above; there is an argument of that number, and the server keeps it for
        // as long as nobody replaces it, for which this one would have to be let go of.
        unsafe {
            let mut length = 0;
            let text =
                raw::RedisModule_CommandFilterArgGet.expect("server API")(self.0, at as c_int);
            let text = raw::RedisModule_StringPtrLen.expect("server API")(text, &mut length);
            std::slice::from_raw_parts(text.cast(), length)
        }
    }

    /// Puts something else in an argument's place.
    pub fn replace(&mut self, at: usize, with: &str) {
        // SAFETY: as above. The server copies the text, and owns the string from then on.
        unsafe {
            let text = raw::RedisModule_CreateString.expect("server API")(
                std::ptr::null_mut(),
                with.as_ptr().cast(),
                with.len(),
            );
            raw::RedisModule_CommandFilterArgReplace.expect("server API")(
                self.0,
                at as c_int,
                text,
            );
        }
    }

    /// The server's number of the client that sent it.
    pub fn client(&self) -> u64 {
        // SAFETY: as above.
        unsafe { raw::RedisModule_CommandFilterGetClientId.expect("server API")(self.0) }
    }
}
