"""Kernel ftrace text: the stage-2 faults of a VM, as `trace-cmd report`, `perf script` and the tracefs file print them.

A record of each of the three, always on one line (flags, tgid and the event's system may be there or not):

    CPU 0/KVM-4145  [002] 86.581928: kvm_page_fault:       address 113600002 error_code 182
    CPU 0/KVM  4145 [002] 86.581928: kvm:kvm_page_fault: vcpu 0 rip 0x7f08 address 0x0000000113600002 error_code 0x182
    CPU 0/KVM-4145  [002] d..1. 86.581928: kvm_mmu_set_spte: gfn 113600 spte 6000001c6e00b77 (rwxu) level 1 at 8a53b01

**What counts as a touch.** A fault says which page was touched and whether by a write. `kvm_mmu_spte_requested` and
`kvm_mmu_set_spte` of the same page follow it: they tell at which level it is mapped, and are no second touch. Where a
trace has no faults, the entries set are the touches (writes, if the entry is writable; for a large page, its first 4K
page), and where it has none of these either, the entries requested are (taken for reads). So the touches are the
events of the highest kind up to the end of a block of text. Device memory looks like any other.

**Whose touch.** The vCPU that the event names, or else the thread, numbered in order of appearance.

**Shared bit.** The gpa of a fault may have the bit set that marks a page as shared (TDX: 47 or 51); it is left out, so
that a page has one number, whichever way it is touched. Conversions are not replayed.

**Unmaps.** `kvm_unmap_hva_range` tells host virtual addresses, and nothing in such a trace says where guest memory is
in the host's address space. They are counted, and handed on if the reader was asked to `keep_unmaps`.

**What is no record** is counted: other events apart from malformed lines. Comments, stack traces and what the tools say
of themselves are neither. More than BAD_IN_A_ROW malformed lines without a record between them are an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from enum import IntEnum
from itertools import zip_longest

import attrs
import numpy as np
import numpy.typing as npt

from cvmcore.traces.chunks import NEWLINE, PAGE_SHIFT, BadLine, Bools, Chunk, Counts, Format, Pages, Text, merge_runs

BAD_IN_A_ROW = 5
"""So many malformed lines in a row are counted; one more is an error."""


class Kind(IntEnum):
    """Of an event; the higher of REQUESTED, SET and FAULT tells more about a touch."""

    OTHER = 0
    UNMAP = 1
    REQUESTED = 2
    SET = 3
    FAULT = 4


FORMATS: tuple[tuple[Kind, str], ...] = (
    # arch/x86/kvm/trace.h; the second is how older kernels print it
    (Kind.FAULT, "kvm_page_fault: vcpu <vcpu> rip 0x<rip> address 0x<gpa> error_code 0x<error>"),
    (Kind.FAULT, "kvm_page_fault: address <gpa> error_code <error>"),
    # arch/arm64/kvm/trace_arm.h
    (Kind.FAULT, "kvm_guest_fault: ipa <#gpa>, hsr <#esr>,"),
    # arch/x86/kvm/mmu/mmutrace.h
    (Kind.SET, "kvm_mmu_set_spte: gfn <gfn> spte <spte> <access> level <level>"),
    (Kind.REQUESTED, "kvm_mmu_spte_requested: gfn <gfn> pfn <pfn> level <level>"),
    # include/trace/events/kvm.h
    (Kind.UNMAP, "kvm_unmap_hva_range: mmu notifier unmap range: <#start> -- <#end>"),
)
"""What the kernel prints (TP_printk), with names for its numbers; as in printf, # is for a 0x that 0 does not have.
What may follow, behind a space, is not looked at."""

LEVELS = {1: "4K", 2: "2M", 3: "1G", 4: "512G", 5: "256T"}

_WRITE = 1 << 1
"""In an x86 error code (PFERR_WRITE_MASK), and in the qualification of an EPT violation, which is traced as one."""
_EC_SHIFT, _EC_DATA_ABORT, _WNR = 26, 0x24, 1 << 6
"""Of arm64's ESR_EL2: exception class, data abort from a lower level, and its write-not-read bit."""
_SHARED_BITS = 1 << 47 | 1 << 51
_PAGE_MASK = np.uint64(~(_SHARED_BITS >> PAGE_SHIFT) & (1 << 64) - 1)

