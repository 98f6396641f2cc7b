// SPDX-License-Identifier: BSD-3-Clause
//! What a work request's id says: whose it is and which.
//!
//! A completion with an error carries little more than this id, and one of a
//! connection that is gone may still come: so the id names the endpoint by index
//! and generation, and the work request by kind and number.

/// Name of an endpoint, never used again within 65,536 uses of its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointId {
    /// Index in the table of endpoints, below 2^20.
    pub index: u32,
    /// Which of the endpoints that had this index.
    pub generation: u16,
}

/// One work request of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrKind {
    /// A receive, by slot.
    Receive(u16),
    /// A control message, by slot.
    Control(u16),
    /// An RDMA WRITE of payload, by sequence number modulo 2^24.
    Payload(u32),
    /// A zero-length RDMA WRITE, by the sequence number of the next payload.
    Probe(u32),
}

/// Most endpoints at a time.
pub const MAX_ENDPOINTS: usize = 1 << 20;

impl EndpointId {
    /// The id of `work` of this endpoint.
    pub fn wr_id(self, work: WrKind) -> u64 {
        let (kind, number) = match work {
            WrKind::Receive(slot) => (0, u32::from(slot)),
            WrKind::Control(slot) => (1, u32::from(slot)),
            WrKind::Payload(sequence) => (2, sequence & 0x00ff_ffff),
            WrKind::Probe(sequence) => (3, sequence & 0x00ff_ffff),
        };
        u64::from(self.index) << 44
            | u64::from(self.generation) << 28
            | kind << 24
            | u64::from(number)
    }

    /// The endpoint and the work of an id; `None` for one that we did not make.
    pub fn parse(work_request: u64) -> Option<(Self, WrKind)> {
        let key =
            Self { index: (work_request >> 44) as u32, generation: (work_request >> 28) as u16 };
        let number = work_request as u32 & 0x00ff_ffff;
        let work = match work_request >> 24 & 0xf {
            0 => WrKind::Receive(number as u16),
            1 => WrKind::Control(number as u16),
            2 => WrKind::Payload(number),
            3 => WrKind::Probe(number),
            _ => return None,
        };
        Some((key, work))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive_the_round_trip() {
        for index in [0, 1, MAX_ENDPOINTS as u32 - 1] {
            for generation in [0, 7, u16::MAX] {
                let key = EndpointId { index, generation };
                for work in [
                    WrKind::Receive(63),
                    WrKind::Control(7),
                    WrKind::Payload(0x00ff_ffff),
                    WrKind::Probe(0),
                ] {
                    assert_eq!(EndpointId::parse(key.wr_id(work)), Some((key, work)));
                }
            }
        }
        assert_eq!(EndpointId::parse(0xf << 24), None);
    }
}
