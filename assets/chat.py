"""Talking to an ILM in the terminal: answers to prompts that mention items and users."""
import re
import sys

from data import InputError


class Chat:
    def __init__(self, model):
        ids = {"item": [item["id"] for item in model.dataset.items], "user": model.dataset.users}
        self.model, self.known = model, {kind: {name: k for k, name in enumerate(names)} for kind, names in ids.items()}

    def answer(self, text):
        """Answer one prompt with {item:ID}, {user:ID}, {history:ID,ID} in it (original ids)."""
        model, found = self.model, {"item": [], "user": [], "history": []}

        def resolve(match):
            kind = "user" if match[1] == "user" else "item"
            for name in match[2].split(","):
                if name not in self.known[kind]:
                    raise InputError(f"no {kind} with the id {name!r} in {model.dataset.path}")
                found[match[1]].append(self.known[kind][name])
            return "{" + match[1] + "}"

        template = re.sub(r"\{(item|user|history):([^{}]+)\}", resolve, text)
        if len(found["user"]) > 1 or re.search(r"\{(item|user|history)\}", text):
            raise InputError("mention {item:ID}, {history:ID,ID} and at most one {user:ID}")
        named = model.encoder is None  # as in training
        return model.generate([model.prompt_ids(template, *found["user"] or [None], found["history"], found["item"], named)])[0]

    def converse(self):
        print("Mention {item:ID}, {user:ID} or {history:ID,ID}; an empty line or Ctrl-D leaves.")
        while line := (input("> ") if sys.stdin.isatty() else sys.stdin.readline()).strip():
            try:
                print(self.answer(line))
            except InputError as error:
                print(error)
