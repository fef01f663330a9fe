"""A PostgreSQL server on this machine, and what is done with it."""

import contextlib
import multiprocessing
import pathlib
import shutil
import subprocess

from . import data
from .bench import POSTGRES_BIN, Failed

SHARED_BUFFERS = "128MB"
SETTINGS = """
unix_socket_directories = '{socket}'
listen_addresses = ''
port = {port}
shared_buffers = {memory}
max_wal_size = 2GB
checkpoint_timeout = 30min
autovacuum = off
archive_mode = on
archive_command = '/bin/true'
"""

# while it is filled nothing has to survive
FILLING = "-c fsync=off -c archive_mode=off -c wal_level=minimal -c max_wal_senders=0 -c maintenance_work_mem=256MB"


class Cluster:
    def __init__(self, bench, path, port=5497):
        self.bench, self.path, self.port = bench, pathlib.Path(path), port
        self.socket = bench.work
        self.log = pathlib.Path(f"{path}.log")

    @classmethod
    def built(cls, bench, name, gb, filling=data.fill, port=5497):
        """The cluster `name` of about `gb` GB, running; taken as it is when an earlier run has kept it."""
        cluster = cls(bench, bench.work / name, port)
        ready = bench.work / f"{name}.ready"
        if not ready.exists():
            bench.say(f"building a cluster of {gb:g} GB")
            bench.directory(name)
            bench.run(POSTGRES_BIN / "initdb", "-k", "-N", "-A", "trust", "-U", "postgres", "-D", cluster.path)
            settings = SETTINGS.format(socket=cluster.socket, port=cluster.port, memory=SHARED_BUFFERS)
            with (cluster.path / "postgresql.conf").open("a") as conf:
                conf.write(settings)
            cluster.start(FILLING)
            # in a process of its own: a child's peak memory begins with its parent's
            process = multiprocessing.get_context("fork").Process(target=filling, args=(cluster, gb))
            process.start()
            process.join()
            if process.exitcode != 0:
                raise Failed(f"cannot fill {name}")
            cluster.stop()
            ready.touch()
        cluster.start()
        size = float(cluster.psql("SELECT sum(pg_database_size(oid)) FROM pg_database"))
        bench.say(f"the cluster {name} holds {size / 1e9:.2f} GB")
        cluster.bytes = size
        return cluster

    def start(self, options=""):
        self.bench.undo.callback(self.stop)
        self.bench.run(POSTGRES_BIN / "pg_ctl", "start", "-s", "-w", "-t", 600, "-D", self.path,
                       "-l", self.log, "-o", options)

    def stop(self):
        if (self.path / "postmaster.pid").exists():
            self.bench.run(POSTGRES_BIN / "pg_ctl", "stop", "-s", "-w", "-m", "fast", "-D", self.path)

    def remove(self):
        self.stop()
        shutil.rmtree(self.path, ignore_errors=True)

    def client(self, program, *arguments):
        where = ["-h", str(self.socket), "-p", str(self.port), "-U", "postgres"]
        return [str(POSTGRES_BIN / program), *where, *map(str, arguments), "postgres"]

    def psql(self, text):
        command = self.client("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-f", "-")
        done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise Failed(f"psql: {done.stderr}")
        return done.stdout.strip()

    def pgbench(self, *arguments):
        """Runs pgbench; gives transactions per second, if it measured them."""
        done = subprocess.run(self.client("pgbench", *arguments), text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise Failed(f"pgbench: {done.stderr}")
        rates = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("tps = ")]
        return float(rates[-1]) if rates else None

    def archive_with(self, command):
        self.psql(f"ALTER SYSTEM SET archive_command = '{command}';\nSELECT pg_reload_conf();")


@contextlib.contextmanager
def five_times(bench):
    """A cluster five times as large, which runs instead of the other."""
    bench.cluster.stop()
    cluster = Cluster.built(bench, "cluster-five", 5 * bench.gb, lambda at, gb: at.pgbench("-i", "-q", "-s", int(gb * 66)), 5496)
    try:
        yield cluster
    finally:
        cluster.stop()
        bench.cluster.start()
