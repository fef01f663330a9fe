"""The two tools, each with its repository, doing the same things."""

import json
import os
import pathlib
import shutil
import time

STANZA = "bench"

CONFIGURATION = """
[global]
{repository}
repo1-bundle=y
repo1-retention-full=99
compress-type=zst
compress-level=3
process-max=2
start-fast=y
lock-path={work}/pgbackrest-lock
log-path={work}
log-level-file=off
log-level-console=warn
[{stanza}]
pg1-path={path}
pg1-port={port}
pg1-socket-path={socket}
pg1-user=postgres
"""


class Pgcairn:
    name = "pgcairn"

    def __init__(self, bench, cluster, name="pgcairn-repo", options=(), creation=()):
        """`options` go with every call, `creation` makes the stanza what it is."""
        self.bench, self.cluster = bench, cluster
        self.repo = bench.work / name
        self.creation = creation
        self.arguments = ["--repo", self.repo, "--stanza", STANZA, *options]
        server = f"host={cluster.socket} port={cluster.port} user=postgres dbname=postgres"
        self.server = ["--pg", server]
        self.archive_command = " ".join(map(str, [bench.pgcairn, *self.arguments, "archive-push", "%p"]))
        if not self.repo.exists():
            self("stanza-create", *self.server, *self.creation)

    def __call__(self, *words, user="postgres", env=None, arguments=None):
        return self.bench.run(self.bench.pgcairn, *(arguments or self.arguments), *words, user=user, env=env)

    def fresh(self):
        """An empty repository: a full backup into one that has backups would store next to nothing."""
        shutil.rmtree(self.repo, ignore_errors=True)
        self("stanza-create", *self.server, *self.creation)

    def backup(self, kind="full"):
        """Takes a backup; gives the run, and the bytes it stored beside WAL."""
        self.cluster.archive_with(self.archive_command)
        before = self.stored()
        self.bench.settle()
        ran = self("backup", "--type", kind, "--process-max", 2, *self.server)
        return ran, self.stored() - before

    def first_backup(self):
        self.fresh()
        return self.backup()

    def packs(self):
        return sum(1 for path in (self.repo / "chunk").rglob("*") if path.is_file())

    def stored(self):
        return self.bench.tree_bytes(self.repo / "chunk", self.repo / "backup")

    def stored_last(self):
        """Bytes that the latest backup stored."""
        said = json.loads(self("info", "--output", "json").output)
        return said[0]["backup"][-1]["info"]["repository"]["size"]

    def ensure(self):
        if not list((self.repo / "backup" / STANZA).glob("*F")):
            self.backup()

    def restore(self, path, *words):
        return self("restore", path, "--process-max", 2, *words)

    def restore_delta(self, path):
        return self.restore(path, "--delta")


class PgBackRest:
    name = "pgBackRest"

    def __init__(self, bench, cluster, name="pgbackrest-repo", over=None):
        """`over` are the settings of an S3 server that serves the repository."""
        self.bench, self.cluster = bench, cluster
        self.repo = bench.work / name
        conf = bench.work / (f"{name}-s3.conf" if over else f"{name}.conf")
        conf.write_text(CONFIGURATION.format(repository=over or f"repo1-path={self.repo}", work=bench.work, stanza=STANZA,
                                             path=cluster.path, port=cluster.port, socket=cluster.socket))
        self.command = ["pgbackrest", f"--config={conf}", f"--stanza={STANZA}"]
        self.archive_command = " ".join(map(str, [*self.command, "archive-push", "%p"]))
        if not self.repo.exists():
            bench.directory(name)
            self("stanza-create")

    def __call__(self, *words):
        return self.bench.run(*self.command, *words)

    def backup(self, kind="full"):
        self.cluster.archive_with(self.archive_command)
        before = self.stored()
        self.bench.settle()
        ran = self(f"--type={kind}", "backup")
        return ran, self.stored() - before

    def stored(self):
        return self.bench.tree_bytes(*(self.repo / "backup" / STANZA).glob("*[FDI]"))

    def ensure(self):
        if not list((self.repo / "backup" / STANZA).glob("*F")):
            self.backup()

    def restore(self, path, *words):
        recovery = ["--type=immediate", "--target-action=promote", "--archive-mode=off"]
        return self(f"--pg1-path={path}", *recovery, *words, "restore")

    def restore_delta(self, path):
        return self.restore(path, "--delta")


class Clone:
    """A backup started with `pgcairn start`."""

    def __init__(self, ours, name, arguments=None, env=None, options=(), point=("latest",)):
        self.ours, self.bench, self.name = ours, ours.bench, name
        self.base = self.bench.work / "clones"
        self.cache = self.bench.work / f"cache-{name}"
        self.bench.undo.callback(self.stop)
        settings = [word for option in options for word in ("--option", option)]
        started = time.monotonic()
        ran = ours("start", *point, "--name", name, "--clone-path", self.base, "--cache-path", self.cache,
                   "--output", "json", *settings, user="root", env=env, arguments=arguments)
        self.seconds = time.monotonic() - started
        said = json.loads(ran.output[ran.output.index("{"):])
        self.path = pathlib.Path(said["data-directory"])
        self.port = said["port"]
        self.socket = self.base / name / "run"

    def status(self):
        return json.loads((self.path / ".pgcairn/status").read_text())

    def stop(self):
        if (self.base / self.name).exists():
            self.ours("stop", self.name, "--clone-path", self.base, user="root")
        shutil.rmtree(self.cache, ignore_errors=True)


class Mount:
    """A backup mounted read-only."""

    def __init__(self, ours, name, cache=None, arguments=None):
        self.ours, self.bench = ours, ours.bench
        self.path = self.bench.work / name
        self.path.mkdir(exist_ok=True)
        self.cache = cache or self.bench.work / f"cache-{name}"
        self.bench.undo.callback(self.unmount)
        self.seconds = ours("mount", "--backup", "latest", "--cache-path", self.cache, self.path,
                            user="root", arguments=arguments).seconds

    def status(self):
        return json.loads((self.path / ".pgcairn/status").read_text())

    def unmount(self):
        if os.path.ismount(self.path):
            self.ours("umount", self.path, user="root")
        shutil.rmtree(self.cache, ignore_errors=True)


def memory_peak_mb(pid):
    """The most memory a process has had, with what it shares."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0
