//! Nobody is led elsewhere: links that another user planted, directories that are not ours, names that are no text.
#![allow(clippy::unwrap_used)]

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgcairn_integration::bin::{self, run_command};
use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Cluster, Stanza, files, install};

const LONG: Duration = Duration::from_secs(60);

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn backup<'a>(cluster: &'a Cluster, kind: &'a str) -> [&'a str; 6] {
    ["backup", "--type", kind, "--wal=stored", "--pg", cluster.conninfo()]
}

/// What the server's user makes in a directory of its own.
fn link_as_server_user(target: impl AsRef<Path>, link: &Path) {
    run_ok(install::as_server_user("/usr/bin/ln").arg("-s").arg(target.as_ref()).arg(link), &[], LONG);
}

#[test]
fn a_data_directory_is_read_as_its_owner_and_its_links_are_followed_as_far_as_they_go() {
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().start();
    let (data, place) = (cluster.data_directory(), stanza.place());
    // a ConfigMap as Kubernetes mounts it: links inside of linked directories
    let etc = place.directory("etc");
    fs::create_dir(etc.join("..2024_01_07")).unwrap();
    fs::write(etc.join("..2024_01_07/more.conf"), "work_mem = '5MB'\n").unwrap();
    symlink("..2024_01_07", etc.join("..data")).unwrap();
    symlink("..data/more.conf", etc.join("more.conf")).unwrap();
    link_as_server_user(&etc, &data.join("conf.d"));
    // links that lead nowhere, or in a circle
    for (link, target) in [("again", "."), ("ping", "pong"), ("pong", "ping"), ("nowhere", "/nowhere/at/all")] {
        link_as_server_user(target, &data.join(link));
    }
    symlink(data, etc.join("back")).unwrap();
    // names of any bytes
    let odd = OsString::from_vec(b"donn\xe9es 'x' \"y\" \n z".to_vec());
    fs::write(data.join(&odd), "odd").unwrap();
    install::give_to_server_user(&data.join(&odd));

    stanza.create(&cluster);
    let told = stanza.run(backup(&cluster, "full"));
    for link in ["again", "ping", "pong", "nowhere", "conf.d/back"] {
        assert!(told.stderr.contains(link), "it says what it leaves out: {}", told.stderr);
    }
    told.ok();
    let copy = place.join("copy");
    stanza.run(["restore", text(&copy)]).ok();
    let files = files::contents(&copy);
    for path in ["conf.d/more.conf", "conf.d/..data/more.conf", "conf.d/..2024_01_07/more.conf"] {
        assert_eq!(files[Path::new(path)], b"work_mem = '5MB'\n", "{path}");
    }
    assert_eq!(files[Path::new(&odd)], b"odd");
    let mount = stanza.mount("mount", &[]);
    assert_eq!(fs::read(mount.path().join("latest").join(&odd)).unwrap(), b"odd");
    run_ok(install::client("pg_verifybackup").arg(mount.path().join("latest")), &[], LONG);
    drop(mount);

    if install::server_user().is_none() {
        return;
    }
    // root reads nothing for the server's user that this user may not read
    let secret = place.join("secret");
    fs::write(&secret, "the secret of root").unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
    link_as_server_user(&secret, &data.join("planted"));
    let refused = stanza.run(backup(&cluster, "incr")).fails(1, "planted");
    assert!(refused.stderr.contains("as that user") && refused.stderr.contains("postgres"), "{}", refused.stderr);
    // what a group of the user may read is read
    let user = install::server_user().unwrap();
    std::os::unix::fs::chown(&secret, Some(0), Some(user.gid.as_raw())).unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(0o640)).unwrap();
    stanza.run(backup(&cluster, "incr")).ok();
}

