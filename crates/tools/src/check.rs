// SPDX-License-Identifier: BSD-3-Clause
//! `valkey-rdma check`: why RDMA does or does not work on this host, and to a server.

use crate::server::{Login, Server};
use anyhow::Result;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// Why RDMA does or does not work on this host, and to a server.
#[derive(clap::Args)]
pub struct Arguments {
    /// A server to reach as well, with the port of RDMA: 6379 unless given.
    #[arg(value_name = "HOST[:PORT]")]
    server: Option<String>,
    #[command(flatten)]
    login: Login,
    /// Tries out what each device does, by connecting it to itself: some seconds.
    #[arg(long)]
    examine: bool,
    /// Prints one JSON object instead of lines for people.
    #[arg(long)]
    json: bool,
}

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    /// It works, or may.
    Doubtful,
    /// It can't work like this.
    Bad,
}

impl Verdict {
    fn text(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Doubtful => "warn",
            Self::Bad => "FAIL",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug)]
struct Finding {
    what: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do about it.
    remedy: Option<String>,
}

fn good(what: &'static str, found: impl Into<String>) -> Finding {
    Finding { what, verdict: Verdict::Good, found: found.into(), remedy: None }
}

fn doubtful(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { what, verdict: Verdict::Doubtful, found: found.into(), remedy: Some(remedy.into()) }
}

fn bad(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { what, verdict: Verdict::Bad, found: found.into(), remedy: Some(remedy.into()) }
}

/// Looks and tells. `Ok(false)` if something can't work.
///
/// # Errors
/// None that a finding could not tell.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut findings = Vec::new();
    let libraries = verbs::library::load();
    findings.push(match &libraries {
        Ok(()) => good("libraries", "libibverbs and librdmacm are there"),
        Err(error) => bad("libraries", error.to_string(), "install them, or a newer rdma-core"),
    });
    let system = Path::new("/");
    // What opens it is the library, which may have another than the kernel's (a fabric for tests).
    let opened = libraries.is_ok() && verbs::cm::EventChannel::new().is_ok();
    findings.push(if opened {
        good("connection manager", "it can be opened")
    } else {
        connection_manager(system)
    });
    findings.extend(ports(system));
    findings.push(locked_memory());
    if libraries.is_ok() {
        if arguments.examine {
            findings.extend(examined());
        }
        if let Some(address) = &arguments.server {
            findings.extend(way_to(&Server { address, login: &arguments.login }));
        }
    }
    let works = findings.iter().all(|finding| finding.verdict != Verdict::Bad);
    if arguments.json {
        println!("{}", as_json(&findings));
    } else {
        print!("{}", as_lines(&findings));
    }
    Ok(works)
}

fn as_lines(findings: &[Finding]) -> String {
    let mut text = String::new();
    for Finding { what, verdict, found, remedy } in findings {
        let _ = writeln!(text, "{:<5}{what}: {found}", verdict.text());
        if let Some(remedy) = remedy {
            let _ = writeln!(text, "     -> {remedy}");
        }
    }
    text
}

fn as_json(findings: &[Finding]) -> Value {
    let works = findings.iter().all(|finding| finding.verdict != Verdict::Bad);
    let each: Vec<Value> = findings
        .iter()
        .map(|Finding { what, verdict, found, remedy }| {
            json!({"check": what, "result": verdict.text().to_lowercase(), "found": found, "remedy": remedy})
        })
        .collect();
    json!({"works": works, "findings": each})
}

