"""Files as people have them, each with what must come of it: the cases of ../shared/cases, and reports of the same sort made here."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, real

import data
from assets.plumbing import guard, later, names, readers

FEW = "--min-count 1 --cf-dim 4 --recency 1 --reg 1".split()
LOG = "user,item,timestamp\n" + "".join(
    f"u{u},i{(u + t) % 6},{100 * u + t}\n" for u in range(6) for t in range(6)
)
ITEMS = "id,title,genre\n" + "".join(f"i{i},Film {i},Drama\n" for i in range(6))


@pytest.fixture()
def prepare(tmp_path, monkeypatch):
    """prepare(source, *argv) -> the data set made of a folder, or of a dict of files."""

    def run(source, *argv, dataset="csv"):
        if isinstance(source, dict):
            folder = tmp_path / "in"
            folder.mkdir(exist_ok=True)
            for name, content in source.items():
                (folder / name).write_bytes(
                    content.encode() if isinstance(content, str) else content
                )
            source = folder
        flags = [
            "--dataset",
            dataset,
            "--source",
            str(source),
            "--out",
            str(tmp_path / "out"),
            *FEW,
            *argv,
        ]
        data.main(flags)
        return data.load_dataset(tmp_path / "out")

    return run


def case(name):
    return real(f"cases/{name}")


def ids(dataset, user, split=None):
    return [dataset.items[i]["id"] for i in dataset.items_of(user, split)]


def is_whole(dataset):
    """What every folder of the cases says: six users who each took all six items, from their own number on."""
    for u in range(6):
        assert [x[-1] for x in ids(dataset, u)] == [str((u + t) % 6) for t in range(6)]
        assert dataset.items[dataset.target(u, "test")]["id"][-1] == str((u + 5) % 6)
        assert ids(dataset, u, "train") == ids(dataset, u)[:4]


# ---- The cases of ../shared/cases ------------------------------------------------------------------------------------


def test_movielens_dat_in_utf8_and_in_latin_1(prepare, tmp_path, capsys):
    dataset = prepare(case("utf8-dat"), dataset="movielens")
    titles = ["Café de Flore (2011)", "Amélie (2001)", "Heat (1995)"]
    assert [
        x["title"] for x in dataset.items
    ] == titles and "Latin-1" not in capsys.readouterr().out
    assert dataset.items[1]["attributes"] == {"genres": "Comedy, Romance", "decade": "2000s"}
    assert ids(dataset, 0) == ["1", "2", "3"]
    text = (Path(case("utf8-dat")) / "movies.dat").read_text(encoding="utf-8")
    files = {
        "movies.dat": text.encode("latin-1"),
        "ratings.dat": (Path(case("utf8-dat")) / "ratings.dat").read_bytes(),
    }
    dataset = prepare(files, dataset="movielens")
    assert [x["title"] for x in dataset.items] == titles
    assert capsys.readouterr().out.count("read as Latin-1") == 1


def test_amazon_2014(prepare, capsys):
    dataset = prepare(case("amazon-2014"))
    is_whole(dataset)
    assert dataset.items[2] == {
        "id": "i2",
        "title": "Soap & Brush 2",
        "text": "Soap & Brush 2. price: 9.5; categories: Beauty, Hair Care, Tools; brand: Ivory",
        "attributes": {"price": "9.5", "categories": "Beauty, Hair Care, Tools", "brand": "Ivory"},
    }
    out = capsys.readouterr().out
    assert "related" in out and "salesRank" in out


def test_amazon_2018(prepare, capsys):
    dataset = prepare(case("amazon-2018"))
    is_whole(dataset)
    assert dataset.items[0] == {
        "id": "i0",
        "title": "Hand Soap 0",
        "text": "A soap for hands. Mild.",
        "attributes": {"category": "All Beauty, Hair & Skin", "also_buy": "B3, B4"},
    }
    assert "imageURL" in capsys.readouterr().out


def test_amazon_2023(prepare, capsys):
    dataset = prepare(case("amazon-2023"))
    is_whole(dataset)
    assert dataset.items[5] == {
        "id": "i5",
        "title": "Comb 5",
        "text": "Fine.",
        "attributes": {"main_category": "All Beauty", "average_rating": "4.1", "store": "Acme"},
    }
    assert "details" in capsys.readouterr().out


def test_nan_is_missing(prepare):
    dataset = prepare(case("nan"))
    is_whole(dataset)
    assert dataset.items[0] == {"id": "i0", "title": "item i0", "text": "", "attributes": {}}
    assert dataset.items[1] == {
        "id": "i1",
        "title": "Film 1",
        "text": "A film about 1.",
        "attributes": {"brand": "Acme"},
    }


def test_other_names_for_id_and_title(prepare):
    dataset = prepare(case("jsonl-no-title"))
    is_whole(dataset)
    assert dataset.items[3] == {
        "id": "i3",
        "title": "Cafe 3",
        "text": "Cafe 3. city: Rome",
        "attributes": {"city": "Rome"},
    }


def test_keys_in_any_order(prepare):
    dataset = prepare(case("jsonl-key-order"))
    is_whole(dataset)
    assert [(x["title"], x["attributes"]) for x in dataset.items] == [
        (f"Film {i}", {}) for i in range(6)
    ]


def test_no_genres_are_no_genre(prepare):
    dataset = prepare(case("no-genres"), dataset="movielens")
    assert dataset.items[2] == {
        "id": "3",
        "title": "Nocturne (2018)",
        "text": "Nocturne (2018). decade: 2010s",
        "attributes": {"decade": "2010s"},
    }
    assert (
        dataset.items[1]["text"]
        == "American President, The (1995). genres: Comedy, Romance; decade: 1990s"
    )
    assert ids(dataset, 0) == ["1", "2", "3"]


def test_a_column_without_a_name_is_nothing(prepare):
    dataset = prepare(case("pandas-index"))
    is_whole(dataset)
    assert dataset.items[4] == {
        "id": "i4",
        "title": "Film 4",
        "text": "Film 4. genre: Drama",
        "attributes": {"genre": "Drama"},
    }


def test_a_catalogue_of_one_item_is_refused(prepare, tmp_path):
    with pytest.raises(data.InputError, match="one item"):
        prepare(case("one-item"))
    assert not (tmp_path / "out").exists()


def test_composed_and_decomposed_titles_are_equal(prepare):
    dataset = prepare(case("two-forms"))
    is_whole(dataset)
    assert [x["title"] for x in dataset.items[:3]] == ["Café", "Café (2)", "Film 2"]


def test_a_blank_text_is_empty(prepare):
    dataset = prepare(case("blank-text"))
    is_whole(dataset)
    assert dataset.items[1]["text"] == "Film 1. genre: Drama"


def test_ids_with_spaces(prepare):
    """The case's header calls its item column "SKU 0tem": a name that nobody knows, so --columns says which it is."""
    with pytest.raises(
        data.InputError, match=r"interactions.csv, line 1: no column item.*SKU 0tem.*--columns"
    ):
        prepare(case("spaces-in-ids"))
    dataset = prepare(case("spaces-in-ids"), "--columns", "item=SKU 0tem")
    assert (
        len(later.extend(dataset, case("spaces-in-ids")).users) == 6
    )  # what --columns said holds for --new
    is_whole(dataset)
    assert [x["title"] for x in dataset.items] == [f"Thing {i}" for i in range(6)]
    assert names.item_names(dataset, None, case("spaces-in-ids") + "/names.txt") == [
        f"code{i}" for i in range(6)
    ]


