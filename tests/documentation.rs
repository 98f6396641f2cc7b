// SPDX-License-Identifier: BSD-3-Clause
//! The documentation against the module: every setting, field of `INFO rdma` and command that
//! there is, is told of, and nothing else is; and every command that a reader is shown is run
//! by a test, or says what it needs that a test does not have.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use valkey_rdma::commands;
use valkey_rdma::config::Settings;
use valkey_rdma::metrics::METRICS;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// What a reader reads, by path. (The report of the last test run is not written by hand.)
fn pages() -> Vec<(String, String)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(root().join("docs"))
        .expect("docs")
        .map(|entry| entry.expect("an entry of docs").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .filter(|path| !path.ends_with("test-report.md"))
        .collect();
    paths.sort();
    let others = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "tests/softrdma/README.md"];
    let names = others.iter().map(|name| (*name).to_owned()).chain(paths.iter().map(|path| {
        let path = path.strip_prefix(root()).expect("below the root");
        path.to_str().expect("UTF-8").to_owned()
    }));
    names.map(|name| (name.clone(), read(&name))).collect()
}

/// The rows of the table that follows `heading`, without its head; cells without blanks around.
fn table(text: &str, heading: &str) -> Vec<Vec<String>> {
    let (_, after) = text.split_once(heading).unwrap_or_else(|| panic!("no '{heading}'"));
    let rows = after.lines().skip_while(|line| !line.starts_with('|'));
    let rows = rows.take_while(|line| line.starts_with('|')).skip(2);
    rows.map(|row| row.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// The names in a table's first column.
fn named(rows: &[Vec<String>]) -> BTreeSet<String> {
    rows.iter().flat_map(|row| quoted(&row[0])).map(str::to_owned).collect()
}

fn same(what: &str, documented: &BTreeSet<String>, there: &BTreeSet<String>) {
    let missing: Vec<_> = there.difference(documented).collect();
    let invented: Vec<_> = documented.difference(there).collect();
    assert!(missing.is_empty(), "{what}: the documentation lacks {missing:?}");
    assert!(invented.is_empty(), "{what}: the documentation has {invented:?}, the module not");
}

/// The arguments that the module says it knows.
fn arguments() -> BTreeSet<String> {
    let error = Settings::from_arguments(["?"]).expect_err("no argument").to_string();
    let (_, names) = error.split_once("one of ").expect("the error names what there is");
    names.split(", ").map(|name| name.split('=').next().expect("a name").to_owned()).collect()
}

#[test]
fn every_argument_is_documented() {
    let rows = table(&read("README.md"), "\nArguments of `loadmodule`");
    same("README.md, arguments of loadmodule", &named(&rows), &arguments());
    let manual = read("packaging/valkey-rdma.7");
    let in_manual = manual.lines().filter_map(|line| line.strip_prefix(".BI ")?.split_once('='));
    let in_manual = in_manual.map(|(name, _)| name.to_owned()).collect();
    same("packaging/valkey-rdma.7", &in_manual, &arguments());
}

/// A number as the README writes it; the module's own notation has no commas.
fn plain(number: &str) -> String {
    number.trim().replace(',', "").replace('−', "-")
}

/// The number next to `number`, in the direction of `step`.
fn beyond(number: &str, step: i64) -> String {
    let digits = number.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let value: i64 = digits.parse().unwrap_or_else(|_| panic!("'{number}' is no number"));
    format!("{}{}", value + step, &number[digits.len()..])
}

#[test]
fn defaults_and_ranges_are_the_documented_ones() {
    let mut seen = 0;
    for row in table(&read("README.md"), "\nArguments of `loadmodule`") {
        let name = quoted(&row[0]).next().expect("a name");
        let set = |value: &str| Settings::from_arguments([format!("{name}={value}").as_str()]);
        if name == "bind" {
            continue;
        }
        if matches!(name, "unknown-release" | "probe" | "replication") {
            assert_eq!(set(&row[1]), Ok(Settings::default()));
            assert!(row[2].split(", ").all(|value| set(value).is_ok()) && set("yes").is_err());
            seen += 1;
            continue;
        }
        if row[1] != "no limit" {
            let by_default = set(&plain(&row[1]));
            assert_eq!(
                by_default,
                Ok(Settings::default()),
                "{name}: the default is not {}",
                row[1]
            );
        }
        // The last part of "0, or 1000 to 86,400,000".
        let range = row[2].rsplit("or ").next().expect("a range");
        let (low, high) = match range.strip_prefix("from ") {
            Some(low) => (low, None),
            None => range.split_once(" to ").map(|(low, high)| (low, Some(high))).expect("a range"),
        };
        let (low, high) = (plain(low), high.map(plain));
        assert!(set(&low).is_ok(), "{name}: {low} is refused");
        assert!(set(&beyond(&low, -1)).is_err(), "{name}: less than {low} is accepted");
        if let Some(high) = high {
            assert!(set(&high).is_ok(), "{name}: {high} is refused");
            assert!(set(&beyond(&high, 1)).is_err(), "{name}: more than {high} is accepted");
        }
        seen += 1;
    }
    assert_eq!(seen, arguments().len() - 1);
}

/// The names of a source file that stand as `("name", …)`, where a map is made of them.
fn fields_of(source: &str) -> BTreeSet<String> {
    let text = read(source);
    let (text, _) = text.split_once("#[cfg(test)]").unwrap_or((&text, ""));
    text.split("(\"")
        .skip(1)
        .filter_map(|rest| rest.split_once("\", "))
        .map(|(n, _)| n.to_owned())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'))
        .collect()
}

#[test]
fn every_field_of_info_is_documented() {
    let rows = table(&read("docs/troubleshooting.md"), "\n## Reading `INFO rdma`");
    let counters = METRICS.fields();
    let there = counters.iter().map(|(name, _)| format!("rdma_{name}"));
    let there = there.chain(commands::LIMITS.iter().map(|name| format!("rdma_limit_{name}")));
    let there = there.chain(
        ["version", "line", "device0", "replication", "primary_link"]
            .map(|name| format!("rdma_{name}")),
    );
    let documented = rows.iter().flat_map(|row| quoted(&row[0])).map(str::to_owned).collect();
    same("docs/troubleshooting.md, INFO rdma", &documented, &there.collect());
}

/// The exporter says of each field which metric it is, or that it is left out.
#[test]
fn every_field_of_info_is_exported() {
    let table = read("crates/tools/src/exporter/table.rs");
    let (table, _) = table.split_once("#[cfg(test)]").expect("the table's tests");
    let counters = METRICS.fields().into_iter().map(|(name, _)| name.to_owned());
    let limits = commands::LIMITS.iter().map(|name| format!("limit_{name}"));
    for field in counters.chain(limits) {
        let named = table.contains(&format!("\"{field}\""));
        assert!(named, "crates/tools/src/exporter/table.rs: there is no '{field}'");
    }
}

#[test]
fn every_field_of_a_client_is_documented() {
    let text = read("docs/troubleshooting.md");
    let (_, section) = text.split_once("\n## A client hangs").expect("the section");
    let (section, _) = section.split_once("\n## ").expect("another section");
    for field in fields_of("src/endpoint/status.rs") {
        let shown =
            section.contains(&format!("\"{field}\" =>")) || section.contains(&format!("`{field}`"));
        assert!(shown, "docs/troubleshooting.md, RDMA.CLIENTS: '{field}' is not there");
    }
    let source = read("src/endpoint/status.rs");
    let waits = source.lines().filter_map(|line| {
        let (_, text) = line.trim().strip_prefix("Self::")?.split_once(" => \"")?;
        Some(text.trim_end_matches("\",").to_owned())
    });
    let documented = named(&table(&text, "\n## A client hangs"));
    same("docs/troubleshooting.md, waits-for", &documented, &waits.collect());
}

#[test]
fn every_command_is_documented() {
    let rows = table(&read("README.md"), "\n### Commands");
    let there = commands::names().map(str::to_uppercase).collect();
    same("README.md, commands", &named(&rows), &there);
    let manual = read("packaging/valkey-rdma.7");
    let in_manual = manual.lines().filter_map(|line| line.strip_prefix(".B RDMA."));
    let in_manual = in_manual.map(|name| format!("RDMA.{name}")).collect();
    same("packaging/valkey-rdma.7, commands", &in_manual, &there);
}

/// Pages that are about what lies below the module: librdmacm's functions are named there.
const BELOW: [&str; 2] = ["docs/abi.md", "tests/softrdma/README.md"];

/// What begins like a name of ours and is another's.
const OTHERS: [&str; 7] = [
    "rdma_cm",
    "rdma_rxe",
    "rdma_ucm",
    "rdma_create_event_channel",
    "rdma.c",
    "rdma.rs",
    "rdma.max",
];

/// Words that look like a setting, a field or a command of ours, anywhere.
#[test]
fn nothing_is_named_that_is_not_there() {
    let settings = named(&table(&read("README.md"), "\nSettings of the server:"));
    let fields: BTreeSet<_> = METRICS.fields().into_iter().map(|(name, _)| name).collect();
    let names: BTreeSet<_> = commands::names().collect();
    let is_field = |name: &str| {
        let limit =
            name.strip_prefix("limit_").is_some_and(|limit| commands::LIMITS.contains(&limit));
        let device = name.strip_prefix("device").is_some_and(|n| n.parse::<u32>().is_ok());
        fields.contains(name)
            || limit
            || device
            || ["version", "line", "replication", "primary_link"].contains(&name)
    };
    for (page, text) in pages().into_iter().filter(|(page, _)| !BELOW.contains(&page.as_str())) {
        let words = text.split(|c: char| !c.is_alphanumeric() && !"_-.*".contains(c));
        for word in words.map(|word| word.trim_matches(['-', '.', '_'])) {
            let lower = word.to_lowercase();
            let ours = ["rdma.", "rdma-port", "rdma-bind", "rdma-rx", "rdma-comp"];
            // `rdma-core` and its like, and a star for several fields, are nobody's name.
            let looks_so =
                word.starts_with("rdma_") || ours.iter().any(|start| lower.starts_with(start));
            if !looks_so || word.contains('*') {
                continue;
            }
            let known = lower.strip_prefix("rdma_").is_some_and(is_field)
                || names.contains(lower.as_str())
                || settings.contains(word)
                || OTHERS.contains(&word);
            assert!(known, "{page}: there is no field, command or setting {word}");
        }
        // Arguments, behind the module's name and by themselves: `rx-size=64k`.
        let loaded = text.lines().filter_map(|line| line.split_once("libvalkey_rdma.so "));
        let loaded = loaded.filter_map(|(_, rest)| rest.split(['`', '\'']).next());
        let loaded = loaded.flat_map(str::split_whitespace).filter(|word| word.contains('='));
        let alone = quoted(&text).filter(|word| {
            let name = word.split_once('=').map_or("", |(name, _)| name);
            let letters = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
            letters && name.contains('-') && !name.starts_with('-')
        });
        for argument in loaded.chain(alone) {
            let known = Settings::from_arguments([argument]);
            assert!(known.is_ok(), "{page}: {known:?}");
        }
    }
}

/// A block of commands that a reader is shown.
struct Shown {
    /// Where it stands, for a message.
    place: String,
    /// The words behind the fence.
    kind: String,
    /// What stands before it, down to the heading.
    before: String,
    commands: Vec<String>,
}

/// The blocks of a page. In those without a kind, which show what a terminal showed or what a
/// file holds, commands stand behind `$`.
fn blocks(page: &str, text: &str) -> Vec<Shown> {
    let mut blocks = Vec::new();
    let (mut open, mut before) = (None::<Shown>, String::new());
    for (number, line) in text.lines().enumerate() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(kind)) => {
                open = Some(Shown {
                    place: format!("{page}:{}", number + 1),
                    kind: kind.to_owned(),
                    before: before.clone(),
                    commands: Vec::new(),
                });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => {
                let command = match block.kind.as_str() {
                    "" => line.strip_prefix("$ "),
                    _ => Some(line),
                };
                let Some(command) = command.map(|c| c.split(" # ").next().unwrap_or(c).trim())
                else {
                    continue;
                };
                match block.commands.last_mut().filter(|last| last.ends_with('\\')) {
                    Some(last) => {
                        last.pop();
                        last.push_str(command);
                    }
                    None if command.is_empty() => {}
                    None => block.commands.push(command.to_owned()),
                }
            }
            (None, None) if line.starts_with('#') => before.clear(),
            (None, None) => {
                before.push_str(line);
                before.push(' ');
            }
        }
    }
    blocks
}

