// SPDX-License-Identifier: BSD-3-Clause
//! Where programs connect: TCP ports and Unix sockets, our own and those that systemd opened.

use anyhow::{Context, Result, bail, ensure};
use listenfd::ListenFd;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Connections that wait to be accepted: as many as a server lets wait.
const BACKLOG: i32 = 511;

/// A place to listen at, as it is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A TCP port.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Place {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Some(path) = text.strip_prefix("unix:") {
            ensure!(!path.is_empty(), "'unix:' without a path");
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let address = text.parse().with_context(|| {
            format!("'{text}' is neither unix:PATH nor ADDRESS:PORT, such as 127.0.0.1:6380")
        })?;
        Ok(Self::Tcp(address))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A socket that listens; the file of one of ours goes with it.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    file: Option<PathBuf>,
    /// Where, for people.
    pub name: String,
}

impl Place {
    /// Listens there.
    ///
    /// # Errors
    /// Why not.
    pub fn listen(&self) -> Result<Listener> {
        let open = || -> Result<Listener> {
            let (socket, file) = match self {
                Self::Tcp(address) => {
                    let socket = Socket::new(
                        Domain::for_address(*address),
                        Type::STREAM,
                        Some(Protocol::TCP),
                    )?;
                    socket.set_reuse_address(true)?;
                    if address.is_ipv6() {
                        socket.set_only_v6(true)?;
                    }
                    socket.bind(&(*address).into())?;
                    (socket, None)
                }
                Self::Unix(path) => {
                    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
                    remove_stale(path)?;
                    socket.bind(&SockAddr::unix(path)?)?;
                    (socket, Some(path.clone()))
                }
            };
            socket.listen(BACKLOG)?;
            Listener::new(socket, file, self.to_string())
        };
        open().with_context(|| format!("cannot listen at {self}"))
    }
}

/// Removes a socket that nobody listens at any more.
fn remove_stale(path: &Path) -> Result<()> {
    if !std::fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket()) {
        // There is none, or binding will say what is the matter.
        return Ok(());
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Ok(()) => bail!("somebody listens there already"),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            Ok(std::fs::remove_file(path)?)
        }
        Err(error) => Err(error.into()),
    }
}

/// The sockets that systemd opened for this process.
///
/// # Errors
/// If one of them does not listen for streams.
pub fn handed_over() -> Result<Vec<Listener>> {
    let mut handed = ListenFd::from_env();
    let mut listeners = Vec::new();
    for index in 0..handed.len() {
        let tcp = handed.take_tcp_listener(index).ok().flatten().map(OwnedFd::from);
        let unix = || handed.take_unix_listener(index).ok().flatten().map(OwnedFd::from);
        let Some(fd) = tcp.or_else(unix) else {
            bail!("descriptor {index} of systemd's is neither a TCP nor a Unix socket that listens")
        };
        let socket = Socket::from(fd);
        let address = socket.local_addr()?;
        let name = match (address.as_socket(), address.as_pathname()) {
            (Some(address), _) => address.to_string(),
            (None, Some(path)) => format!("unix:{}", path.display()),
            (None, None) => String::from("a socket of systemd's"),
        };
        listeners.push(Listener::new(socket, None, name)?);
    }
    Ok(listeners)
}

impl Listener {
    fn new(socket: Socket, file: Option<PathBuf>, name: String) -> Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, file, name })
    }

    /// The socket, to be watched.
    pub fn socket(&self) -> &Socket {
        &self.socket
    }

    /// The next program that has connected.
    ///
    /// # Errors
    /// `WouldBlock` if there is none.
    pub fn accept(&self) -> io::Result<Socket> {
        let (socket, _) = self.socket.accept()?;
        socket.set_nonblocking(true)?;
        if socket.domain()? != Domain::UNIX {
            tune(&socket)?;
        }
        Ok(socket)
    }
}

/// Answers are small and awaited; and who has vanished is not waited for for ever.
///
/// # Errors
/// If the socket is none of TCP's.
pub fn tune(socket: &Socket) -> io::Result<()> {
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(std::time::Duration::from_secs(300))
        .with_interval(std::time::Duration::from_secs(100))
        .with_retries(3);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&keepalive)
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            let _ = std::fs::remove_file(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_place_is_an_address_or_a_path() {
        let place = |text: &str| Place::from_str(text);
        assert_eq!(place("127.0.0.1:7").unwrap(), Place::Tcp("127.0.0.1:7".parse().unwrap()));
        assert_eq!(place("[::1]:7").unwrap().to_string(), "[::1]:7");
        assert_eq!(place("unix:/run/a b").unwrap(), Place::Unix("/run/a b".into()));
        for text in ["", "unix:", "6379", "localhost", "127.0.0.1"] {
            assert!(place(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_socket_of_somebody_s_is_kept_and_one_of_nobody_s_replaced() {
        let path = std::env::temp_dir().join(format!("valkey-rdma-listen.{}", std::process::id()));
        let place = Place::Unix(path.clone());
        let mut first = place.listen().unwrap();
        let error = format!("{:#}", place.listen().unwrap_err());
        assert!(error.contains("somebody listens there"), "{error}");
        // As after a crash: the file is still there.
        first.file = None;
        drop(first);
        let second = place.listen().unwrap();
        let _program = UnixStream::connect(&path).unwrap();
        assert!(second.accept().is_ok());
        assert_eq!(second.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(second);
        assert!(!path.exists());
        // And what is no socket is nobody's to remove.
        std::fs::write(&path, "precious").unwrap();
        assert!(place.listen().is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(path).unwrap();
    }
}
