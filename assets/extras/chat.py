"""Talking to an ILM in the terminal: a conversation in which items and users are mentioned, and
ranked lists of recommendations.

Everything the model reads goes through ILM.prompt_ids, as in training; this file only finds out who
is meant and prints."""

import difflib
import re
import sys
from contextlib import suppress

import torch
from transformers import TextStreamer

import ilm
from assets.extras.hub import export
from assets.fast.search import best_items
from assets.plumbing.frames import end_id
from assets.plumbing.guard import CONTROL, InputError, Parser, a_seed, printable
from assets.plumbing.names import numbered
from assets.plumbing.run import pick_device
from data import PROMPT_ITEMS, load_prompts

HELP = (
    "Mention an item as {item:ID} or by a part of its title, [amber]; a user as {user:ID}; "
    "a history as {history:ID,ID}; a mixture, an\n"
    "item that does not exist, as {item:ID*0.5+item:ID*0.5}. Ask anything; "
    'a line with the word "recommend" is answered by a ranked list.\n'
    "  /recommend MENTIONS   the same, by a prompt from training: "
    "for a user, or for someone new who liked the items mentioned\n"
    "  /list [N]             items, 20 from the N-th on              "
    "/search WORDS   items by title or text\n"
    "  /show MENTION         what is known of an item                "
    "/new            forget the conversation\n"
    "  /remember N           let it read the last N exchanges with each question "
    "(chat models start with 9, others with 0)\n"
    "  /help                 this                                    "
    "/quit           leave (so does Ctrl-D; Ctrl-C stops a reply)"
)