def test_leading_zeros(prepare, capsys):
    dataset = prepare(case("leading-zeros"))
    assert ids(dataset, 0) == ["000", "1", "2", "3", "4", "5"]
    assert {x["id"]: x["title"] for x in dataset.items}["000"] == "Film 0"
    note = next(line for line in capsys.readouterr().out.splitlines() if "'001'" in line)
    assert "5 of the log's 6 items" in note and "'1'" in note


def test_no_id_in_common_is_refused(prepare):
    files = {"interactions.csv": LOG, "items.csv": ITEMS.replace("\ni", "\n00")}
    with pytest.raises(data.InputError, match="items.csv: knows none of the items.*'i0'.*'000'"):
        prepare(files)


def test_recbole(prepare):
    dataset = prepare(case("recbole"))
    is_whole(dataset)
    assert dataset.items[0] == {
        "id": "i0",
        "title": "Film 0",
        "text": "Film 0. class: Drama, War; release_year: 1990",
        "attributes": {"class": "Drama, War", "release_year": "1990"},
    }


@pytest.mark.parametrize(
    "change",
    [lambda x: x, lambda x: x.replace(" 23:", "T23:"), lambda x: x.replace(':16"', ':16Z"')],
)
def test_kaggle(prepare, change):
    files = {f.name: f.read_text() for f in Path(case("kaggle")).iterdir()}
    dataset = prepare({name: change(text) for name, text in files.items()})
    for u in range(6):
        assert ids(dataset, u) == [str((u + 1 + t) % 6) for t in range(6)]
    assert (
        dataset.items[0]["attributes"] == {"genres": "Drama, War", "decade": "1990s"}
        and dataset.items[0]["title"] == "Film 0 (1995)"
    )


