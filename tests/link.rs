// SPDX-License-Identifier: BSD-3-Clause
//! What the linker made: the module depends on libc alone and exports what the server
//! looks for. Why that matters is told in `crates/verbs/src/library.rs`.

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
            "the module depends on {library}: is a function called by its name?"
        );
    }
}

/// Neither defined, which another object in the process might find, nor needed.
#[test]
fn it_has_no_symbol_of_the_rdma_libraries() {
    let symbols = objdump("-T");
    let names = symbols.lines().filter_map(|line| line.split_whitespace().last());
    let theirs: Vec<_> =
        names.filter(|name| name.starts_with("ibv_") || name.starts_with("rdma_")).collect();
    assert!(theirs.is_empty(), "{theirs:?}");
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
