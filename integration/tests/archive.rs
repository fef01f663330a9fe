//! The WAL archive: success means that the content is there, nothing is ever overwritten, a failing store is not absence.
#![allow(clippy::unwrap_used)]

mod library;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use library::{memory, objects, repository};
use pgcairn::archive::push::{Pushed, push};
use pgcairn::read::wal::{GetError, get};
use pgcairn::repo::Repository;
use pgcairn::store::{Effect, ErrorKind, Fault, Operation};
use pgcairn_integration::files::contents;
use pgcairn_integration::{Cluster, Output, Place, Stanza, install};

/// A stanza, its cluster, and a directory of WAL files to play with.
struct Setup {
    stanza: Stanza,
    cluster: Cluster,
    segments: Vec<PathBuf>,
}

fn cluster() -> Cluster {
    Cluster::builder().wal_segsize_mb(1).conf("wal_keep_size", "100MB").start()
}

/// Finished segments in a directory of their own.
fn segments(cluster: &Cluster, to: &Path) -> Vec<PathBuf> {
    for _ in 0..3 {
        cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 1000); SELECT pg_switch_wal(); DROP TABLE t;");
    }
    let current = cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn());");
    let mut found = Vec::new();
    for entry in fs::read_dir(cluster.data_directory().join("pg_wal")).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if name.len() == 24 && name < current {
            let copy = to.join(&name);
            fs::copy(entry.path(), &copy).unwrap();
            install::give_to_server_user(&copy);
            found.push(copy);
        }
    }
    found.sort();
    assert!(found.len() >= 3, "{found:?}");
    found
}

impl Setup {
    fn new() -> Self {
        let (stanza, cluster) = (Stanza::in_directory(), cluster());
        stanza.create(&cluster);
        let segments = segments(&cluster, &stanza.place().directory("segments"));
        Self { stanza, cluster, segments }
    }

    fn push(&self, path: &Path) -> Output {
        self.stanza.run_as_server_user(["archive-push", path.to_str().unwrap()])
    }

    fn get(&self, name: &str) -> (Output, PathBuf) {
        let target = self.stanza.place().join(&format!("got-{name}"));
        _ = fs::remove_file(&target);
        (self.stanza.run(["archive-get", name, target.to_str().unwrap()]), target)
    }

    #[track_caller]
    fn assert_archived(&self, name: &str, bytes: &[u8]) {
        let (output, target) = self.get(name);
        output.ok();
        assert!(fs::read(target).unwrap() == bytes, "{name} came back with other bytes");
    }

    /// Writes a file of this name in a directory of its own, so that names can be used again.
    fn file(&self, directory: &str, name: &str, bytes: &[u8]) -> PathBuf {
        let directory = self.stanza.place().join(directory);
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join(name), bytes).unwrap();
        directory.join(name)
    }

    fn stored(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        contents(Path::new(self.stanza.repo()))
    }
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

#[test]
fn what_is_pushed_comes_back_and_is_never_overwritten() {
    let setup = Setup::new();
    let segment = &setup.segments[0];
    let bytes = fs::read(segment).unwrap();
    let (segment_name, history) = (name(segment), "00000002.history");
    setup.push(segment).ok();
    setup.assert_archived(&segment_name, &bytes);
    let stored = setup.stored();
    let again = setup.push(segment);
    assert!(again.stderr.contains("already"), "the second push should warn: {again:?}");
    again.ok();

    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    let refused = setup.push(&setup.file("other", &segment_name, &other)).fails(1, "already holds");
    assert!(refused.stderr.contains(&segment_name) && refused.stderr.contains("hint:"), "{refused:?}");
    setup.assert_archived(&segment_name, &bytes);
    assert_eq!(setup.stored(), stored);

    let text = b"1\t0/3000000\tno recovery target specified\n";
    setup.push(&setup.file("once", history, text)).ok();
    setup.push(&setup.file("once", history, text)).ok();
    let refused = setup.push(&setup.file("other", history, b"1\t0/5000000\tanother\n"));
    refused.fails(1, "error:").fails(1, "hint:");
    setup.assert_archived(history, text);

    for more in [format!("{segment_name}.00000028.backup"), format!("{}.partial", name(&setup.segments[1]))] {
        let content = if more.ends_with("backup") {
            b"START WAL LOCATION: 0/28".to_vec()
        } else {
            fs::read(&setup.segments[1]).unwrap()
        };
        setup.push(&setup.file("more", &more, &content)).ok();
        setup.assert_archived(&more, &content);
    }
    // a partial segment is another file than the segment
    let (absent, _) = setup.get(&name(&setup.segments[1]));
    absent.fails(1, "the archive has no");
}