def test_semicolons_and_tabs(prepare):
    is_whole(prepare(case("semicolons")))
    files = {f.name: f.read_text().replace(";", "\t") for f in Path(case("semicolons")).iterdir()}
    dataset = prepare(files)
    is_whole(dataset)
    assert dataset.items[0]["attributes"] == {"genre": "Drama"}


def test_times_above_2_to_the_53(prepare):
    dataset = prepare(case("big-times"))
    for u in range(len(dataset.users)):
        assert ids(dataset, u) == [f"i{i}" for i in (5, 4, 3, 2, 1, 0)]


def test_titles_with_brackets(prepare, make_ilm, capsys):
    from assets.extras.chat import Chat

    dataset = prepare(case("brackets"))
    is_whole(dataset)
    chat = Chat(make_ilm())
    chat.items = dataset.items
    assert (
        chat.resolve("About [[REC] (2007)] and [Rocky [Director's Cut] (1976)] and [heat]")
        == "About {item:0} and {item:3} and {item:5}"
    )


def test_an_item_that_nobody_chose(prepare, capsys):
    dataset = prepare(case("cold"))
    is_whole(dataset)
    assert (
        "note: 1 items of items.csv were chosen by nobody and are left out, such as 'cold1'"
        in capsys.readouterr().out
    )


def test_empty_rows_at_the_end(prepare):
    dataset = prepare(case("bad-tail"))
    is_whole(dataset)
    assert len(dataset.items) == 6


@pytest.mark.parametrize(
    "name, dataset",
    [("amazon-2018", "csv"), ("kaggle", "csv"), ("recbole", "csv"), ("utf8-dat", "movielens")],
)
def test_zipped(prepare, tmp_path, name, dataset):
    plain = prepare(case(name), dataset=dataset)
    items, sequence = plain.items, plain.sequence.tolist()
    files = {f.name + ".gz": gzip.compress(f.read_bytes()) for f in Path(case(name)).iterdir()}
    zipped = prepare(files, dataset=dataset)
    assert zipped.items == items and zipped.sequence.tolist() == sequence


def test_a_long_field(prepare):
    files = {
        "interactions.csv": LOG,
        "items.csv": ITEMS.replace("genre", "text").replace(
            "Film 2,Drama", 'Film 2,"' + "word " * 28_800 + '"'
        ),
    }
    assert len(prepare(files).items[2]["text"]) == 143_999


# ---- More reports of this sort ---------------------------------------------------------------------------------------


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_metadata_written_as_python(prepare):
    """Amazon's metadata of 2014 are dicts as Python prints them."""
    dataset = prepare(
        {
            "interactions.csv": LOG,
            "items.jsonl": "".join(
                f"{ {'asin': f'i{i}', 'title': f'It{chr(39)}s {i}'} }\n" for i in range(6)
            ),
        }
    )
    assert dataset.items[1]["title"] == "It's 1"


def test_a_json_list_of_objects(prepare):
    """pandas' to_json(orient="records")."""
    dataset = prepare(
        {
            "interactions.csv": LOG,
            "items.json": json.dumps([{"id": f"i{i}", "title": f"Film {i}"} for i in range(6)]),
        }
    )
    is_whole(dataset)
    assert dataset.items[1]["title"] == "Film 1"


def test_a_log_of_reviews_in_json_lines(prepare):
    """Amazon's reviews: other names, text and title of the review in the way, both ids of the product, times in milliseconds."""
    rows = [
        {
            "rating": 5.0,
            "title": "great",
            "text": "I\nlike",
            "asin": f"variant{i}",
            "parent_asin": f"i{i}",
            "user_id": f"u{u}",
            "timestamp": 1588687728923 - t,
        }
        for u in range(6)
        for t, i in enumerate((5, 4, 3, 2, 1, 0))
    ]
    dataset = prepare({"interactions.jsonl": jsonl(rows), "items.csv": ITEMS})
    assert ids(dataset, 0) == [f"i{i}" for i in range(6)] and dataset.items[0]["title"] == "Film 0"
    rows = [
        {
            "reviewerID": r["user_id"],
            "asin": r["parent_asin"],
            "unixReviewTime": r["timestamp"],
            "reviewTime": "09 13, 2009",
            "helpful": [0, 0],
        }
        for r in rows
    ]
    dataset = prepare({"interactions.jsonl": jsonl(rows), "items.csv": ITEMS})
    assert ids(dataset, 0) == [f"i{i}" for i in range(6)]


