//! The `pgcairn` program.

fn main() {}
