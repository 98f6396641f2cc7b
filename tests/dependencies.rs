// SPDX-License-Identifier: BSD-3-Clause
//! Every dependency that a package declares is mentioned in its sources.

use std::fs;
use std::path::{Path, PathBuf};

/// Where cargo looks for a package's sources, and where cargo-fuzz does.
const SOURCES: [&str; 5] = ["src", "tests", "examples", "benches", "fuzz_targets"];

#[test]
fn every_dependency_is_used() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let members = members(&read(&root.join("Cargo.toml")));
    assert!(members.len() > 5, "{members:?}");
    let packages = members.into_iter().map(|member| root.join(member));
    let mut unused = Vec::new();
    for package in packages.chain([root.to_owned(), root.join("fuzz")]) {
        let dependencies = dependencies(&read(&package.join("Cargo.toml")));
        let sources: String = SOURCES.iter().map(|folder| sources(&package.join(folder))).collect();
        for name in dependencies {
            if !mentions(&sources, &name) {
                unused.push(format!("{}: {name}", package.display()));
            }
        }
    }
    assert!(unused.is_empty(), "{unused:#?}");
}

/// The members of a workspace, which its manifest lists in one line.
fn members(manifest: &str) -> Vec<String> {
    let line = manifest.lines().find_map(|line| line.strip_prefix("members = ")).expect("members");
    line.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The names by which sources use what a manifest's tables of dependencies declare.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut inside = false;
    let mut names = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            inside = line.ends_with("dependencies]");
        } else if let (true, Some((name, _))) = (inside, line.split_once(" = ")) {
            names.push(name.replace('-', "_"));
        }
    }
    names
}

fn mentions(sources: &str, name: &str) -> bool {
    [format!("{name}::"), format!("use {name};"), format!("use {name} ")]
        .iter()
        .any(|text| sources.contains(text.as_str()))
}

/// All Rust sources below a folder; not those of a package within it.
fn sources(folder: &Path) -> String {
    let Ok(entries) = fs::read_dir(folder) else { return String::new() };
    let mut paths: Vec<PathBuf> =
        entries.map(|entry| entry.expect("an entry of the folder").path()).collect();
    paths.sort();
    let mut text = String::new();
    for path in paths {
        if path.is_dir() && !path.join("Cargo.toml").exists() {
            text += &sources(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text += &read(&path);
        }
    }
    text
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn a_dependency_counts_by_its_name_in_the_sources() {
    let manifest = "[package]\nname = \"x\"\n[dependencies]\nrdma-sys = \"0.3\"\n\
                    proto = { package = \"y\" }\n[target.'cfg(loom)'.dev-dependencies]\nloom = \"0.7\"\n";
    assert_eq!(dependencies(manifest), ["rdma_sys", "proto", "loom"]);
    assert!(mentions("use rdma_sys::*;", "rdma_sys") && !mentions("// rdma_sys", "rdma_sys"));
}