/// Who runs a command that a reader is shown: what it begins with, the file that runs it, and
/// how it stands there. Addresses and ports are left out on both sides.
const RUN_BY: [(&str, &str, &str); 23] = [
    ("scripts/setup.sh build", ".ci/run", "scripts/setup.sh build"),
    ("eval \"$(scripts/setup.sh env)\"", "scripts/build-on.sh", "eval \"$(scripts/setup.sh env)\""),
    ("cargo build --release --locked", "scripts/build-on.sh", "cargo build --release --locked"),
    ("cargo test --lib host::", "scripts/test.sh", "cargo test --locked --workspace"),
    (
        "objdump -p target/release/libvalkey_rdma.so | grep NEEDED",
        "tests/link.rs",
        "objdump(\"-p\")",
    ),
    ("objdump -T target/release/libvalkey_rdma.so | grep", "tests/link.rs", "objdump(\"-T\")"),
    (
        "objdump -p target/release/libvalkey_rdma.so | grep -o 'GLIBC_",
        "scripts/package.sh",
        "GLIBC_",
    ),
    ("target/release/valkey-rdma ping", "tests/cells/src/cases/programs.rs", "[\"ping\","),
    ("target/release/valkey-rdma check", "tests/cells/src/cases/programs.rs", "[\"check\","),
    ("target/release/valkey-rdma exporter", "tests/cells/src/cases/monitored.rs", "[\"exporter\","),
    ("target/release/valkey-rdma bridge", "tests/cells/src/cases/bridged.rs", "[\"bridge\","),
    ("target/release/valkey-rdma top", "tests/cells/src/cases/monitored.rs", "[\"top\","),
    ("scripts/abi-check.sh", "scripts/test.sh", "scripts/abi-check.sh"),
    ("scripts/mutants.sh", "scripts/test.sh", "scripts/mutants.sh"),
    ("SIMULATION_SEEDS=100000 cargo test", "scripts/test.sh", "SIMULATION_SEEDS=100000 cargo test"),
    ("SIMULATION_SEED=17 cargo test", "scripts/test.sh", "SIMULATION_SEED=17 cargo test"),
    ("scripts/fuzz.sh", "scripts/test.sh", "scripts/fuzz.sh"),
    // The cells that a selector names are those of the matrix, which `full` runs.
    ("scripts/test.sh", ".ci/run", "scripts/test.sh"),
    ("SOAK_SEED=17 scripts/test.sh", "tests/matrix.toml", "\"soak\""),
    ("valkey-cli", "scripts/service.sh", ""),
    ("curl -s", "tests/cells/src/cases/monitored.rs", "GET {path}"),
    ("scripts/demo.sh", "scripts/test.sh", "scripts/demo.sh"),
    ("scripts/accept.sh both", "scripts/test.sh", "scripts/accept.sh\" both"),
];

