"""Plain English out of named Debian packages: download, unpack, drop markup, hold a part out.

Every source is in the public domain or under a permissive licence; README.md explains SOURCES. The
packages are only downloaded and unpacked, not installed. Used by `make_tiny_base.py collect`."""

import gzip
import hashlib
import html
import json
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Optional

from tqdm import tqdm

PIECE_CHARS = 6000  # a document is cut at paragraph ends into pieces of about this length
SHORTEST_PROSE_CHARS = 60  # of a paragraph of a web page: below are menus, captions and headings


def sword_module(root: Path) -> Iterator[list[str]]:
    """Documents of a SWORD module (zText or zCom driver): a compressed block, book or chapter.

    Layout (CrossWire's z-drivers): `*.?zs` holds (offset, packed size, size) of each zlib block as
    three uint32; `*.?zv` holds (block, offset, size) of each verse."""
    for packed in sorted(root.rglob("*.[bc]zz")):
        blob = packed.read_bytes()
        block_index = packed.with_name(packed.name[:-1] + "s").read_bytes()
        blocks = [
            zlib.decompress(blob[offset : offset + size]) if size else b""
            for offset, size, _ in struct.iter_unpack("<III", block_index)
        ]
        entries = {block: [] for block in range(len(blocks))}
        verses = packed.with_name(packed.name[:-1] + "v").read_bytes()
        for block, offset, size in dict.fromkeys(verse_places(verses, blocks)):  # verses may share one comment
            if size:
                entries[block].append(blocks[block][offset : offset + size].decode("utf-8", "replace"))
        for block in entries:
            yield osis_paragraphs(" ".join(entries[block]))


def verse_places(verses: bytes, blocks: Sequence[bytes]) -> list[tuple[int, int, int]]:
    """(block, offset, size) of each verse; the size is uint16, or uint32 (zCom4, zText4).
    The module's configuration is not always right, so the one is taken whose places all exist."""
    for layout in ("<IIH", "<III"):
        if len(verses) % struct.calcsize(layout) == 0:
            places = list(struct.iter_unpack(layout, verses))
            if all(
                not size or (block < len(blocks) and offset + size <= len(blocks[block]))
                for block, offset, size in places
            ):
                return places
    raise ValueError(f"a SWORD verse index of {len(verses)} bytes fits neither known layout: the package has changed")


def osis_paragraphs(osis: str) -> list[str]:
    """Paragraphs of a text in OSIS markup; footnotes are dropped, lines of verse stay lines."""
    osis = re.sub(r"<note\b.*?</note>", "", osis, flags=re.S)
    osis = re.sub(r"</?(?:div|title|chapter|p|item|list|lg)\b[^>]*>", "\n\n", osis)
    osis = re.sub(r"<l\b[^>]*eID[^>]*>|</l>|<lb\b[^>]*>", "\n", osis)
    return split_paragraphs(html.unescape(re.sub(r"<[^>]+>", "", osis)))


def r_data(root: Path) -> Iterator[list[str]]:
    """Documents of an R package's data: every string vector of at least 1,000 characters, joined.

    `Rdata.rdb` is a row of (4 bytes big-endian length, zlib stream); within, a CHARSXP of R's XDR
    serialisation is flags (type 9 in the low byte), int32 length, bytes (R Internals, section 1.8).
    """
    for database in sorted(root.rglob("data/Rdata.rdb")):
        blob = database.read_bytes()
        while blob:
            unpack = zlib.decompressobj()
            serialised = unpack.decompress(blob[4:])
            blob = unpack.unused_data
            text = "\n".join(charsxp_strings(serialised))
            if len(text) >= 1000:
                text = re.sub(r"\A.*?\*\*\* ?START OF[^\n]*|\*\*\* ?END OF.*", "", text, flags=re.S)  # of an archive
                yield split_paragraphs(text, join_lines=True)


