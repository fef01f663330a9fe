//! What people get wrong, and what breaks under them: an error that names it, a hint, and nothing left half-done.
#![allow(clippy::unwrap_used)]

mod library;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

use library::objects;
use pgcairn_integration::mounts::is_mounted;
use pgcairn_integration::{Cluster, Data, MountGuard, Output, Stanza, StopMode, install};

/// A stanza with one backup, which no test changes; the watchdogs remove it when the process ends.
struct Source {
    cluster: Cluster,
    stanza: Stanza,
    label: String,
}

static SOURCE: LazyLock<Source> = LazyLock::new(|| {
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    cluster.create_tablespace("elsewhere");
    cluster.psql("CREATE TABLE moved TABLESPACE elsewhere AS SELECT generate_series(1, 1000) AS i;");
    stanza.create(&cluster);
    let label = backup(&stanza, &cluster);
    Source { cluster, stanza, label }
});

/// One after the other: a server is backed up once at a time.
fn backup(stanza: &Stanza, cluster: &Cluster) -> String {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    stanza.backup(cluster)
}

/// An error line that has all `parts`, and a hint line.
#[track_caller]
fn refused(output: Output, parts: &[&str]) {
    let output = output.fails(1, "error: ");
    let error = output.stderr.split_once("\nhint: ").map(|(error, _)| error);
    let error = error.unwrap_or_else(|| panic!("no hint: {output:?}"));
    for part in parts {
        assert!(error.contains(part), "\"{part}\" is not in the error: {output:?}");
    }
}

