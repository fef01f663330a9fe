//! The `pgcairn` program: parse, run, print errors.

use std::process::ExitCode;

use pgcairn::cli;

fn main() -> ExitCode {
    cli::main()
}
