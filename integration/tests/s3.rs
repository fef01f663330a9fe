//! The same over S3: the main path, what it costs in requests, and a store that goes away.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgcairn_integration::process::run_ok;
use pgcairn_integration::stanza::{number, status};
use pgcairn_integration::{Client, Cluster, Data, Place, Stanza, StopMode, install, wait_until};
use pgcairn_s3_server::{ACCESS_KEY, S3Server, SECOND_ACCESS_KEY, SECRET_KEY, Trouble};

const LONG: Duration = Duration::from_secs(120);
/// Requests from nothing to the answer of one query, whatever the size of the backup.
const START_GETS_MAX: u64 = 24;

/// A server and a stanza in one of its buckets.
struct Setup {
    server: Option<S3Server>,
    stanza: Stanza,
    objects: Place,
}

impl Setup {
    fn new() -> Self {
        Self::within("180s")
    }

    /// Whose runs give up on a store that fails after that time.
    fn within(io_timeout: &str) -> Self {
        let objects = Place::new();
        let server = S3Server::start(objects.path(), Duration::ZERO).unwrap();
        server.make_bucket("backups").unwrap();
        let environment = [
            ("PGCAIRN_REPO_S3_ENDPOINT", server.endpoint.as_str()),
            ("PGCAIRN_REPO_S3_REGION", "us-east-1"),
            ("PGCAIRN_REPO_S3_KEY", ACCESS_KEY),
            ("PGCAIRN_REPO_S3_KEY_SECRET", SECRET_KEY),
            ("PGCAIRN_IO_TIMEOUT", io_timeout),
        ];
        let stanza = Stanza::at("s3://backups/some/prefix", &environment);
        Self { server: Some(server), stanza, objects }
    }

    fn server(&self) -> &S3Server {
        self.server.as_ref().unwrap()
    }

    /// Forgets the troubles set, and comes back if it was away.
    fn restart(&mut self) {
        let port = self.stop();
        self.start(port);
    }

    fn stop(&mut self) -> u16 {
        let server = self.server.take().unwrap();
        server.endpoint.rsplit(':').next().unwrap().parse().unwrap()
    }

    fn start(&mut self, port: u16) {
        let started = Instant::now();
        self.server = loop {
            match S3Server::start_on(self.objects.path(), Duration::ZERO, port) {
                Ok(server) => break Some(server),
                // the old one's threads let go of the port in their own time
                Err(error) if error.kind() == ErrorKind::AddrInUse && started.elapsed() < LONG => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => panic!("{error}"),
            }
        };
    }
}

#[test]
fn the_main_path() {
    let setup = Setup::new();
    let stanza = &setup.stanza;
    let cluster = stanza.archiving(Cluster::builder().checksums(true)).start();
    cluster.create_tablespace("elsewhere");
    Data::default().load(&cluster);
    cluster.psql("CREATE TABLE moved TABLESPACE elsewhere AS SELECT generate_series(1, 10000) AS i;");
    stanza.create(&cluster);
    let expected = cluster.fingerprint();
    let label = stanza.backup(&cluster);
    let info = stanza.run(["info"]).ok();
    assert!(info.contains(&label) && info.contains("WAL archive: 0000000100000000"), "{info}");
    let json = stanza.run(["info", "--output", "json"]).ok();
    assert!(!json.contains(SECRET_KEY) && !info.contains(SECRET_KEY));

    let mount = stanza.mount("mount", &[]);
    let backup = mount.path().join("backups").join(&label);
    run_ok(install::client("pg_verifybackup").arg(&backup), &[], LONG);
    let told = status(mount.path());
    assert!(!told.contains(SECRET_KEY) && told.contains("s3://backups/some/prefix"), "{told}");
    drop(mount);

    let cold = stanza.place().join("cold");
    let before = setup.server().requests();
    let clone = stanza.start("clone", &["--cache-path", cold.to_str().unwrap()]);
    assert_eq!(clone.psql("SELECT abalance FROM pgbench_accounts WHERE aid = 77777;"), "0");
    let all = setup.server().requests() - before;
    let gets = number(&status(&clone.data_directory()), "requests");
    assert!(gets > 0 && gets <= START_GETS_MAX, "{gets} GETs, {all} requests in all");
    // manifest, catalog and listings come on top: they do not grow with the data either
    assert!(all <= gets + 16, "{gets} GETs, {all} requests in all");
    assert_eq!(clone.fingerprint(), expected);
    clone.psql("UPDATE moved SET i = -i; CHECKPOINT;");
    clone.stop(&[]);

    let (copy, tablespaces) = (stanza.place().join("copy"), stanza.place().join("tablespaces"));
    let map = format!("--tablespace-map-all={}", tablespaces.display());
    stanza.run(["restore", "--type=none", &map, copy.to_str().unwrap()]).ok();
    assert_eq!(Cluster::open(15, &copy, &[]).fingerprint(), expected);
    stanza.assert_nothing_left();
}

