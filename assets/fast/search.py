"""Ranking, fast: the best of ILM.score over a whole catalogue by a search through the trie of
names. tests/test_search.py shows that both agree."""

import torch
import torch.nn as nn
from transformers import DynamicCache

from assets.plumbing.llm import positions
from assets.plumbing.trie import segment_logsumexp

LIVING = 5  # Beauty, 1,000 users: HR@10 .062, with 20 prefixes alone .058

# ---- Reading the living prefixes of names --------------------------------------------------------


class SideBySide:
    """All prefixes of a user are read side by side in that user's row, a token a step; a mask shows
    each of them the prompt and its own beginning:

        key          prompt | a d | b c | $        step 1 read a and d, step 2 b and c behind a
        a            x x x    x .
        b behind a   x x x    x .   x .
        $ behind b   x x x    x .   x .   x

    So the prompt's keys and values exist once, and nothing is moved. hidden: the last states of the
    prompts (B, width), then of the prefixes (N, width)."""

    def __init__(self, model, prompts):
        self.llm = model.llm
        embeddings, mask = model.embed_prompts(prompts)
        place = positions(mask)
        self.cache, self.sees, self.position = DynamicCache(), mask.bool(), place[:, -1:]
        self.hidden = self.llm.body(embeddings, mask, place, self.cache)[:, -1]

    def read(self, token, parent, user, column):
        """One more token (N,) of each living prefix, which goes on from prefix parent[n] of the
        last step, into row user[n] and the step's column column[n]."""
        B, W = len(self.position), int(column.max()) + 1
        own = column[:, None] == torch.arange(W, device=token.device)
        self.sees = torch.cat([self.sees[parent], own], 1)
        self.position = self.position + 1
        mask = self.sees.new_zeros(B, W, self.sees.shape[1])
        mask[user, column] = self.sees
        ids = token.new_zeros(B, W)
        ids[user, column] = token
        embeddings, place = self.llm.embed(ids), self.position.expand(B, W)
        hidden = self.llm.body(embeddings, mask[:, None], place, self.cache)
        self.hidden = hidden[user, column]


class OneByOne:
    """The simple path, for every LLM: a prefix is a row, read from its start."""

    def __init__(self, model, prompts):
        self.llm, self.kept = model.llm, model.llm.read(*model.embed_prompts(prompts))
        user = torch.arange(len(prompts), device=self.kept[0].device)
        self.path = user[:, None][:, :0]
        self.hidden = self.after(self.path, user)

    def after(self, path, user):
        """The last state (N, width) after each prefix (N, T): it would predict one more token."""
        kept = [x[user] for x in self.kept]
        return self.llm.follow(kept, nn.functional.pad(path, (0, 1)))[:, -1]

    def read(self, token, parent, user, column):
        self.path = torch.cat([self.path[parent], token[:, None]], 1)
        parts = zip(self.path.split(512), user.split(512))  # rows at a time
        self.hidden = torch.cat([self.after(*part) for part in parts])


# ---- The search ----------------------------------------------------------------------------------


def best_of_each(user, score, n):
    """Which of N scored things are among the `n` best of their user, sorted by user, best first ->
    indices (M,), places 0 .. n-1 (M,)."""
    order = score.argsort(descending=True)
    order = order[user[order].argsort(stable=True)]
    first = torch.searchsorted(user[order], user[order])
    place = torch.arange(len(order), device=user.device) - first
    return order[place < n], place[place < n]


def continuations(model, trie, hidden, node, score):
    """States (N, width) after prefixes that have come to nodes (N,) with scores (N,) -> all that
    may follow: of which prefix (M,), the child (M,), its score (M,)."""
    parent, child = trie.children(node)
    allowed, column = trie.token[child].unique(return_inverse=True)
    logit = model.llm.head(hidden, allowed)[parent, column]
    if trie.renormalize:
        logit = model.among_children(logit, child)
        total = segment_logsumexp(logit, parent, len(node))
    else:
        total = model.llm.head(hidden).logsumexp(1)
    return parent, child, score[parent] + logit - total[parent]


@torch.no_grad()
def search(model, prompts, trie, beams=None, taken=None):
    """log p of items' names after each prompt, (B, I): of the `beams` best of each user, the others
    -inf. beams=0: of all, exact; None: exact up to 1,000 items, 20 above. Above, LIVING times as
    many prefixes live on at each step: where p is flat, a good name may begin with a prefix that
    is not among the best 20.

    What is summed is ILM.score's; without trie.renormalize log p of all a name's tokens and the end
    token, p among the whole vocabulary. taken (B, I): items that shall not be found."""
    reader = (SideBySide if model.llm.packs else OneByOne)(model, prompts)
    B, device = len(prompts), reader.hidden.device
    beams = (20 if beams is None and trie.num_items > 1000 else beams) or trie.num_items
    if taken is None:
        taken = torch.zeros(B, trie.num_items, dtype=torch.bool, device=device)
    free = (~taken[:, trie.order]).float().cumsum(1)
    free = nn.functional.pad(free, (1, 0))  # of the first n sorted names, (B, I+1)

    # Living prefixes of names, at first an empty one for each user; and the names found so far
    user, node = torch.arange(B, device=device), torch.zeros(B, dtype=torch.long, device=device)
    score = torch.zeros(B, device=device)
    found = user[:0], node[:0], score[:0]  # user, item, score
    while len(node):
        parent, child, score = continuations(model, trie, reader.hidden, node, score)
        user, item = user[parent], trie.item[child]

        # The `beams` best finished names of each user, and the last of them, once there are so many
        done = (item >= 0) & ~taken[user, item]
        found = [torch.cat([old, new[done]]) for old, new in zip(found, (user, item, score))]
        kept, place = best_of_each(found[0], found[2], beams)
        found = [x[kept] for x in found]
        bar = torch.full((B,), -torch.inf, device=device)
        bar[found[0][place == beams - 1]] = found[2][place == beams - 1]

        # Dead is a prefix that is not above it, or that leads to nothing but taken items
        begin, end = trie.span[child].T
        alive = (item < 0) & (score > bar[user]) & (free[user, end] > free[user, begin])
        alive = alive.nonzero()[:, 0]
        kept, column = best_of_each(user[alive], score[alive], LIVING * beams)
        alive = alive[kept]
        user, node, score, parent = user[alive], child[alive], score[alive], parent[alive]
        if len(node):
            reader.read(trie.token[node], parent, user, column)
    scores = torch.full((B, trie.num_items), -torch.inf, device=device)
    scores[found[0], found[1]] = found[2]
    return scores


def best_items(model, prompts, taken, k=10):
    """The k best items after each prompt, best first: [[(item, log p), ...], ...]. taken: for each
    prompt the items to leave out."""
    mask = torch.zeros(len(prompts), model.num_items, dtype=torch.bool)
    for row, items in zip(mask, taken):
        row[list(items)] = True
    trie, best = model.trie(), []
    beams = None if k <= 20 or model.num_items <= 1000 else k
    with model.autocast():
        scores = model.rank(prompts, trie, beams, mask.to(trie.token.device))
    for row in scores:
        score, item = (x[:k].tolist() for x in row.sort(descending=True, stable=True))
        best.append([pair for pair in zip(item, score) if pair[1] > -torch.inf])
    return best