_SPACE, _COLON, _OPEN, _CLOSE, _OPEN_BRACKET, _BRACKET, _W, _0, _9 = b" :()[]w09"
_PID_DIGITS = 10
_MOST_SPACES = 64
_LOOKED_AT = 256
"""Characters of a line that is no event."""

_RECORD = re.compile(rb"\s*\S.*?[- /]\d+ +(?:\([ \d-]+\) +)?\[\d+\] +(?:\S+ +)?\d+(?:\.\d+)?: +\S")
_BEGINNING = re.compile(rb"cpus=\d|version = \d|CPU \d+ is empty|CPU:\d+ \[")
"""What trace-cmd and the tracefs file say of the recording."""
_CHATTER = re.compile(rb"\s*(?:$|#|=> |[0-9a-f]{4,16} [^(]+\()|" + _BEGINNING.pattern)
"""These, blank lines, comments, and stack traces as each of the tools prints them."""
_LOST = re.compile(rb"CPU:\d+ \[(?:LOST )?(\d+) EVENTS")
_OVERWRITTEN = re.compile(rb"# entries-in-buffer/entries-written: (\d+)/(\d+)")


def is_ftrace(block: bytes) -> bool:
    """Whether a trace that begins with this block is ftrace text: it begins as one of the tools does, or one of its
    first lines is a record."""
    lines = [line[:_LOOKED_AT] for line in block[: 1 << 16].split(b"\n") if line.strip() and not line.startswith(b"#")]
    if not lines:
        return block.lstrip().startswith(b"# tracer:")
    return _BEGINNING.match(lines[0]) is not None or any(map(_RECORD.match, lines[: BAD_IN_A_ROW + 1]))


@attrs.frozen
class _Pattern:
    """A line of FORMATS behind the event's name, taken apart: what must stand there, and fields in between."""

    kind: Kind
    parts: tuple[bytes | str, ...]


def _patterns() -> dict[bytes, list[_Pattern]]:
    patterns: dict[bytes, list[_Pattern]] = {}
    for kind, text in FORMATS:
        name, _, body = text.partition(" ")
        texts, fields = re.split("<.*?>", body), re.findall("<(.*?)>", body)
        parts = [part for pair in zip_longest([text.encode() for text in texts], fields) for part in pair if part]
        patterns.setdefault(name.encode(), []).append(_Pattern(kind, tuple(parts)))
    return patterns


_PATTERNS = _patterns()


