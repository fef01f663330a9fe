//! A Patroni cluster and its repository: replicas from there, and, when all else is lost, the cluster itself.
//!
//! The configuration is `contrib/patroni/patroni.yml`, with the addresses and directories of this machine.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use pgcairn_integration::client::Beside;
use pgcairn_integration::patroni::{Etcd, Node};
use pgcairn_integration::process::run_ok;
use pgcairn_integration::{Client, Stanza, bin, install, wait_until};
use serde_json::Value;

const LONG: Duration = Duration::from_secs(60);
const CONFIGURATION: &str = include_str!("../../contrib/patroni/patroni.yml");
const PASSWORD: &str = "change-me";

/// The drill: what is there at each of its steps.
struct Drill {
    stanza: Stanza,
}

impl Drill {
    /// Starts a node whose configuration differs from the documented one by what `changes` replace.
    fn node(&self, etcd: &Etcd, name: &str, changes: &[(&str, &str)]) -> Node {
        let place = self.stanza.place();
        let program = bin::path().display().to_string();
        let data = Node::data_directory_in(place, name).display().to_string();
        let bin = install::server(15).display().to_string();
        // the drill has no time to lose, and the server's own socket is nobody else's
        let socket = format!("archive_timeout: 60s\n        unix_socket_directories: {}", place.join(name).display());
        let of_this_machine = [
            ("/usr/local/bin/pgcairn", program.as_str()),
            ("/var/lib/postgresql/15/main", &data),
            ("/usr/lib/postgresql/15/bin", &bin),
            ("loop_wait: 10", "loop_wait: 1"),
            ("archive_timeout: 60s", &socket),
        ];
        let configuration = of_this_machine.iter().chain(changes).fold(CONFIGURATION.to_owned(), |text, (from, to)| {
            assert!(text.contains(from), "patroni.yml says nothing of {from}");
            text.replace(from, to)
        });
        Node::start(place, name, etcd, &configuration, &self.stanza.environment(), PASSWORD)
    }

    /// A backup of the server of the node that leads.
    fn backup(&self, of: &Node, kind: &str) -> Value {
        let options = ["backup", "--output=json", &format!("--type={kind}"), "--pg", of.client().conninfo()];
        serde_json::from_str(&self.stanza.run(options).ok()).unwrap()
    }

    /// Ends the segment and waits until all before are archived too.
    fn archive_all(&self, of: &Node) {
        let segment = of.client().psql("SELECT pg_walfile_name(pg_switch_wal());");
        let archived = || of.client().psql("SELECT last_archived_wal FROM pg_stat_archiver;") >= segment;
        wait_until(LONG, "the last segment to be archived", archived);
    }

    /// The timelines that can be reached, without any gap.
    fn timelines(&self) -> Vec<u64> {
        let info: Value = serde_json::from_str(&self.stanza.run(["info", "--output=json"]).ok()).unwrap();
        let timelines = info[0]["archive"][0]["timeline"].as_array().unwrap().clone();
        for timeline in &timelines {
            assert_eq!(timeline["gap"], serde_json::json!([]), "{info:#}");
            assert!(!timeline["range"].as_array().unwrap().is_empty(), "{info:#}");
        }
        timelines.iter().map(|timeline| timeline["id"].as_u64().unwrap()).collect()
    }
}

fn timeline(of: &Node) -> String {
    of.client().psql("SELECT timeline_id FROM pg_control_checkpoint();")
}

/// Ends a load, and waits until the server has ended the last of its transactions.
fn end_of(load: Beside, of: &Node) {
    drop(load);
    let sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'pgbench';";
    wait_until(LONG, "the load to end", || of.client().psql(sessions) == "0");
}

/// Waits until a replica has replayed what its leader wrote.
fn catch_up(leader: &Client, replica: &Client) {
    let position = leader.psql("SELECT pg_current_wal_lsn();");
    let passed = format!("SELECT pg_last_wal_replay_lsn() >= '{position}';");
    wait_until(LONG, "the replica", || replica.psql(&passed) == "t");
}

#[test]
fn a_cluster_comes_back_from_its_repository_alone() {
    let drill = Drill { stanza: Stanza::in_directory() };
    let from_repository = "replica has been created using pgcairn";

    // a leader, a backup under load, a replica made of that
    let etcd = Etcd::start(drill.stanza.place(), "etcd");
    let first = drill.node(&etcd, "node1", &[]);
    first.wait_to_lead();
    drill.stanza.run(["stanza-create", "--pg", first.client().conninfo()]).ok();
    first.client().pgbench(&["-i", "-q", "-s", "2"]);
    let load = first.client().pgbench_beside(&["-c", "2", "-n", "-T", "600"]);
    drill.backup(&first, "full");
    let second = drill.node(&etcd, "node2", &[]);
    second.wait_to_follow();
    assert!(second.log().contains(from_repository), "{}", second.log());

    // the other one leads, and archives
    end_of(load, &first);
    first.hand_over_to("node1", "node2");
    second.wait_to_lead();
    first.wait_to_follow();
    let load = second.client().pgbench_beside(&["-c", "2", "-n", "-T", "600"]);
    drill.backup(&second, "incr");
    end_of(load, &second);
    let expected = second.client().fingerprint();
    second.client().psql("SELECT pg_create_restore_point('before the accident');");
    // what must not come back, also a backup that lies behind
    second.client().psql("UPDATE pgbench_accounts SET abalance = 0; DROP TABLE pgbench_history;");
    drill.backup(&second, "incr");
    drill.archive_all(&second);
    assert_eq!(timeline(&second), "2");

    // nothing is left but the repository
    first.destroy();
    second.destroy();
    drop(etcd);

    let etcd = Etcd::start(drill.stanza.place(), "etcd-again");
    let rebuild =
        [("method: initdb", "method: pgcairn"), ("--type=default", "--type=name --target='before the accident'")];
    let first = drill.node(&etcd, "rebuilt1", &rebuild);
    first.wait_to_lead();
    assert_eq!(first.client().fingerprint(), expected);
    let second = drill.node(&etcd, "rebuilt2", &rebuild);
    second.wait_to_follow();
    assert!(second.log().contains(from_repository), "{}", second.log());
    catch_up(first.client(), second.client());
    assert_eq!(second.client().fingerprint(), expected);

    // and it goes on
    first.client().pgbench(&["-c", "2", "-n", "-t", "200"]);
    drill.backup(&first, "incr");
    let later = first.client().fingerprint();
    first.client().psql("SELECT pg_create_restore_point('later');");
    first.client().pgbench(&["-n", "-t", "100"]);
    drill.archive_all(&first);
    assert_eq!(timeline(&first), "3");
    assert_eq!(drill.timelines(), [1, 2, 3]);
    drill.stanza.run(["verify"]).ok();
    let clone = drill.stanza.start("later", &["later"]);
    assert_eq!(clone.fingerprint(), later);
    clone.stop(&[]);
    // along the line that was left, too
    let clone = drill.stanza.start("left", &["before the accident", "--target-timeline=2"]);
    assert_eq!(clone.fingerprint(), expected);
    clone.stop(&[]);
    let balanced = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history);";
    assert_eq!(first.client().psql(balanced), "t");
    let mut amcheck = install::client("pg_amcheck");
    run_ok(amcheck.args(["--all", "--install-missing", "--maintenance-db", first.client().conninfo()]), &[], LONG);
    drop((first, second, etcd));
    drill.stanza.assert_nothing_left();
}
