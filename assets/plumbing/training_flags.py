"""The flags of the training scripts."""

from pathlib import Path

from assets.plumbing.flags import add_choice, add_number, add_switch
from assets.plumbing.guard import InputError, Parser, a_seed, within

NOT_WITH = {  # --method: flags that do nothing there
    "ilm-rand": ("stage1",),
    "mlp": ("stage1", "layers", "width"),
    "text": ("stage1", "layers", "width", "num_queries", "history", "shuffle_cf"),
}


def add_run_flags(p, out, steps, batch_size, lr, rows):
    """Where a run reads and writes, and how long it trains; rows: the smallest batch."""
    run = p.add_argument_group("run")
    run.add_argument("--data", default="data/toy", help="prepared folder [data/toy]")
    run.add_argument("--out", help=f"run directory [out/NAME/{out}, NAME that of --data]")
    run.add_argument("--device", help="[cuda if there is one, else cpu]")
    run.add_argument("--seed", type=a_seed, default=0, help="[0]")
    add_number(run, "--steps", steps, "optimizer steps", 1)
    add_number(run, "--batch-size", batch_size, "rows of all processes", rows)
    peak = "peak, after 5 %% of the steps; then cosine to a tenth"
    add_number(run, "--lr", lr, peak, 0, 100)
    every = (
        f"steps between validations; 0: {'a tenth' if out == 'stage1' else 'a sixth'} of --steps"
    )
    add_number(run, "--eval-every", 0, every, 0)
    again = "go on from the last checkpoint; with more --steps on the longer cosine"
    run.add_argument("--resume", action="store_true", help=again)


def add_qformer_flags(p, **defaults):
    """The shape of the Q-Former; None for what another run or QFormerConfig says."""
    shape = p.add_argument_group("item encoder")
    for name, high, help in (
        ("num_queries", 1024, "Q, soft tokens per item [4]"),
        ("layers", 256, "layers; cross-attention in every second [2]"),
        ("width", 1 << 16, "Q-Former width D [128]"),
    ):
        kind, default = within(int, 1, high), defaults.get(name)
        shape.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=help)
    return shape


def shape_of(args):
    """What was said of the shape of the Q-Former."""
    shape = {name: getattr(args, name) for name in ("num_queries", "layers", "width")}
    return {name: value for name, value in shape.items() if value is not None}


def refuse_unused(args):
    """A flag that --method does not read is a mistake."""
    for name in NOT_WITH.get(args.method, ()):
        value = getattr(args, name)
        if value is not None and value is not False:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} does nothing with --method {args.method}; leave it out")


def settled(args, out, validations):
    """The defaults that depend on other flags: out/NAME/..., so many validations a run."""
    args.out = args.out or f"out/{Path(args.data).name}/{out}"
    args.eval_every = args.eval_every or max(1, args.steps // validations)
    return args


def stage1_flags(argv, doc, losses):
    p = Parser(description=doc.split("\n\n")[0])
    add_run_flags(p, "stage1", steps=200, batch_size=64, lr=1e-3, rows=2)  # contrast needs two
    add_qformer_flags(p, num_queries=4, layers=2, width=128)
    p.add_argument("--init-bert", help="HF folder of a BERT whose weights start the text branch")
    p.add_argument("--tokenizer", help="HF folder or id [--init-bert's own, else assets/toy_llm]")
    p.add_argument("--losses", nargs="+", default=[*losses], choices=losses, help="[all five]")
    add_number(p, "--text-fraction", 1.0, "share of training items with texts", 1e-6, 1)
    args = p.parse_args(argv)
    if args.init_bert and args.tokenizer:
        raise InputError("--init-bert comes with its own tokenizer: leave out --tokenizer")
    return settled(args, "stage1", validations=10)


def stage2_flags(argv, doc, methods, priors):
    p = Parser(description=doc.split("\n\n")[0])
    add_run_flags(p, "ilm", steps=160, batch_size=16, lr=2e-3, rows=1)
    # Of ilm-rand and mlp; the shape of ilm is its stage-1 run's
    shape = add_qformer_flags(p)
    window = "W, items of a user's history read beside their vector [20; mlp: 0]"
    shape.add_argument("--history", type=within(int, 0, 200), help=window)
    shape.add_argument("--stage1", help="run of train_stage1.py for --method ilm [out/NAME/stage1]")
    add_switch(shape, "--shuffle-cf", "a control: the CF vectors of other items and users")

    model = p.add_argument_group("model")
    add_choice(model, "--method", methods, "what stands for items and users")
    model.add_argument("--llm", default="assets/toy_llm", help="folder or hub id [assets/toy_llm]")
    add_switch(model, "--train-llm", "train the LLM as well")
    add_switch(model, "--gradient-checkpointing", "less memory, a third more arithmetic in the LLM")
    add_switch(model, "--compile", "for a GPU: faster layers of the LLM, after half a minute")
    names = "title, random, or a file of lines `id name`, as OpenP5's index files [title]"
    model.add_argument("--item-names", default="title", metavar="title|random|FILE", help=names)
    add_number(model, "--name-tokens", 0, "cut names to so many, keeping them unique; 0: whole", 0)
    histories = "histories of the soft methods"
    add_choice(model, "--prompt-items", ("names+tokens", "tokens"), histories)
    templates = "templates of the ranking tasks, also OpenP5's prompt file [prompts.txt]"
    model.add_argument("--prompts", metavar="FILE", help=templates)
    add_switch(model, "--full-vocabulary", "names compete with all tokens")
    add_choice(model, "--prior", priors, "added in the trie to the LLM's opinion of names")
    add_choice(model, "--temperature", ("learned", "fixed"), "how loud the LLM is there; fixed: 1")

    training = p.add_argument_group("objective")
    shares = "share of batches of each kind (a step's loss is a mean over tokens) [.3 .5 .2]"
    three = {"nargs": 3, "metavar": ("SEQ", "STR", "TEXT"), "default": [0.3, 0.5, 0.2]}
    training.add_argument("--mix", type=within(float, 0), help=shares, **three)
    add_number(training, "--text-fraction", 1.0, "share of training items with texts", 1e-6, 1)
    add_number(training, "--accumulate", 2, "micro-batches a step, each of one kind", 1)
    tokens = "most tokens, with padding, that the LLM reads at once; a micro-batch is cut to it"
    add_number(training, "--batch-tokens", 0, f"{tokens}; 0: 4,096 on a CPU, 20,000 on a GPU", 0)
    add_number(training, "--valid-users", 128, "users of each validation", 1)

    args = p.parse_args(argv)
    refuse_unused(args)
    if args.history is None:  # an MLP reads the vector alone, as CoLLM's: with more it overfits
        args.history = 0 if args.method == "mlp" else 20
    if args.method == "ilm":
        args.stage1 = args.stage1 or f"out/{Path(args.data).name}/stage1"
    if not sum(args.mix):
        raise InputError("--mix: the shares must not all be 0")
    return settled(args, args.method, validations=6)
