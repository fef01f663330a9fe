//! Points in time: what a server holds that was brought to a moment is what the history says.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use pgcairn_integration::wait::wait_until;
use pgcairn_integration::{Client, Cluster, Stanza, StopMode};

/// One row of the history, and where it was written.
#[derive(Clone, Debug)]
struct Mark {
    id: u32,
    /// the transaction that wrote it
    xid: String,
    /// when that committed, to the microsecond
    committed: String,
    /// a moment after that, and a position
    after: String,
    lsn: String,
}

impl Mark {
    /// Writes the row, then a restore point that is called after it.
    fn write(client: &Client, id: u32) -> Self {
        let xid = client.psql(&format!("INSERT INTO marks VALUES ({id}) RETURNING txid_current();"));
        let committed = client.psql(&format!("SELECT pg_xact_commit_timestamp('{xid}'::xid);"));
        let after = client.psql("SELECT clock_timestamp();");
        let lsn = client.psql("SELECT pg_current_wal_insert_lsn();");
        client.psql(&format!("SELECT pg_create_restore_point('mark {id}');"));
        Self { id, xid, committed, after, lsn }
    }
}

/// A server whose history is known, and its stanza.
struct History {
    stanza: Stanza,
    cluster: Cluster,
    marks: Vec<Mark>,
    backups: Vec<String>,
}

impl History {
    /// Marks 1 to 6, backups before 1 and after 3; a table is dropped between 5 and 6. All of it is archived.
    fn new(major: u32) -> Self {
        let stanza = Stanza::in_directory();
        let builder = Cluster::builder().major(major).wal_segsize_mb(1).conf("track_commit_timestamp", "on");
        let cluster = stanza.archiving(builder).start();
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
                // more than a segment of WAL, so that marks lie in different ones
                _ => _ = cluster.psql("CREATE TABLE filler AS SELECT generate_series(1, 20000) AS i; DROP TABLE filler;"),
            }
        }
        let history = Self { stanza, cluster, marks, backups };
        history.archive_all(&history.cluster);
        history
    }

    /// Waits until everything written so far is archived.
    fn archive_all(&self, client: &Client) {
        let segment = client.psql("SELECT pg_walfile_name(pg_switch_wal());");
        let archived = || client.psql("SELECT last_archived_wal FROM pg_stat_archiver;") >= segment;
        wait_until(Duration::from_secs(60), "the last segment to be archived", archived);
    }

    fn mark(&self, id: usize) -> &Mark {
        &self.marks[id - 1]
    }

    /// Arguments of a target of each type that holds exactly the marks up to `id`.
    fn targets(&self, id: usize) -> Vec<Vec<String>> {
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

fn marks(client: &Client) -> String {
    client.psql("SELECT string_agg(id::text, ',' ORDER BY id) FROM marks;")
}

fn up_to(id: usize) -> String {
    (1..=id).map(|id| id.to_string()).collect::<Vec<_>>().join(",")
}

fn strs(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

#[test]
fn a_clone_is_at_its_target() {
    let history = History::new(15);
    for id in [2, 4, 5] {
        for target in history.targets(id) {
            let clone = history.stanza.start("point", &strs(&target));
            assert_eq!(marks(&clone), up_to(id), "{target:?}: {}", clone.told());
            clone.psql("INSERT INTO marks VALUES (1000);");
            clone.stop(&[]);
        }
    }
    history.stanza.assert_nothing_left();
}