/// At whatever request the store begins to refuse, or to cut connections: an error, and nothing that looks whole.
#[test]
fn a_store_that_goes_away_during_a_backup() {
    let mut setup = Setup::within("5s");
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    Data::tiny().random_mb(24).load(&cluster);
    setup.stanza.create(&cluster);
    let before = setup.server().requests();
    let label = setup.stanza.backup(&cluster);
    let whole = (setup.server().requests() - before) as usize;
    assert!(whole > 10, "{whole} requests");
    fs::remove_dir_all(setup.objects.join("backups/some/prefix")).unwrap();
    setup.stanza.create(&cluster);

    let denied = Trouble::Status(403, "AccessDenied");
    // the catalog is written after the manifest, which makes the backup; so the last ones are not asked for here
    let cases = [(denied, 0), (denied, 2), (denied, 4), (denied, 6), (denied, whole / 2), (Trouble::Cut, 5)];
    for (trouble, after) in cases {
        setup.server().trouble(Trouble::Pass, after);
        setup.server().trouble(trouble, 100_000);
        let output = setup.stanza.run(["backup", "--pg", cluster.conninfo()]).fails(1, "error:").fails(1, "hint:");
        assert!(!output.stderr.contains(SECRET_KEY), "{output:?}");
        setup.restart();
        let info = setup.stanza.run(["info"]).ok();
        assert!(info.contains("no backup yet"), "{trouble:?} after {after}: {info}");
        setup
            .stanza
            .run(["restore", "--type=none", setup.stanza.place().join("copy").to_str().unwrap()])
            .fails(1, "has no backup yet");
        setup.stanza.run(["start"]).fails(1, "has no backup yet");
    }
    // and a few that fail for a while are ridden out
    setup.server().trouble(Trouble::Status(503, "SlowDown"), 3);
    setup.server().trouble(Trouble::Cut, 2);
    setup.server().trouble(Trouble::StatusAfter(500, "InternalError"), 2);
    let again = setup.stanza.run(["backup", "--type=full", "--io-timeout=60s", "--pg", cluster.conninfo()]).ok();
    let again = again.strip_prefix("backup ").and_then(|rest| rest.split_once(':')).unwrap().0;
    assert!(again >= label.as_str());
    setup.stanza.assert_nothing_left();
}

/// The server is stopped while a backup copies its files, over a store that takes its time.
#[test]
fn a_backup_whose_server_stops_ends_at_once_and_what_it_stored_is_used() {
    let setup = Setup::new();
    let mut cluster = Cluster::builder().wal_segsize_mb(1).start();
    Data::tiny().random_mb(100).load(&cluster);
    setup.stanza.create(&cluster);
    let packs = || {
        let found = pgcairn_integration::files::contents(setup.objects.path());
        found.into_iter().filter(|(path, _)| path.to_string_lossy().contains("/chunk/")).collect::<Vec<_>>()
    };
    let stored = |packs: &[(_, Vec<u8>)]| packs.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
    let mut command = setup.stanza.command();
    // one pack is uploaded at a time
    command.args(["backup", "--process-max=1", "--buffer-size=1", "--pg", cluster.conninfo()]);
    setup.server().set_latency(Duration::from_millis(200));
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_until(LONG, "packs to be stored", || !packs().is_empty());
    setup.server().set_latency(Duration::from_secs(2));
    cluster.stop(StopMode::Immediate);
    let output = child.wait_with_output().unwrap();
    setup.server().set_latency(Duration::ZERO);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("the server was stopped or the connection was cut"), "{told}");
    let left = stored(&packs());
    assert!(left < 80 << 20, "{left} bytes were stored: it copied on");

    cluster.start();
    setup.stanza.backup(&cluster);
    let all = packs();
    let (first, whole) = (left, stored(&all));
    // what was stored once is there once
    assert!(whole - first < (110 << 20) - first * 9 / 10, "{first} bytes at first, {whole} in the end");
    setup.stanza.run(["verify"]).ok();
    setup.stanza.assert_nothing_left();
}

