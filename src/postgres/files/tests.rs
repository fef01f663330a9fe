#![allow(clippy::unwrap_used)]
use super::*;
use crate::postgres::version::Major;
use proptest::prelude::*;

fn layout() -> Layout {
    let tablespace_directory = Major::new(15).unwrap().tablespace_directory();
    Layout { tablespace_directory, relation_segment_pages: 131_072 }
}

fn class(path: &str) -> FileClass {
    layout().classify(path.as_bytes())
}

fn relation(tablespace: u32, database: u32, number: u32, fork: Fork, segment: u32) -> FileClass {
    let first_block = segment * 131_072;
    FileClass::Relation(RelationFile { tablespace, database, number, fork, segment, first_block })
}

#[test]
fn relations_are_found_in_all_their_places() {
    assert_eq!(class("base/5/16385"), relation(1663, 5, 16385, Fork::Main, 0));
    assert_eq!(class("base/5/16385.2"), relation(1663, 5, 16385, Fork::Main, 2));
    assert_eq!(class("base/5/16385_fsm"), relation(1663, 5, 16385, Fork::FreeSpace, 0));
    assert_eq!(class("base/5/16385_vm.1"), relation(1663, 5, 16385, Fork::Visibility, 1));
    assert_eq!(class("base/5/16385_init"), relation(1663, 5, 16385, Fork::Init, 0));
    assert_eq!(class("global/1262"), relation(1664, 0, 1262, Fork::Main, 0));
    assert_eq!(class("pg_tblspc/16384/PG_15_202209061/5/16390_vm"), relation(16384, 5, 16390, Fork::Visibility, 0));
    assert_eq!(class("pg_tblspc/16384"), FileClass::TablespaceLink { oid: 16384 });
}

#[test]
fn the_first_block_follows_the_segment_size_of_the_cluster() {
    let small = Layout { relation_segment_pages: 16, ..layout() };
    let FileClass::Relation(file) = small.classify(b"base/5/16385.3") else { panic!("not a relation") };
    assert_eq!(file.first_block, 48);
    assert!(matches!(class("base/5/16385.32767"), FileClass::Relation(_)));
    assert_eq!(class("base/5/16385.32768"), FileClass::Plain);
}

#[test]
fn other_files_are_kept_without_looking_for_pages() {
    for path in [
        "PG_VERSION",
        "base",
        "base/5",
        "base/5/PG_VERSION",
        "base/5/pg_filenode.map",
        "base/5/016385",
        "base/5/16385.0",
        "base/5/16385_old",
        "base/5/99999999999",
        "base/x/16385",
        "base/5/a/16385",
        "global",
        "global/pg_filenode.map",
        "pg_tblspc",
        "pg_tblspc/readme",
        "pg_tblspc/16384/PG_15_202209061",
        "pg_tblspc/16384/PG_15_202209061/5",
        "pg_tblspc/16384/PG_15_202209061/5/6/7",
        "pg_xact/0000",
        "pg_multixact/offsets/0000",
        "pg_walls",
        "postgresql.auto.conf",
        "current_logfiles",
        "old/postmaster.pid",
        "16385",
    ] {
        assert_eq!(class(path), FileClass::Plain, "{path}");
    }
    assert_eq!(layout().classify(b"base/5/16385\xFF"), FileClass::Plain);
    assert_eq!(class("global/pg_control"), FileClass::Control);
}

#[test]
fn directories_that_are_emptied_at_start_are_kept_empty() {
    for path in EMPTIED.iter().chain(&WAL_DIRECTORIES) {
        assert_eq!(class(path), FileClass::KeepEmptyDirectory, "{path}");
    }
    for path in ["pg_wal/000000010000000000000001", "pg_wal/archive_status/x.ready", "pg_replslot/s/state"] {
        assert_eq!(class(path), FileClass::Skip(SkipReason::InEmptiedDirectory), "{path}");
    }
}

#[test]
fn what_belongs_to_the_running_server_is_left_out() {
    for path in LEFT_OUT {
        assert_eq!(class(path), FileClass::Skip(SkipReason::OfRunningServer), "{path}");
    }
    for path in ["global/pg_internal.init", "base/5/pg_internal.init.1234"] {
        assert_eq!(class(path), FileClass::Skip(SkipReason::RelationCache), "{path}");
    }
    for path in ["base/pgsql_tmp", "base/pgsql_tmp/pgsql_tmp12.0", "base/pgsql_tmp/x.fileset/0"] {
        assert_eq!(class(path), FileClass::Skip(SkipReason::QuerySpill), "{path}");
    }
    let spill = "pg_tblspc/16384/PG_15_202209061/pgsql_tmp";
    assert_eq!(class(spill), FileClass::Skip(SkipReason::QuerySpill));
    for path in ["pg_tblspc/16384/PG_14_202107181", "pg_tblspc/16384/lost+found/a/b"] {
        assert_eq!(class(path), FileClass::Skip(SkipReason::OfOtherVersion), "{path}");
    }
}

#[test]
fn temporary_relations_are_left_out() {
    for path in ["base/5/t3_16385", "base/5/t10_16385_fsm", "base/5/t3_16385.1", "global/t0_1"] {
        assert_eq!(class(path), FileClass::Skip(SkipReason::TemporaryRelation), "{path}");
    }
    for path in ["base/5/t_16385", "base/5/tx_1", "base/5/t3_", "base/5/t3", "base/5/table_3"] {
        assert_eq!(class(path), FileClass::Plain, "{path}");
    }
}

#[test]
fn unlogged_relations_keep_their_init_fork_only() {
    let names = ["16393", "16393.1", "16393_init", "16393_fsm", "16394", "16394_fsm", "PG_VERSION", "t3_16393"];
    let unlogged = UnloggedRelations::among(names.iter().map(|name| name.as_bytes()));
    let dropped: Vec<_> = names.iter().filter(|name| unlogged.drops(name.as_bytes())).collect();
    assert_eq!(dropped, [&"16393", &"16393.1", &"16393_fsm"]);
}

proptest! {
    #[test]
    fn any_path_is_answered(path: Vec<u8>) {
        let _ = layout().classify(&path);
    }

    #[test]
    fn a_relation_is_where_its_name_says(
        path in "(base/[0-9]{1,11}|global|pg_tblspc/[0-9]{1,5}/PG_15_202209061/[0-9]{1,3})/t?[0-9_]{1,11}(_fsm|_vm|_init)?(\\.[0-9]{1,6})?"
    ) {
        if let FileClass::Relation(file) = class(&path) {
            let fork = match file.fork {
                Fork::Main => "",
                Fork::FreeSpace => "_fsm",
                Fork::Visibility => "_vm",
                Fork::Init => "_init",
            };
            let segment = if file.segment == 0 { String::new() } else { format!(".{}", file.segment) };
            let name = format!("/{}{fork}{segment}", file.number);
            prop_assert!(path.ends_with(&name));
            prop_assert_eq!(file.first_block, file.segment * 131_072);
        }
    }
}
