//! An encrypted stanza: everything works with its passphrase, nothing without it, and nothing that is stored can be read.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgcairn_integration::bin::{Output, run_command};
use pgcairn_integration::files::contents;
use pgcairn_integration::process::run_ok;
use pgcairn_integration::stanza::PASS_FILE;
use pgcairn_integration::{Cluster, MountGuard, Stanza, install, wait_until};

const LONG: Duration = Duration::from_secs(120);
const FIRST: &str = "correct horse";
const SECOND: &str = "battery staple";

/// Words that stand in table data, in names of tables, roles and databases, and in a file that does not compress.
const PLANTED: [&str; 5] = ["zebrafish_row", "zebrafish_table", "zebrafish_role", "zebrafish_base", "zebrafish_file"];

fn plant(cluster: &Cluster) {
    cluster.psql("CREATE ROLE zebrafish_role; CREATE DATABASE zebrafish_base;");
    let fill = "CREATE TABLE zebrafish_table AS
        SELECT i, 'zebrafish_row ' || md5(i::text) AS note FROM generate_series(1, 20000) AS i;";
    cluster.psql(fill);
    // bytes that are stored as they are where nothing encrypts them
    let mut state = 7u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    let mut bytes: Vec<u8> = (0..200_000).map(|_| noise()).collect();
    bytes.splice(100_000..100_000, *b"zebrafish_file");
    let file = cluster.data_directory().join("zebrafish_file");
    fs::write(&file, bytes).unwrap();
    install::give_to_server_user(&file);
}

/// Places in the store, in names and bytes, where any of these can be read.
fn legible(repo: &str, words: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, bytes) in contents(Path::new(repo)) {
        let name = path.to_string_lossy().into_owned();
        for word in words {
            let first = word.as_bytes()[0];
            let starts = bytes.iter().enumerate().filter(|(_, byte)| **byte == first).map(|(at, _)| at);
            if name.contains(word) || starts.into_iter().any(|at| bytes[at..].starts_with(word.as_bytes())) {
                found.push(format!("{word} in {name}"));
            }
        }
    }
    found
}

/// What a thief of the store must not learn.
fn words(cluster: &Cluster) -> Vec<String> {
    let mut words: Vec<String> = PLANTED.map(str::to_owned).into();
    words.push(cluster.psql("SELECT system_identifier FROM pg_control_system();"));
    words.push(cluster.data_directory().display().to_string());
    // a short one is found in any noise
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_owned();
    words.extend(Some(host).filter(|host| host.len() >= 8));
    words.extend(
        ["pg_control", "PG_VERSION", "checkpoint", "database-id", "start-lsn", "heartbeat", "\"host\""]
            .map(str::to_owned),
    );
    words.extend([FIRST, SECOND].map(str::to_owned));
    words
}

fn segment(cluster: &Cluster) -> PathBuf {
    let name = cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn());");
    cluster.data_directory().join("pg_wal").join(name)
}

/// Runs `pgcairn` without the passphrase, or with another one.
fn run_with(stanza: &Stanza, passphrase: Option<&str>, arguments: &[&str]) -> Output {
    let mut command = stanza.command();
    command.env_remove(PASS_FILE).env("PGCAIRN_ARCHIVE_ASYNC", "n");
    passphrase.inspect(|word| _ = command.env("PGCAIRN_REPO_CIPHER_PASS", word));
    run_command(command.args(arguments))
}

/// Every verb says so when the passphrase is not there or is another one, and stores nothing.
fn refused_without(stanza: &Stanza, cluster: &Cluster) {
    let before = contents(Path::new(stanza.repo()));
    let (wal, target) = (segment(cluster).display().to_string(), stanza.place().join("refused").display().to_string());
    let pg = cluster.conninfo();
    let verbs: [(i32, &[&str]); 12] = [
        (1, &["info"]),
        (1, &["check", "--pg", pg]),
        (1, &["backup", "--pg", pg]),
        (1, &["verify"]),
        (1, &["expire"]),
        (1, &["repo", "repair"]),
        (1, &["mount", &target]),
        (1, &["start"]),
        (1, &["restore", "--type=none", &target]),
        (1, &["stanza-create", "--pg", pg]),
        (1, &["archive-push", &wal]),
        (250, &["archive-get", "000000010000000000000001", &target]),
    ];
    fs::create_dir_all(&target).unwrap();
    for (code, arguments) in verbs {
        run_with(stanza, None, arguments).fails(code, "stanza main is encrypted, and no passphrase is given");
        run_with(stanza, Some("other"), arguments).fails(code, "the passphrase does not open stanza main");
    }
    let told = run_with(stanza, Some(SECOND), &["info", "--repo-cipher-pass", FIRST]);
    told.fails(2, "--repo-cipher-pass is no option for the command line");
    // who asks for no stanza in particular is told which there are
    let mut all = pgcairn_integration::bin::command();
    let told = run_command(all.args(["info", "--repo", stanza.repo()])).ok();
    assert!(told.contains("stanza: main (encrypted)") && !told.contains("PostgreSQL"), "{told}");
    assert_eq!(contents(Path::new(stanza.repo())), before, "a refused run wrote something");
}

