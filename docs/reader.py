#!/usr/bin/env python3
"""A reader of pgcairn's repositories (directories only), written from format.md alone: the document's proof.

    reader.py REPO STANZA                     lists the backups
    reader.py REPO STANZA LABEL               lists a backup's files
    reader.py REPO STANZA LABEL PATH OUT      extracts one file
    reader.py REPO STANZA LABEL --check DIR   compares every file with the one below DIR
    reader.py REPO STANZA --wal NAME OUT      extracts an archived WAL file

Needs: pip install blake3 zstandard. Numbers in comments are sections of format.md.
"""
import json
import os
import struct
import sys
from pathlib import Path

import zstandard
from blake3 import blake3

GRAIN, SLOT, LEAF, INDEX = 8192, 131072, 256 * 131072, 512 * 256 * 131072
STORED_MAX = SLOT + 256
GRAIN_KEY, CHUNK_KEY, FILE_KEY = (
    blake3(b"", derive_key_context=f"pgcairn 2026 {name}").digest() for name in ("grain", "chunk", "file"))


def need(condition, what):
    if not condition:
        raise SystemExit(f"damaged: {what}")


class Reader:  # 1
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        need(0 <= count <= len(self.data) - self.at, "too short")
        self.at += count
        return self.data[self.at - count:self.at]

    def varint(self, most=2**64 - 1):
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7f) << shift
            if byte < 0x80:
                need(value <= most, f"{value} is more than {most}")
                return value
            shift += 7
            need(shift < 70, "a varint of more than ten bytes")

    def signed(self):
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def bytes(self):
        return self.take(self.varint())

    def count(self, each):
        return self.varint((len(self.data) - self.at) // each)

    def end(self):
        need(self.at == len(self.data), "bytes left over")


def chunk_id(plain):  # 5
    digests = [blake3(plain[at:at + GRAIN], key=GRAIN_KEY).digest() for at in range(0, len(plain), GRAIN)]
    return blake3(struct.pack("<I", len(plain)) + b"".join(digests), key=CHUNK_KEY).digest()


def unpack(stored, plain_len, name):  # 4
    need(stored[0] in (0, 1), f"codec {stored[0]}")
    plain = stored[1:]
    if stored[0] == 1:
        plain = zstandard.ZstdDecompressor().decompress(plain, max_output_size=plain_len)
    need(len(plain) == plain_len, "a chunk's length")
    need(chunk_id(plain) == name, "a chunk's id")
    return plain


def whole_pack(data, kind):  # 3
    need(len(data) >= 120 and data[:8] == b"PGCNPACK" and data[-8:] == b"PGCNPEND", "magic")
    need(struct.unpack("<H", data[8:10]) == (1,) and data[10] == kind and data[11] == 0, "version, kind or seal")
    start, length, reserved = struct.unpack("<QII", data[-88:-72])
    need(start + length == len(data) - 88 and length % 48 == 0, "the footer's place")
    need(data[12:16] == b"\0" * 4 and reserved == 0, "reserved bytes")
    need(blake3(data[:-40]).digest() == data[-40:-8], "the object's hash")
    footer, at = data[start:start + length], 32
    need(blake3(footer).digest() == data[-72:-40], "the footer's hash")
    for entry in range(0, length, 48):
        name = footer[entry:entry + 32]
        offset, stored_len, plain_len, reserved = struct.unpack("<IIII", footer[entry + 32:entry + 48])
        need(offset == at and 0 < stored_len <= STORED_MAX and 0 < plain_len <= SLOT and reserved == 0, "the footer")
        at += stored_len
        yield name, unpack(data[offset:at], plain_len, name)
    need(at == start, "the end of the chunks")


def chunk_table(reader):  # 6
    packs = [reader.take(16) for _ in range(reader.count(16))]
    chunks = []
    for _ in range(reader.count(36)):
        pack = packs[reader.varint(len(packs) - 1)]
        offset, stored = reader.varint(2**32 - 1 - STORED_MAX), reader.varint(STORED_MAX)
        plain = reader.varint(SLOT)
        need(stored and plain, "an empty chunk")
        chunks.append((pack, offset, stored, plain, reader.take(32)))
    return chunks


def extents(reader, chunks, length):  # 6
    found = []
    for _ in range(reader.count(3)):
        size, chunk, first = reader.varint(SLOT), chunks[reader.varint(len(chunks) - 1)], reader.varint(SLOT)
        need(size and first + size <= chunk[3], "an extent outside of its chunk")
        found.append((chunk, first, size))
    need(sum(size for _, _, size in found) == length, "extents that do not cover the file")
    return found


def leaf_pairs(reader, chunks):
    number = lambda: chunks[reader.varint(len(chunks) - 1)]
    return [(number(), number()) for _ in range(reader.count(2))]


def ceil(size, of):
    return -(-size // of)


class Repository:
    def __init__(self, root, stanza):
        self.root, self.stanza = Path(root), stanza

    def labels(self):
        return sorted(path.parent.name for path in self.root.glob(f"backup/{self.stanza}/*/backup.manifest"))

    def info(self, key, name):  # 9
        data = (self.root / key).read_bytes()
        first, rest = data.split(b"\n", 1)
        body = data[:data[:-1].rindex(b"\n") + 1]
        need(first == f"pgcairn {name} 1".encode(), "the magic line")
        need(data == body + f"blake3 {blake3(body).hexdigest()}\n".encode(), "the checksum line")
        return json.loads(body[len(first):])

    def chunk(self, chunk):
        pack, offset, stored, plain, name = chunk
        with open(self.root / f"chunk/{self.stanza}/{pack.hex()[:2]}/{pack.hex()}", "rb") as file:
            file.seek(offset)
            return unpack(file.read(stored), plain, name)

    def manifest(self, label):  # 7
        data = (self.root / f"backup/{self.stanza}/{label}/backup.manifest").read_bytes()
        text, entries, last = b"", {}, None
        for _, plain in whole_pack(data, kind=6):
            reader = Reader(plain)
            part = reader.take(1)[0]
            need(part in (1, 2), "an unknown part")
            if part == 1:
                text += plain[1:]
                continue
            chunks, path = chunk_table(reader), b""
            for _ in range(reader.count(4)):
                path = path[:reader.varint(len(path))] + reader.bytes()
                order = path.replace(b"/", b"\0")
                bad = any(name in (b"", b".", b"..") or b"\0" in name for name in path.split(b"/")) and path
                need(not bad and len(path) <= 4096 and (last is None or last < order), f"the path {path}")
                last = order
                entries[path] = self.entry(reader, chunks)
            reader.end()
        description = json.loads(text)
        need(description["label"] == label, "another backup's manifest")
        return description, entries

    def entry(self, reader, chunks):
        mode, mtime, kind = reader.varint(0o7777), reader.signed(), reader.take(1)[0]
        entry = {"mode": mode, "mtime": mtime, "kind": kind, "size": 0}
        need(kind <= 4, "an unknown kind of entry")
        if kind == 1:
            entry["target"] = reader.bytes()
        if kind >= 2:
            size = entry["size"] = reader.varint(2**63 - 1)
            entry["crc"] = struct.unpack("<I", reader.take(4))[0]
        if kind == 2:
            need(size <= 8 * SLOT, "a large file without a map")
            entry["extents"] = extents(reader, chunks, size)
            if size:
                entry["changes"] = (chunks[reader.varint(len(chunks) - 1)], reader.varint(SLOT))
        if kind == 3:
            entry["leaves"] = leaf_pairs(reader, chunks)
            need(len(entry["leaves"]) == ceil(size, LEAF), "the number of leaves")
        if kind == 4:
            entry["index"] = [chunks[reader.varint(len(chunks) - 1)] for _ in range(reader.count(1))]
            need(len(entry["index"]) == ceil(size, INDEX), "the number of index chunks")
        return entry

    def read(self, entry):
        """Yields a file's bytes in order."""
        leaves = entry.get("leaves", [])
        for index in entry.get("index", []):
            reader = Reader(self.chunk(index))
            need(reader.take(1) == b"\1", "the version of an index chunk")
            leaves += leaf_pairs(reader, chunk_table(reader))
            reader.end()
        runs = [entry.get("extents", [])]
        for number, (leaf, _) in enumerate(leaves):
            length = min(LEAF, entry["size"] - number * LEAF)
            reader = Reader(self.chunk(leaf))
            need(reader.take(1) == b"\1" and reader.varint(256) == ceil(length, SLOT), "a leaf")
            chunks = chunk_table(reader)
            runs += [extents(reader, chunks, min(SLOT, length - at)) for at in range(0, length, SLOT)]
            reader.end()
        for run in runs:
            for chunk, first, size in run:
                yield self.chunk(chunk)[first:first + size]

    def wal(self, name):  # 10
        history = self.info(f"archive/{self.stanza}/archive.info", "archive.info")["history"][-1]
        archive = self.root / f"archive/{self.stanza}/{history['version']}-{history['id']}"
        found = [archive / name] if name.endswith(".history") else list((archive / name[:16]).glob(f"{name}-*"))
        need(len(found) == 1, f"the archive has {len(found)} files called {name}")
        data = found[0].read_bytes()
        chunks = list(whole_pack(data, kind=5))
        content = blake3(b"".join(name for name, _ in chunks), key=FILE_KEY).digest()[:16]
        need(data[16:32] == content, "the content hash")
        need(name.endswith(".history") or found[0].name == f"{name}-{content.hex()}", "the object's key")
        return b"".join(plain for _, plain in chunks)


def crc32c(parts):  # 1
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82f63b78 * (value & 1))
        table.append(value)
    crc = 0xffffffff
    for part in parts:
        for byte in part:
            crc = table[(crc ^ byte) & 0xff] ^ (crc >> 8)
    return crc ^ 0xffffffff


def check(repository, entries, directory):
    for path, entry in entries.items():
        if entry["kind"] >= 2:
            data = b"".join(repository.read(entry))
            same = data == (Path(os.fsdecode(directory)) / os.fsdecode(path)).read_bytes()
            print("same " if same else "OTHER", len(data), os.fsdecode(path))


def main(root, stanza, label=None, path=None, out=None):
    repository = Repository(root, stanza)
    if label == "--wal":
        return Path(out).write_bytes(repository.wal(path))
    if label is None:
        return print("\n".join(repository.labels()))
    description, entries = repository.manifest(label)
    if path == "--check":
        return check(repository, entries, out)
    if path is None:
        print(json.dumps(description, indent=1))
        for name, entry in entries.items():
            print(f"{entry['mode']:05o} {entry['kind']} {entry['size']:12} {os.fsdecode(name)}")
        return None
    entry = entries[os.fsencode(path)]
    data = b"".join(repository.read(entry))
    need(len(data) == entry["size"] and crc32c([data]) == entry["crc"], "the file's size or CRC32C")
    Path(out).write_bytes(data)
    return print(f"{len(data)} bytes, CRC32C {entry['crc']:08x}")


main(*sys.argv[1:])
