// SPDX-License-Identifier: BSD-3-Clause
fn main() {}