/// Without addresses, ports, and what is done with the output.
fn stripped(command: &str) -> String {
    let command = command.split(" | grep").next().unwrap_or(command);
    let words: Vec<_> = command.split_whitespace().collect();
    let mut kept = Vec::new();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        match word {
            "-h" | "-p" => drop(words.next()),
            _ => kept.push(word),
        }
    }
    kept.join(" ")
}

#[test]
fn every_shown_command_is_run_or_needs_hardware() {
    let service = read("scripts/service.sh");
    let install = read("docs/install.md");
    let by_service: Vec<_> = service.lines().map(stripped).collect();
    let by_service = by_service.join("\n")
        + &blocks("docs/install.md", &install)
            .iter()
            .flat_map(|block| &block.commands)
            .map(|command| stripped(command) + "\n")
            .collect::<String>();
    let mut used = BTreeSet::new();
    let mut check = |place: &str, command: &str| {
        let found = RUN_BY.iter().find(|(start, ..)| command.starts_with(start));
        let Some((start, file, text)) = found else {
            panic!("{place}: no test is known to run: {command}");
        };
        used.insert(start);
        let runs = match *file {
            "scripts/service.sh" => by_service.contains(&stripped(command)),
            _ => read(file).contains(text),
        };
        assert!(runs, "{place}: {file} does not run: {command}");
    };
    for command in named(&table(&read("README.md"), "\n## Two commands")) {
        if command.starts_with("scripts/") {
            check("README.md, two commands", &command);
        }
    }
    for (page, text) in pages() {
        for block in blocks(&page, &text) {
            match block.kind.as_str() {
                // scripts/service.sh runs these, and checks that it left none out.
                "sh build" | "sh server" => {
                    assert_eq!(page, "docs/install.md", "{}: nobody runs this page", block.place);
                }
                "sh hardware" => {
                    let said = block.before.contains("hardware");
                    assert!(said, "{}: the text does not say that it needs hardware", block.place);
                }
                // The crate's own example, which is compiled there.
                "rust" => {
                    let example = read("crates/client/src/lib.rs");
                    for line in &block.commands {
                        assert!(
                            example.contains(&format!("//! {line}")),
                            "{}: {line}",
                            block.place
                        );
                    }
                }
                _ => block.commands.iter().for_each(|command| check(&block.place, command)),
            }
        }
    }
    let idle: Vec<_> =
        RUN_BY.iter().map(|(start, ..)| start).filter(|s| !used.contains(s)).collect();
    assert!(idle.is_empty(), "no page shows {idle:?} any more");
}