fn read(path: &Path) -> Result<Vec<u8>, Option<i32>> {
    fs::read(path).map_err(|error| error.raw_os_error())
}

#[test]
fn a_mount_outlives_its_store() {
    let mut setup = Setup::within("5s");
    let cluster = setup.stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    Data::tiny().random_mb(4).load(&cluster);
    setup.stanza.create(&cluster);
    let label = setup.stanza.backup(&cluster);
    let table = cluster.psql("SELECT pg_relation_filepath('random_bytes');");
    let expected = fs::read(cluster.data_directory().join(&table)).unwrap();
    let mount = setup.stanza.mount("mount", &["--backup", &label]);
    let path = mount.path().join(&table);

    // listing and looking need no store
    setup.server().trouble(Trouble::Status(403, "AccessDenied"), 100_000);
    assert_eq!(fs::metadata(&path).unwrap().len(), expected.len() as u64);
    assert_eq!(read(&path), Err(Some(nix::libc::EIO)));
    assert_eq!(read(&mount.path().join("absent")), Err(Some(nix::libc::ENOENT)));
    assert!(number(&status(mount.path()), "errors") > 0);
    setup.restart();
    assert!(read(&path).unwrap() == expected, "a failure is remembered as content");

    // what is in the cache is served while the store is away; what is not is an error, and for a time only
    let index = cluster.psql("SELECT pg_relation_filepath('random_bytes_id_idx');");
    let port = setup.stop();
    assert!(read(&path).unwrap() == expected, "what was read before needs no store");
    let wal =
        fs::read_dir(mount.path().join("pg_wal")).unwrap().flatten().find(|entry| entry.path().is_file()).unwrap();
    assert_eq!(read(&wal.path()), Err(Some(nix::libc::EIO)));
    setup.start(port);
    let index = (mount.path().join(&index), cluster.data_directory().join(&index));
    assert!(read(&index.0).unwrap() == fs::read(&index.1).unwrap());
    // a failure after a long wait is the answer for some seconds more
    wait_until(LONG, "what failed to be asked for again", || read(&wal.path()).is_ok());
    assert_eq!(read(&wal.path()).unwrap().len(), 1 << 20);
}

/// The store hangs: what waits for it is ended, and nothing that was written is lost.
#[test]
fn a_clone_stops_though_its_store_hangs() {
    const SOON: Duration = Duration::from_secs(15);
    const TABLES: u32 = 20;
    let setup = Setup::new();
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    Data::tiny().random_mb(20).load(&cluster);
    for n in 1..=TABLES {
        cluster.psql(&format!("CREATE TABLE t{n} AS SELECT * FROM random_bytes WHERE id % {TABLES} = {n} - 1;"));
    }
    setup.stanza.create(&cluster);
    setup.stanza.backup(&cluster);
    let cold = |name: &str| format!("--cache-path={}", setup.stanza.place().join(name).display());
    for keep in [true, false] {
        let clone = setup.stanza.start("clone", &[&cold(if keep { "first" } else { "second" })]);
        match keep {
            true => clone.psql("CREATE TABLE written AS SELECT generate_series(1, 1000) AS i;"),
            false => clone.psql("UPDATE written SET i = i;"),
        };
        setup.server().trouble(Trouble::Hang, 100_000);
        let before = setup.server().requests();
        std::thread::scope(|scope| {
            // more of them than the daemon has threads
            let (client, server): (&Client, _) = (&clone, setup.server());
            let readers: Vec<_> =
                (1..=TABLES).map(|n| scope.spawn(move || client.try_psql(&format!("TABLE t{n};")))).collect();
            wait_until(LONG, "a reader to ask the store", || server.requests() > before);
            std::thread::sleep(Duration::from_secs(1));
            let started = Instant::now();
            let kept = if keep { &["--keep"][..] } else { &[] };
            let told = setup.stanza.run([&["stop", "clone"][..], kept].concat()).ok();
            let took = started.elapsed();
            assert!(took < SOON, "{took:?}: {told}");
            assert!(readers.into_iter().any(|reader| reader.join().unwrap().is_err()));
        });
        setup.server().calm();
        if keep {
            let clone = setup.stanza.start("clone", &[]);
            assert_eq!(clone.psql("SELECT count(*), sum(i) FROM written;"), "1000|500500");
            clone.stop(&["--keep"]);
        }
    }
    setup.stanza.assert_nothing_left();
}

