"""What README and its pages say: paths are there, commands parse, functions stand where they say, results are those of the JSON files."""
import glob
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import data
import evaluate
import train_stage1
import train_stage2
from assets.extras.tables import print_tables

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "assets/docs").glob("*.md"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {"README.md": README, **PAGES}
MADE_BY_USERS = "out/ data/ later/ shop/ previous/ tokenizer/ als/ mine/ openp5-ml100k/ openp5-beauty/ ml-100k/".split()
TO_BE_FILLED = "(to be filled)"


def words(text):
    return len(text.split())


def anchors(text):
    """Headings as GitHub names them."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_a_reader_needs_ten_minutes():
    assert len(README.splitlines()) <= 250 and words(README) <= 3_000
    assert sum(map(words, TEXTS.values())) <= 12_000


def test_readme_says_neither_commits_nor_p():
    assert not re.findall(r"\b(?=\w*\d)(?=\w*[a-f])[0-9a-f]{7}\b", README)
    assert not re.findall(r"\bp (?:<|=|\.\d)|\(p \.|  p \(", README)


@pytest.mark.parametrize("name", TEXTS)
def test_every_path_exists(name):
    here, text = (ROOT / name).parent, TEXTS[name]
    links = [path for path in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in path]
    assert not [path for path in links if not (here / path).exists()]
    named = re.findall(r"`([\w./-]+(?:/|\.py|\.sh|\.txt))`", text)
    known = {file.name for file in ROOT.rglob("*.py")} | {"my_encoder.py", "users.txt", "user_sequence.txt"}
    missing = [path for path in named if not (ROOT / path).exists() and path not in known and not path.startswith(tuple(MADE_BY_USERS))]
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_every_anchor_exists(name):
    for path, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", TEXTS[name]):
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert anchor in anchors(target.read_text(encoding="utf-8")), f"{name}: {path}#{anchor}"


def test_every_page_is_linked_from_the_readme():
    assert not [name for name in PAGES if f"({name})" not in README]


def test_every_function_stands_where_it_is_said_to():
    seen = 0
    for page, text in TEXTS.items():
        for name, path in re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)\)", text):
            code, name, seen = ((ROOT / page).parent / path).read_text(), name.split(".")[-1], seen + 1
            assert re.search(rf"^\s*(?:def|class) {name}\b|^{name} = ", code, re.M), f"{page}: no {name} in {path}"
    assert seen > 60


def test_every_deviation_is_listed():
    files = "data qformer ilm train_stage1 train_stage2 evaluate".split()
    code = sum((ROOT / f"{name}.py").read_text().count("DEVIATION:") for name in files)
    assert code == len(re.findall(r"^- `DEVIATION` ", README, re.M)) > 5


def test_every_command_parses():
    """By the script's own parser; of those that have none to import, every flag stands in --help."""
    parsers, helps, seen = {"data": data, "train_stage1": train_stage1, "train_stage2": train_stage2, "evaluate": evaluate}, {}, 0
    for text in TEXTS.values():
        for name, rest in re.findall(r"(?:python|--nproc_per_node \d|--rdzv_endpoint \S+) ((?:[\w/]+/)?\w+)\.py([^\n`&|]*)", text):
            argv, seen = shlex.split(rest, comments=True), seen + 1
            assert (ROOT / f"{name}.py").exists(), name
            if name in parsers and "..." not in argv:
                argv = [str(ROOT / "prompts.txt") if a == "prompt.txt" else a for a in argv]  # OpenP5's, which is read while parsing
                parsers[name].parse_args(argv)
            elif name in ("ilm", "assets/toy_llm/pretrain"):
                if name not in helps:
                    helps[name] = subprocess.run([sys.executable, ROOT / f"{name}.py", "--help"], capture_output=True, text=True).stdout
                for flag in re.findall(r"--[a-z0-9-]+", rest.split("#")[0]):
                    assert flag in helps[name], f"{name} {flag}"
    assert seen > 50


def tables():
    """Blocks after <!-- evaluate.py --table FILES -->: the page, FILES, the block."""
    for page, text in TEXTS.items():
        for files, block in re.findall(r"<!-- evaluate\.py --table (\S+) -->\n+```\n(.*?)```", text, re.S):
            if block.strip() != TO_BE_FILLED:
                yield page, files, block


@pytest.mark.parametrize("page, files, block", [*tables()])
def test_tables_are_those_of_the_json_files(page, files, block, capsys):
    """Each is part of what that command prints, line by line."""
    results = [json.loads(open(f).read()) for f in sorted(glob.glob(str(ROOT / files)))]
    print_tables([r for found in results for r in (found if isinstance(found, list) else [found])])
    printed = capsys.readouterr().out.splitlines()
    missing = [line for line in block.splitlines() if line.strip() not in map(str.strip, printed)]
    assert not missing, f"{page}, {files}: " + "\n".join(missing)