def test_excels_first_line_names_the_separator(prepare):
    files = {
        "interactions.csv": "sep=;\r\n" + LOG.replace(",", ";").replace("\n", "\r\n"),
        "items.csv": "sep=;\n" + ITEMS.replace(",", ";"),
    }
    is_whole(prepare(files))


def test_windows_letters(prepare, capsys):
    """cp1252's quotes and dashes are controls in Latin-1."""
    dataset = prepare(
        {
            "interactions.csv": LOG,
            "items.csv": ITEMS.replace("Film 1", "L’été – 5 €").encode("cp1252"),
        }
    )
    assert dataset.items[1]["title"] == "L’été – 5 €" and "Latin-1" in capsys.readouterr().out


def test_quotes_in_a_file_of_tabs(prepare):
    """pandas doubles the quotes and puts quotes around; others let them stand; R puts quotes around everything."""
    items = (
        ITEMS.replace(",", "\t")
        .replace("Film 1", '"7"" single"')
        .replace("Film 2", '"Heroes"')
        .replace("Film 3", '12" mix')
    )
    assert [
        x["title"] for x in prepare({"interactions.csv": LOG, "items.tsv": items}).items[1:4]
    ] == ['7" single', '"Heroes"', '12" mix']
    quoted = (
        "\n".join("\t".join(f'"{x}"' for x in line.split(",")) for line in ITEMS.splitlines())
        + "\n"
    )
    assert prepare({"interactions.csv": LOG, "items.tsv": quoted}).items[1]["title"] == "Film 1"


def test_lists_in_a_csv(prepare):
    """pandas and Steam write lists as Python does; a title in brackets is no list."""
    items = ITEMS.replace("Film 0,Drama", "\"['A', 'B']\",\"['Beauty', 'Hair Care']\"").replace(
        "Film 1,Drama", "[REC],[REC]"
    )
    dataset = prepare({"interactions.csv": LOG, "items.csv": items})
    assert dataset.items[0]["attributes"] == {"genre": "Beauty, Hair Care"}
    assert dataset.items[1]["title"] == "[REC]" and dataset.items[1]["attributes"] == {
        "genre": "[REC]"
    }


def test_objects_in_a_csv(prepare, capsys):
    """Kaggle's movies_metadata: lists of objects as text."""
    items = ITEMS.replace("Film 0,Drama", "Film 0,\"[{'id': 16, 'name': 'Animation'}]\"").replace(
        "Film 1,Drama", "Film 1,\"{'a': 1}\""
    )
    dataset = prepare({"interactions.csv": LOG, "items.csv": items})
    assert (
        "{" not in json.dumps([x["text"] for x in dataset.items])
        and "2 values of genre" in capsys.readouterr().out
    )


@pytest.mark.parametrize("nothing", ["\\N", "NaN", "nan", "NULL", "null", "None", "<NA>", "  "])
def test_what_stands_for_nothing(prepare, nothing):
    dataset = prepare(
        {
            "interactions.csv": LOG,
            "items.csv": ITEMS.replace("Film 1,Drama", f"{nothing},{nothing}"),
        }
    )
    assert dataset.items[1] == {"id": "i1", "title": "item i1", "text": "", "attributes": {}}


@pytest.mark.parametrize(
    "header",
    [
        "User-ID,ISBN,Timestamp",
        "USER ID,Item_ID,Unix Timestamp",
        "visitorid,itemid,timestamp",
        "customer_id,article_id,t_dat",
        "reviewerID,asin,unixReviewTime",
        "uid,movieId,date",
    ],
)
def test_headers_in_use(prepare, header):
    is_whole(
        prepare(
            {"interactions.csv": LOG.replace("user,item,timestamp", header), "items.csv": ITEMS}
        )
    )


def test_a_column_that_is_not_there(prepare):
    for role, name in (("time", "when"), ("title", "heading"), ("text", "blurb")):
        with pytest.raises(data.InputError, match=f"no column .*--columns {role}=NAME"):
            prepare({"interactions.csv": LOG, "items.csv": ITEMS}, "--columns", f"{role}={name}")
    with pytest.raises(data.InputError, match="genre=x: give user="):
        prepare({}, "--columns", "genre=x")


def test_a_chosen_column_that_some_objects_lack(prepare):
    rows = [{"id": f"i{i}", "title": f"Film {i}"} | ({"blurb": "b"} if i else {}) for i in range(6)]
    dataset = prepare(
        {"interactions.csv": LOG, "items.jsonl": jsonl(rows)}, "--columns", "text=blurb"
    )
    assert [x["text"] for x in dataset.items[:2]] == ["Film 0", "b"]


