// SPDX-License-Identifier: BSD-3-Clause
//! What is entered under keys that work requests can carry, and under the ids of events.
//!
//! A key is a place and how often that was taken: completions of one that is gone don't
//! reach the one that has its place now.

use crate::endpoint::wr_id::{EndpointId, MAX_ENDPOINTS};
use std::collections::HashMap;
use std::hash::Hash;

/// Values under keys that work requests can carry, and under the ids of events.
#[derive(Debug)]
pub(super) struct Registry<I, T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    by_id: HashMap<I, EndpointId>,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u16,
    entry: Option<T>,
}

impl<I, T> Default for Registry<I, T> {
    fn default() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), by_id: HashMap::new() }
    }
}

impl<I: Eq + Hash, T: Clone> Registry<I, T> {
    /// A key for what is to be entered, or to be given back; none if all are taken.
    pub(super) fn reserve(&mut self) -> Option<EndpointId> {
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < MAX_ENDPOINTS => {
                self.slots.push(Slot { generation: 0, entry: None });
                self.slots.len() as u32 - 1
            }
            None => return None,
        };
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        Some(EndpointId { index, generation: slot.generation })
    }

    /// Nothing is entered under a reserved key, or not any more.
    pub(super) fn give_back(&mut self, key: EndpointId) {
        self.free.push(key.index);
    }

    /// Enters what a key was reserved for.
    pub(super) fn enter(&mut self, key: EndpointId, id: I, entry: T) {
        self.by_id.insert(id, key);
        self.slots[key.index as usize].entry = Some(entry);
    }

    /// Removes what was entered; `false` if it is gone already. Its key is to be given back
    /// when no completion can carry it any more.
    pub(super) fn remove(&mut self, key: EndpointId, id: &I) -> bool {
        let slot = &mut self.slots[key.index as usize];
        if slot.generation != key.generation || slot.entry.take().is_none() {
            return false;
        }
        self.by_id.remove(id);
        true
    }

    /// The value of a key, unless it was removed.
    pub(super) fn find(&self, key: EndpointId) -> Option<T> {
        let slot = self.slots.get(key.index as usize)?;
        if slot.generation == key.generation { slot.entry.clone() } else { None }
    }

    /// The value of an id.
    pub(super) fn find_by_id(&self, id: &I) -> Option<T> {
        self.find(*self.by_id.get(id)?)
    }

    /// All there is.
    pub(super) fn all(&self) -> impl Iterator<Item = &T> {
        self.slots.iter().filter_map(|slot| slot.entry.as_ref())
    }

    /// How much there is.
    pub(super) fn count(&self) -> usize {
        self.by_id.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_is_taken_again_has_another_key() {
        let mut registry = Registry::default();
        let first = registry.reserve().unwrap();
        registry.enter(first, "id", 1);
        assert_eq!(registry.find_by_id(&"id"), Some(1));
        assert!(registry.remove(first, &"id"));
        assert!(!registry.remove(first, &"id"));
        let other = registry.reserve().unwrap();
        assert_ne!(other.index, first.index, "not given back yet");
        registry.give_back(first);
        let second = registry.reserve().unwrap();
        assert_eq!((second.index, registry.find(second)), (first.index, None));
        registry.enter(second, "id", 2);
        assert_eq!((registry.find(first), registry.find(second)), (None, Some(2)));
        assert!(!registry.remove(first, &"id"));
        assert_eq!((registry.count(), registry.all().count()), (1, 1));
    }

    #[test]
    fn what_was_reserved_for_nothing_is_free_again() {
        let mut registry = Registry::<u8, u8>::default();
        let first = registry.reserve().unwrap();
        registry.give_back(first);
        assert_eq!(registry.reserve().unwrap().index, first.index);
        assert_eq!(registry.reserve().unwrap().index, first.index + 1);
        assert_eq!((registry.count(), registry.all().count()), (0, 0));
    }
}
