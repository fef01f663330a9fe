"""From nothing to the answer of a primary-key query on a backup in S3, each request 20 ms late; pgBackRest restores from a
local repository instead, which is its better case."""

import shutil
import statistics
import subprocess
import time

from . import s3
from .cluster import Cluster, five_times
from .tools import Clone, Pgcairn, PgBackRest

LATENCY_MS = 20
QUERY = "SELECT abalance FROM pgbench_accounts WHERE aid = 4242"


def measure(bench):
    bench.ours.ensure()
    bench.peer.ensure()
    ours, requests, fetched = one_size(bench, bench.ours, bench.peer, "", bench.cluster.bytes)
    bench.report.at_most("  requests until then", requests, "", 24, digits=0)
    share = 100 * statistics.median(fetched) / bench.ours.stored_last()
    bench.report.at_most("  share of the backup fetched until then", [share], "%", 2, digits=2,
                         other=f"{statistics.median(fetched) / 1e6:.2f} MB")
    if bench.five:
        five(bench, ours)


def one_size(bench, ours, peer, suffix, size):
    with s3.serving(bench, ours.repo, LATENCY_MS) as (arguments, env):
        sides = {"ours": lambda: on_clone(ours, arguments, env), "peer": lambda: on_restored(peer)}
        values = bench.in_turns(sides)
    seconds = [value[0] for value in values["ours"]]
    what = f"first answer from S3, {LATENCY_MS} ms{suffix} ({size / 1e9:.1f} GB)"
    bench.report.compare(what, seconds, values["peer"], "s", None, faster=True)
    bench.report.at_most(f"  the same, by its goal{suffix}", seconds, "s", 2)
    return seconds, [value[1] for value in values["ours"]], [value[2] for value in values["ours"]]


def five(bench, small):
    """The same on a database five times as large."""
    with five_times(bench) as cluster:
        ours, peer = Pgcairn(bench, cluster, "pgcairn-repo-five"), PgBackRest(bench, cluster, "pgbackrest-repo-five")
        ours.ensure()
        peer.ensure()
        large, _, _ = one_size(bench, ours, peer, ", 5 x", cluster.bytes)
    growth = statistics.median(large) / statistics.median(small)
    bench.report.at_most("  5 x the size takes", [growth], "x", 1.2)


def on_clone(ours, arguments, env):
    ours.bench.settle(cold=True)
    started = time.monotonic()
    clone = Clone(ours, "first", arguments, env)
    answer(clone.socket, clone.port)
    seconds = time.monotonic() - started
    status = clone.status()
    clone.stop()
    return seconds, status["requests"], status["fetched-bytes"]


def on_restored(peer):
    bench = peer.bench
    path = bench.directory("restored")
    bench.settle(cold=True)
    started = time.monotonic()
    peer.restore(path)
    copy = Cluster(bench, path, port=5498)
    copy.start("-c port=5498")
    answer(copy.socket, copy.port)
    seconds = time.monotonic() - started
    copy.stop()
    shutil.rmtree(path)
    return seconds


def answer(socket, port):
    """Asks until the server has an answer."""
    command = ["psql", "-XAtq", "-h", str(socket), "-p", str(port), "-U", "postgres", "-c", QUERY, "postgres"]
    while subprocess.run(command, capture_output=True, check=False).stdout.strip() == b"":
        time.sleep(0.01)
