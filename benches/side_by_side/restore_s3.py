"""Copy-out from S3 whose every answer is late: a large database, and a cluster of many small files."""

import shutil

from . import s3, small_files
from .tools import PgBackRest, Pgcairn

LATENCY_MS = 20


def measure(bench):
    bench.ours.ensure()
    bench.peer.ensure()
    compare(bench, bench.ours, bench.peer, f"{bench.cluster.bytes / 1e9:.1f} GB", "restored")
    place = small_files.memory_disk(bench)
    cluster = small_files.built(bench, place)
    ours, peer = Pgcairn(bench, cluster, "pgcairn-repo-files"), PgBackRest(bench, cluster, "pgbackrest-repo-files")
    ours.ensure()
    peer.ensure()
    compare(bench, ours, peer, f"{small_files.FILES} small files", f"{place}/restored")
    cluster.stop()


def compare(bench, ours, peer, what, place):
    with s3.both_serving(ours, peer, LATENCY_MS) as (arguments, env, from_s3):
        sides = {
            "ours": lambda: restored(bench, place, lambda path: ours(
                "restore", path, "--process-max", 2, "--type", "none", env=env, arguments=arguments)),
            "peer": lambda: restored(bench, place, from_s3.restore),
        }
        values = bench.in_turns(sides)
    seconds = {name: [ran.seconds for ran in values[name]] for name in sides}
    bench.report.compare(f"restore from S3 with {LATENCY_MS} ms and TLS, 2 processes: {what}", seconds["ours"],
                         seconds["peer"], "s", 1.5, faster=True)
    memory = {name: [ran.rss_max_mb for ran in values[name]] for name in sides}
    bench.report.compare("  its peak memory, of one process", memory["ours"], memory["peer"], "MB", None, faster=True, digits=0)


def restored(bench, place, restore):
    path = bench.directory(place)
    bench.settle(cold=True)
    ran = restore(path)
    shutil.rmtree(path)
    return ran
