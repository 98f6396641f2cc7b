// SPDX-License-Identifier: BSD-3-Clause
//! What perftest calls of two vendors' direct interfaces, libmlx5 and libefa. Debian
//! links it with both libraries, whose real ones need a real libibverbs beside them. Here
//! each call answers what those libraries answer for another vendor's device.

use crate::sys::set_errno;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

macro_rules! no_object {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() -> *mut c_void {
                set_errno(libc::EOPNOTSUPP);
                null_mut()
            }
        )*
    };
}

macro_rules! no_operation {
    ($($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            extern "C" fn $name() -> c_int {
                libc::EOPNOTSUPP
            }
        )*
    };
}

no_object! {
    mlx5dv_open_device mlx5dv_create_qp mlx5dv_qp_ex_from_ibv_qp_ex mlx5dv_create_mkey
    mlx5dv_dek_create efadv_create_qp_ex
}

no_operation! {
    mlx5dv_destroy_mkey mlx5dv_dek_destroy mlx5dv_crypto_login mlx5dv_devx_general_cmd
    efadv_query_device
}