class _Lines(Text):
    """Lines of text, and where in them records are."""

    def _find_lines(self) -> Counts:
        """Notes on the way where words end with a colon or a bracket."""
        stops = (self.chars == _COLON) | (self.chars == _BRACKET)
        stops[:-1] &= self.chars[1:] <= _SPACE
        self._stops = np.flatnonzero(stops | (self.chars == NEWLINE))
        self._stop_chars = self.chars.take(self._stops)
        ends: Counts = self._stops[self._stop_chars == NEWLINE]
        return ends

    def records(self) -> tuple[Counts, Counts, Counts]:
        """Of the lines that are records: their index, and where [cpu] and the event's name end (at ] and at :).

        Between [cpu] and the time there may be flags.
        """
        chars, stop = self.chars, self._stop_chars
        found = np.flatnonzero((stop[:-2] == _BRACKET) & (stop[1:-1] == _COLON) & (stop[2:] == _COLON))
        cpu, time, name = (self._stops.take(found + n) for n in range(3))
        good = (chars.take(cpu - 4) == _OPEN_BRACKET) | (chars.take(cpu - 5) == _OPEN_BRACKET)
        good &= _is_digit(chars.take(cpu - 1)) & _is_digit(chars.take(time - 1))
        line = np.searchsorted(self.line_ends, cpu)
        good[1:] &= line[1:] != line[:-1]
        return (line, cpu, name) if np.count_nonzero(good) == len(good) else (line[good], cpu[good], name[good])

    def named(self, ends: Counts, names: Iterable[bytes]) -> Iterator[tuple[bytes, Counts]]:
        """For each event name: which of the names that end (at :) there are it, maybe behind the name of a system."""
        tails = self._eight[ends - 7]
        for name in names:
            found = np.flatnonzero(tails == np.uint64(int.from_bytes(name[-8:], "big")))
            if len(found):
                places = ends.take(found) - (len(name) - 1)
                before = self.chars.take(places - 1)
                alone = (before <= _SPACE) | (before == _COLON)
                yield name, found[alone & self.stands_at(places, name[:-8])]

    def behind_spaces(self, places: Counts) -> Counts:
        """The first character at or after each place that is no space; only so many are skipped."""
        for _ in range(_MOST_SPACES):
            is_space = self.chars.take(places) == _SPACE
            if not np.count_nonzero(is_space):
                break
            places = places + is_space
        return places

    def threads(self, cpu: Counts) -> tuple[Counts, Bools]:
        """The thread ids before each [cpu] (its ]), and whether there is one."""
        at = cpu - 4
        at -= self.chars.take(at) != _OPEN_BRACKET
        at = self._before_spaces(at - 1)
        # A thread group, where it is shown, stands between: (4145), (-----), or ( 4145).
        grouped = self.chars.take(at) == _CLOSE
        if np.count_nonzero(grouped):
            for _ in range(_PID_DIGITS + 1):
                at -= grouped & (self.chars.take(at) != _OPEN)
            at = self._before_spaces(at - grouped)
        values, nr_digits = np.zeros_like(at), np.zeros_like(at)
        going_on = np.ones(len(at), bool)
        for n in range(_PID_DIGITS):
            chars = self.chars.take(at - n)
            going_on &= _is_digit(chars)
            if not np.count_nonzero(going_on):
                break
            values += going_on * (chars.astype(np.int64) - _0) * 10**n
            nr_digits += going_on
        return values, nr_digits > 0

    def _before_spaces(self, places: Counts) -> Counts:
        for _ in range(_PID_DIGITS):
            is_space = self.chars.take(places) == _SPACE
            if not np.count_nonzero(is_space):
                break
            places = places - is_space
        return places


def _is_digit(chars: npt.NDArray[np.uint8]) -> Bools:
    return (chars >= _0) & (chars <= _9)


@attrs.frozen(eq=False)
class _Events:
    """What the records of a block say, one of each for each record."""

    kind: Counts
    page: Pages
    is_write: Bools
    vcpu: Counts
    level: Counts
    start: Pages
    end: Pages

    @classmethod
    def none(cls, n: int) -> _Events:
        zeros = np.zeros
        return cls(
            zeros(n, np.int64), zeros(n, np.uint64), zeros(n, bool), np.full(n, -1, np.int64), zeros(n, np.int64),
            zeros(n, np.uint64), zeros(n, np.uint64),
        )  # fmt: skip

    def read(self, text: _Lines, name: str, rows: Counts, places: Counts) -> tuple[Bools, Counts]:
        """Take field `name` of some rows from the text. Returns whether it is what it must be, and where it ends."""
        match name:
            case "access":  # (rwx), (rwxu), (rwxXu)
                self.is_write[rows] = text.chars.take(places + 2) == _W
                length = 5 + (text.chars.take(places + 4) != _CLOSE)
                length += text.chars.take(places + length - 1) != _CLOSE
                good = (text.chars.take(places) == _OPEN) & (text.chars.take(places + length - 1) == _CLOSE)
                return good, places + length
            case "vcpu" | "level":
                numbers, length = text.decimal(places)
                getattr(self, name)[rows] = numbers
                good = length > 0
                return good & (numbers >= 1) & (numbers <= len(LEVELS)) if name == "level" else good, places + length
            case "rip" | "spte" | "pfn":
                length = text.hexadecimal_length(places)
                return length > 0, places + length
        if name[0] == "#":
            places = places + 2 * text.stands_at(places, b"0x")
        values, length = text.hexadecimal(places)
        match name.lstrip("#"):
            case "gpa":
                self.page[rows] = values >> np.uint64(PAGE_SHIFT) & _PAGE_MASK
            case "gfn":
                self.page[rows] = values & _PAGE_MASK
            case "error":
                self.is_write[rows] = (values & np.uint64(_WRITE)) != 0
            case "esr":
                aborts = values >> np.uint64(_EC_SHIFT) == np.uint64(_EC_DATA_ABORT)
                self.is_write[rows] = aborts & ((values & np.uint64(_WNR)) != 0)
            case "start":
                self.start[rows] = values
            case "end":
                self.end[rows] = values
        return length > 0, places + length


