"""Templates and conversations as text: who is mentioned in them, and the turns of a conversation as
an LLM is used to read them, by its chat template if its tokenizer has one."""

import datetime
import re
from functools import lru_cache

from jinja2 import TemplateError

# What a template gets that writes today's date: a run must not change overnight.
# config.json keeps it
CHAT_DATE = "2024-07-26"

MENTION = re.compile(r"\{(user|history|item)(?::([\d,]+))?\}")

# A prompt that ends with a user
ASKS_ABOUT_USER = re.compile(r"(.*?)(\{user(?::\d+)?\})\W*", re.DOTALL)


def fill(turns, history, items):
    """Templates -> the parts of each: ("words", text), and who is meant, ("item" or "history",
    index) or ("user", index). {history} stands for the items of `history`, {item} for the next of
    `items`; {user} has the index None, {user:7} says it."""
    filled, items = [], iter(items)
    for turn in turns:
        words, *rest = MENTION.split(turn)
        parts = [("words", words)]
        for kind, given, words in zip(rest[::3], rest[1::3], rest[2::3]):
            given = [int(i) for i in given.split(",")] if given else []
            if kind == "history":
                for place, item in enumerate(given or history):
                    parts += [("words", ", ")] * (place > 0) + [("history", int(item))]
            elif kind == "item":
                parts.append(("item", given[0] if given else next(items)))
            else:
                parts.append(("user", given[0] if given else None))
            parts.append(("words", words))
        filled.append(parts)
    return filled


def as_turns(template, tokenizer):
    """A template -> the turns of a conversation. A chat LLM that is asked about a user reads the
    user's soft tokens in the answer that it has begun, "For {user}", so that nothing of its frame
    stands between them and the item's name; the question is what stands before."""
    if not isinstance(template, str):
        return template
    asked = ASKS_ABOUT_USER.fullmatch(template)
    if asked and tokenizer.chat_template:
        return [asked[1].strip(), f"For {asked[2]}"]
    return [template]


def frame(turns, tokenizer, date=CHAT_DATE):
    """The turns of a conversation, user and model in turn -> one text, and whether the tokenizer
    puts its own special tokens around it. By the LLM's chat template, if it has one: the model's
    next turn is opened, and begun by the last of an even number of turns. date: for templates that
    ask for today's."""
    if not tokenizer.chat_template:  # answers follow a space, questions a new line
        said = [("\n", " ")[k % 2] + turn for k, turn in enumerate(turns)]
        return "".join(said)[1:], True

    # Who says what
    begun = "" if len(turns) % 2 else turns[-1]
    roles = [
        {"role": ("user", "assistant")[k % 2], "content": turn}
        for k, turn in enumerate(turns[: len(turns) - 1 + len(turns) % 2])
    ]

    # The template, in which the date is written already
    def written(call):
        return repr(datetime.date.fromisoformat(date).strftime(call[2]))

    template = tokenizer.get_chat_template()  # of several the default one
    dated = re.sub(r"strftime_now\((['\"])(.*?)\1\)", written, template)
    framed = tokenizer.apply_chat_template(
        roles,
        chat_template=dated,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # Qwen3's template reads it, others do not
    )
    return framed + begun, False


def answer_ids(text, tokenizer):
    """The tokens of what follows a prompt, and the end token: after a space, unless it is the reply
    in a chat, or the tokenizer puts one before every text. A name behind "For {user}" has none
    either: with one, names begin with whole words, more children at the root, and SmolLM2 learned
    ML-100K more slowly (mlp, 40 steps: 7.17 nats, so 7.03)."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    space = "" if tokenizer.chat_template or ids("a a") == 2 * ids("a") else " "
    return ids(space + text) + [end_id(tokenizer)]


@lru_cache(maxsize=8)
def end_id(tokenizer):
    """The token that ends an answer: what a chat template writes behind a turn of the model
    (Gemma's <end_of_turn>), else the tokenizer's end token."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
        try:
            written = tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError:  # it may want a system's turn, or none of the model's
            written = ""
        written = written.rpartition("answer")[2] if "answer" in written else ""
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        for token in tokenizer(written, add_special_tokens=False)["input_ids"]:
            if token in special:
                return token
    return tokenizer.eos_token_id