def test_columns_that_are_not_used_are_told(prepare, capsys):
    files = {
        "interactions.csv": LOG.replace("user,", ",stars,user,").replace("\nu", "\n7,5,u"),
        "items.csv": ITEMS,
    }
    is_whole(prepare(files))
    assert (
        "read interactions.csv: user = user, item = item, time = timestamp; left out: stars\n"
        in capsys.readouterr().out
    )


def test_a_file_without_a_header(prepare):
    """Amazon's "ratings only": user, item, rating, time in one year, item first in another. Nobody guesses; numbers say which."""
    rows = "".join("{0},{1},5.0,{2}\n".format(*line.split(",")) for line in LOG.splitlines()[1:])
    with pytest.raises(data.InputError, match="line 1: no column user, item, time.*--columns"):
        prepare({"interactions.csv": rows, "items.csv": ITEMS})
    columns = ["--columns", "user=1", "item=2", "time=4"]
    is_whole(prepare({"interactions.csv": rows, "items.csv": ITEMS}, *columns))
    plain = ITEMS.partition("\n")[2]
    dataset = prepare({"interactions.csv": rows, "items.csv": plain}, *columns, "id=1", "title=2")
    assert dataset.items[0] == {
        "id": "i0",
        "title": "Film 0",
        "text": "Film 0. 3: Drama",
        "attributes": {"3": "Drama"},
    }


@pytest.mark.parametrize(
    "write",
    [
        lambda t: f"2019-10-01 00:00:0{t} UTC",
        lambda t: f"2019-10-01T0{t}:00:00+00:30",
        lambda t: f"19{60 + 2 * t}-01-01",
        lambda t: f"{t}.5e9",
        lambda t: f"{10**30 + t}",
        lambda t: f"{1500000000000000000 + t}.0",
        lambda t: f"2019-10-01 00:00:00.{t:06}",
        lambda t: f"2019100{t + 1}",
    ],
)
def test_times_as_people_write_them(prepare, write):
    text = "user,item,timestamp\n" + "".join(
        f"u{u},i{(u + t) % 6},{write(t)}\n" for u in range(6) for t in (4, 1, 5, 0, 3, 2)
    )
    dataset = prepare({"interactions.csv": text, "items.csv": ITEMS})
    is_whole(dataset)


def test_zones_are_reckoned_with(prepare):
    times = [
        "2019-10-01T05:00:00+05:00",
        "2019-10-01T00:30:00Z",
        "2019-10-01T01:00:00",
        "2019-09-30T20:30:00-05:00",
        "2019-10-01T04:00:00+02:00",
        "2019-10-01 02:30:00",
    ]
    text = "user,item,timestamp\n" + "".join(
        f"u{u},i{(u + t) % 6},{times[t]}\n" for u in range(6) for t in (4, 1, 5, 0, 3, 2)
    )
    is_whole(prepare({"interactions.csv": text, "items.csv": ITEMS}))


@pytest.mark.parametrize(
    "time",
    [
        "31/01/2023",
        "noon",
        "1,7E+09x",
        "-5",
        "nan",
        "2023-13-01",
        "9" * 5000 + "x",
        "1e9999999999999999999999",
    ],
)
def test_times_that_nobody_can_read(prepare, time):
    with pytest.raises(data.InputError, match="interactions.csv, line 38: timestamp") as told:
        prepare({"interactions.csv": LOG + f'u1,i1,"{time}"\n', "items.csv": ITEMS})
    assert len(str(told.value)) < 400


def test_commas_at_the_end_of_every_row(prepare):
    dataset = prepare(
        {"interactions.csv": LOG.replace("\n", ",\n"), "items.csv": ITEMS.replace("\n", ",,\n")}
    )
    is_whole(dataset)
    assert dataset.items[0]["attributes"] == {"genre": "Drama"}
    is_whole(
        prepare(
            {
                "interactions.csv": LOG.replace("\n", ",,\n").replace("stamp,,", "stamp"),
                "items.csv": ITEMS,
            }
        )
    )


def test_blank_lines_anywhere(prepare, capsys):
    dataset = prepare(
        {
            "interactions.csv": "\n\n" + LOG.replace("u3,i3", "\n,,\nu3,i3"),
            "items.jsonl": "\n"
            + jsonl({"id": f"i{i}", "title": f"Film {i}"} for i in range(6))
            + "\n\n",
        }
    )
    is_whole(dataset)
    assert "2 empty rows" in capsys.readouterr().out


def test_ends_of_lines_as_old_spreadsheets_write_them(prepare):
    is_whole(
        prepare(
            {"interactions.csv": LOG.replace("\n", "\r"), "items.csv": ITEMS.replace("\n", "\r")}
        )
    )


