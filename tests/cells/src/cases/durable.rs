// SPDX-License-Identifier: BSD-3-Clause
//! `appendfsync always`: a reply tells the client that its write is on the disk. The disk is
//! slow here (`tests/slow_disk`), so that a reply which comes before is seen to.
//!
//! Each round makes the server busy with a write of a client whose reply to an earlier
//! command is held back, and gives way to that one meanwhile: what is resumed then must not
//! take the reply to the write along, whose sync is still to come. And clients write as fast as
//! they are answered: 9.1 would have an I/O thread send a reply before its sync.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use client::pattern;
use client::raw::{Options, Raw};
use client::resp::{Client, Stream, encode};
use client::wire::Window;

use super::basics::expect;
use crate::cell::{Case, Cell};

pub const CASES: &[Case] = &[
    Case::new("appendfsync-always", always).unstarted(),
    Case::new("appendfsync-crowd", crowd).unstarted(),
    Case::new("appendfsync-unknown", unknown).unstarted(),
];

/// How long a sync takes at least.
const SYNC_MS: u64 = 60;
/// How long the server is busy before the write.
const BUSY: &[u8] = b"0.04";
const ROUNDS: usize = 10;
const ROUNDS_TCP: usize = 4;
/// Other clients at the time, without a pause.
const OTHERS: usize = 8;
/// A reply that is held back by a window of less, or by a socket.
const LENGTH: usize = 100_000;
const HELD_BACK: u32 = 60_000;
const LENGTH_TCP: usize = 8 << 20;

/// How long a sync takes at least for the crowd, its clients, and how often each writes.
const CROWD_SYNC_MS: u64 = 2;
const CROWD: usize = 16;
const CROWD_ROUNDS: usize = 100;

/// The library that makes the disk slow, which is built along with this program.
fn slow_disk() -> Result<PathBuf> {
    let folder = std::env::current_exe()?;
    let path = folder.parent().context("a program without a folder")?.join("libslow_disk.so");
    ensure!(path.exists(), "{} is missing: cargo build -p slow_disk", path.display());
    Ok(path)
}

/// What is on the disk.
struct Disk {
    notes: File,
    folder: PathBuf,
}

impl Disk {
    fn note(&self, index: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.notes.read_exact_at(&mut bytes, 8 * index)?;
        Ok(u64::from_ne_bytes(bytes))
    }

    /// Whether the write of `key` is safe. To be asked as soon as its reply is there.
    fn has(&self, key: &str) -> Result<bool> {
        let safe = self.note(0)?;
        for entry in std::fs::read_dir(self.folder.join("appendonlydir"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|it| it == "aof") {
                let bytes = std::fs::read(&path)?;
                let at = bytes.windows(key.len()).position(|there| there == key.as_bytes());
                return Ok(at.is_some_and(|at| ((at + key.len()) as u64) < safe));
            }
        }
        Ok(false)
    }
}

/// Starts the server, whose disk is slow.
fn start_slow(cell: &mut Cell, sync_ms: u64) -> Result<Disk> {
    let notes_path = cell.folder().join("synced");
    std::fs::write(&notes_path, [0; 16])?;
    for (name, value) in [
        ("LD_PRELOAD", slow_disk()?.display().to_string()),
        ("SLOW_DISK_NOTES", notes_path.display().to_string()),
        ("SLOW_DISK_MS", sync_ms.to_string()),
    ] {
        cell.settings.environment.push((name.to_owned(), value));
    }
    cell.settings.directive("appendonly yes");
    cell.settings.directive("appendfsync always");
    cell.start()?;
    Ok(Disk { notes: File::open(notes_path)?, folder: cell.server().folder().to_owned() })
}

