//! A Patroni cluster: etcd, and nodes that each have a server.
//!
//! What runs works in directories of a [`Place`], which ends it with the test.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Client;
use crate::install;
use crate::place::Place;
use crate::process::is_running;
use crate::wait::{poll, wait_until};

/// How long a start, or the end of a process, may take.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A port of this machine that is free now.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port is free");
    listener.local_addr().expect("it has an address").port()
}

/// An etcd of one member; its data goes when this is dropped.
#[derive(Debug)]
pub struct Etcd {
    child: Child,
    port: u16,
    home: PathBuf,
}

impl Etcd {
    /// Starts one that knows nothing, in a new directory.
    ///
    /// # Panics
    /// When etcd is not installed, or does not start.
    pub fn start(place: &Place, name: &str) -> Self {
        let home = place.directory(name);
        let (port, peer) = (free_port(), free_port());
        let mut command = install::as_server_user(install::in_cache("etcd/usr/bin/etcd"));
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        for (option, value) in [
            ("--listen-client-urls", url(port)),
            ("--advertise-client-urls", url(port)),
            ("--listen-peer-urls", url(peer)),
            ("--initial-advertise-peer-urls", url(peer)),
            ("--initial-cluster", format!("default={}", url(peer))),
            ("--data-dir", home.join("data").display().to_string()),
        ] {
            command.args([option, &value]);
        }
        let child = spawn(&mut command, &home);
        let etcd = Self { child, port, home };
        wait_until(TIMEOUT, "etcd to answer", || get(port, "/health").is_some_and(|(status, _)| status == 200));
        etcd
    }

    /// Its address, as Patroni wants it.
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        end(&mut self.child);
        let _ = fs::remove_dir_all(&self.home);
    }
}

/// A Patroni and its server.
#[derive(Debug)]
pub struct Node {
    child: Child,
    home: PathBuf,
    api: u16,
    client: Client,
}

impl Node {
    /// The path below which a node of this name in `place` has its data directory.
    pub fn data_directory_in(place: &Place, name: &str) -> PathBuf {
        place.join(name).join("data")
    }

    /// Starts Patroni in a new directory, with what is to stand in its configuration, and this in its environment beside
    /// the node's name and addresses. `password` is the superuser's.
    ///
    /// # Panics
    /// When Patroni is not installed.
    pub fn start(
        place: &Place,
        name: &str,
        etcd: &Etcd,
        configuration: &str,
        environment: &[(&str, &str)],
        password: &str,
    ) -> Self {
        let home = place.directory(name);
        let file = home.join("patroni.yml");
        fs::write(&file, configuration).expect("the configuration can be written");
        let (api, port) = (free_port(), free_port());
        let mut command = install::as_server_user(install::in_cache("patroni/bin/python3"));
        command.args(["-m", "patroni"]).arg(&file).envs(environment.iter().copied());
        let address = |port: u16| format!("127.0.0.1:{port}");
        for (variable, value) in [
            ("NAME", name.to_owned()),
            ("ETCD3_HOSTS", etcd.host()),
            ("RESTAPI_LISTEN", address(api)),
            ("RESTAPI_CONNECT_ADDRESS", address(api)),
            ("POSTGRESQL_LISTEN", address(port)),
            ("POSTGRESQL_CONNECT_ADDRESS", address(port)),
            ("POSTGRESQL_PGPASS", home.join("pgpass").display().to_string()),
        ] {
            command.env(format!("PATRONI_{variable}"), value);
        }
        let child = spawn(&mut command, &home);
        let conninfo = format!("host=127.0.0.1 port={port} user=postgres password={password} dbname=postgres");
        Self { child, home, api, client: Client::new(conninfo) }
    }

    /// A client of its server.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Whether it has the leader's lock, and a server that can be written to.
    pub fn leads(&self) -> bool {
        get(self.api, "/primary").is_some_and(|(status, _)| status == 200)
    }

    /// Whether its server follows the leader's.
    pub fn follows(&self) -> bool {
        get(self.api, "/patroni").is_some_and(|(_, body)| body.contains("\"replication_state\": \"streaming\""))
    }

    /// Waits until it leads.
    ///
    /// # Panics
    /// When that takes too long; with its log.
    pub fn wait_to_lead(&self) {
        self.wait("lead", Self::leads);
    }

    /// Waits until it follows.
    ///
    /// # Panics
    /// When that takes too long; with its log.
    pub fn wait_to_follow(&self) {
        self.wait("follow", Self::follows);
    }

    fn wait(&self, what: &str, mut happened: impl FnMut(&Self) -> bool) {
        let came = poll(TIMEOUT, || happened(self).then_some(()));
        assert!(came.is_some(), "{} did not {what} within {TIMEOUT:?}: {}", self.home.display(), self.log());
    }

    /// What Patroni and its server logged.
    pub fn log(&self) -> String {
        let log = fs::read(self.home.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// Makes another node lead.
    ///
    /// # Panics
    /// When Patroni refuses.
    pub fn hand_over_to(&self, leader: &str, candidate: &str) {
        let body = format!("{{\"leader\": \"{leader}\", \"candidate\": \"{candidate}\"}}");
        let (status, told) = request(self.api, "POST", "/switchover", &body).unwrap_or_default();
        assert_eq!(status, 200, "the switchover failed: {told}");
    }

    /// Loses the machine: everything dies at once, and its disks are gone.
    pub fn destroy(self) {}
}

impl Drop for Node {
    fn drop(&mut self) {
        // Patroni first, or it starts its server again
        end(&mut self.child);
        let pid = fs::read_to_string(self.home.join("data/postmaster.pid")).unwrap_or_default();
        if let Some(pid) = pid.lines().next().and_then(|pid| pid.parse().ok()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            // its children leave when they see that
            let _ = poll(TIMEOUT, || (!is_running(pid) && !works_in(&self.home)).then_some(()));
        }
        let _ = fs::remove_dir_all(&self.home);
    }
}

/// Whether any process works below this directory.
fn works_in(directory: &Path) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut working = processes.filter_map(|process| fs::read_link(process.path().join("cwd")).ok());
    working.any(|cwd| cwd.starts_with(directory))
}

/// Starts a program that works in its home and logs there, in a process group of its own.
fn spawn(command: &mut Command, home: &Path) -> Child {
    let log = File::create(home.join("log")).expect("a log can be made");
    let same = log.try_clone().expect("a file can be opened twice");
    command.current_dir(home).stdin(Stdio::null()).stdout(log).stderr(same).process_group(0);
    command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"))
}

/// Kills a process group.
fn end(child: &mut Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = kill(Pid::from_raw(-pid), Signal::SIGKILL);
    }
    let _ = child.wait();
}

fn get(port: u16, path: &str) -> Option<(u16, String)> {
    request(port, "GET", path, "")
}

/// One request over HTTP: the status and the body, if there was an answer.
fn request(port: u16, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(TIMEOUT)).ok()?;
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.0\r\nContent-Length: {length}\r\n\r\n{body}").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}
