"""Readers of memory traces: what they read, in whatever pieces, and that bad input is told in one sentence."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvmcore import traces
from cvmcore.errors import InputError
from cvmcore.traces import Chunk, DenseGfns, open_trace, reduce_trace

SAMPLE = Path(traces.__file__).parents[1] / "workloads" / "sample-python.jsonl.gz"
HEADER = '{"cvmcore_trace": 1}\n'
NO_TRACE = "neither output of valgrind's lackey nor kernel ftrace text nor a cvmcore trace"
Access = tuple[int, bool]

fuzz = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def rows_of(chunks: Iterable[Chunk]) -> list[tuple[int, bool, int]]:
    return [
        row
        for chunk in chunks
        for row in zip(chunk.pages.tolist(), chunk.is_write.tolist(), chunk.counts.tolist(), strict=True)
    ]


def runs(rows: Iterable[tuple[int, bool, int]]) -> list[tuple[int, bool, int]]:
    """Rows with neighbours on one page merged: what does not depend on how the text was cut."""
    groups = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row[0])]
    return [(group[0][0], any(row[1] for row in group), sum(row[2] for row in group)) for group in groups]


def read(path: Path) -> list[tuple[int, bool, int]]:
    with open_trace(path) as reader:
        return runs(rows_of(reader))


@pytest.fixture
def trace(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "a.trace"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# ---- lackey


@pytest.mark.parametrize(
    ("line", "accesses"),
    [
        ("I  04001000,3", [(0x4001, False)]),
        (" L 1ffe,8", [(1, False), (2, False)]),
        (" S 1ff8,8", [(1, True)]),
        (" S 1ff9,8", [(1, True), (2, True)]),
        (" M 1fff000778,4", [(0x1FFF000, True)]),
        (" L 0,1", [(0, False)]),
        (" L FFFFFFFFFFFFFFFF,1", [((1 << 52) - 1, False)]),
        (" S ffffffffffffffff,16", [((1 << 52) - 1, True), (1 << 52, True)]),
        (" L 2000,512", [(2, False)]),
        (" L 2000,4096", [(2, False)]),
        (" L 2001,4096", [(2, False), (3, False)]),
        ("==77==   guest instrs:  127,771", []),
        ("--77-- warning: 1,2", []),
        ("**77** hello,1", []),
        ("", []),
    ],
)
def test_lackey_line(trace: Callable[[str], Path], line: str, accesses: list[Access]) -> None:
    last = (9, False, 1)

    rows = read(trace(f"==1== Lackey\n{line}\n L 9000,1\n"))

    assert rows == [*((page, write, 1) for page, write in accesses), last]


@pytest.mark.parametrize(
    "line",
    [
        "I 04001000,3", "I  04001000,", "I  04001000", "I  04001000,0", "I  04001000,4097", "I  04001000,12345",
        "I  04001000,a", "I  04001000,1a", "I  04001000,3 ", "I  0400g000,3", "I  ,3", "I  12345678901234567,3",
        " X 04001000,3", "  L4001000,3", " L 0400 000,3", " S", "I", ",", "hello", "1,2", " L 1000,8\r", " L 1000,,8",
        "=x=", '{"page": 1, "op": "r"}', "I  4001000,-3", " L 0x1000,8", "\0", "I  04001000,3I  04001000,3",
    ],
)  # fmt: skip
def test_malformed_lackey_line_is_told_with_its_number(trace: Callable[[str], Path], line: str) -> None:
    path = trace(f"==1== Lackey\n L 9000,1\n{line}\n L 9000,1\n")

    with pytest.raises(InputError) as caught:
        read(path)

    assert str(caught.value).startswith(f"{path}:3: this line is not an access as valgrind's lackey writes it: '")


ACCESSES = st.lists(
    st.tuples(
        st.sampled_from(["I ", " L", " S", " M"]),
        st.one_of(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 15)),
        st.integers(1, 4096),
        st.sampled_from(["x", "X", "08x", "016x"]),
    ),
    min_size=1,
    max_size=60,
)
CHATTER = st.sampled_from(["", "", "", "\n", "==1== 3,4\n", "--1-- x\n", "==1== " + "y" * 90 + "\n"])


@fuzz
@given(accesses=ACCESSES, chatter=st.lists(CHATTER, min_size=60, max_size=60), block=st.integers(100, 300))
def test_lackey_reads_as_line_by_line(
    trace: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    accesses: list[tuple[str, int, int, str]],
    chatter: list[str],
    block: int,
) -> None:
    """The array parser, with the text cut anywhere, against the plainest reading of the format."""
    lines = [f"{kind} {address:{form}},{size}\n" for kind, address, size, form in accesses]
    expected = []
    for kind, address, size, _ in accesses:
        for page in range(address >> 12, (address + size - 1 >> 12) + 1):
            expected.append((page, kind in (" S", " M"), 1))
    path = trace("==1== Lackey\n" + "".join(itertools.chain(*zip(chatter, lines, strict=False))))

    assert read(path) == runs(expected)
    monkeypatch.setattr(traces.stream, "BLOCK_BYTES", block)
    monkeypatch.setattr(traces.chunks, "CHUNK_ROWS", 7)
    with open_trace(path) as reader:
        chunks = list(reader)
    assert runs(rows_of(chunks)) == runs(expected)
    assert [len(chunk) for chunk in chunks[:-1]] == [7] * (len(chunks) - 1)
    assert sum(chunk.accesses for chunk in chunks) == len(expected)


# ---- JSONL


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ('{"page":16386,"op":"w","n":3}', (16386, True, 3)),
        ('{"page": 16386, "op": "w", "n": 3}', (16386, True, 3)),
        ('{"n": 3, "op": "r", "page": "0x4002"}', (16386, False, 3)),
        ('{"page": 5, "op": "x"}', (5, False, 1)),
        ('{"page":18446744073709551615,"op":"w","n":999999999999}', ((1 << 64) - 1, True, 10**12 - 1)),
        ('{"page":9999999999999999999,"op":"r","n":1}', (9999999999999999999, False, 1)),
    ],
)
def test_jsonl_record(trace: Callable[[str], Path], line: str, row: tuple[int, bool, int]) -> None:
    assert read(trace(HEADER + line)) == [row]
    assert read(trace("\n" + HEADER + "\n" + line + "\n\n")) == [row]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"page":1,"op":"w"', "is not a JSON object"),
        ("[1, 2]", "is not a JSON object"),
        ("7", "is not a JSON object"),
        ("I  04001000,3", "is not a JSON object"),
        ("[" * 100_000, "is not a JSON object"),
        ('{"page": 1, "op": "r", "N": 1}', "has a field 'N'"),
        ('{"op": "r"}', "no page number"),
        ('{"page": -1, "op": "r"}', "no page number"),
        ('{"page": 1.0, "op": "r"}', "no page number"),
        ('{"page": true, "op": "r"}', "no page number"),
        ('{"page": "12", "op": "r"}', "no page number"),
        ('{"page": 18446744073709551616, "op": "r"}', "no page number"),
        ('{"page": "0x10000000000000000", "op": "r"}', "no page number"),
        ('{"page": 01, "op": "r"}', "is not a JSON object"),
        ('{"page": 1}', "none of r, w and x"),
        ('{"page": 1, "op": "rw"}', "none of r, w and x"),
        ('{"page": 1, "op": ["r"]}', "none of r, w and x"),
        ('{"page": 1, "op": "r", "n": 0}', "no count"),
        ('{"page":1,"op":"r","n":1000000000000}', "no count"),
        ('{"page": 1, "op": "r", "n": null}', "no count"),
        (HEADER.strip(), "has a field 'cvmcore_trace'"),
    ],
    ids=map(str, itertools.count()),
)
def test_malformed_record_is_told_with_its_number(trace: Callable[[str], Path], line: str, says: str) -> None:
    path = trace(HEADER + '{"page":1,"op":"r","n":1}\n' + line + '\n{"page":1,"op":"r","n":1}\n')

    with pytest.raises(InputError) as caught:
        read(path)

    assert str(caught.value).startswith(f"{path}:3: this line ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


RECORDS = st.lists(
    st.tuples(st.integers(0, (1 << 64) - 1) | st.integers(0, 5), st.sampled_from("rwx"), st.integers(1, 10**12 - 1)),
    min_size=1,
    max_size=40,
)


@fuzz
@given(records=RECORDS, block=st.integers(80, 300))
def test_both_spellings_of_records_read_the_same(
    trace: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, records: list[tuple[int, str, int]], block: int
) -> None:
    objects = [{"page": page, "op": op, "n": n} for page, op, n in records]
    expected = [(page, op == "w", n) for page, op, n in records]
    monkeypatch.setattr(traces.stream, "BLOCK_BYTES", block)

    for separators in ((",", ":"), (", ", ": ")):
        lines = [json.dumps(record, separators=separators) for record in objects]
        with open_trace(trace(HEADER + "\n".join(lines) + "\n")) as reader:
            assert rows_of(reader) == expected


# ---- files


def test_plain_gzipped_and_standard_input_read_the_same(
    tmp_path: Path, trace: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = b"".join(b"%s %x,%d\n" % ((b"I ", b" S")[i % 3 == 0], i * 777, i % 9 + 1) for i in range(40_000))
    zipped = gzip.compress(plain[:100_000]) + gzip.compress(plain[100_000:])
    expected = read(trace(plain))

    (tmp_path / "t.gz").write_bytes(zipped)
    assert read(tmp_path / "t.gz") == expected
    for content in (plain, zipped):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        with open_trace("-") as reader:
            assert runs(rows_of(reader)) == expected
            assert reader.name == "standard input"
            assert reader.format == "lackey"


def test_standard_input_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)

    with pytest.raises(InputError, match=r"^standard input: is closed$"):
        open_trace("-")


@pytest.mark.parametrize("zipped", [False, True])
def test_progress_reaches_the_whole_file(tmp_path: Path, zipped: bool) -> None:
    text = b"".join(b" S %x,8\n" % (i * 4096) for i in range(100_000))
    path = tmp_path / "t"
    path.write_bytes(gzip.compress(text) if zipped else text)
    seen: list[tuple[int, int | None]] = []

    with open_trace(path, lambda done, total: seen.append((done, total))) as reader:
        list(reader)

    assert len(seen) > 2
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {path.stat().st_size}
    assert seen[-1][0] == path.stat().st_size


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\n\n\n", NO_TRACE),
        (b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 40, NO_TRACE),
        (bytes(1 << 20), ":1: this line is longer than"),
        (b"total 17\ndrwxr-xr-x", NO_TRACE + "; it begins with 'total 17'"),
        (b"==1== Memcheck, an error detector\n", "no memory access in it (was valgrind run with --trace-mem=yes?)"),
        (b"I  04001000,3\nI  0400", ":2: this line has no end: the trace is truncated"),
        (b'{"event": "fault"}\n', 'no cvmcore trace: the first line has no "cvmcore_trace"'),
        (b"{nonsense\n", "the first line begins like JSON and is none"),
        (b'{"cvmcore_trace": 2}\n', "a cvmcore trace of version 2; only 1 can be read"),
        (b'{"cvmcore_trace": [1]}\n', "a cvmcore trace of version [1]; only 1 can be read"),
        (b'{"cvmcore_trace": 1, "page_bytes": 65536}\n', "page_bytes in the header is not 4096"),
        (b'{"cvmcore_trace": 1, "records": "3"}\n', "records in the header is not a number of records"),
        (b'{"cvmcore_trace": 1, "records": 2}\n{"page":1,"op":"r","n":1}\n', "announces 2 records and 1 are there"),
        (b'{"cvmcore_trace": 1}\n', "there is no memory access in it"),
        (b'{"cvmcore_trace": 1}', "there is no memory access in it"),
        (gzip.compress(b""), "the file is empty"),
        (gzip.compress(b" L 1000,8\n") + b"junk", "the gzip data is damaged"),
        (b"\x1f\x8b" + b"\xff" * 60, "the gzip data is damaged"),
    ],
    ids=map(str, itertools.count()),
)
def test_foreign_or_cut_file_is_told_in_one_sentence(trace: Callable[[bytes], Path], content: bytes, says: str) -> None:
    path = trace(content)

    with pytest.raises(InputError) as caught:
        read(path)

    assert str(caught.value).startswith(f"{path}:")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("path", "says"), [("nowhere", "No such file"), (".", "directory"), ("a\0b", "null")])
def test_unreadable_file_is_told(tmp_path: Path, path: str, says: str) -> None:
    with pytest.raises(InputError, match=f"cannot be read: .*{says}"):
        open_trace(tmp_path / path)


@fuzz
@given(data=st.data())
def test_cut_or_flipped_gzip_is_a_sentence(trace: Callable[[bytes], Path], data: st.DataObject) -> None:
    whole = gzip.compress(b"".join(b" S %x,8\n" % (i * i * 4096) for i in range(200)))
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(InputError):
        read(trace(whole[:cut]))

    broken = bytearray(whole)
    broken[cut] ^= data.draw(st.integers(1, 255))
    path = trace(bytes(broken))
    try:
        rows = read(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert len(rows) == 200  # a byte of the gzip header that means nothing


LINES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"I  04001000,3", b" S 1ffe,8", b"==1== x", b"{", HEADER.encode().strip(), b"", b"\x1f\x8b\x08"]),
    st.sampled_from([b'{"page":1,"op":"r","n":1}', b'{"page": 1}', b'{"page":"0x1","op":"w"}', b'{"page":1,"op":']),
    st.text("ILSM 0123456789abcdef,=-\t\r", max_size=20).map(str.encode),
)


@fuzz
@given(lines=st.lists(LINES, max_size=8), end=st.booleans(), zipped=st.booleans())
def test_any_file_is_a_trace_or_a_sentence(
    trace: Callable[[bytes], Path], lines: list[bytes], end: bool, zipped: bool
) -> None:
    content = b"\n".join(lines) + b"\n" * end
    path = trace(gzip.compress(content) if zipped else content)

    try:
        rows = read(path)
    except InputError as error:
        assert str(error).startswith(f"{path}:")
        assert "\n" not in str(error)
    else:
        assert rows


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "big"
    block = b"".join(b" S %x,8\n" % (i * 4096) for i in range(20_000))
    with path.open("wb") as out:
        for _ in range(80):
            out.write(block)
    tracemalloc.start()
    try:
        with open_trace(path) as reader:
            for _ in reader:
                pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert reader.accesses == 1_600_000
    assert path.stat().st_size > 16 << 20
    assert peak < 12 << 20


# ---- gfns


@fuzz
@given(
    chunks=st.lists(
        st.lists(st.integers(0, 200) | st.integers(0, (1 << 64) - 1) | st.just((1 << 64) - 1), max_size=30), max_size=6
    )
)
def test_gfns_are_dense_in_order_of_first_touch(chunks: list[list[int]]) -> None:
    known: dict[int, int] = {}
    dense = DenseGfns()

    for chunk in chunks:
        expected = [known.setdefault(page, len(known)) for page in chunk]
        assert dense.map(np.array(chunk, np.uint64)).tolist() == expected
    assert dense.nr_gfns == len(known)


def test_gfns_of_a_large_program_cost_a_few_bytes_a_page() -> None:
    rng = np.random.default_rng(3)
    order = rng.permutation(1 << 18).astype(np.uint64) + np.uint64(1 << 40)
    tracemalloc.start()
    try:
        dense = DenseGfns()
        gfns = np.concatenate([dense.map(order[start : start + 8192]) for start in range(0, len(order), 8192)])
        size = tracemalloc.get_traced_memory()[0] - gfns.nbytes
    finally:
        tracemalloc.stop()

    assert gfns.tolist() == list(range(1 << 18))
    assert size < 10 << 18


# ---- reduction


def reference_reduction(rows: list[tuple[int, bool, int]], window: int) -> list[tuple[int, bool, int]]:
    if window == 1:
        return runs(rows)
    found: dict[tuple[int, int], tuple[bool, int]] = {}
    position = 0
    for page, write, n in rows:
        write_before, before = found.get((position // window, page), (False, 0))
        found[position // window, page] = (write_before or write, before + n)
        position += n
    return [(page, write, n) for (_, page), (write, n) in found.items()]


@fuzz
@given(
    records=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(1, 9)), min_size=1, max_size=60),
    window=st.sampled_from([1, 2, 5, 20, 1000]),
    chunk_rows=st.integers(1, 70),
    suffix=st.sampled_from(["", ".gz"]),
)
def test_reduction_collapses_windows_whatever_the_chunks(
    tmp_path: Path,
    trace: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    records: list[tuple[int, bool, int]],
    window: int,
    chunk_rows: int,
    suffix: str,
) -> None:
    source = trace(HEADER + "".join(f'{{"page":{page},"op":"{"rw"[w]}","n":{n}}}\n' for page, w, n in records))
    target = tmp_path / f"small{suffix}"
    expected = reference_reduction(records, window)
    monkeypatch.setattr(traces.chunks, "CHUNK_ROWS", chunk_rows)

    reduction = reduce_trace(source, target, window=window, about={"program": "p"})

    with open_trace(target) as reader:
        assert rows_of(reader) == expected
    pages = {page for page, *_ in records}
    assert reduction == traces.Reduction(sum(n for *_, n in records), len(expected), len(pages))
    assert reader.header == {
        "cvmcore_trace": 1, "page_bytes": 4096, "records": reduction.records, "accesses": reduction.accesses,
        "pages": reduction.pages, "window": window, "program": "p",
    }  # fmt: skip


def test_reduction_that_fails_leaves_nothing(tmp_path: Path, trace: Callable[[str], Path]) -> None:
    source = trace(HEADER + '{"page":1,"op":"r","n":1}\n' * 300_000 + "junk\n")
    target = tmp_path / "target.jsonl"
    target.write_text("as before")

    with pytest.raises(InputError, match=":300002: this line is not a JSON object: 'junk'"):
        reduce_trace(source, target)

    assert target.read_text() == "as before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.trace", "target.jsonl"]


def test_reduction_refuses_what_it_cannot_write(tmp_path: Path, trace: Callable[[str], Path]) -> None:
    source = trace(HEADER + '{"page":1,"op":"r","n":600000000000}\n' * 2)

    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/no/such: cannot be written: No such file")):
        reduce_trace(source, tmp_path / "no" / "such")
    with pytest.raises(InputError, match=r"more than 10\*\*12 accesses"):
        reduce_trace(source, tmp_path / "target")
    with pytest.raises(ValueError, match="a window has at least one access"):
        reduce_trace(source, tmp_path / "target", window=0)


# ---- real recordings


def test_sample_is_what_its_header_says() -> None:
    dense = DenseGfns()
    with open_trace(SAMPLE) as reader:
        for chunk in reader:
            dense.map(chunk.pages)

    assert SAMPLE.stat().st_size <= 300_000
    assert (reader.rows, reader.accesses, dense.nr_gfns) == tuple(
        reader.header[field] for field in ("records", "accesses", "pages")
    )
    assert dense.nr_gfns > 4000
    assert "valgrind" in reader.header["recorded"]


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_fresh_recording(tmp_path: Path) -> None:
    """A program recorded here and now: its accesses, counted line by line, come out of the reader and the reducer."""
    log = tmp_path / "true.lackey"
    subprocess.run(
        ["valgrind", "--tool=lackey", "--trace-mem=yes", f"--log-file={log}", "true"],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    lines = [line for line in log.read_text().splitlines() if line[:3] in ("I  ", " L ", " S ", " M ")]
    pages = {int(line[3:].partition(",")[0], 16) >> 12 for line in lines}

    reduction = reduce_trace(log, tmp_path / "true.jsonl.gz", window=1000)

    assert len(lines) > 10_000
    assert len(lines) <= reduction.accesses <= len(lines) * 1.01  # a few cross a page boundary
    assert len(pages) <= reduction.pages <= len(pages) + 5
    assert reduction.records < len(lines) / 20
