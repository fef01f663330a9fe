"""A real S3 server over a directory repository, whose keys are the same, that answers late."""

import contextlib
import socket
import subprocess
import time

from .tools import PgBackRest

KEY = {"AWS_ACCESS_KEY_ID": "pgcairn-test-access-key", "AWS_SECRET_ACCESS_KEY": "pgcairn-test-secret-key"}


@contextlib.contextmanager
def serving(bench, repo, latency_ms):
    """Serves `repo` as the bucket of its name; gives the arguments and the environment by which pgcairn finds it."""
    server = bench.spawn(bench.s3_server, "--dir", repo.parent, "--latency-ms", latency_ms, user="root",
                         stdout=subprocess.PIPE)
    try:
        endpoint = server.stdout.readline().decode().strip()
        arguments = ["--repo", f"s3://{repo.name}", "--stanza", "bench",
                     "--repo-s3-endpoint", endpoint, "--repo-s3-region", "us-east-1"]
        yield arguments, KEY
    finally:
        server.terminate()
        server.wait()


@contextlib.contextmanager
def both_serving(ours, peer, latency_ms):
    """Serves both tools' repositories the same way: over TLS, which pgBackRest demands. Gives pgcairn's arguments and
    environment, and a pgBackRest that reads from there."""
    bench = ours.bench
    with serving(bench, ours.repo, latency_ms) as (arguments, env), encrypted(bench, arguments) as (port, certificate):
        arguments = list(arguments)
        arguments[arguments.index("--repo-s3-endpoint") + 1] = f"https://localhost:{port}"
        arguments += ["--repo-storage-ca-file", certificate]
        over = f"""repo1-type=s3
repo1-path=/
repo1-s3-bucket={peer.repo.name}
repo1-s3-endpoint=localhost
repo1-storage-host=localhost
repo1-storage-port={port}
repo1-storage-ca-file={certificate}
repo1-s3-uri-style=path
repo1-s3-region=us-east-1
repo1-s3-key={KEY["AWS_ACCESS_KEY_ID"]}
repo1-s3-key-secret={KEY["AWS_SECRET_ACCESS_KEY"]}"""
        yield arguments, env, PgBackRest(bench, peer.cluster, over=over)


@contextlib.contextmanager
def encrypted(bench, arguments):
    """TLS in front of the server; gives its port and the certificate to trust."""
    plain = arguments[arguments.index("--repo-s3-endpoint") + 1].removeprefix("http://")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = bench.directory("tls")
    bench.run("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", 2,
              "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", place / "key", "-out", place / "certificate")
    (place / "conf").write_text(f"""foreground = yes
debug = crit
pid =
[s3]
accept = 127.0.0.1:{port}
connect = {plain}
cert = {place / "certificate"}
key = {place / "key"}
""")
    tunnel = bench.spawn("stunnel4", place / "conf")
    try:
        until = time.monotonic() + 10
        while not answers(port):
            assert tunnel.poll() is None and time.monotonic() < until, "stunnel does not start"
            time.sleep(0.01)
        yield port, place / "certificate"
    finally:
        tunnel.terminate()
        tunnel.wait()


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