def charsxp_strings(serialised: bytes) -> Iterator[str]:
    """The UTF-8 or ASCII strings inside one serialised R object, in order."""
    encoding_size = struct.unpack(">i", serialised[14:18])[0]  # the header: format, three versions, native encoding
    position = 18 + encoding_size + 8  # after the vector's flags and its number of strings
    while position + 8 <= len(serialised):
        flags, size = struct.unpack(">Ii", serialised[position : position + 8])
        if flags & 0xFF != 9 or size < 0:
            return
        yield serialised[position + 8 : position + 8 + size].decode("utf-8", "replace")
        position += 8 + size


def wordnet_glosses(root: Path) -> Iterator[list[str]]:
    """Documents of twenty dictionary entries each: `word, word (noun): definition; "example"`."""
    kinds = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    for kind, name in kinds.items():
        entries = []
        for line in next(root.rglob(f"wordnet/data.{kind}")).read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence at the head of the file
                continue
            fields, gloss = line.split(" | ", 1)
            fields = fields.split()
            words = [
                re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            ]
            entries.append(f"{', '.join(words)} ({name}): {gloss.strip()}")
        for start in range(0, len(entries), 20):
            yield entries[start : start + 20]


def dictd_entries(root: Path) -> Iterator[list[str]]:
    """Documents of a dictd dictionary: one an entry."""
    text = gzip.decompress(next(root.rglob("*.dict.dz")).read_bytes()).decode("utf-8", "replace")
    for entry in re.split(r"\n(?=\S)", re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", text)):
        yield split_paragraphs(entry, join_lines=True)


class ProseParser(HTMLParser):
    """Collects running text, a paragraph a block element; not code, tables, menus, scripts."""

    SKIPPED = {"script", "style", "pre", "nav", "table", "head", "form", "button", "footer", "svg"}
    BLOCKS = set("p div li dd dt ul ol dl h1 h2 h3 h4 h5 h6 section article blockquote body main hr".split())

    def __init__(self) -> None:
        super().__init__()
        self.skip_depth = 0
        self.parts, self.paragraphs = [], []

    def close_paragraph(self) -> None:
        text = " ".join("".join(self.parts).replace("¶", "").split())
        self.parts = []
        if is_prose(text):
            self.paragraphs.append(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.skip_depth += tag in self.SKIPPED
        if tag in self.BLOCKS or tag in self.SKIPPED:
            self.close_paragraph()

    def handle_endtag(self, tag: str) -> None:
        self.skip_depth = max(0, self.skip_depth - (tag in self.SKIPPED))
        if tag in self.BLOCKS:
            self.close_paragraph()

    def handle_data(self, data: str) -> None:
        if not self.skip_depth:
            self.parts.append(data)


def is_prose(text: str) -> bool:
    """Whether a paragraph of a page is running text rather than a menu, a signature or a table."""
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text) >= SHORTEST_PROSE_CHARS and letters >= 0.85 * len(text) and text[-1] in '.:!?)”"'


def web_pages(*folders: str) -> Callable[[Path], Iterator[list[str]]]:
    """A reader of the HTML pages below the given folders of a package: one document a page."""

    def read(root: Path) -> Iterator[list[str]]:
        for page in sorted(path for folder in folders for path in root.rglob(f"{folder}/**/*.html")):
            if page.is_file() and page.name not in ("print.html", "genindex-all.html"):
                parser = ProseParser()
                parser.feed(page.read_text(encoding="utf-8", errors="replace"))
                parser.close()
                parser.close_paragraph()
                yield parser.paragraphs

    return read


def split_paragraphs(text: str, join_lines: bool = False) -> list[str]:
    """Paragraphs between blank lines; lines of one are joined, or kept with blanks collapsed."""
    separator = " " if join_lines else "\n"
    paragraphs = (
        separator.join(" ".join(line.split()) for line in paragraph.splitlines() if line.strip())
        for paragraph in re.split(r"\n\s*\n", text)
    )
    return [paragraph for paragraph in paragraphs if paragraph]


SOURCES = {  # package: (reader, licence)
    "sword-comm-tdavid": (sword_module, "public domain"),
    "sword-comm-mhcc": (sword_module, "public domain"),
    "sword-comm-scofield": (sword_module, "public domain"),
    "sword-text-web": (sword_module, "public domain"),
    "r-cran-janeaustenr": (r_data, "public domain (texts), MIT (package)"),
    "r-cran-tokenizers": (r_data, "public domain (text), MIT (package)"),
    "dict-jargon": (dictd_entries, "public domain"),
    "wordnet-base": (wordnet_glosses, "WordNet 3.0 licence"),
    "python3.11-doc": (web_pages("html"), "PSF-2.0"),
    "postgresql-doc-15": (web_pages("html"), "PostgreSQL"),
    "sqlite3-doc": (web_pages("sqlite3"), "public domain"),
    "apache2-doc": (web_pages("manual/en"), "Apache-2.0"),
    "python-django-doc": (web_pages("html"), "BSD-3-Clause"),
    "python-sqlalchemy-doc": (web_pages("html"), "MIT"),
    "rust-doc": (
        web_pages(
            "book", "reference", "nomicon", "rust-by-example", "edition-guide", "embedded-book", "rustc", "rustdoc"
        ),
        "MIT or Apache-2.0",
    ),
}


def fetch_package(package: str, folder: Path) -> tuple[Path, Path]:
    """Downloads a Debian package by apt-get (it checks the hash), unpacks it; archive, folder."""
    archives = sorted(folder.glob(f"{package}_*.deb"))
    if not archives:
        finished = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True)
        archives = sorted(folder.glob(f"{package}_*.deb"))
        if finished.returncode or not archives:
            raise FileNotFoundError(
                f"apt-get could not download {package!r}: {finished.stderr.strip()[-300:]}. "
                "This stage needs Debian 12's package lists: run `apt-get update` once."
            )
    root = folder / package
    if not root.is_dir():
        subprocess.run(["dpkg-deb", "-x", str(archives[-1]), str(root)], check=True)
    return archives[-1], root


