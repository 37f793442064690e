"""The conversation, driven as a user would: through a pseudo-terminal, and in process where timing matters."""
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, as_read

import data
import train_stage2
from assets.extras.chat import Chat
from assets.fast.packing import soft_index


@pytest.fixture()
def chat(make_ilm):
    return Chat(make_ilm())


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """A run directory, one step old: what it writes is nonsense, what it ranks is valid."""
    out = tmp_path_factory.mktemp("run") / "ilm"
    sys.argv = ["train_stage2.py", "--data", str(toy), "--out", str(out), "--method", "ilm-rand", "--steps", "1", "--batch-size", "2",
                "--valid-users", "4", "--width", "32", "--device", "cpu"]
    train_stage2.main()
    return out


class Terminal:
    """A program behind a pseudo-terminal of its own."""

    def __init__(self, *command):
        self.pid, self.ours = pty.fork()
        os.set_blocking(self.ours, False) if self.pid else None
        if self.pid == 0:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that runs in the background was told to ignore it
            os.execve(sys.executable, [sys.executable, *command], {**os.environ, "TERM": "dumb"})

    def leaves(self):
        """Its exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def until(self, pattern, data=b"", seconds=300):
        """What it prints up to a match of `pattern`, and after it was sent `data`, bit by bit: else each side might wait for the other."""
        seen, end = "", time.time() + seconds
        while data or not re.search(pattern, seen):
            readable, writable, _ = select.select([self.ours], [self.ours] if data else [], [], max(0, end - time.time()))
            assert readable or writable, f"{pattern!r} did not come within {seconds} s: {seen[-500:]!r}"
            if writable:
                data = data[os.write(self.ours, data[:256]):]
            if readable:
                try:
                    seen += os.read(self.ours, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert re.search(pattern, seen), seen
        return seen

    def say(self, line, pattern=r"\n> $"):
        return self.until(pattern, line.encode() + b"\n")


def test_a_conversation_in_a_terminal(run):
    t = Terminal("ilm.py", "--run", str(run), "--device", "cpu")
    assert "Mention an item" in t.until(r"> $")
    assert "/show MENTION" in t.say("/help")
    listed = t.say("/list 3")
    assert listed.count("\n") == 21 and "003  " in listed
    title = re.search(r"003  (.+?)\r", listed)[1]
    assert title in t.say(f"/search {title.split()[0]}")
    assert "directed this" in t.say("/show {item:003}") and title in t.say("/show 003") and "show what" in t.say("/show")
    assert title in t.say(f"/show {title[:-2].lower()}")
    ranked = t.say("/recommend {user:0}")
    assert len(re.findall(r"\n +\d+ +-\d+\.\d\d  \d{3}  ", ranked)) == 10
    assert "  1 " in t.say(f"Recommend something to someone who liked [{title}]")
    assert "  1 " in t.say("/recommend {history:001,002}")
    assert "did you mean 003" in t.say("Describe {item:0003}.")
    assert "no user has the id '999'" in t.say("What would {user:999} like?")
    assert "did you mean [" in t.say("Describe [a].")
    assert "did you mean [" in t.say("Describe [" + title[:3] + "zz" + title[3:] + "].")
    assert "no such command" in t.say("/fly")
    assert "mention {item:ID}" in t.say("Describe {item}.")
    assert t.say("").strip().endswith(">")
    assert "do not fit" in t.say("word " * 3000)
    os.write(t.ours, b"Describe {item:003*0.5+item:008*0.5}.\n")
    t.until(r"\.\r\n\S")                                          # the echo, then the first word of the reply ...
    os.write(t.ours, b"\x03")                                     # ... which Ctrl-C stops
    t.until(r"\n> $")
    os.write(t.ours, b"half a line")
    t.until("half a line$")
    os.write(t.ours, b"\x03")
    while not select.select([t.ours], [], [], 5)[0]:              # CPython loses one that comes as the editor begins to wait: again
        os.write(t.ours, b"\x03")
    assert "Ctrl-D" in t.until(r"leaves\)\r\n> $")
    assert t.say("/new").strip().endswith(">")
    os.write(t.ours, b"\x04")
    assert t.leaves() == 0


def test_lines_come_from_a_pipe_as_well(run):
    done = subprocess.run([sys.executable, "ilm.py", "--run", str(run), "--device", "cpu"], cwd=ROOT, capture_output=True, text=True,
                          input="/list 120\n\n/recommend {user:5}\n/quit\n/list\n")
    assert done.returncode == 0 and done.stderr == "" and "120  " in done.stdout and "\n 10  " in done.stdout and "001  " not in done.stdout


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(chat, capsys, monkeypatch):
    def generate(prompts, limit, streamer):
        streamer.on_finalized_text(" A quiet western ")
        raise KeyboardInterrupt
    monkeypatch.setattr(chat.model, "generate", generate)
    chat.answer("Describe {item:003}.")
    assert chat.turns == ["Describe {item:2}.", "A quiet western"] and "(stopped)" in capsys.readouterr().out


def test_the_model_reads_the_whole_conversation_until_the_context_is_full(chat):
    chat.turns = ["Describe {item:2}.", "A western.", "And [of] {item:3}?", "A comedy."]
    model, seen = chat.model, lambda ids: [(i - (1 << 24)) // model.Q for i in ids if i >= 1 << 24][::model.Q]
    ids = model.prompt_ids([*chat.turns, "Compare {item:2} and {item:4}."], named=False)
    assert seen(ids) == [2, 3, 2, 4] and model.tokenizer.decode([i for i in ids if i < 1 << 24]).count("\n") == 2
    model.context = len(ids) + 63
    assert seen(model.prompt_ids([*chat.turns, "Compare {item:2} and {item:4}."], named=False)) == [3, 2, 4]


def test_a_reply_reads_as_much_of_the_conversation_as_it_is_told_to(chat, monkeypatch):
    read = []
    monkeypatch.setattr(chat.model, "prompt_ids", lambda turns, **_: read.append(len(turns)) or [5])
    monkeypatch.setattr(chat.model, "generate", lambda prompts, limit, streamer: streamer.on_finalized_text("Yes."))
    for line in ("a", "b", "/remember 1", "c", "/remember 9", "d", "/new", "e"):
        chat.command(line)
    assert read == [1, 1, 3, 7, 1]  # a question, and two turns an exchange
    with pytest.raises(data.InputError, match="not a number"):
        chat.command("/remember all")


def test_mentions_by_id_title_and_mixture(chat):
    title = chat.items[7]["title"]
    assert chat.resolve("Compare {item:003}, [" + title.upper() + "] and {history:001,002} for {user:5}") == (
        f"Compare {{item:2}}, {{item:7}} and {{history:0,1}} for {{user:{chat.known['user']['5']}}}")
    for number in range(2):  # the items that there are, then the mixtures of this conversation
        assert chat.resolve("{item:003*0.25+item:008*0.75}") == f"{{item:{120 + number}}}"
        torch.testing.assert_close(chat.guests[number], 0.25 * chat.model.cf[2] + 0.75 * chat.model.cf[7])
    with pytest.raises(data.InputError, match="did you mean"):
        chat.resolve("{item:003*0.5+item:99*0.5}")


def test_a_mixture_reaches_the_model_as_its_vector(chat, monkeypatch):
    read = []
    monkeypatch.setattr(chat.model, "generate", lambda prompts, limit, streamer: read.append(prompts[0]))
    chat.answer("Describe {item:003*0.5+item:008*0.5}.")
    model, prompt = chat.model, read[0]
    entity, = {(i - (1 << 24)) // model.Q for i in prompt if i >= 1 << 24}
    torch.testing.assert_close(prompt.vectors[entity - model.num_items], 0.5 * model.cf[2] + 0.5 * model.cf[7])


def test_a_mixture_and_a_user_in_one_line_keep_their_vectors_apart(chat):
    """One has a history behind it, the other has none."""
    model, text = chat.model, chat.resolve("{item:003*0.5+item:008*0.5} for {user:5}")
    prompt = model.prompt_ids(text, named=False, guests=chat.guests)
    ids = torch.tensor([prompt])
    found = model.embed(ids, soft_index(ids, prompt.vectors, model.num_items, model.Q))[0, torch.tensor(prompt) >= 1 << 24]
    mixture = model.with_history((0.5 * model.cf[2] + 0.5 * model.cf[7])[None])
    user = as_read(model, [model.dataset.items_of(chat.known["user"]["5"])])
    torch.testing.assert_close(found, model.soft_tokens(torch.cat([mixture, user])).flatten(0, 1), atol=1e-4, rtol=1e-4)


def test_somebody_new_is_what_they_liked(chat, monkeypatch, capsys):
    """In the order in which it is said, and wherever {user} stands in the prompt."""
    read = []
    monkeypatch.setattr("assets.extras.chat.best_items", lambda model, prompts, taken: read.append(prompts[0]) or [[]])
    chat.recommend(chat.resolve("{history:001,002} and {item:009}"))
    torch.testing.assert_close(read[0].vectors, [as_read(chat.model, [[0, 1, 8]])[0]])
    chat.answer("Recommend something for one who liked {history:001,002} and {item:009}")  # a sentence reads them, too
    assert read[1] == read[0]
    torch.testing.assert_close(read[1].vectors, read[0].vectors)


def test_recommendations_leave_out_what_they_had_and_end_in_a_valid_list(chat, capsys):
    chat.recommend(chat.resolve("{user:5}"))
    user = chat.known["user"]["5"]
    listed = [line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()]
    had = {chat.name(int(i)) for i in chat.model.dataset.items_of(user)}
    assert len(listed) == 10 and set(listed) <= set(map(chat.name, range(120))) and not had & set(listed)
    chat.recommend(chat.resolve("{user:5} who also took {history:001,002}"))
    assert not (had | set(map(chat.name, (0, 1)))) & {line.split(maxsplit=2)[2] for line in capsys.readouterr().out.splitlines()}
    with pytest.raises(data.InputError, match="for whom"):
        chat.recommend("something")


def test_a_text_only_model_talks_as_well(make_ilm, capsys):
    chat = Chat(make_ilm("text"))
    for line in ("/recommend {user:5}", "/recommend {history:001,002}", "Describe {item:003}.", "Describe {item:003*0.5+item:008*0.5}."):
        chat.command(line)
    assert len(capsys.readouterr().out.splitlines()) == 22


@pytest.mark.parametrize("text", ["Describe {item}.", "What would {user} like?", "{item:nobody}", "{item:}", "{movie:003}", "[no title]"])
def test_a_mention_that_names_nothing_is_one_line(chat, text):
    with pytest.raises(data.InputError):
        chat.answer(text)


def test_control_characters_do_not_reach_the_terminal(chat, capsys):
    chat.items[2]["title"], chat.items[2]["text"] = "Evil \x1b[2J\x07 Movie", "a\x1b]0;owned\x07b"
    chat.show("{item:003}")
    out = capsys.readouterr().out
    assert "Evil" in out and "\x1b" not in out and "\x07" not in out