/// The kernel's connection manager, of the system whose root is `root`.
fn connection_manager(root: &Path) -> Finding {
    const WHAT: &str = "connection manager";
    let device = root.join("dev/infiniband/rdma_cm");
    match fs::OpenOptions::new().read(true).write(true).open(&device) {
        Ok(_) => good(WHAT, format!("{} can be opened", device.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bad(
            WHAT,
            format!("there is no {}", device.display()),
            "modprobe rdma_ucm; in a container, pass the device in (--device /dev/infiniband/rdma_cm)",
        ),
        Err(error) => bad(
            WHAT,
            format!("{} can't be opened: {error}", device.display()),
            "give this user the rights to it, or the service DeviceAllow=/dev/infiniband/rdma_cm rw",
        ),
    }
}

/// The devices' ports, by the kernel's files.
fn ports(root: &Path) -> Vec<Finding> {
    const WHAT: &str = "device";
    let class = root.join("sys/class/infiniband");
    let list = |folder: &Path| -> Vec<PathBuf> {
        let mut all: Vec<_> = fs::read_dir(folder)
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        all.sort();
        all
    };
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let devices = list(&class);
    if devices.is_empty() {
        return vec![doubtful(
            WHAT,
            "the kernel shows no RDMA device",
            "load its driver; without hardware: modprobe rdma_rxe, then \
             rdma link add rxe0 type rxe netdev NETDEV",
        )];
    }
    let mut findings = Vec::new();
    for device in &devices {
        for port in list(&device.join("ports")) {
            let state = read(&port.join("state"));
            let gids: Vec<_> = list(&port.join("gids"))
                .iter()
                .map(|gid| (name(gid), read(gid)))
                .filter(|(_, gid)| gid.chars().any(|digit| !matches!(digit, '0' | ':')))
                .collect();
            let netdev = read(&port.join("gid_attrs/ndevs/0"));
            let kinds: Vec<_> = gids
                .iter()
                .map(|(index, _)| read(&port.join("gid_attrs/types").join(index)))
                .filter(|kind| !kind.is_empty())
                .collect();
            let text = format!(
                "{} port {}: {state}, {}, {} GIDs{}{}",
                name(device),
                name(&port),
                read(&port.join("link_layer")),
                gids.len(),
                if kinds.is_empty() { String::new() } else { format!(" ({})", unique(kinds)) },
                if netdev.is_empty() { String::new() } else { format!(", {netdev}") },
            );
            findings.push(if !state.ends_with("ACTIVE") {
                bad(WHAT, text, "bring its network device up (ip link set NETDEV up), or look at cable and switch")
            } else if gids.is_empty() {
                bad(WHAT, text, "give its network device an address (ip address add), in this network namespace")
            } else {
                good(WHAT, text)
            });
        }
    }
    findings
}

/// Each once, in their order.
fn unique(mut texts: Vec<String>) -> String {
    texts.sort();
    texts.dedup();
    texts.join(", ")
}

fn locked_memory() -> Finding {
    const WHAT: &str = "locked memory";
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a place for the limits.
    unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    // What a server registers for 100 busy clients with large values, in bytes.
    const BUSY: u64 = 100 * (3 << 20);
    match limit.rlim_cur {
        libc::RLIM_INFINITY => good(WHAT, "no limit"),
        limit if limit >= BUSY => good(WHAT, format!("{limit} bytes")),
        limit => doubtful(
            WHAT,
            format!("{limit} bytes for this shell; each busy connection takes up to 3 MiB"),
            "ulimit -l unlimited; for a service LimitMEMLOCK=infinity",
        ),
    }
}

/// What each device with an address does, by trying it out.
fn examined() -> Vec<Finding> {
    const WHAT: &str = "examination";
    let mut seen = Vec::new();
    let mut findings = Vec::new();
    for address in doctor::addresses::local() {
        let examination = doctor::examine(address);
        let Some(facts) = &examination.facts else { continue };
        if seen.contains(&facts.name) {
            continue;
        }
        seen.push(facts.name.clone());
        for (check, outcome) in &examination.checks {
            let text = format!("{} {check}: {outcome}", facts.name);
            findings.push(match outcome {
                doctor::Outcome::Passed(_) => good(WHAT, text),
                doctor::Outcome::Failed(_) => bad(WHAT, text, "docs/hardware.md says what follows"),
                doctor::Outcome::Inconclusive(_) => {
                    doubtful(WHAT, text, "try it with a server on another host")
                }
            });
        }
    }
    if seen.is_empty() {
        findings.push(doubtful(
            WHAT,
            "no address of this host belongs to an RDMA device",
            "give its network device an address",
        ));
    }
    findings
}

/// The way to a server: name, connection, and an answer that came over RDMA.
fn way_to(server: &Server<'_>) -> Vec<Finding> {
    const WHAT: &str = "server";
    let mut findings = Vec::new();
    let addresses: Vec<IpAddr> = match server.resolve() {
        Ok(addresses) => addresses.iter().map(std::net::SocketAddr::ip).collect(),
        Err(error) => {
            return vec![bad(WHAT, format!("{error:#}"), "name an address that resolves")];
        }
    };
    findings.push(good(WHAT, format!("'{}' is {addresses:?}", server.address)));
    if addresses.iter().all(IpAddr::is_loopback) {
        findings.push(doubtful(
            WHAT,
            "that is loopback, which no RDMA device serves",
            "name the address of the RDMA device's network device",
        ));
    }
    let mut session = match server.over_rdma() {
        Ok(session) => session,
        Err(error) => {
            let also = match server.over_tcp(None) {
                Ok(_) => {
                    "over TCP a server answers at the same port: it has RDMA at another one, or not at all (INFO rdma, `rdma_listening`)"
                }
                Err(_) => {
                    "nor does anything answer over TCP there: is it the right address, and does a firewall let UDP port 4791 (RoCE) through?"
                }
            };
            findings.push(bad(WHAT, format!("{error:#}"), also));
            return findings;
        }
    };
    findings.push(good(
        WHAT,
        format!(
            "connected by {} in {:.1} ms",
            session.carrier,
            session.connect.as_secs_f64() * 1e3
        ),
    ));
    match session.ask(&[b"PING"]) {
        Ok(answer) => {
            findings.push(good(WHAT, format!("PING: {}", String::from_utf8_lossy(&answer))))
        }
        Err(error) => {
            findings.push(doubtful(
                WHAT,
                format!("PING: {error:#}"),
                "give --user and VALKEY_PASSWORD",
            ));
            return findings;
        }
    }
    match session.ask(&[b"CLIENT", b"INFO"]) {
        Ok(line) => {
            let line = String::from_utf8_lossy(&line).into_owned();
            findings.push(good(WHAT, format!("the server sees: {}", line.trim())));
        }
        Err(error) => findings.push(doubtful(
            WHAT,
            format!("CLIENT INFO: {error:#}"),
            "allow this user CLIENT INFO",
        )),
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A system of files, gone with the value.
    struct System(PathBuf);

    impl System {
        fn new(name: &str, files: &[(&str, &str)]) -> Self {
            let root = std::env::temp_dir().join(format!("check-{name}-{}", std::process::id()));
            for (path, text) in files {
                let path = root.join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            Self(root)
        }
    }

    impl Drop for System {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const PORT: &str = "sys/class/infiniband/mlx5_0/ports/1";

    fn verdict(state: &str, gid: &str) -> (Verdict, String) {
        let files = [
            (format!("{PORT}/state"), state.to_owned()),
            (format!("{PORT}/link_layer"), "Ethernet\n".to_owned()),
            (format!("{PORT}/gids/0"), gid.to_owned()),
            (format!("{PORT}/gid_attrs/types/0"), "RoCE v2\n".to_owned()),
            (format!("{PORT}/gid_attrs/ndevs/0"), "eth1\n".to_owned()),
        ];
        let files: Vec<_> =
            files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect();
        let system = System::new(&format!("{}{}", state.len(), gid.len()), &files);
        let findings = ports(&system.0);
        assert_eq!(findings.len(), 1);
        (findings[0].verdict, findings[0].found.clone())
    }

    #[test]
    fn a_port_needs_a_link_and_an_address() {
        let gid = "0000:0000:0000:0000:0000:ffff:c000:020a\n";
        let none = "0000:0000:0000:0000:0000:0000:0000:0000";
        let (good, text) = verdict("4: ACTIVE\n", gid);
        assert_eq!(good, Verdict::Good);
        assert_eq!(text, "mlx5_0 port 1: 4: ACTIVE, Ethernet, 1 GIDs (RoCE v2), eth1");
        assert_eq!(verdict("1: DOWN\n", gid).0, Verdict::Bad);
        assert_eq!(verdict("4: ACTIVE\n", none).0, Verdict::Bad);
    }

    #[test]
    fn a_system_without_rdma_says_what_to_load() {
        let system = System::new("none", &[("dev/null", "")]);
        let finding = connection_manager(&system.0);
        assert_eq!(finding.verdict, Verdict::Bad);
        assert!(finding.remedy.unwrap().contains("modprobe rdma_ucm"));
        assert_eq!(ports(&system.0)[0].verdict, Verdict::Doubtful);
    }

    #[test]
    fn findings_are_lines_or_json() {
        let findings = [good("a", "b"), bad("c", "d", "e")];
        assert_eq!(as_lines(&findings), "ok   a: b\nFAIL c: d\n     -> e\n");
        let value = as_json(&findings);
        assert_eq!(value["works"], false);
        assert_eq!(value["findings"][1]["remedy"], "e");
    }
}