#[test]
fn what_lies_in_the_cluster_itself_and_names_of_our_own_are_refused() {
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().start();
    let (data, place) = (cluster.data_directory(), stanza.place());
    let inside = data.join("backups");
    let space = cluster.create_tablespace("space");
    let link = place.join("link");
    symlink(data, &link).unwrap();
    for (repo, name) in
        [(inside.clone(), "data directory"), (link.join("x/y"), "data directory"), (space.join("r"), "tablespace")]
    {
        let create = ["stanza-create", "--pg", cluster.conninfo()];
        let refused = run_command(bin::command().args(["--stanza", "main", "--repo", text(&repo)]).args(create));
        refused.fails(1, name).fails(1, "--repo");
        assert!(!repo.exists(), "nothing was made");
    }
    stanza.create(&cluster);
    // one that is there from an earlier program
    run_ok(std::process::Command::new("cp").arg("-a").arg(stanza.repo()).arg(&inside), &[], LONG);
    let taken = backup(&cluster, "full");
    run_command(bin::command().args(["--stanza", "main", "--repo", text(&inside)]).args(taken)).fails(1, "lies in");
    fs::remove_dir_all(&inside).unwrap();

    for name in [".pgcairn", "pgcairn.restore"] {
        let own = data.join(name);
        fs::write(&own, "the user's own").unwrap();
        install::give_to_server_user(&own);
        stanza.run(backup(&cluster, "full")).fails(1, name).fails(1, "rename it");
        stanza.run([&backup(&cluster, "full")[..], &["--source=stream"]].concat()).fails(1, name);
        fs::remove_file(&own).unwrap();
    }

    // a tablespace whose path is no text
    let bytes = place.directory("spaces").join(OsString::from_vec(b"donn\xe9es".to_vec()));
    install::make_server_directory(&bytes, 0o700);
    let mut psql = install::client("psql");
    psql.env("PGCLIENTENCODING", "SQL_ASCII").args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d"]);
    cluster.psql("CREATE DATABASE ascii TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C';");
    let sql = [b"CREATE TABLESPACE bytes LOCATION '", bytes.as_os_str().as_encoded_bytes(), b"';"].concat();
    run_ok(psql.arg(cluster.database("ascii").conninfo()), &sql, LONG);
    for way in ["--source=files", "--source=stream"] {
        let refused = stanza.run([&backup(&cluster, "full")[..], &[way]].concat()).fails(1, "not UTF-8");
        assert!(!refused.stderr.contains("panicked"), "{}", refused.stderr);
    }
    cluster.database("ascii").psql("DROP TABLESPACE bytes;");
    stanza.run(backup(&cluster, "full")).ok();

    // a directory that is no cache is not cleaned like one, and not written to
    let var = place.join("var");
    fs::create_dir_all(var.join("tmp")).unwrap();
    fs::create_dir(var.join("lib")).unwrap();
    fs::write(var.join("tmp/old"), "x").unwrap();
    let mountpoint = place.directory("mount");
    let mount = ["mount", text(&mountpoint), "--cache-path", text(&var)];
    stanza.run(mount).fails(1, "is no cache").fails(1, "--cache-path");
    assert_eq!(files::tree(&var).len(), 3);
    // nor one of somebody else
    if install::server_user().is_some() {
        let theirs = place.directory("theirs");
        stanza.run(["mount", text(&mountpoint), "--cache-path", text(&theirs)]).fails(1, "belongs to");
        assert_eq!(files::tree(&theirs).len(), 0);
    }
}

#[test]
fn without_a_home_nothing_is_kept_where_others_can_foresee_it() {
    if install::server_user().is_none() {
        return;
    }
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().start();
    stanza.create(&cluster);
    stanza.backup(&cluster);
    let repo = stanza.place().join("open");
    run_ok(std::process::Command::new("cp").arg("-r").arg(stanza.repo()).arg(&repo), &[], LONG);
    run_ok(std::process::Command::new("chmod").args(["-R", "a+rX"]).arg(&repo), &[], LONG);
    // a user whom this machine does not know, as in a container
    let mut start = std::process::Command::new(bin::path());
    start.env_clear().uid(54_321).gid(54_321).current_dir("/");
    start.args(["--repo", text(&repo), "--stanza", "main", "start", "latest"]);
    run_command(&mut start).fails(1, "there is no HOME").fails(1, "--cache-path");
    run_command(start.arg("--cache-size=0")).fails(1, "there is no HOME").fails(1, "--clone-path");
}

/// Runs `pgcairn` while something is planted again and again.
fn while_planting(plant: impl Fn() + Sync, run: impl FnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                plant();
            }
        });
        // a run that panics must end the other thread, too
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        done.store(true, Ordering::Relaxed);
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// What nobody may touch: names, owners, modes and how the files begin.
fn state(victims: &Path) -> Vec<String> {
    let of = |(path, found): (PathBuf, fs::Metadata)| {
        let bytes = fs::read(victims.join(&path)).unwrap_or_default();
        let begin = &bytes[..bytes.len().min(16)];
        format!("{} {} {:o} {} {}", path.display(), found.uid(), found.mode(), found.len(), begin.escape_ascii())
    };
    files::tree(victims).into_iter().map(of).collect()
}

