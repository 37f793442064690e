"""The flags of evaluate.py."""

from assets.plumbing.flags import add_choice, add_number, add_switch
from assets.plumbing.guard import InputError, Parser, a_seed, within

# What --recommend reads
RECOMMEND = "run data recommend new top batch_size device seed".split()


def evaluate_flags(argv, doc, tasks):
    """Arguments (None: the command line's) -> a namespace. tasks: what --tasks may name."""
    from assets.extras.sasrec import sasrec_settings

    p = Parser(description=doc.split("\n")[0])
    p.add_argument(
        "--run",
        nargs="+",
        help="run directories [all of out/toy; with --data data/NAME, of out/NAME]",
    )
    p.add_argument("--data", help="prepared folder [the run's]")
    p.add_argument(
        "--recommend",
        metavar="FILE",
        help="evaluate nothing: print the best items for each user id in FILE, one a line",
    )
    add_number(p, "--top", 10, "with --recommend: items for each user", 1)
    p.add_argument(
        "--new",
        metavar="FOLDER",
        help="with --recommend: interactions.csv (and items.csv) of users and items that came "
        "later",
    )
    add_choice(p, "--split", ("test", "valid"), "last items, or those before them")
    p.add_argument(
        "--tasks",
        nargs="+",
        choices=tasks,
        help="[those that the run was trained on]",
    )
    p.add_argument(
        "--beams",
        type=within(int, 0),
        help="beam width of ranking; 0 = exact [exact up to 1,000 items, else 20]",
    )
    add_switch(p, "--full-vocabulary", "score names without renormalising")
    add_switch(p, "--keep-history", "leave items of the history in")
    add_switch(p, "--controls", "shuffled CF, zero soft tokens, text only")
    p.add_argument(
        "--sasrec",
        nargs="?",
        const={},
        type=sasrec_settings,
        metavar="JSON",
        help="train SASRec as one more reference, with these settings [its defaults]",
    )
    p.add_argument(
        "--sc-encoder",
        metavar="PATH",
        help="folder or hub id of a sentence encoder for SC [the LLM's own mean states]",
    )
    p.add_argument(
        "--table",
        nargs="+",
        metavar="FILE",
        help="run nothing: tables of these metrics.json or --json files",
    )
    p.add_argument(
        "--against", default="ilm", help="the method or reference that p compares with [ilm]"
    )
    p.add_argument("--plot", metavar="DIR", help="draw figures there (needs matplotlib)")
    p.add_argument(
        "--max-users", type=within(int, 1), help="a fixed random sample of test users [all]"
    )
    add_number(p, "--max-texts", 500, "instances a text task, at even distances", 1)
    add_number(p, "--batch-size", 50, "users ranked at a time", 1)
    p.add_argument("--json", help="write the list of all results there")
    p.add_argument("--device", help="[cuda if there is one, else cpu]")
    p.add_argument(
        "--seed",
        type=a_seed,
        default=0,
        help="of nothing here: evaluation draws no random numbers but fixed ones [0]",
    )
    args = p.parse_args(argv)
    if args.table and (args.run or args.recommend or args.json):
        raise InputError("--table runs nothing: leave out --run, --recommend and --json")
    if args.recommend:
        for name, value in vars(args).items():
            if name not in RECOMMEND and value != p.get_default(name):
                flag = name.replace("_", "-")
                raise InputError(f"--recommend evaluates nothing: leave out --{flag}")
        if len(args.run or []) > 1:
            raise InputError("--recommend asks one --run")
    if 0 < (args.beams or 0) < 10:
        raise InputError(f"--beams {args.beams}: HR@10 needs ten; give 10 or more, or 0 for all")
    if args.sc_encoder and args.tasks and "text" not in args.tasks:
        raise InputError("--sc-encoder measures texts: give --tasks text as well, or no --tasks")
    if (args.new or args.top != 10) and not args.recommend:
        raise InputError(
            "--new and --top go with --recommend: who came later has no test items to evaluate on"
        )
    return args