#[test]
fn an_unmount_does_not_wait_for_a_store_that_hangs() {
    const SOON: Duration = Duration::from_secs(15);
    const READERS: u32 = 20;
    let setup = Setup::new();
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    Data::tiny().random_mb(40).load(&cluster);
    setup.stanza.create(&cluster);
    let label = setup.stanza.backup(&cluster);
    let table = cluster.psql("SELECT pg_relation_filepath('random_bytes');");
    for by_signal in [false, true] {
        let cold = format!("--cache-path={}", setup.stanza.place().join(&format!("cold-{by_signal}")).display());
        let mount = setup.stanza.mount(&format!("mount-{by_signal}"), &["--backup", &label, &cold]);
        let path = mount.path().to_str().unwrap().to_owned();
        setup.server().trouble(Trouble::Hang, 100_000);
        let before = setup.server().requests();
        // more of them than the daemon has threads
        let file = format!("if={}", mount.path().join(&table).display());
        let read =
            |skip: &str| Command::new("dd").args([&file, "of=/dev/null", "bs=2M", "count=1", skip]).spawn().unwrap();
        let mut readers: Vec<_> = (0..READERS).map(|n| read(&format!("skip={n}"))).collect();
        wait_until(LONG, "the readers to ask the store", || setup.server().requests() > before);
        std::thread::sleep(Duration::from_secs(1));
        let started = Instant::now();
        readers.iter_mut().for_each(|reader| reader.kill().unwrap());
        let daemons = mount.serving();
        match by_signal {
            false => _ = setup.stanza.run(["umount", &path]).ok(),
            true => kill(Pid::from_raw(daemons[0]), Signal::SIGTERM).unwrap(),
        }
        wait_until(LONG, "the daemon to end", || mount.serving().is_empty());
        let took = started.elapsed();
        assert!(took < SOON, "{took:?}");
        readers.iter_mut().for_each(|reader| _ = reader.wait().unwrap());
        setup.server().calm();
    }
}

/// A file map that comes late, and then nothing: one read, one deadline.
#[test]
fn a_read_has_one_deadline() {
    let setup = Setup::within("6s");
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    Data::tiny().random_mb(8).load(&cluster);
    setup.stanza.create(&cluster);
    let label = setup.stanza.backup(&cluster);
    let table = cluster.psql("SELECT pg_relation_filepath('random_bytes');");
    let cold = format!("--cache-path={}", setup.stanza.place().join("cold").display());
    let mount = setup.stanza.mount("mount", &["--backup", &label, &cold]);
    let of = "GET /backups/some/prefix/chunk";
    setup.server().trouble_of(of, Trouble::Late(Duration::from_secs(4)), 1);
    setup.server().trouble_of(of, Trouble::Hang, 100_000);
    setup.server().take_log();
    let started = Instant::now();
    assert_eq!(read(&mount.path().join(&table)), Err(Some(nix::libc::EIO)));
    let took = started.elapsed();
    let asked: Vec<String> = setup.server().take_log().into_iter().filter(|line| line.contains(of)).collect();
    assert!(asked.len() > 1, "{asked:?}");
    assert!(took < Duration::from_secs(9), "{took:?}: {asked:?}");
}

