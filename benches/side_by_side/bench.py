"""The place where everything happens: directories, child processes, and that nothing of it is left at the end."""

import contextlib
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass

from .report import Report

POSTGRES_BIN = pathlib.Path("/usr/lib/postgresql/15/bin")


class Failed(Exception):
    """A command that had to succeed did not."""


@dataclass
class Ran:
    """A command that has run."""

    seconds: float
    processor_seconds: float
    rss_max_mb: float
    output: str


class Bench:
    def __init__(self):
        base = pathlib.Path(os.environ.get("BENCH_DIR", "/tmp/pgcairn-bench"))
        self.base = base
        self.work = base / "work"
        self.gb = float(os.environ.get("BENCH_GB", "2"))
        self.repeat = int(os.environ.get("BENCH_REPEAT", "5"))
        self.five = os.environ.get("BENCH_FIVE", "0") == "1"
        self.keep = os.environ.get("BENCH_KEEP", "0") == "1"
        self.pgcairn = os.environ["PGCAIRN_BIN"]
        self.s3_server = os.environ["PGCAIRN_S3_SERVER_BIN"]
        self.report = Report()
        self.undo = contextlib.ExitStack()

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, interrupted)
        self.undo.callback(self.clear)
        self.work.mkdir(parents=True, exist_ok=True)
        shutil.chown(self.work, "postgres", "postgres")
        return self

    def __exit__(self, *reason):
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self.undo.close()

    def clear(self):
        if not self.keep:
            shutil.rmtree(self.work, ignore_errors=True)

    def say(self, text):
        print(text, flush=True)

    # The cluster and the two repositories are built when a topic first asks for them.

    @functools.cached_property
    def cluster(self):
        from .cluster import Cluster

        return Cluster.built(self, "cluster", self.gb)

    @functools.cached_property
    def ours(self):
        from .tools import Pgcairn

        return Pgcairn(self, self.cluster)

    @functools.cached_property
    def peer(self):
        from .tools import PgBackRest

        return PgBackRest(self, self.cluster)

    def directory(self, name):
        """A new, empty directory of user postgres, as PostgreSQL wants its own."""
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(mode=0o700)
        shutil.chown(path, "postgres", "postgres")
        return path

    def run(self, *command, user="postgres", env=None):
        """Runs a command to its end; gives its time, peak memory and output."""
        with tempfile.TemporaryFile() as output:
            started = time.monotonic()
            child = self.spawn(*command, user=user, env=env, stdout=output, stderr=subprocess.STDOUT)
            status, usage = wait(child)
            seconds = time.monotonic() - started
            output.seek(0)
            text = output.read().decode(errors="replace")
        if status != 0:
            raise Failed(f"{' '.join(map(str, command))}: status {status}\n{text}")
        return Ran(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text)

    def spawn(self, *command, user="postgres", env=None, **how):
        """Starts a command in its user's name."""
        if user != "root":
            how |= {"user": user, "group": user, "extra_groups": []}
        words = [str(word) for word in command]
        return subprocess.Popen(words, cwd="/", env=os.environ | (env or {}), stdin=subprocess.DEVNULL, **how)

    def settle(self, cold=False):
        """Before a measurement: nothing waits to be written, and with `cold` nothing is in the kernel's cache."""
        os.sync()
        if cold:
            pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")
        self.report.note_load()

    def tree_bytes(self, *paths):
        """Sum of the lengths of all files below the paths."""
        files = (file for path in paths for file in pathlib.Path(path).rglob("*"))
        return sum(file.lstat().st_size for file in files if not file.is_symlink() and file.is_file())

    def in_turns(self, sides, repeat=None):
        """Calls every side in turns, A B A B; gives the values of each by name."""
        values = {name: [] for name in sides}
        for _ in range(repeat or self.repeat):
            for name, side in sides.items():
                values[name].append(side())
        return values


def wait(child):
    """Waits for a child; gives its exit status and what it used."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage


def interrupted(number, _frame):
    raise KeyboardInterrupt(f"signal {number}")