/// Clients that write again as soon as they are answered: the server learns that an I/O thread
/// has sent a reply together with what that thread has read after it.
fn crowd(cell: &mut Cell) -> Result<()> {
    let disk = start_slow(cell, CROWD_SYNC_MS)?;
    let over_rdma = |name: &str| {
        let clients = (0..CROWD).map(|_| cell.rdma()).collect::<Result<_>>()?;
        let early = writes_answered_early(&disk, name, clients)?;
        Ok::<_, anyhow::Error>((early, cell.info()?.number("rdma_writes_before_sync")?))
    };
    let (mut early, held) = over_rdma("rdma")?;
    // The policy is followed while the server runs: nothing is held back for no sync.
    let mut operator = cell.tcp()?;
    expect(&mut operator, "CONFIG SET appendfsync no", "OK")?;
    let (_, held_unsynced) = over_rdma("unsynced")?;
    ensure!(held_unsynced == held, "{held_unsynced} writes, not {held}, waited for no sync");
    expect(&mut operator, "CONFIG SET appendfsync always", "OK")?;
    early += over_rdma("again")?.0;
    let clients: Vec<_> = (0..CROWD).map(|_| cell.tcp()).collect::<Result<_>>()?;
    let early_tcp = writes_answered_early(&disk, "tcp", clients)?;
    let writes = CROWD * CROWD_ROUNDS;
    ensure!(
        early == 0 && (early_tcp == 0 || is_early_itself(cell)),
        "{early} of {} writes over RDMA and {early_tcp} of {writes} over TCP were answered \
         before they were synced",
        2 * writes
    );
    cell.figure("writes held back until the sync", held);
    cell.figure("answered too early over TCP, by the server itself", early_tcp);
    cell.moved(0, 3 * writes);
    Ok(())
}