#[test]
fn links_planted_while_root_restores_or_starts_lead_it_nowhere() {
    let Some(user) = install::server_user() else { return };
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().start();
    cluster.create_tablespace("space");
    stanza.create(&cluster);
    stanza.run(backup(&cluster, "full")).ok();
    let place = stanza.place();
    let victims = place.join("victims");
    for directory in ["", "1", "4", "5"] {
        fs::create_dir(victims.join(directory)).unwrap();
    }
    for file in ["pg_filenode.map", "PG_VERSION", "1/PG_VERSION", "4/PG_VERSION", "5/PG_VERSION", "pg_hba.conf"] {
        fs::write(victims.join(file), "root's own").unwrap();
    }
    let before = state(&victims);

    // the directory's owner replaces directories of it by links: the run may end with an error, nothing else
    let home = place.directory("home");
    let (target, space) = (home.join("data"), home.join("space"));
    let map = format!("--tablespace-map-all={}", space.display());
    for _ in 0..3 {
        let base = target.join("base");
        while_planting(
            || {
                if base.symlink_metadata().is_ok_and(|found| found.is_dir()) {
                    _ = fs::rename(&base, home.join("aside"));
                    _ = symlink(&victims, &base);
                }
            },
            || drop(stanza.run(["restore", text(&target), &map])),
        );
        assert_eq!(state(&victims), before, "a link was followed");
        for path in ["data", "space", "aside"] {
            _ = fs::remove_dir_all(home.join(path));
        }
    }

    // undisturbed, all of it is the owner's, in a place that only root can make
    let of_root = place.join("of-root");
    fs::create_dir(&of_root).unwrap();
    fs::set_permissions(&of_root, Permissions::from_mode(0o755)).unwrap();
    let (copy, spaces) = (of_root.join("deep/copy"), of_root.join("spaces"));
    stanza.run(["restore", text(&copy), "--tablespace-map-all", text(&spaces)]).ok();
    for root in [&copy, &spaces.join("space")] {
        assert_eq!(root.metadata().unwrap().uid(), user.uid.as_raw());
        let tree = files::tree(root);
        assert!(!tree.is_empty() && tree.values().all(|found| found.uid() == user.uid.as_raw()));
    }
    Cluster::open(15, &copy, &[]).psql("SELECT 1;");
    // what a link of the user leads to is not given away
    let led = home.join("led");
    symlink(&of_root, &led).unwrap();
    stanza.run(["restore", text(&led.join("new")), &map]).fails(1, "real path");
    assert!(!of_root.join("new").exists());
    // a copy with files of another user is made equal again
    let of_other = copy.join("base/1/PG_VERSION");
    std::os::unix::fs::chown(&of_other, Some(0), Some(0)).unwrap();
    std::os::unix::fs::chown(copy.join("base"), Some(0), Some(0)).unwrap();
    stanza.run(["restore", "--delta", text(&copy), "--tablespace-map-all", text(&spaces)]).ok();
    assert_eq!(of_other.metadata().unwrap().uid(), user.uid.as_raw());
    assert_eq!(copy.join("base").metadata().unwrap().uid(), user.uid.as_raw());

    // the server's user plants a link where the clone's access rules are written
    let hba = stanza.clone_directory("clone").join("run/pg_hba.conf");
    while_planting(
        || _ = symlink(victims.join("pg_hba.conf"), &hba),
        || drop(stanza.run(["start", "--name=clone", "--start-timeout=20"])),
    );
    assert_eq!(state(&victims), before, "a link was followed");
    drop(stanza.run(["stop", "clone"]));
}

#[test]
fn root_keeps_nothing_where_another_user_may_rename_or_write() {
    if install::server_user().is_none() {
        return;
    }
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().start();
    stanza.create(&cluster);
    stanza.run(backup(&cluster, "full")).ok();
    let place = stanza.place();
    let (home, mountpoint) = (place.directory("home"), place.join("mountpoint"));
    fs::create_dir(&mountpoint).unwrap();
    let inside = home.join("inside");
    let (clones, cache) = (format!("--clone-path={}", inside.display()), format!("--cache-path={}", inside.display()));
    fs::set_permissions(&home, Permissions::from_mode(0o777)).unwrap();
    let belongs = format!("{} may be written by others", home.display());
    stanza.run(["start", "--name=one", &clones]).fails(1, &belongs).fails(1, "--clone-path");
    let mount = ["mount", "--backup=latest", "--scratch", text(&inside), text(&mountpoint)];
    stanza.run(mount).fails(1, &belongs);
    stanza.run(["mount", &cache, text(&mountpoint)]).fails(1, &belongs);
    assert!(!inside.exists(), "root made something");
    run_ok(install::as_server_user("/usr/bin/mkdir").arg("-p").arg(inside.join("one/run")), &[], LONG);
    stanza.run(["stop", "one", &clones]).fails(1, &belongs);
    assert!(inside.join("one/run").exists(), "root removed something");

    // with a umask of 0, as in containers, nothing is for others to write
    let mut start = std::process::Command::new("/bin/sh");
    start.args(["-c", "umask 0; exec \"$0\" \"$@\""]).arg(bin::path());
    let start = stanza.prepared(install::clean(start)).args(["start", "--name=open"]).output().unwrap();
    assert!(start.status.success(), "{}", String::from_utf8_lossy(&start.stderr));
    let clone = stanza.clone_directory("open");
    let of_others = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o022;
    for path in ["", "clone.json", "mount.log", "scratch", "run"] {
        assert_eq!(of_others(&clone.join(path)), 0, "{path}");
    }
    // a record that an older program let everybody write is not believed
    fs::set_permissions(clone.join("clone.json"), Permissions::from_mode(0o666)).unwrap();
    stanza.run(["stop", "open", "--keep"]).fails(1, "others may have written it");
    stanza.run(["stop", "open"]).ok();
    stanza.assert_nothing_left();
}

