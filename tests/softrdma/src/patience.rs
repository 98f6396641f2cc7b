// SPDX-License-Identifier: BSD-3-Clause
//! How long the application on the other side may take.
//!
//! A completion queue's owner that was woken by its channel, or is known to be on
//! its way, spares both processes their progress threads. Should it be busy
//! elsewhere, its progress thread has to know after all. One timer for the whole
//! process looks after that, and only while there is something to look after.

use crate::engine::engine;
use crate::link::Link;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long the other side's application may take before its progress thread is
/// called for what it has not taken.
const GRACE: Duration = Duration::from_millis(2);

struct Watched {
    links: Vec<Arc<Link>>,
    ticking: bool,
}

static WATCHED: Mutex<Watched> = Mutex::new(Watched { links: Vec::new(), ticking: false });

/// Sees to it that what was just sent is taken in time.
pub fn watch(link: &Arc<Link>) {
    if !link.begin_watch() {
        return;
    }
    let mut watched = WATCHED.lock().unwrap();
    watched.links.push(link.clone());
    if !std::mem::replace(&mut watched.ticking, true) {
        engine().after(GRACE, tick);
    }
}

fn tick() {
    let links = std::mem::take(&mut WATCHED.lock().unwrap().links);
    let idle = links.is_empty();
    let kept: Vec<_> = links.into_iter().filter(|link| link.keep_watch()).collect();
    let mut watched = WATCHED.lock().unwrap();
    watched.links.extend(kept);
    watched.ticking = !(idle && watched.links.is_empty());
    if watched.ticking {
        engine().after(GRACE, tick);
    }
}