/// The cells and scripts that the documentation names are there.
#[test]
fn cells_and_scripts_that_are_named_exist() {
    let matrix = read("tests/matrix.toml");
    for (page, text) in pages() {
        for name in quoted(&text).flat_map(str::split_whitespace) {
            let name = name.trim_end_matches(['.', ',', ':', ')']);
            if ["scripts/", "tests/"].iter().any(|start| name.starts_with(start)) {
                let beside = root().join(&page).with_file_name(name);
                let exists = root().join(name).exists() || beside.exists();
                assert!(exists || name.contains(['*', '…']), "{page}: there is no {name}");
            }
        }
        let commands = text.split("scripts/test.sh ").skip(1);
        for selector in commands.filter_map(|rest| rest.split(['`', '\n', '#']).next()) {
            for case in selector
                .split_whitespace()
                .filter(|word| !["quick", "full", "CASE", "--server", "PATH"].contains(word))
            {
                let case = case.split('/').next().unwrap_or(case).trim_matches(['.', ',', ')']);
                let known = matrix.contains(&format!("\"{case}\""));
                assert!(known, "{page}: tests/matrix.toml has no case {case}");
            }
        }
    }
}

/// Words of the glossary's last column, each with the term that stands for it.
fn retired() -> Vec<(String, String)> {
    let rows = table(&read("docs/architecture.md"), "\n## Words");
    assert!(rows.iter().all(|row| row.len() == 3), "the glossary has three columns");
    rows.iter()
        .flat_map(|row| row[2].split(", ").map(|word| (word.trim().to_owned(), row[0].clone())))
        .filter(|(word, _)| !word.is_empty())
        .collect()
}

