// SPDX-License-Identifier: BSD-3-Clause
//! What is told of links: one line of the log for each change, and what `INFO rdma` says of the
//! link to the primary. A replica that can't have its link tries again each second, so what was
//! said is not said again.

use crate::host::MainCell;
use crate::host::reply::Reply;
use crate::log_limit::LogLimiter;
use crate::time;
use log::Level;
use proto::session::Millis;
use std::fmt;

/// What carries a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    /// RDMA.
    Rdma,
    /// TCP, though RDMA was asked for.
    Tcp,
    /// Nothing at this moment.
    Nothing,
}

impl Transport {
    fn text(self) -> &'static str {
        match self {
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
            Self::Nothing => "none",
        }
    }
}

/// What a link is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A replica follows its primary.
    Replication,
    /// Slots move to another node of the cluster.
    SlotMigration,
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Replication => "link to the primary",
            Self::SlotMigration => "link for moving slots to",
        })
    }
}

/// The state of the last link of a purpose.
#[derive(Clone, Debug)]
struct State {
    transport: Transport,
    to: String,
    /// Why it is not RDMA, or nothing.
    why: String,
    since: Millis,
}

/// Lines in a minute. What changes all the time is told no more often.
static LINES: MainCell<LogLimiter> = MainCell::new(LogLimiter::new(30));

static PRIMARY: MainCell<Option<State>> = MainCell::new(None);
static SLOTS: MainCell<Option<State>> = MainCell::new(None);

fn cell(purpose: Purpose) -> &'static MainCell<Option<State>> {
    match purpose {
        Purpose::Replication => &PRIMARY,
        Purpose::SlotMigration => &SLOTS,
    }
}

/// A link is carried by this now. Says so if it is a change.
pub(super) fn carried(purpose: Purpose, transport: Transport, to: &str, why: &str) {
    let mut state = cell(purpose).borrow_mut();
    let same =
        state.as_ref().is_some_and(|it| it.transport == transport && it.to == to && it.why == why);
    if same {
        return;
    }
    *state = Some(State { transport, to: to.to_owned(), why: why.to_owned(), since: time::now() });
    drop(state);
    let (level, line) = match transport {
        Transport::Rdma => (Level::Info, format!("the {purpose} {to} goes over RDMA")),
        Transport::Tcp => (Level::Warn, format!("the {purpose} {to} goes over TCP: {why}")),
        Transport::Nothing => {
            (Level::Warn, format!("no {purpose} {to}: replication=require, and {why}"))
        }
    };
    LINES.borrow_mut().log(time::now(), level, format_args!("{line}"));
}

/// A link over RDMA is over. The server says so itself.
pub(super) fn ended(purpose: Purpose) {
    if let Some(state) = &mut *cell(purpose).borrow_mut()
        && state.transport == Transport::Rdma
    {
        state.transport = Transport::Nothing;
        state.why = String::from("it has ended");
        state.since = time::now();
    }
}

/// What `INFO rdma` says of the link to the primary; nothing where there was none.
pub fn primary() -> Option<Reply> {
    let state = PRIMARY.borrow_mut().clone()?;
    let mut fields = vec![
        ("transport", state.transport.text().into()),
        ("to", state.to.into()),
        ("since-ms", time::now().saturating_sub(state.since).into()),
    ];
    if state.transport != Transport::Rdma {
        fields.push(("why", state.why.into()));
    }
    Some(Reply::Map(fields))
}

/// Links are encrypted, and so not over RDMA. Said once a minute at most.
pub(super) fn encrypted() {
    static LINES: MainCell<LogLimiter> = MainCell::new(LogLimiter::new(1));
    LINES.borrow_mut().log(
        time::now(),
        Level::Warn,
        format_args!(
            "tls-replication is on: links between servers go over TLS, and not over RDMA, which \
             encrypts nothing"
        ),
    );
}
