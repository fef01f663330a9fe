//! What `pgcairn::postgres` says, judged by PostgreSQL itself.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pgcairn::postgres::manifest::{self, ManifestFile, WalRange};
use pgcairn::postgres::{
    BackupLabel, ControlFile, FileClass, Layout, Lsn, Major, TablespaceLink, Timeline, Verdict, WalIdentity, WalName,
    backup_label, conf, page,
};
use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Cluster, Data, StopMode, install};

const MAJORS: [u32; 3] = [13, 15, 18];

fn control_of(data: &Path) -> ControlFile {
    ControlFile::parse(&fs::read(data.join("global/pg_control")).unwrap()).unwrap()
}

/// Every regular file below, relative; links are followed.
fn files_below(root: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() { directories.push(path) } else { files.push(path.strip_prefix(root).unwrap().to_owned()) }
        }
    }
    files
}

/// Counts pages in order, new ones, and others.
fn verify_all_pages(data: &Path) -> (u64, u64, u64) {
    let control = control_of(data);
    let tablespace_directory = control.major().unwrap().tablespace_directory();
    let layout = Layout { tablespace_directory, relation_segment_pages: control.relation_segment_pages };
    let (mut sound, mut new, mut harmed) = (0, 0, 0);
    for path in files_below(data) {
        let FileClass::Relation(file) = layout.classify(path.as_os_str().as_bytes()) else { continue };
        let contents = fs::read(data.join(&path)).unwrap();
        for (page, block) in contents.chunks_exact(control.page_bytes as usize).zip(file.first_block..) {
            match page::verify(page, block) {
                Verdict::Ok => sound += 1,
                Verdict::New => new += 1,
                Verdict::Mismatch { .. } => harmed += 1,
            }
        }
    }
    (sound, new, harmed)
}

#[test]
fn pages_of_real_clusters_are_sound_also_past_one_segment() {
    for major in MAJORS {
        let mut cluster = Cluster::builder().major(major).checksums(true).conf("max_wal_size", "4GB").start();
        cluster.create_tablespace("elsewhere");
        cluster.psql("CREATE TABLE t TABLESPACE elsewhere AS SELECT generate_series(1, 100000) AS i;");
        let data = Data::tiny().pgbench_scale(1);
        if major == 15 {
            data.past_one_segment().load(&cluster)
        } else {
            data.load(&cluster)
        }
        cluster.stop(StopMode::Fast);
        let (sound, _, harmed) = verify_all_pages(cluster.data_directory());
        assert_eq!(harmed, 0, "PostgreSQL {major}");
        assert!(sound > if major == 15 { 131_072 } else { 2000 }, "PostgreSQL {major}: {sound}");
    }
}

#[test]
fn settings_read_back_as_written() {
    let value = "it's \\n C:\\temp\\ \"é\" # ; \t\nsecond\rline''";
    for major in MAJORS {
        let mut cluster = Cluster::builder().major(major).start();
        let path = cluster.data_directory().join("postgresql.auto.conf");
        let mut contents = fs::read(&path).unwrap();
        conf::append(&mut contents, "earlier", &[("recovery_target_time", "nonsense"), ("custom.x", "1")]).unwrap();
        contents = conf::comment_out(&contents, conf::is_recovery_target);
        conf::append(&mut contents, "later", &[("custom.x", value), ("custom.empty", "")]).unwrap();
        fs::write(&path, contents).unwrap();
        cluster.restart();
        let read_back =
            format!("SELECT current_setting('custom.x') = E'{}';", value.replace('\\', "\\\\").replace('\'', "\\'"));
        assert_eq!(cluster.psql(&read_back), "t", "PostgreSQL {major}");
        assert_eq!(cluster.psql("SELECT current_setting('custom.empty') = '';"), "t");
        assert!(!cluster.log().contains("recovery_target"));
    }
}

#[test]
fn a_manifest_of_ours_passes_pg_verifybackup() {
    let mut cluster = Cluster::builder().start();
    Data::tiny().pgbench_scale(1).load(&cluster);
    cluster.stop(StopMode::Fast);
    let data = cluster.data_directory().to_owned();
    fs::write(data.join("odd \"name\"\\\n\té"), "123456789").unwrap();
    fs::write(data.join(std::ffi::OsStr::from_bytes(b"not \xff utf-8")), "x").unwrap();
    let control = control_of(&data);
    let mut text = manifest::header(control.major().unwrap(), control.system_identifier);
    // the judge leaves pg_wal out
    let files = files_below(&data).into_iter().filter(|path| !path.starts_with("pg_wal"));
    for (index, path) in files.enumerate() {
        let metadata = data.join(&path).metadata().unwrap();
        let crc32c = crc32c_by_server(&fs::read(data.join(&path)).unwrap());
        let path = path.as_os_str().as_bytes();
        let file = ManifestFile { path, size: metadata.len(), modified_s: metadata.mtime(), crc32c };
        text.push_str(&file.line(index == 0));
    }
    let Lsn(redo) = control.checkpoint.redo;
    text.push_str(&manifest::wal_ranges(&[WalRange { timeline: Timeline(1), start: Lsn(redo), end: Lsn(redo + 1) }]));
    text.push_str(&manifest::closing(&sha256(text.as_bytes())));
    fs::write(data.join("backup_manifest"), &text).unwrap();
    let verify = || install::client("pg_verifybackup").arg("-n").arg(&data).output().unwrap();
    let judged = verify();
    assert!(judged.status.success(), "{}", String::from_utf8_lossy(&judged.stderr));
    fs::write(data.join("odd \"name\"\\\n\té"), "123456788").unwrap();
    assert!(String::from_utf8_lossy(&verify().stderr).contains("checksum mismatch"));
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let hex = run_ok(&mut Command::new("sha256sum"), bytes, Duration::from_secs(60));
    std::array::from_fn(|i| u8::from_str_radix(&hex[i * 2..i * 2 + 2], 16).unwrap())
}