def test_floats_for_ids(prepare):
    """pandas makes 1.0 of 1 where a column has a hole."""
    files = {
        "interactions.csv": LOG.replace(",i", ",").replace("tem", "item"),
        "items.csv": ITEMS.replace("\ni", "\n").replace(",Film", ".0,Film"),
    }
    with pytest.raises(data.InputError, match="knows none of the items.*'0'.*'0.0'"):
        prepare(files)


def test_an_item_that_stands_there_twice(prepare, capsys):
    """Amazon's metadata repeat whole lines. Lines that contradict each other are refused, as ever."""
    is_whole(prepare({"interactions.csv": LOG, "items.csv": ITEMS + "i2,Film 2,Drama\n"}))
    assert "1 repeated" in capsys.readouterr().out
    with pytest.raises(
        data.InputError, match="items.csv, line 8: the id i2 stands there for the second time"
    ):
        prepare({"interactions.csv": LOG, "items.csv": ITEMS + "i2,Film 3,Drama\n"})


@pytest.mark.parametrize("name", ["interactions.csv", "items.csv"])
def test_a_cut_off_archive_is_one_line(prepare, name):
    whole = {"interactions.csv": LOG, "items.csv": ITEMS}
    broken = {
        (k + ".gz" if k == name else k): gzip.compress(v.encode())[:-20] if k == name else v
        for k, v in whole.items()
    }
    with pytest.raises(data.InputError, match=name + ".gz"):
        prepare(broken)


def test_escaped_tags_and_what_is_none(prepare):
    items = (
        ITEMS.replace("Film 0", "&lt;b&gt;Bold&lt;/b&gt; &amp;amp; 5 &lt; 6")
        .replace("Film 1", "I <3 you")
        .replace("Film 2", "<harmony/>")
    )
    dataset = prepare(
        {
            "interactions.csv": LOG,
            "items.csv": items.replace(
                "Film 3,Drama", 'Film 3,"<a href=""http://x/y"">Good</a><br/>bye"'
            ),
        }
    )
    assert [x["title"] for x in dataset.items[:3]] == ["Bold & 5 < 6", "I <3 you", "<harmony/>"]
    assert dataset.items[3]["attributes"] == {"genre": "Good bye"}


def test_excels_unicode_text_is_one_line(prepare):
    with pytest.raises(data.InputError, match="interactions.csv.*UTF-8"):
        prepare({"interactions.csv": LOG.replace(",", "\t").encode("utf-16"), "items.csv": ITEMS})


def test_titles_that_a_tokenizer_takes_for_equal(prepare, make_ilm, capsys):
    """A tokenizer that lowers letters (BERT's, some T5s): names get numbers until their tokens differ."""
    from transformers import AutoTokenizer

    class Lower:
        def __init__(self, inner):
            self.inner, self.all_special_tokens = inner, inner.all_special_tokens

        def __call__(self, text, **more):
            return self.inner(text.lower(), **more)

        def decode(self, tokens, **more):
            return self.inner.decode(tokens, **more)

    dataset = prepare({"interactions.csv": LOG, "items.csv": ITEMS.replace("Film 1", "FILM 0")})
    tokenizer = Lower(AutoTokenizer.from_pretrained(ROOT / "assets" / "toy_llm"))
    found = names.item_names(dataset, tokenizer)
    assert (
        len({tuple(tokenizer(" " + name, add_special_tokens=False)["input_ids"]) for name in found})
        == 6
    )
    assert (
        "note: 1 titles are equal to others for this tokenizer, such as 'i1'"
        in capsys.readouterr().err
    )


def test_titles_of_which_a_tokenizer_knows_nothing(prepare, make_ilm):
    class Unknown:
        all_special_tokens = ["<unk>"]

        def __call__(self, text, **more):
            return {"input_ids": [0]}

        def decode(self, tokens, **more):
            return ""

    dataset = prepare(case("brackets"))
    with pytest.raises(data.InputError, match="'i0'.*'i1'.*--item-names random"):
        names.item_names(dataset, Unknown())


# ---- --look, --new, terminals, old runs ------------------------------------------------------------------------------


def test_a_look_says_what_was_understood_and_writes_nothing(prepare, tmp_path, capsys):
    flags = [
        "--dataset",
        "csv",
        "--source",
        case("amazon-2018"),
        "--out",
        str(tmp_path / "out"),
        "--min-count",
        "1",
        "--look",
    ]
    data.main(flags)
    out = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for said in (
        "user = user",
        "item = item",
        "time = timestamp",
        "id = asin",
        "title = title",
        "text = description",
        "imageURL",
        "6 users, 6 items, 36 interactions",
        "also_buy: text, of 6 items",
        "i0  Hand Soap 0",
        "A soap for hands. Mild.",
        "Hand Soap 2",
    ):
        assert said in out, said
    assert out.count("{item}") >= 3


