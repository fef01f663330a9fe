#!/usr/bin/env python3
"""A reader of pgcairn's repositories (directories only), written from format.md alone: the document's proof.

    reader.py REPO STANZA                     lists the backups
    reader.py REPO STANZA LABEL               lists a backup's files
    reader.py REPO STANZA LABEL PATH OUT      extracts one file
    reader.py REPO STANZA LABEL --all DIR     extracts every file below DIR
    reader.py REPO STANZA LABEL --check DIR   compares every file with the one below DIR
    reader.py REPO STANZA LABEL --prove       checks every file, its changes, and the pack table
    reader.py REPO STANZA --wal NAME OUT      extracts an archived WAL file

It does not decrypt: a repository with encryption is refused. Needs: pip install blake3 zstandard. Numbers in comments are sections of format.md.
"""
import functools
import json
import os
import re
import struct
import sys
from pathlib import Path

import zstandard
from blake3 import blake3

GRAIN, SLOT, CHUNK, LEAF, INDEX = 8192, 131072, 8 * 131072, 256 * 131072, 512 * 256 * 131072
STORED_MAX = CHUNK + 256
GRAIN_KEY, CHUNK_KEY, FILE_KEY, SEAL_KEY, HISTORY_KEY = (
    blake3(b"", derive_key_context=f"pgcairn 2026 {name}").digest() for name in ("grain", "chunk", "file", "seal", "history"))


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

    def u32(self):
        return struct.unpack("<I", self.take(4))[0]

    def count(self, each):
        return self.varint((len(self.data) - self.at) // each)

    def end(self):
        need(self.at == len(self.data), "bytes left over")


def grain_digests(plain):  # 5
    return [blake3(plain[at:at + GRAIN], key=GRAIN_KEY).digest() for at in range(0, len(plain), GRAIN)]


def chunk_id(plain):  # 5
    return blake3(struct.pack("<I", len(plain)) + b"".join(grain_digests(plain)), key=CHUNK_KEY).digest()


def unpack(stored, plain_len, name):  # 4
    need(len(stored) > 17, "a chunk without frame and seal")
    frame, seal = stored[:-16], stored[-16:]
    need(blake3(name + frame, key=SEAL_KEY).digest()[:16] == seal, "a chunk's seal")
    need(frame[0] in (0, 1), f"codec {frame[0]}")
    plain = frame[1:]
    if frame[0] == 1:
        plain = zstandard.ZstdDecompressor().decompress(plain, max_output_size=plain_len)
    need(len(plain) == plain_len, "a chunk's length")
    need(chunk_id(plain) == name, "a chunk's id")
    return plain


def whole_pack(data, kind):  # 3
    need(len(data) >= 120 and data[:8] == b"PGCNPACK" and data[-8:] == b"PGCNPEND", "magic")
    need(struct.unpack("<H", data[8:10]) == (1,) and data[10] == kind, "version or kind")
    if data[11] == 2:
        raise SystemExit("this stanza is encrypted (seal 2; section 12): this reader does not decrypt, \"pgcairn\" with its passphrase does")
    need(data[11] == 1, "the seal byte")
    start, length, reserved = struct.unpack("<QII", data[-88:-72])
    need(start + length == len(data) - 88 and length % 48 == 0, "the footer's place")
    need(data[12:16] == b"\0" * 4 and reserved == 0, "reserved bytes")
    need(blake3(data[:-40]).digest() == data[-40:-8], "the object's hash")
    footer, at = data[start:start + length], 32
    need(blake3(footer).digest() == data[-72:-40], "the footer's hash")
    for entry in range(0, length, 48):
        name = footer[entry:entry + 32]
        offset, stored_len, plain_len, reserved = struct.unpack("<IIII", footer[entry + 32:entry + 48])
        need(offset == at and 0 < stored_len <= STORED_MAX and 0 < plain_len <= CHUNK and reserved == 0, "the footer")
        at += stored_len
        yield name, unpack(data[offset:at], plain_len, name)
    need(at == start, "the end of the chunks")


def chunk_table(reader):  # 6
    packs = [reader.take(16) for _ in range(reader.count(16))]
    chunks = []
    for _ in range(reader.count(36)):
        pack = packs[reader.varint(len(packs) - 1)]
        offset, stored = reader.varint(2**32 - 1 - STORED_MAX), reader.varint(STORED_MAX)
        plain = reader.varint(CHUNK)
        need(stored and plain, "an empty chunk")
        chunks.append((pack, offset, stored, plain, reader.take(32)))
    return chunks


def extents(reader, chunks, length):  # 6
    found = []
    for _ in range(reader.count(3)):
        size, chunk, first = reader.varint(SLOT), chunks[reader.varint(len(chunks) - 1)], reader.varint(CHUNK)
        need(size and first + size <= chunk[3], "an extent outside of its chunk")
        found.append((chunk, first, size))
    need(sum(size for _, _, size in found) == length, "extents that do not cover the file")
    return found


def leaf_pairs(reader, chunks):
    number = lambda: chunks[reader.varint(len(chunks) - 1)]
    return [(number(), number()) for _ in range(reader.count(2))]


def changes_whole(reader, length):  # 6: for each slot, its CRC32C and its grains' hashes
    need(reader.take(1) == b"\1" and reader.varint() == ceil(length, SLOT), "changes")
    grains = lambda at: ceil(min(SLOT, length - at), GRAIN)
    return [[reader.u32(), [reader.take(8) for _ in range(grains(at))]] for at in range(0, length, SLOT)]


def changes_since(reader, slots):  # 6
    last = -1
    for _ in range(reader.count(6)):
        number, crc, bits = reader.varint(len(slots) - 1), reader.u32(), reader.varint()
        need(last < number and bits < 1 << len(slots[number][1]), "a changed slot")
        last, slots[number][0] = number, crc
        for grain in range(bits.bit_length()):
            if bits >> grain & 1:
                slots[number][1][grain] = reader.take(8)
    reader.end()


def ceil(size, of):
    return -(-size // of)


class Repository:
    def __init__(self, root, stanza):
        self.root, self.stanza = Path(root), stanza
        self.own = self.own_id = None  # the manifest, and its name as a pack
        self.cache, self.crcs = {}, {}

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
        if chunk not in self.cache:
            if len(self.cache) >= 8:
                self.cache.pop(next(iter(self.cache)))
            path = self.own if pack == self.own_id else self.root / f"chunk/{self.stanza}/{pack.hex()[:2]}/{pack.hex()}"
            with open(path, "rb") as file:
                file.seek(offset)
                self.cache[chunk] = unpack(file.read(stored), plain, name)
        return self.cache[chunk]

    def manifest(self, label):  # 7
        self.own = self.root / f"backup/{self.stanza}/{label}/backup.manifest"
        data = self.own.read_bytes()
        self.own_id, self.packs = data[16:32], {}
        text, entries, last, table_began = b"", {}, None, False
        for _, plain in whole_pack(data, kind=6):
            reader = Reader(plain)
            part = reader.take(1)[0]
            need(part in (1, 2, 3, 4), "an unknown part")
            need(part == 3 or not table_began, "the pack table's place")
            if part == 1:
                text += plain[1:]
            if part == 2:
                last = self.block(reader, entries, last)
            if part == 3:
                table_began = True
                for _ in range(reader.count(18)):
                    pack = reader.take(16)
                    need(not self.packs or next(reversed(self.packs)) < pack, "the order of the pack table")
                    self.packs[pack] = (reader.varint(), reader.varint())
                reader.end()
        description = json.loads(text)
        need(description["label"] == label, "another backup's manifest")
        return description, entries

    def block(self, reader, entries, last):
        chunks, path = chunk_table(reader), b""
        for _ in range(reader.count(4)):
            path = path[:reader.varint(len(path))] + reader.bytes()
            order = path.replace(b"/", b"\0")
            bad = any(name in (b"", b".", b"..") or b"\0" in name for name in path.split(b"/")) and path
            need(not bad and len(path) <= 4096 and (last is None or last < order), f"the path {path}")
            last = order
            entries[path] = self.entry(reader, chunks, path)
        reader.end()
        return last

    def entry(self, reader, chunks, path):
        mode, mtime, kind = reader.varint(0o7777), reader.signed(), reader.take(1)[0]
        need(kind <= 7, "an unknown kind of entry")
        identity = None
        if kind >= 5:
            identity, kind = reader.take(8), kind - 3
        entry = {"mode": mode, "mtime": mtime, "identity": identity, "kind": kind, "size": 0}
        if kind == 1:
            need(re.fullmatch(rb"pg_tblspc/[1-9][0-9]{0,9}", path), f"a link at {path}")
            entry["target"] = reader.bytes()
        if kind >= 2:
            size = entry["size"] = reader.varint(2**63 - 1)
            entry["crc"] = reader.u32()
        if kind == 2:
            need(size <= 8 * SLOT, "a large file without a map")
            entry["extents"] = extents(reader, chunks, size)
            if size:
                entry["changes"] = (chunks[reader.varint(len(chunks) - 1)], reader.varint(CHUNK))
        if kind == 3:
            entry["leaves"] = leaf_pairs(reader, chunks)
            need(len(entry["leaves"]) == ceil(size, LEAF), "the number of leaves")
        if kind == 4:
            entry["index"] = [chunks[reader.varint(len(chunks) - 1)] for _ in range(reader.count(1))]
            need(len(entry["index"]) == ceil(size, INDEX), "the number of index chunks")
        return entry

    def leaves(self, entry):
        """The chunks of a file's leaves and of their changes."""
        leaves = list(entry.get("leaves", []))
        for index in entry.get("index", []):
            reader = Reader(self.chunk(index))
            need(reader.take(1) == b"\1", "the version of an index chunk")
            leaves += leaf_pairs(reader, chunk_table(reader))
            reader.end()
        need(len(leaves) == (ceil(entry["size"], LEAF) if entry["kind"] > 2 else 0), "the number of leaves")
        return leaves

    def leaf(self, leaf, length):
        """The extents of each slot of a leaf."""
        reader = Reader(self.chunk(leaf))
        need(reader.take(1) == b"\1" and reader.varint(256) == ceil(length, SLOT), "a leaf")
        chunks = chunk_table(reader)
        slots = [extents(reader, chunks, min(SLOT, length - at)) for at in range(0, length, SLOT)]
        reader.end()
        return slots

    def extents(self, entry):
        """All extents of a file in order."""
        yield from entry.get("extents", [])
        for number, (leaf, _) in enumerate(self.leaves(entry)):
            for slot in self.leaf(leaf, min(LEAF, entry["size"] - number * LEAF)):
                yield from slot

    def read(self, entry):
        """Yields a file's bytes in order, and fails at their end if their CRC32C is another."""
        crc = 0
        for extent in self.extents(entry):
            chunk, first, size = extent
            plain = self.chunk(chunk)[first:first + size]
            if extent not in self.crcs:
                self.crcs[extent] = crc32c(plain)
            crc = crc32c_combine(crc, self.crcs[extent], size)
            yield plain
        need(crc == entry["crc"], "a file's CRC32C")

    def changes(self, chunk, length):  # 6
        """The changes of one leaf, and the chunk they are a difference to."""
        reader = Reader(self.chunk(chunk))
        if reader.data[0] == 1:
            slots = changes_whole(reader, length)
            reader.end()
            return slots, None
        need(reader.take(1) == b"\2" and reader.varint() == ceil(length, SLOT), "changes since others")
        base = chunk_table(reader)
        need(len(base) == 1, "changes since more than one")
        whole = Reader(self.chunk(base[0]))
        slots = changes_whole(whole, length)
        whole.end()
        changes_since(reader, slots)
        return slots, base[0]

    def wal(self, name):  # 10
        history = self.info(f"archive/{self.stanza}/archive.info", "archive.info")["history"][-1]
        archive = self.root / f"archive/{self.stanza}/{history['version']}-{history['id']}"
        found = [archive / name] if name.endswith(".history") else list((archive / name[:16]).glob(f"{name}-*"))
        need(len(found) == 1, f"the archive has {len(found)} files called {name}")
        data = found[0].read_bytes()
        chunks = list(whole_pack(data, kind=5))
        ids = b"".join(name for name, _ in chunks)
        content = blake3(ids, key=FILE_KEY).digest()[:16]
        expected = [content]
        if name.endswith(".history"):
            bound = struct.pack("<QI", history["system-id"], len(name)) + name.encode() + ids
            expected.append(blake3(bound, key=HISTORY_KEY).digest()[:16])
        need(data[16:32] in expected, "the content hash")
        need(name.endswith(".history") or found[0].name.removesuffix(".point") == f"{name}-{content.hex()}", "the object's key")
        need(all(len(plain) == CHUNK for _, plain in chunks[:-1]), "a chunk that is no run of 1 MiB")
        return b"".join(plain for _, plain in chunks)


def crc32c_table():  # 1
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82f63b78 * (value & 1))
        yield value


CRC_TABLE = list(crc32c_table())


def crc32c(data):
    crc = 0xffffffff
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xff] ^ (crc >> 8)
    return crc ^ 0xffffffff


