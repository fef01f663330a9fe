"""A moment between backups: started from S3, replayed through the mount, and one table of it."""

import re
import shutil
import statistics
import time

from . import s3
from .cluster import SHARED_BUFFERS, Cluster, five_times
from .tools import Clone, Pgcairn, PgBackRest

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
    ours, peer = bench.ours, bench.peer
    write_history(bench.cluster, ours, peer, [(NEAR, NEAR_SEGMENTS, small_changes), (FAR, FAR_SEGMENTS, large_changes)])
    small = from_s3(bench.cluster, ours, peer)
    replay(bench)
    one_table(bench)
    if bench.five:
        five(bench, small)


def write_history(cluster, ours, peer, marks):
    """Both tools back the cluster up and archive the same WAL, in which the restore points `marks` are."""
    cluster.psql(f"""DROP TABLE IF EXISTS small;
        CREATE TABLE small AS SELECT i AS id, md5(i::text) AS text FROM generate_series(1, {SMALL_ROWS}) AS i;""")
    alone = ours.archive_command, peer.archive_command
    ours.archive_command = peer.archive_command = " && ".join(alone)
    ours.first_backup()
    peer.backup()
    ours.archive_command, peer.archive_command = alone
    start = position(cluster)
    turn = 0
    for name, segments, work in marks:
        while position(cluster) - start < segments * SEGMENT:
            work(cluster, turn)
            turn += 1
        cluster.bench.say(f"{(position(cluster) - start) // SEGMENT} segments up to the restore point {name}")
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


def from_s3(cluster, ours, peer):
    """Gives our seconds."""
    bench = cluster.bench
    with s3.both_serving(ours, peer, LATENCY_MS) as (arguments, env, from_s3):
        sides = {"ours": lambda: on_clone(ours, NEAR, arguments, env)[0], "peer": lambda: on_restored(from_s3, NEAR)}
        seconds = bench.in_turns(sides)
    size = f"{cluster.bytes / 1e9:.1f} GB"
    what = f"answer at a moment, {NEAR_SEGMENTS} segments, both from S3 with TLS, {LATENCY_MS} ms ({size})"
    bench.report.compare(what, seconds["ours"], seconds["peer"], "s", 3.0, faster=True)
    return seconds["ours"]


def five(bench, small):
    """The same on a database five times as large."""
    with five_times(bench) as cluster:
        ours, peer = Pgcairn(bench, cluster, "pgcairn-repo-five"), PgBackRest(bench, cluster, "pgbackrest-repo-five")
        write_history(cluster, ours, peer, [(NEAR, NEAR_SEGMENTS, small_changes)])
        large = from_s3(cluster, ours, peer)
    growth = statistics.median(large) / statistics.median(small)
    bench.report.at_most("  5 x the size takes", [growth], "x", 1.2, digits=2)


def replay(bench):
    """What replay takes by the server's own log, and from nothing to the answer."""
    ours, peer = bench.ours, bench.peer
    sides = {"mount": lambda: on_clone(ours, FAR), "native": lambda: on_copy(ours, MEMORY),
             "small": lambda: on_copy(ours, SHARED_BUFFERS), "peer": lambda: (on_restored(peer, FAR), None)}
    values = bench.in_turns(sides)
    whole, redo = ({side: [value[what] for value in values[side]] for side in sides} for what in (0, 1))
    compare = bench.report.compare
    compare(f"replay of {FAR_SEGMENTS} segments through the mount, by the server's log (against a local pg_wal, shared_buffers {MEMORY} as there)",
            redo["mount"], redo["native"], "s", 0.91, faster=True)
    compare(f"  against a local pg_wal with the cluster's {SHARED_BUFFERS}", redo["mount"], redo["small"], "s", None, faster=True)
    compare("  from nothing to the answer, against the start of a copy that is there", whole["mount"], whole["native"], "s", None, faster=True)
    compare("  from nothing to the answer, against pgBackRest's restore and archive-get", whole["mount"], whole["peer"], "s", 2.0, faster=True)


def on_clone(ours, name, arguments=None, env=None):
    """From nothing to a promoted server at the restore point; and the seconds of replay."""
    ours.bench.settle(cold=True)
    started = time.monotonic()
    clone = Clone(ours, "moment", arguments, env, point=point(name))
    seconds = time.monotonic() - started
    replayed = redo_seconds(clone.socket / "postgresql.log")
    clone.stop()
    return seconds, replayed


def redo_seconds(log):
    """The last replay of a server, as it has measured it itself."""
    return float(re.findall(r"redo done at .* elapsed: ([\d.]+) s", log.read_text())[-1])


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
    """From the start of a server to its promotion, on a local copy with all WAL in its pg_wal; and the seconds of replay."""
    bench, path, mounted = ours.bench, ours.bench.directory("restored"), ours.bench.directory("wal-of-it")
    ours.restore(path, *point(FAR), "--target-action=promote")
    ours("mount", mounted, user="root")
    bench.run("sh", "-c", f"cp {mounted}/wal/* {path}/pg_wal/ && chmod u+w {path}/pg_wal/*")
    ours("umount", mounted, user="root")
    bench.settle(cold=True)
    started = time.monotonic()
    log = promoted(bench, path, f"-c restore_command=/bin/false -c shared_buffers={memory}")
    seconds = time.monotonic() - started
    shutil.rmtree(path)
    return seconds, redo_seconds(log)


def promoted(bench, path, options=""):
    """Starts a server on a copy, and stops it when it has come to its target; gives its log."""
    copy = Cluster(bench, path, port=5498)
    copy.log.unlink(missing_ok=True)
    copy.start(f"-c port=5498 {options}")
    while copy.psql("SELECT pg_is_in_recovery()") != "f":
        time.sleep(0.01)
    copy.stop()
    return copy.log


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