/// PostgreSQL takes exit status 1 for the end of WAL, so a store that cannot be asked must say something else.
#[test]
fn archive_get_from_a_store_that_is_away() {
    let mut setup = Setup::within("5s");
    let cluster = setup.stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    setup.stanza.create(&cluster);
    setup.stanza.run(["check", "--pg", cluster.conninfo()]).ok();
    let target = setup.stanza.place().join("target");
    let get = |stanza: &Stanza| stanza.run(["archive-get", "0000000100000000000000FF", target.to_str().unwrap()]).code;
    assert_eq!(get(&setup.stanza), Some(1));
    setup.server().trouble(Trouble::Status(403, "AccessDenied"), 100_000);
    assert_eq!(get(&setup.stanza), Some(250));
    let port = setup.stop();
    assert_eq!(get(&setup.stanza), Some(250));
    setup.start(port);
    fs::remove_dir_all(setup.objects.join("backups")).unwrap();
    assert_eq!(get(&setup.stanza), Some(250), "a bucket that is gone has no end of WAL");
    assert!(!target.exists());
}

/// What comes between may spoil any answer once: nothing is lost, nobody is told of damage, and no WAL ends early.
#[test]
fn answers_that_are_spoilt_on_their_way() {
    let setup = Setup::new();
    let (stanza, server) = (&setup.stanza, setup.server());
    let cluster = stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    Data::tiny().random_mb(4).load(&cluster);
    stanza.create(&cluster);
    let label = stanza.backup(&cluster);
    let segment = cluster.psql("SELECT pg_walfile_name(pg_switch_wal());");
    stanza.run(["check", "--pg", cluster.conninfo()]).ok();

    // a listing that was cut is not the end of WAL
    let target = stanza.place().join("target");
    let cuts = [Trouble::CutListing(0), Trouble::Empty, Trouble::Page(200), Trouble::Page(404), Trouble::Short];
    for trouble in cuts {
        server.trouble_of("list-type=2", trouble, 2);
        stanza.run(["archive-get", &segment, target.to_str().unwrap()]).ok();
        fs::remove_file(&target).unwrap();
        server.calm();
    }
    // nor is a stanza without backups
    server.trouble_of("list-type=2", Trouble::CutListing(0), 2);
    assert!(stanza.run(["info"]).ok().contains(&label));
    server.calm();

    // of every kind of object one answer, and two different ones
    let spoilt = [Trouble::Flip, Trouble::Short, Trouble::Page(200), Trouble::Empty];
    for kind in ["archive.info", "backup.info", "backup.manifest", "/chunk/", "/0000000100000000/"] {
        let get = format!("GET /backups/some/prefix/{}", kind.strip_prefix('/').unwrap_or_default());
        let of = if kind == "/chunk/" { get } else { kind.to_owned() };
        for trouble in spoilt {
            server.trouble_of(&of, trouble, 1);
        }
        let told = stanza.run(["verify"]).ok();
        assert!(!told.contains("damage"), "{kind}: {told}");
        server.calm();
    }
    assert!(!setup.objects.join("backups/some/prefix/harm").exists(), "one bad answer was noted as harm");

    // a mount delivers what is right, from ranges too
    let table = cluster.psql("SELECT pg_relation_filepath('random_bytes');");
    let expected = fs::read(cluster.data_directory().join(&table)).unwrap();
    let cold = stanza.place().join("cold");
    let mount = stanza.mount("mount", &["--backup", &label, "--cache-path", cold.to_str().unwrap()]);
    for trouble in [Trouble::Flip, Trouble::WholeForRange, Trouble::Short, Trouble::Page(200)] {
        server.trouble_of("GET /backups/some/prefix/chunk", trouble, 1);
    }
    assert!(read(&mount.path().join(&table)).unwrap() == expected);
    assert_eq!(number(&status(mount.path()), "errors"), 0);
    drop(mount);
    server.calm();

    // the same wrong bytes each time are damage
    server.trouble_of("GET /backups/some/prefix/chunk", Trouble::Flip, 100_000);
    let told = stanza.run(["verify"]);
    assert!(told.code == Some(1) && told.stdout.contains("is broken; needed by"), "{told:?}");
    assert!(setup.objects.join("backups/some/prefix/harm").exists());
}

