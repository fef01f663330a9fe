"""pgbench on a started backup against a native server on the same backup restored, with the same settings."""

import os
import shlex

from .cluster import Cluster
from .tools import Clone, memory_peak_mb

SECONDS = int(os.environ.get("BENCH_SECONDS", "10"))
# what is its own of each server
OWN = ("port", "unix_socket_directories", "hba_file", "ident_file", "cluster_name", "recovery_init_sync_method")


def measure(bench):
    bench.ours.ensure()
    clone = Clone(bench.ours, "pgbench")
    path = bench.directory("native")
    bench.ours.restore(path)
    native = Cluster(bench, path, port=5498)
    native.start(f"-c port=5498 {same_settings(clone)}")
    started = Cluster(bench, clone.path, clone.port)
    started.socket = clone.socket
    for server in (started, native):
        warm(server)
    for name, arguments, goal in [("pgbench -S, 2 clients, warm", ["-S"], 0.9), ("pgbench TPC-B, 2 clients", [], 0.6)]:
        sides = {
            "ours": lambda arguments=arguments: rate(bench, started, arguments),
            "native": lambda arguments=arguments: rate(bench, native, arguments),
        }
        values = bench.in_turns(sides)
        bench.report.compare(name, values["ours"], values["native"], "TPS", goal, digits=0)
    peak = memory_peak_mb(clone.status()["pid"])
    bench.report.at_most("peak memory of the clone's mount, cache 64 MB", [peak], "MB", 64 + 150, digits=0)
    clone.stop()
    native.remove()


def rate(bench, server, arguments):
    server.psql("CHECKPOINT")
    bench.settle()
    return server.pgbench("-n", *arguments, "-c", 2, "-j", 2, "-M", "prepared", "-T", SECONDS)


def warm(server):
    """Reads pgbench's tables and indexes into the kernel's cache, by the server itself."""
    server.psql("SET max_parallel_workers_per_gather = 0; SELECT sum(length(filler)) FROM pgbench_accounts;")
    files = server.psql("SELECT pg_relation_filepath(c.oid) FROM pg_class c WHERE relname LIKE 'pgbench%'").split()
    for name in files:
        for file in server.path.glob(f"{name}*"):
            with file.open("rb") as data:
                while data.read(1 << 20):
                    pass


def same_settings(clone):
    """The clone's settings as options for another server: PostgreSQL writes down what it was started with."""
    words = shlex.split((clone.path / "postmaster.opts").read_text())
    settings = [word for before, word in zip(words, words[1:]) if before == "-c"]
    kept = [setting for setting in settings if not setting.startswith(tuple(f"{name}=" for name in OWN))]
    return " ".join(f"-c {shlex.quote(setting)}" for setting in kept)
