// SPDX-License-Identifier: BSD-3-Clause
//! Modules depend on each other in one direction.
//!
//! A folder is a room: a module and its submodules, which may be one type's `impl`, written in
//! several files. Within a room a file may import its parent; beyond that no two files may need
//! each other, directly or by way of others, and no two rooms.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A module's path below the crate, such as `["poller", "device"]`; the crate's root is empty.
type Module = Vec<String>;
type Graph = BTreeMap<Module, BTreeSet<Module>>;

/// The crates that are checked: the folder of each one's sources.
const CRATES: [&str; 6] = [
    "src",
    "crates/client/src",
    "crates/tools/src",
    "crates/doctor/src",
    "crates/proto/src",
    "crates/verbs/src",
];

fn modules(folder: &Path, at: &[String], found: &mut BTreeMap<Module, PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let below = |name: &String| [at, std::slice::from_ref(name)].concat();
        if path.is_dir() {
            modules(&path, &below(&name), found);
        } else if name == "mod" || (name == "lib" && at.is_empty()) {
            found.insert(at.to_vec(), path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.insert(below(&name), path);
        }
    }
}

/// A file's text without comments and its unit tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The paths that a tree of a `use` stands for: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn branches(tree: &str) -> Vec<String> {
    let Some((stem, rest)) = tree.split_once('{') else {
        return tree.split(" as ").next().map(str::to_owned).into_iter().collect();
    };
    let inner = rest.trim_end().trim_end_matches('}');
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, character) in inner.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&inner[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&inner[start..]);
    let parts = parts.iter().map(|part| part.trim()).filter(|part| !part.is_empty());
    parts.flat_map(|part| branches(&format!("{stem}{part}"))).collect()
}

/// Each path that the code names, as written: in a `use`, or where it stands.
fn paths(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = code.to_owned();
    while let Some(start) = rest.find("use ") {
        let Some(length) = rest[start..].find(';') else { break };
        let before = rest[..start].chars().next_back();
        if before.is_some_and(|it| it.is_alphanumeric() || it == '_') {
            rest.replace_range(start..start + 4, " ");
        } else {
            let tree: Vec<_> = rest[start + 4..start + length].split_whitespace().collect();
            found.extend(branches(&tree.join(" ")));
            rest.replace_range(start..start + length, " ");
        }
    }
    let separators = |it: char| !(it.is_alphanumeric() || it == '_' || it == ':');
    found.extend(rest.split(separators).filter(|word| word.contains("::")).map(str::to_owned));
    found
}

/// The module of this crate that a path in `module` leads to, if it does.
fn target(path: &str, module: &[String], all: &BTreeMap<Module, PathBuf>) -> Option<Module> {
    let mut words: Vec<&str> = path.split("::").collect();
    let mut base: Module = match words[0] {
        "crate" => Vec::new(),
        "self" | "super" => module.to_vec(),
        child if all.contains_key(&[module, &[child.to_owned()]].concat()) => module.to_vec(),
        _ => return None,
    };
    while words.first().is_some_and(|word| matches!(*word, "crate" | "self" | "super")) {
        if words.remove(0) == "super" {
            base.pop()?;
        }
    }
    base.extend(words.iter().map(|word| (*word).to_owned()));
    (0..=base.len()).rev().map(|length| base[..length].to_vec()).find(|it| all.contains_key(it))
}

fn graph(root: &Path) -> Graph {
    let mut all = BTreeMap::new();
    modules(root, &[], &mut all);
    assert!(all.len() > 3, "{root:?} has the modules {all:?}");
    let imports = |(module, file): (&Module, &PathBuf)| {
        let found = paths(&code(file));
        let found = found.iter().filter_map(|path| target(path, module, &all));
        // A file may import the module that it is a part of.
        (module.clone(), found.filter(|it| !module.starts_with(it)).collect())
    };
    all.iter().map(imports).collect()
}

/// The same with each folder of the crate as one node.
fn rooms(files: &Graph) -> Graph {
    let room = |module: &Module| module[..module.len().min(1)].to_vec();
    let mut graph = Graph::new();
    for (module, imports) in files {
        let entry = graph.entry(room(module)).or_default();
        entry.extend(imports.iter().map(room).filter(|it| *it != room(module)));
    }
    // The crate's root only lists what there is.
    graph.remove(&Vec::new());
    graph
}

/// A circle, if there is one: each imports the next, and the last the first.
fn circle(graph: &Graph) -> Option<Vec<String>> {
    fn visit(
        graph: &Graph,
        at: &Module,
        trail: &mut Vec<Module>,
        done: &mut BTreeSet<Module>,
    ) -> Option<Vec<String>> {
        if let Some(start) = trail.iter().position(|it| it == at) {
            return Some(trail[start..].iter().map(|module| module.join("::")).collect());
        }
        if done.contains(at) {
            return None;
        }
        trail.push(at.clone());
        let found =
            graph.get(at).into_iter().flatten().find_map(|it| visit(graph, it, trail, done));
        trail.pop();
        done.insert(at.clone());
        found
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|module| visit(graph, module, &mut Vec::new(), &mut done))
}

#[test]
fn no_two_modules_need_each_other() {
    for sources in CRATES {
        let files = graph(&Path::new(env!("CARGO_MANIFEST_DIR")).join(sources));
        assert_eq!(circle(&files), None, "in {sources}");
        assert_eq!(circle(&rooms(&files)), None, "between the folders of {sources}");
    }
}

#[test]
fn a_circle_is_found() {
    let module = |name: &str| vec![name.to_owned()];
    let mut graph = Graph::new();
    graph.insert(module("a"), BTreeSet::from([module("b")]));
    graph.insert(module("b"), BTreeSet::from([module("c")]));
    assert_eq!(circle(&graph), None);
    graph.insert(module("c"), BTreeSet::from([module("b")]));
    assert_eq!(circle(&graph), Some(vec!["b".to_owned(), "c".to_owned()]));
}

#[test]
fn a_path_leads_to_its_module() {
    let all = ["", "a", "a::b", "c"].map(|path| {
        (
            path.split("::").filter(|word| !word.is_empty()).map(str::to_owned).collect(),
            PathBuf::new(),
        )
    });
    let all = BTreeMap::from(all);
    let leads = |path: &str| {
        let here = vec![String::from("a")];
        target(path, &here, &all).map(|module: Module| module.join("::"))
    };
    assert_eq!(leads("crate::c::Type").as_deref(), Some("c"));
    assert_eq!(leads("super::c::f").as_deref(), Some("c"));
    assert_eq!(leads("b::f").as_deref(), Some("a::b"));
    assert_eq!(leads("std::fmt"), None);
    let tree = "use crate::{a::{b, f as g}, c::Type};\nlet x = super::c::f();";
    assert_eq!(paths(tree), ["crate::a::b", "crate::a::f", "crate::c::Type", "super::c::f"]);
}
