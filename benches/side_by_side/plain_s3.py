"""The same requests as a push makes, by a client that does nothing else: what the store itself takes."""

import datetime
import hashlib
import hmac
import http.client
import time
import urllib.parse

REGION = "us-east-1"


class Client:
    """Signed requests over one connection."""

    def __init__(self, endpoint, key, secret):
        self.host = endpoint.removeprefix("http://")
        self.key, self.secret = key, secret
        self.connection = http.client.HTTPConnection(self.host)

    def request(self, method, path, query=(), body=b""):
        """Sends one request; gives its seconds."""
        quoted = "&".join(f"{quote(name, '')}={quote(value, '')}" for name, value in sorted(query))
        headers = self.signed(method, path, quoted, body)
        started = time.monotonic()
        self.connection.request(method, f"{path}?{quoted}" if quoted else path, body, headers)
        answer = self.connection.getresponse()
        answer.read()
        seconds = time.monotonic() - started
        assert answer.status == 200, f"{method} {path}: status {answer.status}"
        return seconds

    def signed(self, method, path, query, body):
        """AWS Signature Version 4."""
        now = datetime.datetime.now(datetime.timezone.utc)
        moment, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
        digest = hashlib.sha256(body).hexdigest()
        headers = {"host": self.host, "x-amz-content-sha256": digest, "x-amz-date": moment}
        names = ";".join(sorted(headers))
        lines = "".join(f"{name}:{headers[name]}\n" for name in sorted(headers))
        canonical = "\n".join([method, quote(path, "/"), query, lines, names, digest])
        scope = f"{day}/{REGION}/s3/aws4_request"
        text = "\n".join(["AWS4-HMAC-SHA256", moment, scope, hashlib.sha256(canonical.encode()).hexdigest()])
        key = f"AWS4{self.secret}".encode()
        for part in (day, REGION, "s3", "aws4_request"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.new(key, text.encode(), "sha256").hexdigest()
        headers["authorization"] = f"AWS4-HMAC-SHA256 Credential={self.key}/{scope}, SignedHeaders={names}, Signature={signature}"
        return headers


def quote(text, safe):
    return urllib.parse.quote(text, safe=safe + "-_.~")


def like_a_push(client, bucket, stanza, object_key, body):
    """archive.info, the name looked for, the object, the name looked for again; gives the seconds of all four."""
    directory, name = object_key.rsplit("/", 1)
    look = [("list-type", "2"), ("max-keys", "1000"), ("prefix", f"{directory}/{name.split('-')[0]}-")]
    return (client.request("GET", f"/{bucket}/archive/{stanza}/archive.info")
            + client.request("GET", f"/{bucket}", look)
            + client.request("PUT", f"/{bucket}/{object_key}", body=body)
            + client.request("GET", f"/{bucket}", look))