def product(a, b):
    """Of two polynomials modulo that of CRC32C; bit 31 is the coefficient of 1."""
    result = 0
    for bit in range(31, -1, -1):
        result ^= b * (a >> bit & 1)
        b = (b >> 1) ^ (0x82f63b78 * (b & 1))
    return result


@functools.cache
def zeros(count):
    """What `count` bytes behind a sum multiply it by."""
    if count == 0:
        return 1 << 31
    half = zeros(count // 2)
    return product(product(half, half), 1 << 23) if count % 2 else product(half, half)


def crc32c_combine(first, second, second_len):
    return product(first, zeros(second_len)) ^ second


def prove(repository, description, entries):
    """Every file, the changes beside it, and that the pack table says what is needed."""
    weights = {}

    def weigh(chunk, length=None):  # 7
        share = chunk[2] if length is None else max(1, length * chunk[2] // chunk[3])
        weights[chunk[0]] = weights.get(chunk[0], 0) + share

    for path, entry in entries.items():
        if entry["kind"] < 2:
            continue
        size, name = entry["size"], os.fsdecode(path)
        read = sum(len(plain) for plain in repository.read(entry))
        need(read == size, f"the length of {name}")
        changes = []
        for extent in repository.extents(entry):
            weigh(extent[0], extent[2])
        if "changes" in entry:
            chunk, first = entry["changes"]
            changes = changes_whole(Reader(repository.chunk(chunk)[first:]), size)
            weigh(chunk, 2 + 4 * ceil(size, SLOT) + 8 * ceil(size, GRAIN))
        for index in entry.get("index", []):
            weigh(index)
        for number, (leaf, of_leaf) in enumerate(repository.leaves(entry)):
            slots, base = repository.changes(of_leaf, min(LEAF, size - number * LEAF))
            changes += slots
            for chunk in (leaf, of_leaf, base):
                if chunk:
                    weigh(chunk)
        crc = 0
        for number, slot in enumerate(changes):
            crc = crc32c_combine(crc, slot[0], min(SLOT, size - number * SLOT))
        need(crc == entry["crc"], f"the slots' CRC32C of {name}")
        prove_grains(repository, entry, changes, name)
        print(f"proved {size:12} {name}")
    weights.pop(repository.own_id, None)
    need(weights == {pack: weight for pack, (_, weight) in repository.packs.items()}, "the weights of the pack table")
    for pack, (size, _) in repository.packs.items():
        path = repository.root / f"chunk/{repository.stanza}/{pack.hex()[:2]}/{pack.hex()}"
        need(path.stat().st_size == size, f"the size of pack {pack.hex()}")
    need(description["sizes"]["stored-all"] == sum(weights.values()), "the sum of the weights")
    print(f"proved {len(weights)} packs")


@functools.lru_cache(maxsize=64)
def short_hashes(data):
    return [digest[:8] for digest in grain_digests(data)]


def prove_grains(repository, entry, changes, name):
    slot, number = b"", 0
    for plain in repository.read(entry):
        slot += plain
        at = number * SLOT
        while len(slot) >= min(SLOT, entry["size"] - at) > 0:
            length = min(SLOT, entry["size"] - at)
            need(short_hashes(slot[:length]) == changes[number][1], f"the hashes of slot {number} of {name}")
            slot, number = slot[length:], number + 1
            at = number * SLOT


def check(repository, entries, directory):
    for path, entry in entries.items():
        if entry["kind"] >= 2:
            data = b"".join(repository.read(entry))
            same = data == (Path(os.fsdecode(directory)) / os.fsdecode(path)).read_bytes()
            print("same " if same else "OTHER", len(data), os.fsdecode(path))


def extract(repository, entry, out):
    """What lies at `out` is whole only if this returns."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "wb") as file:
        length = sum(file.write(plain) for plain in repository.read(entry))
    need(length == entry["size"], "the file's size")
    print(f"{length} bytes, CRC32C {entry['crc']:08x} {out}")


def main(root, stanza, label=None, path=None, out=None):
    repository = Repository(root, stanza)
    if label == "--wal":
        return Path(out).write_bytes(repository.wal(path))
    if label is None:
        return print("\n".join(repository.labels()))
    description, entries = repository.manifest(label)
    if path == "--prove":
        return prove(repository, description, entries)
    if path == "--check":
        return check(repository, entries, out)
    if path == "--all":
        files = {name: entry for name, entry in entries.items() if entry["kind"] >= 2}
        return [extract(repository, entry, Path(out) / os.fsdecode(name)) for name, entry in files.items()]
    if path is None:
        print(json.dumps(description, indent=1))
        for name, entry in entries.items():
            print(f"{entry['mode']:05o} {entry['kind']} {entry['size']:12} {os.fsdecode(name)}")
        for pack, (size, weight) in repository.packs.items():
            print(f"pack {pack.hex()} {size} bytes, weight {weight}")
        return None
    return extract(repository, entries[os.fsencode(path)], Path(out))


main(*sys.argv[1:])
