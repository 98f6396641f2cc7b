// SPDX-License-Identifier: BSD-3-Clause
//! Checks, before the link, that every function of librdmacm and libibverbs that the
//! module calls is forwarded by `src/verbs/library.rs`.
//!
//! A call that is not forwarded would still link, against the library itself, and the
//! module would then abort in servers whose allocator is jemalloc (see that file).
//! `tests/link.rs` looks at the result; this says which line to write.

use std::collections::BTreeSet;
use std::{fs, process};

const FORWARDERS: &str = "src/verbs/library.rs";

/// What rdma-sys itself implements: functions that the libraries' headers define inline.
const INLINE: &[&str] = &["ibv_poll_cq", "ibv_req_notify_cq", "ibv_post_send", "ibv_post_recv"];

fn main() {
    println!("cargo:rerun-if-changed=src/verbs");
    println!("cargo:rerun-if-changed=build.rs");

    let forwarded = forwarded(&read(FORWARDERS));
    for entry in fs::read_dir("src/verbs").expect("src/verbs can be read") {
        let path = entry.expect("src/verbs can be read").path();
        let file = path.to_string_lossy().into_owned();
        for name in calls(&read(&file)) {
            if !forwarded.contains(&name) && !INLINE.contains(&name.as_str()) {
                eprintln!(
                    "{file} calls {name}, which {FORWARDERS} does not forward: add its declaration \
                     to the list `forward!` there"
                );
                process::exit(1);
            }
        }
    }
}

fn read(file: &str) -> String {
    fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"))
}

/// Names behind `fn` inside the invocation of `forward!`.
fn forwarded(source: &str) -> BTreeSet<String> {
    let list = source.split("\nforward! {").nth(1).expect("an invocation of forward!");
    let list = list.split("\n}").next().unwrap_or(list);
    list.split("fn ").skip(1).map(|rest| word(rest).to_owned()).collect()
}

/// Names of the two libraries' functions that are called, with their bracket.
fn calls(source: &str) -> BTreeSet<String> {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut names = BTreeSet::new();
    for line in code {
        for prefix in ["rdma_", "ibv_"] {
            for (at, _) in line.match_indices(prefix) {
                let name = word(&line[at..]);
                let starts_a_word =
                    !line[..at].ends_with(|c: char| c == '_' || c.is_alphanumeric());
                let is_called = line[at + name.len()..].starts_with('(');
                if starts_a_word && is_called && !line[..at].ends_with("fn ") {
                    names.insert(name.to_owned());
                }
            }
        }
    }
    names
}

fn word(text: &str) -> &str {
    text.split(|c: char| c != '_' && !c.is_alphanumeric()).next().unwrap_or("")
}