/// Wrong usage, as the parser of the command line tells it.
#[track_caller]
fn misused(output: Output, part: &str) {
    output.fails(2, "error: ").fails(2, part);
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn names_that_are_not_there() {
    let Source { stanza, cluster, label, .. } = &*SOURCE;
    let before = objects(Path::new(stanza.repo()));
    let copy = stanza.place().join("copy");
    let mountpoint = stanza.place().directory("mountpoint");
    for verb in [
        vec!["backup", "--pg", cluster.conninfo()],
        vec!["check", "--pg", cluster.conninfo()],
        vec!["info"],
        vec!["mount", text(&mountpoint)],
        vec!["mount", "--backup", label, text(&mountpoint)],
        vec!["start"],
        vec!["start", label],
        vec!["restore", text(&copy)],
        vec!["restore", "--set", label, text(&copy)],
    ] {
        let run = |option: &str, value: &str| stanza.run([&verb[..], &[option, value]].concat());
        refused(run("--stanza", "other"), &["other", "does not exist"]);
        refused(run("--stanza", "../x"), &["\"../x\" cannot name a stanza"]);
        refused(run("--repo", "/nowhere/at/all"), &["/nowhere/at/all"]);
        refused(run("--repo", "gs://bucket"), &["gs"]);
        assert!(!is_mounted(&mountpoint) && !copy.exists());
    }
    let absent = "20200101-000000F";
    for verb in [
        vec!["mount", "--backup", absent, text(&mountpoint)],
        vec!["start", absent],
        vec!["restore", "--set", absent, text(&copy)],
        vec!["info", "--set", absent],
    ] {
        refused(stanza.run(&verb), &["stanza main has no backup 20200101-000000F"]);
        assert!(!is_mounted(&mountpoint) && !copy.exists());
    }
    refused(stanza.run(["start", "../../etc"]), &["../../etc"]);
    let bare = pgcairn_integration::bin::pgcairn(["info"]);
    refused(bare, &["no --repo is given"]);
    refused(pgcairn_integration::pgcairn(["--repo", stanza.repo(), "backup"]), &["no --stanza is given"]);
    assert!(!stanza.clone_directory(&format!("main-{label}")).exists());
    assert!(!stanza.clone_directory(&format!("main-{absent}")).exists());
    assert!(objects(Path::new(stanza.repo())) == before);
}

#[test]
fn words_that_are_not_understood() {
    let Source { stanza, .. } = &*SOURCE;
    misused(stanza.run(["nonsense"]), "nonsense");
    misused(stanza.run(["backup", "--nonsense"]), "--nonsense");
    misused(stanza.run(["backup", "--buffer-size", "many"]), "many");
    misused(stanza.run(["restore"]), "DIRECTORY");
    let file = stanza.place().join("pgcairn.toml");
    let with = |config: &str| {
        fs::write(&file, config).unwrap();
        stanza.run(["--config", text(&file), "info"])
    };
    with("log-level = \"warn\"\n[main]\nprocess-max = 3\n").ok();
    misused(with("nonsense = 1\n"), "there is no option nonsense");
    misused(with("[main]\nnonsense = 1\n"), "there is no option nonsense");
    misused(with("repo = [1, 2]\n"), "the value of repo");
    misused(with("repo = \n"), text(&file));
    fs::remove_file(&file).unwrap();
    misused(stanza.run(["--config", text(&file), "info"]), text(&file));
}

#[test]
fn servers_that_cannot_be_backed_up() {
    let Source { stanza, .. } = &*SOURCE;
    let before = objects(Path::new(stanza.repo()));
    let mut other = Cluster::builder().start();
    let conninfo = other.conninfo().to_owned();
    for verb in ["backup", "check", "stanza-create"] {
        refused(stanza.run([verb, "--pg", "nonsense"]), &["cannot read the conninfo string"]);
        refused(stanza.run([verb, "--pg", "host=/nowhere port=1 user=x password=geheim"]), &["/nowhere:1"]);
        for secret in ["host=/nowhere pasword=geheim password=geheim", "postgres://me:geheim@host:99999999/x"] {
            let output = stanza.run([verb, "--pg", secret]);
            assert!(!output.stderr.contains("geheim"), "{output:?}");
            refused(output, &["cannot read the conninfo string"]);
        }
        let id = other.psql("SELECT system_identifier FROM pg_control_system();");
        refused(stanza.run([verb, "--pg", &conninfo]), &["system identifier", &id]);
        refused(stanza.run([verb, "--pg", &format!("{conninfo} user=nobody_at_all")]), &["cannot connect"]);
    }
    // the data directory is damaged under the server
    let own = Stanza::in_directory();
    own.create(&other);
    let (control, aside) = (other.data_directory().join("global/pg_control"), other.home().join("aside"));
    fs::rename(&control, &aside).unwrap();
    refused(own.run(["backup", "--pg", &conninfo]), &["global/pg_control"]);
    fs::rename(&aside, &control).unwrap();
    other.stop(StopMode::Fast);
    for verb in ["backup", "check", "stanza-create"] {
        refused(stanza.run([verb, "--pg", &conninfo]), &["cannot connect to the server at"]);
    }
    assert!(own.run(["info"]).ok().contains("no backup yet"));
    assert!(objects(Path::new(stanza.repo())) == before);
}

#[test]
fn repositories_that_cannot_be_written() {
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    Data::tiny().random_mb(8).load(&cluster);
    let stanza = Stanza::in_directory();
    stanza.create(&cluster);
    let backup = ["backup", "--pg", cluster.conninfo()];
    let directories = || {
        let all = pgcairn_integration::files::tree(Path::new(stanza.repo())).into_iter();
        let all = all.filter(|(_, metadata)| metadata.is_dir()).map(|(path, _)| Path::new(stanza.repo()).join(path));
        all.chain([PathBuf::from(stanza.repo())]).collect::<Vec<_>>()
    };
    directories().iter().for_each(|path| fs::set_permissions(path, Permissions::from_mode(0o550)).unwrap());
    let output = stanza.run_as_server_user(backup);
    directories().iter().for_each(|path| fs::set_permissions(path, Permissions::from_mode(0o750)).unwrap());
    refused(output, &["cannot write", stanza.repo()]);
    assert!(stanza.run(["info"]).ok().contains("no backup yet"));

    let Some(small) = stanza.place().file_system("small", 6) else { return };
    let full = |arguments: &[&str]| stanza.run([arguments, &["--repo", text(&small)]].concat());
    full(&["stanza-create", "--pg", cluster.conninfo()]).ok();
    refused(full(&backup), &["cannot write", text(&small)]);
    assert!(full(&["info"]).ok().contains("no backup yet"));
    refused(full(&["start"]), &["has no backup yet"]);
    // with the space that was missing, the next one works, whatever the first left
    stanza.place().resize(&small, 200);
    full(&backup).ok();
    let copy = stanza.place().join("copy");
    full(&["restore", text(&copy)]).ok();
}

#[test]
fn mountpoints_that_cannot_be_used() {
    let Source { stanza, label, .. } = &*SOURCE;
    let place = stanza.place();
    let full = place.directory("full");
    fs::write(full.join("file"), "mine").unwrap();
    let (absent, file) = (place.join("absent"), full.join("file"));
    let modes: [&[&str]; 2] = [&[], &["--backup", label]];
    for mode in modes {
        let mount = |path: &Path| stanza.run([&["mount"], mode, &[text(path)]].concat());
        refused(mount(&absent), &[text(&absent)]);
        refused(mount(&full), &[text(&full), "not empty"]);
        refused(mount(&file), &[text(&file)]);
    }
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    let guard = stanza.mount("mounted", &[]);
    refused(stanza.run(["mount", text(guard.path())]), &[text(guard.path()), "mounted"]);
    refused(stanza.run(["mount", "/proc"]), &["/proc"]);
    refused(stanza.run(["umount", text(&full)]), &[text(&full)]);
    refused(stanza.run(["umount", "/proc"]), &["/proc"]);
    refused(stanza.run(["umount", text(&absent)]), &[text(&absent)]);
    // somebody works in it
    let inside = fs::File::open(guard.path().join("latest/PG_VERSION")).unwrap();
    refused(stanza.run(["umount", text(guard.path())]), &[text(guard.path()), "busy"]);
    drop(inside);
    stanza.run(["umount", text(guard.path())]).ok();
    refused(stanza.run(["umount", text(guard.path())]), &[text(guard.path())]);

    let mountpoint = place.directory("again");
    let _again = MountGuard::new(&mountpoint);
    let owner = ["mount", "--backup", label, "--owner", "nobody_at_all", text(&mountpoint)];
    refused(stanza.run(owner), &["nobody_at_all"]);
    let scratch = ["mount", "--backup", label, "--scratch", text(&file), text(&mountpoint)];
    refused(stanza.run(scratch), &[text(&file)]);
    let cache = ["mount", "--backup", label, "--cache-path", text(&file), text(&mountpoint)];
    refused(stanza.run(cache), &[text(&file)]);
    misused(stanza.run(["mount", "--scratch", text(&absent), text(&mountpoint)]), "--backup");
    assert!(!is_mounted(&mountpoint));
}

#[test]
fn a_scratch_belongs_to_one_mount_of_one_backup() {
    let Source { stanza, label, cluster } = &*SOURCE;
    let scratch = stanza.place().join("scratch");
    let arguments = ["--backup", label, "--scratch", text(&scratch)];
    let first = stanza.mount("first", &arguments);
    fs::write(first.path().join("mine"), "written").unwrap();
    let second = stanza.place().directory("second");
    let _guard = MountGuard::new(&second);
    let mount = |label: &str| stanza.run(["mount", "--backup", label, "--scratch", text(&scratch), text(&second)]);
    refused(mount(label), &[text(&scratch)]);
    stanza.run(["umount", text(first.path())]).ok();
    let other = Stanza::in_directory();
    other.create(cluster);
    let later = backup(&other, cluster);
    let taken = ["mount", "--backup", &later, "--scratch", text(&scratch), text(&second)];
    refused(other.run(taken), &[text(&scratch)]);
    assert!(!is_mounted(&second));
    mount(label).ok();
    assert_eq!(fs::read(second.join("mine")).unwrap(), b"written");
}

#[test]
fn directories_that_cannot_be_restored_into() {
    let Source { stanza, label, cluster } = &*SOURCE;
    let place = stanza.place();
    let map = format!("--tablespace-map-all={}", place.join("tablespaces").display());
    let restore = |path: &Path| stanza.run(["restore", "--set", label, &map, text(path)]);
    let full = place.directory("not-empty");
    fs::write(full.join("file"), "mine").unwrap();
    refused(restore(&full), &[text(&full), "not empty"]);
    let running = place.directory("running");
    fs::write(running.join("postmaster.pid"), "1").unwrap();
    refused(restore(&running), &[text(&running), "server"]);
    refused(restore(cluster.data_directory()), &[text(cluster.data_directory()), "server"]);
    refused(restore(&full.join("file")), &[text(&full)]);
    assert_eq!(fs::read_dir(&full).unwrap().count() + fs::read_dir(&running).unwrap().count(), 2);

    // the tablespace's own place is the source's
    let copy = place.join("restored");
    let oid = cluster.psql("SELECT oid FROM pg_tablespace WHERE spcname = 'elsewhere';");
    refused(stanza.run(["restore", text(&copy)]), &["tablespace-elsewhere", "is the place of tablespace"]);
    let unknown = ["restore", "--tablespace-map", "1=/tmp/x", text(&copy)];
    refused(stanza.run(unknown), &["has no tablespace 1"]);
    let taken = format!("{oid}={}", full.display());
    refused(stanza.run(["restore", "--tablespace-map", &taken, text(&copy)]), &[text(&full), "not empty"]);
    misused(stanza.run(["restore", "--tablespace-map", "x", text(&copy)]), "16400=/new/place");
    for place in [copy.join("inside"), copy.clone(), place.path().to_owned()] {
        let map = format!("{oid}={}", place.display());
        refused(stanza.run(["restore", "--tablespace-map", &map, text(&copy)]), &[text(&place)]);
    }
    assert!(!copy.exists());
    assert!(!place.join("tablespaces").exists());

    let Some(small) = stanza.place().file_system("small", 10) else { return };
    let copy = small.join("copy");
    refused(restore(&copy), &[text(&copy), "free"]);
    assert!(
        !copy.exists() && !place.join("tablespaces").exists(),
        "something was written before the space was looked at"
    );
    // as the server's user, where only root may write
    let forbidden = install::server_user().is_some().then(|| place.join("of-root"));
    if let Some(path) = forbidden {
        let output = stanza.run_as_server_user(["restore", &map, text(&path)]);
        refused(output, &[text(&path)]);
    }
}

#[test]
fn clones_that_cannot_be() {
    // in a stanza of its own, so that it can tell what is left
    let (cluster, stanza) = (&SOURCE.cluster, Stanza::in_directory());
    stanza.create(cluster);
    let label = &backup(&stanza, cluster);
    refused(stanza.run(["stop", "never"]), &["there is no clone never"]);
    refused(stanza.run(["stop", "../never"]), &["\"../never\" cannot name a clone"]);
    refused(stanza.run(["start", "--name", "a/b"]), &["\"a/b\" cannot name a clone"]);
    refused(stanza.run(["start", "--pg-bin", "/nowhere"]), &["PostgreSQL 15 is not installed"]);
    refused(stanza.run(["start", "--owner", "nobody_at_all"]), &["nobody_at_all"]);
    refused(stanza.run(["start", "--option", "nonsense"]), &["nonsense"]);
    refused(stanza.run(["start", "--option", "nonsense=1", "--name", "failed"]), &["nonsense"]);
    if install::server_user().is_some() {
        refused(stanza.run(["start", "--owner", "root"]), &["root"]);
    }
    stanza.assert_nothing_left();
    refused(stanza.run(["stop", "failed"]), &["there is no clone failed"]);

    let clone = stanza.start("taken", &[]);
    refused(stanza.run(["start", "--name", "taken"]), &["clone taken runs already"]);
    refused(stanza.run(["stop", "other"]), &["there is no clone other"]);
    let port = clone.conninfo().split("port=").nth(1).unwrap().split(' ').next().unwrap().to_owned();
    assert_eq!(clone.psql("SELECT count(*) FROM moved;"), "1000");
    // each clone has a socket directory of its own, so that even the same port does
    let second = stanza.start("same-port", &[label, "--port", &port]);
    assert_eq!(second.psql("SELECT count(*) FROM moved;"), "1000");
    second.stop(&[]);
    clone.stop(&[]);
    refused(stanza.run(["stop", "taken"]), &["there is no clone taken"]);
    stanza.assert_nothing_left();
}
