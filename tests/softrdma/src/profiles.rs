// SPDX-License-Identifier: BSD-3-Clause
//! Profiles: what is known of devices that can't be had, each value with where it stands.
//!
//! Files without a project are rdma-core's, 65.0; those of the kernel say so. "Thread" is a
//! public issue that quotes the device. What is marked as a guess stands nowhere: the worst
//! case that the sources leave open, or a number without one.

/// A device, and the terms that make the fabric behave as it does.
pub struct Profile {
    pub name: &'static str,
    /// Each term and its source.
    pub habits: &'static [(&'static str, &'static str)],
}

/// The kernel's connection manager, with the delay that most devices name.
const TIMEOUT: (&str, &str) = (
    "ack-timeout=18",
    "read back on mlx5: thread NVIDIA/daqiri 138; kernel core/cma.c: 2^16 plus the ACK delay",
);

pub const PROFILES: &[Profile] = &[
    Profile {
        name: "mlx5",
        habits: &[
            ("vendor=0x2c9", "shown by ibv_devinfo in many threads"),
            (
                "inline-error=ENOMEM",
                "providers/mlx5/qp.c:348; it grants more than is asked for, verbs.c:1806",
            ),
            ("max-qp=262144", "threads ucx 8229, libfabric 8256"),
            ("max-cqe=4194303", "the same"),
            ("max-mr=16777216", "the same"),
            ("max-pd=8388608", "the same"),
            TIMEOUT,
        ],
    },
    Profile {
        name: "mlx4",
        habits: &[
            ("vendor=0x2c9", "shown by ibv_devinfo in many threads"),
            ("inline-error=ENOMEM", "providers/mlx4/qp.c:393"),
            ("max-qp=131000", "thread claudebarthels/infinity 5"),
            ("max-cqe=4194303", "the same"),
            ("max-mr=524032", "the same"),
            ("max-pd=32764", "the same"),
            ("ack-timeout=19", "kernel core/cma.c before 2^16: 2^18 plus the ACK delay"),
        ],
    },
    Profile {
        name: "irdma",
        habits: &[
            ("vendor=0x8086", "kernel irdma/verbs.c: of PCI"),
            ("inline=101:error", "providers/irdma/uverbs.c:1553, uk.c:840; kernel irdma/user.h"),
            ("rnr=ignored", "kernel irdma/verbs.c: irdma_modify_qp_roce takes no RNR timer"),
            ("flush=on-poll", "providers/irdma/uk.c:1523, up to the second generation"),
            ("max-pd=262144", "kernel irdma/user.h"),
            TIMEOUT,
        ],
    },
    Profile {
        name: "irdma-iwarp",
        habits: &[
            ("vendor=0x8086", "kernel irdma/verbs.c: of PCI"),
            ("transport=iwarp", "kernel irdma/verbs.c: node type RNIC"),
            ("inline=48:error", "X722: providers/irdma/i40iw_hw.h:10"),
            ("rnr=none", "RFC 5040, 7.1: an untagged message without a buffer ends the stream"),
            ("flush=on-poll", "providers/irdma/uk.c:1523, up to the second generation"),
            ("max-pd=262144", "kernel irdma/user.h"),
        ],
    },
    Profile {
        name: "erdma",
        habits: &[
            ("vendor=0x1ded", "kernel erdma_verbs.c"),
            ("transport=iwarp", "kernel erdma_main.c: node type RNIC"),
            ("errno=negative", "providers/erdma/erdma_verbs.c:415, 762, 803, 836"),
            ("dead=EIO", "providers/erdma/erdma_verbs.c:762, 836"),
            ("inline=96:error", "kernel erdma_hw.h: 16 * 6; erdma_verbs.c:677"),
            (
                "rnr=none",
                "a guess: its table of completion codes has none for RNR, erdma_verbs.c:888",
            ),
            ("max-qp=65536", "a guess; kernel erdma_main.c: a multiple of 1,024"),
            ("max-mr=131072", "kernel erdma_main.c: twice as many as queue pairs"),
            ("max-pd=131072", "kernel erdma_verbs.h"),
        ],
    },
    Profile {
        name: "bnxt",
        habits: &[
            ("vendor=0x14e4", "of PCI"),
            ("inline=96:error", "providers/bnxt_re/bnxt_re-abi.h:331"),
            ("inline-error=ENOMEM", "providers/bnxt_re/verbs.c:2376, 2547"),
            ("flush=on-poll", "providers/bnxt_re/verbs.c"),
            (
                "destroy-cost=8",
                "providers/bnxt_re/verbs.c:1101, twice the entries by 352; 4 ns for each is a guess",
            ),
            ("max-pd=65536", "kernel bnxt_re/qplib_sp.c"),
            TIMEOUT,
        ],
    },
    Profile {
        name: "hns-hip08",
        habits: &[
            ("vendor=0x19e5", "of PCI"),
            (
                "inline=32",
                "providers/hns/hns_roce_u_verbs.c:1250, 1276: a wish for more is granted and not kept; hns_roce_u_hw_v2.c:1061",
            ),
            ("rnr=refused", "kernel 5.8: commit 357f34294686, mended by 4327bd2c4141"),
            ("at-limit=ENOSPC", "kernel hns/hns_roce_alloc.c"),
            TIMEOUT,
        ],
    },
    Profile {
        name: "iwarp",
        habits: &[
            ("vendor=0x626d74", "kernel siw.h"),
            ("transport=iwarp", "kernel siw_main.c: node type RNIC"),
            ("imm=none", "providers/siw/siw.c:491, 536; cxgb4 with older firmware: qp.c:551"),
            ("errno=negative", "providers/siw/siw.c; providers/cxgb4/qp.c:492 to 735"),
            ("inline=80:error", "kernel-headers/rdma/siw-abi.h:90"),
            ("rnr=none", "RFC 5040, 7.1"),
        ],
    },
    Profile {
        name: "ionic",
        habits: &[
            ("vendor=0x1dd8", "of PCI"),
            ("arm=deferred", "providers/ionic/ionic_verbs.c:1395, 1624"),
            ("events=2", "providers/ionic/ionic_verbs.c:1636: two queues of the device behind one"),
            ("recv-busy=50", "providers/ionic/ionic_verbs.c:3211; how often is a guess"),
            ("flush=on-poll", "providers/ionic/ionic_verbs.c:868, 928"),
            TIMEOUT,
        ],
    },
    Profile {
        name: "mana",
        habits: &[
            ("vendor=0x1414", "kernel mana/main.c: of PCI"),
            ("inline=ignored", "providers/mana/wr.c: the flag is not looked at"),
            ("full=EINVAL", "providers/mana/wr.c:362"),
            ("dead=EINVAL", "providers/mana/wr.c"),
            (
                "modify-resets",
                "a guess of the worst: kernel mana/qp.c sends the state of a mask without it, 0",
            ),
            ("flush=on-poll", "providers/mana/cq.c"),
            TIMEOUT,
        ],
    },
    Profile {
        name: "qedr",
        habits: &[
            ("vendor=0x1077", "of PCI"),
            ("errno=negative", "providers/qedr/qelr_verbs.c:1503, 1511, 1962"),
            ("max-qp=8568", "thread ucx 5148"),
            ("max-cqe=8388480", "the same"),
            ("max-mr=131070", "the same"),
            ("max-pd=65536", "the same"),
            TIMEOUT,
        ],
    },
];

/// The profile of that name.
///
/// # Errors
/// If there is none, with the names of those there are.
pub fn find(name: &str) -> Result<&'static Profile, String> {
    PROFILES.iter().find(|profile| profile.name == name).ok_or_else(|| {
        let names: Vec<&str> = PROFILES.iter().map(|profile| profile.name).collect();
        format!("SOFTRDMA_DEVICE: there is no '{name}'; there are {}", names.join(", "))
    })
}
