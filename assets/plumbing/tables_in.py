"""Tables as people have them, row by row: commas, tabs or semicolons, quoted or not, JSON lines
or one JSON list, zipped or not, in UTF-8 or Latin-1. What a file is stands in its bytes, not in
its name; what a column is, in its own name (NAMES)."""

import ast
import csv
import gzip
import html
import itertools
import json
import re
import unicodedata
from collections import Counter
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from decimal import Decimal, InvalidOperation
from textwrap import shorten

from assets.plumbing.guard import InputError, printable, reading

csv.field_size_limit(2**31 - 1)  # a text may be long

# How people call their columns, first come, first taken. Capitals, spaces, "_" and "-" make no
# difference.
NAMES = {
    "user": "user user_id userId reviewerID customer_id visitor_id member_id uid".split(),
    "item": "item item_id movieId parent_asin asin product_id business_id book_id article_id "
    "track_id song_id news_id recipe_id anime_id game_id app_id video_id gmap_id "
    "isbn sku iid".split(),
    "time": "timestamp time unixReviewTime unix_timestamp unix_time ts event_time datetime date "
    "created_at review_date t_dat".split(),
    "title": "title name product_title product_name item_name prod_name book_title movie_title "
    "app_name".split(),
    "text": "text description plot overview synopsis detail_desc".split(),
}
NAMES["id"] = ["id", *NAMES["item"]]

# Files that have no header: what stands between their columns, and what these are.
HEADERLESS = {
    "u.data": ("\t", "user item rating timestamp".split()),
    "ratings.dat": ("::", "user item rating timestamp".split()),
    "u.item": ("|", ["id", "title", ""]),
    "movies.dat": ("::", "id title genres".split()),
}

MISSING = {"", "NaN", "nan", "NaT", "null", "NULL", "None", "<NA>", "\\N", "(no genres listed)"}
ADDRESS = re.compile(r"(https?://|ftp://|www\.)\S*")
BREAKS = re.compile(
    r"</?(br|p|div|li|ul|ol|dl|dd|dt|td|th|tr|table|tbody|hr|h[1-6])\b[^<>]*>", re.I
)
TAGS = re.compile(
    r"</?(a|b|i|u|s|em|strong|span|font|small|big|sub|sup|img|center|code)\b[^<>]*>", re.I
)
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def plain(name):
    return re.sub(r"[\W_]", "", name).lower()


