// SPDX-License-Identifier: BSD-3-Clause
//! rsockets are not implemented: each of these fails with EOPNOTSUPP. They are
//! here because programs of rdma-core name them all, used or not.

use crate::sys::set_errno;

macro_rules! unsupported {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() -> isize {
                set_errno(libc::EOPNOTSUPP);
                -1
            }
        )*
    };
}

unsupported! {
    rsocket rbind rlisten raccept rconnect rshutdown rclose
    rrecv rrecvfrom rrecvmsg rsend rsendto rsendmsg
    rread rreadv rwrite rwritev rpoll rselect
    rgetpeername rgetsockname rsetsockopt rgetsockopt rfcntl
    riomap riounmap riowrite
}
