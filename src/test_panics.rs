// SPDX-License-Identifier: BSD-3-Clause
//! Panics that a test asks for, with the feature `test-panics` alone.
//!
//! The variable [`VARIABLE`] names a folder. A file in it that has the name of a
//! guarded function makes the next call of that function panic. The call takes the
//! file away first, so each file stands for one panic. The file `mark_ready` stands for
//! another fault: an endpoint that is forgotten, for the watchdog.

use std::path::PathBuf;
use std::sync::OnceLock;

/// The folder's name in the environment.
const VARIABLE: &str = "VALKEY_RDMA_TEST_PANICS";

/// Panics if a test has asked for it in the function `what`.
pub(crate) fn if_asked_for(what: &str) {
    if asked_for(what) {
        panic!("a test has asked for a panic in {what}");
    }
}

/// Whether a test has asked for a fault in `what`.
pub(crate) fn asked_for(what: &str) -> bool {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| std::env::var_os(VARIABLE).map(PathBuf::from));
    folder.as_ref().is_some_and(|folder| std::fs::remove_file(folder.join(what)).is_ok())
}
