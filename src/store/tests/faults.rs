//! Retry, record and fault, with each other.

use std::time::Instant;

use super::*;

const TRANSIENT: Effect = Effect::Fail(ErrorKind::Transient);

fn flaky(attempts: u32) -> (Arc<FaultPlan>, Arc<Recording>, Retry<Record<Fault<MemoryStore>>>) {
    let fault = Fault::new(MemoryStore::new());
    let plan = fault.plan();
    let record = Record::new(fault);
    let recording = record.recording();
    (plan, recording, Retry::new(record, quick(attempts)))
}

#[test]
fn what_fails_and_then_succeeds_is_not_noticed() {
    let (plan, recording, store) = flaky(4);
    for effect in [TRANSIENT, Effect::FailAfter(ErrorKind::Transient)] {
        plan.next(3, effect);
        put(&store, "a", "x");
        plan.next(3, effect);
        assert_eq!(store.get("a").unwrap(), "x");
        plan.next(2, effect);
        assert_eq!(store.get_range("a", 0, 1).unwrap(), "x");
        plan.next(2, effect);
        assert_eq!(store.list("", None).unwrap().objects.len(), 1);
        plan.next(2, effect);
        assert_eq!(store.names("").unwrap(), ["a"]);
        plan.next(2, effect);
        assert_eq!(store.size("a").unwrap(), Some(1));
        plan.next(1, effect);
        store.delete(&["a".into()]).unwrap();
        assert_eq!(store.size("a").unwrap(), None);
    }
    assert_eq!(recording.count(Operation::Put), Count { calls: 8, errors: 6, bytes: 2 });
    assert_eq!(recording.count(Operation::Get), Count { calls: 8, errors: 6, bytes: 2 });
    assert_eq!(recording.gets(), Count { calls: 14, errors: 10, bytes: 4 });
}

#[test]
fn it_gives_up_and_says_so() {
    let (plan, recording, store) = flaky(3);
    plan.from_nth(1, TRANSIENT);
    let error = store.get("a").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Transient);
    assert_eq!(recording.count(Operation::Get).calls, 3);
    let text = shown(&error);
    assert!(text.starts_with("cannot read memory:/a: gave up after 3 tries in "), "{text}");
    assert!(text.ends_with(": a fault made for a test"), "{text}");
}

#[test]
fn what_will_not_change_is_not_tried_again() {
    for kind_made in
        [ErrorKind::Denied, ErrorKind::Truncated, ErrorKind::NotFound, ErrorKind::NoSpace, ErrorKind::Other]
    {
        let (plan, recording, store) = flaky(5);
        plan.nth(1, Effect::Fail(kind_made));
        assert_eq!(kind(store.get("a")), kind_made);
        assert_eq!(recording.total().calls, 1);
    }
}

#[test]
fn the_deadline_ends_the_tries() {
    let fault = Fault::new(MemoryStore::new());
    let plan = fault.plan();
    plan.from_nth(1, TRANSIENT);
    plan.from_nth(1, Effect::Delay(Duration::from_millis(20)));
    let policy = RetryPolicy { deadline: Duration::from_millis(100), ..quick(1_000_000) };
    let start = Instant::now();
    assert_eq!(kind(Retry::new(fault, policy).get("a")), ErrorKind::Transient);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(plan.calls() < 100);
}

#[test]
fn waits_are_bounded_and_differ() {
    let policy = RetryPolicy::default();
    let waits: Vec<Duration> = (1..=100).map(|tries| policy.delay(tries)).collect();
    assert!(waits[0] <= Duration::from_millis(100));
    assert!(waits.iter().all(|wait| *wait <= policy.delay_max));
    assert!(waits[20..].iter().any(|wait| *wait != waits[20]));
}

#[test]
fn the_nth_call_fails_before_or_after_it_arrived() {
    let store = Fault::new(MemoryStore::new());
    let plan = store.plan();
    plan.nth(2, Effect::Fail(ErrorKind::Denied));
    plan.nth(3, Effect::FailAfter(ErrorKind::Transient));
    put(&store, "one", "1");
    assert_eq!(kind(store.put("two", Body::Bytes("2".into()))), ErrorKind::Denied);
    assert_eq!(kind(store.put("three", Body::Bytes("3".into()))), ErrorKind::Transient);
    put(&store, "four", "4");
    assert_eq!(store.names("").unwrap(), ["four", "one", "three"]);
}

#[test]
fn reads_can_lie_by_predicate() {
    let store = Fault::new(MemoryStore::new());
    let plan = store.plan();
    put(&store, "a", vec![0; 4]);
    plan.add(|call| call.operation == Operation::GetRange && call.key == "a" && call.offset == 1, Effect::Flip(1));
    plan.add(|call| call.operation == Operation::Get, Effect::Cut(3));
    assert_eq!(store.get_range("a", 0, 2).unwrap(), vec![0, 0]);
    assert_eq!(store.get_range("a", 1, 2).unwrap(), vec![0, 1]);
    assert_eq!(store.get("a").unwrap().len(), 3);
    plan.clear();
    assert_eq!(store.get("a").unwrap().len(), 4);
}

#[test]
fn calls_are_kept_when_asked_for() {
    let store = Record::new(MemoryStore::new());
    let recording = store.recording();
    put(&store, "a", "before");
    recording.keep_calls();
    store.get_range("a", 1, 2).unwrap();
    store.delete(&["a".into(), "b".into()]).unwrap();
    let range = Call { number: 2, operation: Operation::GetRange, key: "a".into(), offset: 1, len: 2 };
    let delete = Call { number: 3, operation: Operation::Delete, key: "a".into(), offset: 0, len: 2 };
    assert_eq!(recording.calls(), [range, delete]);
    recording.reset();
    assert_eq!(recording.total(), Count::default());
    assert_eq!(recording.calls(), []);
}