#[test]
fn what_is_not_this_clusters_wal_is_refused() {
    let setup = Setup::new();
    let (foreign, place) = (cluster(), Place::new());
    let foreign = segments(&foreign, &place.directory("segments"));
    let stored = setup.stored();
    let bytes = fs::read(&setup.segments[0]).unwrap();
    let segment = name(&setup.segments[0]);
    let page = 8192;
    let cases: Vec<(&str, PathBuf)> = vec![
        ("is not WAL of this stanza's cluster", foreign[0].clone()),
        ("bytes, it should have", setup.file("cut", &segment, &bytes[..bytes.len() / 2])),
        ("bytes, it should have", setup.file("empty", &segment, b"")),
        ("bytes, a WAL segment of this cluster has", setup.file("long", &segment, &[&bytes[..], b"x"].concat())),
        ("is not WAL of this stanza's cluster", setup.file("zeros", &segment, &vec![0; bytes.len()])),
        ("is not WAL of this stanza's cluster", setup.file("text", &segment, &b"no wal..".repeat(bytes.len() / 8))),
        // whole, but another segment's: its first page says which
        ("is not WAL of this stanza's cluster", setup.file("renamed", &name(&setup.segments[1]), &bytes)),
        (
            "is not WAL of this stanza's cluster",
            setup.file("shifted", &segment, &[&bytes[page..], &bytes[..page]].concat()),
        ),
        ("is not a file of pg_wal", setup.file("odd", "foo", &bytes)),
        ("is not a file of pg_wal", setup.file("odd", &format!("{segment}.gz"), &bytes)),
        ("cannot look at", setup.stanza.place().join(&format!("absent/{segment}"))),
    ];
    for (why, path) in cases {
        let refused = setup.push(&path).fails(1, "error: ");
        assert!(refused.stderr.contains(why), "{}: {}", path.display(), refused.stderr);
        assert_eq!(setup.stored(), stored, "{}", path.display());
    }
    drop(setup.cluster);
}

