"""What the README says: paths are there, commands parse, functions stand where it says, results are those of the JSON files."""
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
from assets.tables import print_tables

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "assets/PERFORMANCE.md")}
MADE_BY_USERS = "out/ data/ later/ shop/ previous/ tokenizer/ als/ mine/ openp5-ml100k/ openp5-beauty/ ml-100k/".split()


@pytest.mark.parametrize("name", TEXTS)
def test_every_path_exists(name):
    here, text = (ROOT / name).parent, TEXTS[name]
    links = [path for path in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in path]
    assert links and not [path for path in links if not (here / path).exists()]
    named = re.findall(r"`([\w./-]+(?:/|\.py|\.sh|\.txt))`", text)
    known = {file.name for file in ROOT.rglob("*.py")} | {"my_encoder.py", "users.txt", "user_sequence.txt"}
    missing = [path for path in named if not (ROOT / path).exists() and path not in known and not path.startswith(tuple(MADE_BY_USERS))]
    assert not missing


def test_every_function_stands_where_it_is_said_to():
    links = [(name.split(".")[-1], file) for text in TEXTS.values()
             for name, file in re.findall(r"\[`([\w.]+)`\]\((?:\.\./)?([\w/]+\.py)\)", text)]
    assert len(links) > 25
    for name, file in links:
        assert re.search(rf"^\s*(?:def|class) {name}\b|^{name} = ", (ROOT / file).read_text(), re.M), f"{file}: no {name}"


def test_every_deviation_is_listed():
    files = "data qformer ilm train_stage1 train_stage2 evaluate".split()
    code = sum((ROOT / f"{name}.py").read_text().count("DEVIATION:") for name in files)
    assert code == len(re.findall(r"^- `DEVIATION` ", TEXTS["README.md"], re.M)) > 5


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
    assert seen > 30


def test_tables_are_those_of_the_json_files(capsys):
    """A block after <!-- evaluate.py --table FILES --> is part of what that command prints, line by line."""
    blocks = re.findall(r"<!-- evaluate\.py --table (\S+) -->\n+```\n(.*?)```", TEXTS["README.md"], re.S)
    assert blocks
    for files, block in blocks:
        results = [json.loads(open(f).read()) for f in sorted(glob.glob(str(ROOT / files)))]
        print_tables([r for found in results for r in (found if isinstance(found, list) else [found])])
        printed = capsys.readouterr().out.splitlines()
        missing = [line for line in block.splitlines() if line.strip() not in map(str.strip, printed)]
        assert not missing, f"{files}: " + "\n".join(missing)
