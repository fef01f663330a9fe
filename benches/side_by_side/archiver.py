"""What PostgreSQL's archiver does, and its startup process: one call for one file after the other, as user postgres."""

import json
import os
import pathlib
import pwd
import time

from .bench import Failed


def push(data, command):
    """Archives all that is marked ready; %p in the command is the path. Gives the seconds of each call."""
    os.chdir(data)
    for ready in sorted(pathlib.Path("pg_wal/archive_status").glob("*.ready")):
        yield call(command.replace("%p", f"pg_wal/{ready.stem}"))
        ready.rename(ready.with_suffix(".done"))


def get(wal, command, names):
    """Fetches these files into the directory `wal`; %f is the name, %p the path."""
    target = pathlib.Path(wal, "RECOVERYXLOG")
    for name in names:
        yield call(command.replace("%f", name).replace("%p", str(target)))
        target.unlink()


def call(command):
    """As system() does."""
    started = time.monotonic()
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", command], os.environ)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise Failed(f"{command}: status {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - started


def run(calls, env=None):
    """Makes the calls in a child that is user postgres; gives their seconds."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            user = pwd.getpwnam("postgres")
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            os.environ.update(env or {}, HOME=user.pw_dir)
            os.chdir("/")
            os.write(writer, json.dumps(list(calls)).encode())
            os._exit(0)
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as told:
        text = told.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise Failed("the archiver has failed")
    return json.loads(text)
