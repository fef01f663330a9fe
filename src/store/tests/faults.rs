//! Retry, record and fault, with each other.

use std::time::Instant;

use super::*;

const TRANSIENT: Effect = Effect::Fail(ErrorKind::Transient);

fn flaky() -> (Arc<FaultPlan>, Arc<Recording>, Retry<Record<Fault<MemoryStore>>>) {
    let fault = Fault::new(MemoryStore::new());
    let plan = fault.plan();
    let record = Record::new(fault);
    let recording = record.recording();
    (plan, recording, Retry::new(record, quick()))
}

#[test]
fn what_fails_and_then_succeeds_is_not_noticed() {
    let (plan, recording, store) = flaky();
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
fn it_gives_up_at_the_deadline_and_says_so() {
    let fault = Fault::new(MemoryStore::new());
    let plan = fault.plan();
    plan.from_nth(1, TRANSIENT);
    let start = Instant::now();
    let store = Retry::new(fault, RetryPolicy { deadline: Duration::from_millis(300), ..quick() });
    let error = store.get("a").unwrap_err();
    assert_eq!(error.kind, ErrorKind::Transient);
    // a fixed number of tries would have been over long before
    assert!(start.elapsed() >= Duration::from_millis(200), "{:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(plan.calls() > 10, "{}", plan.calls());
    let text = shown(&error);
    assert!(text.starts_with("cannot read memory:/a: gave up after ") && text.contains(" tries in 0."), "{text}");
    assert!(text.ends_with(": a fault made for a test"), "{text}");
}

#[test]
fn an_outer_deadline_ends_the_tries_too() {
    let fault = Fault::new(MemoryStore::new());
    let plan = fault.plan();
    plan.from_nth(1, TRANSIENT);
    let store = Retry::new(fault, quick());
    let start = Instant::now();
    let error = deadline::within(Duration::from_millis(100), || store.get("a").unwrap_err());
    assert_eq!(error.kind, ErrorKind::Transient);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
}

#[test]
fn a_program_that_ends_does_not_wait() {
    let fault = Fault::new(MemoryStore::new());
    fault.plan().from_nth(1, TRANSIENT);
    let stop = Stop::default();
    let slow = RetryPolicy { delay_base: Duration::from_secs(60), delay_max: Duration::from_secs(60), ..quick() };
    let store = Retry::new(fault, RetryPolicy { deadline: Duration::from_secs(3600), ..slow }).until(stop.clone());
    let start = Instant::now();
    std::thread::scope(|scope| {
        let read = scope.spawn(|| kind(store.get("a")));
        std::thread::sleep(Duration::from_millis(50));
        stop.set();
        assert_eq!(read.join().unwrap(), ErrorKind::Transient);
    });
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}

#[test]
fn what_will_not_change_is_not_tried_again() {
    for kind_made in [ErrorKind::Denied, ErrorKind::NotFound, ErrorKind::NoSpace, ErrorKind::Other] {
        let (plan, recording, store) = flaky();
        plan.nth(1, Effect::Fail(kind_made));
        assert_eq!(kind(store.get("a")), kind_made);
        assert_eq!(recording.total().calls, 1);
    }
}

#[test]
fn an_object_is_short_when_it_is_so_twice() {
    let (plan, recording, store) = flaky();
    put(&store, "a", "0123");
    plan.next(1, Effect::Fail(ErrorKind::Truncated));
    assert_eq!(store.get_range("a", 0, 4).unwrap(), "0123");
    recording.reset();
    assert_eq!(kind(store.get_range("a", 0, 5)), ErrorKind::Truncated);
    assert_eq!(recording.count(Operation::GetRange).calls, 2);
}

#[test]
fn waits_are_bounded_and_differ() {
    let policy = RetryPolicy::default();
    let waits = |left| (1..=100).map(|tries| policy.next_delay(tries, left)).collect::<Vec<_>>();
    let long = waits(Duration::from_secs(100));
    assert!(long[0] <= Some(Duration::from_millis(100)));
    assert!(long.iter().all(|wait| wait.is_some_and(|wait| wait <= policy.delay_max)));
    assert!(long[20..].iter().any(|wait| *wait != long[20]));
    // one more try fits into what is left
    assert!(waits(Duration::from_secs(3)).iter().all(|wait| wait.is_some_and(|wait| wait <= Duration::from_secs(2))));
    assert!(waits(Duration::from_secs(1)).iter().all(Option::is_none));
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