def test_cold_items_and_repeats_of_a_later_log_are_told(toy, tmp_path, capsys):
    dataset = data.load_dataset(toy)
    (tmp_path / "interactions.csv").write_text(
        "user,item,timestamp\nnew,001,1\nnew,001,1\nnew,002,2\n0,002,3\n"
    )
    (tmp_path / "items.csv").write_text("id,title\ncold,Cold Item\n001,Known\n")
    more = later.extend(dataset, tmp_path)
    told = capsys.readouterr()
    assert (
        not told.out
        and "1 items of" in told.err
        and "chosen by nobody" in told.err
        and "'cold'" in told.err
        and "repeat" in told.err
    )
    assert (
        len(more.items) == 120 and more.users[-1] == "new" and more.items_of(150).tolist() == [0, 1]
    )


def test_a_later_log_in_another_form(toy, tmp_path, capsys):
    """The same reader, names and --columns... as data.py: semicolons, dates, JSON lines, .gz."""
    dataset = data.load_dataset(toy)
    (tmp_path / "interactions.csv.gz").write_bytes(
        gzip.compress(
            b"userId;movieId;date\nnew;002;2024-02-01\nnew;001;2024-01-01\n0;fresh;2024-01-01\n"
        )
    )
    (tmp_path / "items.jsonl").write_text('{"asin": "fresh", "name": "Fresh &amp; New"}\n')
    more = later.extend(dataset, tmp_path)
    assert more.items_of(150).tolist() == [0, 1] and more.items[120]["title"] == "Fresh & New"


