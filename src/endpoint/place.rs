// SPDX-License-Identifier: BSD-3-Clause
//! An endpoint's place in the registry, vacant only when the endpoint is destroyed.

use crate::endpoint::wr_id::EndpointId;
use std::sync::{Mutex, PoisonError};

/// Keys of endpoints that are destroyed.
static VACANT: Mutex<Vec<EndpointId>> = Mutex::new(Vec::new());

/// A place among the endpoints, given back when the last part of its endpoint is gone.
#[derive(Debug)]
pub struct Place(EndpointId);

impl Place {
    /// The place of a key that was reserved.
    pub fn new(key: EndpointId) -> Self {
        Self(key)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        VACANT.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

/// The keys of endpoints that were destroyed since the last call.
pub fn vacated() -> Vec<EndpointId> {
    std::mem::take(&mut *VACANT.lock().unwrap_or_else(PoisonError::into_inner))
}