/// Whether `text` has `word` as a word of its own, in any case of letters.
fn has_word(text: &str, word: &str) -> bool {
    let text = text.to_ascii_lowercase();
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '-');
    text.match_indices(word).any(|(at, _)| {
        !part(text[..at].chars().next_back()) && !part(text[at + word.len()..].chars().next())
    })
}

#[test]
fn one_word_stands_for_one_thing() {
    let retired = retired();
    assert!(retired.len() > 5, "the glossary names what is not to be said");
    let mut texts = pages();
    texts.push(("packaging/valkey-rdma.7".to_owned(), read("packaging/valkey-rdma.7")));
    let fields = METRICS.fields().into_iter().map(|(name, _)| name.to_owned());
    texts.push(("INFO rdma".to_owned(), fields.collect::<Vec<_>>().join("\n")));
    texts.push(("arguments".to_owned(), arguments().into_iter().collect::<Vec<_>>().join("\n")));
    for (name, mut text) in texts {
        if name.ends_with("architecture.md") {
            let (before, after) = text.split_once("\n## Words").expect("the glossary");
            let (_, after) = after.split_once("\n## ").expect("a section behind it");
            text = format!("{before}{after}");
        }
        for (word, term) in &retired {
            assert!(!has_word(&text, word), "{name}: '{word}' is called '{term}' here");
        }
    }
}
