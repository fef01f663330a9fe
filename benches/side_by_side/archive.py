"""The WAL archive: segments pushed and fetched one call after the other, as PostgreSQL does, with and without workers."""

import os
import shutil
import statistics
import time

from . import archiver, plain_s3, s3
from .bench import POSTGRES_BIN
from .cluster import Cluster
from .tools import STANZA, Pgcairn, PgBackRest

SEGMENTS = int(os.environ.get("BENCH_SEGMENTS", "64"))
S3_LATENCY_MS = 20
ASYNC = """archive-async=y
spool-path={spool}
process-max=2
"""


def measure(bench):
    wal = Wal(bench)
    ours, peer = Ours(bench, wal), Peer(bench, wal)
    try:
        report = bench.report
        for asynchronous, how, goal in [(False, "synchronous", None), (True, "in the background", 2.0)]:
            sides = {tool.name: lambda tool=tool, asynchronous=asynchronous: pushed(bench, wal, tool, asynchronous)
                     for tool in (ours, peer)}
            rates = bench.in_turns(sides)
            report.compare(f"archive-push {how}", rates[ours.name], rates[peer.name], "segments/s", goal, digits=1)
        for asynchronous, how, goal in [(False, "synchronous", 2.0), (True, "with prefetch", 2.0)]:
            sides = {tool.name: lambda tool=tool, asynchronous=asynchronous: fetched(bench, wal, tool, asynchronous)
                     for tool in (ours, peer)}
            rates = bench.in_turns(sides)
            report.compare(f"archive-get {how}", rates[ours.name], rates[peer.name], "segments/s", goal, digits=1)
        latency(bench, wal, ours)
    finally:
        wal.cluster.remove()


class Wal:
    """The data directory of a server that has stopped, with segments that wait to be archived."""

    def __init__(self, bench):
        self.bench = bench
        bench.directory("wal-cluster")
        self.cluster = Cluster(bench, bench.work / "wal-cluster", 5496)
        bench.run(POSTGRES_BIN / "initdb", "-k", "-N", "-A", "trust", "-U", "postgres", "-D", self.cluster.path)
        with (self.cluster.path / "postgresql.conf").open("a") as conf:
            conf.write(f"unix_socket_directories = '{bench.work}'\nlisten_addresses = ''\nport = 5496\nfsync = off\n"
                       "archive_mode = on\narchive_command = 'false'\nmax_wal_size = 8GB\nautovacuum = off\n")
        self.cluster.start()
        self.status = self.cluster.path / "pg_wal/archive_status"
        self.server = f"host={bench.work} port=5496 user=postgres dbname=postgres"

    def fill(self):
        """Half of the segments from loading, half from small transactions; then the server ends."""
        self.cluster.pgbench("-i", "-q", "-s", "25")
        while len(self.ready()) < SEGMENTS:
            self.cluster.psql("CHECKPOINT")
            self.cluster.pgbench("-n", "-c", "4", "-T", "4")
        self.cluster.stop()
        for extra in self.ready()[SEGMENTS:]:
            (self.status / f"{extra}.ready").unlink()
        self.names = self.ready()

    def ready(self):
        return sorted(path.stem for path in self.status.glob("*.ready") if len(path.stem) == 24)

    def again(self):
        for done in self.status.glob("*.done"):
            done.rename(done.with_suffix(".ready"))


class Ours(Pgcairn):
    def __init__(self, bench, wal):
        self.bench, self.repo = bench, bench.work / "archive-pgcairn"
        self.arguments = ["--repo", self.repo, "--stanza", STANZA]
        shutil.rmtree(self.repo, ignore_errors=True)
        self("stanza-create", "--pg", wal.server)
        self.archived = self.repo / "archive" / STANZA / "15-1"
        self.spool = bench.directory("archive-spool")

    def command(self, verb, asynchronous, arguments=None):
        words = [self.bench.pgcairn, *(arguments or self.arguments), verb]
        if asynchronous:
            words += ["--archive-async=y", f"--spool-path={self.spool}", "--process-max=2"]
        return " ".join(map(str, words))

    def push(self, asynchronous):
        return f"{self.command('archive-push', asynchronous)} %p"

    def get(self, asynchronous):
        return f"{self.command('archive-get', asynchronous)} %f %p"


class Peer(PgBackRest):
    def __init__(self, bench, wal):
        super().__init__(bench, wal.cluster, "archive-pgbackrest")
        self.archived = self.repo / "archive" / STANZA / "15-1"
        self.spool = bench.directory("archive-pgbackrest-spool")
        plain = bench.work / "archive-pgbackrest.conf"
        self.asynchronous = bench.work / "archive-pgbackrest-async.conf"
        settings = plain.read_text().replace("process-max=2\n", ASYNC.format(spool=self.spool))
        self.asynchronous.write_text(settings)

    def command_of(self, asynchronous):
        config = [f"--config={self.asynchronous}"] if asynchronous else [self.command[1]]
        return " ".join(map(str, [self.command[0], *config, *self.command[2:]]))

    def push(self, asynchronous):
        return f"{self.command_of(asynchronous)} archive-push %p"

    def get(self, asynchronous):
        return f"{self.command_of(asynchronous)} archive-get %f %p"


def pushed(bench, wal, tool, asynchronous):
    if not hasattr(wal, "names"):
        wal.fill()
    wal.again()
    shutil.rmtree(tool.archived, ignore_errors=True)
    for entry in tool.spool.iterdir():
        shutil.rmtree(entry, ignore_errors=True)
    bench.settle()
    calls = archiver.run(archiver.push(wal.cluster.path, tool.push(asynchronous)))
    there = len([path for path in tool.archived.rglob("*") if path.is_file()])
    assert there == SEGMENTS, f"{tool.name} archived {there} segments of {SEGMENTS}"
    return len(calls) / sum(calls)


def fetched(bench, wal, tool, asynchronous):
    into = bench.directory("recovering")
    # by which pgcairn knows the cluster that asks
    (into / "global").mkdir()
    shutil.copy(wal.cluster.path / "global/pg_control", into / "global")
    bench.run("chown", "-R", "postgres:", into, user="root")
    target = into / "pg_wal"
    target.mkdir()
    shutil.chown(target, "postgres", "postgres")
    bench.settle()
    calls = archiver.run(archiver.get(target, tool.get(asynchronous), wal.names))
    # its worker ends when its directory is gone
    shutil.rmtree(into)
    time.sleep(1)
    return len(calls) / sum(calls)


def latency(bench, wal, ours):
    """What one call takes beyond the time that the store takes for the same requests."""
    beyond = []
    with s3.serving(bench, ours.repo, S3_LATENCY_MS) as (arguments, env):
        for _ in range(bench.repeat):
            shutil.rmtree(ours.archived, ignore_errors=True)
            wal.again()
            command = f"{ours.command('archive-push', False, arguments)} %p"
            calls = archiver.run(archiver.push(wal.cluster.path, command), env)
            client = plain_s3.Client(arguments[arguments.index("--repo-s3-endpoint") + 1], *env.values())
            stored = {str(path.relative_to(ours.repo)): path.read_bytes() for path in ours.archived.rglob("0*") if path.is_file()}
            shutil.rmtree(ours.archived)
            plain = [plain_s3.like_a_push(client, ours.repo.name, STANZA, *object) for object in stored.items()]
            beyond.append(1000 * (statistics.median(calls) - statistics.median(plain)))
    bench.report.at_most(f"one archive-push to S3 with {S3_LATENCY_MS} ms, beyond its four requests by a plain client",
                         beyond, "ms", 15, digits=1)