/// How many writes of a crowd were answered before they were synced.
fn writes_answered_early<S: Stream + Send>(
    disk: &Disk,
    name: &str,
    clients: Vec<Client<S>>,
) -> Result<usize> {
    std::thread::scope(|scope| {
        let threads = clients.into_iter().enumerate().map(|(number, mut client)| {
            scope.spawn(move || -> Result<usize> {
                let mut early = 0;
                for round in 0..CROWD_ROUNDS {
                    let key = format!("{name}-{number}-{round}-");
                    expect(&mut client, &format!("SET {key} x"), "OK")?;
                    early += usize::from(!disk.has(&key)?);
                }
                Ok(early)
            })
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|it| it.join().expect("it does not panic")).sum()
    })
}

/// Whether the stock server answers writes over TCP before they are synced: 9.1 does with I/O
/// threads. It sends a reply on where it learns that the one before is sent
/// (`processClientIOWriteDone` of `networking.c`), and it may have carried the command out in
/// the same pass over its threads' results (`processIOThreadsResponses` of `io_threads.c`).
fn is_early_itself(cell: &Cell) -> bool {
    cell.has_io_threads() && cell.id.line() == "9.1"
}

/// A server without `CONFIG` does not tell its policy: nothing is held back, and the log says
/// what that may mean.
fn unknown(cell: &mut Cell) -> Result<()> {
    cell.settings.directive("rename-command CONFIG \"\"");
    let disk = start_slow(cell, CROWD_SYNC_MS)?;
    let clients = (0..CROWD).map(|_| cell.rdma()).collect::<Result<_>>()?;
    writes_answered_early(&disk, "unknown", clients)?;
    let held = cell.info()?.number("rdma_writes_before_sync")?;
    ensure!(held == 0, "{held} writes waited for a sync that nobody knows of");
    let told = cell.server().log_lines("does not tell its appendfsync")?.len();
    ensure!(told == 1, "the log says {told} times that the policy is not known");
    cell.moved(0, CROWD * CROWD_ROUNDS);
    Ok(())
}

/// Both kinds of clients at once, and others.
fn always(cell: &mut Cell) -> Result<()> {
    let disk = start_slow(cell, SYNC_MS)?;
    let mut tcp = cell.tcp()?;
    for (key, length) in [(&b"held"[..], LENGTH), (b"long", LENGTH_TCP)] {
        tcp.command(&[b"SET", key, &pattern::value(3, length)])?;
    }
    let syncs = disk.note(1)?;
    ensure!(syncs > 0, "the disk is not slow: no sync was noted");

    let stop = AtomicBool::new(false);
    let (early, early_tcp) = std::thread::scope(|scope| -> Result<_> {
        let others: Vec<_> = (0..OTHERS).map(|_| cell.rdma()).collect::<Result<_>>()?;
        let stop = &stop;
        let others: Vec<_> = others
            .into_iter()
            .map(|mut client| {
                scope.spawn(move || -> Result<()> {
                    while !stop.load(Ordering::Relaxed) {
                        expect(&mut client, "PING", "PONG")?;
                    }
                    Ok(())
                })
            })
            .collect();
        let early = over_rdma(cell, &disk).and_then(|early| Ok((early, over_tcp(cell, &disk)?)));
        stop.store(true, Ordering::Relaxed);
        for other in others {
            other.join().expect("it does not panic")?;
        }
        early
    })?;
    let syncs = disk.note(1)? - syncs;
    ensure!(syncs >= (ROUNDS + ROUNDS_TCP) as u64, "{syncs} syncs are fewer than the writes");
    ensure!(
        early == 0 && (early_tcp == 0 || is_early_itself(cell)),
        "{early} of {ROUNDS} writes over RDMA and {early_tcp} of {ROUNDS_TCP} over TCP were \
         answered before they were synced"
    );
    cell.figure("syncs", syncs);
    cell.figure("answered too early over TCP, by the server itself", early_tcp);
    cell.moved(0, ROUNDS * LENGTH);
    Ok(())
}

/// What makes the server busy, and then the write.
fn busy_and_write(key: &str) -> Vec<u8> {
    let mut request = Vec::new();
    encode(&mut request, &[b"DEBUG", b"SLEEP", BUSY]);
    encode(&mut request, &[b"SET", key.as_bytes(), b"x"]);
    request
}

/// How long to wait until the server is busy with it, and for how long it is still.
fn while_busy() {
    std::thread::sleep(Duration::from_millis(15));
}

/// How many writes were answered too early.
fn over_rdma(cell: &Cell, disk: &Disk) -> Result<usize> {
    let soon = || Instant::now() + cell.lab.patience();
    let mut raw = Raw::open(cell.server().rdma_address(), &Options::default(), soon())?;
    let window = |raw: &Raw, length| Window { length, ..raw.window() }.announcement();
    raw.send(&window(&raw, HELD_BACK))?;
    let inbox = raw.peer_window(soon())?;
    let (mut used, mut announced, mut early) = (0, 0, 0);
    let mut say = |raw: &mut Raw, bytes: &[u8]| -> Result<()> {
        raw.write(inbox.address + used, inbox.rkey, bytes, Some(bytes.len() as u32))?;
        used += bytes.len() as u64;
        Ok(())
    };
    // What is left of the long reply, and the two short ones behind it.
    let long = format!("${LENGTH}\r\n").len() + LENGTH + 2;
    let rest = long as u32 - HELD_BACK + 2 * b"+OK\r\n".len() as u32;
    for round in 0..ROUNDS {
        if round > 0 {
            raw.send(&window(&raw, HELD_BACK))?;
        }
        say(&mut raw, b"GET held\r\n")?;
        announced += u64::from(HELD_BACK);
        raw.wait_announced(announced, soon())?;
        let key = format!("rdma-{round}-");
        say(&mut raw, &busy_and_write(&key))?;
        while_busy();
        raw.send(&window(&raw, rest))?;
        announced += u64::from(rest);
        raw.wait_announced(announced, soon())?;
        early += usize::from(!disk.has(&key)?);
        let end = raw.memory(rest as usize - 10, 10);
        ensure!(end == b"+OK\r\n+OK\r\n", "other replies: {}", String::from_utf8_lossy(&end));
    }
    Ok(early)
}

/// The same over TCP, by the stock server's own means.
fn over_tcp(cell: &Cell, disk: &Disk) -> Result<usize> {
    let settings = cell.server().settings();
    let mut stream = TcpStream::connect((crate::lab::LOOPBACK, settings.port))?;
    stream.set_read_timeout(Some(cell.lab.patience()))?;
    // So that the socket's buffers, which grow, do not hold all of the reply.
    let small: libc::c_int = 64 << 10;
    // SAFETY: a live socket and a number of that length.
    let set = unsafe {
        let (level, name) = (libc::SOL_SOCKET, libc::SO_RCVBUF);
        let length = size_of_val(&small) as libc::socklen_t;
        libc::setsockopt(stream.as_raw_fd(), level, name, (&raw const small).cast(), length)
    };
    ensure!(set == 0, "SO_RCVBUF: {}", std::io::Error::last_os_error());
    let mut early = 0;
    let mut replies = vec![0; format!("${LENGTH_TCP}\r\n").len() + LENGTH_TCP + 2 + 10];
    for round in 0..ROUNDS_TCP {
        stream.write_all(b"GET long\r\n")?;
        // Time to fill the socket's buffers.
        while_busy();
        let key = format!("tcp-{round}-");
        stream.write_all(&busy_and_write(&key))?;
        while_busy();
        stream.read_exact(&mut replies)?;
        early += usize::from(!disk.has(&key)?);
        ensure!(replies.ends_with(b"+OK\r\n+OK\r\n"), "other replies");
    }
    Ok(early)
}
