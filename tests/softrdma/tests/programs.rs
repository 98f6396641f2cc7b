// SPDX-License-Identifier: BSD-3-Clause
//! Programs that nobody here wrote, unmodified: those of rdmacm-utils.
//!
//! They need Debian's package of that name and the shared object, so they run on
//! request: `cargo test -p softrdma --test programs -- --ignored`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

fn on_fabric(line: &[&str]) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/softrdma.sh");
    let mut command = Command::new("timeout");
    command.arg("60").arg(script).args(line);
    command
}

/// Runs a server and a client; both must end well, and the loader must not warn.
fn both(server: &[&str], client: &[&str]) {
    // Builds it once, so that the server is up when the client comes.
    assert!(on_fabric(&["--path"]).status().expect("the script").success());
    let mut one = on_fabric(server);
    let one = one.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the server");
    std::thread::sleep(Duration::from_secs(1));
    let two = on_fabric(client).output().expect("the client");
    let one = one.wait_with_output().expect("the server's end");
    for (who, out) in [("server", &one), ("client", &two)] {
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{who}: {errors}");
        assert!(!errors.contains("no version information"), "{who}: {errors}");
    }
}

#[test]
#[ignore = "needs rdmacm-utils"]
fn rping() {
    for (ip, port) in [("127.0.0.1", "7301"), ("::1", "7302")] {
        let line = |role| ["rping", role, "-a", ip, "-p", port, "-C", "1000", "-v"];
        both(&line("-s"), &line("-c"));
    }
}

#[test]
#[ignore = "needs rdmacm-utils"]
fn ucmatose() {
    let common = ["ucmatose", "-p", "7303", "-c", "5", "-C", "100", "-S", "4000"];
    both(&common, &[&common[..], &["-s", "127.0.0.1"]].concat());
}

#[test]
#[ignore = "needs rdmacm-utils"]
fn rdma_server_and_client() {
    both(&["rdma_server", "-p", "7304"], &["rdma_client", "-s", "127.0.0.1", "-p", "7304"]);
    both(&["rdma_xserver", "-p", "7305"], &["rdma_xclient", "-s", "127.0.0.1", "-p", "7305"]);
}
