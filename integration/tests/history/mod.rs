//! A server whose history is known: rows, and the time, transaction, position and name of each.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use pgcairn_integration::cluster::Builder;
use pgcairn_integration::wait::wait_until;
use pgcairn_integration::{Client, Cluster, Stanza};

/// One row of the history, and where it was written.
#[derive(Clone, Debug)]
pub(crate) struct Mark {
    pub(crate) id: u32,
    /// the transaction that wrote it
    pub(crate) xid: String,
    /// when that committed, to the microsecond
    pub(crate) committed: String,
    /// a moment after that, and a position
    pub(crate) after: String,
    pub(crate) lsn: String,
}

impl Mark {
    /// Writes the row, then a restore point that is called after it.
    pub(crate) fn write(client: &Client, id: u32) -> Self {
        let xid = client.psql(&format!("INSERT INTO marks VALUES ({id}) RETURNING txid_current();"));
        let committed = client.psql(&format!("SELECT pg_xact_commit_timestamp('{xid}'::xid);"));
        let after = client.psql("SELECT clock_timestamp();");
        let lsn = client.psql("SELECT pg_current_wal_insert_lsn();");
        client.psql(&format!("SELECT pg_create_restore_point('mark {id}');"));
        Self { id, xid, committed, after, lsn }
    }
}

/// A server whose history is known, and its stanza.
pub(crate) struct History {
    pub(crate) stanza: Stanza,
    pub(crate) cluster: Cluster,
    pub(crate) marks: Vec<Mark>,
    pub(crate) backups: Vec<String>,
}

impl History {
    /// Of a server of this major with WAL segments of 1 MiB.
    pub(crate) fn new(major: u32) -> Self {
        Self::of(Cluster::builder().major(major).wal_segsize_mb(1))
    }

    /// Marks 1 to 6, backups before 1 and after 3; a table is dropped between 5 and 6. All of it is archived.
    pub(crate) fn of(builder: Builder) -> Self {
        let stanza = Stanza::in_directory();
        let builder = builder.conf("track_commit_timestamp", "on");
        // what an earlier recovery left in both files must not be a second target
        let builder = builder.conf("recovery_target_xid", "4000000000");
        let cluster = stanza.archiving(builder).start();
        cluster.psql("ALTER SYSTEM SET recovery_target_xid = '4000000001';");
        stanza.create(&cluster);
        cluster.psql("CREATE TABLE marks (id int); CREATE TABLE victim AS SELECT generate_series(1, 5000) AS i;");
        let mut backups = vec![stanza.backup(&cluster)];
        let mut marks = Vec::new();
        for id in 1..=6 {
            if id == 6 {
                cluster.psql("DROP TABLE victim;");
            }
            marks.push(Mark::write(&cluster, id));
            match id {
                3 => backups.push(stanza.backup(&cluster)),
                // more than a small segment of WAL, so that marks lie in different ones
                _ => {
                    _ = cluster.psql("CREATE TABLE filler AS SELECT generate_series(1, 20000) AS i; DROP TABLE filler;")
                }
            }
        }
        archive_all(&cluster);
        Self { stanza, cluster, marks, backups }
    }

    pub(crate) fn mark(&self, id: usize) -> &Mark {
        &self.marks[id - 1]
    }

    /// Arguments of a target of each type that holds exactly the marks up to `id`.
    pub(crate) fn targets(&self, id: usize) -> Vec<Vec<String>> {
        let mark = self.mark(id);
        let mut targets = vec![
            vec!["--type=time".to_owned(), format!("--target={}", mark.after)],
            vec!["--type=time".to_owned(), format!("--target={}", mark.committed)],
            vec!["--type=xid".to_owned(), format!("--target={}", mark.xid)],
            vec!["--type=name".to_owned(), format!("--target=mark {}", mark.id)],
            vec!["--type=lsn".to_owned(), format!("--target={}", mark.lsn)],
        ];
        if let Some(next) = self.marks.get(id) {
            let exclusive = || "--target-exclusive".to_owned();
            targets.push(vec!["--type=time".to_owned(), format!("--target={}", next.committed), exclusive()]);
            targets.push(vec!["--type=xid".to_owned(), format!("--target={}", next.xid), exclusive()]);
        }
        targets
    }
}

/// Waits until everything written so far is archived.
pub(crate) fn archive_all(client: &Client) {
    let segment = client.psql("SELECT pg_walfile_name(pg_switch_wal());");
    let archived = || client.psql("SELECT last_archived_wal FROM pg_stat_archiver;") >= segment;
    wait_until(Duration::from_secs(60), "the last segment to be archived", archived);
}

/// The marks that are there.
pub(crate) fn marks(client: &Client) -> String {
    client.psql("SELECT string_agg(id::text, ',' ORDER BY id) FROM marks;")
}

/// The marks 1 to `id`, as [`marks`] gives them.
pub(crate) fn up_to(id: usize) -> String {
    (1..=id).map(|id| id.to_string()).collect::<Vec<_>>().join(",")
}

pub(crate) fn strs(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// The object that holds a segment.
pub(crate) fn object(history: &History, segment: &str) -> PathBuf {
    let directory = Path::new(history.stanza.repo()).join(format!("archive/main/15-1/{}", &segment[..16]));
    let files = std::fs::read_dir(directory).unwrap().flatten().map(|entry| entry.path());
    let of_segment = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(segment);
    files.into_iter().find(of_segment).unwrap()
}