#[test]
fn a_store_that_fails_is_not_the_end_of_wal() {
    let setup = Setup::new();
    setup.push(&setup.segments[0]).ok();
    let (here, absent) = (name(&setup.segments[0]), "0000000100000000000000FF");
    let (output, target) = setup.get(absent);
    output.fails(1, &format!("the archive has no {absent}"));
    assert!(!target.exists());

    // the repository is gone, or only the mountpoint of what holds it is there: neither means that WAL ends
    let repo = PathBuf::from(setup.stanza.repo());
    let aside = repo.with_extension("aside");
    fs::rename(&repo, &aside).unwrap();
    let fails = |what: &str| {
        for name in [&here, absent] {
            let (output, target) = setup.get(name);
            assert_eq!(output.code, Some(250), "{what}: {output:?}");
            assert!(output.stderr.contains("error:"), "{what}: {output:?}");
            assert!(!target.exists(), "{what}");
        }
    };
    fails("the repository is gone");
    fs::create_dir(&repo).unwrap();
    fails("the repository is empty");
    fs::remove_dir(&repo).unwrap();
    fs::rename(&aside, &repo).unwrap();

    // damage is neither absence nor bytes
    let archived = contents(&repo).into_iter().find(|(path, _)| path.to_string_lossy().contains(&here)).unwrap();
    let path = repo.join(&archived.0);
    for at in [0, 40, archived.1.len() / 2, archived.1.len() - 1] {
        let mut bytes = archived.1.clone();
        bytes[at] ^= 0x10;
        fs::write(&path, &bytes).unwrap();
        let (output, target) = setup.get(&here);
        assert_eq!(output.code, Some(250), "byte {at}: {output:?}");
        assert!(!target.exists(), "byte {at}");
    }
    fs::write(&path, &archived.1).unwrap();
    setup.assert_archived(&here, &fs::read(&setup.segments[0]).unwrap());

    // where files go that cannot be written
    let output = setup.stanza.run(["archive-get", &here, "/proc/nowhere/x"]);
    assert_eq!(output.code, Some(250), "{output:?}");

    // a directory that cannot be listed; root may list anything
    let directory = path.parent().unwrap();
    fs::set_permissions(directory, fs::Permissions::from_mode(0o000)).unwrap();
    let target = setup.stanza.place().directory("as-server-user").join("target");
    let output = setup.stanza.run_as_server_user(["archive-get", &here, target.to_str().unwrap()]);
    fs::set_permissions(directory, fs::Permissions::from_mode(0o750)).unwrap();
    assert_eq!(output.code, Some(250), "{output:?}");
    assert!(!target.exists());
}

/// Whatever call fails, before or after the store did its part: success means that the content is there.
#[test]
fn no_failing_call_makes_a_push_lie() {
    let setup = Setup::new();
    let segment = &setup.segments[0];
    let bytes = fs::read(segment).unwrap();
    let objects = objects(Path::new(setup.stanza.repo()));
    let place = Place::new();
    let archived = |repository: &Repository| -> bool {
        let target = place.join("target");
        match get(repository, &name(segment), &target) {
            Ok(()) => {
                assert!(fs::read(&target).unwrap() == bytes, "other bytes came back");
                true
            }
            Err(GetError::NotThere) => false,
            Err(GetError::Failed(error)) => panic!("{error:?}"),
        }
    };
    for effect in [
        Effect::Fail(ErrorKind::Transient),
        Effect::FailAfter(ErrorKind::Transient),
        Effect::Fail(ErrorKind::NotFound),
        Effect::Cut(10),
        Effect::Flip(20),
    ] {
        let (mut failed, mut n) = (0, 1);
        loop {
            let store = Fault::new(memory(&objects));
            let plan = store.plan();
            let repository = repository(store);
            plan.nth(n, effect);
            let pushed = push(&repository, segment, 3);
            let met = plan.calls() >= n;
            plan.clear();
            match pushed {
                Ok(pushed) => {
                    assert_eq!(pushed, Pushed::New);
                    assert!(archived(&repository), "{effect:?} at call {n}: success, but nothing is archived");
                }
                Err(_) => failed += 1,
            }
            // PostgreSQL tries again
            push(&repository, segment, 3).unwrap();
            assert!(archived(&repository), "{effect:?} at call {n}: the second push lied");
            if !met {
                break;
            }
            n += 1;
        }
        assert!(n > 3, "a push of {n} calls is no push");
        let spoils_reads = matches!(effect, Effect::Cut(_) | Effect::Flip(_) | Effect::Fail(ErrorKind::NotFound));
        assert!(failed > 0 || spoils_reads, "{effect:?} went unnoticed at every call");
    }
    // a store that confirms and forgets is found out
    let store = Fault::new(memory(&objects));
    store.plan().add(|call| call.operation == Operation::Put, Effect::Fail(ErrorKind::NoSpace));
    let error = push(&repository(store), segment, 3).unwrap_err();
    assert!(error.hint_text().is_some_and(|hint| hint.contains("free space")), "{error:?}");
}
