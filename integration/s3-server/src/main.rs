//! `pgcairn-s3-server --dir D [--latency-ms N] [--port P]` serves the subdirectories of D as buckets, prints its
//! endpoint and runs until killed.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use pgcairn_s3_server::S3Server;

const USAGE: &str = "usage: pgcairn-s3-server --dir D [--latency-ms N] [--port P]";

struct Arguments {
    directory: PathBuf,
    latency: Duration,
    port: u16,
}

fn parse() -> Option<Arguments> {
    let (mut directory, mut latency, mut port) = (None, Duration::ZERO, 0);
    let mut words = std::env::args().skip(1);
    while let Some(name) = words.next() {
        let value = words.next()?;
        match name.as_str() {
            "--dir" => directory = Some(PathBuf::from(value)),
            "--latency-ms" => latency = Duration::from_millis(value.parse().ok()?),
            "--port" => port = value.parse().ok()?,
            _ => return None,
        }
    }
    Some(Arguments { directory: directory?, latency, port })
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people and scripts")]
fn main() -> ExitCode {
    let Some(arguments) = parse() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match S3Server::start_on(&arguments.directory, arguments.latency, arguments.port) {
        Ok(server) => {
            println!("{}", server.endpoint);
            loop {
                std::thread::park();
            }
        }
        Err(e) => {
            eprintln!("cannot serve {}: {e}", arguments.directory.display());
            ExitCode::FAILURE
        }
    }
}