/// A store in trouble for some seconds is waited for by every verb.
#[test]
fn a_store_that_is_overloaded_for_a_while() {
    let setup = Setup::new();
    let (stanza, server) = (&setup.stanza, setup.server());
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    Data::tiny().load(&cluster);
    stanza.create(&cluster);
    let while_away = |trouble: Trouble, run: &dyn Fn()| {
        server.calm();
        server.trouble_for("", trouble, Duration::from_secs(3));
        run();
    };
    while_away(Trouble::Status(503, "SlowDown"), &|| _ = stanza.backup(&cluster));
    while_away(Trouble::Page(503), &|| _ = stanza.run(["info"]).ok());
    let copy = stanza.place().join("copy");
    while_away(Trouble::Cut, &|| _ = stanza.run(["restore", copy.to_str().unwrap()]).ok());
}

/// Credentials of a profile that are replaced reach a daemon that runs.
#[test]
fn rotated_credentials_reach_a_mount() {
    let setup = Setup::new();
    let cluster = setup.stanza.archiving(Cluster::builder().wal_segsize_mb(1)).start();
    Data::tiny().random_mb(4).load(&cluster);
    setup.stanza.create(&cluster);
    let label = setup.stanza.backup(&cluster);
    let profile = setup.stanza.place().join("credentials");
    let write = |key: &str| {
        let text = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = {SECRET_KEY}\n");
        fs::write(&profile, text).unwrap();
    };
    write(ACCESS_KEY);
    let environment = [
        ("PGCAIRN_REPO_S3_ENDPOINT", setup.server().endpoint.as_str()),
        ("PGCAIRN_REPO_S3_REGION", "us-east-1"),
        ("AWS_SHARED_CREDENTIALS_FILE", profile.to_str().unwrap()),
        ("AWS_CONFIG_FILE", "/dev/null"),
    ];
    let stanza = Stanza::at("s3://backups/some/prefix", &environment);
    let mount = stanza.mount("mount", &["--backup", &label]);
    let table = cluster.psql("SELECT pg_relation_filepath('random_bytes');");
    let expected = fs::read(cluster.data_directory().join(&table)).unwrap();
    setup.server().refuse_key(ACCESS_KEY);
    write(SECOND_ACCESS_KEY);
    assert!(read(&mount.path().join(&table)).unwrap() == expected);
    assert_eq!(number(&status(mount.path()), "errors"), 0);
}

#[test]
fn proxies_of_the_environment() {
    let setup = Setup::new();
    let proxy = setup.server().endpoint.as_str();
    let run = |more: &[(&str, &str)]| {
        let environment = [
            ("PGCAIRN_REPO_S3_ENDPOINT", "http://store.invalid"),
            ("PGCAIRN_REPO_S3_KEY", ACCESS_KEY),
            ("PGCAIRN_REPO_S3_KEY_SECRET", SECRET_KEY),
            ("PGCAIRN_IO_TIMEOUT", "1s"),
        ];
        Stanza::at("s3://backups/proxied", &[&environment, more].concat()).run(["info"])
    };
    // through it, the server is found; there is no stanza in it
    run(&[("HTTP_PROXY", proxy)]).fails(1, "does not exist in s3://backups/proxied");
    run(&[("http_proxy", proxy), ("NO_PROXY", "elsewhere.invalid")]).fails(1, "does not exist in");
    run(&[("HTTP_PROXY", proxy), ("NO_PROXY", "store.invalid")]).fails(1, "gave up after");
    run(&[]).fails(1, "gave up after");
    // none leads to this machine
    let here = ("PGCAIRN_REPO_S3_ENDPOINT", proxy);
    let nowhere = "http://127.0.0.1:1";
    run(&[here, ("HTTP_PROXY", nowhere)]).fails(1, "does not exist in s3://backups/proxied");
    run(&[here, ("ALL_PROXY", nowhere)]).fails(1, "does not exist in s3://backups/proxied");
}