/// Mounted, started, restored: what the server had.
fn reads_back(stanza: &Stanza, cluster: &Cluster, backed_up: &BTreeMap<String, String>) {
    let mount = stanza.place().directory("mounted");
    let guard = MountGuard::new(&mount);
    // the daemon in the background has it from the environment
    run_with(stanza, Some(FIRST), &["mount", "--backup", "latest", &mount.display().to_string()]).ok();
    let verified = run_ok(install::client("pg_verifybackup").arg(&mount), &[], LONG);
    assert!(verified.contains("successfully verified"), "{verified}");
    drop(guard);
    let clone = stanza.start("clone", &[]);
    assert_eq!(clone.fingerprint(), *backed_up);
    clone.stop(&[]);
    let copy = stanza.place().join("restored");
    // recovery goes on to the end of the archive: restore_command has the passphrase's file
    stanza.run(["restore", "--type=default", &copy.display().to_string()]).ok();
    let opened = Cluster::open(15, &copy, &[]);
    // it can be read from the moment it is consistent, before the archive's end
    wait_until(LONG, "the end of recovery", || opened.psql("SELECT pg_is_in_recovery();") == "f");
    assert_eq!(opened.fingerprint(), cluster.fingerprint());
    assert_eq!(opened.psql("SELECT count(*) FROM zebrafish_table WHERE note LIKE 'zebrafish_row later%';"), "2000");
}

#[test]
fn everything_works_and_nothing_can_be_read() {
    let stanza = Stanza::in_directory().asynchronous().with_passphrase(FIRST);
    let cluster = stanza.archiving(Cluster::builder().checksums(true)).start();
    plant(&cluster);
    let pg = cluster.conninfo();
    stanza.run(["stanza-create", "--pg", pg]).fails(1, "a passphrase is given, but stanza main is not encrypted");
    let created = stanza.run(["stanza-create", "--encrypt", "--pg", pg]).ok();
    assert!(created.contains("created encrypted stanza main"), "{created}");
    assert!(stanza.run(["stanza-create", "--pg", pg]).ok().contains("exists already"));
    let full = stanza.backup(&cluster);
    cluster.psql("UPDATE zebrafish_table SET note = 'zebrafish_row later' || i WHERE i <= 1000;");
    stanza.run(["backup", "--type=incr", "--pg", pg]).ok();
    let backed_up = cluster.fingerprint();
    cluster.psql("UPDATE zebrafish_table SET note = 'zebrafish_row later' || i WHERE i > 19000;");
    let checked = stanza.run(["check", "--pg", pg]).ok();
    assert!(checked.contains("was archived"), "{checked}");

    stanza.run(["verify"]).ok();
    let told = stanza.run(["info"]).ok();
    assert!(told.contains("stanza: main (encrypted)") && told.contains(&full), "{told}");
    reads_back(&stanza, &cluster, &backed_up);
    let words = words(&cluster);
    assert_eq!(legible(stanza.repo(), &words), Vec::<String>::new());
    refused_without(&stanza, &cluster);

    // a new full, and the old backups go; then another passphrase
    stanza.backup(&cluster);
    stanza.run(["expire", "--repo-retention-full=1"]).ok();
    assert!(!stanza.run(["info"]).ok().contains(&full));
    changes_its_passphrase(&stanza);
    assert_eq!(legible(stanza.repo(), &words), Vec::<String>::new());
}

fn changes_its_passphrase(stanza: &Stanza) {
    let file = stanza.place().join("passphrase").join("second");
    fs::write(&file, format!("{SECOND}\n")).unwrap();
    let file = file.display().to_string();
    let packs = || contents(&Path::new(stanza.repo()).join("chunk"));
    let before = packs();
    stanza.run(["repo", "passwd"]).fails(1, "no new passphrase is given");
    stanza.run(["repo", "passwd", "--new-pass-file", &file]).ok();
    assert_eq!(packs(), before, "a change of the passphrase rewrote data");
    stanza.run(["info"]).fails(1, "the passphrase does not open stanza main");
    stanza.run(["verify", "--repo-cipher-pass-file", &file]).ok();
    let command = format!("cat {file}");
    let shown = run_command(stanza.command().env_remove(PASS_FILE).args([
        "info",
        "--repo-cipher-pass-command",
        command.as_str(),
    ]));
    assert!(shown.ok().contains("stanza: main (encrypted)"));
}
