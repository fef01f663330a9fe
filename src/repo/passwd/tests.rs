#![allow(clippy::unwrap_used)]
use std::sync::Arc;

use super::*;
use crate::retention::tests::database;
use crate::store::{Body, Effect, ErrorKind, Fault, FaultPlan, MemoryStore, Store};

fn passphrase(text: &str) -> Passphrase {
    Passphrase::new(text.into()).unwrap()
}

/// An encrypted stanza with the passphrase `old`.
fn made() -> (Repository, Arc<FaultPlan>) {
    let store = Fault::new(MemoryStore::new());
    let plan = store.plan();
    let open = Repository::new(Arc::new(store), "main").unwrap();
    let repository = open.create_secret(&passphrase("old")).unwrap();
    repository.create_stanza(database()).unwrap();
    (repository, plan)
}

/// Whether the passphrase opens the stanza, and what it shows is right.
fn opens(repository: &Repository, text: &str) -> bool {
    let opened = Repository::open(repository.store.clone(), "main", Some(&passphrase(text)));
    opened.is_ok_and(|opened| opened.archive_info().unwrap().history == [database()])
}

fn held(repository: &Repository) -> usize {
    let held = repository.store.names("key/main/").unwrap().len();
    assert_ne!(held, 0, "the secret is lost");
    held
}

#[test]
fn only_the_new_passphrase_opens_what_is_there() {
    let (repository, _) = made();
    for (from, to) in [("old", "new"), ("new", "newer"), ("newer", "old")] {
        change_passphrase(&repository, &passphrase(from), &passphrase(to)).unwrap();
        assert_eq!((opens(&repository, from), opens(&repository, to), held(&repository)), (false, true, 1));
    }
    let error = change_passphrase(&repository, &passphrase("new"), &passphrase("mine")).unwrap_err();
    assert!(error.to_string().contains("the passphrase does not open stanza main"), "{error}");
    change_passphrase(&repository, &passphrase("old"), &passphrase("old")).unwrap();
    assert!(opens(&repository, "old"));
    assert!(repository.store.names("lock/main/").unwrap().is_empty());
}

#[test]
fn one_passphrase_opens_whichever_call_fails_and_the_next_run_ends_it() {
    let mut n = 1;
    loop {
        let mut failed = 0;
        // the last word on each is another one's: with what was given first, with what was to be, with a third
        for (effect, from, to) in [
            (Effect::Fail(ErrorKind::Transient), "old", "new"),
            (Effect::FailAfter(ErrorKind::Transient), "old", "third"),
        ] {
            let (repository, plan) = made();
            plan.from_nth(n, effect);
            let result = change_passphrase(&repository, &passphrase("old"), &passphrase("new"));
            failed += usize::from(result.is_err());
            plan.clear();
            let (old, new) = (opens(&repository, "old"), opens(&repository, "new"));
            assert!(old || new, "call {n}: nobody can read this any more");
            assert!(new || result.is_err(), "call {n}: it said that all is well");
            held(&repository);
            let from = if old { from } else { "new" };
            change_passphrase(&repository, &passphrase(from), &passphrase(to)).unwrap();
            assert!(opens(&repository, to), "call {n}");
            assert_eq!(held(&repository), 1, "call {n}");
            if to != "new" {
                assert!(!opens(&repository, "new") && !opens(&repository, "old"), "call {n}");
            }
        }
        if failed == 0 {
            break;
        }
        n += 1;
    }
    assert!(n > 8, "only {n} calls");
}

#[test]
fn a_key_that_is_damaged_does_not_hide_the_other_one() {
    let (repository, plan) = made();
    // the new one is there, the old one was not removed yet
    plan.add(|call| call.operation == crate::store::Operation::Delete, Effect::Fail(ErrorKind::Transient));
    change_passphrase(&repository, &passphrase("old"), &passphrase("new")).unwrap_err();
    plan.clear();
    assert_eq!(held(&repository), 2);
    repository.store.put("key/main/a", Body::Bytes(b"rubbish".as_slice().into())).unwrap();
    assert!(opens(&repository, "new"));
    let error = Repository::open(repository.store.clone(), "main", Some(&passphrase("old"))).unwrap_err();
    assert!(error.is_damage() && error.hint_text().unwrap().contains("key/main/a"), "{error}");
    change_passphrase(&repository, &passphrase("new"), &passphrase("newer")).unwrap();
    assert_eq!((opens(&repository, "newer"), opens(&repository, "new"), held(&repository)), (true, false, 1));
}

#[test]
fn a_stanza_that_is_not_encrypted_gets_no_passphrase() {
    let repository = Repository::new(Arc::new(MemoryStore::new()), "main").unwrap();
    repository.create_stanza(database()).unwrap();
    let error = change_passphrase(&repository, &passphrase("old"), &passphrase("new")).unwrap_err();
    assert!(error.to_string().contains("is not encrypted"), "{error}");
    assert!(repository.store.names("key/main/").unwrap().is_empty());
}
