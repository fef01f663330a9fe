//! A clock that can be set for single programs, while they run.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Stands in front of the C library's clock, and adds the seconds in the file that `WRONG_CLOCK` names.
const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long seconds(void) {
    static volatile long *shared;
    if (!shared) {
        const char *path = getenv("WRONG_CLOCK");
        int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
        if (file < 0) return 0;
        void *mapped = mmap(NULL, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
        close(file);
        if (mapped == MAP_FAILED) return 0;
        shared = mapped;
    }
    return *shared;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int failed = syscall(SYS_clock_gettime, clock, time);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) time->tv_sec += seconds();
    return failed;
}

int gettimeofday(struct timeval *time, void *zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    time->tv_sec = now.tv_sec;
    time->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
"#;

/// The clock of the programs that got [`Self::environment`].
#[derive(Clone, Debug)]
pub struct WrongClock {
    library: PathBuf,
    file: PathBuf,
}

impl WrongClock {
    /// A clock that is right so far; its files are in `directory`.
    ///
    /// # Panics
    /// When there is no C compiler, without which nothing here could have been built.
    pub fn new(directory: &Path) -> Self {
        let (library, file, source) = (directory.join("clock.so"), directory.join("clock"), directory.join("clock.c"));
        fs::write(&source, SOURCE).expect("the source can be written");
        let compiled = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(&source).output();
        let compiled = compiled.expect("there is a C compiler");
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        let clock = Self { library, file };
        clock.set(0);
        fs::set_permissions(&clock.file, Permissions::from_mode(0o644)).expect("its mode can be set");
        clock
    }

    /// Sets it: so many seconds ahead.
    ///
    /// # Panics
    /// When that cannot be written.
    pub fn set(&self, seconds: i64) {
        use std::os::unix::fs::FileExt;
        // in place: the programs have it mapped
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).open(&self.file);
        let written = file.and_then(|file| file.write_all_at(&seconds.to_ne_bytes(), 0));
        written.unwrap_or_else(|error| panic!("cannot set the clock: {error}"));
    }

    /// What a program needs to see this clock.
    pub fn environment(&self) -> [(&'static str, String); 2] {
        [("LD_PRELOAD", self.library.display().to_string()), ("WRONG_CLOCK", self.file.display().to_string())]
    }
}