class Printer(TextStreamer):
    """Prints a reply while it is written, without control characters, and keeps it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self.turn_end = "", tokenizer.decode([end_id(tokenizer)])  # perhaps not special

    def on_finalized_text(self, text, stream_end=False):
        text = text.replace(self.turn_end, "")
        text = "\n".join(
            CONTROL.sub(" ", line) for line in (text if self.text else text.lstrip()).split("\n")
        )
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)


class Chat:
    def __init__(self, model):
        self.model, self.items, self.turns = model, model.dataset.items, []
        self.guests = []  # vectors of mixtures: {item:I+n} is guests[n]
        # Training showed single questions: an LLM that never chatted gets confused
        self.memory = 9 if model.tokenizer.chat_template else 0
        items, users = numbered(item["id"] for item in self.items), numbered(model.dataset.users)
        self.known = {"item": items, "user": users}
        lines = load_prompts(model.config.get("prompts"))
        self.template = next(t[2] for t in lines if t[:2] == ("sequential", "seen")).replace(
            "{dataset}", model.dataset.meta["name"]
        )

    # -- Who is meant

    def number(self, kind, name):
        """Index of an item or a user of the data set, by its original id."""
        name = name.strip()
        if name not in self.known[kind]:
            close = difflib.get_close_matches(name, self.known[kind], 3, 0.5)
            raise InputError(
                f"no {kind} has the id {name!r}"
                + (f"; did you mean {', '.join(close)}?" if close else "")
            )
        return self.known[kind][name]

    def titled(self, part):
        """The item whose title has `part` in it; if several have, or none, the candidates are
        told."""
        titles, part = [item["title"].lower() for item in self.items], part.strip().lower()
        found = [i for i, title in enumerate(titles) if title == part] or [
            i for i, title in enumerate(titles) if part and part in title
        ]
        if len(found) == 1:
            return found[0]
        near = found or [
            titles.index(title) for title in difflib.get_close_matches(part, titles, 5, 0.3)
        ]
        names = ", ".join(f"[{self.items[i]['title']}]" for i in near[:5])
        raise InputError(
            f"{len(found) or 'no'} titles have {part!r} in them"
            + (f"; did you mean {names}?" if near else "")
        )

    def mixture(self, terms):
        """ID*0.5+item:ID*0.5 -> an entity between its items, one that does not exist (ELM's
        interpolation), or None if it is no mixture."""
        parts = [re.fullmatch(r"(.+)\*(-?\d*\.?\d+)", term) for term in terms.split("+item:")]
        if not all(parts):
            return None
        self.guests.append(
            sum(float(p[2]) * self.model.cf[self.number("item", p[1])].cpu() for p in parts)
        )
        return len(self.items) + len(self.guests) - 1

    def resolve(self, text):
        """Mentions by id or title -> the indices that ILM.prompt_ids understands."""

        def mention(match):
            kind, name = match[1] or "item", match[2]
            if kind == "history":
                return (
                    "{history:"
                    + ",".join(str(self.number("item", x)) for x in name.split(","))
                    + "}"
                )
            if match[1] is None:
                return f"{{item:{self.titled(match[3])}}}"
            entity = (
                self.mixture(name) if kind == "item" and name not in self.known["item"] else None
            )
            return f"{{{kind}:{self.number(kind, name) if entity is None else entity}}}"

        # Among them halves of UTF-16 pairs (bytes that are no UTF-8), which no tokenizer takes
        text = CONTROL.sub(" ", text)
        if bad := re.search(r"\{(?!(?:item|user|history):[^{}])[^{}]*\}", text):
            raise InputError(f"{bad[0]}: mention {{item:ID}}, {{user:ID}} or {{history:ID,ID}}")
        return re.sub(
            r"\{(item|user|history):([^{}]+)\}|\[((?:[^][]|\[[^][]*\])+)\]", mention, text
        )

    # -- Replies

    def answer(self, line):
        """Print the reply to one line of the conversation: written text, or a ranked list where the
        line asks to recommend."""
        text = self.resolve(line)
        if re.search(r"\brecommend\b", line, re.I) and re.search(r"\{(user|item|history):", text):
            # Someone new has no place in the sentence: they are asked about as in training
            return self.recommend(text, text if "{user:" in text else None)
        # Items unnamed, as in the text tasks of training
        printer, named = Printer(self.model.tokenizer), self.model.Q == 0
        before = self.turns[max(0, len(self.turns) - 2 * self.memory) :]
        prompt = self.model.prompt_ids([*before, text], named=named, guests=self.guests)
        try:
            with self.model.autocast():
                self.model.generate(
                    [prompt], min(128, self.model.context - len(prompt)), streamer=printer
                )
        except KeyboardInterrupt:
            print(" (stopped)")
        self.turns += [text, printer.text.strip().translate({ord("{"): "(", ord("}"): ")"})]

    def recommend(self, text, template=None):
        """Print the ten best items for the user in `text`, or for a new one, folded in from the
        items in it. What they had is left out."""
        users = [int(u) for u in re.findall(r"\{user:(\d+)\}", text)]
        history = [
            int(i)
            for group in re.findall(r"\{(?:item|history):([\d,]+)\}", text)
            for i in group.split(",")
        ]
        history = [i for i in history if i < len(self.items)]
        if not users and not history:
            raise InputError(
                "for whom? Mention a user, {user:ID}, or items that somebody liked, [title] "
                "(no mixtures)"
            )
        had = [*(int(i) for u in users[:1] for i in self.model.dataset.items_of(u)), *history]
        user, cf = users[0] if users else None, None
        if user is None:  # somebody new, who is what they liked
            dataset = self.model.dataset
            cf = dataset.standard_users(dataset.solver.of_histories([history]))
            cf = self.model.with_history(cf, [history])[0]
        with torch.no_grad():
            prompt = self.model.prompt_ids(
                template or self.template, user, had[-PROMPT_ITEMS:], cf=cf, guests=self.guests
            )
            (found,) = best_items(self.model, [prompt], [had])
        for place, (item, log_p) in enumerate(found, 1):
            print(f"{place:3}  {log_p:7.2f}  {self.name(item)}")

    # -- The catalogue

    def name(self, item):
        return f"{printable(self.items[item]['id'])}  {printable(self.items[item]['title'])}"

    def list(self, start):
        start = int(start) if start.isdigit() else 1
        print(
            "\n".join(map(self.name, range(len(self.items))[max(0, start - 1) :][:20]))
            or f"there are {len(self.items)} items"
        )

    def search(self, words):
        texts, words = (
            [f"{item['title']} {item['text']}".lower() for item in self.items],
            words.lower().split(),
        )
        found = [i for i, text in enumerate(texts) if all(word in text for word in words)]
        print("\n".join(map(self.name, found[:20])) + f"\n{len(found)} items" * (len(found) != 1))

    def show(self, mention):
        mention = (
            f"{{item:{mention}}}"
            if mention in self.known["item"]
            else mention
            if mention[:1] in ("{", "[")
            else f"[{mention}]"
        )
        items = [
            int(i)
            for i in re.findall(r"\{item:(\d+)\}", self.resolve(mention))
            if int(i) < len(self.items)
        ]
        if not items:
            raise InputError("show what? Give an id, a part of a title, or {item:ID}")
        for item in items:
            print(self.name(item) + "\n" + printable(self.items[item]["text"] or "(no text)"))

    def remember(self, count):
        if not count.isdigit():
            raise InputError(f"/remember: {count or 'nothing'} is not a number of exchanges")
        self.memory = int(count)

    def command(self, line):
        """One line of the user's: a command or something to answer. True: leave."""
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return True
        actions = {
            "/help": lambda: print(HELP),
            "/list": lambda: self.list(rest),
            "/search": lambda: self.search(rest),
            "/show": lambda: self.show(rest),
            "/recommend": lambda: self.recommend(self.resolve(rest)),
            "/remember": lambda: self.remember(rest),
            "/new": self.turns.clear,
        }
        if line.startswith("/") and name not in actions:
            raise InputError(f"{name}: no such command; /help lists them")
        actions.get(name, lambda: self.answer(line))()

    def converse(self):
        terminal = sys.stdin.isatty()
        with suppress(AttributeError):  # a stream that holds text already
            sys.stdin.reconfigure(errors="replace")
        if terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  (input() edits lines with it, and takes long ones)
        print(HELP)
        while True:
            try:
                line = input("> ") if terminal else next(sys.stdin, None)
                if line and not terminal:
                    print(f"> {line.strip()}")
                if line is None or line.strip() and self.command(line.strip()):
                    return
            except InputError as error:
                print(printable(str(error)))
            except KeyboardInterrupt:
                print("\n(Ctrl-D or /quit leaves)")
            except EOFError:
                return print()


def main():
    """What `python ilm.py` does."""
    p = Parser(description=ilm.__doc__.split("\n")[0])
    p.add_argument("prompt", nargs="?", help="answer this and stop; without it, a conversation")
    p.add_argument(
        "--run", default="out/toy/ilm", help="run directory of train_stage2.py [out/toy/ilm]"
    )
    p.add_argument("--data", help="prepared folder [the run's]")
    p.add_argument(
        "--new",
        metavar="FOLDER",
        help="interactions.csv (and items.csv) of users and items that came after training",
    )
    p.add_argument("--device", help="[cuda if there is one, else cpu]")
    p.add_argument(
        "--export",
        metavar="FILE.npy",
        help="write the soft tokens of all items and users, for use elsewhere",
    )
    p.add_argument("--seed", type=a_seed, default=0, help="unused: answers are greedy [0]")
    args = p.parse_args()
    model = ilm.load_ilm(args.run, pick_device(args.device), args.data, args.new)
    if args.export:
        rate = export(model, args.export)
        print(f"wrote {args.export}: {rate:,.0f} items and users a second")
    elif args.prompt:
        Chat(model).answer(args.prompt)
    else:
        Chat(model).converse()