class Ftrace(Format):
    """The touches in ftrace text. All lines of a block at once."""

    name = "ftrace"
    hint = "was kvm:kvm_page_fault recorded?"

    def __init__(self, keep_unmaps: bool = False) -> None:
        super().__init__()
        self.keep_unmaps = keep_unmaps
        self.malformed = self.others = self.unmaps = self.lost = 0
        self.levels: Counter[tuple[Kind, int]] = Counter()
        self._touch = Kind.REQUESTED
        self._numbers: dict[int, int] = {}
        self._bad_in_a_row = 0

    def parse(self, block: bytes) -> list[Chunk]:
        """The touches in whole lines. Raises BadLine where too many lines in a row are malformed."""
        text = _Lines(block)
        line, cpu, name = text.records()
        events, good = self._read(text, name)
        if not block.endswith(b"\n"):
            good &= line < len(text.line_ends) - 1  # a number in a cut line may be cut
        self._touch = max(self._touch, Kind(int(events.kind.max(where=good, initial=0))))
        touches = good & (events.kind == self._touch)
        good &= self._number_threads(text, cpu, events.vcpu, touches)
        self._judge(text, line, good)
        self.lines += len(text.line_ends)
        self.others += int(np.count_nonzero(good & (events.kind == Kind.OTHER)))
        self._count_levels(events.kind[good], events.level[good])
        unmaps = np.flatnonzero(good & (events.kind == Kind.UNMAP))
        self.unmaps += len(unmaps)
        return self._chunks(events, touches & good, unmaps if self.keep_unmaps else [])

    @property
    def figures(self) -> dict[str, int]:
        """Lines and events by what became of them."""
        some = {"unmapped ranges": self.unmaps, "events lost in recording": self.lost}
        some |= {f"recorded {LEVELS[level]} mappings": n for level, n in sorted(self._mappings().items())}
        return {"other events": self.others, "malformed lines": self.malformed} | {k: n for k, n in some.items() if n}

    @property
    def notes(self) -> list[str]:
        """What the touches stand for, and what is missing."""
        notes = []
        if self._touch is not Kind.FAULT:
            what = "entries that KVM set" if self._touch is Kind.SET else "entries that KVM asked for, taken for reads"
            notes.append(f"no fault is in the trace: {what} stand for touches")
        if sum(n for level, n in self._mappings().items() if level > 1):
            notes.append("large pages were mapped in the recording: of each, only the first page touched is known")
        if self.lost:
            notes.append(f"the recording lost {self.lost} events: pages may be missing")
        if self.malformed:
            notes.append(f"{self.malformed} lines of the trace are malformed and left out")
        return notes

    # ---- steps of parse ---------------------------------------------------------------------------------------

    def _read(self, text: _Lines, name_ends: Counts) -> tuple[_Events, Bools]:
        """What the records say, and whether they say it as the kernel does."""
        events = _Events.none(len(name_ends))
        good = np.ones(len(name_ends), bool)
        for name, mine in text.named(name_ends, _PATTERNS):
            good[mine] = False
            body = text.behind_spaces(name_ends.take(mine) + 1)
            for pattern in _PATTERNS[name]:
                rows, at = mine, body
                for part in pattern.parts:
                    if isinstance(part, bytes):
                        fits, at = text.stands_at(at, part), at + len(part)
                    else:
                        fits, at = events.read(text, part, rows, at)
                    if np.count_nonzero(fits) < len(fits):
                        rows, at = rows[fits], at[fits]
                    if len(rows) == 0:
                        break
                rows = rows[text.chars.take(at) <= _SPACE]
                events.kind[rows] = pattern.kind
                good[rows] = True
        return events, good

    def _judge(self, text: _Lines, line: Counts, good: Bools) -> None:
        """Count malformed lines; raise BadLine where there are too many in a row."""
        is_good = np.zeros(len(text.line_ends), bool)
        is_good[line] = good
        is_record = np.zeros(len(is_good), bool)
        is_record[line] = True
        after = 0
        for index in np.flatnonzero(~is_good).tolist():
            if not is_record[index]:
                content = text.line(index).strip()[:_LOOKED_AT]
                if self._is_chatter(content):
                    continue
                if _RECORD.match(content):
                    self.others += 1
                    is_good[index] = True
                    continue
            if np.count_nonzero(is_good[after:index]):
                self._bad_in_a_row = 0
            after = index + 1
            self.malformed += 1
            self._bad_in_a_row += 1
            if self._bad_in_a_row > BAD_IN_A_ROW:
                raise BadLine(index, f"is the {self._bad_in_a_row}th in a row that is no event as ftrace prints it")
        if np.count_nonzero(is_good[after:]):
            self._bad_in_a_row = 0

    def _is_chatter(self, line: bytes) -> bool:
        """Whether a line without an event is one that the tools write; what they say of lost events is added up."""
        if lost := _LOST.match(line):
            self.lost += int(lost[1])
        elif overwritten := _OVERWRITTEN.match(line):
            self.lost += max(0, int(overwritten[2]) - int(overwritten[1]))
        return _CHATTER.match(line) is not None

    def _count_levels(self, kind: Counts, level: Counts) -> None:
        for one in (Kind.REQUESTED, Kind.SET):
            for number, n in enumerate(np.bincount(level[kind == one]).tolist()):
                if n:
                    self.levels[one, number] += n

    def _mappings(self) -> dict[int, int]:
        """Mappings by level: of the entries set, or requested where none were traced."""
        kind = Kind.SET if any(kind is Kind.SET for kind, _ in self.levels) else Kind.REQUESTED
        return {level: n for (one, level), n in self.levels.items() if one is kind}

    def _number_threads(self, text: _Lines, cpu: Counts, vcpu: Counts, touches: Bools) -> Bools:
        """Where the event names no vCPU, the thread stands for it. Returns what is bad for having no thread either."""
        good = np.ones(len(vcpu), bool)
        rows = np.flatnonzero(touches & (vcpu < 0))
        if len(rows) == 0:
            return good
        threads, good[rows] = text.threads(cpu.take(rows))
        ids, first, which = np.unique(threads, return_index=True, return_inverse=True)
        for place in np.argsort(first).tolist():
            self._numbers.setdefault(int(ids[place]), len(self._numbers))
        vcpu[rows] = np.array([self._numbers[thread_id] for thread_id in ids.tolist()])[which]
        return good

    def _chunks(self, events: _Events, touches: Bools, unmaps: Iterable[int]) -> list[Chunk]:
        found: list[Chunk] = []
        before = 0
        for end in [*unmaps, len(touches)]:
            rows = np.flatnonzero(touches[before:end]) + before
            found.append(merge_runs(events.page[rows], events.is_write[rows], events.vcpu[rows]))
            if end < len(touches):
                found[-1] = found[-1].before((int(events.start[end]), int(events.end[end])))
            before = end
        return found
