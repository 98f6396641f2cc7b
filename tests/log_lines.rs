// SPDX-License-Identifier: BSD-3-Clause
//! Nothing that can happen again and again writes a line each time.

use std::fs;
use std::path::{Path, PathBuf};

/// Where lines are written past the limiter that bounds them, how many, and why they can't flood
/// the log: each is the answer to one thing that an operator did.
const ONCE: &[(&str, usize, &str)] = &[
    ("module.rs", 6, "the module is loaded, or is to be unloaded"),
    ("doctor.rs", 5, "the module is loaded, and each device is told of once"),
    ("conntype/listener.rs", 5, "the server starts to listen, or is told to listen elsewhere"),
    ("conntype/rebind.rs", 1, "a setting is changed"),
    ("replication/setting.rs", 1, "a setting is changed"),
    ("log_limit.rs", 1, "this is the limiter"),
];

/// At level verbose there is a line for each event: who asks for them gets them.
const LEVELS: [&str; 4] = ["error!", "warn!", "info!", "log!"];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_line_that_can_be_repeated_goes_through_a_limiter() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 30, "{files:?}");
    let mut seen = 0;
    for file in files {
        let name = file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
        let text = fs::read_to_string(&file).unwrap();
        let calls: Vec<_> = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .filter(|line| LEVELS.iter().any(|level| line.contains(&format!("log::{level}("))))
            .collect();
        // An import would hide calls from this test.
        let bare = |line: &str| {
            let Some(names) = line.strip_prefix("use log::") else { return false };
            names
                .split(|c: char| !c.is_alphanumeric())
                .any(|name| LEVELS.iter().any(|level| level.trim_end_matches('!') == name))
        };
        assert!(!text.lines().any(bare), "{name} imports a macro of log");
        let allowed = ONCE.iter().find(|(file, ..)| *file == name).map_or(0, |entry| entry.1);
        assert_eq!(
            calls.len(),
            allowed,
            "{name} writes these lines past the limiter; if none of them can be repeated without \
             an operator's doing, say so in this test: {calls:#?}"
        );
        seen += usize::from(allowed > 0);
    }
    assert_eq!(seen, ONCE.len(), "a file of the list is not there");
}