def pieces(paragraphs: Iterable[str]) -> Iterator[str]:
    """Cuts a document at paragraph ends into texts of about PIECE_CHARS characters."""
    piece, size = [], 0
    for paragraph in paragraphs:
        piece.append(paragraph)
        size += len(paragraph)
        if size >= PIECE_CHARS:
            yield "\n\n".join(piece)
            piece, size = [], 0
    if piece:
        yield "\n\n".join(piece)


def collect(work_dir: Path, heldout_percent: float, seed: int) -> None:
    """Writes `train.jsonl`, `heldout.jsonl` ({"source", "text"} a line) and `sources.json`.

    A paragraph that occurred before, anywhere, is dropped, so that repeated boilerplate is not on
    both sides. Whether a piece is held out depends only on the seed and its text."""
    packages_dir = work_dir / "packages"
    packages_dir.mkdir(parents=True, exist_ok=True)
    seen, sources, split = set(), [], {"train": [], "heldout": []}
    for package, (read, licence) in tqdm(SOURCES.items(), desc="packages"):
        archive, root = fetch_package(package, packages_dir)
        counts = {"train": 0, "heldout": 0}
        for document in read(root):
            fresh = [text for text in document if len(text) < SHORTEST_PROSE_CHARS or text not in seen]
            seen.update(fresh)
            for text in pieces(fresh):
                if len(text) < 200:
                    continue
                digest = hashlib.sha256(f"{seed}\n{text}".encode()).digest()
                side = "heldout" if int.from_bytes(digest[:4], "big") % 10000 < 100 * heldout_percent else "train"
                split[side].append({"source": package, "text": text})
                counts[side] += len(text)
        if not counts["train"]:
            raise ValueError(f"no text found in {archive.name}: its layout has changed; mend its reader in SOURCES")
        sources.append(
            {
                "package": package,
                "version": html.unescape(archive.name.split("_")[1]).replace("%3a", ":"),
                "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
                "licence": licence,
                "train_chars": counts["train"],
                "heldout_chars": counts["heldout"],
            }
        )
    for side, records in split.items():
        write_text(work_dir / f"{side}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    write_text(work_dir / "sources.json", json.dumps(sources, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    aside = path.with_name(path.name + ".part")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
