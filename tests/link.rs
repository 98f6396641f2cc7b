// SPDX-License-Identifier: BSD-3-Clause
//! What the linker made: the module depends on libc alone and exports what the server
//! looks for. Why that matters is told in `src/verbs/library.rs`.

use std::path::PathBuf;
use std::process::Command;

/// The module that cargo built with this test: in the same folder, `target/PROFILE/deps`.
/// (The copy one folder up is made by `cargo build` alone, not by `cargo test`.)
fn module() -> PathBuf {
    let test = std::env::current_exe().expect("this test's path");
    let module = test.with_file_name("libvalkey_rdma.so");
    assert!(module.exists(), "cargo built no {}", module.display());
    module
}

fn objdump(flag: &str) -> String {
    let output = Command::new("objdump")
        .arg(flag)
        .arg(module())
        .output()
        .expect("objdump runs (Debian: apt install binutils)");
    assert!(output.status.success(), "objdump {flag}: {}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn it_depends_on_libc_alone() {
    let headers = objdump("-p");
    let needed: Vec<_> = headers
        .lines()
        .filter_map(|line| line.trim().strip_prefix("NEEDED"))
        .map(str::trim)
        .collect();
    assert!(needed.contains(&"libc.so.6"), "{needed:?}");
    for library in &needed {
        assert!(
            ["libc.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "libm.so.6"].contains(library),
            "the module depends on {library}: a function of it is not forwarded"
        );
    }
}

#[test]
fn it_exports_what_the_server_looks_for() {
    let symbols = objdump("-T");
    for name in ["ValkeyModule_OnLoad", "ValkeyModule_OnUnload"] {
        assert!(
            symbols.lines().any(|line| line.ends_with(name) && !line.contains("*UND*")),
            "{name} is not exported"
        );
    }
}

/// The fault that a test build has to have is in no other.
#[test]
#[cfg(not(feature = "test-panics"))]
fn it_panics_for_no_test() {
    let contents = std::fs::read(module()).expect("the module is readable");
    let variable = b"VALKEY_RDMA_TEST_PANICS";
    assert!(!contents.windows(variable.len()).any(|bytes| bytes == variable));
}
