"""A moment between backups: started from S3, replayed through the mount, and one table of it."""

import re
import shutil
import time

from . import s3
from .cluster import SHARED_BUFFERS, Cluster
from .tools import Clone

LATENCY_MS = 20
SEGMENT = 16 << 20
# restore points, and how many WAL segments after the backup they are
NEAR, NEAR_SEGMENTS = "near", 20
FAR, FAR_SEGMENTS = "far", 100
# shared_buffers of a clone that replays, on a machine with 8 GB to spare
MEMORY = "1GB"
# rows of a table of about 1 MB
SMALL_ROWS = 16000
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def measure(bench):
    write_history(bench)
    from_s3(bench)
    replay(bench)
    one_table(bench)


def write_history(bench):
    """Both tools back the cluster up and archive the same WAL, in which the two restore points are."""
    ours, peer, cluster = bench.ours, bench.peer, bench.cluster
    cluster.psql(f"""DROP TABLE IF EXISTS small;
        CREATE TABLE small AS SELECT i AS id, md5(i::text) AS text FROM generate_series(1, {SMALL_ROWS}) AS i;""")
    alone = ours.archive_command, peer.archive_command
    ours.archive_command = peer.archive_command = " && ".join(alone)
    ours.first_backup()
    peer.backup()
    ours.archive_command, peer.archive_command = alone
    start = position(cluster)
    turn = 0
    for name, segments, work in [(NEAR, NEAR_SEGMENTS, small_changes), (FAR, FAR_SEGMENTS, large_changes)]:
        while position(cluster) - start < segments * SEGMENT:
            work(cluster, turn)
            turn += 1
        bench.say(f"{(position(cluster) - start) // SEGMENT} segments up to the restore point {name}")
        mark(cluster, name)


def small_changes(cluster, _turn):
    cluster.pgbench("-n", "-N", "-c", 4, "-T", 2)


def large_changes(cluster, turn):
    cluster.psql(f"UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid % 97 = {turn}")


def position(cluster):
    return int(cluster.psql("SELECT pg_current_wal_lsn() - '0/0'"))


def mark(cluster, name):
    """A restore point, in the archive when this returns."""
    segment = cluster.psql(f"SELECT pg_walfile_name(pg_create_restore_point('{name}'));\nSELECT FROM pg_switch_wal();")
    while cluster.psql(f"SELECT last_archived_wal >= '{segment.split()[0]}' FROM pg_stat_archiver") != "t":
        time.sleep(0.05)


def point(name):
    return ["--type=name", f"--target={name}"]


def from_s3(bench):
    ours = bench.ours
    with s3.both_serving(bench, LATENCY_MS) as (arguments, env, peer):
        sides = {"ours": lambda: on_clone(ours, NEAR, arguments, env), "peer": lambda: on_restored(peer, NEAR)}
        seconds = bench.in_turns(sides)
    size = f"{bench.cluster.bytes / 1e9:.1f} GB"
    what = f"answer at a moment, {NEAR_SEGMENTS} segments, both from S3 with TLS, {LATENCY_MS} ms ({size})"
    bench.report.compare(what, seconds["ours"], seconds["peer"], "s", 3.0, faster=True)


def replay(bench):
    ours, peer = bench.ours, bench.peer
    sides = {"mount": lambda: on_clone(ours, FAR), "native": lambda: on_copy(ours, MEMORY),
             "small": lambda: on_copy(ours, SHARED_BUFFERS), "peer": lambda: on_restored(peer, FAR)}
    seconds = bench.in_turns(sides)
    report = bench.report
    report.compare(f"replay of {FAR_SEGMENTS} segments through the mount (against local files, shared_buffers {MEMORY} as there)",
                   seconds["mount"], seconds["native"], "s", 0.91, faster=True)
    report.compare(f"  against local files with the cluster's {SHARED_BUFFERS}", seconds["mount"], seconds["small"], "s", None, faster=True)
    report.compare("  against pgBackRest's restore and archive-get", seconds["mount"], seconds["peer"], "s", 2.0, faster=True)


def on_clone(ours, name, arguments=None, env=None):
    """From nothing to a promoted server at the restore point."""
    ours.bench.settle(cold=True)
    started = time.monotonic()
    clone = Clone(ours, "moment", arguments, env, point=point(name))
    seconds = time.monotonic() - started
    clone.stop()
    return seconds


def on_restored(peer, name):
    bench, path = peer.bench, peer.bench.directory("restored")
    bench.settle(cold=True)
    started = time.monotonic()
    peer(f"--pg1-path={path}", *point(name), "--target-action=promote", "--archive-mode=off", "restore")
    promoted(bench, path)
    seconds = time.monotonic() - started
    shutil.rmtree(path)
    return seconds


def on_copy(ours, memory):
    """From the start of a server to its promotion, on a local copy with all WAL in its pg_wal."""
    bench, path, mounted = ours.bench, ours.bench.directory("restored"), ours.bench.directory("wal-of-it")
    ours.restore(path, *point(FAR), "--target-action=promote")
    ours("mount", mounted, user="root")
    bench.run("sh", "-c", f"cp {mounted}/wal/* {path}/pg_wal/ && chmod u+w {path}/pg_wal/*")
    ours("umount", mounted, user="root")
    bench.settle(cold=True)
    started = time.monotonic()
    promoted(bench, path, f"-c restore_command=/bin/false -c shared_buffers={memory}")
    seconds = time.monotonic() - started
    shutil.rmtree(path)
    return seconds


def promoted(bench, path, options=""):
    """Starts a server on a copy, and stops it when it has come to its target."""
    copy = Cluster(bench, path, port=5498)
    copy.start(f"-c port=5498 {options}")
    while copy.psql("SELECT pg_is_in_recovery()") != "f":
        time.sleep(0.01)
    copy.stop()


def one_table(bench):
    """What is fetched for one table of 1 MB."""
    ours = bench.ours
    whole = bench.tree_bytes(ours.repo / "chunk")
    for what, words, limit in [("", ["latest"], 5), (f" after {NEAR_SEGMENTS} segments", point(NEAR), None)]:
        shares = []
        with s3.serving(bench, ours.repo, LATENCY_MS) as (arguments, env):
            for _ in range(bench.repeat):
                shares.append(100 * extracted(ours, words, arguments, env) / whole)
        bench.report.at_most(f"extract of a table of 1 MB{what}: share of the backup fetched", shares, "%", limit, digits=2)


def extracted(ours, words, arguments, env):
    """Bytes that one extract fetches."""
    bench, file = ours.bench, ours.bench.work / "small.sql"
    file.unlink(missing_ok=True)
    bench.settle()
    said = ours("extract", *words, "--table", "postgres.public.small", "--output", file, "--cache-path", bench.directory("extract-cache"),
                "--clone-path", bench.directory("extract-clones"), user="root", env=env, arguments=arguments).output
    assert file.read_text().count("\n") > SMALL_ROWS, "the dump is not whole"
    number, unit = re.search(r"; ([\d.,]+) (\w+) were fetched", said).groups()
    return float(number.replace(",", "")) * UNITS[unit]