class Table:
    """A file, and what was found in it while its rows were read. roles: keys of NAMES that are
    looked for; chosen {role: column}: those that are not called as in NAMES."""

    def __init__(self, path, roles, chosen=None):
        self.path, self.roles, self.chosen = path, roles, chosen or {}
        self.columns, self.others = {}, {}  # {role: column}; names of the rest, in their order
        self.lists = set()  # columns of words with spaces between (RecBole's)
        self.remarks = Counter()  # what had to be done, and how often

    def line(self):
        """What was understood, in one line."""
        rest = "left out" if "user" in self.roles else "attributes"
        found = ", ".join(f"{role} = {column}" for role, column in self.columns.items())
        others = shorten(", ".join(self.others), 300) or "none"
        remarks = "".join(f"; {count or ''} {text}" for text, count in self.remarks.items())
        return printable(f"read {self.path.name}: {found}; {rest}: {others}{remarks}")

    def find(self, names, number):
        """The place of each role among a row's columns, a list; None where a row may lack it."""
        known, places, missing = [plain(name) for name in names], [], []
        for role in self.roles:
            wanted = map(plain, [self.chosen[role]] if role in self.chosen else NAMES[role])
            places.append(next((known.index(name) for name in wanted if name in known), None))
            if places[-1] is not None:
                self.columns[role] = names[places[-1]]
            elif role not in ("title", "text"):
                missing.append(role)
        if missing:
            raise self.unfit(missing, names, number)
        self.others |= {name: None for name in names if name and name not in self.columns.values()}
        return places

    def unfit(self, missing, names, number):
        lacks = ", ".join(NAMES[role][0] for role in missing)
        known = "; ".join(f"{role}: {' '.join(NAMES[role])}" for role in missing)
        return InputError(
            f"{self.path}, line {number}: no column {lacks}; the header has {[*names]}; known are "
            f"{known}; name others by --columns {missing[0]}=NAME, or =1, =2 ... where there is "
            "no header"
        )

    # -- Rows

    def rows(self):
        """Yield (line number, places of the roles, names of the columns, values) of every row
        that is not empty."""
        with (
            reading(self.path, "write it again as UTF-8, a header first or an object a line"),
            self.open() as f,
        ):
            lines = enumerate(f, 1)
            told = (x for x in lines if x[1].strip() and not x[1].startswith("sep="))
            start, first = next(told, (1, ""))
            if "\0" in first:
                raise InputError(
                    f"{self.path}, line {start}: this is no text; write the file as UTF-8"
                )
            read = self.json_rows if first.lstrip()[:1] in ("{", "[") else self.csv_rows
            known = None
            for number, names, row in read(itertools.chain([first], f), start, first):
                if names != known:
                    known, places = names, self.find(names, number)
                yield number, places, names, row

    def open(self):
        """The file as text, unzipped, in the encoding that its bytes are in."""
        with open(self.path, "rb") as f:
            opener = gzip.open if f.read(2) == b"\x1f\x8b" else open
        for encoding in ("utf-8-sig", "cp1252", "latin-1"):  # cp1252: Latin-1 as Windows has it
            with (
                suppress(UnicodeDecodeError),
                opener(self.path, "rt", encoding=encoding, newline="") as f,
            ):
                while f.read(1 << 20):
                    pass
                break
            self.remarks["read as Latin-1, since it is not UTF-8"] = 0
        return opener(self.path, "rt", encoding=encoding, newline="")

    def json_rows(self, lines, number, first):
        try:
            if first.lstrip().startswith("["):
                lines = json.loads("".join(lines))
            for number, row in enumerate(lines, number):
                if isinstance(row, str):  # Amazon's of 2014: as Python writes them
                    if not (row := row.strip()):
                        self.remarks["empty rows left out"] += 1
                        continue
                    row = (ast.literal_eval if row.startswith("{'") else json.loads)(row)
                if not isinstance(row, dict) or not row:
                    raise ValueError(f"{str(row)[:50]!r} is no object")
                yield number, tuple(row), list(row.values())
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise InputError(
                f"{self.path}, line {number}: {error}; write an object a line, as UTF-8"
            ) from None

    def csv_rows(self, lines, start, first):
        # What stands between the columns; quotes between tabs are inches, unless the
        # header has them.
        separator, names = HEADERLESS.get(self.path.name.removesuffix(".gz"), (None, None))
        separator = separator or max("\t;,|", key=first.count)
        literal = names or (separator == "\t" and not first.startswith('"'))
        quoting = csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL
        if separator == "::":
            lines = (line.replace("::", "\t") for line in lines)
        delimiter = separator.replace("::", "\t")
        form = {"quoting": quoting, "strict": True, "skipinitialspace": not literal}
        rows = reader = csv.reader(lines, delimiter=delimiter, **form)

        # The header, if there is one, and the rows.
        number, exact = start - 1, not names
        try:
            if not names:
                header = next(reader, [])
                if any(self.chosen.get(role, "").isdecimal() for role in self.roles):
                    rows = itertools.chain([header], reader)
                    header = map(str, range(1, len(header) + 1))
                names = tuple(map(self.name, header))
            self.find(names, start)
            twice = [name for name, count in Counter(names).items() if name and count > 1]
            if twice:
                raise InputError(
                    f"{self.path}, line {start}: two columns are called {twice[0]!r}; rename or "
                    "remove one"
                )
            for row in rows:
                number = start - 1 + reader.line_num
                if len(row) != len(names) or not row[0]:
                    if not "".join(row).strip():
                        self.remarks["empty rows left out"] += 1
                        continue
                    if len(row) < len(names) or exact and "".join(row[len(names) :]).strip():
                        remedy = "quote the field"
                        if literal and exact:
                            remedy = "quote it and the header (else quotes between tabs are text)"
                        raise InputError(
                            f"{self.path}, line {number}: expected {len(names)} columns, with "
                            f"{separator!r} between them, found {len(row)}; {remedy}, mend or "
                            "remove the line"
                        )
                yield number, names, row
        except csv.Error as error:
            raise InputError(
                f"{self.path}, line {number + 1} or after it: {error}; quote the field, and write "
                "the file as UTF-8"
            ) from None

    def name(self, name):
        """A column's name without RecBole's type; pandas' "Unnamed: 0" is none."""
        name = name.strip()
        bare = re.sub(":(token|float)(_seq)?$|^Unnamed: .*", "", name)
        if name.endswith((":token_seq", ":float_seq")):
            self.lists.add(bare)
        return bare


# ---- Values ------------------------------------------------------------------


def clean(value):
    """Any value as one line of text: entities (some shops write them twice) and tags undone,
    letters composed."""
    text = html.unescape(html.unescape(str(value)))
    text = TAGS.sub("", BREAKS.sub(" ", text))
    if text[:1] == text[-1:] == '"' and '""' in text:  # pandas between tabs: "7"" single"
        text = text[1:-1].replace('""', '"')
    return unicodedata.normalize("NFC", printable(text))


def flatten(value):
    """A value -> the texts in it, and how many objects and addresses it has, which are left out.
    Lists may lie in lists, and in strings as Python or JSON write them."""
    if isinstance(value, str) and value[:1] in ("[", "{") and value[-1:] in ("]", "}"):
        for parse in (ast.literal_eval, json.loads):
            with suppress(ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                value = parse(value)
    if isinstance(value, (list, tuple, set)):
        parts = [flatten(part) for part in value]
        texts = itertools.chain.from_iterable(found for found, _ in parts)
        return list(dict.fromkeys(texts)), sum(count for _, count in parts)
    if isinstance(value, dict):
        return [], 1
    text = clean(value)
    if ADDRESS.fullmatch(text):
        return [], 1
    return [] if text in MISSING else [text], 0


def moment(text):
    """A time as a number that sorts: an integer of any size, a decimal as it is, a date in seconds
    since 1970 (in UTC where it names no zone). ValueError where it is none of these."""
    if text.isdecimal():
        return int(text)
    try:
        number = Decimal(text)
    except InvalidOperation:
        date = datetime.fromisoformat(text.removesuffix("UTC").strip())
        date = date if date.tzinfo else date.replace(tzinfo=timezone.utc)
        return Decimal((date - EPOCH) // timedelta(microseconds=1)) / 10**6
    if not (number.is_finite() and number >= 0):
        raise ValueError(text)
    return number
