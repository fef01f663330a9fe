//! Backups, expires, mounts, verifies, damage and deaths in a random order on one repository, held after each step against a
//! model of what must be readable.
//!
//! Each seed is a story of its own. `PGCAIRN_SCHEDULE_SEEDS=100..200` tells others than those of every run; `=7..8` tells one
//! again. What a story did is printed when it fails. Names of objects are random, and threads run as they like, so a story
//! told again is not always the same to the last call.
#![allow(clippy::print_stderr)]

mod check;
mod damage;
mod model;
mod overlap;
mod steps;
mod world;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use world::World;

/// Stories of every run.
const SEEDS: Range<u64> = 0..24;
/// Steps of each.
const STEPS: usize = 30;

#[test]
fn whatever_happens_in_whatever_order_what_must_be_readable_is() {
    let seeds = match std::env::var("PGCAIRN_SCHEDULE_SEEDS") {
        Ok(text) => {
            let (from, to) = text.split_once("..").unwrap();
            from.parse().unwrap()..to.parse().unwrap()
        }
        Err(_) => SEEDS,
    };
    let next = AtomicU64::new(seeds.start);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    tell(seed);
                }
            });
        }
    });
}

fn tell(seed: u64) {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
    }
    world.end();
}

/// Random numbers that a seed decides (splitmix64).
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True once in `times`.
    fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }
}