#[test]
fn a_link_in_place_of_the_repositorys_temporary_directory_leads_nowhere() {
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().start();
    stanza.create(&cluster);
    stanza.run(backup(&cluster, "full")).ok();
    let victims = stanza.place().directory("victims");
    let names = ["a", "b", "4711-0123456789abcdef"];
    for name in names {
        let file = fs::File::create(victims.join(name)).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(72 * 3600)).unwrap();
    }
    let temporary = Path::new(stanza.repo()).join(".tmp");
    fs::remove_dir_all(&temporary).unwrap();
    link_as_server_user(&victims, &temporary);
    stanza.run(["info"]).ok();
    stanza.run(backup(&cluster, "full")).fails(1, "symbolic link");
    assert_eq!(files::tree(&victims).len(), names.len(), "files outside of the repository are gone, or came");
}

#[test]
fn an_incremental_reads_what_was_exchanged_with_the_same_size_and_time() {
    let stanza = Stanza::in_directory();
    let cluster = Cluster::builder().start();
    let data = cluster.data_directory();
    let (one, two) = (data.join("one.conf"), data.join("two.conf"));
    let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    for (path, text) in [(&one, "first content"), (&two, "other content")] {
        fs::write(path, text).unwrap();
        fs::File::options().write(true).open(path).unwrap().set_modified(old).unwrap();
        install::give_to_server_user(path);
    }
    stanza.create(&cluster);
    // both are old enough that nothing else can change them unseen
    std::thread::sleep(Duration::from_secs(6));
    stanza.run(backup(&cluster, "full")).ok();
    let size = |told: &str, name: &str| {
        serde_json::from_str::<serde_json::Value>(told).unwrap()["sizes"][name].as_u64().unwrap()
    };
    let told = stanza.run([&backup(&cluster, "incr")[..], &["--output=json"]].concat()).ok();
    assert!(size(&told, "read") < size(&told, "database") / 2, "what did not change was read: {told}");
    fs::rename(&two, &one).unwrap();
    stanza.run(backup(&cluster, "incr")).ok();
    let copy = stanza.place().join("copy");
    stanza.run(["restore", text(&copy)]).ok();
    assert_eq!(fs::read_to_string(copy.join("one.conf")).unwrap(), "other content");
    assert!(!copy.join("two.conf").exists());
}

/// `archive-push` and `archive-get` by root, in a directory of the server's user.
#[test]
fn what_root_archives_is_read_as_the_user_and_what_it_delivers_is_the_users() {
    let stanza = Stanza::in_directory().asynchronous();
    let cluster = Cluster::builder().wal_segsize_mb(1).start();
    stanza.create(&cluster);
    let wal = cluster.data_directory().join("pg_wal");
    // what only root may read, under a name whose content nothing checks
    let secret = stanza.place().join("secret");
    fs::write(&secret, "1\t0/1000000\tonly for root\n").unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(0o600)).unwrap();
    let link = wal.join("00000009.history");
    link_as_server_user(&secret, &link);
    stanza.run(["archive-push", text(&link)]).fails(1, "ermission denied");
    fs::remove_file(&link).unwrap();

    let mut names = Vec::new();
    for _ in 0..4 {
        names.push(cluster.psql("SELECT pg_walfile_name(pg_create_restore_point('here'));"));
        cluster.psql("SELECT pg_switch_wal();");
        stanza.run(["archive-push", text(&wal.join(names.last().unwrap()))]).ok();
    }
    let target = wal.join("RECOVERYXLOG");
    let owner = fs::metadata(&wal).unwrap().uid();
    let mut from_spool = 0;
    for name in &names {
        let got = stanza.run(["--log-level=info", "archive-get", name, text(&target)]);
        from_spool += usize::from(got.stderr.contains("taken from the spool"));
        got.ok();
        assert_eq!(fs::metadata(&target).unwrap().uid(), owner, "{name}");
        fs::remove_file(&target).unwrap();
        std::thread::sleep(Duration::from_millis(500));
    }
    assert!(from_spool > 0, "nothing was fetched ahead");
}
