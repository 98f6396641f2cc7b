// SPDX-License-Identifier: BSD-3-Clause
//! What a run is made of: the stock servers, the clients and the module, where they lie, and
//! what proves that they are the right ones.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::matrix::Fabric;

/// Stands for the line of a server that is not stock: the one that the clients were built
/// with, which alone loads upstream's own module.
pub const BUILT: &str = "built-9.1";

/// A server that was given: any executable.
#[derive(Clone, Debug)]
pub struct Given {
    /// What it says it is.
    pub release: String,
    /// How it was built, for people.
    pub build: String,
    executable: PathBuf,
}

impl Given {
    /// Asks the executable at `path`.
    ///
    /// # Errors
    /// If it is no valkey-server.
    pub fn new(path: &Path) -> Result<Self> {
        let executable = path.canonicalize().with_context(|| path.display().to_string())?;
        let said = |program: &Path, arguments: &[&str]| -> Result<String> {
            let output = Command::new(program).args(arguments).output();
            let output = output.with_context(|| program.display().to_string())?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let version = said(&executable, &["--version"])?;
        let word = |name: &str| {
            let mut words = version.split_whitespace();
            words.find_map(|word| word.strip_prefix(name)).map(str::to_owned)
        };
        let release = word("v=").with_context(|| format!("{} is no server", path.display()))?;
        // Of how it was built a binary keeps the compilers' names, where its code may lie, and
        // what it needs; a build with debugging information has the flags as well.
        let file = executable.to_string_lossy().into_owned();
        let elf = said(Path::new("readelf"), &["-W", "-h", "-d", "-p", ".comment", &file])?;
        let names = said(Path::new("readelf"), &["-W", "--dyn-syms", &file])?;
        let compilers = elf.lines().filter(|line| line.trim_start().starts_with('['));
        let compilers = compilers.filter_map(|line| line.split_once(']')).map(|(_, it)| it.trim());
        let debug =
            said(Path::new("readelf"), &["-W", "--debug-dump=info", "--dwarf-depth=1", &file])?;
        let producer = debug.lines().find_map(|line| line.split_once("DW_AT_producer"));
        let flags = producer.and_then(|(_, text)| Some(text.rsplit_once("): ")?.1.trim()));
        let has = |text: &str, word: &str| if text.contains(word) { "" } else { "no " };
        let build = format!(
            "malloc {}, {}TLS, {}PIE, {}immediate binding, built by {}, flags {}, SHA-256 {}",
            word("malloc=").unwrap_or_else(|| "?".to_owned()),
            has(&names, " SSL_CTX_new"),
            has(&elf, "DYN ("),
            has(&elf, "NOW"),
            compilers
                .collect::<std::collections::BTreeSet<_>>()
                .into_iter()
                .collect::<Vec<_>>()
                .join(" and "),
            flags.unwrap_or("not kept"),
            sha256(&executable)?
        );
        Ok(Self { release, build, executable })
    }
}

/// A stock server, as the set-up script describes it in `servers/manifest.toml`.
#[derive(Clone, Debug, Deserialize)]
pub struct Stock {
    /// What the executable says it is.
    pub version: String,
    /// The package that it comes in.
    #[serde(default)]
    pub package: String,
    /// That package's version.
    #[serde(default)]
    pub package_version: String,
    /// The hash of the executable.
    pub sha256: String,
}

/// Everything a cell may need that is the same for all cells of a run.
pub struct Lab {
    /// The repository.
    pub repo: PathBuf,
    /// The folder with `valkey-cli` and `valkey-benchmark`.
    pub clients: PathBuf,
    /// The folder with the server of [`BUILT`] and upstream's own module.
    pub built: PathBuf,
    /// What `scripts/setup.sh` keeps.
    pub cache: PathBuf,
    /// The module under test.
    pub module: PathBuf,
    /// Its hash.
    pub module_sha256: String,
    /// What carries the bytes.
    pub fabric: Fabric,
    /// An address of the RDMA device.
    pub address: IpAddr,
    /// A second one.
    pub second_address: Option<IpAddr>,
    /// An IPv6 address of the RDMA device.
    pub address_v6: Option<IpAddr>,
    /// Where cells put their folders.
    pub scratch: PathBuf,
    given: Option<Given>,
    stock: HashMap<String, Stock>,
}

impl Lab {
    /// Gathers the lab of the repository at `repo`; `address` replaces the fabric's usual one.
    pub fn new(
        repo: &Path,
        module: &Path,
        fabric: Fabric,
        address: Option<IpAddr>,
        given: Option<Given>,
    ) -> Result<Self> {
        let cache = std::env::var_os("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
            .context("neither XDG_CACHE_HOME nor HOME is set")?
            .join("valkey-rdma");
        let manifest = cache.join("servers/manifest.toml");
        let mut stock: HashMap<String, Stock> = match std::fs::read_to_string(&manifest) {
            Ok(text) => toml::from_str(&text).with_context(|| manifest.display().to_string())?,
            // Whoever asks for a stock server is told how to get one.
            Err(error) if error.kind() == ErrorKind::NotFound => HashMap::new(),
            Err(error) => return Err(error).with_context(|| manifest.display().to_string()),
        };
        if let Some(given) = &given {
            let entry = Stock {
                version: given.release.clone(),
                package: "given".to_owned(),
                package_version: given.build.clone(),
                sha256: sha256(&given.executable)?,
            };
            stock.insert(given.release.clone(), entry);
        }
        let module = module
            .canonicalize()
            .with_context(|| format!("{} (build it first)", module.display()))?;
        // The addresses of the guest are those that scripts/guest.sh gives its device.
        let (usual, second, v6) = match fabric {
            Fabric::Soft => (Some("127.0.0.1"), Some("127.0.0.2"), Some("::1")),
            Fabric::Vm | Fabric::VmNew => (Some("10.9.9.1"), Some("10.9.9.2"), Some("fd09::1")),
            Fabric::Hw => (None, None, None),
        };
        let parse = |text: Option<&str>| text.map(|text| text.parse().expect("an address"));
        Ok(Self {
            repo: repo.to_owned(),
            clients: cache.join("clients"),
            built: cache.join("cmodule/9.1"),
            cache,
            module_sha256: sha256(&module)?,
            module,
            fabric,
            address: address.or(parse(usual)).context("--fabric hw needs --address")?,
            second_address: parse(second),
            address_v6: parse(v6),
            scratch: std::env::temp_dir().join(format!("valkey-rdma-cells.{}", std::process::id())),
            given,
            stock,
        })
    }

    /// What a server is, for people: its release and where it comes from.
    pub fn describe(&self, server: &str) -> String {
        self.stock.get(server).map_or_else(
            || server.to_owned(),
            |it| format!("{}: {} {}", it.version, it.package, it.package_version),
        )
    }

    /// The server of a name.
    pub fn stock(&self, line: &str) -> Result<&Stock> {
        self.stock
            .get(line)
            .ok_or_else(|| anyhow!("no server of line {line}: run scripts/setup.sh servers"))
    }

    /// The command that becomes the server of a name, wherever that one runs, by way of
    /// `prefix`.
    pub fn server_command(&self, line: &str, prefix: &[String]) -> Result<Command> {
        let (program, arguments) = if line == BUILT {
            (self.built.join("valkey-server"), vec![])
        } else if let Some(given) = self.given.as_ref().filter(|given| given.release == line) {
            (given.executable.clone(), vec![])
        } else {
            self.stock(line)?;
            (self.repo.join("scripts/chroot.sh"), vec![line, "valkey-server"])
        };
        let mut command = match prefix {
            [] => Command::new(program),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
        };
        command.args(arguments);
        Ok(command)
    }

    /// The module built with another feature by scripts/test.sh, which keeps it in this folder:
    /// `with-handler-loop` or `with-panics`.
    pub fn variant(&self, folder: &str) -> Result<PathBuf> {
        let beside = self.module.parent().context("a module without a folder")?;
        let path = beside.join(folder).join("libvalkey_rdma.so");
        path.canonicalize().with_context(|| format!("{} (build it first)", path.display()))
    }

    /// A helper that is built along with this program.
    pub fn example(&self, name: &str) -> Result<PathBuf> {
        let path = std::env::current_exe()?
            .parent()
            .context("a program without a folder")?
            .join("examples")
            .join(name);
        anyhow::ensure!(
            path.exists(),
            "{} is missing: cargo build --release --workspace --examples",
            path.display()
        );
        Ok(path)
    }

    /// A program of the workspace that is built along with this one.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let path = std::env::current_exe()?.with_file_name(name);
        anyhow::ensure!(
            path.exists(),
            "{} is missing: cargo build --release --workspace --bins",
            path.display()
        );
        Ok(path)
    }

    /// How long one call of a client may take on this fabric, before it counts as hanging.
    pub fn patience(&self) -> Duration {
        match self.fabric {
            Fabric::Vm => Duration::from_secs(120),
            _ => Duration::from_secs(30),
        }
    }

    /// How long a whole cell may take unless the matrix gives it more.
    pub fn cell_limit(&self) -> Duration {
        match self.fabric {
            Fabric::Vm => Duration::from_secs(300),
            _ => Duration::from_secs(120),
        }
    }

    /// Whether this fabric is so slow that cells do less of the same.
    pub fn is_slow(&self) -> bool {
        self.fabric == Fabric::Vm
    }
}

/// IPv4's loopback: where the servers' TCP side listens.
pub const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The hash of a file.
pub fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hash.update(&buffer[..count]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
