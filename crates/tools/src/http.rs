// SPDX-License-Identifier: BSD-3-Clause
//! As much of HTTP/1.1 as who scrapes needs: one GET or HEAD on each connection, with bounds on
//! its size, its time and the number of connections.

use anyhow::{Context, Result, ensure};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long a request may take to arrive, and each piece of its answer to leave.
const PATIENCE: Duration = Duration::from_secs(5);
/// The most bytes of a request.
const REQUEST: usize = 8 << 10;
/// Header fields of a request.
const FIELDS: usize = 64;
/// Connections at a time. Further ones are closed.
const CONNECTIONS: usize = 32;

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// The path, without what may stand behind a `?`.
    pub path: String,
    /// How long who asks will wait, as Prometheus says it.
    pub patience: Option<Duration>,
}

/// What is answered.
pub struct Answer {
    /// `200 OK` or another.
    pub status: &'static str,
    /// What kind of text it is.
    pub kind: &'static str,
    /// The text.
    pub body: String,
}

impl Answer {
    /// A plain text.
    pub fn plain(status: &'static str, body: &str) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", body: format!("{body}\n") }
    }
}

/// Answers all that come, each in a thread of its own. Never returns.
pub fn serve(
    listener: &TcpListener,
    answer: impl Fn(&Request) -> Answer + Send + Sync + 'static,
) -> ! {
    let answer = Arc::new(answer);
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // No descriptor left, as a rule: others have to end first.
            Err(_) => {
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (answer, open) = (Arc::clone(&answer), Arc::clone(&open));
        std::thread::spawn(move || {
            // Who asks knows best what went wrong on its side.
            let _ = converse(stream, &*answer);
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn converse(mut stream: TcpStream, answer: &dyn Fn(&Request) -> Answer) -> Result<()> {
    let bytes = receive(&mut stream)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let (answer, head_only) = match parse(&bytes) {
        Ok((request, head_only)) => (answer(&request), head_only),
        Err(refusal) => (refusal, false),
    };
    let head = format!(
        "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        answer.status,
        answer.kind,
        answer.body.len()
    );
    stream.write_all(head.as_bytes())?;
    if !head_only {
        stream.write_all(answer.body.as_bytes())?;
    }
    Ok(())
}

/// The head of a request, to its empty line.
fn receive(stream: &mut TcpStream) -> Result<Vec<u8>> {
    let until = Instant::now() + PATIENCE;
    let mut bytes = Vec::new();
    let mut piece = [0; 1024];
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") && bytes.len() < REQUEST {
        let left = until.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), io::Error::from(io::ErrorKind::TimedOut));
        stream.set_read_timeout(Some(left))?;
        let count = stream.read(&mut piece).context("a request")?;
        ensure!(count > 0, io::Error::from(io::ErrorKind::UnexpectedEof));
        bytes.extend_from_slice(&piece[..count]);
    }
    Ok(bytes)
}

/// The request, and whether its answer's head is all that is wanted; or what to answer instead.
fn parse(bytes: &[u8]) -> Result<(Request, bool), Answer> {
    let bad = |why: &str| Answer::plain("400 Bad Request", why);
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(bad("the request is too long")),
        Err(error) => return Err(bad(&error.to_string())),
    }
    let (Some(method), Some(path)) = (request.method, request.path) else {
        return Err(bad("no request"));
    };
    if !["GET", "HEAD"].contains(&method) {
        return Err(Answer::plain("405 Method Not Allowed", "GET and HEAD are answered"));
    }
    let patience = request
        .headers
        .iter()
        .find(|field| field.name.eq_ignore_ascii_case("X-Prometheus-Scrape-Timeout-Seconds"))
        .and_then(|field| std::str::from_utf8(field.value).ok()?.trim().parse().ok())
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let path = path.split('?').next().unwrap_or_default().to_owned();
    Ok((Request { path, patience }, method == "HEAD"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_taken_apart() {
        let text = b"GET /metrics?x=1 HTTP/1.1\r\nHost: h\r\n\
            x-prometheus-scrape-timeout-seconds: 2.5\r\n\r\n";
        let (request, head_only) = parse(text).ok().unwrap();
        let patience = Some(Duration::from_millis(2500));
        assert_eq!(request, Request { path: String::from("/metrics"), patience });
        assert!(!head_only);
        assert!(parse(b"HEAD / HTTP/1.0\r\n\r\n").ok().unwrap().1);
        let status = |text: &[u8]| parse(text).err().unwrap().status;
        assert_eq!(status(b"POST / HTTP/1.1\r\n\r\n"), "405 Method Not Allowed");
        assert_eq!(status(b"*1\r\n$4\r\nPING\r\n"), "400 Bad Request");
        assert_eq!(status(b"GET / HTTP/1.1\r\nA: b"), "400 Bad Request");
    }

    #[test]
    fn connections_are_bounded_and_slow_ones_end_no_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            serve(&listener, |request| Answer::plain("200 OK", &request.path));
        });
        let ask = || -> io::Result<String> {
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(b"GET /x HTTP/1.1\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        };
        let mut silent: Vec<_> =
            (1..CONNECTIONS).map(|_| TcpStream::connect(address).unwrap()).collect();
        let text = ask().unwrap();
        assert!(
            text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\n/x\n"),
            "{text}"
        );
        silent.push(TcpStream::connect(address).unwrap());
        // Accepted in their order, so the one after the last that there is room for is closed.
        let refused = ask();
        assert!(refused.as_ref().map_or(true, String::is_empty), "{refused:?}");
        drop(silent);
        let until = Instant::now() + PATIENCE;
        while !ask().is_ok_and(|text| text.contains("/x")) {
            assert!(Instant::now() < until, "no room again");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
