//! Every line of the README's quick start, on a server as Debian makes it: peer authentication, its configuration in /etc.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::unistd::Uid;
use pgcairn_integration::bin;
use pgcairn_integration::process::{Finished, run};

/// Directories that a mount namespace of its own makes empty: what is done to them nobody else sees.
const PRIVATE: [&str; 8] = [
    "/etc/postgresql",
    "/mnt",
    "/run",
    "/usr/local/bin",
    "/var/backups",
    "/var/cache/pgcairn",
    "/var/lib/postgresql",
    "/var/log",
];

/// The blocks of code of a section, each with its language.
fn blocks(readme: &str, section: &str) -> Vec<(String, String)> {
    let from = readme.find(section).unwrap_or_else(|| panic!("the README has no section {section}"));
    let text = &readme[from + section.len()..];
    let text = &text[..text.find("\n## ").unwrap_or(text.len())];
    let parts: Vec<&str> = text.split("```").collect();
    parts
        .chunks(2)
        .filter_map(|pair| pair.get(1))
        .map(|block| {
            let (language, code) = block.split_once('\n').unwrap();
            (language.to_owned(), code.to_owned())
        })
        .collect()
}

/// The commands of the quick start, with what a reader does between them.
fn script(readme: &str) -> String {
    let mut script = String::from("set -eux\n");
    for directory in PRIVATE {
        script.push_str(&format!("mkdir -p {directory}; mount -t tmpfs -o mode=755 tmpfs {directory}\n"));
    }
    script.push_str(
        "mount -t tmpfs -o mode=1777 tmpfs /tmp\n\
         mkdir -p /var/log/postgresql /run/postgresql\n\
         chown postgres:postgres /var/lib/postgresql /var/log/postgresql /run/postgresql\n\
         PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin HOME=/root; export PATH HOME\n\
         install \"/proc/self/fd/9\" /usr/local/bin/pgcairn\n\
         pg_createcluster 15 main -- -N\n\
         trap 'pgcairn umount /mnt/pg || true; for name in look before; do pgcairn stop $name || true; done; \
               pg_ctlcluster 15 main stop -m immediate || true' EXIT\n\
         pg_ctlcluster 15 main start\n",
    );
    for (language, code) in blocks(readme, "## Quick start") {
        match language.as_str() {
            "sh" if code.contains("AWS_ACCESS_KEY_ID") => {}
            "sh" => {
                for line in code.lines().filter(|line| !line.starts_with("cargo build")) {
                    script.push_str(line);
                    script.push('\n');
                }
            }
            // settings for postgresql.conf
            _ => {
                script.push_str(&format!("cat >> /etc/postgresql/15/main/postgresql.conf <<'CONF'\n{code}CONF\n"));
                script.push_str("pg_ctlcluster 15 main restart\n");
            }
        }
    }
    script
}

#[test]
fn every_line_of_the_quick_start_works_on_a_stock_debian_server() {
    if !Uid::effective().is_root() || !Path::new("/usr/bin/pg_createcluster").exists() {
        // elsewhere nobody may make such a namespace, or such a cluster
        return;
    }
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md")).unwrap();
    let commands = script(&readme);
    assert!(commands.contains("pgcairn backup\n") && commands.contains("pgcairn restore "), "{commands}");
    let mut bash = Command::new("unshare");
    bash.args(["--mount", "--propagation", "private", "bash", "-c"]);
    bash.arg(format!("exec 9<{}\n{commands}", bin::path().display())).env_clear();
    let Finished { status, stdout, stderr } = run(&mut bash, &[], Duration::from_secs(300));
    let told = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(status.success(), "{}\n{}", told(&stdout), told(&stderr));
    assert!(told(&stdout).contains("clone look of backup"), "{}", told(&stdout));
}
