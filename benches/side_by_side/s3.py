"""A real S3 server over a directory repository, whose keys are the same, that answers late."""

import contextlib
import subprocess

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
