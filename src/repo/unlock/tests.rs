#![allow(clippy::unwrap_used)]
use bytes::Bytes;

use super::*;
use crate::format::info::LockKind;
use crate::format::manifest::Database;
use crate::store::{MemoryStore, Operation, Record};

fn passphrase(text: &str) -> Passphrase {
    Passphrase::new(text.into()).unwrap()
}

fn database() -> Database {
    Database {
        id: 1,
        version: 15,
        system_id: 77_123_456_789,
        catalog_version: 1,
        control_version: 1300,
        page_size: 8192,
        segment_size: 1 << 30,
        wal_page_size: 8192,
        wal_segment_size: 1 << 24,
        checksums: true,
    }
}

fn create(store: &Arc<dyn Store>, stanza: &str, text: &str) -> Repository {
    let open = Repository::new(Arc::clone(store), stanza).unwrap();
    let repository = open.create_secret(&passphrase(text)).unwrap();
    repository.create_stanza(database()).unwrap();
    repository
}

#[track_caller]
fn refuses(store: &Arc<dyn Store>, stanza: &str, text: Option<&str>, why: &str) {
    let passphrase = text.map(passphrase);
    let error = Repository::open(Arc::clone(store), stanza, passphrase.as_ref()).unwrap_err();
    assert!(error.to_string().contains(why) && error.hint_text().is_some(), "{error}");
}

#[test]
fn a_stanza_opens_with_its_passphrase_alone() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    create(&store, "main", "word");
    let plain = Repository::new(Arc::clone(&store), "plain").unwrap();
    plain.create_stanza(database()).unwrap();
    let opened = Repository::open(Arc::clone(&store), "main", Some(&passphrase("word"))).unwrap();
    assert_eq!(opened.archive_info().unwrap().history, [database()]);
    assert!(Repository::open(Arc::clone(&store), "plain", None).unwrap().archive_info().is_ok());
    refuses(&store, "main", Some("other"), "the passphrase does not open stanza main");
    refuses(&store, "main", None, "stanza main is encrypted, and no passphrase is given");
    refuses(&store, "plain", Some("word"), "stanza plain is not encrypted");
    refuses(&store, "none", Some("word"), "stanza none does not exist");
    assert!(plain.create_secret(&passphrase("word")).unwrap_err().to_string().contains("is not encrypted"));
    // who does not look for the key sees it when he reads what he must read first
    let unaware = Repository::new(Arc::clone(&store), "main").unwrap();
    for error in [unaware.archive_info().unwrap_err(), unaware.create_stanza(database()).unwrap_err()] {
        assert!(error.to_string().contains("is encrypted"), "{error}");
    }
    store.delete(&["key/main/a".to_owned()]).unwrap();
    refuses(&store, "main", Some("word"), "its key is gone");
    assert!(unaware.create_secret(&passphrase("word")).unwrap_err().to_string().contains("its key is gone"));
}

#[test]
fn a_key_opens_only_its_own_stanza() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    create(&store, "main", "word");
    create(&store, "other", "word");
    let stolen = store.get("key/other/a").unwrap();
    store.put("key/main/a", Body::Bytes(stolen)).unwrap();
    refuses(&store, "main", Some("word"), "the passphrase does not open stanza main");
}

#[test]
fn a_creation_that_died_is_taken_up() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let open = Repository::new(Arc::clone(&store), "main").unwrap();
    open.create_secret(&passphrase("word")).unwrap();
    let key = store.get("key/main/a").unwrap();
    assert!(open.create_secret(&passphrase("other")).unwrap_err().to_string().contains("does not open"));
    let repository = create(&store, "main", "word");
    assert_eq!(store.get("key/main/a").unwrap(), key);
    assert!(!repository.create_stanza(database()).unwrap());
}

#[test]
fn nothing_legible_is_stored_and_opening_costs_one_request() {
    let record = Record::new(MemoryStore::new());
    let recording = record.recording();
    let store: Arc<dyn Store> = Arc::new(record);
    let repository = create(&store, "main", "word");
    let lock = repository.lock(LockKind::Stanza, "planted").unwrap();
    let page = store.list("", None).unwrap();
    assert_eq!(page.objects.len(), 6, "{:?}", page.objects);
    for object in page.objects {
        let bytes: Bytes = store.get(&object.key).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        for word in ["planted", "77123456789", "history", "heartbeat", "\"host\""] {
            assert!(!text.contains(word), "{word} in {}: {text}", object.key);
        }
    }
    drop(lock);
    recording.reset();
    Repository::open(Arc::clone(&store), "main", Some(&passphrase("word"))).unwrap();
    assert_eq!((recording.count(Operation::Get).calls, recording.total().calls), (1, 1));
}
