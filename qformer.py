"""The Q-Former and the five losses that align it with text (stage 1).

Needs torch alone; lift it out of here if you like.

A Q-Former turns a collaborative-filtering (CF) vector into Q soft tokens. It is a small BERT with
two inputs, learned *query* tokens and *text* tokens, which share self-attention and part ways in
the feed-forward. Only the queries can see the CF vector, by cross-attention in every second layer.
Which of them may see which is set by one function, attention_pattern(). That function is the heart
of the method: the same weights contrast (ITC), match (ITM) and write (ITG) texts.

Source: BLIP-2 (arXiv 2301.12597, section 3) with a CF vector in place of an image. ILM (arXiv
2406.02844) adds the item-item (II) and user-item (UI) losses. A user is one more item: the same
encoder reads user vectors.

Dimension letters of the six files (assets/ says its own):
    B batch    Q queries = soft tokens per item    M CF key tokens    D Q-Former width    E CF width
    T text tokens (in ilm.py target tokens)    L length of a prompt or packed row    H heads
    V vocabulary    P width of the contrastive space    W items of a history    I items    U users
    N any number of rows    S keys (in ilm.py soft tokens)    "hidden" in a shape: the LLM's width
    E' = (1 + W) * E: a vector, and behind it those of a user's last W items (zeros for an item)
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

TEMPERATURES = 0.001, 0.5  # the learned one of ITC, II and UI stays between


@dataclass(frozen=True)
class QFormerConfig:
    cf_dim: int  # E
    vocab_size: int  # V of the text branch
    num_queries: int = 4  # Q. BLIP-2 has 32; the paper's number is not known to us
    # D. DEVIATION: BERT-base's 768 in BLIP-2; --width 768 --layers 8 --init-bert is nearest to it
    width: int = 128
    layers: int = 2  # 8 in the paper, 12 in BLIP-2; cross-attention in layers 0, 2, 4, ...
    heads: int = 0  # H; 0: width // 32, or the next smaller number that divides the width
    history: int = 0  # W, items of a user's history that queries read beside the CF vector
    # M. DEVIATION: one key would make the softmax of cross-attention trivial (always 1): CFKeys
    cf_tokens: int = 4
    proj_dim: int = 64  # P. 256 in BLIP-2
    max_text: int = 48  # T at most. 32 in BLIP-2
    dropout: float = 0.1


# ---- Who may see whom ---------------------


def attention_pattern(pattern, num_queries, text_mask):
    """The three patterns of BLIP-2's figure 2.

    text_mask (B, T), True at real tokens -> (B, 1, Q+T, Q+T), True means "may attend".

                separate (ITC)         joint (ITM)            causal (ITG)
                keys q q t t t         keys q q t t t         keys q q t t t
        query q      x x . . .              x x x x x              x x . . .
        query q      x x . . .              x x x x x              x x . . .
        text  t      . . x x x              x x x x x              x x x . .
        text  t      . . x x x              x x x x x              x x x x .
        text  t      . . x x x              x x x x x              x x x x x

    separate: neither knows the other, so that their similarity is a fair question.
    joint: they may compare notes.
    causal: text is written word by word from what the queries say; queries never peek at the text
    they must explain.

    Queries see the same in separate and causal. So item_text_losses takes ITC's queries from ITG's
    pass, and ITC's texts from a pass without queries.
    """
    (B, T), Q = text_mask.shape, num_queries
    allowed = torch.zeros(Q + T, Q + T, dtype=torch.bool, device=text_mask.device)
    allowed[:Q, :Q] = True
    if pattern == "separate":
        allowed[Q:, Q:] = True
    elif pattern == "joint":
        allowed[:] = True
    elif pattern == "causal":
        allowed[Q:] = allowed.new_ones(T, Q + T).tril(Q)
    else:
        raise ValueError(f"unknown attention pattern {pattern!r}")
    keys = torch.cat([text_mask.new_ones(B, Q), text_mask], 1)  # nobody attends to padding
    return allowed & keys[:, None, None, :]


# ---- Building blocks (BERT's: LayerNorm *after* each residual sum, erf gelu) ----


class Attention(nn.Module):
    """Multi-head attention with residual and LayerNorm.

    x (B, N, D), context (B, S, D), mask (B, 1, N, S) or None -> (B, N, D).
    """

    def __init__(self, width, heads, dropout):
        super().__init__()
        assert width % heads == 0, f"width {width} is not a multiple of {heads} heads"
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.heads, self.dropout = heads, dropout

    def split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, N, D/H)

    def forward(self, x, context, mask=None):
        y = F.scaled_dot_product_attention(
            self.split(self.query(x)),
            self.split(self.key(context)),
            self.split(self.value(context)),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y = self.out(y.transpose(1, 2).flatten(2))  # (B, N, D)
        return self.norm(x + F.dropout(y, self.dropout, self.training))


class FeedForward(nn.Module):
    def __init__(self, width, dropout):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = dropout

    def forward(self, x):
        return self.norm(x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training))


class Layer(nn.Module):
    """Self-attention shared by queries and text, then what each kind does for itself.

    Even layers: queries read the CF keys by cross-attention. Odd ones: those of the history, if any
    (keys, mask). A single layer reads both. Each kind has a feed-forward of its own.
    """

    def __init__(self, config, reads_cf, reads_history):
        super().__init__()
        attention = (config.width, config.heads, config.dropout)
        self.self_attention = Attention(*attention)
        self.cross_attention = Attention(*attention) if reads_cf else None
        self.history_attention = Attention(*attention) if reads_history else None
        self.query_ffn = FeedForward(config.width, config.dropout)
        self.text_ffn = FeedForward(config.width, config.dropout)

    def forward(self, x, num_queries, mask, cf_keys=None, history_keys=None):
        x = self.self_attention(x, x, mask)  # (B, Q+T, D)
        queries, text = x[:, :num_queries], self.text_ffn(x[:, num_queries:])
        if num_queries and self.cross_attention is not None:
            queries = self.cross_attention(queries, cf_keys)
        if self.history_attention is not None and history_keys is not None:
            queries = self.history_attention(queries, *history_keys)
        return torch.cat([self.query_ffn(queries), text], 1)


class CFKeys(nn.Module):
    """A CF vector (B, E) -> M key tokens (B, M, D).

    An image gives BLIP-2's queries 257 patches to choose from. One CF vector as one key gives them
    no choice: softmax over a single key is 1, and cross-attention is a learned linear map added to
    every query alike. M projections give the queries something to attend *between*. DEVIATION: no
    LayerNorm; BLIP-2 has one on its patches. It would take the length of the vector away, which
    says how popular an item is and how active a user.
    """

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.cf_dim, config.cf_tokens * config.width)
        self.tokens = config.cf_tokens

    def forward(self, cf):
        return self.linear(cf).view(len(cf), self.tokens, -1)


class HistoryKeys(nn.Module):
    """The last W items of a user's history, latest first -> keys for the queries.

    history (B, W * E), zeros where there is no item -> keys (B, W + 1, D), one an item, and a
    learned one, for softmax needs one where there is no history; and which may be attended to
    (B, 1, 1, W + 1).

    A user's vector is a sum, behind which no query can look; here they can choose. The attention
    that reads these keys and its LayerNorm are new in stage 2; its output starts at zero.
    DEVIATION: the paper's encoder reads the CF vector alone.
    """

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.cf_dim, config.width)
        self.places = nn.Parameter(torch.zeros(config.history + 1, config.width))

    def forward(self, history):
        items = history.unflatten(1, (len(self.places) - 1, -1))  # (B, W, E)
        present = (items != 0).any(2)
        keys = F.pad(self.linear(items), (0, 0, 0, 1)) + self.places  # the last is places[W] alone
        return keys, F.pad(present, (0, 1), value=True)[:, None, None]


# ---- The model ----------------------------


class QFormer(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, W = config.width, config.history
        heads = config.heads or next(h for h in range(max(1, D // 32), 0, -1) if D % h == 0)
        self.config = config = replace(config, heads=heads)
        self.width, self.history = D, W

        # What the layers read
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, D))
        self.cf_keys = CFKeys(config)
        self.history_keys = HistoryKeys(config) if W else None
        self.words = nn.Embedding(config.vocab_size, D)
        self.positions = nn.Embedding(config.max_text, D)  # text alone: queries have no order
        self.norm = nn.LayerNorm(D, eps=1e-12)

        # Every second layer reads the CF vector; those between, or a single one, read the history
        self.layers = nn.ModuleList()
        for i in range(config.layers):
            reads_history = W > 0 and (i % 2 == 1 or config.layers == 1)
            self.layers.append(Layer(config, i % 2 == 0, reads_history))

        # Heads, one a loss
        self.query_proj = nn.Linear(D, config.proj_dim)
        self.text_proj = nn.Linear(D, config.proj_dim)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.itm_head = nn.Linear(D, 2)
        self.lm_transform, self.lm_norm = nn.Linear(D, D), nn.LayerNorm(D, eps=1e-12)
        self.lm_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.init_weights()

    def init_weights(self):
        """Normal weights, zero biases; what has to be heard from the start is louder."""
        # BERT's .02 is for width 768. Scaled, each layer keeps its gain; else a narrow model would
        # stay on a plateau for long.
        D, E = self.width, self.config.cf_dim
        std = 0.02 * math.sqrt(768 / D)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.queries, std=std)

        # The CF vector has to be heard. At first it makes under 1 % of the variance of the queries'
        # states with BERT's small weights, 30 % with these
        nn.init.normal_(self.cf_keys.linear.weight, std=E**-0.5)
        for layer in self.layers:
            cross = layer.cross_attention
            if cross is not None:
                nn.init.normal_(cross.value.weight, std=D**-0.5)
                nn.init.normal_(cross.out.weight, std=D**-0.5)

        # The history says nothing at first, and learns what the vector leaves out
        if self.history:
            nn.init.normal_(self.history_keys.linear.weight, std=E**-0.5)
            nn.init.normal_(self.history_keys.places, std=1.0)
        for layer in self.layers:
            attention = layer.history_attention
            if attention is not None:
                nn.init.normal_(attention.value.weight, std=D**-0.5)
                nn.init.zeros_(attention.out.weight)

    def embed(self, num_queries, text_ids):
        """What the first layer reads: queries, then words with their positions. (B, Q+T, D)"""
        B, T = text_ids.shape
        queries = self.queries[:, :num_queries].expand(B, -1, -1)
        words = self.words(text_ids) + self.positions(torch.arange(T, device=text_ids.device))
        x = self.norm(torch.cat([queries, words], 1))
        return F.dropout(x, self.config.dropout, self.training)

    def forward(self, cf=None, text_ids=None, text_mask=None, pattern="joint"):
        """An item, a text, or both, seeing of each other what the pattern allows.

        cf (B, E or E') and/or text_ids, text_mask (B, T) -> query states (B, Q, D) and text states
        (B, T, D); Q or T is 0 for what was not given.
        """
        Q, mask, cf_keys, history_keys = 0, None, None, None

        # What the queries can read: the CF vector, and behind it the vectors of a user's last items
        if cf is not None:
            Q, E = self.config.num_queries, self.config.cf_dim
            cf_keys = self.cf_keys(cf[:, :E])  # (B, M, D)
            if self.history and cf.shape[1] > E:
                history_keys = self.history_keys(cf[:, E:])

        # Who may see whom
        if text_ids is None:
            text_ids = torch.zeros(len(cf), 0, dtype=torch.long, device=cf.device)
        else:
            mask = attention_pattern(pattern, Q, text_mask)

        x = self.embed(Q, text_ids)  # (B, Q+T, D)
        for layer in self.layers:
            x = layer(x, Q, mask, cf_keys, history_keys)
        return x[:, :Q], x[:, Q:]

    def encode(self, cf):
        """CF vectors of items or users (B, E or E') -> Q states each (B, Q, D), which stage 2's
        adapter turns into soft tokens."""
        return self(cf)[0]

    def freeze_all_but_encode(self):
        """Stage 2 reads CF vectors alone. What encode() does not touch is frozen: the text branch,
        the heads, the temperature."""
        self.requires_grad_(False)
        self.queries.requires_grad_(True)
        used = [self.cf_keys, self.history_keys, self.norm]
        for layer in self.layers:
            used += [layer.self_attention, layer.query_ffn]
            used += [layer.cross_attention, layer.history_attention]
        for part in used:
            if part is not None:  # a layer reads the CF vector or the history
                part.requires_grad_(True)

    # -- heads

    def query_features(self, query_states):
        return F.normalize(self.query_proj(query_states), dim=-1)  # (B, Q, P)

    def text_features(self, text_ids, text_mask):
        """The [CLS] states of texts that know no queries, projected: (B, P)."""
        states = self(None, text_ids, text_mask, "separate")[1]
        return F.normalize(self.text_proj(states[:, 0]), dim=-1)

    def match_logits(self, cf, text_ids, text_mask, item, text):
        """Does text[n] belong to item[n]? Indices (N,) into B items and B texts -> (N, 2).

        Queries and text see all of each other. A linear head reads every query; their mean counts.
        """
        queries, _ = self(cf[item], text_ids[text], text_mask[text], "joint")
        return self.itm_head(queries).mean(1)

    def lm_logits(self, text_states):
        """States (..., D) -> next-token logits (..., V). The output table is the input table."""
        states = self.lm_norm(F.gelu(self.lm_transform(text_states)))
        return states @ self.words.weight.T + self.lm_bias

    def bounded_temperature(self):
        """The learned temperature, kept in a sane range. .07 at the start."""
        return self.temperature.clamp(*TEMPERATURES)


# ---- The losses and their parts: pure functions of tensors ----


def item_text_similarity(query_features, text_features):
    """(B, Q, P), (B, P) -> (B, B): item i against text j, the best of its Q queries. In [-1, 1]."""
    return torch.einsum("iqp,jp->ijq", query_features, text_features).amax(2)


def pair_similarity(a, b):
    """(B, Q, P), (B, Q, P) -> (B, B): query q of one side with query q of the other, the mean.

    DEVIATION: the paper does not say how it pools. The best of all pairs (as in ITC) trains one
    query and lets the others forget the CF vector, from which stage 2 then has to start.
    """
    return torch.einsum("iqp,jqp->ij", a, b) / a.shape[1]


def find_duplicates(left_key, right_key):
    """Which pairs (i, j) of a batch are no negatives: (B,), (B,) -> (B, B) bool.

    Keys are equal for the same item and for items of equal text; a user has one that no item has.
    Pair j is no negative of pair i if one of its keys is i's left key, or if their right keys are
    equal. The diagonal, the pairs themselves, is False.
    """
    same = left_key[:, None] == right_key
    same = same | (left_key[:, None] == left_key) | (right_key[:, None] == right_key)
    return same.fill_diagonal_(False)


def contrastive_loss(similarity, temperature, duplicates, label_smoothing=0.0):
    """ITC, II and UI: each row finds its column on the diagonal, and each column its row.

    (B, B) similarities, duplicates (B, B) -> scalar: -log softmax(similarity / temperature)[i, i],
    the mean over rows and over both directions. Duplicates are neither target nor negative. With
    label smoothing s it is 1 - s of that and s of the mean over all columns but duplicates.

    About ln B at the start. II and UI hardly fall below it on the toy world, where a user's other
    items are negatives too. If their logged accuracy stays at 1 / B, the queries have collapsed.
    """
    loss = 0.0
    for logits, left_out in ((similarity, duplicates), (similarity.T, duplicates.T)):
        logits = (logits / temperature).float()
        log_p = logits.masked_fill(left_out, -torch.inf).log_softmax(1)
        smooth = log_p.masked_fill(left_out, 0).sum(1) / (~left_out).sum(1)
        rows = (1 - label_smoothing) * log_p.diagonal() + label_smoothing * smooth
        loss = loss - rows.mean() / 2
    return loss


def hard_negatives(logits, duplicates, generator=None):
    """For ITM: a confusable wrong column for each row, drawn by softmax of the logits.

    (B, B) logits, duplicates (B, B) -> indices (B,). Neither a row's own column nor a duplicate is
    drawn; a row that has nothing else draws its own.
    """
    wrong = (~duplicates).fill_diagonal_(False)
    weights = (logits.detach().float().softmax(1) + 1e-4) * wrong
    weights.diagonal().copy_(~wrong.any(1))
    return torch.multinomial(weights, 1, generator=generator)[:, 0]


def itm_loss(logits, labels):
    """Item-text matching: is this pair real? logits (N, 2), labels (N,) 1 or 0 -> scalar.

    N = 3B: true pairs, items with a wrong text, texts with a wrong item. At the start about .69;
    p = 1/3 for every pair gives .64.
    """
    return F.cross_entropy(logits.float(), labels)


def next_tokens(text_states, text_ids, text_mask):
    """The text branch's states that have a real next token, and that token. [DEC], at position 0,
    predicts t1.

    (B, T, D), (B, T), (B, T) -> states (N, D), next tokens (N,). Padding gets no logits.
    """
    real = text_mask[:, 1:]
    return text_states[:, :-1][real], text_ids[:, 1:][real]


def itg_loss(logits, targets, label_smoothing=0.1):
    """Item-grounded text generation: -log p(next token | queries, tokens so far), smoothed, on
    validation too.

    logits (N, V), targets (N,) of next_tokens -> the sum over all real tokens of all texts, and
    their number (1,). The quotient is about ln V at the start.
    """
    total = F.cross_entropy(
        logits.float(), targets, label_smoothing=label_smoothing, reduction="sum"
    )
    return total, targets.new_tensor([len(targets)])


# ---- The losses of a batch ----------------
# Where several processes share a batch, each calls these functions with its own rows. Its `gather`
# makes the rows of all from them, in the order of their ranks, and knows its rank.


class Alone:
    """The gather of a single process: its rows are all rows."""

    rank = 0

    def __call__(self, rows):
        return rows


def item_text_losses(model, cf, ids, mask, key, dec, generator=None, gather=Alone()):
    """The three BLIP-2 losses: cf (B, E), ids and mask (B, T) -> {"itc", "itm", "itg"}, scalars.

    key (B,): equal for items of equal text. Position 0 of ids is [CLS], to compare or match; dec is
    the token that takes its place to write. Read it at first for a single process: there gather(x)
    is x, and own is 0 .. B-1.
    """
    own = gather.rank * len(cf) + torch.arange(len(cf), device=cf.device)  # its rows among all
    everything = gather(cf), gather(ids), gather(mask)
    duplicates = find_duplicates(gather(key), gather(key))
    temperature, losses = model.bounded_temperature(), {}

    # One pass for two losses: queries never see the text in the causal pattern, so that ITC can
    # compare what ITG writes from
    dec_ids = torch.cat([torch.full_like(ids[:, :1], dec), ids[:, 1:]], 1)
    queries, written = model(cf, dec_ids, mask, "causal")

    # ITC: an item finds its text among the batch's, and a text its item
    queries = gather(model.query_features(queries))  # (B, Q, P)
    texts = gather(model.text_features(ids, mask))  # (B, P)
    similarity = item_text_similarity(queries, texts)  # (B, B)
    losses["itc"] = contrastive_loss(similarity, temperature, duplicates, label_smoothing=0.1)

    # ITM: true pairs, items with a confusable wrong text, texts with a confusable wrong item
    wrong_text = hard_negatives(similarity / temperature, duplicates, generator)
    wrong_item = hard_negatives(similarity.T / temperature, duplicates.T, generator)
    item = torch.cat([own, own, wrong_item[own]])  # (3B,)
    text = torch.cat([own, wrong_text[own], own])
    labels = (item == text).long()
    losses["itm"] = itm_loss(model.match_logits(*everything, item, text), labels)

    # ITG: write the text from the queries. The mean is over the tokens of all N processes. Since
    # their gradients are averaged, each divides its sum by (all tokens / N); N is mostly 1
    states, targets = next_tokens(written, ids, mask)
    total, count = itg_loss(model.lm_logits(states), targets)
    losses["itg"] = total / gather(count).float().mean()
    return losses


def pair_loss(model, left_cf, right_cf, left_key, right_key, gather=Alone()):
    """II or UI, the paper's: the two sides of a pair find each other. Items that one user chose
    within a few steps, or a user and an item of theirs.

    CF vectors (B, E) and keys (B,) of both sides (find_duplicates) -> scalar, and the share of left
    sides whose own partner is the most similar (chance 1 / B). Other items of the same user are
    negatives.
    """
    duplicates = find_duplicates(gather(left_key), gather(right_key))
    states = model.encode(torch.cat([left_cf, right_cf]))
    left, right = model.query_features(states).chunk(2)
    similarity = pair_similarity(gather(left), gather(right))  # (B, B)
    loss = contrastive_loss(similarity, model.bounded_temperature(), duplicates)

    best = similarity.detach().masked_fill(duplicates, -2).argmax(1)
    hit = best == torch.arange(len(best), device=best.device)
    return loss, hit.float().mean()