def test_terminals_of_any_encoding(script, work, tmp_path):
    """PYTHONIOENCODING=cp1252 or ascii: a whole table, letters that the terminal lacks as escapes."""
    code = "import sys, data\nfor s in (sys.stdout, sys.stderr): s.reconfigure(encoding='ascii', errors='strict')\n"
    files = {"interactions.csv": LOG, "items.csv": ITEMS.replace("Film 1", "東京物語")}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    done = script(
        "data.py",
        *"--dataset csv --source . --out out/x --look".split(),
        *FEW,
        cwd=tmp_path,
        before=code,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr and "\\u6771" in done.stdout, (
        done
    )
    done = script("data.py", "--dataset", "csv", "--source", "東京", cwd=tmp_path, before=code)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done


def test_recommendations_are_a_whole_table_in_any_encoding(script, tmp_path):
    rows = "".join(f"u{u},i{(u + t) % 12:02},{t}\n" for u in range(12) for t in range(6))
    items = "".join(f"i{i:02},東京物語 {i} ² é\n" for i in range(12))
    (tmp_path / "interactions.csv").write_text("user,item,timestamp\n" + rows)
    (tmp_path / "items.csv").write_text("id,title\n" + items, encoding="utf-8")
    (tmp_path / "users.txt").write_text("u0\nu5\n")
    assert (
        script(
            "data.py", *"--dataset csv --source . --out x".split(), *FEW, cwd=tmp_path
        ).returncode
        == 0
    )
    argv = "--data x --out run --method text --train-llm --steps 1 --batch-size 2 --valid-users 2 --mix 1 1 0".split()
    done = script("train_stage2.py", *argv, cwd=tmp_path)
    assert done.returncode == 0, done
    code = "import sys\nfor s in (sys.stdout, sys.stderr): s.reconfigure(encoding='ascii', errors='strict')\n"
    done = script(
        "evaluate.py", *"--run run --recommend users.txt".split(), cwd=tmp_path, before=code
    )
    assert done.returncode == 0 and not done.stderr, done
    lines = done.stdout.splitlines()
    assert (
        len(lines) == 1 + 2 * 6
        and all(line.count("\t") == 4 for line in lines)
        and "\\u6771" in lines[1]
    )


def test_the_toy_llm_lies_beside_the_scripts(script, work, tmp_path):
    """Started from a folder that has no assets."""
    shutil.copytree(work / "data", tmp_path / "data")
    done = script(
        "train_stage2.py",
        *"--method text --train-llm --steps 1 --batch-size 2 --valid-users 2 --out run".split(),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    done = script(
        "evaluate.py", *"--run run --tasks sequential --max-users 2".split(), cwd=tmp_path
    )
    assert done.returncode == 0 and not done.stderr, done


def test_an_old_run_is_named_and_left_out(script, work, tmp_path):
    shutil.copytree(work / "data", tmp_path / "data")
    for name in ("old", "good"):
        shutil.copytree(work / "train_stage2", tmp_path / "out" / "toy" / name)
    config = json.loads((tmp_path / "out/toy/old/config.json").read_text())
    config["fingerprint"][0] += 1
    (tmp_path / "out/toy/old/config.json").write_text(json.dumps(config))
    done = script("evaluate.py", *"--tasks sequential --max-users 2".split(), cwd=tmp_path)
    assert (
        done.returncode == 0
        and "out/toy/old" in done.stderr
        and done.stderr.count("\n") == 1
        and "left out" in done.stderr
    ), done
    assert (tmp_path / "out/toy/good/metrics.json").exists()
    shutil.rmtree(tmp_path / "out/toy/good")
    done = script("evaluate.py", *"--tasks sequential --max-users 2".split(), cwd=tmp_path)
    assert done.returncode == 2 and "no runs" in done.stderr and done.stderr.count("\n") == 2


def test_who_has_everything_gets_a_line(script, work, tmp_path):
    dataset = data.load_dataset(work / "data" / "toy")
    (tmp_path / "later").mkdir()
    rows = "".join(f"all,{item['id']},{t}\n" for t, item in enumerate(dataset.items))
    (tmp_path / "later" / "interactions.csv").write_text("user,item,timestamp\n" + rows)
    (tmp_path / "users.txt").write_text("all\n")
    done = script(
        "evaluate.py",
        "--run",
        "train_stage2",
        "--recommend",
        tmp_path / "users.txt",
        "--new",
        tmp_path / "later",
        cwd=work,
    )
    assert (
        done.returncode == 0
        and done.stdout.count("\n") == 1
        and "all has every item" in done.stderr
    ), done


# ---- Fuzz ------------------------------------------------------------------------------------------------------------

FORMS = {
    "interactions.jsonl": jsonl(
        {"user_id": "u", "asin": i, "timestamp": 10**18 + i, "x": None} for i in range(9)
    ).encode(),
    "interactions.json": json.dumps(
        [{"user_id": "u", "asin": i, "date": "2023-01-31T10:00:00Z"} for i in range(9)]
    ).encode(),
    "interactions.csv": b'"User ID";"Item-ID";"Date"\n'
    + b'u;i;"2023-01-31 10:00:00"\nu;j;2023-01-31\n' * 5,
    "shop.inter": b"user_id:token\titem_id:token\ttimestamp:float\n"
    + b"u\ti\t1.5e9\nu\tj\t7.0\n" * 5,
    "items.jsonl": b"{'asin': 'i', 'title': '[1]', 'x': [['a', {'b': 1}], 'http://x']}\n"
    + b'{"id": 3, "name": NaN, "y": "[1, [2]]"}\n' * 5,
    "items.csv": b",id,title,genre\n" + b"0,i,\"<b>x</b> &amp;amp;\",\"['a', 'b']\"\n,,,\n" * 5,
    "shop.item": b"item_id:token\ttitle:token_seq\tclass:token_seq\n"
    + b'i\t"7"" single"\ta b c\n' * 5,
}


@pytest.mark.parametrize("file", FORMS)
@pytest.mark.parametrize("zipped", [False, True])
def test_other_forms_under_fuzz(tmp_path, file, zipped, capsys):
    """Whatever the bytes: a table, or one InputError of one printable line."""
    from test_robustness import mutated

    random, refused = np.random.default_rng(sum(file.encode())), 0
    path = tmp_path / (file + ".gz" * zipped)
    for turn in range(60):
        content = FORMS[file]
        broken = mutated(random, gzip.compress(content) if zipped and turn % 2 else content)
        path.write_bytes(gzip.compress(broken) if zipped and not turn % 2 else broken)
        try:
            readers.read_csv(tmp_path) if "inter" in file else readers.read_items(path)
        except data.InputError as error:
            refused += 1
            assert file in str(error) and guard.printable(error)
    assert refused > 10


# ---- A million lines -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_million_lines_in_seconds(tmp_path):
    import time

    random = np.random.default_rng(0)
    rows = np.stack(
        [
            random.integers(1, 6041, 10**6),
            random.integers(1, 3953, 10**6),
            random.integers(1, 6, 10**6),
            random.integers(956703932, 1046454590, 10**6),
        ],
        1,
    )
    (tmp_path / "ratings.dat").write_text(
        "".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in rows.tolist())
    )
    began = time.time()
    users, items, times = readers.read_log(tmp_path / "ratings.dat", kind=int)
    assert time.time() - began < 10
    assert (
        (users == rows[:, 0]).all()
        and (items == rows[:, 1]).all()
        and (np.argsort(times, kind="stable") == np.argsort(rows[:, 3], kind="stable")).all()
    )