/// Bit by bit: slow, and independent of what is tested.
fn crc32c_by_server(bytes: &[u8]) -> u32 {
    let step = |crc: u32| (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg());
    !bytes.iter().fold(u32::MAX, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc)))
}

/// A backup by hand, with our statements, our reading of what they return, and a tablespace moved by our map.
#[test]
fn a_backup_by_hand_starts_with_its_tablespace_elsewhere() {
    for number in MAJORS {
        let cluster = Cluster::builder().major(number).checksums(true).wal_segsize_mb(1).start();
        let major = Major::new(number).unwrap();
        cluster.create_tablespace("elsewhere");
        cluster.psql("CREATE TABLE t TABLESPACE elsewhere AS SELECT generate_series(1, 1000) AS i;");
        let data = cluster.data_directory();

        let mut session = cluster.session();
        session.run(&format!("PREPARE start(text, boolean) AS {};", major.start_backup_sql()));
        session.run(&format!("PREPARE stop(boolean) AS {};", major.stop_backup_sql()));
        let start: Lsn = session.run("EXECUTE start('by hand', true);").parse().unwrap();
        cluster.psql("INSERT INTO t SELECT generate_series(1001, 2000);");
        let copy = cluster.home().join("copy");
        copy_directory(data, &copy);
        let moved = cluster.home().join("moved\\to\nanother place");
        let oid = cluster.psql("SELECT oid FROM pg_tablespace WHERE spcname = 'elsewhere';");
        copy_directory(&data.join("pg_tblspc").join(&oid).canonicalize().unwrap(), &moved);
        let returned = session.run("\\pset recordsep_zero on\n\\pset fieldsep_zero on\nEXECUTE stop(false);");
        let mut columns = returned.trim_end_matches('\0').splitn(3, '\0');
        let (stop, label, map) = (columns.next().unwrap(), columns.next().unwrap(), columns.next().unwrap());
        drop(session);

        let stop: Lsn = stop.parse().unwrap();
        let control = control_of(data);
        let parsed = BackupLabel::parse(label.as_bytes()).unwrap();
        assert_eq!((parsed.start, parsed.label.as_str(), parsed.start_timeline), (start, "by hand", Timeline(1)));
        assert_eq!(start, control.checkpoint.redo);
        let links = backup_label::parse_tablespace_map(map.as_bytes(), major).unwrap();
        assert_eq!(links.len(), 1);
        let links: Vec<_> = links
            .into_iter()
            .map(|link| TablespaceLink { path: moved.as_os_str().as_bytes().to_vec(), ..link })
            .collect();
        fs::write(copy.join("tablespace_map"), backup_label::write_tablespace_map(&links, major).unwrap()).unwrap();
        fs::write(copy.join("backup_label"), label).unwrap();
        install::give_to_server_user(&copy.join("backup_label"));
        install::give_to_server_user(&copy.join("tablespace_map"));
        bring_wal(&control, data, &copy, start, stop);
        fs::remove_file(copy.join("postmaster.pid")).unwrap();

        let restored = Cluster::open(number, &copy, &[]);
        assert_eq!(restored.psql("SELECT count(*), sum(i) FROM t;"), "2000|2001000", "PostgreSQL {number}");
        assert_eq!(fs::read_link(copy.join("pg_tblspc").join(oid)).unwrap(), moved);
    }
}

fn copy_directory(from: &Path, to: &Path) {
    // files may vanish meanwhile, as in any backup
    let status = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(status.success(), "cp -a {} {}", from.display(), to.display());
}

/// Exactly the segments from start to stop, each proven to be the one its name says.
fn bring_wal(control: &ControlFile, from: &Path, to: &Path, start: Lsn, stop: Lsn) {
    for entry in fs::read_dir(to.join("pg_wal")).unwrap().flatten() {
        if WalName::parse(&entry.file_name().to_string_lossy()).is_ok() {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    let identity = WalIdentity {
        major: control.major().unwrap(),
        system_identifier: control.system_identifier,
        segment_size: control.wal_segment_size,
        page_bytes: control.wal_page_bytes,
    };
    for name in control.wal_segment_size.names_covering(Timeline(1), start, stop) {
        let segment = from.join("pg_wal").join(name.to_string());
        identity.check_segment(name, &fs::read(&segment).unwrap()).unwrap();
        let status = Command::new("cp").arg("-a").arg(&segment).arg(to.join("pg_wal")).status().unwrap();
        assert!(status.success());
    }
}
